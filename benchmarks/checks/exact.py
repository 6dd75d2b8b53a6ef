"""What must come out the same on any machine, to the last token: the exact half of `make check`.

Tiny models whose float64 weights come from NumPy's bit generator, fixed prompts, and every scorer, gate, search and setting; the
lab's texts and their judgement; rows as the sweep makes them, of untrained models; losses, laws and statistics of fixed numbers.
Whole numbers, bits and texts are compared exactly, other numbers within TOLERANCE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.analysis import bootstrap, claims
from benchmarks.checks.exact_further import (
    architectures,
    bounds,
    entry_points,
    further_likelihoods,
    further_searches,
    replicates,
    rubric,
    summaries,
)
from benchmarks.checks.exact_lab import columns, lab_rows, lab_texts, models, settling
from benchmarks.checks.exact_models import (
    FAMILIES,
    HOW,
    VOCABULARY,
    described,
    fill,
    language_model,
    numbers,
    prompts,
    reward_model,
    tokenizer,
    value_model,
)
from benchmarks.checks.exact_settings import (
    drawings,
    edges,
    ends,
    places,
    real_models,
    shapes,
    transformers_way,
    two_replicates,
)
from benchmarks.figures import theory
from benchmarks.runtime.workers import threads
from benchmarks.subjects.lab import models as training
from benchmarks.subjects.lab.tokenizer import EOS
from sia import (
    AttentionGate,
    AttentionRiseGate,
    AutoregressiveScorer,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    Gate,
    PositionGate,
    RandomGate,
    RewardScorer,
    RolloutScorer,
    Steering,
    ValueModel,
    best_of_n,
    calibrate,
    chunk_beam_search,
    generate,
)
from sia._attention import Attention
from sia.gates import Entropy
from sia.likelihood import log_likelihoods
from sia.steering import drop_improbable, entropy, kl_divergence, tilt
from sia.training import distill, distillation_loss

TOLERANCE = {
    "relative": 2e-4,
    "absolute": 2e-5,
}  # of float32 arithmetic in another order, and of numbers written with five digits
DIGITS = 5


def compute(sections: Sequence[str] = ()) -> dict:
    """Everything (or these sections), by section and case: numbers, texts and lists of them, as JSON can hold."""
    every: list[Callable[[], dict]] = [
        equations,
        decoding,
        searches,
        likelihoods,
        losses,
        lab_texts,
        lab_rows,
        models,
        settling,
        laws,
        statistics,
        architectures,
        entry_points,
        further_searches,
        further_likelihoods,
        rubric,
        replicates,
        bounds,
        summaries,
        transformers_way,
        ends,
        shapes,
        edges,
        places,
        real_models,
        drawings,
        two_replicates,
    ]
    with threads(1):  # these models are too small for more
        return {
            section.__name__: plain(section())
            for section in every
            if not sections or section.__name__ in sections
        }


def plain(found):
    """Tensors, arrays and tuples as lists; numbers of Python, those with a fraction to DIGITS digits."""
    if isinstance(found, dict):
        return {str(key): plain(value) for key, value in found.items()}
    if isinstance(found, (Tensor, np.ndarray)):
        return plain(found.tolist())
    if isinstance(found, (list, tuple)):
        return [plain(value) for value in found]
    if isinstance(found, (float, np.floating)):
        return round(float(found), DIGITS) if math.isfinite(found) else str(found)
    return found.item() if isinstance(found, np.generic) else found


def differences(found, expected, where: str = "") -> Iterator[str]:
    """Each place where two results of `compute` differ, with both."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            if key not in found or key not in expected:
                yield f"{where}/{key} is {'missing' if key in expected else 'new'}".removeprefix(
                    "/"
                )
            else:
                yield from differences(
                    found[key], expected[key], f"{where}/{key}".removeprefix("/")
                )
    elif isinstance(found, list) and isinstance(expected, list):
        if len(found) != len(expected):
            yield f"{where} has {len(found)} entries, expected {len(expected)}"
            return
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            yield from differences(one, other, f"{where}[{number}]")
    elif not same(found, expected):
        yield f"{where} is {found!r}, expected {expected!r}"


def same(found, expected) -> bool:
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(
            found, expected, rel_tol=TOLERANCE["relative"], abs_tol=TOLERANCE["absolute"]
        )
    return type(found) is type(expected) and found == expected


# --- sections


def equations() -> dict:
    logits, values, other = numbers(4, 10), numbers(4, 10, seed=1), numbers(4, 10, seed=2)
    return {
        "entropy": entropy(3 * logits),
        **{f"tilt, β = {beta}": tilt(logits, values, beta) for beta in (0.0, 0.5, 2.0, math.inf)},
        "floor": drop_improbable(values, 2 * logits, 0.05),
        "KL": kl_divergence(logits, other),
    }


GATES: dict[str, Gate] = {
    "entropy": EntropyGate(2.0),
    "entropy over the vocabulary": EntropyGate(3.0, over="vocabulary"),
    "low entropy": ~EntropyGate(2.0),
    "entropy rise": EntropyRiseGate(0.05),
    "attention": AttentionGate(4.0),
    "attention of one layer": AttentionGate(4.0, layers=(1,), heads=(0, 3)),
    "attention rise": AttentionRiseGate(1.02),
    "position": PositionGate(4),
    "random": RandomGate(0.4, seed=3),
    "both": EntropyGate(2.0) & RandomGate(0.6),
}


def cases(family: str, model: PreTrainedModel) -> dict[str, tuple[Steering | None, dict]]:
    """Steering, and further arguments of `generate`, by name: every gate, scorer and setting."""
    value, reward = value_model(family), RewardScorer(reward_model(family), EOS)
    open_at, every = EntropyGate(2.0), EveryToken()
    return {name: (Steering(value, gate), {}) for name, gate in GATES.items()} | {
        "unsteered": (None, {}),
        "dense": (Steering(value, every, 2.0), {}),
        "values alone": (Steering(value, open_at, math.inf), {}),
        "β = 0.5, 4 candidates, temperature 0.6": (
            Steering(value, EntropyGate(1.0), 0.5, 4),
            {"temperature": 0.6},
        ),
        "greedy": (Steering(value, open_at), {"temperature": 0.0}),
        "floor": (Steering(value, every, 2.0, min_probability=0.08), {}),
        "another seed": (Steering(value, open_at), {"seed": 7}),
        "its own prompts": (Steering(value, open_at), {"value_prompts": prompts(5, seed=1)}),
        "reward": (Steering(reward, open_at), {}),
        "rollouts": (Steering(RolloutScorer(model, reward, 3, candidates=4), open_at), {}),
        "autoregressive reward": (
            Steering(AutoregressiveScorer(language_model(family, 3)), open_at),
            {},
        ),
    }


def decoding() -> dict:
    """Every case on prompts of unequal length in one batch, some responses ending early; and what gates calibrate to."""
    words, found = tokenizer(), {}
    for family in FAMILIES:
        model = language_model(family)
        for name, (steering, further) in cases(family, model).items():
            made = generate(model, words, prompts(5), steering, batch_size=3, **HOW, **further)
            found[f"{family}, {name}"] = described(made)
        observed = generate(
            model, words, prompts(12), None, **HOW, observe=[Attention(), Entropy("vocabulary")]
        )
        thresholds = [
            calibrate(gate, observed, 0.3)
            for gate in (EntropyGate, EntropyRiseGate, AttentionGate, AttentionRiseGate)
        ]
        thresholds.append(calibrate(EntropyGate, observed, 0.3, over="vocabulary"))
        found[f"{family}, calibrated"] = [gate.threshold for gate in thresholds]
    return found


def searches() -> dict:
    words, asked, found = tokenizer(), prompts(3), {}
    for family in FAMILIES:
        model, reward = language_model(family), RewardScorer(reward_model(family), EOS)
        for name, steering in (
            ("plain", None),
            ("steered", Steering(value_model(family), EntropyGate(2.0))),
        ):
            found[f"{family}, best of 4, {name}"] = described(
                best_of_n(model, words, asked, reward, 4, steering, **HOW)
            )
            found[f"{family}, beams, {name}"] = described(
                chunk_beam_search(model, words, asked, reward, 2, 2, 5, steering, **HOW)
            )
    return found


def likelihoods() -> dict:
    asked, said, found = prompts(3), prompts(3, seed=5), {}
    for family in FAMILIES:
        for name, gate in (("entropy", EntropyGate(2.0)), ("position", PositionGate(2))):
            steering = Steering(value_model(family), gate, candidates=VOCABULARY)
            made = log_likelihoods(language_model(family), steering, asked, said, temperature=0.8)
            found[f"{family}, {name}"] = [
                [one.log_probabilities, one.greedy, one.steered] for one in made
            ]
    return found


def losses() -> dict:
    """Losses of fixed numbers, and what a few steps of training come to."""
    mask = (torch.arange(6) < torch.tensor([[6], [4], [2]])) & (torch.arange(6) > 0)
    found: dict[str, object] = {
        f"distillation, {loss}": distillation_loss(numbers(3, 6), mask, numbers(3, seed=1), loss)
        for loss in ("mean", "token")
    }
    asked, said = prompts(24), [[*response, EOS] for response in prompts(24, seed=6)]
    rewards = numbers(24, seed=2).tolist()
    how = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 8, "seed": 1}
    whole = [[*p, *r] for p, r in zip(asked, said, strict=True)]
    starts, half = [len(p) for p in asked], len(whole) // 2
    for family in FAMILIES:
        model = language_model(family, size=0.2)
        for only in (True, False):
            taught = language_model(family, size=0.2)
            training.train_language_model(
                taught, asked, said, response_only=only, progress=lambda _: None, **how
            )
            found[f"{family}, language model, {'responses' if only else 'documents'}"] = (
                training.heldout_loss(taught, asked, said)
            )
        many, of_all_lengths = (
            prompts(300, seed=7),
            [[*response, EOS] for response in prompts(300, seed=8)],
        )
        found[f"{family}, loss of many responses"] = training.heldout_loss(
            model, many, of_all_lengths
        )
        found[f"{family}, log-likelihoods"] = training.sequence_log_likelihoods(
            model, whole, starts
        )
        for loss in ("mean", "token"):
            values = distill(
                fill(ValueModel.from_backbone(model).double(), 1, 0.2),
                asked,
                said,
                rewards,
                loss=loss,
                **how,
            )
            with torch.no_grad():
                found[f"{family}, values, {loss}"] = [
                    values(torch.tensor([sequence]))[0, -3:] for sequence in whole[:3]
                ]
        judged = fill(training.new_reward_model(model, family).double(), 2, 0.2)
        training.train_reward_model(
            judged, whole[:half], whole[half:], progress=lambda _: None, **how
        )
        found[f"{family}, rewards"] = training.trajectory_rewards(judged, whole[:6])
        liked = language_model(family, size=0.2)
        training.train_autoregressive_reward(
            liked, whole[:half], whole[half:], starts[:half], scale=0.1, progress=lambda _: None, **how
        )  # fmt: skip
        found[f"{family}, autoregressive rewards"] = training.sequence_log_likelihoods(
            liked, whole[:6], starts[:6]
        )
    return found


def laws() -> dict:
    """Deviations from identities, which are zero, and what else random steps and trees come to."""
    steps, trees = theory.random_steps(0).iloc[:40], theory.random_trees(0).iloc[:20]
    exact = (
        (steps["regret"] - steps["kl_base_optimum"]).abs().max(),
        (trees["regret"] - trees["sum_under_own"]).abs().max(),
    )
    return {"identities": exact, "steps": columns(steps), "trees": columns(trees)}


def statistics() -> dict:
    values = numbers(2 * 3 * 8 * 2, 2).numpy()
    weights = bootstrap.bootstrap_weights((2, 3, 8, 2), 400, np.random.default_rng(0))
    tests = [
        (test, margin, margin + low, margin + low + 0.3)
        for test in ("more", "less", "at least")
        for margin in (-0.1, 0.0, 6.0)
        for low in (-0.4, -0.3, -0.1, 0.0, 0.1)
    ]
    return {
        "interval": bootstrap.interval(values, weights, 0.95),
        "verdicts": {
            f"{test} {margin}, {low:.1f}": claims.decide(test, margin, low, high)
            for test, margin, low, high in tests
        },
    }

"""Numbers of NumPy and torch are those that they hold; what is no number is refused."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from sia import (
    Attention,
    AttentionGate,
    EntropyGate,
    EveryToken,
    PositionGate,
    RandomGate,
    RewardScorer,
    RolloutScorer,
    SteeredGenerate,
    Steering,
    best_of_n,
    calibrate,
    chunk_beam_search,
    distill,
    steered_generate,
)
from tests.helpers import tiny

MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
PROMPTS = tiny.prompts(3)
generate = partial(tiny.generate, MODEL, PROMPTS)
BASE = generate()
REWARD = RewardScorer(tiny.reward_model("qwen3"))
search = partial(
    chunk_beam_search, MODEL, tiny.tokenizer(), PROMPTS, REWARD, max_new_tokens=4, progress=False
)
best = partial(best_of_n, MODEL, tiny.tokenizer(), PROMPTS, REWARD, progress=False)
WIDTHS = {"width": 1, "expansions": 2, "chunk": 2}


def transformers(**options):
    return MODEL.generate(
        torch.tensor([[7, 8]]), custom_generate=steered_generate, do_sample=True, max_new_tokens=4,
        **options,
    ).tolist()  # fmt: skip


def steered(**options):
    options = {"scorer": VALUES, "gate": EveryToken()} | options
    return tiny.tokens(generate(Steering(**options)))


def rollouts(tokens=2, **options):
    return steered(scorer=RolloutScorer(MODEL, REWARD, tokens, **options))


def distilled(**options):
    options = {"epochs": 1, "batch_size": 1, "seed": 0} | options
    model = distill(
        tiny.value_model("qwen3"), PROMPTS, PROMPTS, [1.0, 0.0, 0.5],
        loss="mean", learning_rate=1e-2, **options,
    )  # fmt: skip
    return model.head.weight.tolist()


TAKEN = {
    "seed": (lambda x: tiny.tokens(generate(seed=x)), 5),
    "candidates": (lambda x: tiny.tokens(generate(candidates=x)), 3),
    "max_new_tokens": (lambda x: tiny.tokens(generate(max_new_tokens=x)), 3),
    "batch_size": (lambda x: tiny.tokens(generate(batch_size=x)), 2),
    "temperature": (lambda x: tiny.tokens(generate(temperature=x)), 0.5),
    "beta": (lambda x: steered(beta=x), 2.5),
    "an infinite beta": (lambda x: steered(beta=x), math.inf),
    "a steering's candidates": (lambda x: steered(candidates=x), 4),
    "min_probability": (lambda x: steered(min_probability=x), 0.25),
    "entropy": (EntropyGate, 1.5),
    "attention": (AttentionGate, 2),
    "position": (PositionGate, 3),
    "random": (RandomGate, 0.5),
    "a gate's seed": (lambda x: RandomGate(0.5, x), 2**40),
    "from a setting": (PositionGate.from_setting, 3.0),
    "layers": (lambda x: Attention(layers=x), 1),
    "heads": (lambda x: Attention(heads=[x]), 1),
    "ratio": (lambda x: calibrate(EntropyGate, BASE, x), 0.25),
    "n": (lambda x: tiny.tokens(best(n=x, max_new_tokens=4)), 2),
    **{
        name: (lambda x, name=name: tiny.tokens(search(**(WIDTHS | {name: x}))), number)
        for name, number in WIDTHS.items()
    },
    "a search's seed": (lambda x: tiny.tokens(search(**WIDTHS, seed=x)), 7),
    "transformers' seed": (lambda x: transformers(seed=x), 7),
    "tokens of rollouts": (rollouts, 2),
    "candidates of rollouts": (lambda x: rollouts(candidates=x), 3),
    "rollouts' seed": (lambda x: rollouts(seed=x), 7),
    "distill's seed": (lambda x: distilled(seed=x), 7),
}
WRAPPERS = {
    "numpy": lambda x: np.asarray(x)[()],
    "array": np.asarray,
    "long double": lambda x: np.longdouble(x) if isinstance(x, float) else np.int64(x),
    "tensor": lambda x: torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", TAKEN)
def test_numbers_of_other_libraries_are_accepted(name, wrapper):
    act, number = TAKEN[name]
    assert str(act(WRAPPERS[wrapper](number))) == str(act(number))


@pytest.mark.parametrize("seeds", [np.array([3, 4, 5]), torch.tensor([3, 4, 5]), range(3, 6)])
def test_seeds_may_be_an_array(seeds):
    expected = tiny.tokens(generate(seed=[3, 4, 5]))
    assert tiny.tokens(generate(seed=seeds)) == tiny.tokens(generate(seed=list(seeds))) == expected
    out = MODEL.generate(
        torch.tensor([[7, 8]] * 3),
        custom_generate=SteeredGenerate(seed=seeds), do_sample=True, max_new_tokens=4,
    )  # fmt: skip
    assert out[:, 2:].tolist() == tiny.tokens(
        tiny.generate(MODEL, [[7, 8]] * 3, seed=[3, 4, 5], max_new_tokens=4)
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: generate(seed=1.5), "seed must be a whole number, got 1.5"),
        (lambda: generate(seed="a"), "seed must be a whole number, got 'a'"),
        (lambda: generate(seed=True), "seed must be a whole number, got True"),
        (lambda: generate(seed=np.array([1.0, 2.0, 3.0])), "seed must be a whole number, got 1.0"),
        (
            lambda: generate(seed=np.arange(2)),
            "seed must be one number, or one for each of the 3 prompts, got 2",
        ),
        (
            lambda: generate(max_new_tokens=np.float64(3)),
            "max_new_tokens must be a whole number of at least 1, got 3.0",
        ),
        (
            lambda: generate(max_new_tokens="3"),
            "max_new_tokens must be a whole number of at least 1, got '3'",
        ),
        (
            lambda: generate(batch_size="2"),
            "batch_size must be a whole number of at least 1, got '2'",
        ),
        (
            lambda: generate(temperature="warm"),
            "temperature must be 0 (greedy) or a finite number above it, got 'warm'",
        ),
        (
            lambda: generate(temperature=np.array([0.5, 0.7])),
            "temperature must be 0 (greedy) or a finite number above it, got array([0.5, 0.7])",
        ),
        (
            lambda: Steering(VALUES, EveryToken(), min_probability="x"),
            "min_probability must be at least 0 and less than 1, got 'x'",
        ),
        (
            lambda: PositionGate.from_setting(2.5),
            "tokens must be a whole number of at least 0, got 2.5",
        ),
        (lambda: RandomGate(np.bool_(True)), "ratio must lie between 0 and 1, got np.True_"),
        (lambda: rollouts(seed=1.5), "seed must be a whole number, got 1.5"),
        (lambda: rollouts(2.0), "tokens must be a whole number of at least 1, got 2.0"),
        (lambda: rollouts(candidates=2.5), "candidates must be a whole number, got 2.5"),
        (lambda: distilled(seed=1.5), "seed must be a whole number, got 1.5"),
        (lambda: RandomGate(0.5, 1.5), "seed must be a whole number, got 1.5"),
        (lambda: Attention(layers=["a"]), "each of the layers must be a whole number, got 'a'"),
        (
            lambda: calibrate(EntropyGate, BASE, "half"),
            "ratio must be greater than 0 and at most 1, got half",
        ),
        (lambda: best(n=2.0), "n must be a whole number of at least 1, got 2.0"),
        (
            lambda: search(**(WIDTHS | {"chunk": None})),
            "chunk must be a whole number of at least 1, got None",
        ),
    ],
)
def test_arguments_that_are_no_numbers_are_refused(act, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        act()
    assert str(error.value) == message

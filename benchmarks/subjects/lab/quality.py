"""Quality of the lab's models on prompts that none was trained on: the table models.csv."""

import math
import random
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from benchmarks.runtime import workers
from benchmarks.spec.methods import AUTOREGRESSIVE, EVALUATION_REWARD, REWARD
from benchmarks.spec.model_kinds import BASE, FITTED, ModelKind, value_kind
from benchmarks.spec.profile import LabProfile
from benchmarks.subjects.lab.heads import heldout_states, prompts_to_fit
from benchmarks.subjects.lab.replicate import Replicate, with_eos
from benchmarks.subjects.lab.tokenizer import encode_prompts, encode_responses
from benchmarks.subjects.lab.train import stages
from benchmarks.subjects.lab.training import heldout_loss
from benchmarks.subjects.scoring import (
    batches_by_length,
    positions_at_once,
    sequence_log_likelihoods,
)
from sia import ValueModel
from sia._inputs import pad_right
from sia.fitting import explained_variance, rank_states
from sia.steering import divergence, steer
from sia.training import distillation_loss

CAPTURED = (10, 20, 40)  # percent of the steps
PERCENTS = (10, 50, 100)  # of a response, where values are compared with the judge
SURE, UNCERTAIN = 0.01, 0.672  # nats: entropies that are reported for real models
SECONDS_PER_MODEL = 6  # estimated, of one core
Metrics = Iterator[tuple[str, float, int]]  # id, estimate, number of observations


def model_quality(
    profile: LabProfile, replicates: Sequence[int], workers: workers.Workers
) -> pd.DataFrame:
    """Return the quality of all models.

    Losses are in nats; correlations are Pearson's, with the judge.

    Returns:
        Columns replicate, family, model, metric, estimate, n.
    """
    models = [model for stage in stages(profile) for model in stage]
    heads = [(label, family) for label, family in models if label.startswith("heads")]
    others = [model for model in models if model not in heads]
    # heads take most of the time, and need nothing of the others
    return _measured(profile, replicates, workers, [others, *([one] for one in heads)])


def base_quality(
    profile: LabProfile, replicates: Sequence[int], workers: workers.Workers
) -> pd.DataFrame:
    """Return the quality of the base models of the usual size alone, as `model_quality` does."""
    bases = [[(str(BASE), family)] for family in profile.families]
    return _measured(profile, replicates, workers, bases)


def _measured(
    profile: LabProfile,
    replicates: Sequence[int],
    workers: workers.Workers,
    parts: Sequence[list[tuple[str, str]]],
) -> pd.DataFrame:
    """Return the quality of models, (label, family) each, by parts that are measured at once."""
    tasks = [(Replicate(profile, index), part) for index in replicates for part in parts]
    by_task = workers.run(measure_models, tasks, description="quality of the models")
    frame = pd.DataFrame.from_records([record for records in by_task for record in records])
    return frame.sort_values(["replicate", "family", "model", "metric"]).round({"estimate": 4})


def measure_models(task: tuple[Replicate, list[tuple[str, str]]]) -> list[dict]:
    """Return the records of some of a replicate's models, (label, family) each."""
    replicate, models = task
    heldout, records = _Heldout(replicate), []
    for label, family in models:
        kind = ModelKind.parse(label)
        labels = {"replicate": replicate.index, "family": family, "model": label}
        records += [
            labels | {"metric": metric, "estimate": float(estimate), "n": n}
            for metric, estimate, n in heldout.metrics(kind, family)
        ]
    workers.report(SECONDS_PER_MODEL * len(models))
    return records


class _Heldout:
    """Held-out prompts of a replicate, with two responses of each language model to each prompt."""

    def __init__(self, replicate: Replicate) -> None:
        self.replicate = replicate
        self.prompts = replicate.prompts["heldout"]
        self.ids = encode_prompts(replicate.tokenizer, self.prompts)
        # by kind and family: two responses to each prompt, and the judge's scores
        self.responses: dict[tuple[str, str], tuple[list[list[int]], np.ndarray]] = {}

    def metrics(self, kind: ModelKind, family: str) -> Metrics:
        """Return the metrics of a model; none of samples."""
        measures = {
            "base": self.language_model_metrics,
            "instruct": self.language_model_metrics,
            "instruct-reward": self.language_model_metrics,
            REWARD: self.reward_model_metrics,
            EVALUATION_REWARD: self.reward_model_metrics,
            str(AUTOREGRESSIVE): self.autoregressive_reward_metrics,
            "value": self.value_model_metrics,
            "heads": self.heads_metrics,
        }
        return measures[kind.name](kind, family) if kind.name in measures else iter(())

    def language_model_metrics(self, kind: ModelKind, family: str) -> Metrics:
        replicate, prompts, ids = self.replicate, self.prompts, self.ids
        rng = random.Random(f"heldout responses {replicate.index}")
        writer = replicate.other_world(kind.world)
        texts = [writer.response(prompt.item, rng) for prompt in prompts]
        documents = encode_responses(replicate.tokenizer, texts)
        model = replicate.language_model(str(kind), family)
        samples = [replicate.respond(model, ids, seed=100 + sample) for sample in range(2)]
        judged = np.concatenate([replicate.judge(prompts, responses) for responses in samples])
        tokens = [with_eos(response) for responses in samples for response in responses]
        self.responses[str(kind), family] = tokens, judged
        yield "parameters", sum(p.numel() for p in model.parameters()), 1
        yield "corpus_loss", heldout_loss(model, ids, documents), len(ids)
        yield "judge", judged.mean(), len(judged)
        if kind.name == "base":
            entropies = step_entropies(model, ids * 2, tokens)
            yield "sure_steps", (entropies < SURE).mean(), len(entropies)
            yield "uncertain_steps", (entropies >= UNCERTAIN).mean(), len(entropies)
            yield "entropy_p80", np.quantile(entropies, 0.8), len(entropies)

    @cached_property
    def pairs(self) -> tuple[list[list[int]], list[list[int]], np.ndarray]:
        """First and second responses of all base models, and their scores `(2, pairs)`."""
        first, second, scores = [], [], []
        for family in self.replicate.profile.families:
            tokens, judged = self.responses["base", family]
            whole = [[*p, *r] for p, r in zip(self.ids * 2, tokens, strict=True)]
            first += whole[: len(self.ids)]
            second += whole[len(self.ids) :]
            scores.append(judged.reshape(2, -1))
        return first, second, np.concatenate(scores, axis=1)

    def _accuracy(self, first: np.ndarray, second: np.ndarray) -> tuple[str, float, int]:
        *_, judged = self.pairs
        differ = judged[0] != judged[1]
        agree = (first > second) == (judged[0] > judged[1])
        share = agree[differ].mean() if differ.any() else math.nan
        return "pair_accuracy", share, int(differ.sum())

    def reward_model_metrics(self, kind: ModelKind, family: str) -> Metrics:
        replicate, label, (first, second, judged) = self.replicate, str(kind), self.pairs
        model = replicate.reward_model(label)
        rewards = np.stack([replicate.rewards(label, model, side) for side in (first, second)])
        # expected loss over the noisy preferences that such models learn from
        preferred = 1 / (1 + np.exp(judged[1] - judged[0]))
        margin = (rewards[0] - rewards[1]) * replicate.scale(label)["sd"]
        loss = preferred * np.logaddexp(0, -margin) + (1 - preferred) * np.logaddexp(0, margin)
        yield self._accuracy(*rewards)
        yield "judge_correlation", correlation(rewards, judged), judged.size
        yield "preference_loss", loss.mean(), loss.size

    def autoregressive_reward_metrics(self, kind: ModelKind, family: str) -> Metrics:
        first, second, _ = self.pairs
        model = self.replicate.language_model(str(kind), family)
        starts = [len(prompt) for prompt in self.ids] * len(self.replicate.profile.families)
        yield self._accuracy(
            *(sequence_log_likelihoods(model, side, starts) for side in (first, second))
        )

    def value_model_metrics(self, kind: ModelKind, family: str) -> Metrics:
        replicate, prompts = self.replicate, self.ids * 2
        tokens, scores = self.responses[str(ModelKind("base", world=kind.world)), family]
        sequences = [[*p, *r] for p, r in zip(prompts, tokens, strict=True)]
        rewards = replicate.profile.training.reward_scale * replicate.rewards(
            REWARD, replicate.reward_model(REWARD), sequences
        )
        values = token_values(replicate.value_model(str(kind), family), prompts, tokens)
        yield "distillation_loss", heldout_value_loss(values, rewards, kind.loss), len(values)
        yield "scaled_reward_sd", rewards.std(), len(values)
        for percent in PERCENTS:
            at = np.array([v[math.ceil(percent / 100 * len(v)) - 1] for v in values])
            yield f"judge_correlation_at_{percent}", correlation(at, scores), len(at)
            yield f"value_sd_at_{percent}", at.std(), len(at)

    @torch.no_grad()
    def heads_metrics(self, kind: ModelKind, family: str) -> Metrics:
        """Share of Σ KL(π‖π*) at the steps that each ranks first, AUROC of shifted tokens, …."""
        replicate = self.replicate
        states, own = heldout_states(replicate, kind.loss, family, self.ids)
        gate, q_head, vocabulary = (
            replicate.fitted(str(ModelKind(name, kind.loss)), family) for name in FITTED
        )
        value_model = replicate.value_model(str(value_kind(kind.loss)), family)
        steering, generator = states.dense_steering(value_model, 1.0), torch.Generator()
        values = {
            "q_head": q_head.values(states.hidden, states.candidates),
            "vocabulary_head": vocabulary.values(own.hidden, own.candidates),
        }
        scores = {"predictor": gate.predictor.predict(states.hidden)} | {
            name: divergence(states.logits, steer(states.logits, value, steering))
            for name, value in values.items()
        }
        yield "fitted_prompts", len(prompts_to_fit(replicate)), 1
        for name, value in values.items():
            yield f"{name}_explained", explained_variance(value, states), len(states)
        for ranking in rank_states(states, steering, scores, generator.manual_seed(0)):
            name = ranking.name
            if name in scores:
                yield f"{name}_auroc", ranking.auroc, len(states)
                for percent in CAPTURED:
                    share = ranking.captured[percent / 100]
                    yield f"{name}_captured_{percent}", share, len(states)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation of all elements; NaN where one side is constant."""
    return np.corrcoef(x.ravel(), y.ravel())[0, 1] if np.ptp(x) and np.ptp(y) else math.nan


@torch.no_grad()
def step_entropies(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> np.ndarray:
    """Return the entropy of every response token over the whole vocabulary, in nats."""
    sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    lengths, entropies = [len(sequence) for sequence in sequences], []
    for batch in batches_by_length(lengths, positions_at_once(model.device)):
        input_ids, _ = pad_right([sequences[i] for i in batch])
        log_probabilities = model(input_ids=input_ids, use_cache=False).logits.log_softmax(-1)
        by_step = -(log_probabilities.exp() * log_probabilities).sum(-1)
        for i, entropy in zip(batch, by_step, strict=True):
            entropies.append(entropy[len(prompts[i]) - 1 : lengths[i] - 1])
    return torch.cat(entropies).numpy()


@torch.no_grad()
def token_values(
    value_model: ValueModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Return the values of each response's tokens, `(tokens,)` each."""
    sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    lengths = [len(sequence) for sequence in sequences]
    by_index: dict[int, np.ndarray] = {}
    for batch in batches_by_length(lengths, positions_at_once(value_model.device)):
        input_ids, mask = pad_right([sequences[i] for i in batch])
        for i, values in zip(batch, value_model(input_ids, mask), strict=True):
            by_index[i] = values[len(prompts[i]) : lengths[i]].numpy()
    return [by_index[i] for i in range(len(sequences))]


def heldout_value_loss(values: Sequence[np.ndarray], rewards: np.ndarray, loss: str) -> float:
    """Return the distillation loss of token values for responses with these rewards."""
    padded, mask = pad_right([v.tolist() for v in values])
    return distillation_loss(padded, mask, torch.tensor(rewards, dtype=torch.float32), loss).item()

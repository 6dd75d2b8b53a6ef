"""Fitting a `JunctionGate` and a `QHead` to a language model and a scorer.

Both are trained on states of the model's own responses (`sia.states`), and both report how they do
on prompts that were held out. `fit_…` collects the states itself; `train_…` takes states that may
serve for several.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sia._kv_cache import input_device
from sia._model_identity import ModelIdentity
from sia._modes import learning_mode
from sia._numbers import as_number, seeded_generator, whole_number
from sia._offloading import with_weights
from sia.batch import Prompts
from sia.gates import JunctionGate
from sia.junctions import JunctionPredictor, poisson_loss
from sia.scorers.base import Scorer, known_tokenizers
from sia.scorers.candidate_values import CandidateValues
from sia.scorers.q_head import QHead
from sia.scorers.value_model import ValueModel, check_value_model
from sia.scorers.vocabulary_value_model import VocabularyValueModel
from sia.states import States, collect_states, share_of
from sia.steering import Steering, divergence, steer

SHARES = (0.05, 0.1, 0.2, 0.4)
STATES_PER_STEP = 1024  # of an optimiser step
LEARNING_RATE = 6e-3  # highest, of the one-cycle schedule
HELD_OUT = 0.2  # share of the prompts
ScorerT = TypeVar("ScorerT", QHead, VocabularyValueModel)
# of values within states: the learning rate and initial weights suit values of about 1, so what is
# smaller than this is learned in units of its spread
SMALLEST_SPREAD = 0.2
SMALLEST_DIVERGENCE = 1e-6  # mean, in nats; no prediction is smaller
FLOOR = 0.02  # added to the base probabilities that weight the candidates


@dataclass(frozen=True)
class Ranking:
    """Quality of a score that ranks held-out states by what steering them gains.

    Attributes:
        name: Name of the score: "random", "entropy", "predictor", "head" or "oracle".
        captured: Part of Σ KL(π‖π*) in the highest-ranked share of the states, for each share.
        auroc: Probability that a state in which steering changes the token ranks above one in which
            it does not; NaN where all states are of one kind.
    """

    name: str
    captured: dict[float, float]
    auroc: float


@dataclass(frozen=True)
class JunctionFit:
    """A fitted gate and its report on held-out prompts.

    Attributes:
        gate: Opens on the requested share of the held-out states.
        rankings: Rankings of the held-out states by the gate's predictor, at random, by entropy
            and by the oracle.
        states: Numbers of states: fitted to, held out.
    """

    gate: JunctionGate
    rankings: list[Ranking]
    states: tuple[int, int]


@dataclass(frozen=True)
class HeadFit(Generic[ScorerT]):
    """A fitted head and its report on held-out prompts.

    Attributes:
        scorer: The scorer with this head.
        explained: R² of the head for the teacher's values on held-out states, each centred within
            its state, candidates weighted by their base probabilities. Negative for a head that is
            worse than the mean; NaN where the values do not differ.
        rankings: Rankings of the held-out states by the divergence that the head's values give, at
            random, by entropy and by the oracle.
        states: Numbers of states: fitted to, held out.
    """

    scorer: ScorerT
    explained: float
    rankings: list[Ranking]
    states: tuple[int, int]


def fit_junction_gate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    prompts: Prompts,
    *,
    share: float = 0.2,
    beta: float = 1.0,
    width: int = 64,
    epochs: int = 15,
    seed: int = 0,
    **options: Any,
) -> JunctionFit:
    """Fit a gate that opens where steering matters most.

    Args:
        model: The language model that will be steered.
        tokenizer: Its tokenizer.
        scorer: The scorer that will steer it.
        prompts: Same as in `generate`; a fifth of them is held out.
        share: Share of the steps on which the gate opens.
        beta: Strength of the steering.
        width: Size of the predictor's hidden layer.
        epochs: How many times each state is shown.
        seed: Seed of responses, held-out prompts, initial weights and the order of the states.
        **options: Further arguments of `collect_states`.

    Raises:
        ValueError: If no state would change, or a number is out of range.
    """
    share = check_share(share)
    states = collect_states(model, tokenizer, scorer, prompts, beta=beta, seed=seed, **options)
    return train_junction_gate(
        model, scorer, states, share=share, beta=beta, width=width, epochs=epochs, seed=seed
    )


def fit_q_head(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    prompts: Prompts,
    *,
    rank: int = 64,
    beta: float = 1.0,
    epochs: int = 25,
    seed: int = 0,
    **options: Any,
) -> HeadFit[QHead]:
    """Distil the values of a scorer into a head on the language model's own hidden state.

    Args:
        model: The language model that will be steered.
        tokenizer: Its tokenizer.
        scorer: The teacher.
        prompts: Same as in `generate`; a fifth of them is held out.
        rank: Size of the vector of each token.
        beta: Strength of the steering under which responses are sampled.
        epochs: How many times each state is shown.
        seed: Seed of responses, held-out prompts, initial weights and the order of the states.
        **options: Further arguments of `collect_states`.
    """
    states = collect_states(model, tokenizer, scorer, prompts, beta=beta, seed=seed, **options)
    return train_q_head(model, scorer, states, rank=rank, beta=beta, epochs=epochs, seed=seed)


def fit_vocabulary_value_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    value_model: ValueModel,
    prompts: Prompts,
    *,
    rank: int = 64,
    beta: float = 1.0,
    epochs: int = 25,
    seed: int = 0,
    **options: Any,
) -> HeadFit[VocabularyValueModel]:
    """Distil a value model into a head for the whole vocabulary on its own backbone.

    Args:
        model: The language model that will be steered.
        tokenizer: Its tokenizer.
        value_model: The teacher, whose backbone is shared and stays as it is.
        prompts: Same as in `generate`; a fifth of them is held out.
        rank: Size of the vector of each token.
        beta: Strength of the steering under which responses are sampled.
        epochs: How many times each state is shown.
        seed: Seed of responses, held-out prompts, initial weights and the order of the states.
        **options: Further arguments of `collect_states`.
    """
    check_value_model(value_model)
    backbone = value_model.backbone
    states = collect_states(
        model, tokenizer, value_model, prompts, beta=beta, seed=seed, backbone=backbone, **options
    )
    fit = train_head(
        states,
        states.dense_steering(value_model, beta),
        output_vectors(model),
        lambda head: VocabularyValueModel(backbone, head.to(value_model.device)),
        rank=rank,
        epochs=epochs,
        seed=seed,
    )
    fit.scorer.tokenizer = known_tokenizer(value_model)
    return fit


def known_tokenizer(scorer: Scorer) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a scorer, or of a term of a sum; None if none is known."""
    return next(iter(known_tokenizers(scorer)), None)


def output_vectors(model: PreTrainedModel) -> Tensor:
    """Return the output embeddings of a language model, float32 `(vocabulary, hidden)`."""
    layer = model.get_output_embeddings()
    with with_weights(layer):
        weight = layer.weight
        # a method of layers that torch has quantised
        return (weight().dequantize() if callable(weight) else weight).detach().float().cpu()


def check_share(share: float) -> float:
    """Return a share of steps as a Python number; ValueError if it is out of range."""
    number = as_number(share)
    if not 0 < number <= 1:
        raise ValueError(f"share must be greater than 0 and at most 1, got {share!r}")
    return number


def check_values_differ(states: States) -> None:
    """Raise ValueError where no state has candidates of different values: nothing to learn."""
    if not bool((states.values.amax(1) > states.values.amin(1)).any()):
        raise ValueError("steering changes no state: the scorer gives all candidates one value")


@learning_mode()
def train_junction_gate(
    model: PreTrainedModel,
    scorer: Scorer,
    states: States,
    *,
    share: float = 0.2,
    beta: float = 1.0,
    width: int = 64,
    epochs: int = 15,
    seed: int = 0,
) -> JunctionFit:
    """Train the predictor on states that `collect_states` returned; see `fit_junction_gate`."""
    share = check_share(share)
    steering = states.dense_steering(scorer, beta)
    epochs, width = whole_number("epochs", epochs, 1), whole_number("width", width, 1)
    generator = seeded_generator(seed)
    training, held_out = states.split(HELD_OUT, generator)
    hidden, target = training.hidden.float(), training.divergence(steering)
    check_values_differ(training)
    if (average := float(target.mean())) < SMALLEST_DIVERGENCE:
        raise ValueError(
            "steering changes too little to predict where: expected a mean divergence of at least "
            f"{SMALLEST_DIVERGENCE:g} nats, got {average:.1g}; use a larger beta"
        )
    mean, scale = hidden.mean(0), spread_of(hidden)
    first, second = nn.Linear(hidden.shape[1], width), nn.Linear(width, 1)
    network = nn.Sequential(first, nn.GELU(), second)
    initialise(network, generator)
    nn.init.constant_(second.bias, float(target.mean().log()))
    standardised = (hidden - mean) / scale

    def loss(rows: Tensor) -> Tensor:
        return poisson_loss(network(standardised[rows]).squeeze(-1), target[rows])

    minimise(loss, network, len(training), epochs, generator)
    weights = {
        "first.weight": first.weight / scale,
        "first.bias": first.bias - first.weight @ (mean / scale),
        "second.weight": second.weight,
        "second.bias": second.bias,
    }
    predictor = JunctionPredictor.from_weights(weights, ModelIdentity.of(model))
    predicted = predictor.predict(held_out.hidden)
    opened = share_of(len(predicted), share)
    threshold = float(predicted.sort(descending=True).values[opened - 1])
    return JunctionFit(
        JunctionGate(threshold, predictor),
        rank_states(held_out, steering, {"predictor": predicted}, generator),
        (len(training), len(held_out)),
    )


def train_q_head(
    model: PreTrainedModel,
    scorer: Scorer,
    states: States,
    *,
    rank: int = 64,
    beta: float = 1.0,
    epochs: int = 25,
    seed: int = 0,
) -> HeadFit[QHead]:
    """Train the head on states that `collect_states` returned; see `fit_q_head`."""
    device, identity = input_device(model), ModelIdentity.of(model)
    fit = train_head(
        states,
        states.dense_steering(scorer, beta),
        output_vectors(model),
        lambda head: QHead(head.to(device), identity),
        rank=rank,
        epochs=epochs,
        seed=seed,
    )
    fit.scorer.tokenizer = known_tokenizer(scorer)
    return fit


@learning_mode()
def train_head(
    states: States,
    steering: Steering,
    vectors: Tensor,
    build: Callable[[CandidateValues], ScorerT],
    *,
    rank: int,
    epochs: int,
    seed: int,
) -> HeadFit[ScorerT]:
    """Train a head on collected states.

    Args:
        states: As `collect_states` returns them.
        steering: The tilt, for the report.
        vectors: Output embeddings of the language model, `(vocabulary, hidden)`: tokens that the
            states lack take their values from tokens with like embeddings.
        build: Returns the scorer with the trained head.
        rank: Size of the vector of each token.
        epochs: How many times each state is shown.
        seed: Seed of held-out prompts, initial weights and the order of the states.
    """
    epochs, rank = whole_number("epochs", epochs, 1), whole_number("rank", rank, 1)
    generator = seeded_generator(seed)
    training, held_out = states.split(HELD_OUT, generator)
    check_values_differ(training)
    hidden = training.hidden.float()
    mean, scale = hidden.mean(0), spread_of(hidden)
    vectors = vectors[: steering.scorer.vocabulary_size]  # no other tokens are steered
    head = CandidateValues(hidden.shape[1], len(vectors), rank)
    initialise(head, generator)
    embedded = nn.Linear(vectors.shape[1], rank, bias=False)  # of the output embeddings
    initialise(embedded, generator)
    nn.init.normal_(head.tokens.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias.weight)
    standardised = (hidden - mean) / scale
    targets = centred(training.values, training.logits)
    weights = training.logits.softmax(-1) + FLOOR
    # nobody asked the scorer about candidates that are ruled out
    weights = weights.masked_fill(training.logits == -torch.inf, 0.0)
    spread = float((weights * targets.square()).sum() / weights.sum()) ** 0.5
    unit = spread if spread < SMALLEST_SPREAD else 1.0
    targets = targets / unit

    def loss(rows: Tensor) -> Tensor:
        candidates = training.candidates[rows]
        projected = head.project(standardised[rows])
        values = head.read(projected, candidates)
        values = values + (embedded(vectors[candidates]) @ projected[:, :, None]).squeeze(2)
        error = centred(values, training.logits[rows]) - targets[rows]
        return (weights[rows] * error.square()).sum(1).mean()

    minimise(loss, nn.ModuleList([head, embedded]), len(training), epochs, generator)
    with torch.no_grad():
        head.tokens.weight += embedded(vectors)
        for embedding in (head.tokens, head.bias):
            embedding.weight *= unit
        for layer in (head.linear, head.inner):
            layer.bias.sub_(layer.weight @ (mean / scale))
            layer.weight.div_(scale)
        values = head(held_out.hidden, held_out.candidates)
    predicted = divergence(held_out.logits, steer(held_out.logits, values, steering))
    return HeadFit(
        build(head),
        explained_variance(values, held_out),
        rank_states(held_out, steering, {"head": predicted}, generator),
        (len(training), len(held_out)),
    )


def spread_of(hidden: Tensor) -> Tensor:
    """Return the standard deviation of each dimension of states `(n, hidden)`; 1 of constants."""
    spread = hidden.std(0)
    return spread.where(spread >= 1e-6, 1.0)


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of linear layers from the generator, biases zero."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def minimise(
    loss: Callable[[Tensor], Tensor],
    network: nn.Module,
    count: int,
    epochs: int,
    generator: torch.Generator,
) -> None:
    """Train a network in place: AdamW under a one-cycle schedule.

    Args:
        loss: Loss of the states with these numbers.
        network: Ends in eval mode.
        count: Number of states.
        epochs: How many times each is shown.
        generator: Generator of their order.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    steps = epochs * -(-count // STATES_PER_STEP)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=generator).split(STATES_PER_STEP):
            optimizer.zero_grad()
            loss(rows).backward()
            optimizer.step()
            schedule.step()
    network.eval()


def centred(values: Tensor, logits: Tensor) -> Tensor:
    """Return values `(n, K)` less their mean under the base policy, which no tilt depends on."""
    return values - (logits.softmax(-1) * values).sum(-1, keepdim=True)


def explained_variance(values: Tensor, states: States) -> float:
    """Return R² of values `(n, K)` for the teacher's, both centred within their states."""
    weights, teacher = states.logits.softmax(-1), centred(states.values, states.logits)
    error = centred(values, states.logits) - teacher
    return 1 - float((weights * error.square()).sum() / (weights * teacher.square()).sum())


def rank_states(
    states: States, steering: Steering, scores: dict[str, Tensor], generator: torch.Generator
) -> list[Ranking]:
    """Compare scores of states `(n,)` with random, entropy and the oracle.

    Args:
        states: Held-out states.
        steering: The tilt.
        scores: Further scores by name.
        generator: Generator of the random score and of the noise that tokens are sampled with.
    """
    oracle, shifted = states.divergence(steering), states.shifted(steering, generator)
    random = torch.rand(len(states), generator=generator)
    named = {"random": random, "entropy": states.entropy, **scores, "oracle": oracle}
    return [
        Ranking(name, captured_shares(score, oracle, SHARES), auroc(score, shifted))
        for name, score in named.items()
    ]


def captured_shares(score: Tensor, gain: Tensor, shares: Sequence[float]) -> dict[float, float]:
    """Return the share of Σ `gain` that lies in the top states by `score`, for each share."""
    sums = gain[score.argsort(descending=True, stable=True)].cumsum(0)
    return {share: float(sums[share_of(len(sums), share) - 1] / sums[-1]) for share in shares}


def auroc(score: Tensor, positive: Tensor) -> float:
    """Return the probability that a positive has the higher score than another; ties count half.

    Args:
        score: `(n,)`.
        positive: bool `(n,)`.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, places, counts = score.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[places]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / positives / negatives)

"""Names for readers: metrics with their units, losses, families, and methods with settings."""

import re
from typing import NamedTuple

from benchmarks.spec.methods import label_of
from benchmarks.spec.model_kinds import teacher_of
from benchmarks.spec.profile import Profile

LESS, MORE, NEITHER = -1, 1, 0  # which way a metric is better


class Metric(NamedTuple):
    """One metric of the summaries.

    Attributes:
        label: Its name on an axis.
        unit: Unit of its estimates and of differences between them; empty for shares and counts.
        better: LESS, MORE or NEITHER.
    """

    label: str
    unit: str = ""
    better: int = NEITHER


METRICS = {
    # of responses
    "judge": Metric("judge score", "points", MORE),
    "reward": Metric("evaluation reward", "points of reward", MORE),
    "fluency_errors": Metric("share with fluency errors", "of the responses", LESS),
    "kl": Metric("KL per response (nats)", "nats", LESS),
    "kl_per_token": Metric("KL per token (nats)", "nats", LESS),
    "surprise": Metric("−ln π of the response (nats)", "nats"),
    "distinct": Metric("distinct bigrams", better=MORE),
    "win": Metric("win rate against the base", better=MORE),
    "tokens": Metric("tokens"),
    "steered": Metric("steered tokens"),
    "shifted": Metric("tokens changed by steering"),
    # cost
    "positions": Metric("token positions, all models", better=LESS),
    "megaflops": Metric("megaFLOPs", better=LESS),
    "reported": Metric("passes by the reported accounting", better=LESS),
    "positions_ratio": Metric("token positions, ratio", "times", LESS),
    "megaflops_ratio": Metric("FLOPs, ratio", "times", LESS),
    "reported_ratio": Metric("passes by the reported accounting, ratio", "times", LESS),
    "positions_per_token_ratio": Metric("token positions per token, ratio", "times", LESS),
    "megaflops_per_token_ratio": Metric("FLOPs per token, ratio", "times", LESS),
    "reported_per_token_ratio": Metric("passes per token, reported accounting", "times", LESS),
    "seconds_ratio": Metric("time, ratio", "times", LESS),
    "positions_at_length": Metric("token positions of responses of one length", better=LESS),
    # scores of steps (regret)
    "captured_divergence": Metric("share of Σ KL(π‖π*) captured", better=MORE),
    "shift_auroc": Metric("AUROC of the tokens that steering changes", better=MORE),
    # junctions along a response (figure 5)
    "junction_share": Metric("share of responses with a junction here"),
    "junction_share_of_reached": Metric("share of responses still going on with a junction here"),
    "first_half_share": Metric("share of junctions in the first half of their response"),
    "response_length": Metric("mean length (tokens)"),
    "intervention_ratio": Metric("share of tokens steered"),
    # entropy around junctions
    "entropy_at_offset": Metric("entropy (nats)", "nats"),
    "entropy_fall": Metric("entropy one token after a junction − at it", "nats"),
    "entropy_fall_from_before": Metric("entropy after a junction − before it", "nats"),
    "entropy_rebound": Metric("entropy two and three tokens after − one after", "nats"),
    "entropy_rebound_after_two": Metric("entropy two tokens after − one after", "nats"),
    "entropy_rebound_after_three": Metric("entropy three tokens after − one after", "nats"),
    "shifted_share": Metric("share of junctions where steering changes the token"),
    "shifted_entropy": Metric("entropy of changed junctions (nats)", "nats"),
    "unshifted_entropy": Metric("entropy of unchanged junctions (nats)", "nats"),
    "entropy_histogram": Metric("share of junctions with this entropy"),
    "shifted_share_at_entropy": Metric("share changed at this entropy"),
    # random steps and trees, and the lab's own distributions (theory, value-error)
    "regret_minus_kl_base_optimum_max": Metric("regret − KL(π‖π*)/β, largest"),
    "regret_vs_kl_optimum_base_median": Metric("regret − KL(π*‖π)/β, relative, median"),
    "regret_vs_kl_optimum_base_off": Metric("regret − KL(π*‖π)/β, share off by more than 5%"),
    "steps_beyond_bound": Metric("steps whose regret exceeds the entropy bound"),
    "regret_to_bound_below_tau": Metric("regret / entropy bound, median, entropy < 1", "times"),
    "regret_to_bound_above_tau": Metric("regret / entropy bound, median, entropy ≥ 1", "times"),
    "bound_to_hoeffding_below_tau": Metric(
        "entropy bound / Hoeffding's, median, entropy < 1", "times"
    ),
    "bound_to_hoeffding_below_tenth": Metric(
        "entropy bound / Hoeffding's, median, entropy < 0.1", "times"
    ),
    "regret_left_alone": Metric("regret of leaving the step alone"),
    "regret_left_alone_below_tau": Metric("regret of leaving the step alone, entropy < 1"),
    "regret_left_alone_above_tau": Metric("regret of leaving the step alone, entropy ≥ 1"),
    "noise_regret": Metric("regret by noise in the values"),
    "noise_regret_below_tau": Metric("regret by noise in the values, entropy < 1"),
    "noise_regret_above_tau": Metric("regret by noise in the values, entropy ≥ 1"),
    "noise_regret_below_to_above_tau": Metric(
        "regret by noise in the values, entropy < 1 / entropy ≥ 1", "times"
    ),
    "left_alone_to_noise_regret_below_tau": Metric(
        "regret of leaving alone / by noise, entropy < 1", "times"
    ),
    "noise_regret_entropy_correlation": Metric("rank correlation of noise regret and entropy"),
    "noise_regret_to_prediction": Metric("noise regret / second-order prediction", "times"),
    "tree_regret_minus_own_sum_max": Metric("regret − sum under its own states, largest"),
    "trees_beyond_optimum_sum": Metric("trees whose regret exceeds the sum under the optimum"),
    "trees_beyond_base_sum": Metric("trees whose regret exceeds the sum under the base"),
    "optimum_sum_to_regret": Metric("sum under the optimum's states / regret, median", "times"),
    "base_sum_to_regret": Metric("sum under the base's states / regret, median", "times"),
    "unsteered_kl": Metric("Σ KL(π‖π*) over unsteered steps, per response (nats)"),
    "junction_kl_share": Metric("share of Σ KL(π‖π*) at the steps that the gate opens"),
    "gate_open_share": Metric("share of steps that the gate opens"),
    "steps_below_tau_beyond_bound": Metric("steps below τ = 1 beyond the entropy bound"),
    "steps_below_tau_regret_to_bound": Metric(
        "steps below τ = 1: regret / entropy bound, total", "times"
    ),
    "steps_below_tau_regret": Metric("steps below τ = 1: mean regret"),
    "steps_below_tau_bound": Metric("steps below τ = 1: mean entropy bound"),
    "objective_reached": Metric("J reached: E[R] − KL"),
    "objective_gap_to_dense": Metric("J of dense − J reached"),
    "steering_gain": Metric("gain in J (reward) of steering a step", "of J", MORE),
    "reward_gained": Metric("reward gained by steering a step (SD 2)", better=MORE),
    "kl_paid": Metric("KL paid by steering a step (nats)", better=LESS),
    "value_error_uniform": Metric("squared error of values, candidates alike", better=LESS),
    "value_error_weighted": Metric("squared error of values, by base probability", better=LESS),
    # quality of the lab's models; correlations are Pearson's, with the judge
    "parameters": Metric("parameters"),
    "sure_steps": Metric("share of steps below 0.01 nats"),
    "uncertain_steps": Metric("share of steps at 0.672 nats or more"),
    "entropy_p80": Metric("80th percentile of the entropy (nats)", "nats"),
    "corpus_loss": Metric("loss on held-out documents (nats per token)", "nats", LESS),
    "pair_accuracy": Metric("share of pairs ordered as the judge does", better=MORE),
    "preference_loss": Metric("loss on noisy preferences (nats)", "nats", LESS),
    "distillation_loss": Metric("loss of the values", better=LESS),
    "scaled_reward_sd": Metric("SD of the scaled rewards"),
    "judge_correlation": Metric("correlation of rewards", better=MORE),
    **{
        f"judge_correlation_at_{share}": Metric(f"correlation of values at {share}%", better=MORE)
        for share in (10, 50, 100)
    },
    **{f"value_sd_at_{share}": Metric(f"SD of the values at {share}%") for share in (10, 50, 100)},
    "fitted_prompts": Metric("prompts that gates and heads are fitted to"),
    **{
        f"{head}_{quantity}": Metric(f"{label}, {head_label}", better=MORE)
        for head, head_label in (
            ("predictor", "predictor"),
            ("q_head", "Q-head"),
            ("vocabulary_head", "vocabulary head"),
        )
        for quantity, label in (
            ("auroc", "AUROC of the steps that steering changes"),
            ("explained", "share of the variance of values within a step"),
            *((f"captured_{p}", f"share of Σ KL(π‖π*) in {p}% of the steps") for p in (10, 20, 40)),
        )
    },
}
LOSSES = {"value-mean": "paper's loss", "value-token": "per-token loss"}
FAMILIES = {"qwen3": "Qwen3", "llama": "Llama", "all": "both families"}


def metric_label(profile: Profile, metric: str) -> str:
    """Return the name of a metric on an axis."""
    return profile.reward_label if metric == "reward" else METRICS[metric].label


def family_label(family: str) -> str:
    """Return the name of a model family, which may be one that only a profile knows."""
    return FAMILIES.get(family, family)


def loss_label(profile: Profile, value_model: str) -> str:
    """Return the name of the loss of a value model, or of the one that a head was fitted to.

    Empty where the profile has no other loss.
    """
    return LOSSES.get(teacher_of(value_model), "") if len(profile.losses) > 1 else ""


def listed(*words: str) -> str:
    """Return words with commas between them, without those that are empty."""
    return ", ".join(filter(None, words))


def objective_label(objective: str) -> str:
    """Return the name of an objective, or of all together."""
    return "all objectives" if objective == "all" else objective


def method_name(profile: Profile, method: str) -> str:
    """Return the label of a method; the instruct model of a lab is told apart from another one."""
    label = label_of(method)
    two = method == "instruct" and profile.has("instruct-reward")
    return f"{label} (by the judge)" if two else label


def share_label(share: float) -> str:
    """Return a share in percent, with as many digits as it has."""
    return f"{100 * share:g}%"


def method_label(
    profile: Profile,
    method: str,
    target_ratio: float,
    value_model: str,
    best_of: int = 1,
    tuned: bool = False,
) -> str:
    """Return a method in words, as "SIA at 20% + best of 8, per-token loss, best β"."""
    share = f" at {share_label(target_ratio)}" if 0 < target_ratio < 1 else ""
    search = f" + best of {best_of}" if best_of > 1 else ""
    return listed(
        method_name(profile, method) + share + search,
        loss_label(profile, value_model),
        "best β" if tuned and teacher_of(value_model) in LOSSES else "",
    )


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, as "3 prompts"."""
    return f"{count} {noun}{'s' if count != 1 else ''}"


WEAKEST = {  # by the name of the row that decides a claim of several
    "dense": "dense steering",
    "best-of-n": "best of N",
    "beams": "beam search",
    "genarm": "GenARM",
    "attention": "the attention gate",
    "attention-rise": "the gate on rises of attention",
    "entropy-rise": "the gate on rises of entropy",
    "position": "the first tokens",
    "gain": "the gain over the base",
    "nine-tenths": "90% of dense steering's gain",
}


def with_minus(text: str) -> str:
    """Return a text whose negative numbers have minus signs, not hyphens."""
    return re.sub(r"-(?=\d)", "−", text)

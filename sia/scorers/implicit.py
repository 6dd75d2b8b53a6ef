"""The reward that a preference-trained pair of language models implies."""

from transformers import PreTrainedModel

from sia.scorers.autoregressive import AutoregressiveScorer
from sia.scorers.base import SumScorer


class ImplicitRewardScorer(SumScorer):
    """Values scale · (ln π_policy(candidate) − ln π_reference(candidate)), given the prefix.

    One forward pass of each model per step, over cached prefixes, values all candidates; a whole
    response is worth the sum over its tokens, the reward that DPO gives it at β = scale (Rafailov
    et al., "Direct preference optimization: Your language model is secretly a reward model",
    2023). With a small tuned pair this is weak-to-strong search (Zhou et al., 2024) or, at every
    token, proxy tuning (Liu et al., "Tuning language models by proxy", 2024); with an expert and
    an anti-expert it is DExperts (Liu et al., 2021).

    Args:
        policy: The tuned model, also one wrapped by PEFT.
        reference: The model before.
        scale: Factor of the log ratio.

    Raises:
        ValueError: If the two are one model, the vocabularies differ or the scale is not finite.
    """

    def __init__(
        self, policy: PreTrainedModel, reference: PreTrainedModel, scale: float = 1.0
    ) -> None:
        tuned, before = AutoregressiveScorer(policy), AutoregressiveScorer(reference)
        if tuned.model is before.model:
            raise ValueError(
                "policy and reference must be two models, got one (PEFT puts adapters into the "
                "model that it wraps): load the reference apart"
            )
        super().__init__([(scale, tuned), (-scale, before)])

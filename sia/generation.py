"""The result of decoding: the tokens of a response, their record, and their cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from sia.cost import Cost
from sia.signals import Entropy, Signal


@dataclass(frozen=True)
class Generation:
    """One response. Arrays have one entry per token, the end-of-sequence token included.

    Attributes:
        text: The response without special tokens; None if there was no tokenizer.
        token_ids: int64.
        entropy: Entropy of the base model over the candidates in nats, float32.
        steered: Whether the gate was open, bool.
        base_token: The token that the same noise would have picked unsteered, int64.
        kl: KL(steered‖base) over the candidates at temperature 1 in nats, float32; 0 where not
            steered.
        finished: True if the response ended with one of the model's end tokens, False if the length
            ran out or something else ended it, such as a stop string.
        cost: Cost of the response; of a search, that of all that was tried for its prompt.
        signals: Other signals that the gate or `observe` asked for, float32 each.
        reward: Reward by which a search chose this response; None if nothing was chosen.
    """

    text: str | None
    token_ids: np.ndarray
    entropy: np.ndarray
    steered: np.ndarray
    base_token: np.ndarray
    kl: np.ndarray
    finished: bool
    cost: Cost = field(default_factory=Cost)
    signals: Mapping[Signal, np.ndarray] = field(default_factory=dict)
    reward: float | None = None

    @property
    def intervention_ratio(self) -> float:
        """Share of the tokens that were steered; NaN for an empty response."""
        return float(self.steered.mean()) if len(self.steered) else float("nan")

    @property
    def shifted(self) -> np.ndarray:
        """Tokens that steering changed, bool: a causal effect, for the noise is the same."""
        return self.base_token != self.token_ids

    def signal(self, signal: Signal) -> np.ndarray:
        """Return the values of a signal, one per token.

        Raises:
            ValueError: If the signal was not observed.
        """
        if signal == Entropy():
            return self.entropy
        if signal not in self.signals:
            raise ValueError(
                f"these generations do not have the signal {signal}: make them with observe=[it], "
                "or with a gate that uses it"
            )
        return self.signals[signal]

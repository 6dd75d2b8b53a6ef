"""What comes out of decoding: the tokens of a response, what happened at each of them, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Cost:
    """Forward passes that one row needed, and the token positions computed for it, through each model.

    Padding, and steps on which an ended row waits for others to leave the batch with it, are not counted.
    """

    model_forwards: int = 0
    model_tokens: int = 0
    value_forwards: int = 0
    value_tokens: int = 0


@dataclass(frozen=True)
class Generation:
    """One response. All arrays have one entry per response token, the end-of-sequence token included.

    text: the response without special tokens; None where no tokenizer was at hand.
    token_ids: int64.
    entropy: of the base model over the candidates, in nats, float32.
    steered: whether the gate was open, bool.
    base_token: the token that the same noise would have picked unsteered, int64.
    kl: KL(steered‖base) over the candidates at temperature 1, in nats, float32; 0 where not steered.
    finished: True if the response ended by itself, False if the length ran out.
    """

    text: str | None
    token_ids: np.ndarray
    entropy: np.ndarray
    steered: np.ndarray
    base_token: np.ndarray
    kl: np.ndarray
    finished: bool
    cost: Cost = field(default_factory=Cost)

    @property
    def intervention_ratio(self) -> float:
        """Share of the tokens that were steered (NaN for an empty response)."""
        return float(self.steered.mean()) if len(self.steered) else float("nan")

    @property
    def shifted(self) -> np.ndarray:
        """Where steering changed the token: the causal effect at that step, as the noise is the same. bool."""
        return self.base_token != self.token_ids

"""Gumbel-max sampling with noise that is a pure function of (seed, prompt, step, token).

There is no generator state: the same prompt under the same seed meets the same noise alone, in any
batch and in any order, and two methods that differ in one step meet the same noise at every step,
which makes their comparison paired.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014) in wrapping 64-bit integers; Gumbel-max as in Maddison, Tarlow and Minka, "A*
sampling", 2014.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sia._numbers import as_number

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_MASK = 2**64 - 1


def mix(key: Tensor, value: Tensor | int) -> Tensor:
    """Return a new 64-bit key from a key and a value; int64, broadcast against each other."""
    spread = _signed(value * _GOLDEN) if isinstance(value, int) else value * _GOLDEN
    x = (key ^ spread).add_(_GOLDEN)  # from here in place: this runs at every step
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_MULTIPLIERS[0])
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MULTIPLIERS[1])
    return x.bitwise_xor_(_shift_right(x, 31))


def prompt_keys(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Return a key per row, int64 `(rows,)`, from its seed and its prompt without padding."""
    length = max(len(prompt) for prompt in prompts)
    rows = [[*prompt, *[-1] * (length - len(prompt))] for prompt in prompts]
    padded = torch.tensor(rows, device="cpu")
    keys = mix(
        torch.zeros(len(prompts), dtype=torch.int64, device="cpu"),
        torch.tensor([_signed(seed) for seed in seeds], device="cpu"),
    )
    for column in padded.unbind(1):
        keys = torch.where(column >= 0, mix(keys, column), keys)
    return keys.to(device)


def uniform(keys: Tensor) -> Tensor:
    """Return a float64 in (0, 1) per key, from its upper 52 bits."""
    return _shift_right(keys, 12).double().add_(0.5).div_(2**52)


def sample_keys(row_keys: Tensor, samples: int) -> Tensor:
    """Return keys `(rows · samples,)` of several responses to each prompt, in succession.

    The first response keeps the key of its row.
    """
    number = torch.arange(samples, device=row_keys.device)
    return torch.where(
        number == 0, row_keys[:, None], mix(mix(row_keys, -2)[:, None], number)
    ).flatten()


def step_keys(row_keys: Tensor, steps: int) -> Tensor:
    """Return keys `(rows, steps)` of each step of the rows with these keys `(rows,)`."""
    return mix(row_keys[:, None], torch.arange(steps, device=row_keys.device))


def gate_keys(step_keys: Tensor) -> Tensor:
    """Return keys for the noise of gates from those of steps.

    No candidate has the same noise, for -1 is no token id.
    """
    return mix(step_keys, -1)


def gumbel(row_keys: Tensor, step: int, tokens: Tensor) -> Tensor:
    """Return standard Gumbel noise for candidates, float64 `(rows, K)`.

    Args:
        row_keys: Keys of the rows, `(rows,)`.
        step: Number of response tokens before this one.
        tokens: Candidates, `(rows, K)`.
    """
    return step_gumbel(mix(row_keys, step), tokens)


def step_gumbel(step_keys: Tensor, tokens: Tensor) -> Tensor:
    """Return the noise of `gumbel` from the `step_keys` of one step, `(rows,)`."""
    return uniform(mix(step_keys[:, None], tokens)).log_().neg_().log_().neg_()


def check_temperature(temperature: float) -> float:
    """Return the temperature as a Python number.

    Raises:
        ValueError: Unless it is 0 or a finite number above it.
    """
    number = as_number(temperature)
    if not 0 <= number < math.inf:
        raise ValueError(
            f"temperature must be 0 (greedy) or a finite number above it, got {temperature!r}"
        )
    return number


def top_candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return logits and ids of the `count` most probable tokens, both `(rows, count)`.

    If more tokens are tied for the highest logit than there is room for, the lowest of them, which
    is the greedy one, is in the first column.

    Args:
        logits: `(rows, vocabulary)`.
        count: K.
    """
    highest, tokens = logits.topk(count)
    greedy = logits.argmax(1, keepdim=True)
    dropped = (tokens != greedy).all(1, keepdim=True)
    return highest, torch.cat([greedy.where(dropped, tokens[:, :1]), tokens[:, 1:]], dim=1)


def choose(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Return the column of the sampled candidate, argmax(logits / temperature + noise), `(rows,)`.

    Args:
        logits: `(rows, K)`; a candidate with logit −∞ is never chosen.
        noise: Standard Gumbel noise, `(rows, K)`.
        temperature: 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.double()
    if temperature != 1:  # from their maximum: divided by a tiny temperature, it stays finite
        scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    return (scores + noise).argmax(-1)


def greedy_token(scores: Tensor, candidates: Tensor) -> Tensor:
    """Return the candidate of the highest score; of ties the lowest token, as argmax decides.

    Args:
        scores: `(rows, K)`.
        candidates: Token ids, `(rows, K)`.

    Returns:
        Token ids, `(rows,)`.
    """
    best = scores == scores.amax(1, keepdim=True)
    return candidates.where(best, candidates.amax(1, keepdim=True)).amin(1)


def without_tokens_from(logits: Tensor, vocabulary: int) -> Tensor:
    """Return logits `(rows, tokens)`, −∞ for tokens that are not in a smaller vocabulary.

    Candidates are chosen from all columns wherever it is done, so that ties end alike.
    """
    beyond = torch.arange(logits.shape[1], device=logits.device) >= vocabulary
    return logits.masked_fill(beyond, -math.inf)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift logically; int64 shifts in torch are arithmetic."""
    return (x >> bits).bitwise_and_(_MASK >> bits)


def _signed(number: int) -> int:
    """Return the number modulo 2⁶⁴ as a signed 64-bit integer."""
    number &= _MASK
    return number - 2**64 if number >= 2**63 else number

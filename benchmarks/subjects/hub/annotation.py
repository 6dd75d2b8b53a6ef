"""Rewards of examples, window by window: what a worker does for `scripts/annotate_rewards.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.runtime import workers
from benchmarks.runtime.memory import memory_errors
from benchmarks.spec.profile import Source
from benchmarks.subjects.hub.models import chat_ids, place, tokenizer_of
from benchmarks.subjects.hub.prompts import Example
from benchmarks.subjects.scoring import require_finite, trajectory_rewards
from sia import RewardScorer

TOO_LONG, REFUSED = "too long", "refused by the chat template"


@dataclass(frozen=True)
class Window:
    """Examples that a worker scores at once, and how.

    Attributes:
        number: Number of the window among those of the run.
        examples: Prompts with their responses.
        reward: Where the reward model is.
        device: cpu or cuda.
        dtype: Dtype of the reward model.
        longest: Tokens of the longest example that is scored.
        batch_tokens: Tokens of a forward pass.
    """

    number: int
    examples: Sequence[Example]
    reward: Source
    device: str
    dtype: str
    longest: int
    batch_tokens: int


@lru_cache(maxsize=1)
def load_reward_model(source: Source, device: str, dtype: str) -> PreTrainedModel:
    """Load the reward model of a worker, once."""
    name, location = place(source)
    end = tokenizer_of(source).eos_token_id
    return RewardScorer.from_pretrained(name, end, dtype=dtype, device_map=device, **location).model


def score_window(window: Window) -> list[float | str]:
    """Return the reward of each example of a window, or why it is left out.

    Raises:
        ValueError: If memory does not suffice.
    """
    tokenizer = tokenizer_of(window.reward)
    with memory_errors("annotating", window.batch_tokens, "tokens", "--batch-tokens "):
        model = load_reward_model(window.reward, window.device, window.dtype)
        rewards = score_examples(
            model, tokenizer, window.examples, window.longest, window.batch_tokens
        )
    workers.report(len(window.examples))
    return rewards


def score_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    longest: int,
    batch_tokens: int,
) -> list[float | str]:
    """Return the reward of each example, or why it is left out.

    Raises:
        FloatingPointError: If a reward is no finite number.
    """
    results: list[float | str] = []
    token_ids = {}
    for number, (chat, response) in enumerate(examples):
        whole = [*chat, {"role": "assistant", "content": response}]
        try:
            (ids,) = chat_ids(tokenizer, [whole], answered=True)
        except ValueError:
            results.append(REFUSED)
            continue
        results.append(TOO_LONG)
        if len(ids) <= longest:
            token_ids[number] = ids
    rewards = trajectory_rewards(model, list(token_ids.values()), batch_tokens).tolist()
    require_finite(rewards, (examples[number] for number in token_ids))
    for number, reward in zip(token_ids, rewards, strict=True):
        results[number] = reward
    return results

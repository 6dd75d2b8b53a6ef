"""Whether padding before a prompt leaves a language model's predictions as they are."""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sia._kv_cache import input_device, preallocated_cache, rounding_of
from sia._modes import evaluation_mode
from sia._prefix_cache import VERIFIED_MODEL_TYPES

PROMPT = (1, 2, 3, 4)  # tokens of the trial
# columns that precede them: some in either case, for attention without a mask may run in another
# kernel, which rounds otherwise
PADDING = (1, 4)
TOLERANCE = 1e-2  # of the spread of the logits; another position changes far more

_tried: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def follows_padding(model: PreTrainedModel) -> bool:
    """Return whether a language model can read prompts of different lengths in one batch.

    Tried out once with each model of a type that the test suite does not cover: some number
    positions from the first column, padding included, whatever they are given (GIT, TrOCR).
    """
    if model.config.model_type in VERIFIED_MODEL_TYPES:
        return True
    if model not in _tried:
        try:
            short, long = (_last_logits(model, padding) for padding in PADDING)
            tolerance = max(TOLERANCE, 16 * rounding_of(model))
            follows = bool((short - long).norm() <= tolerance * (short - short.mean()).norm())
        except Exception:  # other people's models fail in ways of their own; decoding says how
            follows = False
        _tried[model] = follows
    return _tried[model]


@torch.no_grad()
def _last_logits(model: PreTrainedModel, padding: int) -> Tensor:
    """Return logits after the trial's prompt behind padding, whose last token is a step alone."""
    vocabulary, device = model.config.get_text_config().vocab_size, input_device(model)
    ids = torch.tensor([[*PROMPT[:1] * padding, *PROMPT]], device=device) % vocabulary
    columns = torch.arange(-padding, len(PROMPT), device=device)[None]
    mask, positions = (columns >= 0).long(), columns.clamp(min=0)
    cache = preallocated_cache(model.config, len(ids[0]))
    with evaluation_mode(model.modules()):
        for part in (slice(None, -1), slice(-1, None)):
            outputs = model(
                input_ids=ids[:, part],
                attention_mask=mask[:, : ids[:, : part.stop].shape[1]],
                position_ids=positions[:, part],
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            )
    return outputs.logits[0, -1].float()

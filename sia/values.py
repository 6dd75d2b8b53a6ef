"""ValueModel: a transformers backbone with a linear head that reads a value at every token, V(x, y≤t) = w·h_t + b."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, PreTrainedModel

from sia.scoring import ValueSession

HEAD_FILE = "value_head.safetensors"


class ValueModel(nn.Module):
    """Gives every token of a sequence a value. The head works in float32 whatever the backbone's dtype.

    Make one with `from_backbone` (to train) or `from_pretrained`.
    """

    def __init__(self, backbone: PreTrainedModel, head: nn.Linear) -> None:
        super().__init__()
        size = backbone.config.get_text_config().hidden_size
        if head.in_features != size or head.out_features != 1:
            raise ValueError(
                f"the value head must be Linear({size}, 1) for this backbone, got Linear({head.in_features}, {head.out_features})"
            )
        self.backbone = backbone
        self.head = head.float()

    @classmethod
    def from_backbone(cls, model: PreTrainedModel) -> ValueModel:
        """A fresh head, all zeros, on the backbone of any transformers model; the backbone is shared, not copied."""
        backbone = model.base_model
        size = backbone.config.get_text_config().hidden_size
        head = nn.Linear(size, 1, device=backbone.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return cls(backbone, head)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ValueModel:
        """Reads what `save_pretrained` wrote.

        Errors: FileNotFoundError if there is no such folder or it has no head; weights are never made up.
        """
        folder = Path(path)
        for needed in ("config.json", "model.safetensors", HEAD_FILE):
            if not (folder / needed).is_file():
                raise FileNotFoundError(
                    f"no value model in {folder}: expected config.json, model.safetensors and {HEAD_FILE}, {needed} is missing"
                )
        state = safetensors.torch.load_file(folder / HEAD_FILE)
        if set(state) != {"weight", "bias"}:
            raise ValueError(f"{folder / HEAD_FILE} must hold weight and bias of the head, got {sorted(state)}")
        head = nn.Linear(state["weight"].shape[1], 1)
        head.load_state_dict(state)
        return cls(AutoModel.from_pretrained(folder, local_files_only=True), head).eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the backbone as transformers does, and the head beside it (safetensors)."""
        folder = Path(path)
        self.backbone.save_pretrained(folder)
        state = {name: tensor.contiguous() for name, tensor in self.head.state_dict().items()}
        safetensors.torch.save_file(state, folder / HEAD_FILE)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the backbone."""
        return self.backbone.dtype

    @property
    def vocabulary_size(self) -> int:
        return self.backbone.config.get_text_config().vocab_size

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Values, float32 `(batch, length)`, of the tokens `input_ids` `(batch, length)`.

        attention_mask: `(batch, length)` with 1 for tokens and 0 for padding, or a prepared 4-D mask.
        past_key_values: a cache to go on from, which is then extended; None computes without one.
        """
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        ).last_hidden_state
        return self.head(hidden.float()).squeeze(-1)

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1) -> ValueSession:
        """Opens a scoring session over prompts (token ids without padding), each of `samples` rows."""
        return ValueSession(self, prompts, max_new_tokens, samples)

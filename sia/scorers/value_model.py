"""The token-level value model of the paper (Hu et al., arXiv 2602.21215): V(x, y≤t) = w·h_t + b.

A transformers backbone with a linear head that reads a value at every token. It is also read in the
form in which the paper's own are published (`sia.scorers.published`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from typing_extensions import override

from sia._checkpoints import expand_home, local_folder, output_folder, reading
from sia._kv_cache import backbone_of, input_device
from sia._prefix_cache import CachedPrefixes
from sia.scorers import adapters, published, value_heads
from sia.scorers.base import CachedSession, Scorer
from sia.scorers.loading import (
    HEADS,
    cast_buffers,
    check_reproducible,
    load_backbone,
    output_size,
    refuse_other_head,
    restore_buffers,
    split_buffers,
    tokenizer_beside,
    unwrap,
)

if TYPE_CHECKING:
    from peft import PeftModel  # takes seconds to import

HEAD_FILE = HEADS["value model"]


class ValueModel(nn.Module, Scorer):
    """Gives every token of a sequence a value.

    The head works in float32 whatever the backbone's dtype. Make one with `from_backbone` (to
    train) or `from_pretrained`.
    """

    def __init__(self, backbone: PreTrainedModel, head: nn.Linear) -> None:
        """Combine a backbone with its value head.

        Raises:
            ValueError: If the head does not read hidden states of the backbone's size.
        """
        super().__init__()
        size = output_size(backbone)
        if head.in_features != size or head.out_features != 1:
            raise ValueError(
                f"the value head must be Linear({size}, 1) for this backbone, "
                f"got Linear({head.in_features}, {head.out_features})"
            )
        self.backbone, self.head = backbone, head.float()

    @classmethod
    def from_backbone(cls, model: "PreTrainedModel | PeftModel") -> Self:
        """Return a fresh head, all zeros, on the backbone of a transformers model.

        Args:
            model: Any model, also one wrapped by PEFT, whose adapters stay in the backbone. The
                backbone is shared, not copied.
        """
        model = unwrap(model)
        backbone = backbone_of(model)
        if "peft_config" in vars(model):  # PEFT leaves it on the model that has the head
            vars(backbone)["peft_config"] = vars(model)["peft_config"]
        head = nn.Linear(output_size(backbone), 1, device=input_device(backbone))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return cls(backbone, head)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        backbone: str | Path | None = None,
        *,
        subfolder: str = "",
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """Load what `save_pretrained` wrote, or a checkpoint in the layout of others.

        These are the published one of the paper (`sia.scorers.published`) and value heads as TRL,
        LLaMA-Factory and OpenRLHF save them (`sia.scorers.value_heads`).

        Args:
            path: Local folder or Hub id.
            backbone: Path or Hub id of the backbone of a checkpoint that is an adapter; by default
                the one that the checkpoint names.
            subfolder: Folder within `path`.
            revision: Revision of the Hub repository.
            **options: For transformers' from_pretrained (dtype, device_map, …).

        Raises:
            FileNotFoundError: If there is no such folder or a part of it is missing.
            ValueError: If parts do not fit together or cannot be read; no weights are made up.
        """
        folder = local_folder(path, "value model", subfolder, revision, options)
        backbone = backbone and expand_home(backbone)
        published_files = (folder / published.HEAD_FILE, folder / published.CONFIG_FILE)
        if not (folder / HEAD_FILE).is_file() and any(file.is_file() for file in published_files):
            model = cls(*published.read(folder, backbone, options))
        elif not _is_own(folder) and (head := value_heads.read_head(folder)) is not None:
            model = cls(*value_heads.read(folder, head, backbone, options))
        else:
            model = cls(*_read_own(folder, backbone, options))
        model.tokenizer = tokenizer_beside(folder, {})
        return model.eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Write the backbone as transformers does, and the head beside it (safetensors).

        An adapter of PEFT (LoRA, say) is saved without the backbone, as PEFT does, if it names one:
        then the backbone is loaded from there. The tokenizer, if it is known, is written too. A
        save that was cut off has no head, so that `from_pretrained` refuses it.

        Raises:
            ValueError: Before anything is written, if the backbone could not be brought back bit
                for bit (several adapters in its layers, say), or the folder holds a vocabulary
                head, an adapter where this is to be a whole model, or the other way round.
        """
        adapter = adapters.sole_adapter(self.backbone)
        check_reproducible(self.backbone, adapter)
        folder = output_folder(path, "value model")
        refuse_other_head(folder, "value model")
        other = published.MODEL_CONFIG if adapter else published.ADAPTER_CONFIG
        if (folder / other).exists():
            kinds = ("a whole model", "an adapter")[:: -1 if adapter is None else 1]
            raise ValueError(
                f"a value model cannot be saved in {folder}: it holds {kinds[0]} ({other}), which "
                f"would be loaded together with {kinds[1]}"
            )
        (folder / HEAD_FILE).unlink(missing_ok=True)
        if adapter is None:
            self.backbone.save_pretrained(folder)
        else:
            adapters.save(self.backbone, *adapter, folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        state = {"bias": torch.zeros(1)}  # of a critic's head, which has none
        state |= {name: tensor.contiguous() for name, tensor in self.head.state_dict().items()}
        state |= cast_buffers(self.backbone)
        unfinished = folder / f".{HEAD_FILE}"
        dtype = str(self.backbone.dtype).removeprefix("torch.")
        safetensors.torch.save_file(state, unfinished, {"dtype": dtype})
        unfinished.replace(folder / HEAD_FILE)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # moves or casts (`to`, `cuda`, `bfloat16`, …); the head moves along and stays float32
        exact = {name: parameter.detach() for name, parameter in self.head.named_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.head.named_parameters():
            parameter.data = exact[name].to(parameter.device)
        return self

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return input_device(self.backbone)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the backbone."""
        return self.backbone.dtype

    @property
    @override
    def vocabulary_size(self) -> int:
        return self.backbone.config.get_text_config().vocab_size

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Return the values of tokens.

        Args:
            input_ids: Token ids, `(batch, length)`.
            attention_mask: `(batch, length)` with 1 for tokens and 0 for padding, or a prepared 4-D
                mask.
            position_ids: Positions, `(batch, length)`; by default 0, 1, 2, …
            past_key_values: A cache to go on from, which is then extended; None computes without.

        Returns:
            Values, float32 `(batch, length)`.
        """
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            return_dict=True,
        ).last_hidden_state
        # a head that torch has quantised has no parameters, and FSDP may have cast those of another
        weight = next(self.head.parameters(), hidden.float())
        with torch.autocast(weight.device.type, enabled=False):
            values = self.head(hidden.to(weight.device, weight.dtype)).squeeze(-1)
        return values.float()

    @override
    def start_session(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> "ValueSession":

        def forward(*, last: int, **inputs: Any) -> Tensor:
            return self(**inputs)[:, -last:]

        return ValueSession(
            CachedPrefixes(
                self, self.backbone, forward, self.head, prompts, max_new_tokens, samples
            )
        )


class ValueSession(CachedSession):
    """Values of a `ValueModel`, whose cache lags behind: one forward pass per call, whatever K."""

    @override
    @torch.inference_mode()
    def score_branches(
        self, rows: Tensor, responses: Tensor, branches: Tensor, lengths: Tensor
    ) -> Tensor:
        return self.read_branches(rows, responses, branches, lengths - 1)

    @override
    @torch.inference_mode()
    def score_responses(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        return self.prefixes.last(rows, responses, lengths)


def check_value_model(model: Any) -> None:
    """Raise TypeError for what is no value model, and so has no backbone of its own to learn."""
    if not isinstance(model, ValueModel):
        raise TypeError(f"value_model must be a ValueModel, got {type(model).__name__}")


def _is_own(folder: Path) -> bool:
    """Return whether `save_pretrained` wrote the head, whatever older files lie beside it."""
    try:
        with safetensors.safe_open(folder / HEAD_FILE, "pt") as content:
            return "weight" in set(content.keys())
    except (OSError, safetensors.SafetensorError):
        return False


def _read_own(
    folder: Path, source: str | Path | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, nn.Linear]:
    """Read backbone and head as `ValueModel.save_pretrained` wrote them.

    Args:
        folder: The checkpoint.
        source: Path or Hub id of the backbone of an adapter; None for the one that it names.
        options: For the backbone's from_pretrained.
    """
    is_adapter = (folder / published.ADAPTER_CONFIG).is_file()
    is_adapter = is_adapter and not (folder / published.MODEL_CONFIG).exists()
    for name in (HEAD_FILE, *([] if is_adapter else [published.MODEL_CONFIG])):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no value model in {folder}: expected config.json, model.safetensors and "
                f"{HEAD_FILE} (or the published layout with {published.HEAD_FILE}), "
                f"{name} is missing"
            )
    with reading(f"the value model in {folder}"):
        state, buffers = split_buffers(safetensors.torch.load_file(folder / HEAD_FILE))
    if is_adapter:
        with safetensors.safe_open(folder / HEAD_FILE, "pt") as content:
            dtype = content.metadata()  # the backbone's own checkpoint may have another
        backbone = adapters.load(folder, source, {**dtype, **options})
    else:
        published.refuse_backbone(folder, source)
        if not list(folder.glob("model*.safetensors")):
            raise FileNotFoundError(
                f"no value model in {folder}: the weights of its backbone, model.safetensors is "
                "missing"
            )
        backbone = load_backbone(folder, options)
    restore_buffers(backbone, buffers)
    return backbone, published.linear_head(state, folder / HEAD_FILE).to(input_device(backbone))

"""Cost of decoding: forward passes, token positions and FLOPs of each model, counted exactly.

A multiplication and an addition are two FLOPs. Counted are the matrix products: the linear layers,
queries × keys and weights × values over the keys that a token may see, and the head that reads the
result. Norms, rotations and softmax, below a few percent in any model worth steering, are not. For
the linear layers this is the usual 2·N a token (Kaplan et al., "Scaling laws for neural language
models", 2020, table 1), N being the weights that run: not those of an idle vision tower, of experts
that a token is not sent to, or of adapters that are merged, disabled or not active.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Self, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

# in the configs of transformers: how many experts a token is sent to
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class Cost:
    """Forward passes, token positions and FLOPs of one response.

    Padding is not counted, nor are steps on which an ended row waits for others to leave the batch
    with it. Shared work of several samples of a prompt counts for the first of them.

    Attributes:
        model_forwards: Forward passes of the language model.
        model_tokens: Token positions that it computed.
        value_forwards: Forward passes of what values candidates or responses: value model, reward
            model, rollouts.
        value_tokens: Token positions that these computed.
        junctions: Steps at which the gate was open.
        model_flops: FLOPs of the language model.
        value_flops: FLOPs of what values candidates or responses.
    """

    model_forwards: int = 0
    model_tokens: int = 0
    value_forwards: int = 0
    value_tokens: int = 0
    junctions: int = 0
    model_flops: float = 0.0
    value_flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Architecture:
    """FLOPs of the parts of one model.

    Attributes:
        linear: FLOPs of the linear layers per token.
        head: FLOPs per position whose output is read.
        attention: FLOPs per token and key that it sees, by the window that limits the keys (None:
            all before it).
        expansion: FLOPs per forward pass and key in the cache, where that holds latent vectors.
    """

    linear: int
    head: int
    attention: tuple[tuple[int | None, int], ...]
    expansion: int = 0

    @classmethod
    def of(cls, backbone: PreTrainedModel, head: nn.Module) -> Self:
        """Return the FLOPs of a model.

        Args:
            backbone: The model without its head.
            head: Module that reads the output.

        Raises:
            ValueError: For layers that keep something else than keys and values.
        """
        layers, decoder = attention_windows(backbone), backbone.get_decoder()
        config = backbone.config.get_text_config()
        settings = config.to_dict()
        # they attend to images, and text alone skips them (Llama 3.2 Vision)
        skipped = settings.get("cross_attention_layers") or ()
        windows, expanded = Counter[int | None](), 0
        for i, window in enumerate(layers):
            if i not in skipped:
                per_key, per_latent = _attention_flops(layer_config(config, i))
                windows[window] += per_key
                expanded += per_latent
        per_token = [settings[name] for name in EXPERTS_PER_TOKEN if settings.get(name)]
        experts = per_token[0] if per_token else 1
        idle = sum(weights_used(decoder.get_submodule(f"layers.{i}"), experts) for i in skipped)
        running = decoder
        if backbone.config.is_encoder_decoder:  # the encoder reads the same tokens
            running = backbone
            per_key, _ = _attention_flops(layer_config(config, 0))
            windows = Counter({None: per_key * _attentions_of_both(backbone)})
        return cls(
            linear=2 * (weights_used(running, experts) - idle - expanded),
            head=2 * weights_used(head),
            attention=tuple(windows.items()),
            expansion=2 * expanded,
        )


def layer_config(config: PreTrainedConfig, layer: int) -> PreTrainedConfig:
    """Return the config of a layer, which is the model's unless layers differ (Gemma 4)."""
    # a config that differs by layer refuses to give its numbers as those of the model
    return config.per_layer_config[layer] if "_heterogeneity_spec" in vars(config) else config


def _attention_flops(config: PreTrainedConfig) -> tuple[int, int]:
    """Return what attention costs in a layer with this config.

    Returns:
        FLOPs per token and key that it sees; weights that each latent vector of the cache is
        multiplied with, 0 where it holds keys and values.
    """
    heads, settings = config.num_attention_heads, config.to_dict()
    size = settings.get("head_dim") or config.hidden_size // heads
    queries, values, expanded = size, settings.get("v_head_dim") or size, 0
    if "qk_nope_head_dim" in settings:  # latent attention
        queries = settings["qk_nope_head_dim"] + settings["qk_rope_head_dim"]
        expanded = settings["kv_lora_rank"] * heads * (settings["qk_nope_head_dim"] + values)
    return 2 * heads * (queries + values), expanded  # two products of 2 FLOPs each


def _attentions_of_both(backbone: PreTrainedModel) -> int:
    """Return how many layers attend in an encoder and its decoder, which does so in two ways."""
    encoder, decoder = backbone.get_encoder().config, backbone.get_decoder().config
    own = encoder.get_text_config(encoder=True).num_hidden_layers
    return int(own + 2 * decoder.get_text_config(decoder=True).num_hidden_layers)


def weights_used(module: nn.Module, experts: int = 1) -> int:
    """Return how many weights a token is multiplied with.

    Linear layers count by what they read and write, for quantised weights are packed.

    Args:
        module: A layer or a whole model.
        experts: How many of the experts that are stacked in one tensor a token is sent to.
    """
    if isinstance(module, nn.Embedding):  # is looked up
        return 0
    used = 0
    if isinstance(module, Conv1D):
        used = module.weight.numel()
    elif not _is_adapted(module) and {"in_features", "out_features"} <= vars(module).keys():
        return int(vars(module)["in_features"] * vars(module)["out_features"])
    elif not isinstance(module, nn.Conv1d):
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 3:  # (experts, inputs, outputs)
                used += weight.numel() // len(weight) * min(experts, len(weight))
            elif weight.ndim == 2 and name == "weight":  # of a router
                used += weight.numel()
    return used + sum(weights_used(child, experts) for child in _running_children(module))


def _is_adapted(module: nn.Module) -> bool:
    """Return whether PEFT has put adapters beside this layer."""
    if "peft" not in sys.modules:  # takes seconds to import
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _running_children(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of a module that take part in its forward pass."""
    children = dict(module.named_children())
    if {"original_module", "modules_to_save"} <= children.keys():  # trained in the place of another
        wrapper = cast("ModulesToSaveWrapper", module)
        trained = [] if wrapper.disable_adapters else wrapper.active_adapters
        yield from [wrapper.modules_to_save[name] for name in trained] or [wrapper.original_module]
        return
    if not _is_adapted(module):
        yield from module.children()
        return
    layer = cast("BaseTunerLayer", module)
    yield layer.get_base_layer()
    if not (layer.disable_adapters or layer.merged):
        for adapters in module.children():
            if isinstance(adapters, nn.ModuleDict):
                yield from (adapters[name] for name in layer.active_adapters if name in adapters)


def attention_windows(model: PreTrainedModel) -> list[int | None]:
    """Return how many keys a query sees at most in each layer that keeps a cache, None for all.

    Raises:
        ValueError: For layers that keep something else than keys and values (linear attention,
            state spaces, recurrences).
    """
    config = model.config.get_text_config()
    if not hasattr(layer_config(config, 0), "num_attention_heads"):
        raise ValueError(
            f"prefixes can be cached in layers of attention only, {type(model).__name__} has none"
        )
    windows: list[int | None] = []
    kinds = config.to_dict().get("layer_types") or ()
    for index, layer in enumerate(DynamicCache(config=model.config).layers):
        # layers without keys of their own read those of a layer of their kind (Gemma 3n)
        shared = kinds[index] if type(layer) is DummyLayer else ""
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif shared == "sliding_attention":
            windows.append(layer_config(config, index).sliding_window)
        elif type(layer) is DynamicLayer or shared == "full_attention":
            windows.append(None)
        else:
            raise ValueError(
                "prefixes can be cached in layers of full or sliding-window attention only, "
                f"{type(model).__name__} has {type(layer).__name__}"
            )
    return windows


class Meter:
    """Counter of what one model computes for each row of a batch.

    Counts are noted first and added up when they are read, so that decoding need not wait for the
    device.
    """

    def __init__(self, architecture: Architecture, rows: int, device: torch.device | str) -> None:
        self.architecture = architecture
        self._forwards, self._tokens = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._flops = torch.zeros(rows, dtype=torch.float64, device=device)
        self._stretches: list[tuple[Tensor, ...]] = []
        self._branches: list[tuple[Tensor, Tensor]] = []

    def count(
        self, rows: Tensor, forwards: Tensor, start: Tensor, end: Tensor, outputs: Tensor
    ) -> None:
        """Count consecutive tokens of some rows.

        Args:
            rows: Row numbers; all arguments are `(n,)`.
            forwards: Forward passes that computed them.
            start: Number of the first token in its row.
            end: Number of the last one, plus 1.
            outputs: Positions whose output was read.
        """
        self._stretches.append((rows, forwards, start, end, outputs))

    def count_branches(self, rows: Tensor, contexts: Tensor) -> None:
        """Count further positions of a forward pass that is counted already, all of them read.

        Args:
            rows: Row numbers `(n,)`.
            contexts: Keys that each position sees, `(n, positions)`.
        """
        self._branches.append((rows, contexts))

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return forward passes and tokens, int64, and FLOPs, float64, each `(rows,)`.

        These are the counters themselves, which later calls add to.
        """
        windows = [window for window, _ in self.architecture.attention]
        if self._stretches:
            rows, forwards, start, end, outputs = map(torch.cat, zip(*self._stretches, strict=True))
            self._forwards.index_add_(0, rows, forwards)
            # Σ of cache lengths at the ends of passes: all but the first have one token
            expanded = forwards * end - forwards * (forwards - 1) // 2
            self._flops.index_add_(0, rows, (self.architecture.expansion * expanded).double())
            keys = [_keys_seen(end, window) - _keys_seen(start, window) for window in windows]
            self._add(rows, end - start, outputs, keys)
        for rows, contexts in self._branches:
            tokens = torch.full_like(rows, contexts.shape[1])
            keys = [(contexts if w is None else contexts.clamp(max=w)).sum(1) for w in windows]
            self._add(rows, tokens, tokens, keys)
        self._stretches, self._branches = [], []
        return self._forwards, self._tokens, self._flops

    def _add(self, rows: Tensor, tokens: Tensor, outputs: Tensor, keys: list[Tensor]) -> None:
        """Add tokens and outputs of rows, all `(n,)`; keys are those seen, by kind of layer."""
        flops = self.architecture.linear * tokens + self.architecture.head * outputs
        for (_, per_key), seen in zip(self.architecture.attention, keys, strict=True):
            flops += per_key * seen
        self._tokens.index_add_(0, rows, tokens)
        self._flops.index_add_(0, rows, flops.double())


def _keys_seen(tokens: Tensor, window: int | None) -> Tensor:
    """Return Σ min(i, window) for i = 1 … tokens: keys that the first `tokens` positions see."""
    if window is None:
        return tokens * (tokens + 1) // 2
    short = tokens.clamp(max=window)
    return short * (short + 1) // 2 + (tokens - short) * window


def costs(model: Meter, scorers: Iterable[Meter], junctions: Tensor) -> list[Cost]:
    """Return one `Cost` per row.

    Args:
        model: Meter of the language model.
        scorers: Meters of all that values candidates, each with as many rows.
        junctions: Steps of each row at which the gate was open, `(rows,)`.
    """
    forwards, tokens, flops = (column.tolist() for column in model.totals())
    dtypes = (torch.int64, torch.int64, torch.float64)
    none = [torch.zeros(len(junctions), dtype=dtype, device="cpu") for dtype in dtypes]
    totals = [none, *([column.cpu() for column in meter.totals()] for meter in scorers)]
    value_forwards, value_tokens, value_flops = (
        torch.stack(columns).sum(0).tolist() for columns in zip(*totals, strict=True)
    )
    columns = (
        forwards, tokens, value_forwards, value_tokens, junctions.tolist(), flops, value_flops,
    )  # fmt: skip
    return [Cost(*row) for row in zip(*columns, strict=True)]

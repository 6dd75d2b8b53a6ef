"""Parts that scorers share: models out of their wrappers, complete checkpoints."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sia._checkpoints import DOWNLOAD_OPTIONS, DamagedFileError, expand_home, reading
from sia._kv_cache import check_decoder, check_model
from sia._memory import ran_out_of_memory

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel  # takes seconds to import

# by what has a head and a backbone in one folder: a file of the head
HEADS = {"value model": "value_head.safetensors", "vocabulary head": "vocabulary_head.json"}
# options of from_pretrained that say where a checkpoint lies
PLACE_OPTIONS = ("revision", "subfolder", *DOWNLOAD_OPTIONS)
BUFFER = "backbone."  # prefix of buffers among the weights of a head


def unwrap(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """Return the transformers model that PEFT or torch.compile wraps, others as they are.

    Adapters stay in place. Errors are those of `check_model`.
    """
    check_model(model)
    inner: Any = dict(model.named_children()).get("_orig_mod", model)
    return inner if isinstance(inner, PreTrainedModel) else inner.get_base_model()


def unwrap_decoder(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """Return the language model that PEFT or torch.compile wraps; others are refused."""
    model = unwrap(model)
    check_decoder(model)
    return model


def existing(path: str | Path, noun: str) -> str:
    """Return a path, its ~ replaced by the home folder, if it may be a folder or a Hub id.

    Raises:
        FileNotFoundError: If it cannot.
    """
    path = expand_home(path)
    if not Path(path).is_dir() and str(path).count("/") != 1:
        raise FileNotFoundError(
            f"no {noun} in {path}: there is no such folder, and a Hub id has the form owner/name"
        )
    return path


@contextmanager
def reading_weights(what: str) -> Iterator[None]:
    """Name what is read in the errors of damaged files, and of weights of other sizes.

    Raises:
        ValueError: In place of such an error.
    """
    try:
        with reading(what):
            yield
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise
        raise ValueError(
            f"{what} cannot be read, its weights are damaged or do not fit its config.json: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def load_complete(
    auto_class: Any,
    path: str | Path,
    noun: str,
    options: Mapping[str, Any],
    further: Collection[str] = (),
) -> PreTrainedModel:
    """Load a model with all its weights, those of its head too: none are made up.

    Args:
        auto_class: Auto class of the model.
        path: Local folder or Hub id.
        noun: Name of what is loaded, for messages.
        options: For transformers' from_pretrained.
        further: Weights that will come from elsewhere.

    Raises:
        OSError: If it is not there.
        ValueError: If weights are damaged or missing.
    """
    path = existing(path, noun)
    with reading_weights(f"the {noun} {path}"):
        model, loading = auto_class.from_pretrained(path, output_loading_info=True, **options)
    mismatched = [key for key, *_ in loading["mismatched_keys"]]
    if missing := sorted({*loading["missing_keys"], *mismatched} - {*further}):
        raise ValueError(
            f"{path} is no {noun}: expected all weights of {type(model).__name__}, "
            f"{', '.join(missing)} missing"
        )
    return model


def load_backbone(folder: str | Path, options: Mapping[str, Any]) -> PreTrainedModel:
    """Load the backbone of a value model with all its weights, whatever heads lie beside it.

    Args:
        folder: Local folder or Hub id.
        options: For transformers' from_pretrained.

    Raises:
        ValueError: If weights are damaged, missing, or of other sizes than config.json says.
    """
    options = {"local_files_only": Path(folder).is_dir(), **options}
    with reading_weights(f"the value model in {folder}"):
        backbone, loading = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
    if loading["missing_keys"]:
        raise ValueError(
            f"the value model in {folder} lacks weights of its backbone: "
            f"{', '.join(sorted(loading['missing_keys']))}"
        )
    return backbone


def refuse_other_head(folder: Path, title: str) -> None:
    """Raise ValueError if a folder holds the head of another scorer with a backbone.

    The backbone that is to be saved would take the place of the one that this head reads.

    Args:
        folder: Where to save.
        title: What is saved, of HEADS.
    """
    for other, file in HEADS.items():
        if other != title and (folder / file).exists():
            raise ValueError(
                f"a {title} cannot be saved in {folder}: it holds a {other} ({file}), which would "
                "be left with another backbone"
            )


def check_reproducible(
    backbone: PreTrainedModel, adapter: "tuple[str, PeftConfig] | None" = None
) -> None:
    """Check that `load_backbone` would bring a backbone back bit for bit.

    Args:
        backbone: The backbone.
        adapter: Name and config of that in its layers, if it is to be saved apart from it.

    Raises:
        ValueError: If its config makes another model (adapters in its layers, modules quantised or
            put in by hand, a class of one's own), its weights have several dtypes, or the adapter
            is scaled otherwise than its config says, or not all that was trained.
    """
    if "quantization_config" in backbone.config.to_dict():
        return  # transformers saves and loads what it quantises in its own ways
    try:
        with torch.device("meta"):
            again = AutoModel.from_config(backbone.config)
            if adapter is not None:
                from peft import inject_adapter_in_model  # takes seconds to import

                name, config = adapter[0], copy(adapter[1])
                config.inference_mode = False  # what belongs to the adapter requires gradients
                again = inject_adapter_in_model(config, again, name)
    except ValueError as error:  # a config that no class is registered for
        raise ValueError(f"the backbone cannot be saved: {error}") from error
    kinds = type(backbone), type(again)
    if kinds[0] is not kinds[1]:
        raise ValueError(
            f"the backbone cannot be saved: its config makes a {kinds[1].__name__}, "
            f"it is a {kinds[0].__name__}"
        )
    shapes = [
        {name: getattr(value, "shape", None) for name, value in model.state_dict().items()}
        for model in (backbone, again)
    ]
    if different := sorted(dict(shapes[0].items() ^ shapes[1].items())):
        raise ValueError(
            "the backbone cannot be saved, it has other weights than its config makes "
            f"({different[0]}): merge adapters first, as PEFT's merge_and_unload does"
        )
    if adapter is not None:
        _check_outside(backbone, again)
    dtypes = sorted({str(weight.dtype) for weight in backbone.parameters()})
    if len(dtypes) > 1 and adapter is None:
        raise ValueError(
            "the backbone cannot be saved, its weights must have one dtype, "
            f"got {', '.join(dtypes)}"
        )


def _check_outside(backbone: PreTrainedModel, again: PreTrainedModel) -> None:
    """Raise ValueError for what an adapter saved apart from its backbone would lose.

    Args:
        backbone: With the adapter in its layers.
        again: What the configs of both make, the adapter trainable.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    advice = "merge adapters first, as PEFT's merge_and_unload does"
    scalings = [
        {
            name: vars(module).get("scaling")
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        for model in (backbone, again)
    ]
    if changed := [name for name in scalings[0] if scalings[0][name] != scalings[1][name]]:
        raise ValueError(
            "the backbone cannot be saved, its adapter has another scaling than its config makes "
            f"({changed[0]}): {advice}"
        )
    adapted = {name for name, weight in again.named_parameters() if weight.requires_grad}
    trained = [name for name, weight in backbone.named_parameters() if weight.requires_grad]
    if outside := [name for name in trained if name not in adapted]:
        raise ValueError(
            "the backbone cannot be saved, weights outside its adapter require gradients and may "
            f"differ from those of the model that it names ({outside[0]}): {advice}"
        )


def cast_buffers(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """Return what is to be saved with the head so that `restore_buffers` can bring it back.

    These are buffers that no checkpoint of transformers holds and that are not in float32:
    `model.bfloat16()` casts rotations, too, which transformers makes anew in float32.
    """
    stored = backbone.state_dict().keys()
    return {
        f"{BUFFER}{name}": buffer.detach().clone()
        for name, buffer in backbone.named_buffers()
        if name not in stored and buffer.is_floating_point() and buffer.dtype != torch.float32
    }


def split_buffers(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of a head, and the `cast_buffers` that were saved with them."""
    buffers = {name: tensor for name, tensor in state.items() if name.startswith(BUFFER)}
    return {name: state[name] for name in state if name not in buffers}, buffers


def restore_buffers(backbone: PreTrainedModel, buffers: Mapping[str, Tensor]) -> None:
    """Give a backbone that was loaded its `cast_buffers` back."""
    for name, saved in buffers.items():
        buffer = backbone.get_buffer(name.removeprefix(BUFFER))
        buffer.data = saved.to(buffer.device)


def output_size(backbone: PreTrainedModel) -> int:
    """Return the size of a backbone's last hidden state, which OPT projects to another."""
    config = backbone.config.get_text_config()
    return config.to_dict().get("word_embed_proj_dim") or config.hidden_size


def tokenizer_beside(
    path: str | Path, options: Mapping[str, Any]
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a checkpoint, None if there is none.

    Args:
        path: Local folder or Hub id.
        options: Options of the model's from_pretrained; those that say where it lies count.

    Raises:
        DamagedFileError: If a file of it is damaged.
    """
    path = expand_home(path)
    if Path(path).is_dir() and not list(Path(path).glob("**/tokenizer*")):
        return None
    places = {name: options[name] for name in PLACE_OPTIONS if name in options}
    try:
        with reading(f"the tokenizer of {path}"):
            return AutoTokenizer.from_pretrained(path, **places)
    except DamagedFileError:
        raise
    except (OSError, ValueError):
        return None

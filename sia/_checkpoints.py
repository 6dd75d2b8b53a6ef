"""Small checkpoints: a folder with tensors (safetensors) and their settings (JSON)."""

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# options of from_pretrained that say how a repository of the Hub is reached
DOWNLOAD_OPTIONS = ("token", "cache_dir", "local_files_only")


class DamagedFileError(ValueError):
    """Something that cannot be read because a file of it is damaged or truncated."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Name what is read in the error of a damaged file.

    Raises:
        DamagedFileError: In place of the error of a file that is not of its form.
    """
    try:
        yield
    except (
        SafetensorError, json.JSONDecodeError, UnicodeDecodeError, pickle.UnpicklingError, EOFError
    ) as error:  # fmt: skip
        raise DamagedFileError(
            f"{what} cannot be read, a file is damaged or truncated: {error}"
        ) from error


def write_checkpoint(
    path: str | Path, name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Write `name`.safetensors and, once that is whole, `name`.json.

    A save that was cut off has no settings, so that `read_checkpoint` refuses it.
    """
    folder = output_folder(path, name.replace("_", " "))
    final = folder / f"{name}.json"
    final.unlink(missing_ok=True)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / f"{name}.safetensors",
    )
    unfinished = folder / f".{name}.json"
    unfinished.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(final)


def read_checkpoint(
    path: str | Path, name: str, subfolder: str = "", revision: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and settings that `write_checkpoint` wrote.

    Raises:
        FileNotFoundError: If there is no such folder or a file is missing.
        DamagedFileError: If a file is damaged.
    """
    title = name.replace("_", " ")
    folder = local_folder(path, title, subfolder, revision)
    weights, settings = folder / f"{name}.safetensors", folder / f"{name}.json"
    for file in (settings, weights):
        if not file.is_file():
            raise FileNotFoundError(
                f"no {title} in {folder}: expected {settings.name} and {weights.name}, "
                f"{file.name} is missing"
            )
    with reading(f"the {title} in {folder}"):
        return load_file(weights), json.loads(settings.read_text(encoding="utf-8"))


@contextmanager
def refuse_other_content(path: str | Path, name: str) -> Iterator[None]:
    """Raise ValueError where what `read_checkpoint` returned proves to be of another kind.

    Args:
        path: Local folder or Hub id.
        name: Name of the files.
    """
    try:
        yield
    except (KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{name}.json and {name}.safetensors in {path} must hold a {name.replace('_', ' ')} "
            f"as save_pretrained writes it: {reason}"
        ) from error


def local_folder(
    path: str | Path,
    title: str,
    subfolder: str = "",
    revision: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Return the local path of a checkpoint, downloading it first if `path` is a Hub id.

    Args:
        path: Local folder (~ is the home folder) or Hub id.
        title: Name of what is loaded, for messages.
        subfolder: Folder within `path`.
        revision: Revision of the Hub repository.
        options: Options of from_pretrained; DOWNLOAD_OPTIONS count.

    Raises:
        FileNotFoundError: If it is neither a local folder nor downloadable from the Hub.
    """
    path = expand_home(path)
    if Path(path).is_dir():
        return Path(path) / subfolder
    if Path(path).is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        raise FileNotFoundError(
            f"no {title} in {path}: there is no such folder, and a Hub id has the form owner/name"
        )
    patterns = [f"{subfolder}/*"] if subfolder else None
    try:
        folder = snapshot_download(
            str(path),
            revision=revision,
            allow_patterns=patterns,
            **{name: options[name] for name in DOWNLOAD_OPTIONS if name in options},
        )
    except Exception as error:  # of the Hub's library, of the network or of a proxy
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"no {title} in {path}: it is not a local folder, and its download from the Hub failed "
            f"({reason})"
        ) from error
    return Path(folder) / subfolder


def output_folder(path: str | Path, title: str) -> Path:
    """Return the folder to save something in, made if need be.

    Args:
        path: The folder (~ is the home folder).
        title: Name of what is saved, for messages.

    Raises:
        FileExistsError: If there is a file in its place.
    """
    folder = Path(expand_home(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise FileExistsError(
            f"a {title} is saved as a folder, but {path} is a file, or lies below one"
        ) from None
    return folder


def expand_home(path: str | Path) -> str:
    """Return a path, its ~ replaced by the home folder; Hub ids and other paths as they are.

    Raises:
        TypeError: If it is no path.
        FileNotFoundError: If nobody has this name.
    """
    if not isinstance(path, str | PathLike) or not str(path):
        given = repr(path) if isinstance(path, str) else type(path).__name__
        raise TypeError(f"a path must name a folder, or a repository of the Hub, got {given}")
    try:
        return str(Path(path).expanduser() if str(path).startswith("~") else path)
    except RuntimeError:
        raise FileNotFoundError(f"there is no home folder for the path {path}") from None

"""Where models of the Hub are, how they are fetched, and what tells their versions apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.spec.profile import HubProfile, Source

# the same weights in other formats
NOT_NEEDED = ["original/*", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]


def fetch(source: Source) -> Source:
    """Download a model and return its source with the revision resolved to a commit.

    Local folders stay as they are.

    Raises:
        FileNotFoundError: If it cannot be had; names the id and where it would be read from.
    """
    if Path(source.id).is_dir():
        local = Path(source.id) / source.subfolder
        if not local.is_dir():
            raise FileNotFoundError(f"no model in {local}: there is no such folder")
        return source
    name = f"{source.id}/{source.subfolder}" if source.subfolder else source.id
    described = f"{name} (revision {source.revision})"
    if source.id.count("/") != 1 or source.id.startswith((".", "/")):
        raise FileNotFoundError(
            f"no model in {source.id}: there is no such folder, "
            "and a Hub id has the form owner/name"
        )
    try:
        snapshot = snapshot_download(
            source.id,
            revision=source.revision,
            allow_patterns=[f"{source.subfolder}/*"] if source.subfolder else None,
            ignore_patterns=NOT_NEEDED,
        )
    except Exception as error:  # of many kinds: no network, a proxy, no such model, a gated one
        cause = (str(error).strip().splitlines() or [""])[0]
        raise FileNotFoundError(
            f"{described} is missing: it is not in the cache {constants.HF_HUB_CACHE} "
            f"and cannot be downloaded from the Hub ({type(error).__name__}: {cause})"
        ) from error
    folder = Path(snapshot)
    if not (folder / source.subfolder).is_dir():
        raise FileNotFoundError(
            f"{described} is missing: {source.id} has no such subfolder at this revision"
        )
    return replace(source, revision=folder.name)


def pin(profile: HubProfile, kinds: Iterable[str]) -> HubProfile:
    """Fetch models of a profile and return it with their revisions resolved to commits."""
    fetched = {}
    for kind in dict.fromkeys(kinds):
        source = fetch(profile.models[kind])
        if source.backbone:
            name, _, revision = source.backbone.partition("@")
            backbone = fetch(Source(name, revision or "main"))
            pinned = name if Path(name).is_dir() else f"{name}@{backbone.revision}"
            source = replace(source, backbone=pinned)
        fetched[kind] = source
    return replace(profile, models=profile.models | fetched)


def from_pretrained_arguments(source: Source) -> tuple[str, dict[str, str]]:
    """Return the id and the keyword arguments for `from_pretrained`."""
    options = {} if Path(source.id).is_dir() else {"revision": source.revision}
    return source.id, options | ({"subfolder": source.subfolder} if source.subfolder else {})


@lru_cache(maxsize=16)
def tokenizer_of(source: Source) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer; of a value model in the published layout, its backbone's."""
    if source.backbone:
        name, _, revision = source.backbone.partition("@")
        return AutoTokenizer.from_pretrained(name, **({"revision": revision} if revision else {}))
    name, options = from_pretrained_arguments(source)
    return AutoTokenizer.from_pretrained(name, **options)


def fingerprint(source: Source) -> list:
    """Return what tells one state of a model from another.

    It is the commit or, of local files, their names, sizes and times.
    """
    paths = [Path(source.id) / source.subfolder]
    paths += [Path(source.backbone)] if source.backbone else []
    files = [file for path in paths for file in [path, *sorted(path.rglob("*"))] if file.is_file()]
    return [
        asdict(source),
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    ]

"""Sparse steering as a decoding method of the Hub: `model.generate(custom_generate="…", …)`."""

from functools import lru_cache
from pathlib import Path
from typing import Any

try:  # transformers would name a package "sia", which is another one
    from sia import EntropyGate, SteeredGenerate, Steering, ValueModel
    from sia._checkpoints import expand_home
    from sia._kv_cache import input_device
    from sia.integrations.transformers import taken_stop_strings
    from sia.scorers import published
except ImportError as error:
    raise ImportError(
        "this decoding method needs the package sia-steering: pip install . in a clone of it"
    ) from error


def generate(
    model: Any,
    value_model: Any = None,
    *,
    backbone: str | Path | None = None,
    value_subfolder: str | None = None,
    value_revision: str | None = None,
    threshold: float | None = None,
    gate: Any = None,
    beta: float | None = None,
    candidates: int | None = None,
    min_probability: float | None = None,
    steering: Any = None,
    seed: Any = None,
    value_prompts: Any = None,
    observe: Any = (),
    tokenizer: Any = None,
    streamer: Any = None,
    stop_strings: Any = (),
    **options: Any,
) -> Any:
    """Decode with a model, steered by values where its entropy is high.

    Args:
        model: The language model; transformers fills it in.
        value_model: Local path or Hub id of a `sia.ValueModel`, or a scorer in memory.
        backbone: Backbone of a value model that does not name its own.
        value_subfolder: Folder of the value model within its repository.
        value_revision: Its revision on the Hub.
        threshold: Steer from this entropy on, in nats; 1.0 without a gate.
        gate: A gate of `sia`, in place of `threshold`.
        beta: Strength β, as of `sia.Steering` with its default, like the next two.
        candidates: K, the tokens of a step to choose from.
        min_probability: Base probability that candidates need on steered steps.
        steering: A `sia.Steering`, in place of all the arguments above.
        seed: As of `sia.SteeredGenerate`, like `value_prompts` and `observe`.
        value_prompts: The prompts in the value model's own template.
        observe: Signals to keep in the generations.
        tokenizer: Of the model, for stop strings and the texts of the generations.
        streamer: Receives the prompt, then each token.
        stop_strings: Texts that end a response.
        **options: All other arguments of `generate`.

    Returns:
        What `generate` returns: sequences, or a `sia.SteeredOutput` with
        `return_dict_in_generate=True`.

    Raises:
        ValueError: Without a value model and a steering, or with both; for an argument in whose
            place another one is given.
    """
    place = {
        "backbone": backbone,
        "value_subfolder": value_subfolder,
        "value_revision": value_revision,
    }
    settings = {"beta": beta, "candidates": candidates, "min_probability": min_probability}
    if (steering is None) == (value_model is None):
        raise ValueError(
            "expected value_model, the path or Hub id of a value model (or a scorer), or steering, "
            f"got {'neither' if steering is None else 'both'}"
        )
    if steering is not None:
        refuse_beside("steering", threshold=threshold, gate=gate, **place, **settings)
    else:
        if isinstance(value_model, str | Path):
            value_model = load_values(
                str(value_model),
                **place,
                file_states=file_states(
                    value_model, backbone or named_backbone(value_model, value_subfolder or "")
                ),
                dtype=model.dtype,
                device_map=str(input_device(model)),
            )
        else:
            refuse_beside("a value_model in memory", **place)
        if gate is None:
            gate = EntropyGate(1.0 if threshold is None else threshold)
        else:
            refuse_beside("gate", threshold=threshold)
        given = {name: value for name, value in settings.items() if value is not None}
        steering = Steering(value_model, gate, **given)
    with taken_stop_strings(options.get("generation_config"), model.generation_config) as texts:
        decode = SteeredGenerate(
            steering,
            seed=seed,
            tokenizer=tokenizer,
            streamer=streamer,
            stop_strings=stop_strings or texts,
            value_prompts=value_prompts,
            observe=observe,
        )
        # the class's own: from_pretrained(trust_remote_code=True) puts this function on the model
        return type(model).generate(model, custom_generate=decode, **options)


def refuse_beside(what: str, **others: Any) -> None:
    """Raise ValueError if any of the other arguments is given, in whose place `what` is."""
    if given := [name for name, value in others.items() if value is not None]:
        raise ValueError(
            f"{what} stands in place of {', '.join(given)}: expected one or the other, got both"
        )


def named_backbone(value_model: str | Path, subfolder: str) -> str | None:
    """Return the backbone that a local value model names, if it brings none of its own."""
    folder = Path(expand_home(value_model), subfolder)
    if (folder / published.CONFIG_FILE).is_file():
        return published.named_backbone(folder)[0]
    config = folder / published.ADAPTER_CONFIG
    return published.backbone_of_adapter(config)[0] if config.is_file() else None


def file_states(*paths: str | Path | None) -> tuple[tuple[str, int, int], ...]:
    """Return name, size and time of change of each file in local folders; Hub ids have none."""
    folders = [Path(expand_home(path)) for path in paths if path is not None]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    stats = [(str(file), file.stat()) for file in files]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


@lru_cache(maxsize=2)
def load_values(
    path: str,
    backbone: str | Path | None,
    value_subfolder: str | None,
    value_revision: str | None,
    file_states: tuple[tuple[str, int, int], ...],
    **options: Any,
) -> ValueModel:
    """Load a value model once for all calls, and again when its files change."""
    return ValueModel.from_pretrained(
        path, backbone, subfolder=value_subfolder or "", revision=value_revision, **options
    )

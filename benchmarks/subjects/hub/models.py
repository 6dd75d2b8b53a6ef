"""Models of a Hub profile: where they are, in which template each reads, and how they score.

A base model reads plain turns ("Human:", "Assistant:"), a post-trained one its chat template
(without thinking), value and reward models theirs.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from huggingface_hub import constants, snapshot_download
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file
from typing_extensions import override

from benchmarks.runtime.fingerprints import file_states, input_states
from benchmarks.spec.cells import OBJECTIVES, Condition
from benchmarks.spec.methods import (
    ARGS,
    EVALUATION_REWARD,
    INSTRUCT_REWARD,
    REWARD,
    ROLLOUT,
    method_of_scorer,
)
from benchmarks.spec.model_kinds import (
    FITTED,
    INSTRUCT,
    JUNCTION,
    Q_HEAD,
    VOCABULARY,
    ModelKind,
    value_kind,
)
from benchmarks.spec.profile import Hardware, HubProfile, Source, digest
from benchmarks.subjects.base import FITTED_CLASSES, Fitted, Subject
from benchmarks.subjects.hub.memory import gpus_each, memory, response_bytes, weight_bytes
from benchmarks.subjects.hub.prompts import (
    Chat,
    PromptSet,
    Split,
    load_prompts,
    plain_text,
    split_prompts,
)
from benchmarks.subjects.scoring import require_finite, trajectory_rewards
from sia import Generation, RewardScorer, ValueModel, closing_tokens
from sia._checkpoints import (
    DamagedFileError,
    local_folder,
    read_checkpoint,
    reading,
    refuse_other_content,
)
from sia._checks import check_tokenizers, padding_alone
from sia._inputs import TEMPLATE_ERRORS, eos_token_ids
from sia._model_identity import ModelIdentity
from sia.gates import GATE_FILE
from sia.scorers import published, value_heads
from sia.scorers.loading import load_complete
from sia.scorers.q_head import Q_HEAD_FILE
from sia.scorers.value_model import HEAD_FILE
from sia.scorers.vocabulary_value_model import HEAD_FILE as VOCABULARY_FILE

GIB = 2**30
# the same weights in other formats
NOT_NEEDED = ["original/*", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]
# given to chat templates that write today's date: a prompt must not change from day to day
DAY = date(2024, 7, 26)
# what templates call for the date; a function cannot be given to them
CODES = ("-d", "-m", *"aAbBcdeFHIjmMpSTxXyY")
CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace('%{code}', '{DAY.strftime('%' + code)}')" for code in CODES)
    + " }}{%- endmacro +%}"
)
POST_TRAINED = (str(INSTRUCT), str(INSTRUCT_REWARD))  # which might think before they answer
ANSWER = "the answer itself"  # stands for it where the text around it is looked up


def choose_device(device: str = "", dtype: str = "", gpus: int | None = None) -> tuple[str, str]:
    """Return device and dtype; by default a GPU in bfloat16, else the processor in float32.

    Args:
        device: cpu, cuda, or empty for the default.
        dtype: A floating-point type, or empty for the default.
        gpus: Number of GPUs of a cluster; None asks this machine.

    Raises:
        ValueError: For a device that is not there or an unknown dtype.
    """
    Hardware(device, dtype, 0)  # knows the names
    available = torch.cuda.is_available() if gpus is None else gpus > 0
    device = device or ("cuda" if available else "cpu")
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    if device == "cuda" and not available:
        raise ValueError(f"device must be cpu, or cuda where there is a GPU, got {device!r}")
    return device, dtype


def card_of(hardware: Hardware) -> str:
    """Return the name of the GPUs here, where models run on them; else nothing."""
    on_gpu = hardware.device == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(0).name if on_gpu else ""


def device_map(device: str) -> str:
    """Return where from_pretrained puts a model: on all GPUs that this process sees.

    A worker sees several where its models do not fit into one.
    """
    return "auto" if device == "cuda" and torch.cuda.device_count() > 1 else device


def detect_hardware(profile: HubProfile, requested: Hardware, gpus: int | None = None) -> Hardware:
    """Return the hardware as requested; a batch size of 0 becomes the profile's, or what fits.

    Raises:
        ValueError: As `choose_device` does.
    """
    device, dtype = choose_device(requested.device, requested.dtype, gpus)
    if requested.batch_size:
        return Hardware(device, dtype, requested.batch_size)
    room = 2 * GIB  # for caches, beside the models themselves
    if device == "cuda":  # of a cluster's GPUs, what the smallest usual ones have
        room = torch.cuda.get_device_properties(0).total_memory / 4 if gpus is None else 10 * GIB
    fitting = room // response_bytes(profile)
    return Hardware(device, dtype, int(np.clip(fitting, 1, profile.decoding.batch_size)))


def fetch(source: Source) -> Source:
    """Return the source with its revision resolved to the commit, its files at hand.

    Local folders stay as they are.

    Raises:
        FileNotFoundError: If there is no such model; names the id and where it was sought.
    """
    if Path(source.id).is_dir():
        folder = Path(source.id, source.subfolder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no model in {folder}: there is no such folder")
        return source
    if source.id.count("/") != 1 or source.id.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no model in {source.id}: there is no such folder, and a Hub id has the form"
            " owner/name"
        )
    missing = f"{Path(source.id, source.subfolder)} (revision {source.revision}) is missing"
    patterns = [f"{source.subfolder}/*"] if source.subfolder else None
    try:
        folder = Path(
            snapshot_download(
                source.id,
                revision=source.revision,
                allow_patterns=patterns,
                ignore_patterns=NOT_NEEDED,
            )
        )
    except Exception as error:  # the Hub's client lets through many kinds
        cause = (str(error).strip().splitlines() or [""])[0]
        raise FileNotFoundError(
            f"{missing}: it is not in the cache {constants.HF_HUB_CACHE} and cannot be downloaded"
            f" from the Hub ({type(error).__name__}: {cause}). `hf download {source.id}` fetches it"
            " (after `hf auth login` where a licence is to be accepted), a local folder will do too"
        ) from error
    if not (folder / source.subfolder).is_dir():
        raise FileNotFoundError(f"{missing}: {source.id} has no such subfolder at this revision")
    return replace(source, revision=folder.name)


def pin(profile: HubProfile, kinds: Iterable[str]) -> HubProfile:
    """Return the profile with these models at hand, revisions resolved to commits by `fetch`."""
    fetched = {}
    for kind in dict.fromkeys(kinds):
        try:
            source = fetch(profile.models[kind])
            backbone = source.tokenizer_source if source.backbone else None
            if ModelKind.parse(kind).name == "value" and not backbone:
                location = source.subfolder, source.revision
                backbone = named_backbone(local_folder(source.id, "value model", *location))
            if backbone:
                source = replace(source, backbone_revision=fetch(backbone).revision)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"models.{kind}: {error}") from error
        fetched[kind] = source
    return replace(profile, models=profile.models | fetched)


def named_backbone(folder: Path) -> Source | None:
    """Return the backbone that a value model in the published layout names, if it is one."""
    if not (folder / published.CONFIG_FILE).is_file():
        return None
    name, revision = published.named_backbone(folder)
    return Source(name, revision or "main") if name else None


def place(source: Source) -> tuple[str, dict[str, str]]:
    """Return id and options for from_pretrained."""
    options = {} if Path(source.id).is_dir() else {"revision": source.revision}
    return source.id, options | ({"subfolder": source.subfolder} if source.subfolder else {})


@lru_cache(maxsize=16)
def tokenizer_of(source: Source) -> PreTrainedTokenizerBase:
    """Return the tokenizer; of a value model in the published layout, its backbone's."""
    name, options = place(source.tokenizer_source)
    with reading(f"the tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(name, **options)


def fingerprint(source: Source) -> list:
    """Return the commit of a model or, of local files, their names and digests."""
    return [source.decisive_settings(), file_states(source.folders)]


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, in which prompts are"
            " written: name a model that has one (a post-trained one of the same family), or put"
            " its chat_template.jinja beside the tokenizer"
        )


def opened_ids(tokenizer: PreTrainedTokenizerBase, chats: Iterable) -> list[list[int]]:
    """Return the token ids of chats up to where the answer begins in a whole conversation.

    Templates may write more there than in an open assistant turn (Qwen3's an empty thought).

    Raises:
        ValueError: As `chat_ids` does.
    """
    answered = [[*chat, {"role": "assistant", "content": ANSWER}] for chat in chats]
    texts = [text.rpartition(ANSWER)[0] for text in chat_texts(tokenizer, answered)]
    return tokenizer(texts, add_special_tokens=False).input_ids


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, chats: Iterable, answered: bool = False, **options
) -> list[list[int]]:
    """Return the token ids of chats in a tokenizer's own template.

    Args:
        tokenizer: Tokenizer with a chat template.
        chats: Chats that end in a user turn or, if `answered`, in an assistant turn.
        answered: False to open an assistant turn.
        **options: Of the template.

    Raises:
        ValueError: If there is no template, or it refuses a chat (roles that do not alternate).
    """
    texts = chat_texts(tokenizer, chats, add_generation_prompt=not answered, **options)
    return tokenizer(texts, add_special_tokens=False).input_ids


def chat_texts(tokenizer: PreTrainedTokenizerBase, chats: Iterable, **options) -> list[str]:
    """Return chats in a tokenizer's own template; options and errors as of `chat_ids`."""
    require_template(tokenizer)
    options |= {"tokenize": False, "date_string": f"{DAY:%d %b %Y}"}
    try:
        options["chat_template"] = CLOCK + tokenizer.get_chat_template()
        return [str(tokenizer.apply_chat_template(list(chat), **options)) for chat in chats]
    except TEMPLATE_ERRORS as error:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} refuses a conversation: {error}"
        ) from error


def kinds_of(cell: Condition) -> list[str]:
    """Return the models that a cell needs."""
    method = method_of_scorer(cell.scorer)
    kinds = ["base", str(cell.model), EVALUATION_REWARD]
    kinds += [REWARD] if cell.search else []
    kinds += [str(cell.predictor)] if cell.predictor else []
    if cell.scorer is not None:
        kinds += method.models(cell.scorer.loss) if method else [str(cell.scorer)]
        # whose template the prompts of what is fitted to it are in
        kinds += [str(value_kind(cell.scorer.loss))] if cell.scorer.name in FITTED else []
    return list(dict.fromkeys(kinds))


def check_models(profile: HubProfile, kinds: Iterable[str]) -> None:
    """Check what can be known of these models before any is loaded.

    Raises:
        ValueError: For a model without tokenizer, chat template or head, or of another kind. Names
            the model of the profile, and what helps.
    """
    for kind in kinds:
        name, source = ModelKind.parse(kind).name, profile.models[kind]
        try:
            if name in CHECKS:
                CHECKS[name](source)
            if name in FITTED_TO_BASE:
                check_fitted_to(profile.models["base"], source, FITTED_TO_BASE[name])
            if name != "base" and name not in FITTED:  # these read plain turns, or a value model's
                require_template(_required_tokenizer(name, source))
        except ValueError as error:
            raise ValueError(f"models.{kind}: {error}") from error


def kinds_of_tokens(cell: Condition) -> list[str]:
    """Return the models that write or read the responses of a cell as tokens, not as texts."""
    kinds = [str(cell.model)]
    kinds += [REWARD] if cell.search == "beams" or cell.scorer == ARGS else []
    kinds += [str(cell.scorer)] if cell.scorer and cell.scorer.name == "value" else []
    return kinds


def check_tokens(profile: HubProfile, kinds: Iterable[str]) -> None:
    """Check that token ids are the same tokens to the base and to these models.

    Raises:
        ValueError: If an id is another token to a model, or is beyond the base's vocabulary.
    """
    base = profile.models["base"]
    tokenizer = tokenizer_of(base)
    tokens = max(len(tokenizer), config_of(base).get_text_config().vocab_size)
    for kind in kinds:
        source = profile.models[kind]
        other = tokenizer_of(source)
        try:
            check_tokenizers(tokenizer, other, kind)
        except ValueError as error:
            if kind not in POST_TRAINED or _differ_in_text(tokenizer, other):
                raise ValueError(f"models.{kind}: {error}") from error
        written = set(other.get_vocab().values()) - {padding_alone(other)}
        if kind in POST_TRAINED and (highest := max(written)) >= tokens:
            raise ValueError(
                f"models.{kind}: its tokenizer must have tokens of the base alone, which has "
                f"{tokens}, got token {highest}"
            )
        if kind != REWARD or adapter_settings(source):  # an adapter may bring further tokens
            continue
        own = config_of(source).get_text_config().vocab_size
        needed = len(tokenizer) - (padding_alone(tokenizer) == len(tokenizer) - 1)
        if own < needed:
            raise ValueError(
                f"models.{kind}: it must have the {needed} tokens of the base, got {own}"
            )


def _differ_in_text(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Return whether ids are other tokens to two tokenizers, but for those that were added."""
    ours, theirs = ({i: t for t, i in one.get_vocab().items()} for one in (tokenizer, other))
    added = tokenizer.added_tokens_decoder.keys() | other.added_tokens_decoder.keys()
    return any(ours[token] != theirs[token] for token in ours.keys() & theirs.keys() - added)


def _required_tokenizer(name: str, source: Source) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a kind of model; ValueError says what helps where it has none."""
    try:
        return tokenizer_of(source)
    except DamagedFileError:
        raise
    except (OSError, ValueError) as error:
        value = "name as its backbone the model that it was trained on"
        remedy = value if name == "value" else "put its tokenizer.json beside it"
        raise ValueError(f"{source.tokenizer_source.id} has no tokenizer, {remedy}") from error


def check_language_model(source: Source) -> None:
    """Raise ValueError for a classifier, which transformers would load with a head made up."""
    architecture, _ = architecture_of(source)
    if architecture.endswith("Classification"):
        raise ValueError(f"{source.id} is a {architecture}: name a language model")


def check_value_model(source: Source) -> None:
    """Raise ValueError for a model without the head of a value model."""
    folder = local_folder(source.id, "value model", source.subfolder, source.revision)
    heads = (published.HEAD_FILE, HEAD_FILE)
    if not any((folder / head).is_file() for head in heads) and not value_heads.read_head(folder):
        raise ValueError(
            f"{folder} has no head of a value model (such as {' or '.join(heads)}): name the folder"
            " that has it, or its subfolder"
        )


def check_reward_model(source: Source) -> None:
    """Raise ValueError for a model that is no sequence classifier with one label."""
    architecture, labels = architecture_of(source)
    if architecture.endswith("ForCausalLM") or labels not in (1, None):
        raise ValueError(
            f"{source.id} is a {architecture} with {labels} labels: name a reward model,"
            " a sequence classifier with one label"
        )


def adapter_settings(source: Source) -> dict:
    """Return the settings of a model that is an adapter of PEFT for another; else nothing."""
    name, options = place(source)
    file = find_adapter_config_file(name, **options)
    if file is None or Path(file).with_name(published.MODEL_CONFIG).is_file():
        return {}
    return published.read_json(Path(file))


def config_of(source: Source) -> PreTrainedConfig:
    """Return the configuration of a model; of an adapter, that of the model it is for."""
    if backbone := adapter_settings(source).get("base_model_name_or_path"):
        return AutoConfig.from_pretrained(backbone)
    name, options = place(source)
    return AutoConfig.from_pretrained(name, **options)


def architecture_of(source: Source) -> tuple[str, int | None]:
    """Return the class of a model and its number of labels, as its configuration names them.

    Of an adapter that brings a head of its own, the number is None: its weights alone tell it.
    """
    if adapter_settings(source).get("task_type") == "SEQ_CLS":
        return "PeftModelForSequenceClassification", None
    config = config_of(source)
    return (config.architectures or [type(config).__name__])[0], config.num_labels


def check_fitted(source: Source, file: str) -> None:
    """Raise ValueError for a folder without a gate or head that was fitted to a model."""
    folder = local_folder(source.id, file.replace("_", " "), source.subfolder, source.revision)
    if not (folder / f"{file}.json").is_file():
        raise ValueError(
            f"{folder} has no {file}.json: name the folder that `save_pretrained` wrote"
        )


def check_fitted_to(base: Source, source: Source, file: str) -> None:
    """Raise ValueError for a gate or head of another model, as far as the base's files tell it."""
    _, settings = read_checkpoint(source.id, file, source.subfolder, source.revision)
    with refuse_other_content(source.id, file):
        identity, entries = ModelIdentity.from_settings(**settings["model"]), {}
    folder = local_folder(base.id, "model", base.subfolder, base.revision)
    for path in folder.glob("*.safetensors"):
        with reading(f"the model {base.id}"), safe_open(path, framework="pt") as tensors:
            for name in identity.entries.keys() & set(tensors.keys()):
                entries[name] = [tensors.get_slice(name)[:1].flatten()[0].float().item()]
    if entries:  # else other names than those of the parameters
        identity.check_identity(ModelIdentity(base.id, entries), file.replace("_", " "))


FITTED_TO_BASE = {JUNCTION: GATE_FILE, Q_HEAD: Q_HEAD_FILE}
CHECKS: dict[str, Callable[[Source], None]] = {  # by the name of a kind
    "base": check_language_model,
    **dict.fromkeys(POST_TRAINED, check_language_model),
    "value": check_value_model,
    REWARD: check_reward_model,
    EVALUATION_REWARD: check_reward_model,
    **{kind: partial(check_fitted, file=file) for kind, file in FITTED_TO_BASE.items()},
    VOCABULARY: partial(check_fitted, file=VOCABULARY_FILE),
}


def _without_end(response: Generation, ends: Collection[int]) -> list[int]:
    """Return the tokens of a response without its end token, also one of the reward model."""
    tokens = response.token_ids.tolist()
    return tokens[:-1] if response.finished or tokens[-1] in ends else tokens


@dataclass(frozen=True)
class HubModels(Subject):
    """Models of a Hub profile; `profile.hardware` says on what they run."""

    profile: HubProfile
    reward_strength = 1.0  # where rewards stand for values, β is as it is

    @classmethod
    @override
    def open(cls, profile: HubProfile, replicate: int) -> Self:
        return cls(profile)

    @classmethod
    @override
    def prepare(
        cls, profile: HubProfile, cells: Iterable[Condition], requested: Hardware, gpus: int | None
    ) -> tuple[HubProfile, dict]:
        """Fetch the models that `cells` need and settle the hardware; print both in a line."""
        hardware = detect_hardware(profile, requested, gpus)
        kinds = dict.fromkeys(kind for cell in cells for kind in kinds_of(cell))
        settled = pin(replace(profile, hardware=hardware), kinds)
        check_models(settled, kinds)
        sharing = dict.fromkeys(kind for cell in cells for kind in kinds_of_tokens(cell))
        check_tokens(settled, sharing)
        name, device = profile.name, f"{hardware.device}, {hardware.dtype}"
        print(f"{name}: {len(kinds)} models at hand; {device}, batches of {hardware.batch_size}")
        subject = cls(settled)
        skipped = {objective: split.skipped for objective, split in subject.splits.items()}
        counts = [f"{count} of {objective}" for objective, count in skipped.items() if count]
        if counts:
            longest = f"more than {profile.prompts.longest} tokens"
            print(f"{name}: prompts skipped because they have {longest}: {', '.join(counts)}")
        models = {kind: asdict(settled.models[kind]) for kind in kinds}
        used = {*kinds, *OBJECTIVES}
        states = {name: state for name, state in input_states(profile).items() if name in used}
        prompts = {"prompts": subject.prompt_provenance(), "prompts_skipped": skipped}
        provenance = {"models": models, "inputs": states, **prompts}
        return settled, provenance | asdict(hardware) | {"card": card_of(hardware)}

    @property
    def models_kept(self) -> int:
        """Number of models that a worker keeps at hand.

        On a GPU as many of the largest as fill two thirds of it, but two at least.
        """
        if self.profile.hardware.device == "cpu":
            return 8
        dtype = self.profile.hardware.dtype
        largest = max(weight_bytes(source, dtype) for source in self.profile.models.values())
        devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        room = sum(device.total_memory for device in devices) * 2 / 3
        return max(2, int(room / (largest or GIB)))

    @classmethod
    @override
    def gpus_each(cls, profile: HubProfile) -> int:
        gpus = torch.cuda.device_count() if profile.on_gpu else 0
        if gpus < 2:
            return 1
        available = torch.cuda.get_device_properties(0).total_memory
        return gpus_each(memory(profile, profile.models, profile.hardware), available, gpus)

    @override
    def digest_of(self, cell: Condition) -> str:
        profile = self.profile
        models = [self._fingerprints[kind] for kind in kinds_of(cell)]
        settings = [
            asdict(profile.prompts),
            self._prompt_digests,
            asdict(profile.decoding),
            asdict(profile.hardware),
        ]
        return digest(models, settings)

    @cached_property
    def _fingerprints(self) -> dict[str, list]:
        return {kind: fingerprint(source) for kind, source in self.profile.models.items()}

    @cached_property
    def _prompt_digests(self) -> dict[str, str]:
        """Digests of the prompts by objective: their set may change on the Hub, too."""
        return {name: digest(split.test, split.validation) for name, split in self.splits.items()}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the base model."""
        return tokenizer_of(self.profile.models["base"])

    @property
    def batch_size(self) -> int:
        """Responses decoded together."""
        return self.profile.hardware.batch_size

    @cached_property
    def prompt_sets(self) -> dict[str, PromptSet]:
        """Prompt sets by objective."""
        return {
            objective: load_prompts(source)
            for objective, source in self.profile.prompts.sources.items()
        }

    @cached_property
    def splits(self) -> dict[str, Split]:
        """Prompts by objective, without those of more than `prompts.longest` base tokens."""
        longest, evaluation = self.profile.prompts.longest, self.profile.evaluation
        counts = evaluation.prompts_per_objective, evaluation.validation_prompts_per_objective
        splits = {}
        for objective, source in self.profile.prompts.sources.items():
            prompts = self.prompt_sets[objective]
            too_long = [len(ids) > longest for ids in self.encode(prompts.chats, "base")]
            splits[objective] = split_prompts(source, prompts, too_long, *counts)
        return splits

    def prompt_provenance(self) -> dict[str, dict]:
        """Return, by objective, where prompts come from and which they are.

        Prompts are named by their rows in the set, from 0, in the order of the column `prompt`.
        """
        return {
            objective: {
                "source": self.profile.prompts.sources[objective],
                **self.prompt_sets[objective].origin,
                **{name: " ".join(map(str, rows)) for name, rows in split.rows.items()},
                "digest": self._prompt_digests[objective],
            }
            for objective, split in self.splits.items()
        }

    @override
    def prompts_of(self, split: str, objective: str) -> list[Chat]:
        return vars(self.splits[objective])[split]

    @override
    def encode(self, prompts: Sequence[Chat], kind: str) -> list[list[int]]:
        if ModelKind.parse(kind).name == "base":
            return self.tokenizer([plain_text(chat) for chat in prompts]).input_ids
        if kind in (REWARD, str(ROLLOUT)):  # rollouts are made in its template, too
            return opened_ids(tokenizer_of(self.profile.models[REWARD]), prompts)
        parsed = ModelKind.parse(kind)
        kind = str(value_kind(parsed.loss)) if parsed.name in FITTED else kind
        tokenizer = tokenizer_of(self.profile.models[kind])
        options = {"enable_thinking": False} if kind in POST_TRAINED else {}
        return chat_ids(tokenizer, prompts, **options)

    @override
    def conversations(
        self, prompts: Sequence[Chat], responses: Sequence[Generation], kind: str
    ) -> list[list[int]]:
        tokenizer = tokenizer_of(self.profile.models[kind])
        if kind == REWARD and self.tokenizer.get_vocab().items() <= tokenizer.get_vocab().items():
            # token by token, as `reward_scorer` reads them
            closing = closing_tokens(tokenizer)
            pairs = zip(self.encode(prompts, kind), responses, strict=True)
            ends = {tokenizer.eos_token_id, closing[0]}
            return [[*ids, *_without_end(response, ends), *closing] for ids, response in pairs]
        # by their texts, for the tokenizers may differ
        whole = [
            [*chat, {"role": "assistant", "content": response.text}]
            for chat, response in zip(prompts, responses, strict=True)
        ]
        return chat_ids(tokenizer, whole, answered=True)

    def _place(self, kind: str) -> tuple[str, dict]:
        """Return id and options for from_pretrained, hardware included."""
        name, options = place(self.profile.models[kind])
        hardware = self.profile.hardware
        return name, options | {"dtype": hardware.dtype, "device_map": device_map(hardware.device)}

    @override
    def language_model(self, kind: str, family: str) -> PreTrainedModel:
        name, options = self._place(kind)
        model = load_complete(AutoModelForCausalLM, name, "language model", options).eval()
        # the profile says how to decode, not the checkpoint (its top-p, its penalties)
        own = model.generation_config
        model.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
        )
        return model

    @override
    def reward_model(self, kind: str) -> PreTrainedModel:
        name, options = self._place(kind)
        end = tokenizer_of(self.profile.models[kind]).eos_token_id
        return RewardScorer.from_pretrained(name, end, **options).model

    @override
    def reward_scorer(
        self, language_model: PreTrainedModel, reward_model: PreTrainedModel
    ) -> RewardScorer:
        """Return the scorer by a reward model, whose tokens end as the language model's do."""
        tokenizer = tokenizer_of(self.profile.models[REWARD])
        ends = eos_token_ids(language_model.generation_config, self.tokenizer.eos_token_id)
        closing = closing_tokens(tokenizer)
        return RewardScorer(reward_model, tokenizer.eos_token_id, stop_tokens=ends, closing=closing)

    @override
    def value_model(self, kind: str, family: str) -> ValueModel:
        name, options = self._place(kind)
        source = self.profile.models[kind]
        backbone = source.backbone
        if backbone and not Path(backbone).is_dir():
            backbone = snapshot_download(backbone, revision=source.backbone_revision)
        return ValueModel.from_pretrained(name, backbone or None, **options)

    @override
    def fitted(self, kind: str, family: str) -> Fitted:
        name, options = self._place(kind)
        hardware = {"dtype": options.pop("dtype"), "device_map": options.pop("device_map")}
        of_kind = {
            JUNCTION: {},
            Q_HEAD: {"device": self.profile.hardware.device},
            VOCABULARY: hardware,
        }
        which = ModelKind.parse(kind).name
        return FITTED_CLASSES[which].from_pretrained(name, **options, **of_kind[which])

    @override
    def scores(
        self,
        prompts: Sequence[Chat],
        responses: Sequence[Generation],
        first: Sequence[int],
        numbers: Sequence[int],
        reward_model: Callable[[str], PreTrainedModel],
    ) -> dict[str, np.ndarray]:
        """Return the score alone, as reward."""
        return {"reward": self.score(prompts, responses, reward_model)}

    @override
    def score(
        self,
        prompts: Sequence[Chat],
        responses: Sequence[Generation],
        reward_model: Callable[[str], PreTrainedModel],
    ) -> np.ndarray:
        """Return the raw rewards of the evaluation reward model, float32 `(responses,)`."""
        conversations = self.conversations(prompts, responses, EVALUATION_REWARD)
        rewards = trajectory_rewards(reward_model(EVALUATION_REWARD), conversations)
        require_finite(rewards, (repr(response.text) for response in responses))
        return rewards.astype(np.float32)

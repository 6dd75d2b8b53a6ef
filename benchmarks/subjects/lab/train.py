"""Training the models of a replicate, in stages; everything is kept under .cache/.

Order: base models → two base responses per prompt → reward models from noisy preferences between
them → instruct and value models → gates and heads fitted to base and value models. Nothing is
trained twice: the folder's name is a digest of all that decides its content.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from benchmarks.runtime.files import link, seal, write_atomically, write_cell
from benchmarks.runtime.tokenizers import save_tokenizer
from benchmarks.runtime.workers import Workers
from benchmarks.spec.methods import AUTOREGRESSIVE, EVALUATION_REWARD, REWARD
from benchmarks.spec.model_kinds import LOSSES, ModelKind
from benchmarks.spec.profile import LabProfile
from benchmarks.subjects.lab import heads, recipes
from benchmarks.subjects.lab.replicate import SCALE_FILE, SHARED, Replicate
from benchmarks.subjects.scoring import trajectory_rewards

RECIPES: dict[str, Callable] = {
    "base": recipes.train_base,
    REWARD: recipes.train_reward,
    EVALUATION_REWARD: recipes.train_reward,
    str(AUTOREGRESSIVE): recipes.train_autoregressive,
    "instruct": recipes.train_instruct,
    "instruct-reward": recipes.train_instruct,
    "value": recipes.train_value,
    "heads": heads.fit_heads,
}


@dataclass(frozen=True)
class Task:
    """Something to train or sample: a kind of model, or "samples", of a family."""

    replicate: Replicate
    kind: str
    family: str

    @property
    def done(self) -> bool:
        """True if it is in the cache."""
        return self.replicate.path(self.kind, self.family).exists()

    @property
    def estimated_seconds(self) -> float:
        """Estimated seconds of one core."""
        settings, kind = self.replicate.profile.training, ModelKind.parse(self.kind)
        samples = 2 * (settings.world_prompts if kind.world else settings.sampled_prompts)
        pairs = 2 * samples * len(self.replicate.profile.families) // 4 * settings.reward_epochs
        best = samples * settings.best_fraction * settings.instruct_epochs
        if kind.name == "heads":
            return heads.SHARE * settings.sampled_prompts * heads.SECONDS_PER_PROMPT
        rows = {
            "base": settings.world_documents if kind.world else settings.documents,
            "samples": samples,
            REWARD: pairs,
            EVALUATION_REWARD: pairs,
            str(AUTOREGRESSIVE): pairs,
            "instruct": best,
            "instruct-reward": best,
            "value": samples * settings.value_epochs,
        }
        return rows[kind.name] / recipes.ROWS_PER_SECOND * recipes.SLOWNESS[kind.size]


def stages(profile: LabProfile) -> list[list[tuple[str, str]]]:
    """Return (kind, family) of all that is made; each stage needs only what earlier ones make."""
    families, first = profile.families, profile.families[0]
    worlds = [world.name for world in profile.worlds]

    def each(*kinds: str) -> list[tuple[str, str]]:
        return [(kind, family) for kind in kinds for family in families]

    values = [f"value-{loss}" for loss in LOSSES]
    large, small = (
        [size] if profile.has(ModelKind("base", size=size)) else [] for size in ("large", "small")
    )
    variants = [f"value-token-{size}" for size in (*large, *small)]
    variants += [f"value-token@{world}" for world in worlds]
    return [
        [
            *((f"base-{size}", first) for size in large),
            *each("base"),
        ],
        [  # the small one is needed late, and fills a core here
            *((f"base-{size}", first) for size in small),
            *each("samples"),
            *((f"base@{world}", first) for world in worlds),
        ],
        [
            (REWARD, SHARED),
            (EVALUATION_REWARD, SHARED),
            *each(str(AUTOREGRESSIVE), "instruct"),
            *((f"samples@{world}", first) for world in worlds),
        ],
        [
            *((kind, first) for kind in variants),
            *each(*values, "instruct-reward"),
        ],
        each(*(f"heads-{loss}" for loss in LOSSES)),
    ]


def pending_tasks(
    replicates: Sequence[Replicate], requested: Collection[ModelKind] | None = None
) -> list[list[Task]]:
    """Return by stage what has not been made yet.

    Args:
        replicates: Replicates of one profile.
        requested: Kinds that are needed: further sizes and worlds are made only if one of these is
            of them. None: all are made.
    """
    needed = {("", ""), *((kind.size, kind.world) for kind in requested or ())}
    tasks = [
        [
            Task(replicate, label, family)
            for label, family in stage
            for kind in [ModelKind.parse(label)]
            if requested is None or (kind.size, kind.world) in needed
            for replicate in replicates
        ]
        for stage in (stages(replicates[0].profile) if replicates else [])
    ]
    return [[task for task in stage if not task.done] for stage in tasks]


def build(
    replicates: Sequence[Replicate],
    workers: Workers,
    requested: Collection[ModelKind] | None = None,
    accept_bases: Callable[[], None] | None = None,
) -> None:
    """Make all that is pending; at the end `replicateN` links to the folder of replicate N.

    Args:
        replicates: Replicates of one profile.
        workers: Processes that do it.
        requested: As in `pending_tasks`.
        accept_bases: Called once the base models are made, if more is pending.
    """
    for replicate in replicates:
        replicate.folder.mkdir(parents=True, exist_ok=True)
    bases, *others = pending_tasks(replicates, requested) or [[]]
    workers.run(train, bases, description=f"lab models 1/{1 + len(others)}")
    if accept_bases and any(others):
        accept_bases()
    for number, stage in enumerate(others, start=2):
        workers.run(train, stage, description=f"lab models {number}/{1 + len(others)}")
    for replicate in replicates:
        link(replicate.folder.with_name(f"replicate{replicate.index}"), replicate.folder)


def train(task: Task) -> None:
    """Train or sample one thing and write it."""
    replicate, kind, family = task.replicate, ModelKind.parse(task.kind), task.family
    path = replicate.path(task.kind, family)
    if kind.name == "samples":
        write_cell(path, recipes.sample_base(replicate, kind, family))
        return
    model = RECIPES[kind.name](replicate, kind, family)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        save_tokenizer(replicate.tokenizer, folder)
        if family == SHARED:
            samples = replicate.samples(replicate.profile.families)
            rewards = trajectory_rewards(model, recipes.sample_sequences(replicate, samples))
            scale = {"mean": rewards.mean(), "sd": rewards.std()}
            (folder / SCALE_FILE).write_text(json.dumps(scale))
        seal(folder)

    try:
        write_atomically(path, write)
    except SafetensorError as error:  # of a full disk, which is an OSError everywhere else
        raise OSError(f"{path} could not be written: {error}") from None

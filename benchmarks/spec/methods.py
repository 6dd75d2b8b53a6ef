"""Methods that the figures compare: a new baseline or scorer is one line of METHODS."""

from dataclasses import dataclass

from benchmarks.spec.model_kinds import (
    BASE,
    INSTRUCT,
    JUNCTION,
    Q_HEAD,
    VOCABULARY,
    ModelKind,
)

REWARD, EVALUATION_REWARD = "reward", "evaluation-reward"
ARGS = ModelKind(REWARD)  # a reward model reads every candidate
ROLLOUT = ModelKind("rollout")  # a reward model reads a rollout from every candidate
AUTOREGRESSIVE = ModelKind("autoregressive-reward")  # log-probabilities are the values
INSTRUCT_REWARD = ModelKind("instruct-reward")


@dataclass(frozen=True)
class Method:
    """A method with its identifier, its label in legends, and how a cell of it is made.

    Args:
        name: Identifier in tables.
        label: Text in tables for readers and beside points.
        note: Text that legends add in brackets.
        model: Language model that responds.
        scorer: Scorer of candidates, where it is no value model; None for all others. Those that
            are fitted to a value model are of each loss.
        search: "best-of" or "beams".
        needs: Models that a profile must have besides the base model.
        fitted: What it must have of that which is fitted to the value model of a loss.
        raw_rewards: Whether scores are rewards on a scale other than that of values.
        scoring_work: Time that scoring takes, in units of scoring by a value model.
        few_prompts: Whether it is so slow that it answers few prompts.
        baseline: Whether table 1 compares SIA with it.
        figures: Names of the figures that draw it too, where a figure has room for some alone.
    """

    name: str
    label: str
    note: str = ""
    model: ModelKind = BASE
    scorer: ModelKind | None = None
    search: str = ""
    needs: tuple[str, ...] = ()
    fitted: tuple[str, ...] = ()
    raw_rewards: bool = False
    scoring_work: float = 1.0
    few_prompts: bool = False
    baseline: bool = True
    figures: tuple[str, ...] = ()

    def models(self, loss: str) -> list[str]:
        """Return the models that it needs, of values by this loss where they differ."""
        return [*self.needs, *(str(ModelKind(name, loss)) for name in self.fitted)]


METHODS = (
    Method("base", "base", figures=("figure2",)),
    Method(
        "instruct",
        "instruct",
        model=INSTRUCT,
        needs=("instruct",),
        figures=("figure2",),
    ),
    Method(
        "instruct-reward",
        "instruct (by the reward)",
        model=INSTRUCT_REWARD,
        needs=("instruct-reward",),
    ),
    Method(
        "best-of-n",
        "best of N",
        search="best-of",
        needs=(REWARD,),
        figures=("figure2", "cost"),
    ),
    Method("beams", "chunk beam search", search="beams", needs=(REWARD,), figures=("cost",)),
    Method(
        "args",
        "ARGS",
        scorer=ARGS,
        needs=(REWARD,),
        raw_rewards=True,
        figures=("figure2", "cost"),
    ),
    Method(
        "genarm",
        "GenARM",
        scorer=AUTOREGRESSIVE,
        needs=("autoregressive-reward",),
        figures=("cost",),
    ),
    Method(
        "transfer-q",
        "Transfer Q*",
        scorer=ROLLOUT,
        needs=(REWARD,),
        raw_rewards=True,
        scoring_work=30.0,
        few_prompts=True,
    ),
    Method("sia", "SIA", "entropy gate", baseline=False),
    Method("dense", "dense", "every token", baseline=False, figures=("cost",)),
    Method("random", "random gate", baseline=False),
    Method("position", "first tokens", baseline=False),
    Method("inverted-entropy", "lowest entropies", baseline=False),
    Method("junction", "junction gate", "predictor", fitted=(JUNCTION,), baseline=False),
    Method("divergence", "divergence (oracle)", fitted=(JUNCTION,), baseline=False),
    Method(
        "q-head",
        "Q-head",
        "no second model",
        scorer=ModelKind(Q_HEAD),
        fitted=(Q_HEAD,),
        scoring_work=0.1,
        baseline=False,
    ),
    Method(
        "junction-q-head",
        "junction gate and Q-head",
        fitted=(JUNCTION, Q_HEAD),
        baseline=False,
    ),
    Method(
        "vocabulary-value",
        "vocabulary head",
        scorer=ModelKind(VOCABULARY),
        fitted=(VOCABULARY,),
        scoring_work=0.3,
        baseline=False,
    ),
)
BASELINES = tuple(method for method in METHODS if method.baseline)
BY_NAME = {method.name: method for method in METHODS}


def drawn_in(figure: str) -> tuple[str, ...]:
    """Return the names of the methods that a figure with room for some draws."""
    return tuple(method.name for method in METHODS if figure in method.figures)


def label_of(method: str) -> str:
    """Return the label of a method; other gates are called by their name."""
    return BY_NAME[method].label if method in BY_NAME else method.replace("-", " ")


def legend_of(method: str) -> str:
    """Return the label of a method in legends."""
    note = BY_NAME[method].note if method in BY_NAME else ""
    return f"{label_of(method)} ({note})" if note else label_of(method)


def method_of_scorer(scorer: ModelKind | None) -> Method | None:
    """Return the method with this scorer; None for value models and unsteered responses."""
    name = scorer.name if scorer else None
    return next((m for m in METHODS if m.scorer and m.scorer.name == name), None)

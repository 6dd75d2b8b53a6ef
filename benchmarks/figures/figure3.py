"""Figure 3: weak to strong, value models of several sizes with language models of these sizes.

Values by the profile's first loss, β = 1, first family. The usual size is called medium.
"""

from itertools import product
from pathlib import Path

import pandas as pd
from matplotlib.figure import FigureBase

from benchmarks.analysis import estimates, labels
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.model_kinds import ModelKind, value_kind
from benchmarks.spec.profile import Profile

SIZES = {"small": "small", "medium": "", "large": "large"}  # name → size of a ModelKind


def language_model(size: str) -> ModelKind:
    """Return the language model of a size, as SIZES names it."""
    return ModelKind("base", size=SIZES[size])


def value_model(profile: Profile, size: str) -> ModelKind:
    """Return the value model of a size, by the profile's first loss."""
    return value_kind(profile.losses[0], SIZES[size])


def sizes_of(profile: Profile) -> list[str]:
    """Return the sizes that the profile has, ascending: medium, and small or large or both."""
    return [size for size, name in SIZES.items() if not name or name in profile.further_sizes]


def weak_to_strong_pairs(profile: Profile) -> list[tuple[str, str]]:
    """Return the pairs (size of value model, of language model) whose value model is smaller."""
    return [
        (value, model)
        for value, model in product(sizes_of(profile), repeat=2)
        if profile.size(value_model(profile, value)) < profile.size(language_model(model))
    ]


LOOKS = {
    size: style.Look(colour, marker)
    for (size, colour), marker in zip(style.SIZES.items(), "vo^", strict=True)
}


class Figure3(Figure):
    """Figure 3: weak to strong."""

    measured = (*methods.SCORES, "steered", "tokens")

    def why_unsupported(self, profile: Profile) -> str:
        """Return which sizes of models the profile lacks."""
        if profile.further_sizes:
            return ""
        needed = " or ".join(f"base-{s} and {value_model(profile, s)}" for s in ("small", "large"))
        return f"figure3 needs models of several sizes ({needed}), as w2s-qwen3 has"

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return SIA and dense steering for every pair of sizes, and every base model."""
        requests, family = [], profile.families[0]
        for model in map(language_model, sizes_of(profile)):
            requests.append(methods.base(replicate, family, model))
            for size in sizes_of(profile):
                values = value_model(profile, size)
                requests += methods.curve(
                    profile, replicate, family, values, profile.sweep.reduced_ratios, model=model
                )
        return FigureCells(requests)

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Estimate every pair of sizes, and paired: its gain over the base, and SIA against dense.

        Method "weak-to-strong …": the mean over the pairs whose value model is the smaller one,
        SIA at the smallest ratio. Versus "shortfall-of-smallest": SIA − dense of the largest model
        less that of the smallest one, each steered by values of its own size; positive where the
        largest model lacks less.
        """
        metrics = profile.available_metrics(methods.SCORES)
        scores = estimates.method_scores(rows, metrics)
        differences, pairs, own_size = [], [], {}
        smallest = min(profile.sweep.reduced_ratios)
        for value, model in product(sizes_of(profile), repeat=2):
            setting = {"model": str(language_model(model))}
            base = estimates.select_one(scores, **setting, gate="never")
            setting["value_model"] = str(value_model(profile, value))
            dense = estimates.select_one(scores, **setting, method="dense")
            sparse = estimates.select(scores, **setting, method="sia")
            gains = [estimates.difference(one, base, versus="base") for one in [*sparse, dense]]
            shortfalls = [estimates.difference(one, dense) for one in sparse]
            differences += [*gains, *shortfalls]
            gain, shortfall = (
                estimates.select_one(ones, target_ratio=smallest) for ones in (gains, shortfalls)
            )
            if value == model:
                own_size[model] = shortfall
            if (value, model) in weak_to_strong_pairs(profile):
                pairs.append((gain, gains[-1], shortfall))
        smallest_model, *_, largest_model = own_size.values()
        differences.append(
            estimates.difference(largest_model, smallest_model, versus="shortfall-of-smallest")
        )
        names = {"model": "", "value_model": "", "search": ""}
        pooled = [
            estimates.mean_of(of_pairs, **names, method=f"weak-to-strong {method}", versus=versus)
            for of_pairs, (method, versus) in zip(
                zip(*pairs, strict=True),
                (("sia", "base"), ("dense", "base"), ("sia", "dense")),
                strict=bool(pairs),  # no value model may be smaller than a language model
            )
        ]
        return estimates.summarize([*scores, *differences, *pooled], metrics, profile)

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw the score by size of both models (top), and its gain over the base (bottom)."""
        rows = estimates.pooled(table)
        rows = rows[(rows["metric"] == profile.score) & (rows["objective"] == "all")]
        level, gains = (rows[rows["versus"] == versus] for versus in ("", "base"))
        figure = style.plt.figure(figsize=(style.PAGE, 4.3))
        top, bottom = figure.subfigures(2, squeeze=False).ravel()
        draw_scores(top, level, profile)
        draw_gains(bottom, gains[gains["model"] != ""], profile)
        looks = {size: LOOKS[size] for size in sizes_of(profile)}
        handles = style.handles(looks, {size: f"{size} value model" for size in looks})
        handles.append(style.handle("base"))
        caption = (
            f"{labels.listed(style.first_loss(profile).capitalize(), 'β = 1')}, all objectives; "
            "100%: dense steering. Framed: the value model is smaller than the language model. "
            f"{style.sample_size_note(level, profile)}"
        )
        return style.finish(figure, handles, caption, folder, "figure3", stale=stale)


def draw_scores(figure: FigureBase, level: pd.DataFrame, profile: Profile) -> None:
    """Draw the score against the share of steered tokens: a panel for each language model."""
    sizes = {str(value_model(profile, size)): size for size in sizes_of(profile)}
    models = {str(language_model(size)): f"{size} language model" for size in sizes.values()}
    level = level.assign(size=level["value_model"].map(sizes), panel=level["model"].map(models))
    level = style.ordered(level, model=models)
    curves = level[level["size"].notna()].reset_index(drop=True)
    static = level[level["gate"] == "never"].assign(size="base")
    looks = {**LOOKS, "base": style.PALETTE["base"]}
    (
        style.curves(curves, "ratio", "size", looks=looks, static=static, col="panel")
        .label(
            x="share of tokens steered",
            y=labels.metric_label(profile, profile.score),
            title=str,
        )
        .on(figure)
        .plot()
    )


def draw_gains(figure: FigureBase, gains: pd.DataFrame, profile: Profile) -> None:
    """Draw a heatmap of the gain over the base for each language model; framed: weak to strong."""
    names = sizes_of(profile)
    axes = figure.subplots(1, len(names), sharey=True)
    sizes = {str(value_model(profile, size)): size for size in names}
    gains = gains.assign(size=gains["value_model"].map(sizes))
    low, high = min(0.0, gains["estimate"].min()), gains["estimate"].max()
    for axis, model in zip(axes, names, strict=True):
        of_model = gains[gains["model"] == str(language_model(model))]
        grid = of_model.pivot_table(index="size", columns="target_ratio", values="estimate")
        grid = grid.loc[names].rename(columns=labels.share_label)
        style.sns.heatmap(
            grid, ax=axis, annot=True, fmt=".2f", cmap=style.BLUES, vmin=low, vmax=high, cbar=False
        )
        for row, value in enumerate(names):
            if (value, model) in weak_to_strong_pairs(profile):
                frame = {"fill": False, "edgecolor": "black", "linewidth": 1.2}
                axis.add_patch(style.plt.Rectangle((0, row), grid.shape[1], 1, **frame))
        axis.invert_yaxis()
        axis.tick_params(length=0, labelrotation=0)
        axis.set(xlabel="share of tokens steered (target)", ylabel="")
    axes[0].set_ylabel(f"value model\n(gain in {labels.metric_label(profile, profile.score)})")

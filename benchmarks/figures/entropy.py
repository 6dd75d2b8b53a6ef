"""Entropy around junctions: how sure the base is before, at and after them; where steering changes the token, and which tokens.

The profile's first loss, β = 1. Beside the steered responses stand base responses, whose junctions are where the same gate would open: what
is common to both is no effect of steering. Shifted: the token is another than the same noise would have picked unsteered.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.profile import Profile

OFFSETS = range(-5, 6)
BINS = np.arange(0, 2.4001, 0.2)  # nats; at most ln 10
FREQUENT = 12
KEPT = [
    "replicate",
    "family",
    "method",
    "target_ratio",
    "objective",
    "prompt",
    "seed",
    "step",
    "token_ids",
    "base_token",
    "shifted",
]


class Entropy(Figure):
    """Entropy around junctions."""

    title = "Entropy around junctions"

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        loss = profile.losses[0]
        steered = [
            methods.steered(replicate, family, loss, ratio=min(profile.sweep.reduced_ratios))
            for family in profile.families
        ]
        steered += [methods.dense(replicate, family, loss) for family in profile.families]
        return FigureCells(
            traces=[*(methods.base(replicate, family) for family in profile.families), *steered]
        )

    def collect(self, profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
        """One row per junction: the entropies around it (NaN beyond the response), whether the token was shifted, and from what to what. Of
        dense steering every token, with its own entropy alone. attrs: how shifted tokens are written, by id."""
        frames = []
        for replicate in replicates:
            for cell in [
                cell for cell in self.cells(profile, replicate).traces if cell.gate == "every"
            ]:
                tokens = results.rows(results.resolve(cell), "trace").rename(
                    columns={"entropy": "entropy+0"}
                )
                kept = tokens.assign(
                    shifted=tokens["token_ids"] != tokens["base_token"],
                    replicate=replicate,
                    family=cell.family,
                )
                frames.append(
                    kept.assign(method=cell.method, target_ratio=cell.target_ratio)[
                        [*KEPT, "entropy+0"]
                    ]
                )
            for cell in [
                cell for cell in self.cells(profile, replicate).traces if cell.gate == "entropy"
            ]:
                for policy in (methods.base(replicate, cell.family), cell):
                    tokens = results.rows(results.resolve(policy), "trace")
                    junction = (
                        methods.gate_opens_at(tokens, results.resolve(cell))
                        if policy.gate == "never"
                        else tokens["steered"]
                    )
                    response = (
                        tokens.groupby(["objective", "prompt", "seed"], observed=True)
                        .ngroup()
                        .to_numpy()
                    )
                    around = {
                        f"entropy{o:+d}": _shifted_by(tokens["entropy"].to_numpy(), response, o)
                        for o in OFFSETS
                    }
                    kept = tokens.assign(**around)[junction.to_numpy()]
                    kept = kept.assign(
                        shifted=kept["token_ids"] != kept["base_token"],
                        replicate=replicate,
                        family=cell.family,
                    )
                    kept = kept.assign(method=policy.method, target_ratio=cell.target_ratio)
                    frames.append(kept[[*KEPT, *around]])
        table = pd.concat(frames, ignore_index=True)
        small = dict.fromkeys(("token_ids", "base_token"), profile.token_dtype) | dict.fromkeys(
            ("family", "method", "objective"), "category"
        )
        table = table.astype(small).round({f"entropy{o:+d}": 2 for o in OFFSETS})
        shifted = table.loc[table["shifted"], ["base_token", "token_ids"]]
        tokens = np.unique(shifted.to_numpy()).tolist()
        table.attrs = dict(zip(map(str, tokens), results.words(tokens), strict=True))
        return table

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Means of entropy at each offset; the fall after a junction and the rebound; shares of junctions, and of shifted ones, by
        entropy; the most frequent shifts. Intervals: bootstrap over replicates, and prompts within replicate and objective.

        versus "base": steered minus base responses.
        """
        records = []
        for (family, target), both in rows.groupby(["family", "target_ratio"], observed=True):
            parts = dict(list(both.groupby("method", observed=True)))
            quantities = {method: _quantities(part) for method, part in parts.items()}
            draws = {
                method: _draws(part, quantities[method], profile) for method, part in parts.items()
            }
            for method, (names, ends) in draws.items():
                labels = {
                    "family": family,
                    "method": method,
                    "target_ratio": target,
                    "objective": "all",
                }
                labels |= {
                    "n": int(
                        both.groupby("replicate")[["objective", "prompt"]]
                        .apply(lambda x: len(x.drop_duplicates()))
                        .sum()
                    )
                }
                labels |= {
                    "seeds": both["seed"].nunique(),
                    "replicates": both["replicate"].nunique(),
                }
                records += [
                    labels | {"metric": n, "versus": ""} | estimates.ends(ends[:, :, i], profile)
                    for i, n in enumerate(names)
                ]
                if method == "sia":
                    change = ends - draws["base"][1]
                    records += [
                        labels
                        | {"metric": n, "versus": "base"}
                        | estimates.ends(change[:, :, i], profile)
                        for i, n in enumerate(names)
                    ]
            steered = parts["dense" if target == 1 else "sia"]
            shifts = steered[steered["shifted"]]
            for (source, target_token), count in (
                shifts.groupby(["base_token", "token_ids"]).size().nlargest(FREQUENT).items()
            ):
                what = f"shift {rows.attrs[str(source)]} → {rows.attrs[str(target_token)]}"
                labels = {
                    "family": family,
                    "method": steered["method"].iloc[0],
                    "target_ratio": target,
                    "objective": "all",
                }
                labels |= {"metric": what, "versus": ""}
                records.append(labels | {"estimate": count / len(shifts)})
        return estimates.of_records(records)

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Two rows for each family: entropy around junctions, entropies of shifted and of other tokens under dense steering; how many are
        shifted there and at SIA's junctions, the most frequent shifts."""
        from benchmarks.figures import style

        target = min(profile.sweep.reduced_ratios)
        everywhere = table[(table["method"] == "dense") & (table["versus"] == "")]
        table = table[np.isclose(table["target_ratio"], target)]
        figure, axes = style.grid(2 * len(profile.families), 2, 3.6, 2.3)
        axes = axes.reshape(-1, 4)
        offsets, centres = np.array(OFFSETS), (BINS[:-1] + BINS[1:]) / 2
        for i, family in enumerate(profile.families):
            part = table[table["family"] == family]
            level = part[part["versus"] == ""].set_index(["method", "metric"])
            for method in ("base", "sia"):
                around = (
                    level.loc[method]
                    .loc[[f"entropy at {o:+d}" for o in OFFSETS]]
                    .assign(offset=offsets)
                )
                style.curve(axes[i, 0], method, around, "offset")
            dense = everywhere[everywhere["family"] == family].set_index("metric")
            at_junctions, shifted = (
                of.loc[
                    [f"shifted with entropy {a:.1f} to {b:.1f}" for a, b in pairwise(BINS)]
                ].assign(centre=centres)
                for of in (level.loc["sia"], dense)
            )
            shares = dense.loc[
                [f"junctions with entropy {a:.1f} to {b:.1f}" for a, b in pairwise(BINS)]
            ]
            moved = shares["estimate"].to_numpy() * np.nan_to_num(shifted["estimate"].to_numpy())
            stayed = shares["estimate"].to_numpy() - moved
            axes[i, 1].bar(
                centres - 0.045,
                stayed / stayed.sum(),
                0.09,
                color="#9ECAE1",
                label="tokens that stay",
            )
            axes[i, 1].bar(
                centres + 0.045, moved / moved.sum(), 0.09, color="#08306B", label="shifted tokens"
            )
            style.curve(axes[i, 2], "dense", shifted.dropna(subset=["estimate"]), "centre")
            style.curve(axes[i, 2], "sia", at_junctions.dropna(subset=["estimate"]), "centre")
            shifts = part[part["metric"].str.startswith("shift ")].nlargest(FREQUENT, "estimate")[
                ::-1
            ]
            axes[i, 3].barh(
                shifts["metric"].str.removeprefix("shift "),
                100 * shifts["estimate"],
                color=style.COLOURS["sia"],
            )
            axes[i, 3].tick_params(axis="y", labelsize=style.SMALL)
            titles = (
                f"{style.FAMILIES[family]}: around junctions",
                "dense: where tokens shift",
                "shifted, by entropy",
                "most frequent shifts",
            )
            labels = (
                ("tokens after the junction", "entropy (nats)"),
                ("entropy (nats)", "share of these tokens"),
            )
            labels += (("entropy (nats)", "share of them shifted"), ("% of SIA's shifts", ""))
            axes[i, 0].set_xticks(range(-4, 5, 2))
            for axis, title, (x, y) in zip(axes[i], titles, labels, strict=True):
                axis.set_title(title, loc="left")
                axis.set_xlabel(x)
                axis.set_ylabel(y)
            axes[i, 1].legend(frameon=False, fontsize=style.SMALL)
        names = [
            style.handle("base", "base responses, where the gate would open", marker="o"),
            style.handle("sia", "SIA: its responses, its junctions"),
        ]
        names.append(style.handle("dense", "dense: every token"))
        caption = (
            f"Entropy of the base model over the candidates around junctions at {target:.0%} of the tokens "
            f"({style.first_loss(profile)}, β = 1), and which "
            f"of the steered tokens, there and under dense steering, are others than the same noise would have picked unsteered. "
            f"Histograms and most frequent shifts: all together, without intervals. {style.measured(table, profile)}"
        )
        return style.finish(figure, names, caption, folder, "entropy", stale=stale)


def _shifted_by(entropy: np.ndarray, response: np.ndarray, offset: int) -> np.ndarray:
    """The entropy `offset` tokens later in the same response."""
    moved = np.full(len(entropy), np.nan, dtype=np.float32)
    here = np.arange(max(0, -offset), len(entropy) - max(0, offset))
    moved[here] = np.where(
        response[here] == response[here + offset], entropy[here + offset], np.nan
    )
    return moved


def _quantities(part: pd.DataFrame) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What is averaged over junctions: (value, whether it counts), `(junctions,)` each."""
    around = {o: part[f"entropy{o:+d}"].to_numpy(np.float64) for o in OFFSETS}
    everywhere = np.ones(len(part), dtype=bool)
    found = {f"entropy at {o:+d}": (values, ~np.isnan(values)) for o, values in around.items()}
    later = np.where(np.isnan(around[3]), around[2], (around[2] + around[3]) / 2)
    changes = {
        "fall: entropy after − at a junction": around[1] - around[0],
        "entropy after − before a junction": around[1] - around[-1],
        "rebound: two and three tokens after − one after": later - around[1],
        "rebound: two tokens after − one after": around[2] - around[1],
        "rebound: three tokens after − one after": around[3] - around[1],
    }
    found |= {name: (values, ~np.isnan(values)) for name, values in changes.items()}
    shifted = part["shifted"].to_numpy()
    found["share of junctions shifted"] = (shifted.astype(float), everywhere)
    found["entropy of shifted junctions"] = (around[0], shifted)
    found["entropy of junctions not shifted"] = (around[0], ~shifted)
    for low, high in pairwise(BINS):
        inside = (around[0] >= low) & (around[0] < high)
        found[f"junctions with entropy {low:.1f} to {high:.1f}"] = (
            inside.astype(float),
            everywhere,
        )
        found[f"shifted with entropy {low:.1f} to {high:.1f}"] = (shifted.astype(float), inside)
    return found


def _draws(part: pd.DataFrame, quantities: dict, profile: Profile) -> tuple[list[str], np.ndarray]:
    """Names, and means `(1 + replicates, 1 + resamples, quantities)`: pooled and of each replicate, estimate first."""
    place, shape = estimates.unit_places(part, "prompt", profile.evaluation.prompts_per_objective)
    size = int(np.prod(shape))
    sums = [
        np.bincount(place, np.where(counts, np.nan_to_num(values), 0.0), size)
        for values, counts in quantities.values()
    ]
    counts = [np.bincount(place, counts, size) for _, counts in quantities.values()]
    return list(quantities), estimates.ratio_draws(
        np.stack(sums, 1), np.stack(counts, 1), shape, profile
    )

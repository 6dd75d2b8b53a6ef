"""Entropy around junctions: how sure the base is before, at and after them; where steering changes the token, and which tokens.

The profile's first loss, β = 1. Beside the steered responses stand base responses, whose junctions are where the same gate would open: what
is common to both is no effect of steering. Shifted: the token is another than the same noise would have picked unsteered.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.profile import Profile

OFFSETS = range(-5, 6)
BINS = np.arange(0, 2.4001, 0.2)  # nats; at most ln 10
STRETCHES = {f"{low:.1f} to {high:.1f}": (low, high) for low, high in pairwise(BINS)}
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
        """Return what happens to entropy around junctions, and the most frequent changes of words.

        Means of entropy at each offset, the fall after a junction and the rebound, shares of junctions and of changed
        ones by entropy (`stretch`). Intervals: over replicates, and prompts within replicate and objective. Rows with
        versus "base" are steered minus base responses.
        """
        records = []
        for (family, target), both in rows.groupby(["family", "target_ratio"], observed=True):
            policies = dict(list(both.groupby("method", observed=True)))
            draws = {method: _draws(part, profile) for method, part in policies.items()}
            prompts = both[["replicate", "objective", "prompt"]].drop_duplicates()
            common = {"family": family, "target_ratio": target, "objective": "all"}
            counts = {"n": len(prompts), "seeds": both["seed"].nunique()}
            counts["replicates"] = both["replicate"].nunique()
            for method, by_quantity in draws.items():
                for quantity, values in by_quantity.items():
                    labels = common | counts | {"method": method} | quantity._asdict()
                    records += estimates.estimate_rows(labels | {"versus": ""}, values, profile)
                    if method == "sia":
                        change = values - draws["base"][quantity]
                        records += estimates.estimate_rows(
                            labels | {"versus": "base"}, change, profile
                        )
            steered = policies["dense" if target == 1 else "sia"]
            shifts = steered[steered["shifted"]]
            pairs = shifts.groupby(["base_token", "token_ids"]).size().nlargest(FREQUENT)
            for (base_token, token), count in pairs.items():
                labels = common | {
                    "method": steered["method"].iloc[0],
                    "metric": "word_shift_share",
                }
                labels |= {"versus": "", "base_word": rows.attrs[str(base_token)]}
                labels |= {"word": rows.attrs[str(token)]}
                records.append(labels | {"estimate": count / len(shifts)})
        return estimates.summary_frame(records, ["offset", "stretch", "base_word", "word"])

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Two rows for each family: entropy around junctions, entropies of shifted and of other tokens under dense steering; how many are
        shifted there and at SIA's junctions, the most frequent shifts."""
        from benchmarks.figures import style

        table = estimates.pooled(table)

        target = min(profile.sweep.reduced_ratios)
        everywhere = table[(table["method"] == "dense") & (table["versus"] == "")]
        table = table[np.isclose(table["target_ratio"], target)]
        figure, axes = style.grid(2 * len(profile.families), 2, 3.6, 2.3)
        axes = axes.reshape(-1, 4)
        centres = (BINS[:-1] + BINS[1:]) / 2
        for i, family in enumerate(profile.families):
            part = table[table["family"] == family]
            level = part[part["versus"] == ""].set_index(["method", "metric"])
            for method in ("base", "sia"):
                around = level.loc[method].loc["entropy_at_offset"]
                style.curve(axes[i, 0], method, around, "offset")
            dense = everywhere[everywhere["family"] == family].set_index("metric")
            at_junctions, shifted = (
                of.loc["shifted_share_at_entropy"].assign(centre=centres)
                for of in (level.loc["sia"], dense)
            )
            shares = dense.loc["entropy_histogram"]
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
            shifts = part[part["metric"] == "word_shift_share"].nlargest(FREQUENT, "estimate")[::-1]
            axes[i, 3].barh(
                shifts["base_word"] + " → " + shifts["word"],
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


def _quantities(part: pd.DataFrame) -> dict[Quantity, tuple[np.ndarray, np.ndarray]]:
    """Return each quantity's values at the junctions and where they count, `(junctions,)` each."""
    around = {o: part[f"entropy{o:+d}"].to_numpy(np.float64) for o in OFFSETS}
    later = np.where(np.isnan(around[3]), around[2], (around[2] + around[3]) / 2)
    values = {Quantity("entropy_at_offset", o): entropy for o, entropy in around.items()} | {
        Quantity("entropy_fall"): around[1] - around[0],
        Quantity("entropy_fall_from_before"): around[1] - around[-1],
        Quantity("entropy_rebound"): later - around[1],
        Quantity("entropy_rebound_after_two"): around[2] - around[1],
        Quantity("entropy_rebound_after_three"): around[3] - around[1],
    }
    quantities = {name: (entropy, ~np.isnan(entropy)) for name, entropy in values.items()}
    shifted, everywhere = part["shifted"].to_numpy(), np.ones(len(part), dtype=bool)
    quantities[Quantity("shifted_share")] = (shifted.astype(float), everywhere)
    quantities[Quantity("shifted_entropy")] = (around[0], shifted)
    quantities[Quantity("unshifted_entropy")] = (around[0], ~shifted)
    for stretch, (low, high) in STRETCHES.items():
        inside = (around[0] >= low) & (around[0] < high)
        quantities[Quantity("entropy_histogram", stretch=stretch)] = (
            inside.astype(float),
            everywhere,
        )
        quantities[Quantity("shifted_share_at_entropy", stretch=stretch)] = (
            shifted.astype(float),
            inside,
        )
    return quantities


def _draws(part: pd.DataFrame, profile: Profile) -> dict[Quantity, np.ndarray]:
    """Return the means of each quantity with their resamples, as `estimates.ratio_draws` does."""
    index, shape = estimates.unit_indices(part, "prompt", profile.evaluation.prompts_per_objective)
    size, sums, counts = int(np.prod(shape)), [], []
    quantities = _quantities(part)
    for values, counted in quantities.values():
        sums.append(np.bincount(index, np.where(counted, np.nan_to_num(values), 0.0), size))
        counts.append(np.bincount(index, counted, size))
    draws = estimates.ratio_draws(np.stack(sums, 1), np.stack(counts, 1), shape, profile)
    return {quantity: draws[:, :, i] for i, quantity in enumerate(quantities)}


class Quantity(NamedTuple):
    """What a mean over junctions is of."""

    metric: str
    offset: int | None = None
    stretch: str = ""

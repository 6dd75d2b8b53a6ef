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
from benchmarks.analysis.labels import family_label
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
        """Draw entropies around junctions, and which tokens steering changes; two rows a family."""
        from benchmarks.figures import style

        target = min(profile.sweep.reduced_ratios)
        table = estimates.pooled(table)
        table = table[table["versus"] == ""]
        places = dict(zip(STRETCHES, (BINS[:-1] + BINS[1:]) / 2, strict=True))
        table = table.assign(place=table["stretch"].map(places))
        sparse = table[np.isclose(table["target_ratio"], target)]
        dense = table[table["method"] == "dense"]
        families = profile.families
        figure, axes = style.plt.subplots(
            2 * len(families), 2, figsize=(style.PAGE, 3.3 * len(families) + 1)
        )
        looks = style.PALETTE | {"base": style.Look(style.COLOURS["base"], "o", (5, 2))}
        for i, family in enumerate(families):
            (around, histogram), (by_entropy, words) = axes[2 * i : 2 * i + 2]
            of_sparse, of_dense = (rows[rows["family"] == family] for rows in (sparse, dense))
            rows = of_sparse[
                (of_sparse["metric"] == "entropy_at_offset")
                & of_sparse["method"].isin(["base", "sia"])
            ]
            style.curves(rows, "offset", looks=looks).on(around).plot()
            around.set(
                xlabel="tokens after the junction",
                ylabel="entropy (nats)",
                title=f"{family_label(family)}: around junctions",
            )
            by_place = of_dense.pivot_table(
                index="place", columns="metric", values="estimate", dropna=False
            )
            changed = by_place["entropy_histogram"] * by_place["shifted_share_at_entropy"].fillna(0)
            kept = by_place["entropy_histogram"] - changed
            shares = pd.DataFrame(
                {"tokens kept": kept / kept.sum(), "tokens changed": changed / changed.sum()}
            )
            shares = shares.melt(
                ignore_index=False, var_name="token", value_name="share"
            ).reset_index()
            bars = style.sns.barplot(
                shares,
                x="place",
                y="share",
                hue="token",
                ax=histogram,
                palette=["#9ECAE1", "#08306B"],
                native_scale=True,
                saturation=1,
            )
            bars.legend(frameon=False, title="", fontsize=style.SMALL)
            histogram.set(
                xlabel="entropy (nats)",
                ylabel="share of these tokens",
                title="tokens under dense steering",
            )
            at_entropy = pd.concat([of_dense, of_sparse[of_sparse["method"] == "sia"]])
            at_entropy = at_entropy[at_entropy["metric"] == "shifted_share_at_entropy"].dropna(
                subset=["estimate"]
            )
            style.curves(at_entropy, "place", looks=looks).on(by_entropy).plot()
            by_entropy.set(
                xlabel="entropy (nats)",
                ylabel="share of tokens changed",
                title="changed by steering",
            )
            shifts = of_sparse[of_sparse["metric"] == "word_shift_share"].nlargest(
                FREQUENT, "estimate"
            )
            style.sns.barplot(
                x=100 * shifts["estimate"],
                y=shifts["base_word"].astype(str) + " → " + shifts["word"].astype(str),
                ax=words,
                color=style.COLOURS["sia"],
                saturation=1,
            )
            words.tick_params(axis="y", labelsize=6)
            words.set(xlabel="share of SIA's changes (%)", ylabel="", title="most frequent changes")
        handles = [
            style.handle("base", "base, where the gate would open", marker="o"),
            style.handle("sia", f"SIA at {target:.0%}"),
            style.handle("dense"),
        ]
        caption = (
            "Entropy of the base model, and tokens that differ from the unsteered choice under the "
            f"same noise ({style.first_loss(profile)}, β = 1). {style.sample_size_note(sparse, profile)}"
        )
        return style.finish(figure, handles, caption, folder, "entropy", stale=stale)


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

"""Entropy around junctions: how sure the base is near them, and where steering changes tokens.

The profile's first loss, β = 1. Beside the steered responses stand base responses, whose junctions
are where the same gate would open: what is common to both is no effect of steering. Shifted: the
token is another than the same noise would have picked unsteered.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import family_label, listed, share_label
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import CellRequest, FigureCells
from benchmarks.spec.profile import Profile

OFFSETS = range(-5, 6)
BIN_WIDTH = 0.2  # nats
LOOKS = style.PALETTE | {"base": style.Look(style.COLOURS["base"], "o", (5, 2))}
CELL = ["replicate", "family", "method", "target_ratio"]
TOKEN = ["objective", "prompt", "seed", "step", "token_ids", "base_token", "shifted"]


class Quantity(NamedTuple):
    """Name of a mean over junctions."""

    metric: str
    offset: int | None = None
    entropy_bin: str = ""


class Entropy(Figure):
    """Entropy around junctions."""

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return traces of the base, of SIA at the smallest ratio and of dense steering."""
        families, loss = profile.families, profile.losses[0]
        ratio = min(profile.sweep.reduced_ratios)
        sparse = [methods.steered(replicate, family, loss, ratio=ratio) for family in families]
        dense = [methods.dense(replicate, family, loss) for family in families]
        base = [methods.base(replicate, family) for family in families]
        return FigureCells(traces=[*base, *sparse, *dense])

    def collect(self, profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
        """Return a row per junction, and of dense steering one per token.

        Columns entropy-5 to entropy+5 are the entropies around it (NaN beyond the response; of
        dense steering its own alone). Token ids are those of the replicate's own tokenizer.
        """
        frames = []
        for replicate in replicates:
            requests = self.cells(profile, replicate).traces
            for request in (one for one in requests if one.gate == "every"):
                tokens = results.rows(results.resolve(request), "trace")
                tokens = tokens.rename(columns={"entropy": "entropy+0"})
                frames.append(_labelled(tokens, request, request.method))
            for request in (one for one in requests if one.gate == "entropy"):
                for method, tokens in methods.traces_with_junctions(results, request):
                    responses = tokens.groupby(["objective", "prompt", "seed"], observed=True)
                    around = {f"entropy{o:+d}": responses["entropy"].shift(-o) for o in OFFSETS}
                    junctions = tokens.assign(**around)[tokens["junction"].to_numpy()]
                    frames.append(_labelled(junctions, request, method))
        table = pd.concat(frames, ignore_index=True)
        types = dict.fromkeys(("token_ids", "base_token"), profile.token_dtype)
        types |= dict.fromkeys(("family", "method", "objective"), "category")
        return table.astype(types).round({f"entropy{o:+d}": 2 for o in OFFSETS})

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Return entropy around junctions and shares of changed tokens.

        Means of entropy at each offset, the fall after a junction and the rebound, shares of
        junctions and of changed ones by entropy (`entropy_bin`). Versus "base": steered minus base
        responses.
        """
        records = []
        for (family, target), both in rows.groupby(["family", "target_ratio"], observed=True):
            common = {"family": family, "target_ratio": target, "objective": "all"}
            counts = {
                "n": len(both[["replicate", "objective", "prompt"]].drop_duplicates()),
                "seeds": both["seed"].nunique(),
                "replicates": both["replicate"].nunique(),
            }
            draws = {
                method: _draws(tokens, profile)
                for method, tokens in both.groupby("method", observed=True)
            }
            for method, by_quantity in draws.items():
                for quantity, values in by_quantity.items():
                    setting = common | counts | {"method": method} | quantity._asdict()
                    versus = {"": values}
                    if method == "sia":
                        versus["base"] = values - draws["base"][quantity]
                    for name, drawn in versus.items():
                        records += estimates.estimate_rows(
                            setting | {"versus": name}, drawn, profile
                        )
        return estimates.summary_frame(records, ["offset", "entropy_bin"])

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw entropies around junctions, and where steering changes tokens; a row a family."""
        target = min(profile.sweep.reduced_ratios)
        table = estimates.pooled(table)
        bins = entropy_bins(profile.decoding.candidates)
        places = {name: (low + high) / 2 for name, (low, high) in bins.items()}
        table = table[table["versus"] == ""].assign(place=table["entropy_bin"].map(places))
        sparse = table[np.isclose(table["target_ratio"], target)]
        dense = table[table["method"] == "dense"]
        families = profile.families
        size = (style.PAGE, 1.9 * len(families) + 0.8)
        figure, axes = style.plt.subplots(len(families), 3, figsize=size, squeeze=False)
        for family, panels in zip(families, axes, strict=True):
            of_sparse, of_dense = (rows[rows["family"] == family] for rows in (sparse, dense))
            around = of_sparse[of_sparse["metric"] == "entropy_at_offset"]
            style.curves(around, "offset", looks=LOOKS).on(panels[0]).plot()
            panels[0].set(xlabel="tokens after the junction", ylabel="entropy (nats)")
            panels[0].set_title(f"{family_label(family)}: around junctions")
            _draw_kept_and_changed(panels[1], of_dense)
            changed = pd.concat([of_dense, of_sparse[of_sparse["method"] == "sia"]])
            changed = changed[changed["metric"] == "shifted_share_at_entropy"].dropna(
                subset="estimate"
            )
            style.curves(changed, "place", looks=LOOKS).on(panels[2]).plot()
            panels[2].set(xlabel="entropy (nats)", ylabel="share of tokens changed")
            panels[2].set_title("changed by steering")
        handles = [
            style.handle("base", "base, where the gate would open", marker="o"),
            style.handle("sia", f"SIA at {share_label(target)}"),
            style.handle("dense"),
        ]
        caption = (
            "Entropy of the base model, and tokens that differ from the unsteered choice under the "
            f"same noise ({listed(style.first_loss(profile), 'β = 1')}). "
            f"{style.sample_size_note(sparse, profile)}"
        )
        return style.finish(figure, handles, caption, folder, "entropy", stale=stale)


def _draw_kept_and_changed(axis, dense: pd.DataFrame) -> None:
    """Draw histograms of entropy of the tokens that dense steering keeps and changes."""
    bins = dense.pivot_table(index="place", columns="metric", values="estimate", dropna=False)
    changed = bins["entropy_histogram"] * bins["shifted_share_at_entropy"].fillna(0)
    shares = pd.DataFrame(
        {"tokens kept": bins["entropy_histogram"] - changed, "tokens changed": changed}
    )
    shares = (shares / shares.sum()).melt(ignore_index=False, var_name="token").reset_index()
    style.sns.barplot(
        shares, x="place", y="value", hue="token", ax=axis, palette=[style.PALE, style.DARK],
        native_scale=True, saturation=1,
    ).legend(frameon=False, title="", fontsize=style.SMALL)  # fmt: skip
    axis.set(xlabel="entropy (nats)", ylabel="share of these tokens")
    axis.set_title("tokens under dense steering")


def _labelled(tokens: pd.DataFrame, request: CellRequest, method: str) -> pd.DataFrame:
    """Return the columns of these tokens that the table keeps."""
    labels = (request.replicate, request.family, method, request.target_ratio)
    return tokens.assign(
        shifted=tokens["token_ids"] != tokens["base_token"],
        **dict(zip(CELL, labels, strict=True)),
    )[[*CELL, *TOKEN, *tokens.columns[tokens.columns.str.match(r"entropy[+-]")]]]


def entropy_bins(candidates: int) -> dict[str, tuple[float, float]]:
    """Return lower and upper end, in nats, of bins up to the highest entropy that candidates have.

    Rows hold entropies in hundredths. The names of the bins are their ends.
    """
    highest = round(100 * math.log(candidates))
    ends = (BIN_WIDTH * np.arange(highest // round(100 * BIN_WIDTH) + 2)).tolist()
    return {f"{low:.1f} to {high:.1f}": (low, high) for low, high in pairwise(ends)}


def _quantities(
    tokens: pd.DataFrame, candidates: int
) -> dict[Quantity, tuple[np.ndarray, np.ndarray]]:
    """Return each quantity's values at the junctions and where they count, `(junctions,)` each."""
    around = {o: tokens[f"entropy{o:+d}"].to_numpy(np.float64) for o in OFFSETS}
    later = np.where(np.isnan(around[3]), around[2], (around[2] + around[3]) / 2)
    values = {Quantity("entropy_at_offset", o): entropy for o, entropy in around.items()} | {
        Quantity("entropy_fall"): around[1] - around[0],
        Quantity("entropy_fall_from_before"): around[1] - around[-1],
        Quantity("entropy_rebound"): later - around[1],
        Quantity("entropy_rebound_after_two"): around[2] - around[1],
        Quantity("entropy_rebound_after_three"): around[3] - around[1],
    }
    shifted, everywhere = tokens["shifted"].to_numpy(), np.ones(len(tokens), dtype=bool)
    quantities = {name: (entropy, ~np.isnan(entropy)) for name, entropy in values.items()} | {
        Quantity("shifted_share"): (shifted, everywhere),
        Quantity("shifted_entropy"): (around[0], shifted),
        Quantity("unshifted_entropy"): (around[0], ~shifted),
    }
    for entropy_bin, (low, high) in entropy_bins(candidates).items():
        inside = (around[0] >= low) & (around[0] < high)
        quantities |= {
            Quantity("entropy_histogram", entropy_bin=entropy_bin): (inside, everywhere),
            Quantity("shifted_share_at_entropy", entropy_bin=entropy_bin): (shifted, inside),
        }
    return quantities


def _draws(tokens: pd.DataFrame, profile: Profile) -> dict[Quantity, np.ndarray]:
    """Return the means of each quantity with their resamples, as `estimates.ratio_draws` does."""
    prompts = profile.evaluation.prompts_per_objective
    index, shape = estimates.unit_indices(tokens, "prompt", prompts)
    quantities, size = _quantities(tokens, profile.decoding.candidates), int(np.prod(shape))
    sums, counts = zip(
        *(
            (np.bincount(index, np.where(counted, np.nan_to_num(values), 0.0), size),
             np.bincount(index, counted, size))
            for values, counted in quantities.values()
        ),
        strict=True,
    )  # fmt: skip
    draws = estimates.ratio_draws(np.stack(sums, 1), np.stack(counts, 1), shape, profile)
    return {quantity: draws[:, :, i] for i, quantity in enumerate(quantities)}

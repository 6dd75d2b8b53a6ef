"""Share of the gain of steering that the steps ranked first by a score hold.

By Lemma 2.1 leaving a step alone costs KL(π‖π*)/β. Scores rank the steps that the base visits,
within each objective, as a gate does whose threshold is its own there: what share of Σ KL(π‖π*)
lies in the first steps, and with which probability a step at which steering changes the token ranks
above one at which it does not (AUROC; every step counts by its exact probability of a change).

Experiments: "usual"; "unseen-topics", the predictor fitted without these topics, and beside it on
the same prompts "seen-topics", the usual one; "other-beta", the divergence at another β than the
predictor was fitted for; "other-world", a base model that went on to learn the corpus of another
world, and values learned from its responses (first family and loss). Method: the gate that goes by
a score ("q-head": the divergence by its own values).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates, labels
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.model_kinds import ModelKind
from benchmarks.spec.profile import LabProfile, Profile

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)  # of the steps
SHOWN_SHARE = 0.2  # where experiments are compared
SCORES = {  # by method
    "random": "random",
    "sia": "entropy",
    "entropy-rise": "entropy rise",
    "attention": "attention",
    "junction": "predictor",
    "q-head": "Q-head's divergence",
    "divergence": "oracle",
}
EXPERIMENTS = {
    "usual": "all prompts",
    "seen-topics": "topics seen",
    "unseen-topics": "topics held out",
    "other-beta": "at β = 4",
    "other-world": "second corpus",
}
COMPARED = ("sia", "junction", "divergence")  # in every experiment
KEYS = ["replicate", "family", "value_model", "experiment", "method"]
CAPTURED = [f"captured_{share:g}" for share in SHARES]
SUMS = ["divergence", *CAPTURED, "shifted", "kept", "shifted_above", "kept_below"]


class Regret(Figure):
    """Steps where steering matters, and scores that find them."""

    needs_lab = True
    reported = ("captured_divergence", "shift_auroc")

    def cells(self, profile: LabProfile, replicate: int) -> FigureCells:
        """Return traces of the base, and of the base that learned another world."""
        requests = [methods.base(replicate, family) for family in profile.families]
        requests += [
            methods.base(replicate, profile.families[0], ModelKind("base", world=world.name))
            for world in profile.worlds
        ]
        return FigureCells(traces=requests)

    def collect(self, profile: LabProfile, replicates: Sequence[int], results) -> pd.DataFrame:
        """Return a row per prompt, experiment and score, with the sums of its first response."""
        frames = []
        for replicate in replicates:
            for cell in self.cells(profile, replicate).traces:
                tokens = results.rows(results.resolve(cell), "trace").query("seed == 0")
                tokens = tokens.reset_index(drop=True)
                usual = not cell.model.world
                for loss in profile.losses if usual else profile.losses[:1]:
                    setting = (replicate, cell.family, methods.VALUES[loss])
                    compared = experiments if usual else in_other_world
                    for experiment, (gain, scores) in compared(tokens, loss, replicate).items():
                        frames += [
                            prompt_sums(tokens, score, gain, tokens[f"shift_{loss}"]).assign(
                                **dict(zip(KEYS, (*setting, experiment, method), strict=True))
                            )
                            for method, score in scores.items()
                        ]
        table = pd.concat(frames, ignore_index=True)
        table[SUMS] = table[SUMS].astype("float32").round(4)
        return table.astype(dict.fromkeys([*KEYS[1:], "objective"], "category"))

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Estimate the captured share at each share of the steps, and the AUROC, of every score.

        Also by how much the predictor's captured share at SHOWN_SHARE exceeds that of the entropy.
        """
        prompts, records, captured = profile.evaluation.prompts_per_objective, [], {}
        for key, group in rows.groupby(KEYS[1:], observed=True):
            index, shape = estimates.unit_indices(group, "prompt", prompts)
            units = np.zeros((int(np.prod(shape)), len(SUMS)))
            units[index] = group[SUMS]
            column = dict(zip(SUMS, units.T, strict=True))
            tops = np.stack([column[name] for name in (*CAPTURED, *SUMS[-2:])], axis=1)
            bottoms = [column["divergence"]] * len(CAPTURED) + [column["shifted"], column["kept"]]
            draws = estimates.ratio_draws(tops, np.stack(bottoms, axis=1), shape, profile)
            common = dict(zip(KEYS[1:], key, strict=True)) | {
                "objective": "all",
                "seeds": 1,
                "replicates": shape[0],
                "n": int((column["shifted"] + column["kept"] > 0).sum()),
            }
            for number, share in enumerate(SHARES):
                setting = common | {"metric": "captured_divergence", "target_ratio": share}
                records += estimates.estimate_rows(setting, draws[:, :, number], profile)
            setting = common | {"metric": "captured_divergence", "target_ratio": SHOWN_SHARE}
            captured[key] = setting, draws[:, :, SHARES.index(SHOWN_SHARE)]
            # both are the AUROC; to first order their deviations add up to that of the AUROC
            above, below = draws[:, :, -2], draws[:, :, -1]
            auroc = above + below - below[:, :1]
            setting = common | {"metric": "shift_auroc"}
            records += estimates.estimate_rows(setting, auroc, profile)
        for (*where, method), (setting, draws) in captured.items():
            if method == "junction":
                _, of_entropy = captured[*where, "sia"]
                versus = setting | {"versus": "sia"}
                records += estimates.estimate_rows(versus, draws - of_entropy, profile)
        return estimates.summary_frame(records, ["experiment"])

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw captured shares, AUROC, and experiments; a column for each family and loss."""
        table = estimates.pooled(table[table["versus"].fillna("") == ""])
        columns = [
            (f, value) for f in profile.families for value in methods.losses_in_order(profile)
        ]
        size = (style.PAGE, 6.0)
        figure, axes = style.plt.subplots(
            3, len(columns), figsize=size, squeeze=False, sharey="row", sharex="row",
            height_ratios=(1.5, 1, 0.9),
        )  # fmt: skip
        for (family, value_model), panels in zip(columns, axes.T, strict=True):
            rows = table[(table["family"] == family) & (table["value_model"] == value_model)]
            usual = rows[rows["experiment"] == "usual"]
            captured = usual[usual["metric"] == "captured_divergence"]
            banded = captured["method"].isin(COMPARED)
            captured = captured.assign(
                **{end: captured[end].where(banded) for end in ("low", "high")}
            )
            style.curves(style.ordered(captured, method=SCORES), "target_ratio").on(
                panels[0]
            ).plot()
            title = labels.listed(
                labels.family_label(family), labels.loss_label(profile, value_model)
            )
            panels[0].set(xlabel="share of the steps", ylabel="", title=title.replace(", ", ",\n"))
            _draw_points(panels[1], usual[usual["metric"] == "shift_auroc"], "method", SCORES)
            panels[1].set(xlabel="AUROC of changes")
            at_share = rows[np.isclose(rows["target_ratio"], SHOWN_SHARE)]
            at_share = at_share[at_share["method"].isin(COMPARED)]
            _draw_points(panels[2], at_share, "experiment", EXPERIMENTS)
            panels[2].set(xlabel=f"captured by {SHOWN_SHARE:.0%}")
        axes[0, 0].set_ylabel("share of Σ KL(π‖π*) captured")
        of_topics = int(table.loc[table["experiment"] == "unseen-topics", "n"].max())
        caption = (
            "Steps of base responses, ranked by each score. β = 1 unless labelled; topics: n = "
            f"{of_topics}; second corpus: one panel. "
            f"{style.sample_size_note(usual, profile, 'Bands and lines')}"
        )
        looks = {method: style.PALETTE[method] for method in SCORES}
        handles = style.handles(looks, SCORES)
        return style.finish(
            figure, handles, caption, folder, "regret", stale=stale, legend_columns=4
        )


def experiments(
    tokens: pd.DataFrame, loss: str, seed: int
) -> dict[str, tuple[pd.Series, dict[str, pd.Series]]]:
    """Return by experiment the gain of each step, and scores by method; NaN where left out."""
    gain, predicted = tokens[f"divergence_{loss}"], tokens[f"predicted_{loss}"]
    before = tokens.groupby(["objective", "prompt"], observed=True)["entropy"].shift()
    rise = np.log(tokens["entropy"] / before).fillna(-np.inf)
    usual = {
        "random": pd.Series(np.random.default_rng(seed).random(len(tokens))),
        "sia": tokens["entropy"],
        "entropy-rise": rise,
        "attention": tokens["attention"],
        "junction": predicted,
        "q-head": tokens[f"q_head_{loss}"],
        "divergence": gain,
    }
    compared = {method: usual[method] for method in COMPARED}
    unseen, strong = tokens[f"unseen_{loss}"], tokens[f"other_beta_{loss}"]
    of_unseen = {method: score.where(unseen.notna()) for method, score in compared.items()}
    return {
        "usual": (gain, usual),
        "seen-topics": (gain, of_unseen),
        "unseen-topics": (gain, of_unseen | {"junction": unseen}),
        "other-beta": (strong, compared | {"divergence": strong}),
    }


def in_other_world(
    tokens: pd.DataFrame, loss: str, seed: int
) -> dict[str, tuple[pd.Series, dict[str, pd.Series]]]:
    """Return what `experiments` does of a trace in another world."""
    gain = tokens[f"divergence_{loss}"]
    scores = (tokens["entropy"], tokens[f"predicted_{loss}"], gain)
    return {"other-world": (gain, dict(zip(COMPARED, scores, strict=True)))}


def prompt_sums(
    tokens: pd.DataFrame, score: pd.Series, gain: pd.Series, shift: pd.Series
) -> pd.DataFrame:
    """Return for each prompt the sums that shares and AUROC are ratios of.

    - divergence: of the gain; captured_S: of that of steps in the first share S of the objective's.
    - shifted and kept: of the probabilities that steering changes the token, or does not.
    - shifted_above: of the former, times the share of kept steps that rank lower; kept_below: the
      other way round.

    Args:
        tokens: A trace.
        score: Score of each step; steps without one are left out.
        gain: Gain of steering each step.
        shift: Probability that steering changes the token.
    """
    counted = score.notna()
    tokens, score, gain, shift = (x[counted] for x in (tokens, score, gain, shift))
    by_objective = score.groupby(tokens["objective"], observed=True)
    count = by_objective.transform("size")
    rank = by_objective.rank(method="first", ascending=False)
    place = by_objective.rank(method="average", ascending=False) / count
    columns = {"divergence": gain}
    for share, name in zip(SHARES, CAPTURED, strict=True):
        columns[name] = gain.where(rank <= (share * count).round().clip(lower=1), 0.0)
    kept = 1 - shift
    columns |= {
        "shifted": shift,
        "kept": kept,
        "shifted_above": shift * share_behind(place, kept),
        "kept_below": kept * (1 - share_behind(place, shift)),
    }
    frame = tokens[["objective", "prompt"]].assign(**columns)
    return frame.groupby(["objective", "prompt"], observed=True, as_index=False).sum()


def share_behind(place: pd.Series, weight: pd.Series) -> pd.Series:
    """Return for each step the share of the weight behind its place, of equal places a half."""
    at_place = weight.groupby(place).sum()
    behind = at_place.sum() - at_place.cumsum() + at_place / 2
    return place.map(behind / at_place.sum())


def _draw_points(axis, rows: pd.DataFrame, level: str, names: dict[str, str]) -> None:
    """Draw estimates with intervals, a line for each level, the first on top; methods apart."""
    heights = {key: -number for number, key in enumerate(names)}
    shifts = dict(zip(COMPARED, (0.25, 0, -0.25), strict=True)) if level == "experiment" else {}
    for row in rows[rows[level].isin(names)].to_dict("records"):
        look = style.PALETTE[row["method"]]
        axis.errorbar(
            row["estimate"],
            heights[row[level]] + shifts.get(row["method"], 0),
            xerr=[[row["estimate"] - row["low"]], [row["high"] - row["estimate"]]],
            color=look.colour, marker=look.marker, markersize=4, elinewidth=0.8,
        )  # fmt: skip
    axis.set_yticks(list(heights.values()), names.values())
    axis.set_ylim(min(heights.values()) - 0.5, 0.5)

"""One self-contained page of a profile's verdicts, junctions, figures and tables.

`make report` writes figures/PROFILE/report.html from the template page.html.j2. The page makes no
network requests, and holds the hashes of the files that it was made from.
"""

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import unescape
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from benchmarks.analysis import claims, tables
from benchmarks.analysis.estimates import pooled
from benchmarks.analysis.labels import (
    WEAKEST,
    listed,
    loss_label,
    method_label,
    metric_label,
    plural,
    with_minus,
)
from benchmarks.figures import junctions
from benchmarks.figures.base import Figure
from benchmarks.report import editions, forest
from benchmarks.runtime.files import read_frame, write_text
from benchmarks.spec.model_kinds import value_kind
from benchmarks.spec.profile import Profile

TEMPLATE = Path(__file__).with_name("page.html.j2")
REPORT = "report.html"
MAX_COLOURS = 96  # of a picture in the page, which keeps it small
MAX_ROWS = 150  # of a table in the page
LEAST_LOGPROB = math.log(5e-4)  # of a candidate that the viewer shows
DIVERGENCES = ("divergence", "predicted")  # columns of views
HIDDEN_COLUMNS = ("seeds", "replicate", "versus_ratio")


def write(profile: Profile, figures: Mapping[str, Figure]) -> Path:
    """Write the page and return its path.

    Raises:
        FileNotFoundError: If there are no verdicts to begin with.
    """
    path = tables.folder(profile) / "claims.csv"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: make claims {profile.make_options} writes it")
    verdicts = claims.read_verdicts(path)
    names = tables.with_tables(profile, figures)
    has_viewer = "junctions" in names
    page = _template().render(
        profile=profile,
        intervals=tables.intervals(profile),
        measured=_measured([tables.read_provenance(profile, name) for name in names]),
        counts={kind: int((verdicts["verdict"] == kind).sum()) for kind in claims.VERDICTS},
        claims=_claims(verdicts),
        fewest_prompts=claims.FEWEST_PROMPTS,
        tolerance=claims.TOLERANCE,
        alpha=f"{1 - profile.statistics.level:.0%}",
        forest=[_picture(path) for path in pictures_of(profile, forest.NAME)],
        editions=[_picture(path) for path in pictures_of(profile, editions.NAME)],
        has_viewer=has_viewer,
        figures=[_figure(profile, figures[name]) for name in names if figures[name].own_section],
        made_from=made_from(profile, figures),
        view_data=view_data(profile) if has_viewer else None,
        first_loss=loss_label(profile, str(value_kind(profile.losses[0]))),
    )
    path = tables.FIGURES / profile.name / REPORT
    write_text(path, page)
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "separators": (",", ":"),
        "allow_nan": False,
    }
    return environment.get_template(TEMPLATE.name)


def made_from(profile: Profile, figures: Mapping[str, Figure]) -> dict[str, str]:
    """Return the first 16 digits of the SHA-256 of every file that the page shows."""
    folder = tables.folder(profile)
    names = tables.with_tables(profile, figures)
    files = [
        TEMPLATE,
        folder / "claims.csv",
        folder / "junctions.parquet",
        *(folder / f"{name}.csv" for name in names),
    ]
    drawn = (forest.NAME, editions.NAME, *names)
    files += [path for name in drawn for path in pictures_of(profile, name)]
    return {file.name: tables.sha256(file)[:16] for file in files if file.exists()}


def pictures_of(profile: Profile, name: str) -> list[Path]:
    """Return the pictures of a figure: NAME.png and any NAME-variant.png."""
    files = tables.read_drawings(profile).get(name, {}).get("files", {})
    paths = [tables.FIGURES / profile.name / file for file in sorted(files, key=_stem)]
    return [path for path in paths if path.suffix == ".png" and path.exists()]


def _stem(file: str) -> str:
    return Path(file).stem


def read_made_from(page: str) -> dict[str, str]:
    """Return what a written page says that it was made from; empty if it is damaged there."""
    match = re.search(r'<span id="made-from">([^<]*)</span>', page)
    try:
        return json.loads(unescape(match[1])) if match else {}
    except ValueError:
        return {}


def _measured(provenance: Sequence[Mapping]) -> dict[str, object]:
    """Return where and with what the tables were measured, by all of their runs."""
    runs = [
        entry | run
        for entry in provenance
        for run in (*entry.get("earlier_runs", ()), {})  # the last run is the entry's own
    ]
    packages = [
        f"torch {run['packages']['torch']}, transformers {run['packages']['transformers']}"
        for run in runs
    ]
    return {
        "replicates": sorted({len(entry["replicates"]) for entry in provenance}),
        "commits": sorted({run["git_commit"][:12] for run in runs}),
        "devices": list(dict.fromkeys(map(_device, runs))),
        "packages": list(dict.fromkeys(packages)),
    }


def _device(run: Mapping) -> str:
    """Return what a run measured on."""
    hardware = run["hardware"]
    device = f"{plural(hardware['cores'], 'core')} of {hardware['processor']}"
    if "dtype" not in run:  # given models alone have one
        return device
    if run["device"] == "cuda" and not run.get("card"):  # the head of a cluster may have none
        device = "GPUs of a cluster"
    together = plural(run["batch_size"], "response")
    return f"{listed(run.get('card') or device, run['dtype'])}, {together} together"


def _claims(verdicts: pd.DataFrame) -> list[dict]:
    """Return each claim with its verdicts, one for each condition."""
    return [
        {
            "statement": rows["statement"].iloc[0],
            "source": claims.source_text(rows.iloc[0]),
            "headline": int(rows["headline"].iloc[0]),
            "would_change": rows["would_change"].iloc[0],
            "verdicts": [_verdict(row) for _, row in rows.iterrows()],
        }
        for _, rows in verdicts.groupby("claim", sort=False)
    ]


def _verdict(row: pd.Series) -> dict[str, str]:
    weakest = f"decided by {WEAKEST[row['weakest']]}" if row["weakest"] else ""
    condition = listed(row["condition"], weakest) or "–"
    verdict = {"condition": condition, "verdict": row["verdict"], "by_interval": ""}
    verdict["dagger"] = claims.dagger(row["dense_loses"])
    if not claims.is_decided(row):
        return verdict
    if row["left_open"]:
        verdict["by_interval"] = row["by_interval"]
    estimate, low, high = (
        with_minus(claims.number_text(row[name], row["unit"], ".3g")) for name in claims.NUMBERS
    )
    return verdict | {
        "estimate": estimate,
        "interval": f"{low} to {high}",
        "criterion": with_minus(claims.criterion(row)),
        "p": claims.p_text(row["p_adjusted"]),
        "by_replicate": row["marks"],
        "n": f"{row['n']:.0f}",
    }


def view_data(profile: Profile) -> dict:
    """Return what the viewer shows: the first replicate's responses, token by token."""
    rows = read_frame(tables.folder(profile) / "junctions.parquet")
    rows = rows[rows["replicate"] == rows["replicate"].min()].astype(
        dict.fromkeys(("objective", "asked", "word", *junctions.CELL[:2]), str)
    )
    words = {word: i for i, word in enumerate(sorted(set(rows["word"])))}
    rows = rows.assign(key=[_key(*cell) for cell in rows[junctions.CELL].itertuples(index=False)])
    prompts: dict[str, list[dict]] = {}
    for (objective, _), of_prompt in rows.groupby(["objective", "prompt"]):
        responses = {
            key: _response(candidates.sort_values(["step", "rank"]), words)
            for key, candidates in of_prompt.groupby("key")
        }
        prompts.setdefault(objective, []).append(
            {"asked": of_prompt["asked"].iloc[0].strip(), "responses": responses}
        )
    return {
        "methods": {
            row.key: method_label(profile, row.method, row.target_ratio, row.value_model)
            for row in rows.drop_duplicates("key").itertuples()
        },
        "base": "base",
        "words": list(words),
        "spaced": profile.words,
        "highest": math.log(profile.decoding.candidates),
        # KL(π‖π*) of every step, and as it is predicted; earlier tables have neither
        "divergences": [name for name in DIVERGENCES if name in rows],
        "rounding": round(junctions.rounding_gap(rows), 3),
        "score": metric_label(profile, profile.score),
        "prompts": prompts,
    }


def _key(method: str, value_model: str, ratio: float) -> str:
    return " ".join(filter(None, (method, value_model, f"{ratio:g}" if 0 < ratio < 1 else "")))


def _response(candidates: pd.DataFrame, words: Mapping[str, int]) -> dict:
    return {
        "score": round(float(candidates["score"].iloc[0]), 2),
        "tokens": [_token(step, words) for _, step in candidates.groupby("step", sort=True)],
    }


def _token(step: pd.DataFrame, words: Mapping[str, int]) -> dict:
    """Return a token with its candidates: word, base probability, value, steered probability.

    Candidates that no policy takes are left out, for most steps are sure.
    """
    taken = step["chosen"] | step["unsteered"]
    step = step[taken | (step[["base_logprob", "tilted"]].max(axis=1) > LEAST_LOGPROB)]
    base_probability, steered_probability = (
        np.exp(step[name].astype(float)).round(4) for name in ("base_logprob", "tilted")
    )
    values = [None if np.isnan(value) else round(float(value), 2) for value in step["value"]]
    first = step.iloc[0]
    divergences = {name: _number(first[name]) for name in DIVERGENCES if name in step}
    return divergences | {
        "entropy": round(float(first["entropy"]), 3),
        "steered": bool(first["steered"]),
        "chosen": int(np.argmax(step["chosen"].to_numpy())),
        "unsteered": int(np.argmax(step["unsteered"].to_numpy())),
        "candidates": list(
            zip(
                step["word"].map(words).tolist(),
                base_probability,
                values,
                steered_probability,
                strict=True,
            )
        ),
    }


def _number(value: float) -> float | None:
    """Return a number for JSON, which has no NaN."""
    return None if np.isnan(value) else round(float(value), 3)


def _figure(profile: Profile, figure: Figure) -> dict[str, object]:
    """Return what a figure's section shows: its pictures with captions, and its table."""
    summary = pooled(tables.read_summary(tables.folder(profile) / f"{figure.name}.csv"))
    rows, selection = _selected_rows(summary, profile, figure)
    return {
        "name": figure.name,
        "title": figure.title,
        "stale": tables.read_table(profile, figure.name)[1],
        "pictures": [_picture(path) for path in pictures_of(profile, figure.name)],
        "total": len(summary),
        "selection": selection,
        "numeric": [pd.api.types.is_numeric_dtype(rows[column]) for column in rows],
        "columns": [column.replace("_", " ") for column in rows],
        "rows": rows.map(_cell).to_numpy().tolist(),
    }


def _picture(path: Path) -> dict[str, str]:
    """Return a picture in fewer colours, as base64, and its caption."""
    with Image.open(path) as image:
        caption = image.info.get("Description", "")
        small = image.convert("RGB").quantize(MAX_COLOURS, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return {"data": base64.b64encode(buffer.getvalue()).decode(), "caption": caption}


def _selected_rows(
    summary: pd.DataFrame, profile: Profile, figure: Figure
) -> tuple[pd.DataFrame, str]:
    """Return the rows and columns of a summary that its section shows, and how they were selected.

    The rows of the score (or of the metrics that the figure reports), over all objectives where
    they are so measured, and over all families where there is more than differences.
    """
    rows, selection = summary, []
    reported = (profile.score,) if figure.reported is None else figure.reported
    metrics = [metric for metric in reported if metric in set(rows.get("metric", ()))]
    if metrics:
        rows = rows[rows["metric"].isin(metrics)]
        selection.append(", ".join(metrics))
    for column, noun in (("objective", "objectives"), ("family", "families")):
        levels = rows[rows["versus"] == ""] if column == "family" and "versus" in rows else rows
        if column in rows and (levels[column] == "all").any():
            rows = rows[rows[column] == "all"]
            selection.append(f"over all {noun}")
    rows = _relevant_first(rows, profile)
    if len(rows) > MAX_ROWS:
        selection.append(f"the first {MAX_ROWS} of {len(rows)} such")
        rows = rows.head(MAX_ROWS)
    filled = rows.replace("", np.nan).notna().any()
    columns = [name for name in rows if name not in HIDDEN_COLUMNS and filled[name]]
    return rows[columns], "; ".join(selection)


def _relevant_first(rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Sort estimates before differences; in each the first family, "all" and the others."""
    families = (profile.families[0], "all", *profile.families[1:])
    order = {family: number for number, family in enumerate(families)}
    keys = pd.DataFrame(index=rows.index)
    if "versus" in rows:
        keys["difference"] = rows["versus"] != ""
    if "family" in rows:
        keys["family"] = rows["family"].map(order).fillna(len(order))
    return (
        rows.loc[keys.sort_values(list(keys), kind="stable").index] if len(keys.columns) else rows
    )


def _cell(value: object) -> str:
    if pd.isna(value):
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.3g}"

"""What is committed belongs together: rows, provenance, summaries, verdicts and figures."""

import subprocess

import pandas as pd
import pytest

from benchmarks.analysis import claims, tables
from benchmarks.checks import verify
from benchmarks.figures.registry import FIGURES
from benchmarks.perf import architectures, speed, throughput
from benchmarks.report import editions, results_page
from benchmarks.runtime.files import read_json
from benchmarks.runtime.fingerprints import ROOT
from benchmarks.spec.profile import PROFILES, load_profile, profile_digest

pytestmark = pytest.mark.committed
LISTING = ["git", "-C", ROOT, "ls-files", "results", "figures"]
TRACKED = [ROOT / name for name in subprocess.check_output(LISTING, text=True).splitlines()]
DRAWN = [path for path in TRACKED if path.name == tables.DRAWN]
PROVENANCES = [path for path in TRACKED if path.suffix == ".json" and path not in DRAWN]
KEYS = {"command", "git_commit", "packages", "hardware", "sha256"}


@pytest.mark.parametrize("path", PROVENANCES, ids=str)
def test_tables_are_the_files_that_their_provenance_describes(path):
    provenance = read_json(path)
    assert set(provenance) >= KEYS
    assert provenance["sha256"], "names no file"
    assert "+changes" not in provenance["git_commit"], "measured by sources that were not committed"
    assert tables.changed_files(path.parent, provenance["sha256"]) == []
    if "profile_digest" in provenance and (PROFILES / f"{path.parent.name}.toml").exists():
        assert provenance["profile_digest"] == profile_digest(load_profile(path.parent.name))


def test_every_table_has_a_provenance():
    described = {path.parent / file for path in PROVENANCES for file in read_json(path)["sha256"]}
    derived = {path for path in TRACKED if path.name == "claims.csv"}
    assert {path for path in TRACKED if path.suffix in (".csv", ".parquet")} == described | derived


@pytest.mark.parametrize("path", DRAWN, ids=str)
def test_summaries_verdicts_figures_and_report_follow_from_rows(path):
    profile = load_profile(path.parent.name)
    assert list(verify.damage(tables.folder(profile))) == []
    assert list(verify.outdated_files(profile, FIGURES)) == []
    measured = tables.with_tables(profile, FIGURES)
    both = {editions.NAME} if editions.first_verdicts(profile) is not None else set()
    assert set(read_json(path)) == {*measured, "verdicts", "report"} | both


def test_pages_show_the_verdicts():
    lab = load_profile("lab")
    verdicts = claims.read_verdicts(tables.folder(lab) / "claims.csv")
    readme = results_page.README.read_text(encoding="utf-8")
    page = results_page.RESULTS_PAGE.read_text(encoding="utf-8")
    assert results_page.with_headline(readme, lab, verdicts) == readme
    assert results_page.results_page(lab, verdicts) == page
    assert max(len(row) for row in readme.split("\n") if row.startswith("|")) <= 200


@pytest.mark.parametrize(
    ("module", "name", "read"),
    [
        (architectures, "architectures/cost", pd.read_csv),
        (speed, "speed", speed.read),
        (throughput, "throughput", pd.read_csv),
    ],
)
def test_pages_of_times_show_the_committed_tables(module, name, read):
    provenance = read_json(tables.RESULTS / f"{name}.json")
    page = module.page(read(tables.RESULTS / f"{name}.csv"), provenance)
    assert module.PAGE.read_text(encoding="utf-8") == page


def test_results_and_figures_stay_small():
    sizes = {path: path.stat().st_size / 1e6 for path in TRACKED}
    assert sum(sizes.values()) < 40
    assert {path: size for path, size in sizes.items() if size > 5} == {}

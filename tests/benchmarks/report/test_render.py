"""The report holds what was measured, needs no network, and works in browsers of every size."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.__main__ import main
from benchmarks.analysis import tables
from benchmarks.figures.registry import FIGURES
from benchmarks.report import render
from tests.helpers.fake import SMOKE, FakeResults
from tests.helpers.project import redirect_output

SHOWN = {name: FIGURES[name] for name in ("figure1", "figure3", "figure5", "junctions")}
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Tables and figures of made-up rows, and their report."""
    path = tmp_path_factory.mktemp("reported")
    with pytest.MonkeyPatch.context() as patch:
        redirect_output(patch, path)
        patch.setattr("benchmarks.__main__.FIGURES", SHOWN)
        patch.setattr("benchmarks.__main__.available_cores", lambda: 1)
        patch.setattr("benchmarks.figures.style.DPI", 40)
        for name, figure in SHOWN.items():
            rows = figure.collect(
                SMOKE, range(2), FakeResults(SMOKE, lambda cell: cell.target_ratio)
            )
            tables.write_table(SMOKE, name, rows, figure.summarize(rows, SMOKE), range(2), 1.0, {})
        assert main(["figures", "--profile", "smoke"]) == 0
    return path


@pytest.fixture(scope="module")
def page(project) -> Path:
    return project / "figures/smoke/report.html"


def pooled_verdicts(project: Path) -> pd.Series:
    """Return the verdicts over all replicates."""
    verdicts = pd.read_csv(project / "results/smoke/claims.csv")
    return verdicts.loc[verdicts["replicate"] == "all", "verdict"]


class Reader(HTMLParser):
    """Collects the addresses that a page loads, and checks that its elements nest."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.open, self.headings = [], [], []

    def handle_starttag(self, tag, attributes):
        self.asked += [
            value
            for name, value in attributes
            if name in ("src", "href", "data", "action") and value
        ]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def test_the_page_names_every_device_that_tables_were_measured_on():
    hardware = {"cores": 2, "processor": "EPYC"}
    common = {"replicates": [0], "git_commit": "a" * 40, "hardware": hardware}
    of_card = {"card": "NVIDIA H100", "device": "cuda", "dtype": "bfloat16", "batch_size": 64}
    of_cpu = {"card": "", "device": "cpu", "dtype": "float32", "batch_size": 4}
    packages = [
        {"torch": "2.13.0", "transformers": "5.0"},
        {"torch": "2.14.0", "transformers": "5"},
    ]
    earlier = {"git_commit": "b" * 40, "hardware": {"cores": 8, "processor": "Xeon"}}
    measured = render._measured(
        [
            common | of_card | {"packages": packages[0]},
            common | of_cpu | {"packages": packages[1], "earlier_runs": [earlier]},
        ]
    )
    assert measured["devices"] == [
        "NVIDIA H100, bfloat16, 64 responses together",
        "8 cores of Xeon, float32, 4 responses together",
        "2 cores of EPYC, float32, 4 responses together",
    ]
    of_cluster = common | of_card | {"card": "", "packages": packages[0], "device": "cuda"}
    (device,) = render._measured([of_cluster])["devices"]
    assert device == "GPUs of a cluster, bfloat16, 64 responses together"
    assert measured["packages"] == [
        "torch 2.13.0, transformers 5.0", "torch 2.14.0, transformers 5",
    ]  # fmt: skip
    assert measured["commits"] == ["a" * 12, "b" * 12]


def test_the_page_is_whole_and_asks_no_network(page):
    reader = Reader()
    text = page.read_text(encoding="utf-8")
    reader.feed(text)
    assert reader.open == []
    assert reader.asked
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in reader.asked)
    assert "http-equiv" in text
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp", text)
    assert "{{" not in text
    opening = ["Headline verdicts", "Junctions, token by token", "All claims and their verdicts"]
    assert reader.headings[1:4] == opening
    assert len(reader.headings) == 4 + 3  # and figures


def test_every_verdict_and_figure_is_there(project, page):
    text = page.read_text(encoding="utf-8")
    for verdict, count in pooled_verdicts(project).value_counts().items():
        assert text.count(f'data-verdict="{verdict}"') == count
        assert f"{count} {verdict}" in text
    for name in ("figure1", "figure3", "figure5"):
        assert f"<code>make {name} PROFILE=smoke</code>" in text
    assert ": 95% t intervals over replicates; n = " in text  # captions
    assert "Table: " in text


def test_the_viewer_shows_what_the_table_holds(project, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", project / "results")
    rows = pd.read_parquet(project / "results/smoke/junctions.parquet")
    data = render.view_data(SMOKE)
    assert list(data["prompts"]) == ["harmlessness", "helpfulness", "honesty"]
    assert "sia value-mean 0.2" in data["methods"]
    response = data["prompts"]["honesty"][1]["responses"]["sia value-mean 0.2"]
    view = rows.query(
        "replicate == 0 and objective == 'honesty' and prompt == 1 and value_model == 'value-mean' "
        "and method == 'sia' and target_ratio == 0.2"
    )
    assert len(response["tokens"]) == view["step"].nunique()
    for step, token in enumerate(response["tokens"]):
        here = view[view["step"] == step]
        shown = (here["base_logprob"] > render.LEAST_LOGPROB) | (
            here["tilted"] > render.LEAST_LOGPROB
        )
        here = here[shown | here["chosen"] | here["unsteered"]].reset_index()
        assert token["steered"] == here["steered"].iloc[0]
        assert here.loc[token["chosen"], "chosen"]
        assert here.loc[token["unsteered"], "unsteered"]
        words = [data["words"][candidate[0]] for candidate in token["candidates"]]
        assert words == here["word"].astype(str).tolist()
        assert sum(candidate[1] for candidate in token["candidates"]) == pytest.approx(1, abs=5e-3)
        assert sum(candidate[3] for candidate in token["candidates"]) == pytest.approx(1, abs=5e-3)


def test_missing_verdicts_give_a_one_line_error(project, tmp_path, monkeypatch, capsys):
    shutil.copytree(project / "results", tmp_path / "results")
    redirect_output(monkeypatch, tmp_path)
    (tmp_path / "results/smoke/claims.csv").unlink()
    assert main(["report", "--profile", "smoke"]) == 2
    assert (
        capsys.readouterr().err == f"error: {tmp_path}/results/smoke/claims.csv is missing: "
        "make claims PROFILE=smoke writes it\n"
    )


def test_without_views_the_page_says_how_to_make_them(project, tmp_path, monkeypatch):
    for folder in ("results", "figures"):
        shutil.copytree(project / folder, tmp_path / folder)
    redirect_output(monkeypatch, tmp_path)
    (tmp_path / "results/smoke/junctions.json").unlink()
    text = render.write(SMOKE, SHOWN).read_text(encoding="utf-8")
    assert "Not measured: <code>make junctions PROFILE=smoke</code>" in text
    assert '<script type="application/json" id="data">null</script>' in text


# --- in a browser


def browse(page: Path, tmp_path: Path, script: str, width: int = 1200, dark: bool = False) -> dict:
    """Return what `script`, the body of a function, returns in the page."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian's package chromium)")
    copy = tmp_path / "page.html"
    output = f"JSON.stringify((() => {{{script}}})())"
    run = f'document.body.append(element("pre", {output}, {{ id: "found" }}));'
    copy.write_text(
        page.read_text(encoding="utf-8").replace("</body>", f"<script>{run}</script></body>"),
        encoding="utf-8",
    )
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},900",
    ]  # fmt: skip
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=60
    )
    shown = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert shown, done.stderr
    return json.loads(shown[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


def test_a_reader_picks_objective_prompt_and_method(page, tmp_path, project, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", project / "results")
    shown = browse(page, tmp_path, """
        const pick = (id, value) => {
            const one = document.getElementById(id);
            one.value = value; one.dispatchEvent(new Event("change"));
        };
        pick("objective", "honesty"); pick("prompt", "1"); pick("method", "sia value-mean 0.2");
        const words = (id) => [...document.querySelectorAll("#" + id + " .token")]
            .map((token) => [token.textContent, token.className.trim()]);
        const names = [...document.querySelectorAll(".response h3")].map((h3) => h3.textContent);
        const asked = document.getElementById("asked").textContent;
        return { names, asked, left: words("left"), right: words("right") };
    """)  # fmt: skip
    data = render.view_data(SMOKE)
    one = data["prompts"]["honesty"][1]
    assert shown["asked"] == one["asked"]
    assert shown["names"] == [data["methods"]["base"], data["methods"]["sia value-mean 0.2"]]
    for place, key in (("left", "base"), ("right", "sia value-mean 0.2")):
        tokens = one["responses"][key]["tokens"]
        assert [word for word, _ in shown[place]] == [
            data["words"][token["candidates"][token["chosen"]][0]] for token in tokens
        ]
        for (_, marks), token in zip(shown[place], tokens, strict=True):
            assert ("junction" in marks) == token["steered"]
            assert ("shifted" in marks) == (token["chosen"] != token["unsteered"])


def test_tokens_are_shaded_by_what_a_reader_picks(page, tmp_path, project, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", project / "results")
    shown = browse(page, tmp_path, """
        const shade = document.getElementById("shade");
        const sure = () => [...document.querySelectorAll("#right .token")]
            .map((token) => Number(token.style.getPropertyValue("--sure")));
        const shades = {};
        for (const option of [...shade.options].map((one) => one.value)) {
            shade.value = option; shade.dispatchEvent(new Event("change"));
            shades[option] = sure();
        }
        const text = document.querySelector("#looking p").textContent;
        return { shades, text, method: document.getElementById("method").value };
    """)  # fmt: skip
    data = render.view_data(SMOKE)
    tokens = data["prompts"]["harmlessness"][0]["responses"][shown["method"]]["tokens"]
    assert list(shown["shades"]) == ["entropy", "divergence", "predicted"]
    for name, highest in (("entropy", data["highest"]), ("divergence", 1), ("predicted", 1)):
        expected = [min(1, token[name] / highest) for token in tokens]
        assert shown["shades"][name] == pytest.approx(expected, abs=1e-3)
    assert re.search(r"nats, divergence \(oracle\) 0\.\d\d, predicted divergence 0", shown["text"])


def test_hover_and_keyboard_show_the_candidates(page, tmp_path):
    shown = browse(page, tmp_path, """
        const all = [...document.querySelectorAll("#right .token")];
        const panel = () => document.getElementById("looking");
        const state = () => ({
            title: panel().querySelector("h3").textContent,
            rows: panel().querySelectorAll("tbody tr").length,
            stops: all.filter((token) => token.tabIndex === 0).length,
        });
        const press = (key) => document.querySelector("#right .looked")
            .dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        all[1].dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
        const states = [state()];
        for (const key of ["ArrowRight", "Home", "ArrowLeft", "End"]) {
            press(key); states.push(state());
        }
        const head = [...panel().querySelectorAll("thead th")].map((cell) => cell.textContent);
        return { states, count: all.length, head };
    """)  # fmt: skip
    numbers = [int(re.match(r"Token (\d+)", state["title"])[1]) for state in shown["states"]]
    assert numbers == [2, 3, 1, 1, shown["count"]]
    assert {(state["rows"], state["stops"]) for state in shown["states"]} == {(4, 1)}
    assert shown["head"] == ["candidate", "base", "value", "steered"]


def test_verdicts_can_be_narrowed_down(page, tmp_path, project):
    shown = browse(page, tmp_path, """
        const shown = document.getElementById("shown");
        const visible = () => [...document.querySelectorAll("#verdicts tr[data-verdict]")]
            .filter((row) => row.offsetParent !== null).map((row) => row.dataset.verdict);
        const all = visible();
        shown.value = "reproduced"; shown.dispatchEvent(new Event("change"));
        return { all, some: visible() };
    """)  # fmt: skip
    verdicts = pooled_verdicts(project)
    assert sorted(shown["all"]) == sorted(verdicts)
    assert shown["some"] == ["reproduced"] * (verdicts == "reproduced").sum()


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_screen(page, tmp_path, width):
    """On a phone too, whose width a frame gives: a window of Chromium is never so narrow."""
    shown = browse(page, tmp_path, f"""
        const frame = element("iframe", "", {{ width: "{width}", height: "800" }});
        const source = document.documentElement.outerHTML;
        document.body.append(frame);
        const inside = frame.contentDocument;
        inside.open();
        inside.write(
            "<!doctype html>" + source.replaceAll("<script>", "<script type=text/plain>")
        );
        inside.close();
        inside.getElementById("viewing").hidden = false;
        const pair = getComputedStyle(inside.querySelector(".pair"));
        const columns = pair.gridTemplateColumns.split(" ").length;
        return {{ wide: inside.documentElement.scrollWidth, columns }};
    """)  # fmt: skip
    assert shown["wide"] <= width
    assert shown["columns"] == (1 if width < 700 else 2)


def test_dark_and_light_are_legible(page, tmp_path):
    script = """
        const style = getComputedStyle(document.body);
        const numbers = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
        return { page: numbers(style.backgroundColor), text: numbers(style.color) };
    """
    looks = [browse(page, tmp_path, script, dark=dark) for dark in (False, True)]
    for look in looks:
        assert contrast(look["page"], look["text"]) > 7
    assert sum(looks[0]["page"]) > sum(looks[1]["page"])


def contrast(one: list[float], other: list[float]) -> float:
    """Return the contrast ratio of two colours as WCAG 2 defines it."""

    def luminance(colour: list[float]) -> float:
        shares = np.divide(colour, 255)
        linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)

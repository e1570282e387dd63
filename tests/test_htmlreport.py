"""The report as a page: what it holds, that names from a model are only text in it, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MODELS, ROOT, Command, two_layers

import onnxprune
from onnxprune.charts import Sensitivity, Sweep, SweepPoint
from onnxprune.evaluation import evaluate, read_arrays
from onnxprune.htmlreport import curves_report, html_report
from onnxprune.layertable import layer_changes

EVIL = '</script><script>window.stolen=1</script><img src=x onerror="window.stolen=1">'
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --window-size=1200,900""".split()


class Page(HTMLParser):
    """The elements of a page: how often each is there, its tables as lists of texts, and the JSON of its charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.data: dict[str, Any] = {}
        self._table: list[list[str]] | None = None
        self._json = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self._json = given.get("id") == "data"
        if tag == "table":
            self._table = self.tables.setdefault(given["id"] or "", [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._json = False
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        if self._json:
            self.data = json.loads(data)
        elif self._table and self._table[-1]:
            self._table[-1][-1] += data


def renamed(model: onnx.ModelProto, old: str, new: str) -> onnx.ModelProto:
    """The model with another name for one of its tensors."""
    next(t for t in model.graph.initializer if t.name == old).name = new
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
    return model


@pytest.fixture(scope="module")
def result() -> onnxprune.Result:
    return onnxprune.prune(MODELS / "digits-resnet.onnx", 0.4)


@pytest.fixture(scope="module")
def sensitivity(result: onnxprune.Result) -> Sensitivity:
    return Sensitivity({f"group {g.id}": [(0.0, 0.0), (0.3, 0.01 * (g.id + 1)), (0.5, 0.1)] for g in result.plan.groups})


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    points = [
        SweepPoint(c, 1 - r * k, r, 1e6 * (1 - r), 1e5 * (1 - r), None, k < 1) for c, k in (("obs", 0.5), ("l2", 1)) for r in (0.2, 0.4)
    ]
    return Sweep(points, "accuracy")


def test_layers_add_up_to_the_model(result: onnxprune.Result) -> None:
    layers = layer_changes(result.plan)
    assert [sum(layer.macs[i] for layer in layers) for i in (0, 1)] == list(result.macs)
    after = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    for layer in layers:
        for name, (_, shape) in layer.weights.items():
            assert shape == after[name]
    assert any(new < old for old, new in (layer.width for layer in layers if layer.width))


def test_layers_of_a_branch_that_was_cut_are_gone() -> None:
    found = onnxprune.prune(MODELS / "digits-resnet.onnx", 0.3, granularity="block")
    layers = layer_changes(found.plan)
    assert sum(layer.macs[1] for layer in layers) == found.macs[1]
    assert any(layer.width and layer.width[1] == 0 for layer in layers)


def test_command_writes_the_report(command: Command, tmp_path: Path) -> None:
    made = command(
        MODELS / "digits-mlp.onnx", "-r", "0.3", "-o", "out.onnx", "--report", "r.html", "--eval", MODELS / "digits-mlp.eval.npz"
    )
    assert made.returncode == 0, made.stderr
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    text = re.sub(r"<[^>]*>", " ", (tmp_path / "r.html").read_text(encoding="utf-8"))
    for words in (
        "Accuracy",
        "Latency, median",
        "File size",
        "groups put in another order",
        "30.0% was asked",
        "--report r.html",
        onnx.__version__,
    ):
        assert words in text
    assert ["ratio", "0.3"] in page.tables["options-table"]
    assert {one["id"] for one in page.data["scores"]} == {int(row[0]) for row in page.tables["groups-table"][1:]}


def test_widths_and_places_of_every_group_are_told(result: onnxprune.Result) -> None:
    rows = {int(row[0]): row for row in Page(html_report(result)).tables["groups-table"][1:]}
    assert len(rows) == len(result.plan.groups)
    for group in result.plan.groups:
        gone = len(result.plan.remove.get(group.id, ()))
        assert rows[group.id][2] == (f"{group.units} → {group.units - gone}" if gone else str(group.units))
        for member in group.members:
            assert member.tensor in rows[group.id][4]


def test_histograms_count_every_unit(result: onnxprune.Result) -> None:
    for one in Page(html_report(result)).data["scores"]:
        gone = result.plan.remove.get(one["id"], ())
        assert sum(one["removed"]) == one["gone"] == len(gone)
        assert sum(one["kept"]) + sum(one["removed"]) == one["units"]
        assert one["cut"] == pytest.approx(float(result.scores[one["id"]][gone].max()), rel=1e-4)


def test_curves_are_in_the_charts_and_in_tables(sensitivity: Sensitivity, sweep: Sweep) -> None:
    page = Page(curves_report("a sweep", sensitivity=sensitivity, sweep=sweep))
    assert [[p["ratio"], p["value"]] for p in page.data["sweep"]["points"]] == [[p.ratio, p.value] for p in sweep.points]
    assert [axis["key"] for axis in page.data["sweep"]["axes"]] == ["macs", "parameters"]
    assert page.tables["sensitivity-table"][0] == ["Group", "30%", "50%"]
    assert page.tables["sensitivity-table"][1] == ["group 0", "0.01", "0.1"]
    assert page.tables["sweep-table"][1] == ["obs", "20.0%", "0.9", "0.8", "0.08", "yes"]


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where `sensitivity` and `sweep` have run, with pages of their own."""
    folder = tmp_path_factory.mktemp("explored")
    mlp = [str(MODELS / f"digits-mlp{ending}") for ending in (".onnx", ".calibration.npz", ".eval.npz")]
    common = [mlp[0], "--eval", mlp[2], "-q"]
    sensitivity = ["--calibration", mlp[1], "--samples", "64", "--ratios", "0.3,0.6", "--state", "s.json", "--report", "s.html"]
    sweep = ["--ratios", "0.3,0.5", "--criteria", "l1,l2", "--seconds", "0", "-o", "swept", "--report", "w.html"]
    for line in (["sensitivity", *common, *sensitivity], ["sweep", *common, *sweep]):
        made = subprocess.run([sys.executable, "-m", "onnxprune", *line], cwd=folder, capture_output=True, text=True, check=False)
        assert (made.returncode, made.stderr) == (0, "")
    return folder


def test_sensitivity_and_sweep_write_pages_of_what_they_measured(explored: Path) -> None:
    kept = json.loads((explored / "s.json").read_text())
    page = Page((explored / "s.html").read_text(encoding="utf-8"))
    for drawn, key, start in ((page.data["sensitivity"], "change", 0), (page.data["sensitivity"]["quality"], "quality", kept["before"])):
        for one in drawn["series"]:
            own = [p for p in kept["points"] if one["label"] == f"{p['group']}: {p['name']}"]
            assert one["points"] == [[0, pytest.approx(start, rel=1e-4)], *(pytest.approx([p["ratio"], p[key]], rel=1e-4) for p in own)]
    assert page.data["sensitivity"]["quality"]["measure"] == "accuracy"
    assert ["eval", str(MODELS / "digits-mlp.eval.npz")] in page.tables["options-table"]
    swept = json.loads((explored / "swept" / "results.json").read_text())
    drawn = Page((explored / "w.html").read_text(encoding="utf-8")).data["sweep"]
    assert [(p["label"], p["ratio"]) for p in drawn["points"]] == [
        ("original", None),
        *((f"{p['criterion']} by {p['allocation']}", p["ratio"]) for p in swept["points"]),
    ]
    assert [p["pareto"] for p in drawn["points"][1:]] == [p["pareto"] for p in swept["points"]]
    assert [axis["key"] for axis in drawn["axes"]] == ["macs", "parameters"]  # nothing was timed


def test_prune_shows_curves_that_were_kept(command: Command, explored: Path, tmp_path: Path) -> None:
    line = [MODELS / "digits-mlp.onnx", "-r", "0.3", "-o", "out.onnx", "--report", "r.html", "-q"]
    made = command(*line, "--curves", explored / "s.json", "--curves", explored / "swept")
    assert made.returncode == 0, made.stderr
    data = Page((tmp_path / "r.html").read_text(encoding="utf-8")).data
    assert data["sensitivity"] == Page((explored / "s.html").read_text(encoding="utf-8")).data["sensitivity"]
    assert data["sweep"] == Page((explored / "w.html").read_text(encoding="utf-8")).data["sweep"]


@pytest.mark.parametrize("which", ["model", "points", "kind", "none", "no report"])
def test_curves_that_cannot_be_shown_are_an_error_before_any_work(command: Command, explored: Path, tmp_path: Path, which: str) -> None:
    content = json.loads((explored / "s.json").read_text())
    if which == "points":
        content["points"] = [{"group": 0}]
    elif which == "kind":
        content["kind"] = "plan"
    path = tmp_path / "s.json"
    if which != "none":
        path.write_text(json.dumps(content))
    model = MODELS / ("digits-conv1d.onnx" if which == "model" else "digits-mlp.onnx")
    report = [] if which == "no report" else ["--report", "r.html"]
    made = command(model, "-r", "0.3", "-o", "out.onnx", "--curves", "s.json", *report)
    said = {"model": "another model", "points": "not whole", "kind": "no curves", "none": "cannot be read", "no report": "--report"}
    assert made.returncode == 2
    assert said[which] in made.stderr
    assert len(made.stderr.splitlines()) == 1
    assert not (tmp_path / "out.onnx").exists()


def test_measured_losses_are_shown_as_sensitivity() -> None:
    found = onnxprune.prune(MODELS / "digits-mlp.onnx", 0.3, calibration=MODELS / "digits-mlp.calibration.npz", samples=64)
    assert found.plan.options["allocation"] == "distortion"
    series = Page(html_report(found)).data["sensitivity"]["series"]
    assert len(series) == len(found.losses)
    for one, losses in zip(series, found.losses.values(), strict=True):
        for ratio, change in one["points"]:
            assert change == pytest.approx(losses[round(ratio * (len(losses) - 1))], rel=1e-4)


def test_names_from_the_model_are_text() -> None:
    model = renamed(two_layers(), "w1", EVIL)
    model.graph.node[0].name = "<b>first</b>"
    text = html_report(onnxprune.prune(model, 0.5, of="channels"), command=["m.onnx", EVIL], sweep=Sweep([SweepPoint(EVIL, 1.0, macs=1.0)]))
    page = Page(text)
    assert EVIL not in text
    assert not [tag for tag, _ in page.tags if tag in ("img", "b")]
    assert any(EVIL in cell for row in page.tables["groups-table"] for cell in row)
    assert page.data["sweep"]["points"][0]["label"] == EVIL
    assert text.count("<script") == html_report(onnxprune.prune(two_layers(), 0.5)).count("<script")


def test_nothing_is_loaded_from_elsewhere(result: onnxprune.Result) -> None:
    page = Page(html_report(result))
    assert not [given for _, given in page.tags if "src" in given]
    links = [given["href"] or "" for _, given in page.tags if "href" in given]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert any("default-src 'none'" in (given.get("content") or "") for _, given in page.tags)


def test_numbers_that_are_not_finite_are_no_reason_to_fail(result: onnxprune.Result) -> None:
    odd = {0: np.array([np.nan] * 24), 1: np.array([np.inf] + [1.0] * 23), 2: np.zeros(24)}
    page = Page(html_report(replace(result, scores=odd), sensitivity=Sensitivity({"a": [(0.5, float("inf"))]})))
    assert page.data["scores"][0]["quantiles"] == [None] * 5
    assert page.data["sensitivity"]["series"][0]["points"] == [[0.5, None]]


def test_report_into_no_folder_is_an_error_before_any_work(command: Command, tmp_path: Path) -> None:
    for name, words in (
        ("none/r.html", "does not exist"),
        ("-", "not to standard output"),
        ("out.onnx", "named twice"),
        ("r.pdf", ".html"),
    ):
        made = command(MODELS / "digits-mlp.onnx", "-r", "0.3", "-o", "out.onnx", "--report", name)
        assert made.returncode == 2
        assert made.stderr.startswith("error: ")
        assert words in made.stderr
        assert len(made.stderr.splitlines()) == 1
        assert not list(tmp_path.iterdir())


def test_wheel_has_the_page(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, check=True, capture_output=True
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"onnxprune/page/{path.name}" for path in (ROOT / "onnxprune" / "page").iterdir()} <= set(names)


Open = Callable[[str], Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Show a page at a width, once its charts are drawn; at its end nothing may have been complained of or asked for."""
    from selenium.webdriver.support.wait import WebDriverWait

    def show(text: str, width: int = 1200, scheme: str = "light") -> Any:
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(path.as_uri())
        drawn = "return [...document.querySelectorAll('[data-chart]')].every(c => c.querySelector('svg'))"
        WebDriverWait(browser, 20).until(lambda b: b.execute_script(drawn))
        return browser

    yield show
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []


def column(browser: Any, table: str, number: int) -> list[str]:
    rows = f"[...document.querySelectorAll('#{table} tbody tr')].filter(r => !r.hidden)"
    return list(browser.execute_script(f"return {rows}.map(r => r.cells[{number}].textContent)"))


def test_headers_sort_by_keyboard(opened: Open, result: onnxprune.Result) -> None:
    browser = opened(html_report(result))
    header = "#groups-table thead th:nth-child(3)"
    units = [group.units for group in result.plan.groups]
    for order, reverse in (("ascending", False), ("descending", True)):
        browser.find_element("css selector", f"{header} button").send_keys("\ue007")
        assert browser.find_element("css selector", header).get_attribute("aria-sort") == order
        assert [int(text.split(" ")[0]) for text in column(browser, "groups-table", 2)] == sorted(units, reverse=reverse)


def test_filter_leaves_rows_with_the_word(opened: Open, result: onnxprune.Result) -> None:
    browser = opened(html_report(result))
    browser.find_element("css selector", "input[data-table=groups-table]").send_keys("BLOCKS.3.conv1")
    wanted = [g.id for g in result.plan.groups if any("blocks.3.conv1" in m.tensor for m in g.members)]
    assert 0 < len(wanted) < len(result.plan.groups)
    assert [int(text) for text in column(browser, "groups-table", 0)] == wanted
    status = browser.find_element("css selector", "#groups .count").text
    assert status == f"{len(wanted)} of {len(result.plan.groups)} rows"
    hidden = next(g.id for g in result.plan.groups if g.id not in wanted)
    browser.execute_script(f"document.querySelector('#layers a[href=\"#g{hidden}\"]').click()")
    assert len(column(browser, "groups-table", 0)) == len(result.plan.groups)


def test_charts_show_what_is_chosen(opened: Open, result: onnxprune.Result, sensitivity: Sensitivity, sweep: Sweep) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser = opened(html_report(result, sensitivity=sensitivity, sweep=sweep))
    for group in result.plan.groups[:2]:
        browser.find_element("css selector", f"select[data-for=histogram] option[value='{group.id}']").click()
        counts = [
            int(a) + int(b) for a, b in zip(column(browser, "histogram-table", 2), column(browser, "histogram-table", 3), strict=True)
        ]
        assert sum(counts) == group.units
        drawn = browser.find_elements("css selector", "[data-chart=histogram] g[aria-label=rect] rect")
        assert len(drawn) >= sum(count > 0 for count in counts)
    assert len(browser.find_elements("css selector", "[data-chart=sensitivity] g[aria-label=line] path")) == len(sensitivity.points)
    browser.find_element("css selector", "select[data-for=sensitivity] option[value='group 1']").click()
    assert len(browser.find_elements("css selector", "[data-chart=sensitivity] path.faint")) == len(sensitivity.points) - 1
    dots = browser.find_elements("css selector", "[data-chart=sweep] circle")
    assert len(dots) == len(sweep.points) + sum(point.pareto for point in sweep.points)
    chart = browser.find_element("css selector", "[data-chart=sweep]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(browser).move_to_element(dots[0]).perform()
    assert "obs" in browser.find_element("css selector", "[data-chart=sweep] g[aria-label=tip]").get_attribute("textContent")


def test_curves_show_the_quality_and_the_cost_that_are_chosen(opened: Open, explored: Path) -> None:
    browser = opened((explored / "s.html").read_text(encoding="utf-8"))
    axis = "[data-chart=sensitivity] g[aria-label='y-axis label']"
    assert "change" in browser.find_element("css selector", axis).get_attribute("textContent")
    browser.find_element("css selector", "select[data-for=sensitivity-measure] option[value=quality]").click()
    assert "accuracy" in browser.find_element("css selector", axis).get_attribute("textContent")
    swept = json.loads((explored / "swept" / "results.json").read_text())["points"]
    browser = opened((explored / "w.html").read_text(encoding="utf-8"))
    for cost in ("macs", "parameters"):
        browser.find_element("css selector", f"select[data-for=sweep] option[value={cost}]").click()
        dots = browser.find_elements("css selector", "[data-chart=sweep] circle")
        assert len(dots) == 1 + len(swept) + sum(cost in point["pareto"] for point in swept)


def test_page_without_charts_is_small(opened: Open) -> None:
    text = html_report(onnxprune.prune(MODELS / "digits-resnet.onnx", 0.3, granularity="block"))
    assert len(text) < 100_000
    browser = opened(text)
    browser.find_element("css selector", "#layers-table thead button").click()
    layers = column(browser, "layers-table", 0)
    assert layers == sorted(layers)


def test_names_do_not_run(opened: Open) -> None:
    model = renamed(two_layers(), "w1", EVIL)
    browser = opened(html_report(onnxprune.prune(model, 0.5, of="channels"), sensitivity=Sensitivity({EVIL: [(0.3, 0.1)]})))
    assert browser.execute_script("return window.stolen") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_page_fits_and_can_be_read(
    opened: Open, result: onnxprune.Result, sensitivity: Sensitivity, sweep: Sweep, width: int, scheme: str
) -> None:
    samples = evaluate(result.plan.grouping.model.proto, result.model, read_arrays(MODELS / "digits-images.eval.npz"))
    long = Sensitivity({**sensitivity.points, "encoder.layer.0.attention.output.dense.weight" * 3: [(0.5, 0.1)]})
    browser = opened(html_report(result, evaluation=samples, sensitivity=long, sweep=sweep), width, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.execute_script("return [...document.querySelectorAll('.chart')].every(c => c.scrollWidth <= c.clientWidth)")
    assert browser.execute_script(CONTRAST) >= 4.5
    named = "return [...document.querySelectorAll('select, input')].every(c => c.labels.length && c.labels[0].textContent.trim())"
    assert browser.execute_script(named)
    assert browser.execute_script("return ['header', 'nav', 'main', 'footer', 'h1'].every(t => document.querySelectorAll(t).length === 1)")


# the least contrast (WCAG 2: (L1 + 0.05) / (L2 + 0.05)) of any text to the background behind it
CONTRAST = """
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const parts = (text) => text.match(/[\\d.]+/g).map(Number);
const behind = (one) => { for (let e = one; e; e = e.parentElement) { const p = parts(getComputedStyle(e).backgroundColor);
  if (p.length < 4 || p[3] > 0) return p; } return [255, 255, 255]; };
let least = 21;
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const parent = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || ["SCRIPT", "NOSCRIPT", "STYLE"].includes(parent.tagName)) continue;
  const style = getComputedStyle(parent), drawn = parent.closest("svg");
  const [a, b] = [light(parts(drawn && style.fill !== "none" ? style.fill : style.color)), light(behind(parent))];
  least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
}
return least;
"""

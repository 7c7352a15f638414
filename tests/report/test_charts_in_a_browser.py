"""The report's charts as a person has them, in Debian's Chromium: `make test-page` fetches what these tests need."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from argonne.report.report import write_report
from argonne.train.run import RunFolder
from tests.report.written import step_record, write_run
from tests.tour import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.browser
CHROMIUM, AXE = "/usr/bin/chromium", ROOT / ".cache" / "axe.min.js"
BREAKS_OUT = "<img src=x onerror=alert(1)>"
STEPS = 200


def records(seed: int, floor: float) -> list[dict[str, Any]]:
    """A run of 200 steps with a resume at 80, a warning at 150 and held-out losses; 512 tokens and 3.6 s a step."""
    noise = random.Random(seed)
    found: list[dict[str, Any]] = [{"event": "start", "step": 0, "time": 0.0}]
    for step in range(1, STEPS + 1):
        loss = floor + 4 * math.exp(-step / 40) + noise.gauss(0, 0.05)
        found.append(step_record(step, loss=loss, grad_norm=math.exp(noise.gauss(0, 0.5)), time=3.6 * step))
        if step % 50 == 0:
            held = {"loss": floor + 4 * math.exp(-step / 40) + 0.1, "bits_per_byte": floor / 2}
            found.append({"event": "held_out", "step": step, "time": 3.6 * step, **held})
    found.insert(82, {"event": "resume", "step": 80, "time": 3.6 * 80})
    found.append({"event": "warning", "step": 150, "time": 3.6 * STEPS, "message": BREAKS_OUT})
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    floors = {"small": 3.0, "wide": 2.0, "deep": 2.5}
    return [write_run(folder / name, records(seed, floor)) for seed, (name, floor) in enumerate(floors.items())]


class Report:
    """A report that was opened, all it asked for and complained of, and what a reader does with it."""

    def __init__(self, page: Page, file: Path) -> None:
        self.page, self.urls, self.problems = page, [], []
        page.on("request", lambda request: self.urls.append(request.url))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        page.on("console", lambda one: self.problems.append(one.text) if one.type in ("error", "warning") else None)
        page.goto(file.as_uri())
        page.wait_for_selector("#controls:not([hidden])", state="attached")

    def figure(self, title: str) -> Locator:
        return self.page.locator("figure").filter(has=self.page.get_by_role("heading", name=title, exact=True))

    def hover(self, title: str, share: float) -> str:
        """The legend at this share of a chart's width."""
        over = self.figure(title).locator(".u-over")
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        assert box is not None
        self.page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        return self.figure(title).locator(".tip").inner_text()

    def drag(self, title: str, start: float, end: float) -> None:
        self.hover(title, start)
        self.page.mouse.down()
        self.hover(title, end)
        self.page.mouse.up()

    def ranges(self, scale: str = "x") -> list[list[float]]:
        return self.page.evaluate(f"charts.map((chart) => [chart.scales.{scale}.min, chart.scales.{scale}.max])")

    def points(self) -> dict[str, int]:
        """Points that uPlot was given, by curve."""
        return self.page.evaluate(
            """Object.fromEntries(data.panels.flatMap((panel, number) => linesOf(panel).map((line, index) =>
            [line.curve.name, charts[number].data[index + 1].filter((value) => value !== undefined).length])))"""
        )

    def redrawn(self) -> None:
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def accessible(self) -> None:
        found = self.page.evaluate("axe.run({rules: {'target-size': {enabled: true}}})")
        assert [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found["violations"]] == []

    def fits(self) -> None:
        wide, wanted = self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= wanted


Open = Callable[..., Report]


@pytest.fixture
def opened(browser: Browser, runs: list[Path]) -> Iterator[Open]:
    """Writes and opens a report; it may load nothing and complain of nothing."""
    made: list[tuple[Report, Path]] = []

    def open_report(count: int = 1, at: str = "", **how: Any) -> Report:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **how})
        context.set_default_timeout(20_000)
        context.add_init_script(path=AXE)
        file = write_report(runs[:count], runs[0].parent / f"{count}.html")
        report = Report(context.new_page(), file)
        made.append((report, file))
        return report

    yield open_report
    for report, file in made:
        report.page.context.close()
        assert {url.partition("#")[0] for url in report.urls} == {file.as_uri()}
        assert report.problems == []


def test_every_curve_has_as_many_points_as_metrics_has_records(opened: Open) -> None:
    report = opened()
    for x in ("step", "tokens", "hours"):
        report.page.check(f"input[value={x}]")
        points = report.points()
        assert points["curve-0-step-loss"] == points["curve-0-step-sources-web-loss"] == STEPS, x
        assert points["curve-0-held_out-loss"] == 4


def test_a_legend_with_the_values_follows_the_pointer(opened: Open) -> None:
    report = opened()
    report.page.select_option("[name=smooth]", "0")
    told = report.hover("Loss", 0.5)
    assert "step 100" in told
    expected = next(row for row in records(0, 3.0) if row["event"] == "step" and row["step"] == 100)["loss"]
    assert f"training {expected:.5g}" in told
    assert "held-out" in told
    report.page.mouse.move(5, 5)
    assert report.figure("Loss").locator(".tip").is_hidden()


def test_a_mark_is_told_where_the_pointer_touches_it_and_stays_a_text(opened: Open) -> None:
    report = opened()
    assert "resume at step 80" in report.hover("Loss", 0.4)
    assert f"warning at step 150 message {BREAKS_OUT}" in report.hover("Loss", 0.75)


def test_dragging_zooms_every_chart_and_a_double_click_goes_back(opened: Open) -> None:
    report = opened()
    assert report.ranges() == [[0, STEPS]] * len(report.ranges())
    report.drag("Loss", 0.25, 0.5)
    for low, high in report.ranges():
        assert (low, high) == pytest.approx((50, 100), abs=2)
    assert report.ranges("y")[0][1] < 5  # what lies outside makes no room
    report.figure("Gradient norm").locator(".u-over").dblclick()
    assert report.ranges() == [[0, STEPS]] * len(report.ranges())
    report.drag("Loss", 0.25, 0.5)
    report.page.get_by_role("button", name="whole range").click()
    assert report.ranges() == [[0, STEPS]] * len(report.ranges())


def test_the_horizontal_axis_is_step_tokens_or_hours(opened: Open) -> None:
    report = opened()
    report.page.check("input[value=tokens]")
    assert report.ranges()[0] == [0, 512 * STEPS]
    assert "51,200 tokens" in report.hover("Loss", 0.5)
    report.page.check("input[value=hours]")
    assert report.ranges()[0] == pytest.approx([0, 0.2])
    assert "0.1 hours" in report.hover("Loss", 0.5)


def test_a_chart_is_logarithmic_where_the_reader_asks(opened: Open) -> None:
    report = opened()
    kinds = "charts.map((chart) => chart.scales.y.distr)"
    number = report.page.evaluate("data.panels.findIndex((panel) => panel.title === 'Gradient norm')")
    before = report.page.evaluate(kinds)
    assert (before[0], before[number]) == (1, 3)
    report.figure("Loss").get_by_label("log").check()
    report.figure("Gradient norm").get_by_label("log").uncheck()
    after = report.page.evaluate(kinds)
    assert (after[0], after[number]) == (3, 1)


def test_a_smoothed_curve_lies_over_the_faint_one_that_was_measured(opened: Open) -> None:
    report = opened()
    report.page.select_option("[name=smooth]", "50")
    assert "mean" in report.hover("Loss", 0.5)
    looks = report.page.evaluate("charts[0].series.slice(1, 3).map((series) => [series.alpha, series.width])")
    assert looks == [[0.32, 1], [1, 1.75]]
    losses = [row["loss"] for row in records(0, 3.0) if row["event"] == "step"]
    drawn = report.page.evaluate("charts[0].data[2].filter((value) => value !== undefined)")
    assert drawn[99] == pytest.approx(sum(losses[50:100]) / 50)
    assert drawn[9] == pytest.approx(sum(losses[:10]) / 10)


@pytest.mark.parametrize(
    ("steps", "values", "window", "means"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 2, [1, 1.5, 2.5, 3.5]),
        ([10, 20, 30], [1, 2, 3], 10, [1, 2, 3]),  # a window of one record
        ([1, 2, 3], [1, None, 3], 3, [1, None, 2]),
        ([1, 2, 3], [1e20, 1, 2], 2, [1e20, 5e19, 1.5]),  # a spike leaves nothing behind
        ([], [], 5, []),
    ],
)
def test_the_mean_is_over_the_values_of_the_last_steps(
    opened: Open, steps: list[int], values: list[float | None], window: int, means: list[float | None]
) -> None:
    asked = f"movingMean({json.dumps(steps)}, {json.dumps(values)}, {window})"
    assert opened().page.evaluate(asked) == means


@pytest.mark.parametrize(
    ("value", "apart", "label"),
    [
        (0, 1, "0"),
        (1500, 500, "1,500"),
        (12340, 10, "12,340"),
        (250000, 5e4, "250k"),
        (2.5e6, 5e5, "2.5M"),
        (3e-4, 1e-4, "3e-4"),
        (0.25, 0.05, "0.25"),
        (2.25, 0.25, "2.25"),
        (1e9, 1e9, "1B"),
    ],
)
def test_labels_of_an_axis_are_short_and_tell_neighbours_apart(
    opened: Open, value: float, apart: float, label: str
) -> None:
    assert opened().page.evaluate(f"compact({value}, {apart})") == label


def test_three_runs_share_the_axes_each_in_its_colour(opened: Open) -> None:
    report = opened(3)
    told = report.hover("Loss", 0.5)
    assert all(f"{name}: training" in told for name in ("small", "wide", "deep"))
    first = report.page.locator("table tbody tr td:first-child").all_inner_texts()[:3]
    assert first == ["wide", "deep", "small"]
    assert len(set(report.page.evaluate("linesOf(data.panels[0]).map((line) => seriesOf(line).stroke)"))) == 3


def test_a_reload_keeps_axis_smoothing_log_zoom_and_what_is_unfolded(opened: Open) -> None:
    report = opened()
    report.page.check("input[value=tokens]")
    report.page.select_option("[name=smooth]", "20")
    report.figure("Loss").get_by_label("log").check()
    report.drag("Loss", 0.25, 0.5)
    report.page.get_by_text("config.toml").click()
    kept = "[state.x, state.smooth, [...state.log], state.zoom, [...state.open]]"
    before = report.page.evaluate(kept)
    assert before[0] == "tokens"
    report.page.reload()
    assert report.page.evaluate(kept) == before
    assert report.ranges()[0] == before[3]
    assert report.page.locator("details[open]").filter(has_text="config.toml").count() == 1


def test_a_page_of_a_run_that_lives_takes_the_newer_one_by_itself(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step_record(1), step_record(2)])
    (run / "manifest.json").write_text("{}")
    folder = RunFolder(run)
    folder.acquire()
    from playwright.sync_api import expect

    page = browser.new_context().new_page()
    page.clock.install()
    report = Report(page, write_report([run]))
    assert "reloads every 45 s" in page.locator("#refresh").inner_text()
    folder.release()
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_record(3)) + "\n")
    write_report([run])
    page.clock.fast_forward(46_000)
    expect(page.locator("#refresh")).to_be_empty()
    assert report.points()["curve-0-step-loss"] == 3
    page.context.close()


def test_without_scripts_the_last_values_stand_there_and_a_word_says_why(browser: Browser, runs: list[Path]) -> None:
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(write_report(runs[:1]).as_uri())
    assert page.get_by_text("Curves need JavaScript").is_visible()
    assert page.locator("#controls").is_hidden()
    assert "held-out 3.127" in page.locator("figure").first.inner_text()
    page.context.close()


def test_no_script_runs_but_those_the_page_was_written_with(browser: Browser, runs: list[Path]) -> None:
    file = write_report(runs[:1])
    file.write_text(file.read_text().replace("</main>", "<script>window.ran = 1</script></main>"))
    page = browser.new_context().new_page()
    page.goto(file.as_uri())
    assert page.evaluate("[typeof window.ran, charts.length > 0]") == ["undefined", True]
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("count", [1, 3])
def test_anyone_can_read_and_reach_it_in_either_theme(opened: Open, scheme: str, count: int) -> None:
    report = opened(count, color_scheme=scheme)
    report.accessible()
    page = report.page
    page.locator("input[value=step]").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("state.x") == "tokens"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.name") == "smooth"


@pytest.mark.parametrize("count", [1, 3])
def test_a_phone_shows_it_without_scrolling_sideways(opened: Open, count: int) -> None:
    report = opened(count, viewport={"width": 420, "height": 800})
    report.fits()
    high = report.page.evaluate("Math.max(...[...document.querySelectorAll('tr')].map((row) => row.offsetHeight))")
    assert high < 120
    wide = report.page.evaluate("charts.map((chart) => [chart.width, chart.root.parentElement.clientWidth])")
    assert all(drawn == room for drawn, room in wide)
    report.page.set_viewport_size({"width": 900, "height": 800})
    report.redrawn()
    assert report.page.evaluate("charts.every((chart) => chart.width === chart.root.parentElement.clientWidth)")


def test_a_change_of_the_theme_is_a_change_of_the_colours(opened: Open) -> None:
    report = opened(color_scheme="light")
    before = report.page.evaluate("seriesOf(linesOf(data.panels[0])[0]).stroke")
    report.page.emulate_media(color_scheme="dark")
    report.redrawn()
    assert report.page.evaluate("charts[0].series[1].stroke()") != before

"""The reader of metrics.jsonl and the HTML report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.cli import main
from argonne.errors import InputError
from argonne.report.inspect import inspect_path
from argonne.report.records import read_metrics, smoothed
from argonne.report.report import watch_report, write_report
from argonne.report.runs import list_runs
from argonne.train.run import RunFolder
from tests.report.written import Page, step_record, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    records: list[dict[str, Any]] = [{"event": "start", "step": 0, "time": 1000.0}]
    records += [step_record(step) for step in range(1, 31)]
    records += [
        {
            "event": "held_out",
            "step": step,
            "time": 1000.0 + step,
            "loss": 3.0,
            "bits_per_byte": 1.5,
            "tokens": 64,
            "bytes": 180,
        }
        for step in (10, 20, 30)
    ]
    records += [{"event": "sample", "step": 30, "time": 1031.0, "prompt": "Long <ago>", "text": " & then"}]
    return write_run(tmp_path / "nano", records)


def test_every_curve_has_as_many_points_as_metrics_has_records(run: Path) -> None:
    page, metrics = Page(write_report([run]).read_text()), read_metrics(run)
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "memory_gb", "wait_data_seconds", "wait_save_seconds"):
        assert page.curve(f"curve-0-step-{name}") == metrics.series("step", name), name
    assert page.curve("curve-0-held_out-bits_per_byte") == ([10, 20, 30], [1.5, 1.5, 1.5])
    for source in ("books", "web"):
        for name in ("tokens", "loss", "passes"):
            found = page.curve(f"curve-0-step-sources-{source}-{name}")
            assert found == metrics.series("step", "sources", source, name)
            assert len(found[0]) == 30


def test_throughput_is_shown_of_each_interval_and_beside_it_the_mean_of_the_session(run: Path) -> None:
    html = write_report([run]).read_text()
    assert len(Page(html).curve("curve-0-step-tokens_per_second_mean")[0]) == 30
    assert "mean of the session" in html
    write_run(run, [{**step_record(1), "tokens_per_second_mean": None}])  # runs of earlier versions have no mean
    assert "mean of the session" not in write_report([run]).read_text()


def test_a_field_that_was_never_measured_gets_no_panel(run: Path) -> None:
    assert "<h3>MFU</h3>" not in write_report([run]).read_text()
    write_run(run, [step_record(step, mfu=0.4) for step in range(1, 5)])
    assert "<h3>MFU</h3>" in write_report([run]).read_text()


def test_the_held_out_loss_by_position_is_a_panel_with_a_curve_a_band_and_earlier_runs_have_none(run: Path) -> None:
    assert "by position" not in write_report([run]).read_text()
    bands = {"1-64": 4.0, "65-128": 3.0}
    told = {f"loss_by_position/{band}": loss for band, loss in bands.items()}
    held = [{"event": "held_out", "step": step, "loss": 3.5, "tokens": 64, "metrics": told} for step in (0, 2)]
    html = write_report([write_run(run, [step_record(1), step_record(2), *held])]).read_text()
    assert "<h3>Held-out loss by position</h3>" in html
    assert "<h3>Loss by position</h3>" not in html
    for band in bands:
        assert len(Page(html).curve(f"curve-0-held_out-metrics-loss_by_position/{band}")[0]) == 2
        assert f"</i>{band} <b>" in html


def test_the_page_is_well_formed_and_loads_nothing(run: Path) -> None:
    html = write_report([run]).read_text()
    page = Page(html)
    assert page.loads == []
    assert page.open == []
    assert len(page.scripts) == 3
    assert "url(" not in html
    assert "@import" not in html


def test_text_from_the_model_is_escaped(run: Path) -> None:
    html = write_report([run]).read_text()
    assert "Long &lt;ago&gt;" in html
    assert " &amp; then" in html
    assert "Long <ago>" not in html


def test_the_page_holds_facts_config_manifest_and_samples(run: Path) -> None:
    (run / "COMPLETE").write_text("{}")
    text = " ".join(Page(write_report([run]).read_text()).text)
    for expected in (
        "complete at step 30",
        "15,360",
        "1.5000",
        "7,000",
        "1052800",
        "data.fingerprint",
        "peak learning rate",
        "Long <ago>",
    ):
        assert expected in text, expected


def test_resumes_stops_skips_and_warnings_are_marked(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for number, event in enumerate(("resume", "stop", "skip", "warning"), start=11):
            file.write(
                json.dumps({"event": event, "step": number, "time": 1040.0, "reason": f"because {event}"}) + "\n"
            )
    page = Page(write_report([run]).read_text())
    expected = [
        {"run": 0, "step": number, "kind": event, "text": f"reason because {event}"}
        for number, event in enumerate(("resume", "stop", "skip", "warning"), start=11)
    ]
    assert page.panel("Loss")["marks"] == expected
    assert all(mark["text"] in " ".join(page.text) for mark in expected)


def test_several_runs_share_the_axes_and_their_configurations_are_compared(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "wide", [step_record(step, loss=1.0) for step in range(1, 21)], seed=2)
    html = write_report([run, other], tmp_path / "both.html").read_text()
    page = Page(html)
    assert len(page.curve("curve-0-step-loss")[0]) == 30
    assert len(page.curve("curve-1-step-loss")[0]) == 20
    assert page.titles().count("Loss") == 1
    assert "<td>seed</td><td>1</td><td>2</td>" in html
    assert "<td>optim.lr</td>" not in html


def test_runs_of_one_name_in_two_places_are_told_apart(run: Path, tmp_path: Path) -> None:
    twin = write_run(tmp_path / "elsewhere" / "nano", [step_record(1)])
    html = write_report([run, twin], tmp_path / "both.html").read_text()
    assert str(twin) in html
    assert str(run) in html


def test_the_last_record_of_a_step_is_the_one_that_counts(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        [
            step_record(1),
            step_record(2, loss=9.0),
            {"event": "resume", "step": 1, "time": 5.0},
            step_record(2, loss=1.5),
        ],
    )
    metrics = read_metrics(run)
    assert metrics.series("step", "loss") == ([1, 2], [5.0, 1.5])
    assert metrics.lines == 4
    assert metrics.problems == ()


def killed_at_13_and_resumed_at_10() -> list[dict[str, Any]]:
    """An hour to step 13, killed; ten idle hours; half an hour from the checkpoint of step 10 to step 12."""
    return [
        {"event": "start", "step": 0, "time": 0.0},
        *(step_record(step, loss=9.0, time=100.0 * step) for step in range(1, 14)),
        {"event": "warning", "step": 13, "time": 3500.0, "message": "of a step that never was"},
        {"event": "held_out", "step": 13, "time": 3600.0, "loss": 9.0, "bits_per_byte": 9.0},
        {"event": "resume", "step": 10, "time": 39600.0},
        *(step_record(step, loss=1.0, time=39600.0 + 900.0 * (step - 10)) for step in (11, 12)),
    ]


def test_records_beyond_the_step_of_a_resume_are_void(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", killed_at_13_and_resumed_at_10())
    metrics = read_metrics(run)
    assert metrics.series("step", "loss") == (list(range(1, 13)), [9.0] * 10 + [1.0] * 2)
    assert metrics.of("held_out") == metrics.of("warning") == []
    (row,) = list_runs(run)
    assert (row["step"], row["loss"]) == (12, 1.0)
    facts = inspect_path(run)
    assert facts["last_step"]["step"] == 12
    html = write_report([run]).read_text()
    assert len(Page(html).curve("curve-0-step-loss")[0]) == 12
    assert "last run at step 12" in html


def test_a_run_that_was_started_again_begins_again(tmp_path: Path) -> None:
    records = [step_record(1), step_record(2), {"event": "start", "step": 0, "time": 2000.0}, step_record(1, loss=7.0)]
    assert read_metrics(write_run(tmp_path / "run", records)).series("step", "loss") == ([1], [7.0])


def test_hours_add_up_over_kills_and_what_was_void_took_its_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", killed_at_13_and_resumed_at_10())
    assert read_metrics(run).hours == 1.5
    assert "<b>90.0 min</b><span>time at work</span>" in write_report([run]).read_text()


def test_what_is_printed_as_json_holds_nothing_that_json_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", [step_record(1, loss=float("nan"), tokens_per_second=float("inf"))])
    for verb in ("runs", "inspect"):
        assert main([verb, str(run), "--json"]) == 0
        shown = capsys.readouterr().out
        assert "null" in shown
        json.loads(shown, parse_constant=pytest.fail)


def test_two_warnings_of_one_step_are_both_kept(tmp_path: Path) -> None:
    warnings = [
        {"event": "warning", "step": 1, "time": 5.0, "message": message}
        for message in ("loss spike", "disk full", "loss spike")
    ]
    metrics = read_metrics(write_run(tmp_path / "run", [step_record(1), *warnings]))
    assert [record["message"] for record in metrics.of("warning")] == ["disk full", "loss spike"]


def test_a_line_cut_by_a_kill_is_left_out_and_reported(run: Path) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(json.dumps(step_record(31)).encode()[:40])
    metrics = read_metrics(run)
    assert len(metrics.of("step")) == 30
    assert metrics.problems == ("metrics.jsonl, line 36: cut in the middle (40 bytes), left out",)
    assert "line 36: cut in the middle" in write_report([run]).read_text()


@settings(max_examples=50, deadline=None)
@given(st.integers(min_value=0, max_value=3000))
def test_a_file_cut_at_any_byte_still_reads(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    lines = [json.dumps(step_record(step)) + "\n" for step in range(1, 6)]
    whole = "".join(lines).encode()
    (folder / "metrics.jsonl").write_bytes(whole[:cut])
    metrics = read_metrics(folder)
    assert len(metrics.of("step")) + len(metrics.problems) in (cut // len(lines[0]), min(5, cut // len(lines[0]) + 1))


@pytest.mark.parametrize("content", ["[1, 2]\n", '{"loss": 3}\n', '{"event": "step", "step": "one"}\n'])
def test_another_programs_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"line 1: found .* another program"):
        read_metrics(tmp_path)


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no metrics\.jsonl there"):
        write_report([tmp_path])


def test_a_run_without_a_step_yet_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"event": "start", "step": 0, "time": 1.0}])
    with pytest.raises(InputError, match="no step logged yet"):
        write_report([run])


def test_loss_that_is_not_finite_leaves_a_gap_and_breaks_nothing(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", [step_record(step, loss=float("nan") if step == 5 else 2.0) for step in range(1, 11)]
    )
    steps, values = Page(write_report([run]).read_text()).curve("curve-0-step-loss")
    assert steps == list(range(1, 11))
    assert [value for value in values if value is not None] == [2.0] * 9
    assert values[4] is None


def test_smoothing_keeps_a_constant_and_the_number_of_points() -> None:
    assert smoothed([3.0] * 200) == pytest.approx([3.0] * 200)
    assert smoothed([1.0, 2.0]) == [1.0, 2.0]
    assert smoothed([]) == []


def held_out(step: int, loss: float | None) -> dict[str, Any]:
    return {"event": "held_out", "step": step, "time": 1000.0 + step, "loss": loss, "bits_per_byte": loss and loss / 2}


def test_compared_runs_are_ranked_by_their_last_held_out_loss_and_one_without_comes_last(tmp_path: Path) -> None:
    losses = {"middle": [9.0, 3.0], "none": [], "best": [2.5, 2.0], "worst": [1.0, 4.0]}
    runs = [
        write_run(tmp_path / name, [step_record(1), *(held_out(step, loss) for step, loss in enumerate(found))])
        for name, found in losses.items()
    ]
    html = write_report(runs, tmp_path / "all.html").read_text()
    ranked = html[html.index("Ranked by held-out loss") :]
    assert re.findall(r"</i>(\w+)</td>", ranked[: ranked.index("</table>")]) == ["best", "middle", "worst", "none"]
    assert '<td class="number">2.0000</td><td class="number">1.0000</td>' in ranked
    assert "different tokenizers" not in html


def test_losses_of_different_tokenizers_are_not_compared_in_silence(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [step_record(1)]) for name in ("one", "two")]
    for run in runs:
        (run / "manifest.json").write_text(json.dumps({"tokenizer_fingerprint": run.name}))
    assert "different tokenizers: compare bits per byte" in write_report(runs).read_text()


def test_the_model_and_its_size_stand_at_the_top(run: Path) -> None:
    with (run / "config.toml").open("a") as file:
        file.write('[model]\npreset = "nano-3.0"\nnum_hidden_layers = 4\nhidden_size = 128\n')
    assert "nano-3.0, 1.05M parameters, 4 layers, 128 wide" in write_report([run]).read_text()


@contextmanager
def alive(run: Path) -> Iterator[None]:
    """A process of this test trains the run."""
    folder = RunFolder(run)
    folder.acquire()
    yield
    folder.release()


def test_a_page_of_a_run_that_lives_says_so_and_reloads_itself(run: Path) -> None:
    (run / "manifest.json").write_text(json.dumps({"total_steps": 400}))
    with alive(run):
        html = write_report([run]).read_text()
    assert "running at step 30 of 400" in html
    assert f"`argonne report {run} --watch` keeps the page up to date" in html
    assert Page(html).data["live"] is True
    html = write_report([run]).read_text()
    assert "not complete, last run at step 30" in html
    assert Page(html).data["live"] is False


def test_the_page_that_a_run_writes_of_itself_at_its_end_says_complete(run: Path) -> None:
    (run / "COMPLETE").write_text("{}")
    with alive(run):
        page = Page(write_report([run]).read_text())
    assert "complete at step 30" in page.text
    assert page.data["live"] is False


def test_a_watched_page_is_written_again_when_the_records_grow_and_last_when_the_run_has_ended(run: Path) -> None:
    pages: list[Page] = []
    looks = 0

    def wait(seconds: float) -> None:
        nonlocal looks
        looks += 1
        pages.append(Page((run / "report.html").read_text()))
        if looks == 2:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(step_record(31)) + "\n")
        if looks == 3:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(step_record(32)) + "\n")
            (run / "COMPLETE").write_text("{}")
            living.close()

    with ExitStack() as living:
        living.enter_context(alive(run))
        watch_report([run], wait=wait)
    assert [len(page.curve("curve-0-step-loss")[0]) for page in pages] == [30, 30, 31]
    last = Page((run / "report.html").read_text())
    assert len(last.curve("curve-0-step-loss")[0]) == 32
    assert last.data["live"] is False
    assert "complete at step 32" in last.text

"""What the page holds for its charts, and that a text in it stays a text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from argonne.report.curves import Curve, Panel, compact, embedded
from argonne.report.records import read_metrics
from argonne.report.report import write_report
from tests.report.written import Page, step_record, write_run

BREAKS_OUT = "</script><script>alert(1)</script><!--<script>"


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, "0"), (1500, "1.5k"), (2.5e7, "25M"), (3e-4, "3e-4"), (0.25, "0.25"), (-2000, "-2k"), (1e9, "1B")],
)
def test_numbers_in_keys_are_short(value: float, label: str) -> None:
    assert compact(value) == label


def test_the_name_of_a_run_and_the_texts_of_its_records_are_never_markup(tmp_path: Path) -> None:
    name = BREAKS_OUT.replace("/", "\N{DIVISION SLASH}")
    records = [
        step_record(1, sources={BREAKS_OUT: {"tokens": 1, "loss": 2.0, "passes": 0.1}}, metrics={BREAKS_OUT: 1.0}),
        {"event": "warning", "step": 1, "time": 1002.0, "message": BREAKS_OUT},
        {"event": "sample", "step": 1, "time": 1003.0, "prompt": "", "text": BREAKS_OUT},
    ]
    page = Page(write_report([write_run(tmp_path / name, records), write_run(tmp_path / "other", records)]).read_text())
    assert len(page.scripts) == 3
    assert page.open == []
    assert page.data["runs"][0]["name"] == name
    assert page.panel("Loss")["marks"][0]["text"] == f"message {BREAKS_OUT}"
    assert "".join(page.text).count(BREAKS_OUT) >= 4


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(label=st.text(), values=st.lists(st.floats(), min_size=1, max_size=20))
def test_any_label_and_any_number_come_back_from_the_page(tmp_path: Path, label: str, values: list[float]) -> None:
    label = label.encode(errors="ignore").decode()
    metrics = read_metrics(write_run(tmp_path / "run", [step_record(1)]))
    curve = Curve("it", 0, range(len(values)), values, 0, label=label)
    page = Page(embedded([(label, metrics)], [Panel("Loss", "", [curve])], live=False))
    steps, found = page.curve("it")
    assert steps == list(range(len(values)))
    assert found == [value if abs(value) < float("inf") else None for value in values]
    assert page.data["panels"][0]["curves"][0]["label"] == page.data["runs"][0]["name"] == label


def test_the_axes_of_tokens_and_hours_are_those_of_the_records(tmp_path: Path) -> None:
    """An hour, then ten idle ones before the resume, which count for nothing."""
    records = [
        {"event": "start", "step": 0, "time": 0.0},
        step_record(10, time=3600.0),
        {"event": "resume", "step": 10, "time": 39600.0},
        step_record(20, time=41400.0),
    ]
    page = Page(write_report([write_run(tmp_path / "run", records)]).read_text())
    (run,) = page.data["runs"]
    assert (page.data["steps"][run["tokens"]["steps"]], run["tokens"]["values"]) == ([0, 10, 20], [0, 5120, 10240])
    assert (page.data["steps"][run["hours"]["steps"]], run["hours"]["values"]) == ([0, 10, 20], [0.0, 1.0, 1.5])


def test_a_chart_is_told_in_words_and_each_key_has_its_last_value(tmp_path: Path) -> None:
    html = write_report([write_run(tmp_path / "run", [step_record(1), step_record(2, loss=1.25)])]).read_text()
    assert "Loss. training: 2 points to step 2, first 5, lowest 1.25, last 1.25" in html
    assert "training <b>1.25</b>" in html
    assert "Curves need JavaScript" in html


def test_a_report_loads_no_heavy_library(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step_record(1)])
    code = f"""
import sys
from pathlib import Path
from argonne.report.report import write_report
write_report([Path({str(run)!r})])
print(sorted({{"torch", "numpy", "matplotlib", "transformers"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"

"""What the profile hook sees, on a planted package, and what is taken for a step."""

from __future__ import annotations

import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from tools.traced_run import SPAN, WARM, Ran, Recorder, Trace

FILES = {
    "train/metrics.py": """
        class MetricsLog:
            def write(self, event, step): ...
        """,
    "model/layers.py": """
        def forward(): ...
        """,
    "data/loader.py": """
        import threading

        def read():
            return [number for number in range(3)], (lambda: 1)()

        def batch():
            thread = threading.Thread(target=read)
            thread.start()
            thread.join()
        """,
    "train/trainer.py": """
        def open_run():
            class Local: ...

        def step(log, number):
            forward()
            batch()
            log.write("warning", number)
            log.write("step", number)

        def begin(log):
            step(log, 0)

        def fit(log, steps):
            open_run()
            if steps:
                begin(log)
            for number in range(1, steps):
                step(log, number)
        """,
}


def record(package: Path, steps: int) -> dict[str, Any]:
    """The planted loop, run under the hook."""
    names: dict[str, Any] = {"__name__": "planted"}
    for name, source in FILES.items():
        exec(compile(textwrap.dedent(source), str(package / name), "exec"), names)
    recorder = Recorder(package)
    before = sys.getprofile()
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    try:
        names["fit"](names["MetricsLog"](), steps)
    finally:
        sys.setprofile(before)
        threading.setprofile(before)
    return recorder.result()


def test_a_step_is_all_that_runs_between_two_records_its_threads_and_the_loop_included(tmp_path: Path) -> None:
    found = record(tmp_path / "argonne", 4)
    assert len(found["steps"]) == 3
    assert found["steps"][1] == found["steps"][2]
    assert found["steps"][2] == [
        ("argonne/data/loader.py", "batch", 7),
        ("argonne/data/loader.py", "read", 4),
        ("argonne/model/layers.py", "forward", 2),
        ("argonne/train/metrics.py", "MetricsLog.write", 3),
        ("argonne/train/trainer.py", "fit", 14),
        ("argonne/train/trainer.py", "step", 5),
    ]


def test_a_function_that_was_entered_in_the_step_before_and_ends_in_this_one_runs_in_both(tmp_path: Path) -> None:
    found = record(tmp_path / "argonne", 3)
    assert [("argonne/train/trainer.py", "begin", 11) in step for step in found["steps"]] == [True, False]


def test_the_start_ends_at_the_first_forward(tmp_path: Path) -> None:
    found = record(tmp_path / "argonne", 3)["start"]
    assert [function for _, function, _ in found] == ["begin", "fit", "open_run", "step"]


def test_functions_of_other_packages_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no forward pass"):
        record(tmp_path / "argonne", 0)
    assert {Path(file).parts[0] for step in record(tmp_path / "argonne", 2)["steps"] for file, _, _ in step} == {
        "argonne"
    }


READ, LOCATE = Ran("argonne/data/loader.py", "Loader.read", 1), Ran("argonne/data/mixture.py", "Mixture.locate", 1)
STEP = Ran("argonne/train/step.py", "step", 1)


def trace(*steps: set[Ran]) -> Trace:
    return Trace(frozenset({LOCATE}), tuple(map(frozenset, steps)), tuple(frozenset(step - {STEP}) for step in steps))


def test_a_batch_read_ahead_falls_into_the_steps_traced() -> None:
    steps = [{STEP}] * (WARM + SPAN - 1) + [{STEP, READ}]
    assert trace(*steps).step() == ({STEP, READ}, {READ}, False)


def test_the_first_steps_are_not_traced() -> None:
    first = Ran("argonne/stages/services.py", "banner", 1)
    assert trace(*[{STEP, first}] * WARM, *[{STEP}] * SPAN).step() == ({STEP}, set(), False)


def test_steps_that_locate_a_block_are_passed_over_and_their_batches_told_apart() -> None:
    found = trace(*[{STEP}] * WARM, {STEP, READ, LOCATE}, *[{STEP, READ}] * SPAN)
    assert found.step() == ({STEP, READ}, {READ}, False)
    assert found.locating() == {READ, LOCATE}


def test_where_every_batch_locates_its_rows_the_step_says_so() -> None:
    assert trace(*[{STEP, LOCATE}] * (WARM + SPAN)).step() == ({STEP, LOCATE}, {LOCATE}, True)


def test_a_run_too_short_to_hold_a_steady_step_is_refused() -> None:
    with pytest.raises(ValueError, match=f"expected at least {WARM + SPAN}"):
        trace(*[{STEP}] * (WARM + SPAN - 1)).step()


def test_what_only_runs_at_import_is_left_out(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "argonne")
    source = "def key(): ...\nkey()\n"
    before = sys.getprofile()
    sys.setprofile(recorder)
    try:
        names: dict[str, Any] = {}
        exec(compile(source, str(tmp_path / "argonne" / "config.py"), "exec"), names)
        imported = set(recorder._open)
        names["key"]()
    finally:
        sys.setprofile(before)
    assert "key" not in {code.co_name for code in imported}
    assert "key" in {code.co_name for code in recorder._open}


def test_a_batch_is_what_the_loader_runs_and_not_what_the_log_asks_of_the_data(tmp_path: Path) -> None:
    sources = {
        "data/loader.py": "def read(): ...\ndef passes(): ...\nclass Loader:\n    def batch(self): read()\n",
        "train/metrics.py": "class MetricsLog:\n    def write(self, event, step): ...\n",
        "model/layers.py": "def forward(): ...\n",
        "train/trainer.py": "def fit():\n    forward()\n    for step in range(3):\n"
        "        Loader().batch(); passes(); MetricsLog().write('step', step)\n",
    }
    names: dict[str, Any] = {}
    for name, source in sources.items():
        exec(compile(source, str(tmp_path / "argonne" / name), "exec"), names)
    recorder = Recorder(tmp_path / "argonne")
    before = sys.getprofile()
    sys.setprofile(recorder)
    try:
        names["fit"]()
    finally:
        sys.setprofile(before)
    found = recorder.result()
    assert [function for _, function, _ in found["batches"][0]] == ["Loader.batch", "read"]
    assert "passes" in [function for _, function, _ in found["steps"][0]]

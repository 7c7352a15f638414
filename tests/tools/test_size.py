"""The table of `make size`: limits from the document, what is over them, and the committed tree against those it has
reached.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import size, structure
from tools.size import Measure
from tools.traced_run import SPAN, WARM, Ran, Trace, trace_run

LIMITS = size.read_limits((size.ROOT / "CONTRIBUTING.md").read_text())
LONGEST = LIMITS[size.LONGEST_FUNCTION]


# Measures whose limits the tree keeps; the others are still on their way.
def traced(*step: Ran, start: tuple[Ran, ...] = ()) -> Trace:
    return Trace(frozenset(start), *((frozenset(step),) * (WARM + SPAN),) * 2)


@pytest.fixture(scope="module")
def measured() -> dict[str, Measure]:
    """The committed tree, traced once."""
    folder = size.ROOT / "argonne"
    return {
        measure.name: measure
        for measure in size.measure_structure(structure.read_package(folder), LONGEST)
        + size.measure_trace(trace_run(folder))
    }


@pytest.mark.parametrize("name", LIMITS)
def test_the_tree_keeps_its_limits(measured: dict[str, Measure], name: str) -> None:
    assert measured[name].found <= LIMITS[name], measured[name]


def test_every_limit_of_the_document_is_measured(measured: dict[str, Measure]) -> None:
    assert [name for name in LIMITS if name not in measured] == []
    assert len(LIMITS) == 9


def test_the_traced_run_goes_through_the_loop_the_data_and_the_model(measured: dict[str, Measure]) -> None:
    assert measured["files a step, outside model, data and tokens"].found >= 1
    assert measured["files a batch, in data and tokens"].found >= 1
    assert "argonne/model/modeling_argonne.py" in measured["files a step, in model"].listed


def test_limits_are_read_from_the_table_of_the_document() -> None:
    text = (
        "# Size\n\n| Measure | Limit |\n| --- | --- |\n| product lines | 16,800 |\n| files a step | 10 |\n\n| "
        "other | 3 |\n"
    )
    assert size.read_limits(text) == {"product lines": 16800, "files a step": 10}


def test_a_document_without_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="Measure"):
        size.read_limits("| product lines | 16800 |\n")


def test_what_is_above_its_limit_is_over_and_what_is_at_it_is_not() -> None:
    measures = [Measure("files", 11), Measure("lines", 10), Measure("free", 99)]
    assert size.over(measures, {"files": 10, "lines": 10}) == ["files"]


def test_a_limit_on_what_is_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'fles'.*not measured"):
        size.over([Measure("files", 1)], {"fles": 1})


def test_a_step_is_counted_by_room() -> None:
    step = (
        Ran("argonne/train/step.py", "step", 1),
        Ran("argonne/train/step.py", "scale", 9),
        Ran("argonne/files.py", "write", 1),
        Ran("argonne/data/loader.py", "batch", 1),
        Ran("argonne/tokens/shards.py", "copy", 1),
        Ran("argonne/model/layers.py", "forward", 1),
    )
    found = {measure.name: measure.found for measure in size.measure_trace(traced(*step, start=step[:3]))}
    assert found == {
        "files a step, outside model, data and tokens": 2,
        "functions a step, outside model, data and tokens": 3,
        "files a batch, in data and tokens": 2,
        "functions a batch, in data and tokens": 2,
        "files a step, in model": 1,
        "functions a step, in model": 1,
        "files from the command to the loop": 2,
    }
    assert size.by_room(step) == {"data": (1, 1), "files": (1, 1), "model": (1, 1), "tokens": (1, 1), "train": (1, 2)}


def test_the_note_does_not_say_no_where_nothing_locates_rows_by_that_name() -> None:
    step, locate = Ran("argonne/train/step.py", "step", 1), Ran("argonne/data/mixture.py", "Mixture.locate", 1)
    assert "unknown" in size.locating_note(traced(step))
    assert "no new block" in size.locating_note(traced(step, start=(locate,)))
    assert size.locating_note(traced(step, locate)).startswith(
        "the steps traced located a new block of rows; a batch that does opens 1 files"
    )


@pytest.mark.parametrize(("lines", "code"), [(LONGEST, 0), (LONGEST + 1, 1)])
def test_a_function_one_line_too_long_is_named_and_ends_with_1(
    lines: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(size, "trace_run", lambda folder: traced(Ran("argonne/train/step.py", "step", 1)))
    (tmp_path / "argonne").mkdir()
    (tmp_path / "argonne" / "long.py").write_text("def long():\n" + "    x = 1\n" * (lines - 1))
    assert size.main(["--root", str(tmp_path), "--verbose"]) == code
    said = capsys.readouterr().out
    assert ("OVER" in said) == bool(code)
    assert f"{lines:,}" in said
    assert said.count("argonne.long.long, line 1") == 1 + code

    assert size.main(["--root", str(tmp_path), "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["over"] == ([size.LONGEST_FUNCTION] if code else [])
    assert document["rooms"] == {"train": {"files": 1, "functions": 1}}


def test_a_circle_is_counted_and_its_imports_are_listed(tmp_path: Path) -> None:
    folder = tmp_path / "house"
    folder.mkdir()
    (folder / "one.py").write_text("def late():\n    import house.two\n")
    (folder / "two.py").write_text("from house.one import late, other\n")
    package = structure.read_package(folder)
    (found,) = (
        measure for measure in size.measure_structure(package, LONGEST) if measure.name == "circles among modules"
    )
    assert (found.found, found.listed) == (1, ("house.one -> house.two, line 2", "house.two -> house.one, line 1"))


def test_a_root_without_the_package_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        size.main(["--root", str(tmp_path)])
    assert caught.value.code == 2
    assert "holds no folder argonne" in capsys.readouterr().err

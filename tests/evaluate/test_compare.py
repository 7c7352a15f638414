"""`argonne compare`: the same items or none, stored results, differing items as text and page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from argonne import cli
from argonne.errors import InputError
from argonne.evaluate import compare


def result(name: str, chosen: list[int], right: list[int]) -> dict[str, Any]:
    items = [
        {"prompt": f"p{n}", "asked": f"What is {n}?", "choices": [" no", " yes"], "right": one, "chosen": mine}
        for n, (mine, one) in enumerate(zip(chosen, right, strict=True))
    ]
    return {"model": name, "tasks": {"mmlu": {"items": items}}}


FIRST = result("first", [0] * 20, [0] * 12 + [1] * 8)
SECOND = result("second", [0] * 11 + [1] * 9, [0] * 12 + [1] * 8)


def test_a_pair_is_compared_on_what_each_gets_right() -> None:
    (row,) = compare.compared([FIRST, SECOND], ["mmlu"])
    assert row["values"] == [0.6, 0.95]
    assert (row["first_only"], row["second_only"]) == (1, 8)
    assert [item["number"] for item in row["differing"]] == [11, *range(12, 20)]
    text = "\n".join(compare.lines([row]))
    assert "+0.3500" in text
    assert "'no' (wrong) | 'yes' (right)" in text


def test_p_is_corrected_over_all_models_and_tasks() -> None:
    rows = compare.compared([FIRST, SECOND, FIRST], ["mmlu"])
    assert rows[0]["p_corrected"] == pytest.approx(2 * rows[0]["p"])
    assert rows[1]["p"] == rows[1]["p_corrected"] == 1.0


def test_other_items_are_refused_as_are_none() -> None:
    other = json.loads(json.dumps(SECOND))
    other["tasks"]["mmlu"]["items"][3]["prompt"] = "another"
    with pytest.raises(InputError, match="were not asked the same items"):
        compare.compared([FIRST, other], ["mmlu"])
    with pytest.raises(InputError, match="no items of task piqa are kept"):
        compare.compared([FIRST, SECOND], ["piqa"])


def test_models_and_stored_results_are_compared_by_the_command(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"It is the number {n} again."}) + "\n" for n in range(9)))
    asked = ["--tasks", "bpb", "--data", str(text)]
    assert cli.main(["eval", str(base), *asked, "--out", str(tmp_path / "kept")]) == 0
    page = tmp_path / "page.html"
    assert cli.main(["compare", str(tmp_path / "kept"), str(base), *asked, "--page", str(page)]) == 0
    told = capsys.readouterr().out
    assert "p 1, corrected 1: no difference shown" in told
    assert "bits per byte" in told
    assert "Comparison" in page.read_text()
    assert cli.main(["compare", str(base), *asked]) == 2
    assert "expected at least 2" in capsys.readouterr().err


def test_kept_items_may_hold_separators_of_lines(tmp_path: Path) -> None:
    items = [{"asked": "a\u2028b\x85c"}, {"asked": "d"}]
    (tmp_path / "results.json").write_text('{"tasks": {"piqa": {}}}')
    lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (tmp_path / "piqa.jsonl").write_text("".join(lines), encoding="utf-8")
    results = compare.stored(tmp_path)
    assert results is not None
    assert results["tasks"]["piqa"]["items"] == items

"""The matrix of docs/exports.md: every engine and generation is there, proven or refused as the code refuses it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from argonne.errors import InputError
from argonne.publish import export, gguf_export, onnx_export
from argonne.publish.engines import DIFFERENT, REFUSES, UNPROVEN
from benchmarks import engines

MUST_SHOW = ["1.0", "2.5", "3.0", "3.0 with window"]


def rows() -> list[list[str]]:
    table = engines.DOCUMENT.read_text().split("<!-- engines begin -->\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def reasons() -> list[str]:
    below = engines.DOCUMENT.read_text().split("<!-- engines begin -->\n")[1].split("<!-- engines end -->")[0]
    return re.findall(r"^\d+\. (.+)", below, re.MULTILINE)


def test_the_matrix_has_every_engine_and_generation() -> None:
    head, _, *body = rows()
    assert head[2:] == MUST_SHOW
    versions = [row[0] for row in body]
    assert len({version for version in versions if version.startswith("transformers ")}) == 2
    for engine in ("llama-cpp-python ", "mlx-lm ", "onnxruntime "):
        assert any(version.startswith(engine) for version in versions), engine
    assert [version for version in versions if version.startswith("transformers 5.17.")]


def test_every_cell_is_a_small_difference_or_a_reason() -> None:
    for _, kind, *cells in rows()[2:]:
        for cell in cells:
            if match := re.fullmatch(r"refused \((\d+)\)", cell):
                assert reasons()[int(match[1]) - 1]
            elif match := re.fullmatch(r"(\S+), rounded", cell):
                assert kind in ("gguf bf16", "gguf q8_0")
                assert 0 < float(match[1]) <= gguf_export.TOLERANCE[kind.split()[1]]
            elif cell != UNPROVEN:
                assert 0 <= float(cell) <= (1e-5 if kind == "onnx" else 1e-4)


@pytest.mark.parametrize("generation", MUST_SHOW)
def test_what_the_matrix_says_is_refused_is_refused_and_nothing_else(
    generation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked here: what is known before an engine runs."""
    proof = {"class": "X", "relative_difference": 0.0, "version": "engine 1"}
    monkeypatch.setattr(export, "prove", lambda folder, expected: proof)
    monkeypatch.setattr(export, "ask_engines", lambda *given: {})
    monkeypatch.setattr(export, "expected_file", lambda model: (tmp_path / "expected").open("w"))
    monkeypatch.setattr(gguf_export, "prove", lambda *given: {"proven": True, **proof})
    monkeypatch.setattr(onnx_export, "write_onnx", lambda model, file: None)
    monkeypatch.setattr(onnx_export, "is_installed", lambda engine: False)
    place, model = MUST_SHOW.index(generation), engines.save(generation, tmp_path / "model")
    told = {(row[0].split()[0], row[1]): row[2 + place] for row in rows()[2:]}
    names = {"llama.cpp": "llama-cpp-python", "mlx": "mlx-lm", "onnx": "onnxruntime"}
    for number, (engine, kind) in enumerate(engines.ROWS):
        cell = told.get((engine, kind)) or told[names[engine], kind]
        try:
            record = engines.exported(model, kind, tmp_path / f"out{number}", [engine])
        except InputError:
            assert cell.startswith("refused"), (engine, kind)
        else:
            assert not cell.startswith("refused"), (engine, kind)
            assert record["engines"][engine]["verdict"] not in (DIFFERENT, REFUSES)

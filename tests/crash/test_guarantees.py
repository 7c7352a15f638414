"""docs/guarantees.md names only tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUARANTEES = ROOT / "docs" / "guarantees.md"


def names_in(file: Path) -> set[str]:
    found = ast.walk(ast.parse(file.read_text()))
    return {node.name for node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_the_guarantees_name_exists() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", GUARANTEES.read_text())
    assert len(named) > 80
    missing = [
        f"{file}::{name}" for file, name in named if not (ROOT / file).is_file() or name not in names_in(ROOT / file)
    ]
    assert missing == []


def test_every_fault_has_a_guard_and_a_test() -> None:
    built = GUARANTEES.read_text().partition("## Not built yet")[0]
    rows = [line for line in built.splitlines() if line.startswith("| ") and not line.startswith(("| fault", "| ---"))]
    assert len(rows) > 40
    assert [row for row in rows if len(row.split(" | ")) != 3 or "::test_" not in row] == []

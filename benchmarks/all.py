"""Every benchmark of the CPU, one after the other: `make bench`. Measure on an otherwise idle machine; compare within
one table only.
"""

from __future__ import annotations

import importlib
import sys

from benchmarks import harness

MODULES = (
    "start_up",
    "train_step",
    "precision",
    "neighbours",
    "overhead",
    "saves",
    "encode_text",
    "prepare_tokens",
    "small_files",
    "read_windows",
    "open_tokens",
    "packing",
    "render",
    "reference",
    "serving",
    "decode",
    "questions",
)


def main() -> int:
    """All tables of docs/benchmarks.md; 1 if any contestant failed."""
    return max(harness.main(importlib.import_module(f"benchmarks.{name}").BENCHMARK, ["--write"]) for name in MODULES)


if __name__ == "__main__":
    sys.exit(main())

"""Every benchmark, one after the other: `make bench`. Measure on an otherwise idle machine; compare within one table only."""

from __future__ import annotations

import sys

from benchmarks import harness, start_up, train_step


def main() -> int:
    benchmarks = (start_up.BENCHMARK, train_step.BENCHMARK)
    return max(harness.main(benchmark, ["--write"]) for benchmark in benchmarks)


if __name__ == "__main__":
    sys.exit(main())

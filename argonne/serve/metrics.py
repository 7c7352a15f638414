"""What a server has done, as Prometheus reads it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Seconds, counted by the bounds of SECONDS."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> list[str]:
        total, found = 0, []
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self._counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*found, f"{name}_sum {self._sum}", f"{name}_count {total}"]


class Metrics:
    """`requests` belongs to the event loop, all else to the service's thread: each number has one writer."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.tokens_in = self.tokens_out = 0
        self.first_token, self.total = Histogram(), Histogram()

    def text(self, running: Mapping[str, int], waiting: Mapping[str, int]) -> str:
        """The page of /metrics; running, waiting: answers by model."""
        counted = [
            f'argonne_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        lines = _family("argonne_requests_total", "counter", "requests by route and status", counted)
        for name, meaning, found in (
            ("running", "answers that are computed", running),
            ("waiting", "answers that wait for a slot", waiting),
        ):
            listed = [f'argonne_{name}{{model="{_escaped(model)}"}} {count}' for model, count in found.items()]
            lines += _family(f"argonne_{name}", "gauge", meaning, listed)
        for name, meaning, total in (
            ("argonne_prompt_tokens_total", "tokens of accepted prompts", self.tokens_in),
            ("argonne_completion_tokens_total", "tokens generated", self.tokens_out),
        ):
            lines += _family(name, "counter", meaning, [f"{name} {total}"])
        for name, meaning, histogram in (
            ("argonne_first_token_seconds", "from a request to its first token", self.first_token),
            ("argonne_request_seconds", "from a request to the end of its last answer", self.total),
        ):
            lines += _family(name, "histogram", meaning, histogram.lines(name))
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, meaning: str, lines: Sequence[str]) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *lines]


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

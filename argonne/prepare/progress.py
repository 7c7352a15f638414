"""How far a long preparation is: a bar on a terminal, a plain line now and then elsewhere. Everything
goes to stderr.
"""

from __future__ import annotations

import sys
import time
from typing import Literal, TextIO

LINE_SECONDS = 10.0


class ProgressBar:
    """Documents, tokens, MB/s and time left. `stream=None` is silent."""

    def __init__(self, label: str, total_bytes: int, stream: TextIO | Literal["stderr"] | None = "stderr") -> None:
        self.label, self.total = label, total_bytes
        # Looked up now, not when this module was imported.
        self.stream = stream = sys.stderr if stream == "stderr" else stream
        self.done = self.fresh = self.documents = self.tokens = self.text_bytes = 0
        self._began = self._printed = time.monotonic()
        self._bar = None
        if stream is not None and stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, file=stream, dynamic_ncols=True)

    def add(self, input_bytes: int, documents: int, tokens: int, text_bytes: int, *, fresh: bool = True) -> None:
        """One more unit is finished; `fresh=False` when an earlier run finished it (it does not count
        for the speed).
        """
        self.done += input_bytes
        self.documents += documents
        self.tokens += tokens
        if fresh:
            self.fresh += input_bytes
            self.text_bytes += text_bytes
        if self._bar is not None:
            self._bar.update(input_bytes)
            self._bar.set_postfix_str(self._counts())
        elif self.stream is not None and time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            self.log(f"{self.label}: {self._counts()}{self._left()}")

    def _counts(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens, {self.text_bytes / 1e6 / seconds:.1f} MB/s of text"
        )

    def _left(self) -> str:
        if not self.fresh or not self.total:
            return ""
        seconds = (self.total - self.done) * (time.monotonic() - self._began) / self.fresh
        return (
            f", {100 * self.done / self.total:.0f} %, about {int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m "
            "left"
        )

    def log(self, line: str) -> None:
        """One line for a person."""
        if self._bar is not None:
            self._bar.write(line, file=self.stream)
        elif self.stream is not None:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self.stream is not None:
            print(
                f"{self.label}: {self._counts()}, {time.monotonic() - self._began:.1f} s", file=self.stream, flush=True
            )

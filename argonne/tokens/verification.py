"""Hashes of the shards, checked while training already runs: a thread reads each file once, and a mismatch stops the run at its next step."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argonne import files, layout
from argonne.tokens.shards import Shard

CHUNK = 1 << 22


class Verification:
    """Checks shards against their hashes. What was found right is kept in `folder`, by path, size and time of change, and not read again."""

    def __init__(self, shards: Sequence[Shard], folder: Path | None) -> None:
        self._wanted = [
            (path, digest)
            for shard in shards
            for path, digest in ((shard.path, shard.sha256), (shard.index, shard.index_sha256))
            if path and digest
        ]
        self._record = folder / layout.VERIFIED if folder is not None else None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.problem: str | None = None
        self.checked = 0

    def start(self) -> None:
        """Check in the background."""
        self._thread = threading.Thread(target=self.run, name="argonne-verify", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Check everything that is not known to be right; the first fault ends it and is kept in `problem`."""
        known: dict[str, Any] = files.read_json(self._record) if self._record is not None and self._record.exists() else {}
        for path, expected in self._wanted:
            try:
                state = [path.stat().st_size, path.stat().st_mtime_ns, expected]
                if known.get(str(path)) != state:
                    found = self._hash(path)
                    if found is None:
                        break
                    if found != expected:
                        fault = f"other bytes than were written (sha256 {found[:12]}, expected {expected[:12]})"
                        self.problem = f"{path}: {fault}; restore it or prepare again"
                        break
                    known[str(path)] = state
            except OSError as error:
                self.problem = f"{path}: cannot be read ({error.strerror}); restore it or prepare again"
                break
            self.checked += 1
        if self._record is not None and self._record.parent.is_dir():
            files.write_json(self._record, known)

    def _hash(self, path: Path) -> str | None:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                if self._stop.is_set():
                    return None
                digest.update(chunk)
        return digest.hexdigest()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """End the thread; what it has checked so far is kept."""
        self._stop.set()
        self.wait()

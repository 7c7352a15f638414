"""Run as a script in a fresh process: the Python of a model card, word for word, one block after the other, offline and
without argonne.

Usage: python fresh_card.py FOLDER EXPECTED REPOSITORY CARD; the name on the Hub leads to the folder. Prints one JSON
line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(folder: Path, repository: str, name: str) -> dict[str, object]:
    """How many blocks there are, and what the first one that fails says."""
    card = (folder / name).read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    blocks = list(BLOCK.finditer(card))
    with tempfile.TemporaryDirectory(prefix="argonne-card-") as place:
        link = Path(place) / repository
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)
        os.chdir(place)
        try:
            for block in blocks:
                line = card.count("\n", 0, block.start()) + 1
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        exec(compile(block[1], f"{name}, block of line {line}", "exec"), names)
                except Exception as error:
                    said = (str(error).strip().splitlines() or [""])[0]
                    return {"blocks": len(blocks), "line": line, "error": f"{type(error).__name__}: {said}"}
        finally:
            os.chdir("/")  # the place goes
    return {"blocks": len(blocks), "line": None, "error": None}


if __name__ == "__main__":
    sys.modules["argonne"] = None  # type: ignore[assignment]
    print("@@" + json.dumps(run(Path(sys.argv[1]), *sys.argv[3:])))

"""A document as a reader uses it: its blocks, and one shell that runs them in their order, exactly as written."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_RUN = re.compile(r"^\*Not run by the tests: (.+)\.\*$")


@dataclass(frozen=True)
class Block:
    """A fenced block. `left_out`: why the document says that it is not run; None where it is."""

    language: str
    text: str
    line: int
    left_out: str | None


def blocks_of(document: str) -> list[Block]:
    """Every fenced block of a document. What is said to be not run stands as a paragraph of its own right above it."""
    found: list[Block] = []
    lines = document.splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    for begin, end in zip(fences[::2], fences[1::2], strict=True):
        above = next((line for line in reversed(lines[:begin]) if line.strip()), "")
        reason = NOT_RUN.match(above)
        language, text = lines[begin].removeprefix("```"), "\n".join(lines[begin + 1 : end]) + "\n"
        found.append(Block(language, text, begin + 2, reason[1] if reason else None))
    return found


def script_of(document: str, instead: Mapping[str, str]) -> str:
    """The whole document for one bash: commands as they stand, a recipe saved under the name in its first line, Python
    as Python. `instead`: lines that are replaced, each of which must be there.
    """
    parts = ["set -euo pipefail"]
    replaced = set()
    for block in blocks_of(document):
        if block.left_out or block.language == "text":
            continue
        parts.append(f"echo '>>> line {block.line}' >&2")
        if block.language == "toml":
            name = re.match(r"# (\S+\.toml)$", block.text.splitlines()[0])
            assert name, f"line {block.line}: a recipe without a name in its first line"
            parts.append(f"cat > {name[1]} <<'END OF FILE'\n{block.text}END OF FILE")
        elif block.language == "python":
            parts.append(f"python - <<'END OF FILE'\n{block.text}END OF FILE")
        else:
            assert block.language == "sh", f"line {block.line}: a block of {block.language or 'no language'}"
            for line in block.text.splitlines():
                command = line.split("  #")[0].rstrip()
                replaced |= {command} & instead.keys()
                parts.append(instead.get(command, line))
    assert replaced == set(instead), f"not in the document: {set(instead) - replaced}"
    return "\n".join(parts) + "\n"


def fresh_clone(folder: Path) -> Path:
    """What a reader has after `make install`: the repository's files that its commands need, and `.venv`."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(ROOT / name, folder / name)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (folder / ".venv" / ".runs").touch()
    (folder / ".venv" / ".installed").touch()
    return folder


def take(document: str, folder: Path, instead: Mapping[str, str]) -> str:
    """Run a document in `folder`; what it printed. AssertionError names the line of the block that failed."""
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),  # the tree under test, whatever the environment has installed
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-c", script_of(document, instead)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    place = re.findall(r"^>>> (line \d+)$", done.stdout, re.MULTILINE)[-1:]
    assert done.returncode == 0, f"the block of {place} ended with {done.returncode}: {done.stdout[-2000:]}"
    return done.stdout

"""A stand-in for PBS: `qsub`, `qstat` and `qdel` keep jobs as files, and `run_all` runs them one after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

QSUB = r"""#!/bin/sh
cd "@FOLDER" || exit 1
after=
if [ "$1" = -W ]; then after=${2#depend=afterany:}; shift 2; fi
[ -f "$1" ] || { echo "qsub: script not found: $1" >&2; exit 1; }
id=$(($(ls -d job-* 2>/dev/null | wc -l) + 1)).server
cp "$1" "job-$id"; echo "$after" > "after-$id"; touch "queued-$id"
echo "$id"
"""
QSTAT = '#!/bin/sh\n[ -e "@FOLDER/queued-$1" ] && echo "$1" || exit 153\n'
QDEL = '#!/bin/sh\nrm "@FOLDER/queued-$1"\n'
KNOWN = re.compile(
    r"-N [A-Za-z][\w.-]{0,229}|-l select=\d+(:(ncpus|ngpus)=\d+|:mem=\w+)*|-l walltime=\d+:\d\d:\d\d|-j oe|-o \S+/|-V|"
    r"-r n|-q \w+|-A \w+"
)


class Pbs:
    """Jobs in `folder`; `commands` is to be on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands = folder, folder / "bin"
        self.commands.mkdir(parents=True)
        for name, text in (("qsub", QSUB), ("qstat", QSTAT), ("qdel", QDEL)):
            file = self.commands / name
            file.write_text(text.replace("@FOLDER", str(folder)))
            file.chmod(0o755)

    def run_all(self) -> list[int]:
        """Run every job whose former has ended, in order, until none is left; their exit codes."""
        codes = []
        while waiting := sorted(self.folder.glob("queued-*"), key=lambda path: int(path.name[7:].split(".")[0])):
            identifier = waiting[0].name.removeprefix("queued-")
            codes.append(self._run(identifier))
            waiting[0].unlink(missing_ok=True)
        return codes

    def _run(self, identifier: str) -> int:
        after = (self.folder / f"after-{identifier}").read_text().strip()
        assert not (self.folder / f"queued-{after}").exists()
        script = self.folder / f"job-{identifier}"
        said = [line.removeprefix("#PBS ") for line in script.read_text().splitlines() if line.startswith("#PBS")]
        assert [text for text in said if not KNOWN.fullmatch(text)] == []
        (log,) = [text.removeprefix("-o ") for text in said if text.startswith("-o ")]
        (wall,) = [text.partition("=")[2] for text in said if text.startswith("-l walltime")]
        hours, minutes, seconds = map(int, wall.split(":"))
        with open(Path(log) / f"{identifier}.log", "w") as file:
            return subprocess.run(
                ["timeout", "--kill-after=10", str(3600 * hours + 60 * minutes + seconds), "bash", str(script)],
                cwd="/",
                env={**os.environ, "PBS_JOBID": identifier},
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode


def with_commands(pbs: Pbs) -> str:
    """A path on which the stand-in is found first, and Python as ever."""
    return os.pathsep.join([str(pbs.commands), str(Path(sys.executable).parent), os.environ["PATH"]])

"""Jobs on a cluster: the settings that all of ours take, as directives of SLURM or PBS; handing a script in."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from argonne.declare import key
from argonne.errors import InputError, NoAnswer
from argonne.keys import parse_duration

SUBMIT = {"slurm": ("sbatch", "--parsable"), "pbs": ("qsub",)}
# The states in which SLURM's accounts leave a task that will not run again.
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}
# What qstat ends with for a job that it no longer knows, and for one that has ended.
PBS_GONE = (153, 35)


@dataclass(frozen=True)
class JobSettings:
    """Flags of every verb that hands in jobs."""

    partition: str | None = key(None, "SLURM's partition, or PBS's queue", metavar="NAME")
    account: str | None = key(None, "whom the jobs are charged to", metavar="NAME")
    qos: str | None = key(None, "SLURM's quality of service", metavar="NAME")
    time: str | None = key(None, "limit of a job: 90m, 12h, 1-12:00:00 (default: the partition's)", metavar="T")
    mem: str | None = key(None, "memory on a node, as 64G (PBS: 64gb)", metavar="SIZE")
    exclude: tuple[str, ...] = key((), "nodes that SLURM is not to use: node07, or node[03-05]", metavar="NODE")
    directive: tuple[str, ...] = key(
        (), "another directive, as the scheduler writes it: --directive=--constraint=a100", metavar="TEXT"
    )


def clock_of(seconds: float) -> str:
    """HH:MM:SS, with more than 24 hours where it is longer: both schedulers read it."""
    return f"{int(seconds) // 3600:02d}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def directives(scheduler: str, settings: JobSettings) -> list[str]:
    """The settings as lines of a script. Raises InputError for one that the scheduler would not take."""
    for item in dataclasses.fields(settings):
        values = getattr(settings, item.name)
        for value in values if isinstance(values, tuple) else (values or "unset",):
            if not re.fullmatch(r".+" if item.name == "directive" else r"\S+", value):
                raise InputError(f"--{item.name}: found {value!r}, expected one word (a directive: one line)")
        if scheduler == "pbs" and values and item.name in ("qos", "exclude"):
            raise InputError(
                f"--{item.name}: PBS has no such setting; leave it out, or say with --directive what your site has"
            )
    seconds = parse_duration(settings.time, "--time") if settings.time else None
    if seconds is not None and seconds < 60:
        raise InputError(f"--time: found {settings.time!r}, {seconds:g} seconds, expected at least a minute")
    clock, more = clock_of(seconds) if seconds else None, settings.directive
    if scheduler == "pbs":
        named = {"-q ": settings.partition, "-A ": settings.account, "-l walltime=": clock}
        return [f"#PBS {name}{value}" for name, value in named.items() if value] + [f"#PBS {text}" for text in more]
    named = {name: getattr(settings, name) for name in ("partition", "account", "qos", "mem")}
    named |= {"time": clock, "exclude": ",".join(settings.exclude)}
    lines = [f"--{name}={value}" for name, value in named.items() if value]
    return [f"#SBATCH {text}" for text in (*lines, *more)]


def submit(scheduler: str, script: Path, what: str, remedy: str) -> str:
    """Hand the script in; the job's identifier. Raises InputError where there is no scheduler, or it refuses."""
    command = SUBMIT[scheduler]
    try:
        found = subprocess.run([*command, str(script)], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise InputError(f"{what}: there is no {command[0]} here; {remedy}") from None
    except subprocess.CalledProcessError as error:
        raise InputError(f"{what}: {command[0]} refused {script}: {error.stderr.strip()}") from None
    if not (identifier := found.stdout.strip().split(";")[0]):
        raise InputError(f"{what}: {command[0]} took {script} and named no job; look whether one is queued")
    return identifier


def is_queued(scheduler: str, identifier: str) -> bool:
    """Is the job, or any task of the array, waiting or running? Raises NoAnswer where the scheduler does not say.

    squeue fails in the same way for a job that has ended and for a controller that is busy: SLURM's accounts decide,
    and where there are none the list of this user's jobs, which comes only from a controller that answers.
    """
    if scheduler == "pbs":
        code, lines = _asked("qstat", identifier)
        if code and code not in PBS_GONE:
            raise NoAnswer(f"job {identifier}: qstat does not say whether it is still there ({' '.join(lines)})")
        return not code
    code, lines = _asked("squeue", "-h", "-o", "%T", "-j", identifier)
    if not code:
        return bool(lines)
    failed, states = _asked("sacct", "-n", "-X", "-P", "-o", "State", "-j", identifier)
    if states and not failed:
        return any(state.split()[0] not in ENDED for state in states)
    failed, mine = _asked("squeue", "-h", "-o", "%F", "-u", str(os.getuid()))
    if failed:
        raise NoAnswer(f"job {identifier}: SLURM does not say whether it is still there (squeue: {' '.join(lines)})")
    return identifier in mine


def _asked(*command: str) -> tuple[int, list[str]]:
    """(exit code, lines that a scheduler's command wrote; of one that failed those of its error)."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return -1, [f"{command[0]}: {error.strerror}"]
    said = found.stderr if found.returncode else found.stdout
    return found.returncode, [line.strip() for line in said.splitlines() if line.strip()]

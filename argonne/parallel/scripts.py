"""Job scripts that go on from one another: what a job does, written down as a shell script that a person can read."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from argonne.declare import BOUNDS, key
from argonne.errors import InputError, InUse
from argonne.files import write_text
from argonne.jobs import JobSettings, directives, is_queued, submit
from argonne.keys import parse_duration
from argonne.layout import COMPLETE, LAUNCH, LAUNCH_SCRIPT, LOCK, STOPPED

FAILURES, STARTED, SUBMITTED = "failures", "started", "submitted"
LONGEST_NOTICE = 65535  # what SLURM takes

NAMES = {"FINISHED": COMPLETE, "HALTED": STOPPED, "LOCK": LOCK, "SCRIPT": LAUNCH_SCRIPT}
# What each scheduler calls it: this job, its successor's submission, is a job gone for certain (a question that fails
# is no answer), take one back.
WORDS = {
    "slurm": {
        "ME": '"$SLURM_JOB_ID"',
        "SUBMIT": 'sbatch --parsable --dependency=afterany:"$me"',
        "GONE": 'local mine; mine=$(squeue -h -o %F -u "$(id -u)") && ! grep -qx "$1" <<< "$mine"',
        "CANCEL": "scancel",
    },
    "pbs": {
        "ME": '"$PBS_JOBID"',
        "SUBMIT": 'qsub -W depend=afterany:"$me"',
        "GONE": 'qstat "$1" >/dev/null 2>&1; case $? in 153 | 35) ;; *) return 1 ;; esac',
        "CANCEL": "qdel",
    },
}
SCRIPT = """\
#!/bin/bash
@DIRECTIVES
# Written by: @AGAIN
# Jobs of this script follow one another until each run has its @FINISHED. Each first hands in the next one, which
# begins when it has ended, however it ends; the last one takes it back. A job whose run ends with neither @FINISHED
# nor @HALTED, or stops where it began, has failed.
cd @CWD || exit 1
state=@STATE
me=@ME
again=@AGAIN_QUOTED
child= asked=
@DEADLINE
gone() { @GONE; }
newest() { ls -d "$1"/checkpoint_step_* 2>/dev/null | sed 's/.*_//' | sort -n | tail -n 1; }
all_complete() { for folder in @FOLDERS; do [ -e "$folder/@FINISHED" ] || return 1; done; }
ask() { asked=1; if [ -n "$child" ]; then kill -USR1 "$child" 2>/dev/null; fi; }
trap ask USR1 TERM

# train FOLDER COMMAND..: until the run is complete; else the job ends, well where the run stopped further on
train() {
  local folder=$1 before; shift
  [ -e "$folder/@FINISHED" ] && return
  [ -n "$asked" ] && exit 0
  before=$(newest "$folder")
  "$@" $take_over & child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  child= take_over=
  [ -e "$folder/@LOCK" ] || rm -f "$state/started"
  if [ -e "$folder/@FINISHED" ]; then echo 0 > "$state/failures"; return; fi
  if [ -e "$folder/@HALTED" ] && [ "$(newest "$folder")" != "$before" ]; then echo 0 > "$state/failures"; exit 0; fi
  end_after_failures
  exit 1
}

end_after_failures() {
  [ "$(cat "$state/failures")" -ge @MAX ] || return
  echo "argonne: @MAX jobs in a row brought $folder no further: the chain ends. See $state/*.log; then: $again" >&2
  if [ -n "$next" ]; then @CANCEL "$next"; fi
  exit 1
}

if all_complete; then echo "argonne: every run is complete"; exit 0; fi
former=$(cat "$state/started" 2>/dev/null) next= take_over= folder="the run"
# The job before was cut off where it could not give the run back, perhaps on another node.
if [ -n "$former" ] && [ "$former" != "$me" ] && gone "$former"; then take_over=--take-over; fi
end_after_failures
echo $(($(cat "$state/failures") + 1)) > "$state/failures"  # until this job has brought a run further
echo "$me" > "$state/started"
if next=$(@SUBMIT "$state/@SCRIPT"); then next=${next%%;*}; echo "$next" > "$state/submitted"
else echo "argonne: no next job could be handed in; after this one: $again" >&2; fi

@TRAIN
echo "argonne: every run is complete"
if [ -n "$next" ]; then @CANCEL "$next"; fi
exit 0
"""


@dataclass(frozen=True)
class LaunchOptions:
    """Every flag of `argonne launch` that shapes its jobs."""

    nodes: int = key(1, "nodes of a job; one command on each, which join as one run (SLURM)", bounds="at least 1")
    gpus: int = key(0, "GPUs on a node", bounds="at least 0")
    cpus: int = key(0, "CPU cores on a node; 0 = as many as the scheduler gives", bounds="at least 0")
    stop_before: str = key("5m", "ask the run to stop and save this long before the limit of a job", metavar="T")
    max_failures: int = key(3, "jobs in a row that bring no run further, before the chain ends", bounds="at least 1")
    jobs: JobSettings = key(JobSettings(), "settings of every job")


@dataclass(frozen=True)
class Leg:
    """One run of a chain: its folder, and the command that trains it, without `argonne`."""

    folder: Path
    arguments: list[str]


def script_of(scheduler: str, legs: list[Leg], options: LaunchOptions, again: str) -> str:
    """The script of every job. Raises InputError for settings that contradict one another."""
    for item in fields(options):
        found, bounds = getattr(options, item.name), item.metadata["bounds"]
        if bounds and not BOUNDS[bounds](found):
            raise InputError(f"--{item.name.replace('_', '-')}: found {found}, expected {bounds}")
    notice = parse_duration(options.stop_before, "--stop-before")
    limit = parse_duration(options.jobs.time, "--time") if options.jobs.time else None
    if not 1 <= notice < min(limit or LONGEST_NOTICE, LONGEST_NOTICE):
        raise InputError(
            f"--stop-before: found {options.stop_before!r}, expected at least a second and less than "
            f"{f'--time {options.jobs.time}' if limit else f'{LONGEST_NOTICE} s'}: what is left of a job trains"
        )
    if scheduler == "pbs" and (limit is None or options.nodes > 1):
        raise InputError(
            "--time: not set, and PBS gives no notice before a job's limit; give it, as --time 12h"
            if limit is None
            else f"--nodes: found {options.nodes}, expected 1 with PBS; in a job of your own start one command on each "
            "node, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT (docs/launch.md)"
        )
    run = legs[0].folder.resolve()
    state, name = run / LAUNCH, re.sub(r"[^\w.-]", "-", f"argonne-{run.name}")
    size = {"nodes": options.nodes, "ntasks-per-node": 1, "gpus-per-node": options.gpus, "cpus-per-task": options.cpus}
    chunk = {"ncpus": options.cpus, "ngpus": options.gpus, "mem": options.jobs.mem}
    lines = {
        "slurm": [
            f"#SBATCH --job-name={name} --output={shlex.quote(f'{state}/%j.log')}",
            f"#SBATCH --no-requeue --signal=B:USR1@{int(notice)}",
            "#SBATCH " + " ".join(f"--{what}={much}" for what, much in size.items() if much),
        ],
        "pbs": [
            f"#PBS -N {name}",
            "#PBS -l " + ":".join(["select=1", *(f"{what}={much}" for what, much in chunk.items() if much)]),
            *("#PBS -j oe", f"#PBS -o {state}/", "#PBS -V", "#PBS -r n"),
        ],
    }
    start = [sys.executable, "-m", "argonne"]
    if options.nodes > 1:  # a command that fails ends the others itself, after their saves
        start[:0] = ["srun", "--kill-on-bad-exit=0", *([f"--cpus-per-task={options.cpus}"] if options.cpus else [])]
    asked = ["--deadline", "DEADLINE"] if scheduler == "pbs" else []
    train = [["train", str(leg.folder), *start, *leg.arguments[:4], *asked, *leg.arguments[4:]] for leg in legs]
    words = {
        **(NAMES | WORDS[scheduler]),
        "AGAIN_QUOTED": shlex.quote(again),
        "AGAIN": again.replace("\n", " "),
        "CWD": shlex.quote(str(Path.cwd())),
        "STATE": shlex.quote(str(state)),
        "DEADLINE": f"deadline=$(($(date +%s) + {int(limit - notice)}))\n" if asked and limit else "",
        "FOLDERS": shlex.join(str(leg.folder) for leg in legs),
        "MAX": str(options.max_failures),
        "TRAIN": "\n".join(map(shlex.join, train)).replace("--deadline DEADLINE", '--deadline "$deadline"'),
        "DIRECTIVES": "\n".join([*lines[scheduler], *directives(scheduler, options.jobs)]),
    }
    return re.sub(r"@([A-Z_]+)", lambda match: words[match[1]], SCRIPT)


def hand_in(scheduler: str, legs: list[Leg], script: str) -> str | None:
    """Write the script into the first run and hand in the first job; None where nothing is left to do. A chain that was
    ended by failures begins to count again. Raises InUse where a job of it is still there.
    """
    if all((leg.folder / COMPLETE).exists() for leg in legs):
        print("every run is complete; nothing to do", file=sys.stderr)
        return None
    state = legs[0].folder / LAUNCH
    for name in (STARTED, SUBMITTED):
        job = (state / name).read_text().strip() if (state / name).is_file() else ""
        if job and is_queued(scheduler, job):
            raise InUse(f"{state}: job {job} of this chain is still there; wait for it, or take it back first")
    state.mkdir(parents=True, exist_ok=True)
    write_text(state / LAUNCH_SCRIPT, script)
    write_text(state / FAILURES, "0\n")
    path = (state / LAUNCH_SCRIPT).resolve()
    identifier = submit(scheduler, path, f"launch {scheduler}", "start it where it is; --dry-run prints the script")
    write_text(state / SUBMITTED, f"{identifier}\n")
    print(f"job {identifier}; its log and those after it: {path.parent}", file=sys.stderr)
    return identifier

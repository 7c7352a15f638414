"""Who encodes the units: this process, a pool of processes, a SLURM array, Ray. Each yields (unit, record) as units
finish.

A unit writes the same bytes wherever it runs, and a finished one is never run again, so that engines may be mixed and
interrupted.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

from argonne import files, jobs, layout
from argonne.errors import InputError, NoAnswer
from argonne.jobs import JobSettings
from argonne.prepare import encoders
from argonne.prepare.documents import Unit
from argonne.prepare.encode import Job, record_path

Results = Generator[tuple[int, dict[str, Any]], None, None]
POLL_SECONDS = 1.0
PARENT_SECONDS = 0.2
SUBMISSIONS = ATTEMPTS = 3
KILLED_ONCE = "a worker process was killed while it encoded this unit; another has encoded it (out of memory?)"
SLURM_TASKS = 8
# How often in a row SLURM may not say whether the array is still there, and the longest wait between two questions:
# half an hour in all.
UNANSWERED, LONGEST_POLL = 30, 60.0
SUBMITTED = "submitted"
NO_SETTINGS = JobSettings()


def run(engine: str, job: Job, units: list[int], workers: int, settings: JobSettings = NO_SETTINGS) -> Results:
    """Encode `units` with `workers` processes, array tasks or Ray tasks (0 = a sensible number); `settings`: of SLURM's
    jobs. Raises what a worker raised.
    """
    if units and engine == "slurm":
        return _slurm(job, units, workers or SLURM_TASKS, settings)
    if units and engine == "ray":
        return _ray(job, units, workers)
    return local(job, units, workers)


def local(job: Job, units: list[int], workers: int) -> Results:
    """In this process, or in worker processes; one that is killed is replaced, and its unit begun again."""
    count = max(1, min(workers or os.cpu_count() or 1, len(units)))
    if count == 1:
        yield from ((number, job.run(number)) for number in units)
        return
    encoders.forget()
    pools = [_one_worker() for _ in range(count)]
    waiting, deaths = deque(units), Counter[int]()
    running: dict[Future[dict[str, Any]], tuple[int, int]] = {}
    free = list(range(count))
    try:
        while waiting or running:
            while waiting and free:
                place, number = free.pop(), waiting.popleft()
                try:
                    future = pools[place].submit(job.run, number)
                except BrokenProcessPool:  # killed while it waited for work
                    pools[place] = _one_worker()
                    future = pools[place].submit(job.run, number)
                running[future] = place, number
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                place, number = running.pop(future)
                free.append(place)
                try:
                    record = future.result()
                except BrokenProcessPool:  # killed; a process of its own for each worker tells which unit it had
                    deaths[number] += 1
                    if deaths[number] == ATTEMPTS:
                        raise InputError(_killed(job, number)) from None
                    pools[place] = _one_worker()
                    waiting.appendleft(number)
                    continue
                if deaths[number]:
                    record["warnings"] = [*record["warnings"], KILLED_ONCE]
                yield number, record
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


def _one_worker() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_begin_worker, initargs=(os.getpid(),))


def _killed(job: Job, number: int) -> str:
    plan = files.read_json(Path(job.out) / layout.UNITS_PLAN)
    unit = Unit(**plan["units"][number])
    more = f" and the {unit.files - 1:,} files after it" if unit.files > 1 else ""
    return (
        f"unit {number} ({plan['files'][unit.file]['path']}{more}): {ATTEMPTS} worker processes were killed while they "
        "encoded it; out of memory? Give fewer --workers; the finished units are kept, run the same command again"
    )


def _begin_worker(parent: int) -> None:
    """One thread for each worker, and none outlives a main process that was killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with(parent)


def end_with(parent: int) -> None:
    """End this process at once if `parent` has died already, and soon after it dies, however it dies."""

    def end_without_parent() -> None:
        if os.getppid() != parent:
            os._exit(1)

    def watch() -> None:
        while True:
            end_without_parent()
            time.sleep(PARENT_SECONDS)

    end_without_parent()
    threading.Thread(target=watch, daemon=True).start()


def _ray(job: Job, units: list[int], workers: int) -> Results:
    """One Ray task a unit, on the cluster that RAY_ADDRESS names or on this machine. The folder must be visible to
    every node.
    """
    try:
        import ray
    except ImportError:
        raise InputError(
            "--engine ray: Ray is not installed; pip install 'argonne[ray]', or use --engine local"
        ) from None
    started = not ray.is_initialized()
    if started:
        size: dict[str, Any] = (
            {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers or os.cpu_count(), "include_dashboard": False}
        )
        ray.init(log_to_driver=False, logging_level=40, **size)
    try:
        encode = ray.remote(num_cpus=1, max_retries=SUBMISSIONS)(_run_one)
        waiting = {encode.remote(job, number): number for number in units}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            for reference in done:
                number, record, problem = ray.get(reference)
                if problem is not None:
                    raise InputError(problem)
                del waiting[reference]
                yield number, record
    finally:
        if started:
            ray.shutdown()


def _run_one(job: Job, number: int) -> tuple[int, dict[str, Any], str | None]:
    """(unit, record, what is wrong with the input): Ray would wrap an exception in one of its own."""
    try:
        return number, job.run(number), None
    except InputError as error:
        return number, {}, str(error)


def _slurm(job: Job, units: list[int], tasks: int, settings: JobSettings) -> Results:
    """An array of `tasks`, waited for here; what a killed or failed task left undone is submitted again, three times in
    all, and never while the array before may still be there.
    """
    out, waiting, tasks = Path(job.out).resolve(), set(units), min(tasks, len(units))
    folder = out / "slurm"
    folder.mkdir(exist_ok=True)
    for _ in range(SUBMISSIONS):
        identifier, unanswered = _handed_in(folder) or _submit(job, folder, tasks, settings), 0
        while True:
            try:
                running, unanswered = jobs.is_queued("slurm", identifier), 0
            except NoAnswer as error:
                running, unanswered = True, unanswered + 1
                if unanswered == 1:
                    print(f"warning: {error}; it is waited for", file=sys.stderr, flush=True)
                if unanswered > UNANSWERED:
                    raise InputError(
                        f"--engine slurm: {error}, asked {unanswered} times; it may go on by itself: run the same "
                        "command later, which waits for it before it hands in another"
                    ) from None
            for number in sorted(waiting):
                if record_path(out, number).exists():
                    waiting.remove(number)
                    yield number, files.read_json(record_path(out, number))
            if not waiting:
                return
            if not running:
                break
            time.sleep(min(POLL_SECONDS * 2**unanswered, LONGEST_POLL))
        (folder / SUBMITTED).unlink(missing_ok=True)
        for problem in sorted(folder.glob("problem-*.json")):
            message = files.read_json(problem)["message"]
            problem.unlink()
            raise InputError(message)
    raise InputError(
        f"--engine slurm: {len(waiting)} units are not done after {SUBMISSIONS} arrays; see {folder}/*.log, then run "
        "again"
    )


def _handed_in(folder: Path) -> str | None:
    """The array that an earlier command handed in, where it may still be there."""
    if not (folder / SUBMITTED).exists():
        return None
    identifier = (folder / SUBMITTED).read_text().strip()
    with suppress(NoAnswer):
        if not jobs.is_queued("slurm", identifier):
            return None
    return identifier


def _submit(job: Job, folder: Path, tasks: int, settings: JobSettings) -> str:
    """Write the array's script, submit it, and return its identifier."""
    script = folder / "array.sh"
    arguments = [sys.executable, "-m", "argonne.prepare.engines", job.out, job.encoder, str(job.shard_tokens)]
    lines = [
        "#!/bin/sh",
        f"#SBATCH --job-name=argonne-prepare --array=0-{tasks - 1} --ntasks=1",
        f"#SBATCH --output={folder}/%A-%a.log",
        *jobs.directives("slurm", settings),
        f"exec {shlex.join(arguments)} $SLURM_ARRAY_TASK_ID {tasks}",
    ]
    files.write_text(script, "\n".join(lines) + "\n")
    for problem in folder.glob("problem-*.json"):  # of an array before
        problem.unlink()
    remedy = "start it where SLURM is, or use --part K/N in jobs of your own"
    identifier = jobs.submit("slurm", script, "--engine slurm", remedy)
    files.write_text(folder / SUBMITTED, f"{identifier}\n")
    return identifier


def array_task(out: str, encoder: str, shard_tokens: int, task: int, tasks: int) -> None:
    """One task of the array: every `tasks`-th unit from `task` on that is not finished."""
    units = len(files.read_json(Path(out) / layout.UNITS_PLAN)["units"])
    mine = [number for number in range(task, units, tasks) if not record_path(Path(out), number).exists()]
    try:
        for _ in local(Job(out, encoder, shard_tokens), mine, int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))):
            pass
    except InputError as error:
        files.write_json(Path(out) / "slurm" / f"problem-{task}.json", {"message": str(error)})
        raise


if __name__ == "__main__":
    array_task(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))

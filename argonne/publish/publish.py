"""`argonne publish`: stage, check, push in one commit, compare what is online. Where a check fails, nothing is."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from argonne.errors import InputError
from argonne.files import publish_directory, seal_directory, verify_directory
from argonne.publish.behaviour import behaviour
from argonne.publish.checks import CHECKS, Found, Problem, Staged
from argonne.publish.push import Hub
from argonne.publish.stage import PublishOptions, stage

SHOWN = 4  # problems of one check

# The checks by name, in their order: what is read off the files first, then what the folder does.
ALL: dict[str, Callable[[Staged], Found]] = {**CHECKS, "behaviour": behaviour}


def publish(
    given: Path,
    options: PublishOptions,
    *,
    dry_run: bool = False,
    out: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Publish an export, or a model that is exported first. dry_run: everything but the push, and no network. out:
    where the staged folder stays. log: gets a line for each check. Raises InputError where anything stands against it.
    """
    if out is not None and out.exists():
        raise InputError(f"{out} exists already; choose another name or remove it")
    hub = Hub(options.repository, options.private)
    before = None if dry_run else hub.check_room(options.replace)
    with scratch(given if out is None else out) as folder:
        staged = stage(given, folder, options)
        seal_directory(folder)
        if options.key is not None:
            from argonne.publish.signature import sign

            sign(folder, options.key)
        problems = list(checked(staged, log))
        if problems:
            names = ", ".join(dict.fromkeys(problem.check for problem in problems))
            raise InputError(f"{given}: nothing was pushed: {len(problems)} problems, told above ({names})")
        if lines := verify_directory(folder):
            raise InputError(f"{given}: changed while it was checked ({lines[0]}); nothing was pushed: publish again")
        found: dict[str, Any] = {"path": str(given), "repository": options.repository, "checks": [*ALL]}
        if not dry_run:
            commit = hub.push(folder, before, f"argonne publish of {options.repository.rpartition('/')[2]}")
            if lines := hub.differences(folder, commit):
                raise InputError(
                    f"{options.repository}: commit {commit[:12]} is not what was published "
                    f"({'; '.join(lines[:SHOWN])}); publish again with --replace"
                )
            found["commit"] = commit
        if out is not None:
            publish_directory(folder, out)
            found["staged"] = str(out)
    return found


def checked(staged: Staged, log: Callable[[str], None] = lambda line: None) -> Iterator[Problem]:
    """Every problem of every check; of a check that has many the first ones. `behaviour` is asked where nothing else is
    wrong: it would only say the same in other words.
    """
    failed = False
    for name, check in ALL.items():
        if failed and name == "behaviour":
            log(f"  --  {name}: not asked, since another check failed")
            return
        found = [Problem(name, what, instead) for what, instead in itertools.islice(check(staged), SHOWN)]
        meaning = " ".join((check.__doc__ or "").split()).partition(".")[0]
        log(f"  {'NO' if found else 'ok'}  {name}: {meaning}")
        for problem in found:
            log(f"      {problem.found}; {problem.instead}")
        failed = failed or bool(found)
        yield from found


@contextmanager
def scratch(beside: Path) -> Iterator[Path]:
    """Where a folder is staged: on the disk of `beside`, gone afterwards."""
    beside.resolve().parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".tmp-publish-", dir=beside.resolve().parent))
    try:
        yield place / beside.name
    finally:
        shutil.rmtree(place, ignore_errors=True)

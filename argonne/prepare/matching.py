"""Which files a pattern of the user's stands for: a file, a glob, or what a folder holds; on this machine, or behind a
URL that fsspec knows. A pattern without `://` never goes through fsspec, which gives `::` and `[` meanings of its own.

What the user names, or a glob matches, is taken whatever it is called. In a folder hidden files, READMEs and the like
are no text; what is not taken is counted.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from argonne import layout
from argonne.errors import InputError, NothingMatches, first_line
from argonne.tokens.formats import KINDS, PACKED, format_of

JSON_HINT = (
    "; one JSON object a line: rename it to .jsonl; one array: `jq -c '.[]' FILE.json > FILE.jsonl`, or "
    "datasets.load_dataset('json', data_files=...).to_parquet(...)"
)
ABOUT = re.compile(r"(readme|licen[sc]es?|copying)(?![a-z])|(notice|changelog|citation|contributing|authors)(?=\.|$)")


def matches(
    pattern: str,
    also: Mapping[str, str] | None = None,
    passed: Counter[str] | None = None,
    outside: Path | None = None,
) -> list[tuple[str, str, int]]:
    """(path or URL, kind, bytes) of each file. `also`: more suffixes and their kinds. `passed`: gains what was not
    taken, by kind. `outside`: a folder that is not looked into.

    Raises NothingMatches, and InputError for what cannot be listed, is named in no UTF-8, or is of no known kind.
    """
    if not pattern.strip():
        raise InputError("input '': an empty pattern, expected a file, a folder or a glob")
    passed, own, folders = Counter() if passed is None else passed, Counter[str](), 0
    found: dict[str, int | None] = {}
    try:
        system, path = _located(_in_utf8(pattern))
        for name in _expanded(system, path):
            inside = system.isdir(name)
            folders += inside
            for file in _below(system, name, own, outside) if inside else (name,):
                if why := _why_not(system, file, also, inside):
                    own[why] += 1
                else:
                    found[_in_utf8(file)] = system.size(file)
    except InputError:
        raise
    except Exception as error:  # every kind of remote system has errors of its own
        raise InputError(
            f"input {pattern!r}: cannot be listed ({first_line(error)}); check the address and your access to it"
        ) from None
    passed.update(own := +own)
    if not found:
        where = f", only folders without one ({KINDS}) in them" if folders else ""
        where += f" ({described(own)})" if own else ""
        raise NothingMatches(
            f"input {pattern!r}: matches no file{where}; check the folder, the pattern and that you may read it"
        )
    return [
        _checked(path if _is_local(system) else system.unstrip_protocol(path), size, also)
        for path, size in found.items()
    ]


def described(passed: Mapping[str, int]) -> str:
    """What was not taken, by kind."""
    return "not taken: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(passed.items()))


def _in_utf8(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"input {name!r}: its name is not UTF-8, and no manifest could hold it; rename it") from None
    return name


def _checked(path: str, size: int | None, also: Mapping[str, str] | None) -> tuple[str, str, int]:
    kind = format_of(path, also)
    if kind is None:
        hint = JSON_HINT if path.lower().endswith(".json") else ""
        raise InputError(f"input {path}: unknown kind of file, expected {KINDS}{hint}")
    if size is None:
        raise InputError(f"input {path}: the server does not say how large it is; download it first")
    return path, kind, size


def _located(pattern: str) -> tuple[Any, str]:
    """(file system, absolute path in it)."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    if "://" in pattern:
        system, path = fsspec.core.url_to_fs(pattern)
        return system, path
    return LocalFileSystem(), os.path.join(
        os.getcwd(), pattern if os.path.lexists(pattern.partition("/")[0]) else os.path.expanduser(pattern)
    )


def _is_local(system: Any) -> bool:
    return "file" in (system.protocol if isinstance(system.protocol, tuple | list) else (system.protocol,))


def _expanded(system: Any, path: str) -> list[str]:
    if system.isdir(path) or system.exists(path) or os.path.islink(path):  # a server that is down says so to the first
        return [path]
    if not re.search(r"[*?\[]", path):
        return []
    if _is_local(system):
        return _globbed(path)
    return [name for name in sorted(system.glob(path)) if "/." in path or "/." not in name]


def _globbed(pattern: str) -> list[str]:
    head, deep, tail = pattern.partition("/**")
    if not deep or tail[:1] not in ("", "/"):
        return layout.matches_of(pattern)
    found = list[str]()
    for top in layout.matches_of(f"{head}/"):
        for folder, names in _walk(top.rstrip("/") or "/", Counter(), None):
            shown = (os.path.join(folder, name) for name in names if name[0] != ".")
            found += _globbed(glob.escape(folder) + tail) if tail else shown
    return found


def _below(system: Any, folder: str, passed: Counter[str], outside: Path | None) -> Iterator[str]:
    if _is_local(system):
        yield from (os.path.join(top, name) for top, names in _walk(folder, passed, outside) for name in names)
        return
    for name in system.find(folder):
        hidden = "/." in name[len(folder) :]
        passed["hidden"] += hidden
        if not hidden:
            yield name


def _walk(folder: str, passed: Counter[str], outside: Path | None) -> Iterator[tuple[str, list[str]]]:
    """(a folder, names of its files), links followed, each folder once and no hidden one."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    seen = {os.path.realpath(outside)} if outside is not None else set[str]()
    for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(top)) in seen:
            folders.clear()
            continue
        seen.add(real)
        shown = sorted(name for name in folders if name[0] != ".")
        passed["hidden"] += len(folders) - len(shown)
        folders[:] = shown
        yield top, names


def _why_not(system: Any, path: str, also: Mapping[str, str] | None, inside: bool) -> str | None:
    """Why a file is not taken; None where it is. `inside`: it is not named, but lies in a folder that is."""
    if _is_local(system) and not os.path.isfile(path):
        return "special file" if os.path.exists(path) else "broken link"
    if not inside:
        return None
    name, kind = path.rpartition("/")[2].lower(), format_of(path, also)
    if name[0] == ".":
        return "hidden"
    if kind in (None, "txt") and (about := ABOUT.match(name)):
        return about[0].upper()
    if kind is not None:
        return None
    stem, suffix = os.path.splitext(name)
    return (os.path.splitext(stem)[1] if suffix in PACKED else "") + suffix or "without a suffix"

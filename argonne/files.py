"""One atomic directory for tokens, checkpoints, exports and caches.

A directory written here is complete and verified, or absent: it is filled under a temporary name, every file is fsynced
and hashed into `sha256.json` (`hashes.json` where a faster hash, XXH3 of 128 bits, was taken in writing), the
whole is renamed into place and the parent is fsynced. A process that dies at any point leaves only a temporary, which
`collect_temporaries` removes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.errors import InputError

HASH_LIST = "sha256.json"
QUICK_LIST = "hashes.json"
TEMPORARY = ".tmp-"
_ASIDE = re.compile(re.escape(TEMPORARY) + r"(.+)-old-\d+")


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def quick_hash() -> Any:
    """Tells damage, at the speed of memory; against forgery there is sha256."""
    import xxhash

    return xxhash.xxh3_128()


def quick_hash_of_file(path: Path) -> str:
    digest = quick_hash()
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return str(digest.hexdigest())


@dataclass(frozen=True)
class Seal:
    """Size and hash of a file as it was written."""

    bytes: int
    hash: str


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of `value`: equal content, equal fingerprint, whatever the key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` atomically: a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def json_text(value: Any, indent: int | None = None, *, ascii_only: bool = False) -> str:
    """`value` as JSON that any reader takes: null for what JSON has no word for, NaN and the infinities."""

    def finite(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: finite(inner) for name, inner in part.items()}
        if isinstance(part, list | tuple):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def human(number: float) -> str:
    """1234567 -> 1.23M."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def read_json(path: Path) -> Any:
    """Parsed JSON of a file. Raises InputError naming the file when it is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a JSON file ({error}); restore it or write it again") from None


def seal_directory(folder: Path, sealed: Mapping[str, Seal] | None = None) -> None:
    """Fsync every file, write their sizes and hashes into the folder's list, fsync the folders.

    sealed: files that are hashed and on the disk already; the list is then a `hashes.json`. What that proves: these are
    the bytes that were handed to the system, and it said that they are on the disk; `verify_directory` reads them back.
    Raises OSError for one that has another size.
    """
    name, key, digest = (
        (HASH_LIST, "sha256", sha256_of_file) if sealed is None else (QUICK_LIST, "xxh3_128", quick_hash_of_file)
    )
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (HASH_LIST, QUICK_LIST))
    entries: dict[str, Any] = {}
    for path in files:
        relative, size = path.relative_to(folder).as_posix(), path.stat().st_size
        known = (sealed or {}).get(relative)
        if known is None:
            fsync_path(path)
        elif known.bytes != size:
            raise OSError(f"{path}: has {size:,} bytes, {known.bytes:,} were written")
        entries[relative] = {"bytes": size, key: known.hash if known else digest(path)}
    write_json(folder / name, {"format_version": 1, "files": entries})
    (folder / (QUICK_LIST if name == HASH_LIST else HASH_LIST)).unlink(missing_ok=True)  # of a seal before this one
    for path in sorted({path.parent for path in files} | {folder}):
        fsync_path(path)


@contextmanager
def atomic_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends well, seal it and rename it to `target`.

    An existing `target` is an InputError unless `replace`: then the old one is moved aside first and removed after the
    rename, so that one complete directory exists at every moment under one of the two names.
    """
    if target.exists() and not replace:
        raise InputError(f"{target} exists already; choose another name or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{TEMPORARY}{target.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        seal_directory(temporary)
        if problems := verify_directory(temporary):
            raise OSError(f"{target}: what was written does not read back: {'; '.join(problems)}")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    publish_directory(temporary, target)


def publish_directory(temporary: Path, target: Path) -> None:
    """Rename a sealed folder into place and make the rename durable."""
    if target.exists():
        aside = target.parent / f"{TEMPORARY}{target.name}-old-{os.getpid()}"
        os.rename(target, aside)
        os.rename(temporary, target)
        fsync_path(target.parent)
        shutil.rmtree(aside)
    else:
        os.rename(temporary, target)
    fsync_path(target.parent)


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Inside, no other process is: it waits. The lock is as old as the process; its empty file stays."""
    import fcntl

    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hash_list_of(folder: Path) -> Path:
    """Where the hashes of a sealed folder lie, or would."""
    return folder / QUICK_LIST if (folder / QUICK_LIST).exists() else folder / HASH_LIST


def is_hash_list(tree: Any, key: str = "sha256") -> bool:
    """Is every entry one that can be compared? A flipped byte may as well have changed a key."""
    if not isinstance(tree, dict) or set(tree) != {"format_version", "files"} or tree["format_version"] != 1:
        return False
    entries = tree["files"].values() if isinstance(tree["files"], dict) else [None]
    return all(
        isinstance(entry, dict) and set(entry) == {"bytes", key} and isinstance(entry["bytes"], int)
        for entry in entries
    )


def verify_directory(folder: Path, *, hashes: bool = True) -> list[str]:
    """Compare a sealed folder with its hash list; return one line for each file that is missing, has another size or
    other bytes.
    """
    return list(damage_in(folder, hashes=hashes).values())


def damage_in(folder: Path, *, hashes: bool = True) -> dict[str, str]:
    """The lines of `verify_directory`, each by the name of the file in the folder; of a list that cannot be read, by
    the list's own.
    """
    hash_list = hash_list_of(folder)
    quick = hash_list.name == QUICK_LIST
    key, digest = ("xxh3_128", quick_hash_of_file) if quick else ("sha256", sha256_of_file)
    if not hash_list.exists():
        return {hash_list.name: f"{hash_list} is missing: the directory was never completed"}
    try:
        tree = json.loads(hash_list.read_text())
    except (OSError, ValueError) as error:
        return {hash_list.name: f"{hash_list} cannot be read: {error}"}
    if not is_hash_list(tree, key):
        return {hash_list.name: f"{hash_list} is damaged: not a list of files with sizes and hashes"}
    found = {}
    for name, entry in tree["files"].items():
        path = folder / name
        if not path.is_file():
            found[name] = f"{path} is missing"
        elif (size := path.stat().st_size) != entry["bytes"]:
            found[name] = f"{path} has {size:,} bytes, expected {entry['bytes']:,}"
        elif hashes and digest(path) != entry[key]:
            found[name] = f"{path} has other bytes than were written ({key} differs)"
    return found


def collect_temporaries(parent: Path) -> list[Path]:
    """Remove what killed writers left in `parent`; return what was removed. Only the owner of `parent` may call it.

    A directory that was moved aside for one that never came is put back, not removed.
    """
    removed = []
    for path in sorted(parent.glob(f"{TEMPORARY}*")) if parent.is_dir() else []:
        aside = _ASIDE.fullmatch(path.name)
        if aside and not (parent / aside[1]).exists():
            os.rename(path, parent / aside[1])
            fsync_path(parent)
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(path)
    return removed

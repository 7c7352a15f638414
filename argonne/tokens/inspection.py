"""What a token set is: counts, lineage, and whether every byte is still the one that was written."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from argonne import files, layout
from argonne.errors import InputError, first_line
from argonne.tokens.formats import open_tokens
from argonne.tokens.shards import Shard, TokenSet

CHUNK = 1 << 22
LARGEST_ID = (1 << 31) - 1


def inspect_tokens(path: Path | str, verify: bool = True) -> dict[str, Any]:
    """Facts about a token set of any known format. `problems` lists what is damaged; empty = every check passed.

    With `verify`, every byte of our own format is compared with its hash; of a foreign format, which has none, that
    every id is inside the vocabulary where the tokenizer is known. Raises InputError when `path` is no token set at
    all.
    """
    path = Path(path)
    problems = []
    if (path / layout.MANIFEST).exists() or (path / files.HASH_LIST).exists():
        problems += _unsealed(path, verify, layout.MANIFEST)
        # Of a tokenizer that was trained here: the set's own list does not name it.
        if (path / layout.TOKENIZER / files.HASH_LIST).exists():
            problems += _unsealed(path / layout.TOKENIZER, verify)
    try:
        opened = open_tokens(path)
    except InputError as error:
        if not problems:
            raise
        return {"kind": "tokens", "path": str(path), "problems": [*problems, str(error)], "verified": verify}
    if verify:
        problems += [*_ends_outside(opened), *([] if path.is_dir() else _ids_outside(opened))]
    # Of a foreign file no byte can be compared with what was written.
    return {**_facts(opened), "problems": problems, "verified": verify and opened.format == "shards"}


def _facts(opened: TokenSet) -> dict[str, Any]:
    """Counts first, in the order in which they add up, then where it came from."""
    manifest = opened.manifest

    def recorded(*names: str) -> dict[str, Any]:
        return {name: manifest[name] for name in names if name in manifest}

    return {
        "kind": "tokens",
        "path": str(opened.path),
        "format": opened.format,
        "dtype": opened.dtype,
        **recorded("rows"),
        "documents": opened.documents,
        "held_out_documents": opened.held_out.documents or 0,
        **recorded("drops", "text_bytes"),
        "tokens": opened.tokens,
        "held_out_tokens": opened.held_out.tokens,
        "shards": len(opened.train.shards),
        "bytes": sum(shard.path.stat().st_size for shard in [*opened.train.shards, *opened.held_out.shards]),
        "fingerprint": opened.fingerprint,
        **recorded("tokenizer", "recipe", "sources", "sources_file", "evaluation_files", "bad_files"),
    }


def _unsealed(folder: Path, verify: bool, *others: str) -> list[str]:
    """Lines for what differs from the hash list of `folder`, and for the list or one of `others` where it is not as
    `files.write_json` writes: they are checked by writing them anew."""
    problems, listed = [], None
    for path in (folder / name for name in (files.HASH_LIST, *others)):
        try:
            content = path.read_bytes()
            tree = json.loads(content)
            same = (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode() == content
        except (OSError, ValueError) as error:
            problems.append(f"{path}: cannot be read ({error})")
            continue
        if path.name == files.HASH_LIST:
            listed = tree if files.is_hash_list(tree) else None
        if not same or (path.name == files.HASH_LIST and listed is None):
            problems.append(f"{path}: not as it was written; restore it or prepare again")
    if listed is None:
        return problems
    ours = {
        layout.TOKENS_LOCK,
        layout.TOKENS_TURN,
        files.HASH_LIST,
        f"{layout.TOKENIZER}/{files.HASH_LIST}",
        *listed["files"],
    }
    # A name that the list does not know: a damaged one in it, or somebody else's file.
    unknown = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - ours
    strangers = [
        f"{folder / name}: is not named in {files.HASH_LIST}; if it is yours, move it elsewhere"
        for name in sorted(unknown)
    ]
    return files.verify_directory(folder, hashes=verify) + problems + strangers


def _ends_outside(opened: TokenSet) -> Iterator[str]:
    """A line for each shard whose document ends are not in its tokens."""
    for stream in (opened.train, opened.held_out):
        for number in range(len(stream.shards)):
            try:
                stream.shard_ends(number)
            except InputError as error:
                yield str(error)


def _ids_outside(opened: TokenSet) -> list[str]:
    """One line for each shard that holds an id outside the vocabulary."""
    from argonne.tokens.tokenizer import load_tokenizer

    limit = opened.vocab_size
    if limit is None and opened.tokenizer_folder is not None:
        limit = load_tokenizer(opened.tokenizer_folder).vocab_size
    said = "which no vocabulary has" if limit is None else f"the vocabulary has {limit:,}"
    limit, problems = limit or LARGEST_ID, []
    for stream in (opened.train, opened.held_out):
        for number, shard in enumerate(stream.shards):
            tokens = stream.shard_tokens(number)
            for start in range(0, len(tokens), CHUNK):
                piece = tokens[start : start + CHUNK]
                if len(piece) and not 0 <= int(piece.min()) <= int(piece.max()) < limit:
                    outside = int(((piece < 0) | (piece >= limit)).argmax())
                    found = f"token {start + outside:,} has id {int(piece[outside]):,}"
                    problems.append(f"{shard.path}: {found}, {said}")
                    break
    return problems


class Verification:
    """Hashes of the shards, checked while training already runs: a thread reads each file once, and a mismatch stops
    the run at its next step.

    What was found right is kept in `folder`, by path, size and time of change, and not read again.
    """

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

    def start(self) -> None:
        """Check in the background."""
        self._thread = threading.Thread(target=self.run, name="argonne-verify", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Check everything that is not known to be right; the first fault, or whatever else ends the check, is kept in
        `problem`.
        """
        try:
            self._check()
        except Exception as error:  # in a thread nobody would hear of it, and nothing more would be checked
            self.problem = f"the check of the hashes of the shards ended: {type(error).__name__}: {first_line(error)}"

    def _check(self) -> None:
        known: dict[str, Any] = (
            files.read_json(self._record) if self._record is not None and self._record.exists() else {}
        )
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
        if self._record is not None and self._record.parent.is_dir():
            try:
                files.write_json(self._record, known)
            except OSError as error:  # a full disk: the shards are right, and checked again at the next start
                print(f"warning: {self._record}: {error}", file=sys.stderr, flush=True)

    def _hash(self, path: Path) -> str | None:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                if self._stop.is_set():
                    return None
                digest.update(chunk)
        return digest.hexdigest()

    def close(self) -> None:
        """End the thread; what it has checked so far is kept."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

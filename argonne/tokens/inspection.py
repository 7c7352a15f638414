"""What a token set is: counts, lineage, and whether every byte is still the one that was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from argonne import files, layout
from argonne.errors import InputError
from argonne.tokens.formats import open_tokens
from argonne.tokens.shards import TokenSet


def inspect_tokens(path: Path | str, verify: bool = True) -> dict[str, Any]:
    """Facts about a token set of any known format. `problems` lists what is damaged; empty = every check passed.

    With `verify`, every byte of our own format is compared with its hash; of a foreign format, which has none, that every id is inside the
    vocabulary where the tokenizer is known. Raises InputError when `path` is no token set at all.
    """
    path = Path(path)
    problems = _damaged(path, verify) if path.is_dir() else []
    try:
        opened = open_tokens(path)
    except InputError as error:
        if not problems:
            raise
        return {"kind": "tokens", "path": str(path), "problems": [*problems, str(error)], "verified": verify}
    if verify and not path.is_dir():
        problems += ids_outside(opened)
    return {**_facts(opened), "problems": problems, "verified": verify}


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
        **recorded("tokenizer", "recipe", "sources", "evaluation_files", "bad_files"),
    }


def _damaged(folder: Path, verify: bool) -> list[str]:
    """Lines for files of a token set folder that differ from the hash list. The list itself is checked by writing it anew."""
    hash_list = folder / files.HASH_LIST
    if not (folder / layout.MANIFEST).exists() and not hash_list.exists():
        return []
    problems = _unsealed(folder, verify, layout.MANIFEST)
    if (folder / layout.TOKENIZER / files.HASH_LIST).exists():  # of a tokenizer that was trained here; the set's own list does not name it
        problems += _unsealed(folder / layout.TOKENIZER, verify)
    return problems


def _unsealed(folder: Path, verify: bool, *others: str) -> list[str]:
    """Lines for what differs from the hash list of `folder`, and for the list or one of `others` where it is not as `files.write_json` writes."""
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
    return files.verify_directory(folder, hashes=verify) + problems + _strangers(folder, listed)


def _strangers(folder: Path, listed: dict[str, Any]) -> list[str]:
    """Lines for files that the hash list does not name: a damaged name in it, or somebody else's file."""
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (layout.TOKENS_LOCK, layout.TOKENS_TURN)
    }
    unknown = found - {files.HASH_LIST, f"{layout.TOKENIZER}/{files.HASH_LIST}"} - set(listed["files"])
    return [f"{folder / name}: is not named in {files.HASH_LIST}; if it is yours, move it elsewhere" for name in sorted(unknown)]


def ids_outside(opened: TokenSet, vocab_size: int | None = None) -> list[str]:
    """One line for each shard that holds an id past the vocabulary."""
    from argonne.tokens.tokenizer import load_tokenizer

    limit = vocab_size or opened.vocab_size
    if limit is None and opened.tokenizer_folder is not None:
        limit = load_tokenizer(opened.tokenizer_folder).vocab_size
    if limit is None:
        return []
    problems = []
    for stream in (opened.train, opened.held_out):
        for number, shard in enumerate(stream.shards):
            mapped = stream.shard_tokens(number)
            for start in range(0, len(mapped), 1 << 22):
                piece = mapped[start : start + (1 << 22)]
                if len(piece) and int(piece.max()) >= limit:
                    place = start + int((piece >= limit).argmax())
                    problems.append(f"{shard.path}: token {place:,} has id {int(mapped[place]):,}, the vocabulary has {limit:,}")
                    break
    return problems

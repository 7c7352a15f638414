"""Which files hold text, and token sets written by others, opened in place.

By path: a folder of ours; a token file with a header (the family's `train.bin`, llm.c) or a glob of them; Megatron's
`.bin` with `.idx`; datatrove's `.ds`; the family's document manifest (`.json`). By prefix, because nothing in the file
tells: `raw-uint16:PATH` (nanoGPT), `raw-uint32:PATH`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from argonne import files, layout
from argonne.errors import InputError, first_line
from argonne.tokens.shards import Shard, TokenSet, TokenStream, open_folder, read_header

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {8: "uint16", 4: "int32", 3: "int16", 5: "int64", 1: "uint8"}
SAMPLES, SAMPLE_BYTES = 64, 4096
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zstd")
TEXT_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".jl": "jsonl", ".json": "jsonl", ".txt": "txt", ".md": "txt"}
SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"} | {
    plain + packed: kind
    for plain, kind in TEXT_KINDS.items()
    for packed in ("", *PACKED)
    if plain + packed != ".json"  # may be one array, which would have to be read at once
}
KINDS = f".parquet, .arrow, .jsonl, .ndjson, .jl, .txt or .md, the text kinds also with {', '.join(PACKED)}"


def natural_key(path: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `shard_2` before `shard_10`; equal numbers written differently keep a fixed order."""
    pieces = re.split(r"(\d+)", path)
    return [(0, int(piece), piece) if piece.isdigit() and piece.isascii() else (1, 0, piece) for piece in pieces]


def format_of(path: str, also: Mapping[str, str] | None = None) -> str | None:
    """The kind of a text file by its name; None where that is none of a text file."""
    name = path.rsplit("/", 1)[-1].lower()
    return next((kind for suffix, kind in {**SUFFIXES, **(also or {})}.items() if name.endswith(suffix)), None)


def open_tokens(path: Path | str) -> TokenSet:
    """Open a token set of any kind after checking headers, sizes and manifest (not hashes: `inspect_tokens` and
    `data.verify`).

    Raises InputError naming the file that is missing, truncated, of another format or not what the manifest says.
    """
    text = str(path)
    for prefix, dtype in layout.RAW_TOKENS.items():
        if text.startswith(prefix):
            return _raw(Path(text[len(prefix) :]), dtype)
    path = Path(text)
    if path.is_dir():
        return open_folder(path)
    if layout.is_pattern(text):
        return _headed([Path(name) for name in sorted(layout.matches_of(text), key=natural_key)], text)
    if not path.exists():
        raise InputError(f"token set {text}: no such file or folder; write one with `argonne prepare`")
    if format_of(text):
        raise InputError(
            f"{path}: is text, not tokens; make a token set of it with `argonne prepare`, or name it in data.input"
        )
    if path.suffix == ".ds":
        return _datatrove(path)
    if path.suffix == ".json":
        return _document_manifest(path)
    if path.suffix == ".idx" or path.with_suffix(".idx").exists():
        index, tokens = path.with_suffix(".idx"), path.with_suffix(".bin")
        if index.exists() and tokens.exists() and _begins_with(index, MEGATRON_MAGIC):
            return _megatron(tokens, index)
    return _headed([path], text)


def _begins_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _headed(paths: Sequence[Path], text: str) -> TokenSet:
    """Token files with a header, read as one stream in natural order."""
    if not paths:
        raise InputError(f"token set {text}: matches no file; check the pattern")
    found = [(path, *read_header(path)) for path in paths]
    if len({dtype for _, dtype, _ in found}) > 1:
        raise InputError(f"token set {text}: uint16 and uint32 files together; name them as two sources")
    shards = []
    for path, dtype, tokens in found:
        index = layout.index_of(path)
        ours = index.exists() and index.stat().st_size % 8 == 0 and not _begins_with(index, MEGATRON_MAGIC)
        shards.append(Shard(path, dtype, tokens, index=index if ours else None))
    return _foreign(paths[0], "train.bin", shards)


def _raw(path: Path, dtype: str) -> TokenSet:
    if not path.is_file():
        raise InputError(f"token set {path}: no such file")
    size = path.stat().st_size
    width = np.dtype(dtype).itemsize
    if size % width or not size:
        raise InputError(
            f"{path}: {size:,} bytes are no whole number of {dtype} tokens; truncated, or of another width"
        )
    return _foreign(path, f"raw {dtype}", [Shard(path, dtype, size // width, offset=0)])


def _datatrove(path: Path) -> TokenSet:
    index = path.with_name(path.name + ".index")
    if not index.is_file():
        raise InputError(f"{path}: its document index {index.name} is missing beside it")
    ends = _ascending(index, np.fromfile(index, dtype="<u8"))
    size, tokens = path.stat().st_size, int(ends[-1]) if len(ends) else 0
    dtype = {2 * tokens: "uint16", 4 * tokens: "uint32"}.get(size)
    if dtype is None or not tokens:
        raise InputError(
            f"{path}: {size:,} bytes, but {index.name} counts {tokens:,} tokens; truncated or not of one run"
        )
    return _foreign(path, "datatrove", [Shard(path, dtype, tokens, offset=0, ends=ends)], len(ends))


def _megatron(path: Path, index: Path) -> TokenSet:
    """Megatron-LM's indexed dataset, version 1."""
    head = np.fromfile(index, dtype=np.uint8)
    if len(head) < 34 or int(head[9:17].view("<u8")[0]) != 1:
        raise InputError(f"{index}: not an index of Megatron's version 1; truncated or of a later version")
    dtype = MEGATRON_DTYPES.get(int(head[17]))
    sequences, bounds = (int(value) for value in head[18:34].view("<u8"))
    if dtype is None:
        raise InputError(
            f"{index}: token type code {int(head[17])}, expected one of {', '.join(map(str, MEGATRON_DTYPES))}"
        )
    if len(head) != 34 + 12 * sequences + 8 * bounds:
        raise InputError(
            f"{index}: {len(head):,} bytes, expected {34 + 12 * sequences + 8 * bounds:,}; truncated, write it again"
        )
    sizes = head[34 : 34 + 4 * sequences].view("<i4").astype(np.int64)
    pointers = head[34 + 4 * sequences : 34 + 12 * sequences].view("<i8")
    documents = head[34 + 12 * sequences :].view("<i8")
    ends = np.concatenate([[0], np.cumsum(sizes)])
    width = np.dtype(dtype).itemsize
    if not np.array_equal(pointers, ends[:-1] * width):
        raise InputError(
            f"{index}: its sequences do not lie one after the other in {path.name}; merge it with Megatron's own tool "
            "first"
        )
    if (size := path.stat().st_size) != int(ends[-1]) * width:
        raise InputError(
            f"{path}: {size:,} bytes, its index counts {int(ends[-1]):,} {dtype} tokens; truncated, write it again"
        )
    if (sizes < 0).any() or (documents < 0).any() or documents.max(initial=0) > sequences:
        raise InputError(f"{index}: its sequences or documents lie outside {path.name}; damaged, write it again")
    document_ends = _ascending(index, ends[documents[documents > 0]])
    return _foreign(
        path, "megatron", [Shard(path, dtype, int(ends[-1]), offset=0, ends=document_ends)], len(document_ends)
    )


def _document_manifest(path: Path) -> TokenSet:
    """The family's own list of long documents: headerless uint32 files, each with the lengths of its
    documents as .npy.
    """
    tree = files.read_json(path)
    if not isinstance(tree, dict) or not isinstance(tree.get("files"), list):
        raise InputError(f"{path}: no document manifest (no list 'files' in it)")
    shards, documents = [], 0
    for number, entry in enumerate(tree["files"]):
        try:
            tokens, lengths = (path.parent / entry[name] for name in ("bin_path", "lengths_path"))
        except (TypeError, KeyError):
            raise InputError(
                f"{path}: entry {number} of files: found {entry!r}, expected one with bin_path and lengths_path"
            ) from None
        for file in (tokens, lengths):
            if not file.is_file():
                raise InputError(f"{path}: names {file}, which is missing")
        ends = _ascending(lengths, np.cumsum(_lengths(lengths), dtype=np.int64))
        total = int(ends[-1]) if len(ends) else 0
        if (size := tokens.stat().st_size) != 4 * total:
            raise InputError(
                f"{tokens}: {size:,} bytes, {lengths.name} counts {total:,} uint32 tokens; truncated, write it again"
            )
        shards.append(Shard(tokens, "uint32", total, offset=0, ends=ends))
        documents += len(ends)
    if not shards:
        raise InputError(f"{path}: names no file")
    return _foreign(path, "document manifest", shards, documents)


def _lengths(path: Path) -> np.ndarray:
    """The numbers of a .npy. Raises InputError where it holds something else."""
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise InputError(f"{path}: not a readable .npy of numbers ({first_line(error)}); write it again") from None
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu":
        kind = f"{found.dtype} of shape {found.shape}" if isinstance(found, np.ndarray) else "an archive"
        raise InputError(f"{path}: holds {kind}, expected one row of whole numbers, the lengths of the documents")
    return found


def _ascending(path: Path, ends: np.ndarray) -> np.ndarray:
    """Document ends as int64. Raises InputError where one lies before the one before it: a length was negative."""
    found = ends.astype(np.int64)
    if len(wrong := np.flatnonzero(np.diff(found, prepend=0) < 0)):
        place = int(wrong[0])
        raise InputError(f"{path}: document {place:,} ends at token {int(ends[place]):,}, before it begins; damaged")
    return found


def _foreign(path: Path, kind: str, shards: list[Shard], documents: int | None = None) -> TokenSet:
    """A token set without a manifest of ours: its fingerprint is taken from sizes and samples, its tokenizer from the
    folder beside it.
    """
    folder = path.parent / layout.TOKENIZER
    fingerprint = files.fingerprint([[shard.path.name, shard.tokens, _sample(shard.path)] for shard in shards])
    stream = TokenStream(shards, documents)
    return TokenSet(
        path, kind, shards[0].dtype, fingerprint, stream, tokenizer_folder=folder if folder.is_dir() else None
    )


def _sample(path: Path) -> str:
    """Hash of 64 pieces of 4 KiB spread over the file: cheap for 80 GB, and another tokenisation of another corpus
    never has it.
    """
    digest = hashlib.sha256()
    size = path.stat().st_size
    with open(path, "rb") as file:
        for number in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()

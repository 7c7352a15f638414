"""Token sets written by others, opened in place: the family's `train.bin`, llm.c, nanoGPT, Megatron and datatrove."""

from __future__ import annotations

from pathlib import Path

from argonne import files
from argonne.data.tokens import Shard, TokenSet, TokenStream, open_folder, read_header
from argonne.errors import InputError


def open_any(text: str) -> TokenSet:
    """Open whatever `text` names. Raises InputError when it is no token set."""
    path = Path(text)
    if path.is_dir():
        return open_folder(path)
    if not path.exists():
        raise InputError(f"token set {text}: no such file or folder; write one with `argonne prepare`")
    return open_headed(path)


def open_headed(path: Path) -> TokenSet:
    """A single token file with a header: the family's `train.bin`, or a shard of llm.c's."""
    dtype, tokens = read_header(path)
    return foreign(path, "train.bin", [Shard(path, dtype, tokens)])


def foreign(path: Path, kind: str, shards: list[Shard], documents: int | None = None) -> TokenSet:
    """A token set without a manifest: its fingerprint is taken from sizes and sampled bytes, its tokenizer from the folder beside it."""
    folder = path.parent / "tokenizer"
    return TokenSet(
        path=path,
        format=kind,
        dtype=shards[0].dtype,
        vocab_size=None,
        fingerprint=files.fingerprint([[shard.path.name, shard.tokens, _sample(shard)] for shard in shards]),
        train=TokenStream(shards, documents),
        held_out=TokenStream([]),
        tokenizer_folder=folder if folder.is_dir() else None,
        tokenizer_fingerprint=None,
        eos_id=None,
        manifest={},
    )


def _sample(shard: Shard) -> str:
    """Hash of 64 pieces of 4 KiB spread over the file: cheap for 80 GB, and another tokenisation of another corpus never has it."""
    import hashlib

    digest = hashlib.sha256()
    size = shard.path.stat().st_size
    with open(shard.path, "rb") as file:
        for number in range(64):
            file.seek(max(0, size - 4096) * number // 63)
            digest.update(file.read(4096))
    return digest.hexdigest()

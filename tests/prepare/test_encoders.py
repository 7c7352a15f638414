"""Every kind of tokenizer through `prepare`: the ids are those of the `tokenizers` library alone,
document by document.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from argonne.prepare import encoders, texts
from argonne.prepare.encoders import any_newer
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.prepare.progress import ProgressBar
from argonne.tokens.tokenizer import load_tokenizer
from tests.prepare.helpers import documents_of, jsonl, long_text
from tests.tokensets import words

TEXTS = [
    "the quick brown fox",
    " begins with a space",
    "ends with spaces   ",
    "\n\n  two lines\r\nand\ttabs",
    "quotes <|im_end|> and <|endoftext|></s> and <s> <unk> <pad> inside",
    "<think>so</think> <tool_call>{}</tool_call>",
    "</s>",
    "cafe\u0301 Zu\u0308rich \u212b \ufb01 \u1112\u1161\u11ab",
    "a nul \0 and \x07 and \x7f",
    "😀👩‍👩‍👧‍👦 🏳️‍🌈 你好，世界 こんにちは नमस्ते",
    "\ufeffbegins with a mark",
    "▁already ▁▁ marked",
    "x" * 400,
    *(words(60, seed) for seed in range(5)),
]

# Letters and marks that the Unicode tables of gigatoken and of tokenizers see otherwise, after more documents than are
# compared beforehand.
NEWER = [*(f"plain {number}" for number in range(600)), "\U00032df0\\n", "\u1ac6\u05b9", "\U00032ede<A", "\u0301\u08d3"]


def long_document(size: int) -> str:
    """Megabytes with everything in them that makes tokenizers differ."""
    text = long_text(size // 2)
    return text + "\n".join(TEXTS) + "\n" + text


def llama_like(metaspace: str | None = None) -> Callable[[Path], Tokenizer]:
    """BPE over characters with bytes for the unknown ones: no pre-tokens (Llama 2), or a Metaspace (Llama as some
    convert it).
    """

    def build(folder: Path) -> Tokenizer:
        small = Tokenizer(models.BPE(unk_token="<unk>"))
        small.pre_tokenizer = pre_tokenizers.Metaspace()
        control = ["<unk>", "<s>", "</s>"]
        bytes_ = [f"<0x{value:02X}>" for value in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*control, *bytes_], show_progress=False)
        small.train_from_iterator([words(200, seed).replace("<|im_end|>", "") for seed in range(30)], trainer)
        model = json.loads(small.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if metaspace is None:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=metaspace == "always")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
        return Tokenizer.from_file(str(folder / "tokenizer.json"))

    return build


def byte_level(folder: Path) -> Tokenizer:
    """A byte-level one with a prefix space, where no place in a text is safe to cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words(200, seed) for seed in range(10)], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


BUILT = {
    "llama": llama_like(),
    "llama-metaspace-first": llama_like("first"),
    "llama-metaspace-always": llama_like("always"),
    "prefix-space": byte_level,
}


@pytest.fixture(params=["small", pytest.param("3 MB", marks=pytest.mark.campaign)])
def long(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A document that is encoded in pieces: of 3 MB, or, for every day, of 150 kB with the limits as much smaller."""
    if request.param == "3 MB":
        return long_document(3_000_000)
    monkeypatch.setattr(texts, "LONG_CHARACTERS", 50_000)
    monkeypatch.setattr(encoders, "PIECE_BYTES", 40_000)
    monkeypatch.setattr(encoders, "WHOLE_WITHIN_BYTES", 800_000)
    return long_document(150_000)


def without_added(tokenizer: Tokenizer) -> Tokenizer:
    """The same without added tokens: what `--added-tokens plain` means."""
    return Tokenizer.from_str(
        json.dumps({**json.loads(tokenizer.to_str()), "added_tokens": [], "post_processor": None})
    )


def check(reference: Tokenizer, folder: Path, tmp_path: Path, documents: list[str], **more: Any) -> str:
    """Prepare the documents and compare the ids of each with the reference; what was said."""
    jsonl(tmp_path / "in.jsonl", [{"text": text} for text in documents])
    said = io.StringIO()
    out = prepare(
        PrepareOptions((str(tmp_path / "in.jsonl"),), tmp_path / "out", folder, workers=1, **more),
        ProgressBar("prepare", 0, said),
    )
    reference.encode_special_tokens = True
    eos = json.loads((out / "manifest.json").read_text())["tokenizer"]["eos_id"]
    expected = [[*reference.encode(text, add_special_tokens=False).ids, eos] for text in documents]
    found = documents_of(out)
    assert len(found) == len(documents)
    for text, ids, wanted in zip(documents, found, expected, strict=True):
        assert ids == wanted, text[:80]
    return said.getvalue()


@pytest.mark.parametrize("added", ["library", "plain"])
@pytest.mark.parametrize("name", BUILT)
def test_ids_are_those_of_tokenizers_whatever_the_kind(name: str, added: str, long: str, tmp_path: Path) -> None:
    whole = BUILT[name](tmp_path / "tokenizer")
    reference = whole if added == "library" else without_added(whole)
    said = check(reference, tmp_path / "tokenizer", tmp_path, [*TEXTS, long], added_tokens=added)
    assert "encoder: gigatoken, same ids as tokenizers" in said or "encoder: tokenizers (gigatoken " in said


@pytest.mark.parametrize(
    ("name", "added"), [pytest.param("qwen2.5", "plain", marks=pytest.mark.campaign), ("qwen3", "library")]
)
def test_ids_of_the_qwen_tokenizers_are_those_of_tokenizers(
    shared: Path, name: str, added: str, long: str, tmp_path: Path
) -> None:
    folder = shared / "tokenizers" / name
    whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference = whole if added == "library" else without_added(whole)
    check(reference, folder, tmp_path, [*TEXTS, *NEWER, long], added_tokens=added)


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_every_character_in_three_surroundings_gets_the_ids_of_tokenizers_or_is_listed(shared: Path, name: str) -> None:
    pytest.importorskip("gigatoken")
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    fast, slow = encoders.FastEncoder(tokenizer), encoders.ReferenceEncoder(tokenizer)
    characters = [chr(code) for code in [*range(0xD800), *range(0xE000, 0x33500), *range(0xE0000, 0xE0200)]]
    characters = [character for character in characters if not any_newer([character])]
    for start in range(0, len(characters), 20_000):
        part = characters[start : start + 20_000]
        batch = [text for c in part for text in (f"{c}<A", f"\u0301{c}\u05b9", f"1{c}2 ")]
        (expected, lengths), (ids, found) = slow.encode(batch), fast.encode(batch)
        assert [ascii(batch[int(number)]) for number in np.nonzero(lengths != found)[0][:5]] == []
        assert np.array_equal(ids, expected)


def test_ids_of_gpt_2_from_vocabulary_and_merges_are_those_of_tokenizers(
    shared: Path, long: str, tmp_path: Path
) -> None:
    folder = shared / "tokenizers" / "gpt2"
    reference = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    said = check(reference, folder, tmp_path, [*TEXTS, long])
    assert "encoder: " in said


@pytest.mark.parametrize("encoder", ["tokenizers", "gigatoken"])
def test_a_named_encoder_is_used_or_refused_and_gives_the_same_ids(
    encoder: str, long: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gigatoken")
    reference = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    said = check(reference, tokenizer_folder, tmp_path, [*TEXTS, long], encoder=encoder)
    assert f"encoder: {encoder}" in said


def test_without_gigatoken_the_reference_goes_on_and_says_so(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders._gigatoken.cache_clear()
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    reference = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    said = check(reference, tokenizer_folder, tmp_path, TEXTS)
    assert "encoder: tokenizers (gigatoken is not installed: pip install 'argonne[fast]'" in said

"""No text comes to hold a control token, whatever kind of tokenizer it is; the document's end is not the turn's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from argonne.data.chat import ChatTemplate, Conversation, Message
from argonne.errors import InputError
from argonne.layout import TURN_TOKENS
from argonne.prepare import encoders
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.tokens.shards import dtype_for
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer
from tests.prepare.helpers import QUIET, documents_of, jsonl
from tests.tokensets import words

LETTERS = [chr(code) for code in range(33, 127)]
CONTROL = ["<unk>", "<pad>", "<s>", "</s>"]
QUOTED = [*CONTROL, *TURN_TOKENS, "<|endoftext|>", "<eos>", "</S>", "＜/s＞"]
REAL = ("tokenizers/qwen3", "tokenizers/gpt2", "cases/eos_inside/unigram", "cases/eos_inside/wordlevel")
MORE = ("cases/eos_inside/eosplain", "cases/tokenizer_hole/hole_eos", "cases/tokenizer_hole/hole_small")


def write(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def numbered(entries: list[str]) -> dict[str, int]:
    return {entry: number for number, entry in enumerate(dict.fromkeys(entries))}


def unigram(folder: Path) -> Path:
    """Its end of text, and a tool token that is no control token, are entries; one more lies behind them."""
    pieces = [*CONTROL, *TURN_TOKENS, "▁", "<tool>", *LETTERS, "▁the", "or", "en"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(len(piece) < 2)) for piece in pieces], unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in [*CONTROL, *TURN_TOKENS]])
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("<late>")])
    return write(folder, tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


def word_level(folder: Path) -> Path:
    """Nothing but entries: no added token says which of them control. An entry lies far behind the others."""
    entries = numbered([*CONTROL, *TURN_TOKENS, "the", "quick", "fox"]) | {"far": 90_000}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return write(folder, tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


def word_piece(folder: Path) -> Path:
    """In small letters, so that `</S>` is its end of text too."""
    entries = numbered([*CONTROL, *TURN_TOKENS, *LETTERS, *(f"##{letter}" for letter in LETTERS), "the", "##or"])
    tokenizer = Tokenizer(models.WordPiece(entries, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=True) for token in CONTROL])
    return write(folder, tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


def merged(folder: Path) -> Path:
    """BPE whose merges spell its end of text."""
    parts = ["<", "/", "s", ">", "</", "</s", "</s>", "a", "</s>a", "b", " ", "p", "d", "<p"]
    merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("</s>", "a"), ("<", "p")]
    return write(folder, Tokenizer(models.BPE(numbered(parts), merges)), eos_token="</s>")


def open_byte_level(folder: Path, base: Path) -> Path:
    """Ours with `special: false` throughout, and two ends of text of which the configuration names the second."""
    folder = Path(shutil.copytree(base, folder))
    tree = json.loads((folder / "tokenizer.json").read_text())
    for token in tree["added_tokens"]:
        token["special"] = False
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 400, "content": "</s>"})
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<|pad|>"}))
    return folder


BUILT = {"unigram": unigram, "word_level": word_level, "word_piece": word_piece, "merged": merged}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, TextTokenizer]:
    """Of every kind: built here, and those that developers have."""
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {name: build(folder / name) for name, build in BUILT.items()}
    found |= {"byte_level": tokenizer_folder, "open": open_byte_level(folder / "open", tokenizer_folder)}
    shared = Path(__file__).parents[3] / "shared"
    found |= {path: shared / path for path in (*REAL, *MORE) if (shared / path).is_dir()}
    return {name: load_tokenizer(path) for name, path in found.items()}


def spelled(tokenizer: TextTokenizer) -> list[str]:
    """What the control tokens of a tokenizer are written as."""
    return [tokenizer.decode([token_id]).strip() for token_id in tokenizer.controls]


@settings(max_examples=60)
@given(data=st.data())
def test_no_text_makes_a_control_token_and_what_is_written_fits(
    tokenizers: dict[str, TextTokenizer], data: st.DataObject
) -> None:
    quoted = [*QUOTED, "the", "or", " ", "\n", "a", "é\u0301"]
    for name, tokenizer in tokenizers.items():
        pieces = st.one_of(st.sampled_from([*quoted, *spelled(tokenizer)]), st.text(max_size=3))
        texts = [*data.draw(st.lists(st.lists(pieces, max_size=6).map("".join), max_size=3)), *spelled(tokenizer)]
        ids, lengths = encoders.ReferenceEncoder(tokenizer).encode(texts)
        assert not {*ids.tolist()} & tokenizer.controls, (name, texts)
        assert int(lengths.sum()) == len(ids)
        assert max([*ids.tolist(), tokenizer.eos_id or 0]) < tokenizer.vocab_size, name
        assert tokenizer.vocab_size - 1 <= np.iinfo(dtype_for(tokenizer.vocab_size)).max


@pytest.mark.parametrize("name", ["unigram", "byte_level", "open"])
def test_a_text_that_quotes_a_control_token_comes_back(tokenizers: dict[str, TextTokenizer], name: str) -> None:
    text = "the </s> or<pad><s> <|im_end|>"
    assert tokenizers[name].decode(tokenizers[name].encode(text)) == text


@pytest.mark.parametrize("name", [*BUILT, "open"])
def test_every_other_text_keeps_its_ids(tokenizers: dict[str, TextTokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    plain = Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    for text in (
        "the quick fox",
        " the or  en\n",
        "a<tool>b <late>",
        "far",
        "ab d",
        *(words(20, seed) for seed in range(5)),
    ):
        expected = plain.encode(text.replace("<|im_end|>", ""), add_special_tokens=False).ids
        assert tokenizer.encode(text.replace("<|im_end|>", "")) == expected


@pytest.mark.parametrize("name", [*BUILT, "open"])
def test_a_page_ends_no_document(name: str, tokenizers: dict[str, TextTokenizer], tmp_path: Path) -> None:
    folder, texts = tokenizers[name].folder, [f"the {token}{token} fox {token}" for token in QUOTED]
    source = jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    documents = documents_of(prepare(PrepareOptions((str(source),), tmp_path / "out", folder, workers=1), QUIET))
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    eos_id, highest = told["tokenizer"]["eos_id"], max(load_tokenizer(folder).entries.values())
    assert [ids.index(eos_id) for ids in documents] == [len(ids) - 1 for ids in documents]
    assert len(documents) == len(texts)
    assert (told["tokenizer"]["vocab_size"], told["dtype"]) == (highest + 1, dtype_for(highest + 1))


@pytest.mark.parametrize("name", ["unigram", "word_level", "word_piece", "open"])
def test_a_user_who_types_a_control_token_ends_no_turn(tokenizers: dict[str, TextTokenizer], name: str) -> None:
    template = ChatTemplate(tokenizers[name])
    said = Conversation((Message("user", " <|im_end|> </s> <|im_end|>"), Message("assistant", "the <|im_end|> fox")))
    ids = template.render(said).ids.tolist()
    assert ids.count(template.turn_end_id) == 2
    assert tokenizers[name].eos_id not in ids


def test_gigatoken_gives_the_same_or_is_not_used(tokenizers: dict[str, TextTokenizer]) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is an extra: pip install 'argonne[fast]'")
    for name, tokenizer in tokenizers.items():
        chosen, reason = encoders.choose(tokenizer, "auto", spelled(tokenizer))
        texts = [f"the {token}{token} {token}or" for token in spelled(tokenizer)]
        ids = encoders.load(chosen, tokenizer).encode(texts)[0]
        assert not {*ids.tolist()} & tokenizer.controls, (name, reason)
        assert np.array_equal(ids, encoders.load("tokenizers", tokenizer).encode(texts)[0]), (name, reason)


def test_bytes_and_structure_know_that_a_control_token_is_no_text(tokenizers: dict[str, TextTokenizer]) -> None:
    for tokenizer in tokenizers.values():
        assert not tokenizer.token_bytes[sorted(tokenizer.controls)].any()


def refused(folder: Path, tokenizer: Tokenizer, **config: Any) -> None:
    loaded = load_tokenizer(write(folder, tokenizer, **config))
    loaded.check_text(loaded.controls)


def test_an_unknown_token_that_ends_documents_is_refused(tmp_path: Path) -> None:
    model = models.WordLevel(numbered(["<eos>", "the"]), unk_token="<eos>")
    with pytest.raises(InputError, match=r"'<eos>' \(id 0\) is no word, and a text can make it.*another tokenizer"):
        refused(tmp_path / "made", Tokenizer(model), eos_token="<eos>")


def test_an_end_of_text_that_is_a_letter_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    byte_level = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    with pytest.raises(InputError, match=r"'Ċ' .* stands for a letter, which texts would lose"):
        refused(tmp_path / "made", byte_level, eos_token="Ċ")


def test_a_vocabulary_without_a_word_for_what_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'</s>' .*a text that quotes it cannot be encoded"):
        refused(tmp_path / "made", Tokenizer(models.WordLevel(numbered(["</s>", "the"]))), eos_token="</s>")


def test_padding_that_is_a_letter_stays_a_letter(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "made"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "pad_token": "!"}')
    loaded = load_tokenizer(folder)
    assert loaded.encode("a!") == load_tokenizer(tokenizer_folder).encode("a!")
    loaded.check_text(loaded.controls)


def test_a_batch_that_holds_the_end_of_documents_is_an_error_that_names_the_text(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.eos_id = tokenizer.encode("z")[0]
    with pytest.raises(InputError, match=r"a text made 'z' \(id \d+\), with which documents end: .*'or zebra'"):
        encoders.ReferenceEncoder(tokenizer).encode(["a fox", "or zebra"])

"""Token files: ours, those of others, and every way in which one can be damaged."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from argonne import files
from argonne.cli import main
from argonne.config import BatchSection, DataSection, SourceSection
from argonne.data.dataset import open_training_data
from argonne.data.loader import Loader
from argonne.errors import InputError
from argonne.tokens.formats import open_tokens
from argonne.tokens.inspection import Verification, inspect_tokens
from argonne.tokens.shards import header, read_header
from argonne.tokens.writer import ShardWriter

Writer = Callable[..., Path]


def read_all(path: Path | str) -> list[int]:
    opened = open_tokens(path)
    ids = np.zeros(opened.tokens, dtype=np.int64)
    opened.train.copy(0, ids)
    return ids.tolist()


def test_the_header_is_what_llm_c_and_the_family_read() -> None:
    wide, narrow = np.frombuffer(header("uint32", 2**33 + 5), "<i4"), np.frombuffer(header("uint16", 7), "<i4")
    assert len(wide) == len(narrow) == 256
    assert wide[:4].tolist() == [20240801, 7, 5, 2]
    assert narrow[:4].tolist() == [20240520, 1, 7, 0]
    assert not wide[4:].any()


def test_the_familys_train_bin_of_83_billion_bytes_holds_its_published_count(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    words = np.zeros(256, "<u4")
    words[:4] = 20240801, 0, 20839021454 & 0xFFFFFFFF, 20839021454 >> 32
    path.write_bytes(words.tobytes())
    with open(path, "r+b") as file:
        file.truncate(83_356_086_840)
    assert read_header(path) == ("uint32", 20_839_021_454)
    assert open_tokens(path).tokens == 20_839_021_454


def test_a_vocabulary_of_16_bits_is_written_in_two_bytes(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "tokens-00000", "uint16")
    writer.add(np.arange(10, dtype=np.uint32), np.array([4, 6]), 40)
    entry = writer.close()
    assert entry["bytes"] == 1024 + 20 == (tmp_path / "tokens-00000.bin").stat().st_size
    assert read_all(tmp_path / "tokens-00000.bin") == list(range(10))


def test_files_of_others_are_read_as_they_are(tmp_path: Path) -> None:
    ids = np.arange(1, 41)
    (tmp_path / "nano.bin").write_bytes(ids.astype("<u2").tobytes())
    assert read_all(f"raw-uint16:{tmp_path / 'nano.bin'}") == ids.tolist()
    for number in (2, 10):
        part = ids[:15] if number == 2 else ids[15:]
        (tmp_path / f"llmc_{number}.bin").write_bytes(header("uint16", len(part)) + part.astype("<u2").tobytes())
    assert read_all(str(tmp_path / "llmc_*.bin")) == ids.tolist()
    (tmp_path / "trove.ds").write_bytes(ids.astype("<u4").tobytes())
    (tmp_path / "trove.ds.index").write_bytes(np.array([5, 40], "<u8").tobytes())
    assert read_all(tmp_path / "trove.ds") == ids.tolist()
    assert open_tokens(tmp_path / "trove.ds").train.document_ends.tolist() == [5, 40]


def test_inspect_names_files_of_others_by_the_same_words_as_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.arange(1, 41)
    (tmp_path / "nano.bin").write_bytes(ids.astype("<u2").tobytes())
    for number in (2, 10):
        (tmp_path / f"llmc_{number}.bin").write_bytes(header("uint16", 40) + ids.astype("<u2").tobytes())
    for name, kind, tokens in (
        (f"raw-uint16:{tmp_path / 'nano.bin'}", "raw uint16", 40),
        (str(tmp_path / "llmc_*.bin"), "train.bin", 80),
    ):
        assert main(["inspect", name, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["format"], facts["tokens"], facts["problems"]) == (kind, tokens, [])


def megatron(folder: Path, sizes: list[int], documents: list[int]) -> Path:
    total = sum(sizes)
    (folder / "mega.bin").write_bytes(np.arange(total).astype("<i4").tobytes())
    pointers = np.concatenate([[0], np.cumsum(sizes)])[:-1] * 4
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(sizes), len(documents))
    body = np.array(sizes, "<i4").tobytes() + pointers.astype("<i8").tobytes() + np.array(documents, "<i8").tobytes()
    (folder / "mega.idx").write_bytes(head + body)
    return folder / "mega.bin"


def test_megatron_files_bring_their_documents(tmp_path: Path) -> None:
    path = megatron(tmp_path, [3, 4, 5], [0, 2, 3])
    assert read_all(path) == list(range(12))
    assert open_tokens(path).train.document_ends.tolist() == [7, 12]
    (tmp_path / "mega.bin").write_bytes(b"\0" * 44)
    with pytest.raises(InputError, match=r"mega\.bin: 44 bytes, its index counts 12"):
        open_tokens(path)


def test_the_familys_list_of_long_documents_is_read(tmp_path: Path) -> None:
    np.arange(20, dtype="<u4").tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", np.array([12, 8], dtype=np.uint32))
    (tmp_path / "docs.json").write_text(
        json.dumps({"files": [{"bin_path": "a.bin", "lengths_path": "a.npy", "docs_kept": 2}]})
    )
    assert read_all(tmp_path / "docs.json") == list(range(20))
    assert open_tokens(tmp_path / "docs.json").train.document_ends.tolist() == [12, 20]


def test_tokens_of_others_train_with_the_tokenizer_that_is_named(tmp_path: Path, numbers_folder: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(header("uint32", 400) + np.arange(400, dtype="<u4").tobytes())
    batch = BatchSection(tokens_per_step=32)
    plain = DataSection(sources=(SourceSection(path=str(path)),), sequence_length=8)
    with pytest.raises(InputError, match=r"does not say which tokenizer made it; set data\.tokenizer"):
        open_training_data(plain, batch, 1)
    named = DataSection(sources=(SourceSection(path=str(path)),), sequence_length=8, tokenizer=str(numbers_folder))
    with Loader(open_training_data(named, batch, 1), 0, 1, 4) as loader:
        assert loader.batch(1).micro_batches[0]["input_ids"][0].tolist() == list(range(32, 40))


def test_an_id_past_the_vocabulary_stops_the_batch_and_names_the_file(tmp_path: Path, numbers_folder: Path) -> None:
    path = tmp_path / "train.bin"
    ids = np.arange(400, dtype="<u4")
    ids[100] = 5000
    path.write_bytes(header("uint32", 400) + ids.tobytes())
    named = DataSection(sources=(SourceSection(path=str(path)),), sequence_length=8, tokenizer=str(numbers_folder))
    with Loader(open_training_data(named, BatchSection(tokens_per_step=8), 1), 0, 1, 4, prefetch=0) as loader:
        loader.batch(11)
        with pytest.raises(InputError, match=r"train\.bin: holds id 5,000, the tokenizer .* has 4,096 entries"):
            loader.batch(12)


def test_every_damage_is_named_when_a_set_is_opened(write_tokens: Writer) -> None:
    folder = write_tokens("a", [100, 50], shards=2)
    shard, index = folder / "tokens-00001.bin", folder / "tokens-00001.idx"
    whole, ends = shard.read_bytes(), index.read_bytes()
    for content, message in [
        (whole[:-4], "header counts 50 tokens, the size of 1,220 bytes holds 49"),
        (whole[:500], "500 bytes are less than a header"),
        (b"\0" * len(whole), "magic number 0, expected 20240801 or 20240520"),
        (header("uint32", 49) + whole[1024:-4], "holds 49 uint32 tokens, the manifest says 50"),
    ]:
        shard.write_bytes(content)
        with pytest.raises(InputError, match=r"tokens-00001\.bin") as caught:
            open_tokens(folder)
        assert message in str(caught.value)
    shard.write_bytes(whole)
    index.write_bytes(ends[:-1])
    with pytest.raises(InputError, match=r"tokens-00001\.idx: 7 bytes, expected 8"):
        open_tokens(folder)
    index.write_bytes(ends)
    shard.unlink()
    with pytest.raises(InputError, match=r"tokens-00001\.bin: cannot be read"):
        open_tokens(folder)


def test_a_set_of_another_tokenizer_is_refused(write_tokens: Writer, tokenizer_folder: Path) -> None:
    data = DataSection(
        sources=(SourceSection(path=str(write_tokens("a", [100]))),), sequence_length=8, tokenizer=str(tokenizer_folder)
    )
    with pytest.raises(InputError, match="was made with another tokenizer"):
        open_training_data(data, BatchSection(tokens_per_step=8), 1)


def test_inspect_finds_one_flipped_byte_wherever_it_is(write_tokens: Writer) -> None:
    folder = write_tokens("a", [40, 8], shards=2, held_out=[20])
    assert inspect_tokens(folder)["problems"] == []
    assert find_flips(folder, 60) == 60


def test_inspect_finds_a_flipped_byte_in_a_key_of_the_hash_list(write_tokens: Writer) -> None:
    folder = write_tokens("a", [40])
    listing = folder / "sha256.json"
    listing.write_bytes(listing.read_bytes().replace(b'"bytes"', b'"bytms"', 1))
    assert [problem.partition(": ")[0] for problem in inspect_tokens(folder)["problems"]] == [str(listing)]


@pytest.mark.campaign
def test_inspect_finds_one_flipped_byte_at_each_of_a_thousand_places(tokens: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(tokens, folder)
    assert inspect_tokens(folder)["problems"] == []
    assert find_flips(folder, 1000) == 1000


def find_flips(folder: Path, places: int) -> int:
    """How many of `places` single changed bytes, spread over all files of a set, `inspect_tokens` reports."""
    generator = np.random.default_rng(0)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    found = 0
    for number in range(places):
        path = paths[number % len(paths)]
        content = path.read_bytes()
        place = int(generator.integers(len(content)))
        changed = bytearray(content)
        changed[place] ^= int(generator.integers(1, 256))
        path.write_bytes(changed)
        try:
            found += bool(inspect_tokens(folder)["problems"])
        except InputError:
            found += 1
        path.write_bytes(content)
    return found


def test_a_flipped_byte_stops_a_run_at_its_next_step(
    write_tokens: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tokens("a", [400])
    section = DataSection(sources=(SourceSection(path=str(folder)),), sequence_length=8)
    shard = folder / "tokens-00000.bin"
    content = bytearray(shard.read_bytes())
    content[1500] ^= 1
    shard.write_bytes(content)
    data = open_training_data(section, BatchSection(tokens_per_step=8), 1, run_folder=tmp_path)
    monkeypatch.setattr(Verification, "start", lambda self: None)
    loader = Loader(data, 0, 1, 1, prefetch=0)
    verification = data.verify()
    assert verification is not None
    loader.batch(0)
    verification.run()
    with pytest.raises(InputError, match=r"tokens-00000\.bin: other bytes than were written"):
        loader.batch(1)
    before = DataSection(sources=section.sources, sequence_length=8, verify="before")
    with pytest.raises(InputError, match="other bytes"):
        open_training_data(before, BatchSection(tokens_per_step=8), 1).verify()


def test_a_file_that_was_found_right_is_not_read_again_until_it_changes(
    write_tokens: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_tokens(write_tokens("a", [400], shards=2)).train.shards
    read: list[Path] = []
    hash_file = Verification._hash
    monkeypatch.setattr(Verification, "_hash", lambda self, path: (read.append(path), hash_file(self, path))[1])
    Verification(shards, tmp_path).run()
    assert len(read) == 4
    Verification(shards, tmp_path).run()
    assert len(read) == 4
    shards[1].path.write_bytes(shards[1].path.read_bytes())
    Verification(shards, tmp_path).run()
    assert read[4:] == [shards[1].path]


@pytest.mark.parametrize("fault", ["the thread", "the record that is read", "the record that is written"])
def test_whatever_ends_the_check_of_the_hashes_stops_the_run(
    write_tokens: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def fail(*given: object) -> None:
        raise MemoryError("no memory for a buffer")

    section = DataSection(sources=(SourceSection(path=str(write_tokens("a", [400]))),), sequence_length=8)
    data = open_training_data(section, BatchSection(tokens_per_step=8), 1, run_folder=tmp_path)
    if fault == "the thread":
        monkeypatch.setattr(Verification, "_hash", fail)
    elif fault == "the record that is read":
        (tmp_path / "verified_data.json").write_text("{half")
    else:
        monkeypatch.setattr(files, "write_json", fail)

    def run() -> None:  # `verify` itself tells, where the thread was as quick as that
        verification = data.verify()
        assert verification is not None
        verification.close()
        data.check()

    with pytest.raises(InputError, match="hashes of the shards"):
        run()


def test_a_full_disk_costs_the_record_of_the_check_and_not_the_run(
    write_tokens: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    verification = Verification(open_tokens(write_tokens("a", [400])).train.shards, tmp_path)
    monkeypatch.setattr(files, "write_json", full)
    verification.run()
    assert verification.problem is None
    assert "No space left" in capsys.readouterr().err


def test_ten_gigabytes_of_shards_open_without_being_read(
    tmp_path: Path, numbers_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.bin"
    tokens = 2_684_354_560
    path.write_bytes(header("uint32", tokens))
    with open(path, "r+b") as file:
        file.truncate(1024 + 4 * tokens)
    section = DataSection(
        sources=(SourceSection(path=str(path)),), sequence_length=1024, order="shuffled", tokenizer=str(numbers_folder)
    )
    before = resident_bytes()
    data = open_training_data(section, BatchSection(tokens_per_step=8 * 1024), 1)
    with Loader(data, 0, 1, 8) as loader:
        assert loader.batch(0).count == 8192
    assert data.tokens_per_epoch == (tokens - 1) // 1024 * 1024
    assert resident_bytes() - before < 100 << 20


def resident_bytes() -> int:
    return next(
        int(line.split()[1]) << 10
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )

"""The atomic directory: complete and verified, or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from argonne import files
from argonne.errors import InputError


def fill(target: Path) -> Path:
    with files.atomic_directory(target) as folder:
        (folder / "deep").mkdir()
        (folder / "a.txt").write_text("alpha")
        (folder / "deep" / "b.bin").write_bytes(bytes(range(256)))
    return target


def test_a_sealed_directory_verifies(tmp_path: Path) -> None:
    assert files.verify_directory(fill(tmp_path / "made")) == []


def test_an_error_while_filling_leaves_nothing_behind(tmp_path: Path) -> None:
    def write_half_and_fail() -> None:
        with files.atomic_directory(tmp_path / "made") as folder:
            (folder / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_is_found_and_the_file_named(tmp_path: Path) -> None:
    target = fill(tmp_path / "made")
    path = target / "deep" / "b.bin"
    original = path.read_bytes()
    for place in range(0, len(original), 17):
        damaged = bytearray(original)
        damaged[place] ^= 1
        path.write_bytes(bytes(damaged))
        (problem,) = files.verify_directory(target)
        assert "b.bin" in problem
        assert "sha256" in problem


def test_a_truncated_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    target = fill(tmp_path / "made")
    (target / "a.txt").write_text("alp")
    (target / "deep" / "b.bin").unlink()
    assert [("3 bytes, expected 5" in text, "is missing" in text) for text in files.verify_directory(target)] == [
        (True, False),
        (False, True),
    ]


def test_a_directory_without_its_hash_list_was_never_completed(tmp_path: Path) -> None:
    target = fill(tmp_path / "made")
    (target / files.HASH_LIST).unlink()
    assert "never completed" in files.verify_directory(target)[0]


@pytest.mark.parametrize(
    "damaged", ['{"files": {"a": {"byteS": 1}}, "format_version": 1}', '{"files": [], "format_version": 1}', "[]", "{}"]
)
def test_a_damaged_hash_list_is_a_problem_and_no_crash(tmp_path: Path, damaged: str) -> None:
    with files.atomic_directory(tmp_path / "sealed") as temporary:
        (temporary / "a").write_text("a")
    (tmp_path / "sealed" / files.HASH_LIST).write_text(damaged)
    assert files.verify_directory(tmp_path / "sealed") == [
        f"{tmp_path / 'sealed' / files.HASH_LIST} is damaged: not a list of files with sizes and hashes"
    ]


def test_an_existing_target_is_kept_unless_replacing_is_asked_for(tmp_path: Path) -> None:
    target = fill(tmp_path / "made")
    with pytest.raises(InputError, match="exists already"), files.atomic_directory(target):
        pass
    with files.atomic_directory(target, replace=True) as folder:
        (folder / "new").write_text("new")
    assert sorted(path.name for path in target.iterdir()) == ["new", files.HASH_LIST]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_temporaries_of_killed_writers_are_collected_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path / "made")
    (tmp_path / f"{files.TEMPORARY}checkpoint").mkdir()
    (tmp_path / f"{files.TEMPORARY}file").write_text("half")
    assert len(files.collect_temporaries(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_the_fingerprint_depends_on_content_and_not_on_key_order() -> None:
    assert files.fingerprint({"a": 1, "b": [2, 3]}) == files.fingerprint({"b": [2, 3], "a": 1})
    assert files.fingerprint({"a": 1}) != files.fingerprint({"a": 2})


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json: not a JSON file"):
        files.read_json(tmp_path / "x.json")


def test_a_link_left_by_a_killed_writer_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    target = fill(tmp_path / "made")
    (tmp_path / f"{files.TEMPORARY}last").symlink_to("made")
    files.collect_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert files.verify_directory(target) == []


@pytest.mark.parametrize("fatal", [1, 2], ids=["before the old one is moved", "between the two renames"])
def test_a_replacement_that_dies_at_a_rename_leaves_the_old_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: int
) -> None:
    target = fill(tmp_path / "made")
    plain, calls = os.rename, []

    def rename(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == fatal:
            raise KeyboardInterrupt  # as good as a kill: nothing after it runs
        plain(source, destination)

    def replace_it() -> None:
        with files.atomic_directory(target, replace=True) as folder:
            (folder / "new").write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            replace_it()
    files.collect_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert files.verify_directory(target) == []
    assert (target / "a.txt").read_text() == "alpha"

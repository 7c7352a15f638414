"""Which files a pattern stands for: what a folder holds, what it does not give, and names of every kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from argonne.cli import main
from argonne.errors import InputError, NothingMatches
from argonne.prepare.documents import find_files, not_taken
from argonne.tokens.formats import open_tokens
from tests.prepare.helpers import LINES, arguments, jsonl, refusal

NAMES = (
    "a::b",
    "x[1]",
    "what?",
    "star*",
    "{one}",
    "100%41",
    "#1",
    "s3:y",
    "two\nlines",
    " spaces ",
    "wow!",
    "größe",
    "~",
)


def names_of(*patterns: object) -> list[str]:
    return [Path(file.path).name for file in find_files([str(pattern) for pattern in patterns])]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder as it is downloaded: text, and much beside it."""
    folder = tmp_path / "mixed"
    for below in (".cache", "deep"):
        (folder / below).mkdir(parents=True)
    for name in ("a.jsonl", ".cache/b.jsonl", "deep/.c.jsonl", "deep/d.jsonl"):
        jsonl(folder / name, [{"text": name}])
    for name in ("README.md", "readme_zh.txt", "LICENSE", "COPYING.txt", "NOTICE.txt", "notice-7.txt", "readmes.md"):
        (folder / name).write_text("words")
    for name in ("1.csv", "2.CSV", "3.csv.gz", "plain", "all.json"):
        (folder / name).write_text("words")
    (folder / "gone.jsonl").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jsonl")
    return folder


def test_of_a_folder_text_is_taken_and_the_rest_is_counted_by_kind(mixed: Path) -> None:
    assert names_of(mixed) == ["a.jsonl", "d.jsonl", "notice-7.txt", "readmes.md"]
    assert dict(not_taken([str(mixed)])) == {
        "hidden": 2,
        "README": 2,
        "LICENSE": 1,
        "COPYING": 1,
        "NOTICE": 1,
        "broken link": 1,
        "special file": 1,
        ".csv": 2,
        ".csv.gz": 1,
        ".json": 1,
        "without a suffix": 1,
    }


def test_a_readme_that_is_named_or_that_a_glob_matches_is_taken(mixed: Path) -> None:
    assert names_of(mixed / "README.md") == names_of(mixed / "README*") == ["README.md"]
    assert "README.md" in names_of(mixed / "*.md")
    assert names_of(mixed / "deep" / ".c.jsonl") == names_of(mixed / "deep" / ".*") == [".c.jsonl"]
    assert names_of(mixed / "deep" / "*.jsonl") == ["d.jsonl"]


def test_what_was_not_taken_is_said_at_every_start(
    mixed: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = (
        "not taken: 2 .csv, 1 .csv.gz, 1 .json, 1 COPYING, 1 LICENSE, 1 NOTICE, 2 README, 1 broken link, 2 hidden, "
        "1 special file, 1 without a suffix\n"
    )
    for part in ("1/2", "2/2"):
        assert main(arguments(mixed, tokenizer_folder, mixed / "out", "--part", part)) == 0
        assert expected in capsys.readouterr().err
    assert main(["tokenizer", "train", "--input", str(mixed), "--vocab-size", "300", "--out", str(tmp_path / "t")]) == 0
    assert "not taken: " in capsys.readouterr().err


def test_a_folder_without_text_is_refused_with_what_is_in_it(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", "README.md"):
        (tmp_path / name).write_text("words")
    with pytest.raises(NothingMatches, match=r"only folders without one .* \(not taken: 2 \.csv, 1 README\); check"):
        find_files([str(tmp_path)])


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    for pattern in ("gone.jsonl", "*.jsonl"):
        with pytest.raises(NothingMatches, match="1 broken link"):
            find_files([str(tmp_path / pattern)])


@pytest.mark.parametrize("pattern", ["", "**/*.jsonl", "**", "*/x.jsonl"])
def test_links_to_folders_are_followed_and_circles_end(pattern: str, tmp_path: Path) -> None:
    top, other = tmp_path / "top", tmp_path / "other"
    for folder, name in ((top / "own", "x.jsonl"), (other, "x.jsonl")):
        folder.mkdir(parents=True)
        jsonl(folder / name, [{"text": "words"}])
    (top / "linked").symlink_to(other)
    for circle in ("one", "two", "three"):
        (top / "own" / circle).symlink_to(top)
    found = [file.path for file in find_files([str(top / pattern)])]
    assert found == [str(top / "linked" / "x.jsonl"), str(top / "own" / "x.jsonl")]


def test_a_folder_below_that_cannot_be_listed_is_refused_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "a.jsonl", [{"text": "words"}])
    (tmp_path / "closed").mkdir()
    listed: Callable[..., object] = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"cannot be listed .*Permission denied.*closed"):
        find_files([str(tmp_path)])


def test_a_remote_folder_leaves_out_the_same(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for name in ("a.jsonl", "README.md", ".cache/b.jsonl", "c.csv"):
        system.pipe_file(f"/argonne-mixed/{name}", LINES)
    try:
        assert names_of("memory://argonne-mixed") == ["a.jsonl"]
        assert dict(not_taken(["memory://argonne-mixed"])) == {"README": 1, "hidden": 1, ".csv": 1}
        assert names_of("memory://argonne-mixed/*.md") == ["README.md"]
    finally:
        system.rm("/argonne-mixed", recursive=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_and_its_files_may_have_any_name(
    name: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(name)
    folder.mkdir()
    for file in (f"{name}.jsonl", f"2{name}.jsonl.zst", "1.txt", f"-{name}.parquet"):
        (folder / file).write_bytes(b"")
    assert len(find_files([name])) == len(find_files([f"{name}/*"])) == len(find_files([f"{name}/**"])) == 4
    assert names_of(f"{name}/{name}.jsonl") == [f"{name}.jsonl"]
    (folder / f"{name}.jsonl").write_bytes(LINES)
    out = f"out{name}"
    assert main(arguments(f"{name}/{name}.jsonl", tokenizer_folder, out)) == 0
    assert main(["inspect", out]) == 0
    assert open_tokens(f"{out}/tokens-*.bin").train.tokens == open_tokens(out).train.tokens > 0


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_name_that_is_no_utf_8_is_refused_by_name(
    kind: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    bad = os.fsencode(tmp_path / "in") + b"/gr\xf6\xdfe.jsonl"
    Path(os.fsdecode(bad)).write_bytes(LINES)
    pattern = os.fsdecode(bad) if kind == "file" else str(tmp_path / "in")
    message = refusal(arguments(pattern, tokenizer_folder, tmp_path / "out"), capsys)
    assert "gr\\udcf6\\udcdfe" in message
    assert "not UTF-8" in message


@pytest.mark.parametrize("verb", ["inspect", "prepare", "pretrain", "eval"])
def test_an_argument_that_is_no_utf_8_is_refused_before_anything_is_written(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / os.fsdecode(b"out\xff"))
    assert "out\\udcff': is not UTF-8" in refusal([verb, out], capsys)
    assert not any(tmp_path.iterdir())


def test_a_terminal_that_lacks_letters_of_a_name_is_shown_them_escaped(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl(tmp_path / "in.jsonl", [{"text": "words"}])
    assert main(arguments(tmp_path / "in.jsonl", tokenizer_folder, tmp_path / "größe")) == 0
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    command = [sys.executable, "-m", "argonne", "inspect", str(tmp_path / "größe")]
    found = [subprocess.run([*command, *more], capture_output=True, check=True).stdout for more in ((), ("--json",))]
    assert rb"gr\xf6\xdfe" in found[0]
    assert any("größe" in str(value) for value in json.loads(found[1]).values())

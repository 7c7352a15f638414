"""A folder goes up in one commit or not at all, and what is online is compared; against a stand-in of the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from argonne.errors import InputError
from argonne.publish.push import Hub
from tests.publish.hub import StandIn

NAME = "someone/small"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    staged = tmp_path / "staged"
    (staged / "images").mkdir(parents=True)
    (staged / "README.md").write_text("---\nlibrary_name: transformers\n---\n")
    (staged / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (staged / "images" / "loss.png").write_bytes(b"a picture")
    return staged


def in_folder(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("private", [False, True])
def test_a_folder_goes_up_in_one_commit(private: bool, hub: StandIn, folder: Path) -> None:
    at = Hub(NAME, private)
    before = at.check_room(replace=False)
    commit = at.push(folder, before, "a model")
    assert at.differences(folder, commit) == []
    repository = hub.repositories[NAME]
    assert repository.private == private
    assert [message for _, message, _ in repository.commits] == ["initial commit", "a model"]
    assert {name: data for name, data in hub.files(NAME).items() if name != ".gitattributes"} == in_folder(folder)
    assert len(hub.stored) == 2  # by LFS


def test_a_repository_with_other_contents_is_refused_and_replaced_where_it_is_asked_for(
    hub: StandIn, folder: Path
) -> None:
    hub.add(NAME, {"old.safetensors": b"old", ".gitattributes": b"x"})
    at = Hub(NAME)
    with pytest.raises(InputError, match=r"exists and holds 1 files \(old.safetensors\.\.\.\); take another name"):
        at.check_room(replace=False)
    commit = at.push(folder, at.check_room(replace=True), "anew")
    assert {*hub.files(NAME)} == {*in_folder(folder), ".gitattributes"}
    assert len(hub.repositories[NAME].commits) == 2
    assert at.differences(folder, commit) == []


def test_a_public_repository_is_not_taken_for_a_private_one(hub: StandIn) -> None:
    hub.add(NAME, {})
    with pytest.raises(InputError, match="is public"):
        Hub(NAME, private=True).check_room(replace=False)


@pytest.mark.parametrize(
    ("call", "status", "told"),
    [
        ("/api/repos/create", 403, "does not permit it"),
        ("/commit/main", 403, "does not permit it"),
        ("/commit/main", 412, "status 412"),
        ("/lfs/", 500, "try again"),
        ("/preupload/", 400, "status 400"),
    ],
)
def test_a_push_that_fails_leaves_nothing(
    call: str, status: int, told: str, hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.refuses[call] = status
    at = Hub(NAME)
    with pytest.raises(InputError, match=told):
        at.push(folder, at.check_room(replace=False), "a model")
    assert hub.repositories == {}


def test_a_push_that_fails_leaves_a_repository_as_it_was(hub: StandIn, folder: Path) -> None:
    hub.add(NAME, {"old.safetensors": b"old"})
    hub.refuses["/commit/main"] = 403
    at = Hub(NAME)
    with pytest.raises(InputError, match="nothing was pushed"):
        at.push(folder, at.check_room(replace=True), "anew")
    assert hub.files(NAME) == {"old.safetensors": b"old"}


def test_a_commit_of_somebody_else_in_between_is_not_written_over(hub: StandIn, folder: Path) -> None:
    hub.add(NAME, {})
    at = Hub(NAME)
    before = at.check_room(replace=False)
    hub.repositories[NAME].commit("another", {"their.md": b"theirs"})
    with pytest.raises(InputError, match="has changed all the same"):
        at.push(folder, before, "a model")
    assert hub.files(NAME) == {"their.md": b"theirs"}


@pytest.mark.parametrize("name", ["model.safetensors", "README.md"])
def test_other_bytes_online_are_found(name: str, hub: StandIn, folder: Path) -> None:
    hub.flips = name
    at = Hub(NAME)
    commit = at.push(folder, at.check_room(replace=False), "a model")
    assert at.differences(folder, commit) == [f"{name} has other bytes online"]


def test_a_file_that_is_missing_online_and_one_too_many_are_found(hub: StandIn, folder: Path) -> None:
    at = Hub(NAME)
    commit = at.push(folder, at.check_room(replace=False), "a model")
    del hub.files(NAME)["README.md"]
    hub.files(NAME)["more.txt"] = b""
    assert at.differences(folder, commit) == [
        "README.md is missing online",
        "more.txt is online and was not published",
    ]


def test_without_a_token_and_without_a_network_the_way_on_is_told(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuses["/api/models"] = 401
    with pytest.raises(InputError, match="hf auth login"):
        Hub(NAME).check_room(replace=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"127.0.0.1:9 cannot be reached .*; --dry-run checks everything"):
        Hub(NAME).check_room(replace=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"127.0.0.1:9 is not asked while HF_HUB_OFFLINE is set; unset it"):
        Hub(NAME).check_room(replace=False)


@pytest.mark.parametrize("name", ["small", "a/b/c", "some one/small", "someone/"])
def test_a_name_that_no_repository_can_have_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected ORG/NAME"):
        Hub(name)

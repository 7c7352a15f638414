"""A staged folder on the Hub: one commit, or nothing; and what is there then is compared, file by file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from argonne.errors import InputError, first_line
from argonne.files import sha256_of_file

GIT_ATTRIBUTES = ".gitattributes"  # the Hub's own, in every repository
LOG_IN = "log in with a token that may write there: hf auth login"


class Online(NamedTuple):
    """What a repository holds. files: name -> sha256 of a large file, or the id of its git blob. private: who may see
    it.
    """

    revision: str
    files: dict[str, str]
    private: bool


class Hub:
    """One repository. Every failure is an InputError that says what stands there now."""

    def __init__(self, repository: str, private: bool = False) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise InputError(f"--repo: found {repository!r}, expected ORG/NAME ({first_line(error)})") from None
        if repository.count("/") != 1:
            raise InputError(f"--repo: found {repository!r}, expected ORG/NAME")
        self.repository, self.private, self.api = repository, private, HfApi()

    def now(self, revision: str | None = None) -> Online | None:
        """What the repository holds; None where there is none, or none that this token may see."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._told():
            try:
                info = self.api.model_info(self.repository, revision=revision, files_metadata=True)
            except RepositoryNotFoundError:
                return None
        files = {item.rfilename: item.lfs.sha256 if item.lfs else item.blob_id or "" for item in info.siblings or []}
        return Online(info.sha or "", files, bool(info.private))

    def check_room(self, replace: bool) -> Online | None:
        """What is there before. Raises InputError where that is another's work, or open to all and --private asks for
        the contrary.
        """
        online = self.now()
        if online is None:
            return None
        others = sorted({*online.files} - {GIT_ATTRIBUTES})
        if others and not replace:
            raise InputError(
                f"{self.repository} exists and holds {len(others)} files ({', '.join(others[:3])}...); take another "
                "name, or --replace them in the same commit"
            )
        if self.private and not online.private:
            raise InputError(f"{self.repository} exists and is public; make it private there, or leave --private out")
        return online

    def push(self, folder: Path, before: Online | None, message: str) -> str:
        """Make the repository where there is none, and put the folder there in one commit, instead of all that it held.
        Returns the commit. A repository made here for nothing is removed again.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        gone = sorted({*(before.files if before else ())} - {*names, GIT_ATTRIBUTES})
        operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in names]
        operations += [CommitOperationDelete(name) for name in gone]
        with self._told():
            if before is None:
                self.api.create_repo(self.repository, private=self.private)
            start = before or self.now()
        try:
            with self._told():
                parent = start.revision if start is not None else None
                done = self.api.create_commit(
                    self.repository, operations, commit_message=message, parent_commit=parent or None
                )
        except InputError as error:
            raise InputError(f"{error}; {self._undone(before)}") from None
        return str(done.oid)

    def _undone(self, before: Online | None) -> str:
        """What stands on the Hub after a commit that failed."""
        online = self.now()
        held = {*(online.files if online else ())} - {GIT_ATTRIBUTES}
        if before is None and online is not None and not held:
            with self._told():
                self.api.delete_repo(self.repository)
            return f"nothing was pushed, and {self.repository}, made for it, is removed again"
        if before is not None and online is not None and online.revision == before.revision:
            return "nothing was pushed"
        return f"{self.repository} has changed all the same: look at it before you publish again"

    def differences(self, folder: Path, commit: str) -> list[str]:
        """What is online at a commit and differs from the folder, a line a file."""
        online = self.now(commit)
        if online is None:
            return [f"{self.repository} cannot be read back"]
        found = []
        names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        for name in sorted({*names} | {*online.files} - {GIT_ATTRIBUTES}):
            if name not in online.files:
                found.append(f"{name} is missing online")
            elif name not in names:
                found.append(f"{name} is online and was not published")
            elif online.files[name] not in (sha256_of_file(names[name]), git_blob(names[name])):
                found.append(f"{name} has other bytes online")
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Failures of the Hub and of the way to it, as lines that say what to do."""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

        try:
            yield
        except LocalTokenNotFoundError:
            raise InputError(f"{self.repository}: no token of the Hub on this machine; {LOG_IN}") from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise InputError(f"{self.repository}: the Hub does not permit it (status {status}); {LOG_IN}") from None
            raise InputError(
                f"{self.repository}: the Hub answers with status {status} ({first_line(error)}); try again later"
            ) from None
        except OfflineModeIsEnabled:
            raise InputError(
                f"{self.api.endpoint} is not asked while HF_HUB_OFFLINE is set; unset it, or check by --dry-run"
            ) from None
        except HTTPError as error:
            raise InputError(
                f"{self.api.endpoint} cannot be reached ({first_line(error)}); --dry-run checks everything without it"
            ) from None
        except (RuntimeError, ValueError) as error:  # an upload that failed; an answer of the Hub that makes no sense
            raise InputError(f"{self.repository}: {first_line(error.__cause__ or error)}; try again") from None


def git_blob(path: Path) -> str:
    """The id that git gives a file."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()

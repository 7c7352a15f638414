"""Faults that no file can hold, planted in the process of a rehearsal; the commands that it forks have them too."""

from __future__ import annotations

import errno
import os
import shutil
from types import SimpleNamespace
from typing import Any


def much_room() -> None:
    """No fault: a disk that the real runs fit on."""
    shutil.disk_usage = lambda path: SimpleNamespace(free=10**15)


def no_room() -> None:
    shutil.disk_usage = lambda path: SimpleNamespace(free=10**6)


def name_error_in_the_save() -> None:
    from argonne.stages import session

    def checkpoint_files(folder: Any, recipe: Any, data: Any) -> None:
        save_tokeniser(data, folder)  # type: ignore[name-defined] # noqa: F821 - the fault

    session.checkpoint_files = checkpoint_files


def name_error_in_the_export() -> None:
    from argonne.stages import session

    def export_final(model: Any, run: Any, data: Any) -> None:
        whole.save(run)  # type: ignore[name-defined] # noqa: F821 - the fault

    session.export_final = export_final


def full_disk_at_a_save() -> None:
    from argonne.train.tensor_files import HashingWriter

    plain_write = HashingWriter.write_data

    def write_data(self: Any, *arguments: Any, **named: Any) -> Any:
        if "step_4" in str(self.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain_write(self, *arguments, **named)

    HashingWriter.write_data = write_data


def resume_without_the_optimizer() -> None:
    from argonne.stages import setup

    def load_tensors(checkpoint: Any, tensors: Any, mesh: Any) -> None:
        raise KeyError("optim.exp_avg.model.norm.weight")

    setup.load_tensors = load_tensors


def deaf_to_sigterm() -> None:
    from argonne.train import guard

    guard.StopWatch.request = lambda self, reason: None


def template_without_a_turn_end() -> None:
    from argonne.data import chat

    plain = chat.jinja.chatml
    chat.jinja.chatml = lambda *arguments: plain(*arguments).replace("<|im_end|>", "")


def export_without_its_code() -> None:
    from argonne.publish import export

    plain = export.save_model_folder

    def save_model_folder(model: Any, folder: Any, **more: Any) -> None:
        plain(model, folder, **more)
        (folder / "modeling_argonne.py").unlink()

    export.save_model_folder = save_model_folder

"""The ways a command ends early on purpose, and their exit codes: a class for each thing that code reacts to."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, TextIO

# What asks a training run to stop: a scheduler, a person, a closed terminal.
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def first_line(error: BaseException) -> str:
    """What an exception says, as one line of a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class LossyStream:
    """A stream whose reader may be gone and whose disk may be full: lines for people are lost, nothing else is."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_stderr() -> None:
    """Let this process go on where what it says cannot be written, or was closed when it started."""
    for descriptor in range(3):  # a closed one would be given to the next file that is opened: a checkpoint, perhaps
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    stream: TextIO = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for the process
    sys.stderr = LossyStream(stream)


class Ended(Exception):
    """A command ends early, for a reason that one line tells."""

    exit_code = 1


class Diverged(Ended):
    """Too many steps in a row had a non-finite gradient. Exit code 1."""


class InputError(Ended):
    """Something the user gave is wrong. The message names the thing, the value found, the value expected and the next
    step. Exit code 2.
    """

    exit_code = 2


class NothingMatches(InputError):
    """A pattern of the user's matches no file: another one may."""


class TextEnds(InputError):
    """The text that a run is trained on while it is tokenised goes no further. What was read of it is right."""


class NoAnswer(InputError):
    """A scheduler did not say what it was asked: nothing is known."""


class InUse(InputError):
    """Another process is at work on the same folder."""


class Stopped(Ended):
    """A run ended on request: the same command goes on from its newest checkpoint. Exit code 3."""

    exit_code = 3

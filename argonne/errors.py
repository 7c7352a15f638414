"""The ways a command ends early on purpose, and their exit codes: a class for each thing that code reacts to."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What an exception says, as one line of a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class InputError(Exception):
    """Something the user gave is wrong. The message names the thing, the value found, the value expected and the next
    step. Exit code 2.
    """

    exit_code = 2


class NothingMatches(InputError):
    """A pattern of the user's matches no file: another one may."""


class InUse(InputError):
    """Another process is at work on the same folder."""


class Stopped(Exception):
    """A run ended on request with a complete checkpoint behind it: the same command resumes it. Exit code 3."""

    exit_code = 3

"""The device that a name asks for: one meaning of `auto`, `cuda` and `cuda:1` for training, generation and evaluation."""

from __future__ import annotations

import torch

from argonne.errors import InputError


def choose_device(name: str, local_rank: int = 0, *, where: str = "device") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; `cuda` without a number is card `local_rank`.

    where: the key or flag that gave the name. Raises InputError for a device that is not known, or not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdigit()):
        raise InputError(f"{where}: found {name!r}, expected auto, cpu, cuda or mps")
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    index = int(number) if number else local_rank if kind == "cuda" else 0
    if index >= here:
        asked = f"{kind}:{index}" if index else name
        raise InputError(f"{where}: found {asked!r}, but torch sees {here} such devices here; use auto or cpu")
    return torch.device(kind, index) if kind == "cuda" else torch.device(kind)

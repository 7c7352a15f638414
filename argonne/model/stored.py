"""The tensors of a folder, whole, one at a time: of a model's safetensors files, or of a checkpoint, where several
ranks may each have written a part of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from argonne.errors import InputError
from argonne.files import fingerprint, quick_hash_of_file
from argonne.layout import WEIGHTS

# What safetensors calls the types.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
SHARDING = "DCP_SHARDING_INFO"  # in the header of a file: tensor -> where in the whole its part begins


class StoredTensors:
    """shapes: name -> full shape, of the names that begin with `prefix`, which is left out. Raises InputError for a
    damaged file.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.shapes = folder, dict[str, tuple[int, ...]]()
        self._parts: dict[str, list[tuple[Path, str, tuple[slice, ...], int]]] = {}
        for path in sorted(folder.glob(WEIGHTS)):
            try:
                with safe_open(path, "pt") as file:
                    begins = json.loads((file.metadata() or {}).get(SHARDING, "{}"))
                    offsets = _offsets(path)
                    for stored in file.keys():  # noqa: SIM118 - not a dict
                        if not stored.startswith(prefix):
                            continue
                        part = file.get_slice(stored)
                        size = tuple(part.get_shape())
                        start = begins[stored]["saved_offsets"] if stored in begins else [0] * len(size)
                        place = tuple(slice(first, first + one) for first, one in zip(start, size, strict=True))
                        name, end = stored.removeprefix(prefix), tuple(one.stop for one in place)
                        self.shapes[name] = tuple(map(max, self.shapes.get(name, end), end))
                        self._parts.setdefault(name, []).append((path, part.get_dtype(), place, offsets[stored]))
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path}: cannot be read as safetensors ({error}); it is truncated or damaged"
                ) from None

    def read(self, name: str) -> torch.Tensor:
        """One tensor, whole, in memory of its own: a map of the file would change with it, and end the process where
        it is cut. Raises InputError for one that is not all there, or not finite.
        """
        parts = self._parts[name]
        whole: torch.Tensor | None = None
        for path, kind, place, offset in parts:
            if kind not in DTYPES:
                raise InputError(f"{path}: {name} is of type {kind}, expected one of {', '.join(DTYPES)}")
            part = torch.empty([one.stop - one.start for one in place], dtype=DTYPES[kind])
            try:
                with open(path, "rb") as file:
                    file.seek(offset)
                    found = file.readinto(part.reshape(-1).view(torch.uint8).numpy().data)
            except OSError as error:
                raise InputError(f"{path}: {name} cannot be read ({error}); it is truncated or damaged") from None
            if found != part.nbytes:
                raise InputError(f"{path}: {name} has {found:,} bytes, expected {part.nbytes:,}; the file is truncated")
            check_finite(path, {name: part})
            if len(parts) == 1:
                return part
            whole = part.new_empty(self.shapes[name]) if whole is None else whole
            whole[place] = part
        assert whole is not None
        return whole


def _offsets(path: Path) -> dict[str, int]:
    """The byte of a safetensors file at which each of its tensors begins."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(size))
    return {name: 8 + size + about["data_offsets"][0] for name, about in head.items() if name != "__metadata__"}


def hashes_of_weights(folder: Path) -> list[list[str]]:
    """[name, XXH3] of each file of weights in a folder, which tell one model from another."""
    return [[path.name, quick_hash_of_file(path)] for path in sorted(folder.glob(WEIGHTS))]


def fingerprint_of_weights(folder: Path) -> str:
    """One hash of all of them: by it results and exports name the model that they are of."""
    return fingerprint(hashes_of_weights(folder))


def is_finite(tensor: torch.Tensor) -> bool:
    """Are all its numbers finite? A sum is so only where all it adds are, and costs a fraction; one that overflowed is
    looked at closely.
    """
    return not tensor.is_floating_point() or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_finite(where: Path | str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError naming the first parameter that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError(
                f"{where}: {name} holds NaN or infinity in {int((~tensor.isfinite()).sum()):,} of {tensor.numel():,} "
                "places; the weights are damaged, or do not fit their dtype: give others"
            )

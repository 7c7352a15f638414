"""The tensors of a checkpoint on their way to the disk: one safetensors file a rank, hashed as it is written.

torch's planner decides which rank writes what; its Hugging Face reader reads these files back. torch's own writer
builds each file in memory first and leaves the hash to a second reading.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from argonne.files import Seal, quick_hash

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class HashingWriter(HuggingFaceStorageWriter):
    """Writes this rank's tensors to `folder`; `seals` holds size and hash of the file once it is on the disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.seals: dict[str, Seal] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write and fsync the file. Raises OSError."""
        done: Future[list[WriteResult]] = Future()
        if plan.items:
            name = f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            # The largest elements first: each tensor then begins at a multiple of its own.
            pairs = [(item, cast(Tensor, planner.resolve_data(item))) for item in plan.items]
            pairs.sort(key=lambda pair: (-pair[1].element_size(), pair[0].index.fqn))
            tensors = {item.index.fqn: tensor for item, tensor in pairs}
            chunks = {item.index.fqn: cast(TensorWriteData, item.tensor_data).chunk for item, _ in pairs}
            offsets = {name: {"saved_offsets": list(chunk.offsets)} for name, chunk in chunks.items()}
            self.seals[name] = write_tensors(self.folder / name, tensors, {"DCP_SHARDING_INFO": json.dumps(offsets)})
        done.set_result([WriteResult(item.index, 0, None) for item in plan.items])
        return done


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Seal:
    """A safetensors file (8 bytes of the header's length, the header, the tensors in order), on the disk on return."""
    header: dict[str, object] = {"__metadata__": {"DCP_VERSION": "1.0", "format": "pt", **metadata}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = quick_hash(), 0
    with open(path, "wb", buffering=0) as file:
        for rest in (memoryview(len(text).to_bytes(8, "little") + text), *map(bytes_of, tensors.values())):
            digest.update(rest)
            size += len(rest)
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    return Seal(size, digest.hexdigest())


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data

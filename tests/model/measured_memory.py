"""Builds, saves or loads a model in a process of its own and prints the most memory it held, beside its weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from argonne.config import ParallelSection
from argonne.model.build import build_model, config_from_fields, fresh_weights
from argonne.model.load import load_model
from argonne.model.save import save_model_folder
from argonne.parallel.mesh import open_mesh
from argonne.parallel.shard import SHARDED
from argonne.presets import preset
from argonne.train.objectives import next_token
from argonne.train.optim import Precision


def memory(kind: str) -> int:
    """Bytes: VmRSS now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


def main(name: str, layers: int, folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    fields = dict(preset(name).fields)
    fields |= {"num_hidden_layers": layers, "layer_types": fields["layer_types"][:layers]}
    before = memory("VmRSS")
    if what == "build":
        model = build_model(config_from_fields(fields), seed=0, dtype=torch.bfloat16)
        save_model_folder(model, folder, eos_id=0)
    else:
        model = load_model(folder).model
    weights = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"weights": weights, "peak": memory("VmHWM") - before}))


def peak_of_a_part(layers: int) -> tuple[int, int]:
    torch.set_num_threads(1)
    fields = dict(preset("argonne-1.5").fields)
    fields |= {"num_hidden_layers": layers, "layer_types": fields["layer_types"][:layers]}
    weights = fresh_weights(config_from_fields(fields), seed=0)
    with open_mesh(ParallelSection(shard=2), "cpu", timeout_seconds=60) as mesh:
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is held now
        before = memory("VmRSS")
        SHARDED.parallelise(weights, mesh, next_token, Precision("fp32", mesh.device))
        return sum(parameter.nbytes for parameter in weights.model.parameters()), memory("VmHWM") - before


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])

"""Building, loading and exporting take hardly more memory than the weights: in slices, over the meta device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from argonne.model import build
from argonne.model.build import build_model, config_from_fields
from argonne.parallel.launch import run_workers
from argonne.presets import preset
from tests.model.measured_memory import peak_of_a_part

MOST = 1.2  # times the weights
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "layers"), [("argonne-1.5", 16), pytest.param("argonne-2.0", 24, marks=pytest.mark.campaign)]
)
def test_a_model_is_built_saved_and_loaded_within_its_weights_and_a_fifth(
    tmp_path: Path, name: str, layers: int
) -> None:
    # Else glibc puts tensors into its heap once a larger one was freed, and leaves holes there, as addresses fall.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    for what in ("build", "load"):
        command = [sys.executable, "-m", "tests.model.measured_memory", name, str(layers), str(tmp_path), what]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["peak"] <= MOST * found["weights"], (what, found)


@pytest.mark.campaign
def test_a_rank_of_a_sharded_mesh_never_holds_the_whole_model() -> None:
    """Its half, what lies outside of layers, and one layer."""
    preload = ("argonne.parallel.shard", "tests.model.measured_memory")
    for whole, peak in run_workers(peak_of_a_part, (16,), count=2, max_restarts=0, grace_seconds=5, preload=preload):
        assert peak <= 0.8 * whole


def test_a_table_drawn_in_pieces_is_the_one_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_from_fields({**preset("nano-1.0").fields, "vocab_size": 2049})
    whole = build_model(config, seed=3)
    monkeypatch.setattr(build, "PIECE", 1 << 10)
    pieces = build_model(config, seed=3)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, pieces.get_parameter(name)), name

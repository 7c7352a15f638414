"""One fresh process a generation, offline and without argonne, does with two exports what users of transformers do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from argonne.model.build import build_model, config_from_fields
from argonne.model.save import save_model_folder
from tests.model.conftest import GENERATIONS, roughen

CHECKS = [
    *("two exports", "outputs", "static cache", "two devices", "exported program", "compiled", "yarn"),
    "checkpointing",
]


@pytest.mark.campaign
@pytest.mark.parametrize("generation", GENERATIONS)
def test_two_exports_serve_a_fresh_process_in_every_way(generation: str, tmp_path: Path) -> None:
    folders = [tmp_path / f"export{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        model = build_model(config_from_fields(GENERATIONS[generation]), seed=seed, dtype=torch.float64)
        save_model_folder(roughen(model), folder, eos_id=None)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": "",
    }
    command = [sys.executable, str(Path(__file__).with_name("fresh_checks.py")), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    held = [line.removeprefix("@@ ") for line in done.stdout.splitlines() if line.startswith("@@ ")]
    assert held == CHECKS, done.stderr[-3000:]
    assert done.returncode == 0

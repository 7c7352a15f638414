"""What the proof in a fresh process looks at: each fault moves the figure that is named after it, and no other proof
would. Run here in this process; that it runs in a fresh one is shown in test_export.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, StaticCache

from argonne.publish.export import save_native
from argonne.publish.fresh_load import compare
from argonne.publish.native import native_twin
from argonne.publish.proof import TOLERANCE, expectations
from tests.model.conftest import GENERATIONS
from tests.publish.test_export import DIFFERENCES, model_of

NONE = {"eos_id": None, "bos_id": None, "pad_id": None}


def proof(folder: Path) -> dict[str, Any]:
    model = model_of(GENERATIONS["2"])
    save_native(native_twin(model), folder, NONE, torch.float32)
    save_file(expectations(model), folder / "expected")
    return compare(str(folder), str(folder / "expected"))


def plant(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    forward, models = LlamaForCausalLM.forward, []

    def faulty(self: Any, *given: Any, **named: Any) -> Any:
        if self not in models:
            models.append(self)
        out = forward(self, *given, **named)
        if fault == "not finite":
            out.logits[0, 0, 0] = float("nan")
        elif fault == "loss" and out.loss is not None:
            out.loss = out.logits
        elif fault == "static cache" and isinstance(named.get("past_key_values"), StaticCache):
            out.logits = -out.logits
        elif fault == "second copy" and len(models) == 2 and self is models[1]:
            out.logits = out.logits * 1.01
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", faulty)


def test_a_sound_folder_differs_in_nothing(tmp_path: Path) -> None:
    found = proof(tmp_path)
    assert all(found[name] < TOLERANCE for name in DIFFERENCES)
    assert found["greedy_equal"]


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("not finite", "relative_difference"),
        ("loss", "loss_difference"),
        ("static cache", "static_gap"),
        ("second copy", "second_difference"),
    ],
)
def test_each_fault_is_seen_in_its_own_figure(
    fault: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, fault)
    found = proof(tmp_path)
    assert not found[seen] <= TOLERANCE
    if fault != "not finite":
        assert [name for name in DIFFERENCES if not found[name] <= TOLERANCE] == [seen]

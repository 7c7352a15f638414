"""What is trained, to 1e-4: the recorded curves hold, and no change of architecture, schedule or data order goes by
unseen.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argonne.config import ModelSection, OptimSection, ScheduleSection
from argonne.data import windows
from argonne.train import trainer
from tests.golden.curves import GENERATIONS, RATE, RECORDED, STEPS, VALUES, golden_recipe, measure, write_data

TOLERANCE = 1e-4

# Field -> (generation, another value). Every field of the sections is here or in NOT_A_CURVE.
ARCHITECTURE: list[tuple[str, str, Any]] = [
    ("initializer", "3.0", "argonne"),
    ("vocab_size", "2.5", 80),
    ("hidden_size", "2.0", 52),
    ("num_hidden_layers", "2.5", 3),
    ("num_attention_heads", "2.5", 2),
    ("num_key_value_heads", "2.5", 4),
    ("head_dim", "2.0", 10),
    ("head_dim", "1.5", 8),
    ("intermediate_size", "4.0", 72),
    ("max_position_embeddings", "1.0", 48),
    ("position_embedding", "2.5", "learned"),
    ("rope_theta", "3.0", 1e4),
    ("rope_theta", "2.0", 5e5),
    ("norm_type", "2.5", "layer"),
    ("rms_norm_eps", "1.0", 1e-6),
    ("rms_norm_eps", "3.0", 1e-5),
    ("hidden_act", "1.0", "silu"),
    ("hidden_act", "4.0", "gelu"),
    ("mlp_gated", "1.5", True),
    ("attention_bias", "2.5", True),
    ("mlp_bias", "2.5", True),
    ("attention_dropout", "1.0", 0.1),
    ("hidden_dropout", "1.0", 0.1),
    ("tie_word_embeddings", "2.0", False),
    ("tie_word_embeddings", "1.0", True),
    ("q_norm", "3.0", False),
    ("k_norm", "3.0", False),
    ("v_norm", "3.0", False),
    ("sandwich_norm", "3.0", False),
    ("layer_types", "3.0", ["full_attention"] * 4),
    ("sliding_window", "3.0", 9),
    ("final_logit_softcapping", "3.0", 0.0),
    ("final_logit_softcapping", "4.0", 30.0),
]
SCHEDULE: list[tuple[str, str, Any]] = [
    ("kind", "1.5", "cosine"),
    ("warmup", "3.0", 5),
    ("warmup", "1.0", 3),
    ("decay", "3.0", 0.3),
    ("min_ratio", "3.0", 0.2),
    ("min_lr", "1.0", 0.0),
    ("steps", "2.0", [{"step": 10, "lr": RATE / 2}]),
]
OPTIMIZER: list[tuple[str, str, Any]] = [
    ("name", "2.5", "muon"),
    ("lr", "2.5", 1.01 * RATE),
    ("betas", "3.0", [0.9, 0.94]),
    ("eps", "1.0", 1e-5),
    ("weight_decay", "3.0", 0.0),
    ("decay_all", "1.5", True),
    ("grad_clip", "3.0", 1.5),
]
ORDER: list[tuple[str, str, Any]] = [
    ("seed", "2.5", 445),
    ("data.order", "3.0", "shuffled"),
    ("data.order", "2.5", "sequential"),
    ("data.document_mask", "2.0", False),
    ("data.documents", "2.5", "packed"),
    ("data.documents", "2.5", "first-window"),
    ("data.sequence_length", "3.0", 16),
    ("batch.tokens_per_step", "3.0", 512),
    ("batch.steps", "3.0", [{"step": 12, "tokens_per_step": 512}]),
]
# A preset and init_from only fill the other fields; Muon's own keys and the limit of skipped steps do not act under
# AdamW.
NOT_A_CURVE = {"preset", "init_from", "muon_lr", "muon_momentum", "muon_dtype", "max_skipped"}
PLANTED = [
    *((f"model.{field}", generation, value) for field, generation, value in ARCHITECTURE),
    *((f"schedule.{field}", generation, value) for field, generation, value in SCHEDULE),
    *((f"optim.{field}", generation, value) for field, generation, value in OPTIMIZER),
    *ORDER,
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("golden") / "data")


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, list[float]]]:
    curves: dict[str, dict[str, list[float]]] = json.loads(RECORDED.read_text())
    return curves


def first_difference(found: dict[str, list[float]], expected: dict[str, list[float]]) -> str | None:
    """The first step and value further than TOLERANCE from what was recorded, None where all are near."""
    for step in range(STEPS):
        for name in VALUES:
            value, wanted = found[name][step], expected[name][step]
            if not abs(value - wanted) <= TOLERANCE * abs(wanted):
                return f"step {step + 1}: {name} is {value!r}, recorded {wanted!r}"
    return None


@pytest.mark.parametrize("generation", GENERATIONS)
def test_twenty_steps_follow_the_recorded_curve(
    generation: str, data: Path, tmp_path: Path, recorded: dict[str, dict[str, list[float]]]
) -> None:
    found = measure(golden_recipe(generation, data), tmp_path / "run")
    assert {len(values) for values in found.values()} == {STEPS}
    assert first_difference(found, recorded[generation]) is None


@pytest.mark.parametrize(
    ("key", "generation", "value"), PLANTED, ids=[f"{key}-{generation}" for key, generation, _ in PLANTED]
)
def test_a_change_of_one_key_leaves_the_recorded_curve(
    key: str, generation: str, value: Any, data: Path, tmp_path: Path, recorded: dict[str, dict[str, list[float]]]
) -> None:
    recipe = golden_recipe(generation, data, {key: value})
    assert recipe != golden_recipe(generation, data)
    assert first_difference(measure(recipe, tmp_path / "run"), recorded[generation]) is not None


@pytest.mark.parametrize(
    ("section", "planted"),
    [(ModelSection, ARCHITECTURE), (ScheduleSection, SCHEDULE), (OptimSection, OPTIMIZER)],
    ids=["model", "schedule", "optim"],
)
def test_every_field_has_a_planted_change(section: type, planted: list[tuple[str, str, Any]]) -> None:
    fields = {item.name for item in dataclasses.fields(section)} - NOT_A_CURVE
    assert fields == {field for field, _, _ in planted}


def _is_seen(generation: str, data: Path, run: Path, recorded: dict[str, dict[str, list[float]]]) -> bool:
    return first_difference(measure(golden_recipe(generation, data), run), recorded[generation]) is not None


def test_a_rate_that_is_one_step_late_leaves_every_recorded_curve_with_a_schedule(
    data: Path, tmp_path: Path, recorded: dict[str, dict[str, list[float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = trainer.learning_rate
    monkeypatch.setattr(trainer, "learning_rate", lambda step, *rest: right(max(0, step - 1), *rest))
    assert [name for name in GENERATIONS if not _is_seen(name, data, tmp_path / name, recorded)] == []


def test_another_permutation_leaves_every_recorded_curve_of_a_shuffled_order(
    data: Path, tmp_path: Path, recorded: dict[str, dict[str, list[float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = windows.permute
    monkeypatch.setattr(windows, "permute", lambda index, count, key: right(index, count, key + 1))
    shuffled = [name for name in GENERATIONS if golden_recipe(name, data).data.order == "shuffled"]
    assert len(shuffled) >= 3
    assert [name for name in shuffled if not _is_seen(name, data, tmp_path / name, recorded)] == []


def test_rows_that_begin_one_window_late_leave_every_recorded_curve(
    data: Path, tmp_path: Path, recorded: dict[str, dict[str, list[float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = windows.SourceWindows.locate

    def late(self: windows.SourceWindows, key: windows.RowKey, position: windows.Position, draws: np.ndarray) -> Any:
        return right(self, key, position, draws + 1)

    monkeypatch.setattr(windows.SourceWindows, "locate", late)
    assert [name for name in GENERATIONS if not _is_seen(name, data, tmp_path / name, recorded)] == []

"""`midtrain`: given weights on longer rows, within long documents, under another base of the positions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.files import read_json
from argonne.layout import FINAL_MODEL, MODEL_CONFIG
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from benchmarks import midtraining

Nano = Callable[..., Recipe]
LONGER = {
    "stage": '"midtrain"',
    "model.rope_theta": "1e4",
    "data.sequence_length": "128",
    "data.documents": '"within"',
    "batch.tokens_per_step": "512",
    "eval.every_steps": "2",
}


@pytest.fixture
def longer(nano: Nano, tmp_path: Path) -> Path:
    """A run of four steps on rows of 128 tokens, from weights of a context of 32."""
    first = {"train.steps": "4", "model.max_position_embeddings": "32"}
    run(nano(**first), tmp_path / "first")
    start = {"model.init_from": json.dumps(str(tmp_path / "first"))}
    run(nano(**LONGER, **start, **{"train.steps": "4"}), tmp_path / "longer")
    return tmp_path / "longer"


def test_the_bands_of_longer_rows_end_where_the_old_context_ended_and_begin_before_the_first_step(longer: Path) -> None:
    records = read_metrics(longer).of("held_out")
    assert [record["step"] for record in records] == [0, 2, 4]
    for record in records:
        assert list(record["metrics"]) == [f"loss_by_position/{band}" for band in ("1-16", "17-32", "33-64", "65-128")]


def test_a_midtrained_model_says_its_longer_context_and_its_new_base(longer: Path) -> None:
    config = read_json(longer / FINAL_MODEL / MODEL_CONFIG)
    assert config["max_position_embeddings"] == 128
    assert config["rope_parameters"]["rope_theta"] == 1e4


def test_the_benchmark_compares_the_second_half_of_the_old_context_with_all_beyond_it(tmp_path: Path) -> None:
    bands = {"1-64": 4.0, "65-128": 3.0, "129-256": 5.0, "257-512": 8.0}
    assert midtraining.within_and_beyond(bands) == (3.0, 7.0)
    midtraining.draw({"before": bands, "after": bands, "control": bands}, tmp_path / "picture.svg")
    assert "midtrained on rows of 512" in (tmp_path / "picture.svg").read_text()


@pytest.mark.campaign
def test_midtraining_teaches_the_positions_beyond_the_old_context_and_as_many_short_rows_do_not(
    shared: Path, tmp_path: Path
) -> None:
    found = midtraining.experiment(shared / "data" / "pretrain" / "books.parquet", tmp_path, midtraining.Settings())
    told = {name: midtraining.within_and_beyond(bands) for name, bands in found.items()}
    print(told)
    within, beyond = told["after"]
    assert beyond - within < 0.05
    assert told["before"][1] - beyond > 0.3
    control_within, control_beyond = told["control"]
    assert control_beyond - control_within > 0.05 or told["before"][1] - control_beyond < 0.3

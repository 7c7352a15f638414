"""Context parallelism: every stage, checkpoints that go on on any other mesh, degrees that are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from argonne import cli
from argonne.config import ModelSection, ParallelSection, Recipe
from argonne.errors import InputError
from argonne.files import read_json
from argonne.keys import check_mesh
from argonne.layout import COMPUTE_PLAN, FINAL_MODEL
from argonne.model.attention import Part, dense_mask, pattern_of_part
from argonne.parallel import context
from argonne.parallel.mesh import Mesh
from argonne.recipe import to_toml
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from argonne.train.checkpoint import LAST
from argonne.train.trainer import Trainer
from tests.parallel.test_sharded import load_all, same_curve
from tests.train.helpers import curve
from tests.tuning import pairs, write

Nano = Callable[..., Recipe]
Chat = Callable[..., Recipe]


def mesh(degree: int, shard: int = 1, replicate: int = 1) -> dict[str, str]:
    if degree * shard * replicate == 1:
        return {}
    return {
        "parallel.nproc": str(degree * shard * replicate),
        "parallel.context": str(degree),
        "parallel.shard": str(shard),
        "parallel.timeout": "60s",
    }


def test_a_checkpoint_goes_on_under_any_degree_as_if_nothing_had_changed(nano: Nano, tmp_path: Path) -> None:
    run(nano(), tmp_path / "whole")
    for stop, degrees in ((3, (2, 1, 1)), (6, (1, 1, 1)), (9, (2, 2, 1)), (None, (3, 1, 1))):
        run(nano(**mesh(*degrees)), tmp_path / "cut", stop_after_step=stop)
    for mine, theirs in zip(curve(tmp_path / "cut"), curve(tmp_path / "whole"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["tokens"] == theirs["tokens"]
    assert load_all(tmp_path / "cut" / FINAL_MODEL) == load_all(tmp_path / "cut" / LAST)


def test_a_run_with_dropout_stopped_and_resumed_equals_one_uninterrupted_bit_for_bit(
    nano: Nano, tmp_path: Path
) -> None:
    recipe = nano("nano-1.0", **mesh(2), **{"model.hidden_dropout": "0.1"})
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "cut", stop_after_step=5)
    run(recipe, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert load_all(tmp_path / "cut" / LAST) == load_all(tmp_path / "whole" / LAST)


def test_each_part_of_a_row_draws_its_own_randomness_and_a_whole_row_what_it_always_drew() -> None:
    def seed(rank: int, degree: int) -> int:
        data = SimpleNamespace(samples_before=lambda step: 8 * step, rows=lambda step: 8)
        place = Mesh(torch.device("cpu"), rank, 4, context=degree, inner=degree)
        asked: Any = SimpleNamespace(recipe=SimpleNamespace(seed=444), data=data, mesh=place)
        return Trainer._seed_of(asked, 3)

    assert len({seed(rank, 2) for rank in range(4)}) == 4
    assert seed(0, 2) == seed(0, 1)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_chat_stage_gives_the_curve_and_the_records_of_one_process(chat: Chat, tmp_path: Path, stage: str) -> None:
    made = {"sft": chat, "dpo": lambda **more: chat("nano-3.0-dpo", write(tmp_path / "pairs.jsonl", pairs(60)), **more)}
    recipe = made[stage]()
    start = ModelSection(init_from=recipe.model.init_from)  # the weights say the sizes
    (tmp_path / "recipe.toml").write_text(to_toml(dataclasses.replace(recipe, model=start)))
    for name, more in (("one", []), ("two", ["--parallel.context", "2"])):
        assert cli.main([stage, str(tmp_path / "recipe.toml"), "--run", str(tmp_path / name), *more]) == 0
    same_curve(tmp_path / "two", tmp_path / "one", 1e-3 if stage == "dpo" else 1e-4)
    told = [[record["loss"] for record in read_metrics(tmp_path / name).of("held_out")] for name in ("one", "two")]
    assert told[0] == pytest.approx(told[1], rel=1e-4)
    known = [[record.get("metrics") for record in read_metrics(tmp_path / name).of("step")] for name in ("one", "two")]
    for theirs, mine in zip(*known, strict=True):
        if mine and theirs and theirs.get("margin") == 0:  # the policy is its reference: ties, each of which a bit ends
            assert abs(mine["margin"]) < 1e-6
            mine, theirs = ({name: found[name] for name in found if name != "accuracy"} for found in (mine, theirs))
        assert mine == (theirs and pytest.approx(theirs, rel=1e-2, abs=1e-4))


def test_longer_rows_within_documents_give_the_curve_of_one_process(nano: Nano, tmp_path: Path) -> None:
    run(nano(**{"train.steps": "4", "model.max_position_embeddings": "32"}), tmp_path / "first")
    longer = {
        "stage": '"midtrain"',
        "model.rope_theta": "1e4",
        "model.init_from": json.dumps(str(tmp_path / "first")),
        "data.sequence_length": "128",
        "data.documents": '"within"',
        "batch.tokens_per_step": "512",
        "train.steps": "4",
    }
    (tmp_path / "recipe.toml").write_text(to_toml(nano(**longer)))
    for name, more in (("one", []), ("three", ["--parallel.context", "3"])):  # 128 = 3 x 43 - 1
        assert cli.main(["midtrain", str(tmp_path / "recipe.toml"), "--run", str(tmp_path / name), *more]) == 0
    same_curve(tmp_path / "three", tmp_path / "one", 1e-5)


def test_the_command_trains_with_the_flag_and_gives_the_curve_of_one_process(nano: Nano, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(to_toml(nano(**{"data.document_mask": "true", "train.steps": "5"})))
    for name, more in (("one", []), ("two", ["--parallel.context", "2"])):
        assert cli.main(["pretrain", str(tmp_path / "recipe.toml"), "--run", str(tmp_path / name), *more]) == 0
    same_curve(tmp_path / "two", tmp_path / "one", 1e-5)
    assert read_json(tmp_path / "two" / COMPUTE_PLAN)["layout"]["context"] == 2


@pytest.mark.parametrize(
    ("degrees", "workers", "fitting"),
    [
        ({"context": 3}, 4, "a context of 1 or 2 or 4"),
        ({"context": 2, "shard": 4}, 4, "2 x 1 x 2 or 1 x 2 x 2"),
        ({"context": 2, "replicate": 4}, 4, "2 x 1 x 2 or 1 x 2 x 2"),
        ({"context": 2}, 1, "a context of 1"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_with_what_would(
    degrees: dict[str, int], workers: int, fitting: str
) -> None:
    with pytest.raises(InputError, match=rf"on {workers} workers, .*: {fitting}$"):
        check_mesh(ParallelSection(**degrees), workers)


def test_the_command_refuses_wrong_degrees_before_any_worker_starts(
    nano: Nano, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argonne.stages.session.run_workers", None)
    (tmp_path / "recipe.toml").write_text(to_toml(nano()))
    asked = ["--parallel.nproc", "4", "--parallel.context", "3"]
    assert cli.main(["pretrain", str(tmp_path / "recipe.toml"), "--run", str(tmp_path / "run"), *asked]) == 2
    assert "context of 1 or 2 or 4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_kernel_that_cannot_run_on_parts_of_rows_is_refused(nano: Nano, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.attention: .*flex.* cannot run"):
        run(nano(**mesh(2), **{"train.attention": '"flex"'}), tmp_path / "run")


def test_a_loss_that_reads_logits_itself_is_refused_by_name() -> None:
    own = context.Part(Mesh(torch.device("cpu"), context=2), torch.arange(4)[None])
    head = context.HeadOfRows(None, own)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"parallel\.context: found 2, expected 1: this stage's loss reads logits"):
        head.logits(torch.zeros(1, 2, 3))


@given(data=st.data(), length=st.integers(1, 17), degree=st.integers(1, 5), window=st.sampled_from([None, 1, 2, 5, 30]))
def test_the_parts_of_rows_see_between_them_what_whole_rows_see(
    data: st.DataObject, length: int, degree: int, window: int | None
) -> None:
    starts = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * length, max_size=2 * length))).view(2, length)
    place = torch.arange(length)
    positions = place - torch.where(starts, place, 0).cummax(1).values
    expected = dense_mask(positions, None, window, torch.zeros(2, length, 1)).expand(2, -1, -1, -1)
    for rank in range(degree):
        own = context.Part(Mesh(torch.device("cpu"), rank, degree, context=degree, inner=degree), positions)
        seen, low, end = whole_mask(own, window)
        assert bool(seen.any(-1).all())  # a query that sees nothing has no softmax
        inside = expected[:, :, own.first : min(end, length), :]
        assert torch.equal(seen[:, :, : inside.shape[2], : max(0, length - low)], inside[..., low:end])
        assert not inside[..., :low].any()
        assert not inside[..., end:].any()


def whole_mask(own: context.Part, window: int | None) -> tuple[torch.Tensor, int, int]:
    """What the part's queries see, and the first and last key of it."""
    part: Part = own
    seen = pattern_of_part(part, window, torch.zeros(2, own.size, 1)).dense
    assert seen is not None
    end = own.first + own.size
    return seen.expand(2, -1, -1, -1), end - seen.shape[-1], end

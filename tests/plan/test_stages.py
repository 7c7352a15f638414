"""What a rank of a pipeline holds, sends and waits for, by hand for a tiny shape."""

from __future__ import annotations

import importlib
from collections import Counter
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from argonne.config import ParallelSection
from argonne.errors import InputError
from argonne.model.build import config_from_fields, fresh_weights
from argonne.parallel.launch import run_workers
from argonne.parallel.mesh import open_mesh
from argonne.plan import Plan, make_plan, plan_lines, shape_of
from argonne.plan import mesh as plan_mesh
from argonne.plan.memory import Setup, State, activations_of_layer, memory_of, peaks
from argonne.plan.mesh import Layout, sending_seconds, traffic_of
from argonne.plan.shape import ModelShape
from argonne.plan.stages import cut, idle_share, parts_of, runs_of
from argonne.presets import FULL, SLIDING
from argonne.recipe import load_recipe
from argonne.train.objectives import next_token
from argonne.train.optim import Precision

TINY: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
    "rope_theta": 1e4,
}
# Counted by hand: four projections of 4 x 4, three of 4 x 8, two norms of 4; embedding (the head's too), last norm.
LAYER, TABLE, NORM = 4 * 16 + 3 * 32 + 2 * 4, 12 * 4, 4
STREAM = 8 * 4 * 4  # 8 tokens, 4 wide, in float32


def tiny(**other: Any) -> ModelShape:
    return shape_of({**TINY, **other})


def staged(pipeline: int, micro_batches: int, schedule: str = "1f1b", **other: Any) -> Setup:
    """A micro-batch of one row."""
    given = {"pipeline": pipeline, "micro_batches": micro_batches, "schedule": schedule, "accumulates": True}
    return Setup(1, 8, **{**given, **other})


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=9).flatmap(
        lambda costs: st.tuples(st.just(costs), st.integers(0, 99), st.integers(1, len(costs)))
    )
)
def test_every_stage_has_a_run_of_layers_and_the_dearest_is_as_cheap_as_it_can_be(
    case: tuple[list[int], int, int],
) -> None:
    costs, last, stages = case
    runs = cut(costs, last, stages)
    assert [layer for run in runs for layer in run] == list(range(len(costs)))
    assert len(runs) == stages
    assert all(runs)

    def dearest(found: list[range]) -> int:
        return max(sum(costs[layer] for layer in run) + last * (run.stop == len(costs)) for run in found)

    every = ((0, *edges, len(costs)) for edges in combinations(range(1, len(costs)), stages - 1))
    assert dearest(runs) == min(dearest([range(*edge) for edge in pairwise(edges)]) for edges in every)


def test_a_stage_is_cut_by_weights_and_reach_and_the_head_counts_and_the_embedding_does_not() -> None:
    # A layer costs 168 + 2 x 4 x 4 = 200 with all of its keys, 168 + 2 x 4 x 1 = 176 with a window of 1; the head 48.
    assert runs_of(tiny(num_hidden_layers=8), 2) == (range(4), range(4, 8))
    assert runs_of(tiny(num_hidden_layers=8, vocab_size=120), 2) == (range(5), range(5, 8))
    assert runs_of(tiny(num_hidden_layers=8, vocab_size=120, tie_word_embeddings=False), 2)[0] == range(5)
    near = {"sliding_window": 1, "layer_types": (SLIDING,) * 4 + (FULL,) * 3}
    assert runs_of(tiny(num_hidden_layers=7, vocab_size=1, **near), 2)[0] == range(4)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(InputError, match=r"parallel\.pipeline: found 3, expected at most 2 stages: the model"):
        runs_of(tiny(), 3)


@pytest.mark.parametrize(
    ("schedule", "stages", "micro_batches", "held"),
    [
        ("gpipe", 1, 6, [6, 6]),
        ("1f1b", 1, 6, [2, 1]),
        ("1f1b", 1, 1, [1, 1]),  # fewer than stages: all forward passes come first
        ("interleaved", 2, 6, [2.5, 1.5]),  # 2 x 1 + 2 + 1 and 2 + 1 passes of half of its layers
        ("interleaved", 2, 5, [5, 5]),  # rounds of 2 do not divide 5: all forward passes come first
    ],
)
def test_a_rank_holds_as_many_micro_batches_as_its_schedule_has_on_their_way(
    schedule: str, stages: int, micro_batches: int, held: list[float]
) -> None:
    parts = parts_of(tiny(num_hidden_layers=4), 2, stages, schedule, micro_batches)
    assert [part.in_flight for part in parts] == held


def test_an_interleaved_rank_holds_every_second_run_of_layers() -> None:
    parts = parts_of(tiny(num_hidden_layers=4), 2, 2, "interleaved", 4)
    assert [(part.layers, part.first, part.last) for part in parts] == [((0, 2), True, False), ((1, 3), False, True)]


def test_each_end_holds_its_own_weights_and_a_tied_one_lies_at_both() -> None:
    sizes = []
    for shape in (tiny(), tiny(tie_word_embeddings=False)):
        parts = parts_of(shape, 2, 1, "1f1b", 4)
        sizes.append([State.of(shape, staged(2, 4), part).weights / 4 for part in parts])
    assert sizes == [[LAYER + TABLE, LAYER + NORM + TABLE]] * 2
    whole = State.of(tiny(), Setup(1, 8))
    assert whole.weights / 4 == 2 * LAYER + TABLE + NORM


@pytest.mark.parametrize(("schedule", "held"), [("1f1b", 2), ("gpipe", 4)])
def test_the_first_stage_keeps_the_activations_of_every_micro_batch_on_its_way(schedule: str, held: int) -> None:
    shape, setup = tiny(), staged(2, 4, schedule)
    found = peaks(shape, setup, setup.ranks(shape)[0])
    kept = activations_of_layer(shape, setup, 0)
    # Beside them a place for each gradient that comes back, and what went on and waits for it.
    assert found["backward of layer 0"]["activations"] == held * kept + 4 * STREAM + held * STREAM
    assert "loss" not in found
    assert "embedding" not in peaks(shape, setup, setup.ranks(shape)[1])


def test_a_sharded_stage_has_its_weights_and_gradients_whole_until_the_end_of_a_step() -> None:
    shape, setup = tiny(), staged(2, 4, shard=2)
    state = State.of(shape, setup)
    mine = 4 * (LAYER + TABLE)
    assert (state.weights, state.held, state.gradients, state.peaks) == (mine * 1.5, mine, mine / 2, mine)


def test_the_memory_of_a_pipeline_is_that_of_its_heaviest_rank() -> None:
    shape = tiny(num_hidden_layers=8)
    one, four = memory_of(shape, Setup(1, 8, accumulates=True)), memory_of(shape, staged(4, 8))
    assert four.parts["weights"] == 4 * (2 * LAYER + TABLE)  # the first: most micro-batches are on their way
    assert four.peak.endswith(", rank 0 of the pipeline")
    assert four.parts["moments"] < one.parts["moments"]


@pytest.mark.parametrize(
    ("pipeline", "stages", "times"), [(2, 1, 1), (4, 1, 2), (2, 2, 3), (4, 2, 4)], ids=["2", "4", "2 x 2", "4 x 2"]
)
def test_the_busiest_rank_sends_what_goes_on_and_what_comes_back(pipeline: int, stages: int, times: int) -> None:
    shape = tiny(num_hidden_layers=8, tie_word_embeddings=False)
    setup = staged(pipeline, 3, "interleaved", stages=stages)
    (sent,) = traffic_of(shape, setup, Layout(pipeline=pipeline), 3, "h100")
    assert (sent.kind, sent.over, sent.ranks, sent.in_a_node) == ("send", "pipeline", pipeline, True)
    assert sent.bytes == times * 3 * STREAM
    assert sending_seconds([sent]) == pytest.approx(sent.bytes / 337.5e9)


def test_both_ends_exchange_the_gradient_of_a_tied_weight() -> None:
    (sent,) = traffic_of(tiny(), staged(2, 3), Layout(pipeline=2), 3, "h100")
    assert sent.bytes == 3 * STREAM + 4 * TABLE


def test_the_stages_of_two_nodes_send_over_the_network_and_the_shards_of_one_do_not() -> None:
    layout = Layout(shard=8, pipeline=2)
    found = {one.kind: one for one in traffic_of(tiny(), staged(2, 4, shard=8), layout, 4, "h100")}
    assert {kind: one.in_a_node for kind, one in found.items()} == {
        "send": False,
        "all-gather": True,
        "reduce-scatter": True,
    }
    # Its gradients are reduced once a step; layers are gathered for each micro-batch and once more, the head once.
    heavy = LAYER + TABLE + NORM
    assert found["reduce-scatter"].bytes == 7 / 8 * 4 * heavy
    assert found["all-gather"].bytes == 7 / 8 * 4 * (4 * LAYER + heavy)


@pytest.mark.parametrize(
    ("pipeline", "stages", "micro_batches", "share"), [(1, 1, 8, 0), (4, 1, 8, 3 / 11), (4, 2, 8, 3 / 19)]
)
def test_a_pipeline_is_idle_while_it_fills_and_empties(
    pipeline: int, stages: int, micro_batches: int, share: float
) -> None:
    assert idle_share(pipeline, stages, micro_batches) == share


def planned(**keys: str) -> Plan:
    given = {name.replace("__", "."): value for name, value in keys.items()}
    return make_plan(load_recipe("argonne-3.0-pretrain", given), gpu="h200", gpus=8)


def test_the_idle_share_is_told_and_lengthens_the_step() -> None:
    four, one = (planned(parallel__pipeline=degree, batch__micro="1") for degree in ("4", "1"))
    assert (four.micro_batches, four.idle_share) == (114, 3 / 117)
    assert (four.tokens_per_second or 0) / (one.tokens_per_second or 1) == pytest.approx(114 / 117, rel=0.02)
    assert any(line.endswith("  3 % of a step, in the pipeline") for line in plan_lines(four))
    assert not any("idle" in line for line in plan_lines(one))
    assert {sent["kind"] for sent in four.traffic} == {"send", "all-reduce"}


def test_an_open_micro_batch_leaves_one_for_each_stage() -> None:
    plan = planned(parallel__pipeline="8", batch__tokens_per_step=str(9 * 1024))
    assert (plan.micro_rows, plan.micro_batches) == (1, 9)


def test_fewer_micro_batches_than_stages_are_told_with_their_number() -> None:
    plan = planned(parallel__pipeline="8", batch__micro="4", batch__tokens_per_step=str(8 * 1024))
    assert any("2 micro-batches for 8 stages: each is idle for 78 % of it" in note for note in plan.warnings)
    assert not any("micro-batches for" in note for note in planned(parallel__pipeline="4").warnings)


def test_an_interleaved_pipeline_is_planned_with_the_stages_that_the_recipe_says() -> None:
    keys = {"parallel__schedule": "interleaved", "parallel__stages": "3"}
    plan = planned(parallel__pipeline="4", batch__micro="1", **keys)
    assert plan.idle_share == 3 / (3 * 114 + 3)


def test_a_chosen_pipeline_has_no_more_stages_than_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_mesh, "check_mesh", lambda parallel, workers: None)
    recipe = load_recipe("nano-3.0", {"parallel.pipeline": "auto"})
    shape = shape_of(recipe.model)
    found = plan_mesh.layouts(recipe, shape, 64)
    assert max(layout.pipeline for layout in found) <= shape.num_hidden_layers


class Counted(TorchDispatchMode):
    """Bytes of the whole tensor that each kind of collective moves."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [arg for arg in torch.utils._pytree.tree_leaves(args) if isinstance(arg, torch.Tensor)]
            self.bytes[func._schema.name.removeprefix("c10d::")] += max(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


def counted(parallel: ParallelSection, micro_batches: int) -> dict[str, int]:
    """What a worker of the tiny model's pipeline moves in a step."""
    pipeline = importlib.import_module("argonne.parallel.pipeline")
    ids = torch.zeros((1, 8), dtype=torch.int64)
    with open_mesh(parallel, "cpu", timeout_seconds=30) as mesh:
        weights = fresh_weights(config_from_fields({**TINY, "num_hidden_layers": 4}), seed=1)
        spread = pipeline.PIPELINE.parallelise(weights, mesh, next_token, Precision("fp32", mesh.device))
        step = partial(spread.forward_backward, [{"input_ids": ids, "shift_labels": ids}] * micro_batches, 24)
        step()  # the first one sets things up
        with Counted() as found:
            step()
    return dict(found.bytes)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_plan_counts_what_a_sharded_pipeline_sends(schedule: str) -> None:
    pytest.importorskip("argonne.parallel.pipeline", reason="pipelines are not built yet")
    parallel = ParallelSection(pipeline=2, shard=2, schedule=schedule)
    *_, last = run_workers(counted, (parallel, 4), count=4, max_restarts=0, grace_seconds=5)
    setup = staged(2, 4, schedule, shard=2)
    planned = {
        one.kind: one.bytes for one in traffic_of(tiny(num_hidden_layers=4), setup, Layout(1, 2, 1, 1, 2), 4, "")
    }
    assert planned == {
        "send": last["send"],
        "all-gather": last["_allgather_base_"] / 2,
        "reduce-scatter": last["_reduce_scatter_base_"] / 2,
    }

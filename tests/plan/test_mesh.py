"""What a rank of a mesh holds and sends: by hand for a tiny shape, beside torch's own collectives, and as the page has
it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from argonne.cli import main
from argonne.errors import InputError
from argonne.model.build import config_from_fields, fresh_weights
from argonne.parallel.context import CONTEXT
from argonne.parallel.mesh import Mesh
from argonne.parallel.parallelise import REPLICATED, Parallelised
from argonne.parallel.shard import SHARDED
from argonne.parallel.tensor import TENSOR
from argonne.plan import Plan, make_plan, plan_lines, shape_of
from argonne.plan.memory import Setup, State, peaks
from argonne.plan.mesh import LINK_USE, LINKS, NODE, Layout, sending_seconds, traffic_of
from argonne.presets import presets
from argonne.recipe import load_recipe
from argonne.train.objectives import next_token
from argonne.train.optim import Precision
from benchmarks import meshes

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "parallelism.md"
TINY = {
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
LAYER = 4 * 16 + 3 * 32 + 2 * 4
ENDS = 12 * 4 + 4
WHOLE = 2 * LAYER + ENDS


def sent(layout: Layout, micro_batches: int = 1, device: str = "h100", **setup: Any) -> dict[str, float]:
    """Bytes by kind for the tiny shape."""
    shape = shape_of(TINY)
    found = traffic_of(
        shape, Setup(1, 8, shard=layout.parts, context=layout.context, **setup), layout, micro_batches, device
    )
    return {part.kind: part.bytes for part in found}


def planned(recipe: str, gpu: str, gpus: int, **given: Any) -> Plan:
    keys = {name.replace("__", "."): str(value) for name, value in given.items()}
    return make_plan(load_recipe(recipe, keys), gpu=gpu, gpus=gpus, name=recipe)


@given(st.integers(2, 64), st.sampled_from(["argonne-2.0", "argonne-3.0", "argonne-1.5"]))
def test_weights_moments_and_gradients_are_shared_by_the_ranks_and_what_is_gathered_stands_beside(
    shard: int, preset: str
) -> None:
    shape = shape_of(presets()[preset].fields)
    alone, here = (State.of(shape, Setup(1, 1024, shard=degree)) for degree in (1, shard))
    whole, layer = 4 * shape.parameters(), 4 * shape.layer_parameters()
    ends = whole - shape.num_hidden_layers * layer
    assert (alone.weights, alone.gradients, alone.peaks) == (whole, whole, 2 * whole)
    assert here.gradients == pytest.approx(whole / shard)
    assert here.peaks == pytest.approx(2 * whole / shard)
    assert here.weights == pytest.approx(whole / shard + 2 * layer + ends)
    narrow = State.of(shape, Setup(1, 1024, "bf16", shard=shard)).weights
    assert narrow - here.weights == pytest.approx(2 * shape.parameters())  # autocast's copies are of gathered weights


def test_the_gradients_of_a_gathered_layer_and_of_the_ends_are_whole_until_they_are_sent() -> None:
    shape = shape_of(TINY)
    alone, here = (peaks(shape, Setup(1, 8, shard=degree)) for degree in (1, 4))
    products = 2 * 8 * 8 * 4 + 2 * 8 * 4 * 4
    assert alone["backward of layer 1"]["temporaries"] == products + 4 * 4 * 8
    assert here["backward of layer 1"]["temporaries"] == products + 2 * 4 * LAYER
    assert here["embedding"]["temporaries"] - alone["embedding"]["temporaries"] == 2 * 4 * 12 * 4


def test_a_rank_sends_what_a_count_by_hand_gives() -> None:
    halves = sent(Layout(replicate=2, shard=2), micro_batches=3)
    assert halves["all-gather"] == 3 * (2 * 2 * LAYER + ENDS) * 4 / 2
    assert halves["reduce-scatter"] == 3 * WHOLE * 4 / 2
    assert halves["all-reduce"] == 2 * (WHOLE / 2 * 4) / 2
    assert sent(Layout(replicate=4), micro_batches=3) == {"all-reduce": 2 * WHOLE * 4 * 3 / 4}
    assert sent(Layout(shard=4))["reduce-scatter"] == WHOLE * 4 * 3 / 4
    assert sent(Layout()) == {}


def test_weights_that_are_narrow_throughout_are_sent_narrow_and_autocast_sends_them_wide() -> None:
    wide, casts, narrow = (sent(Layout(shard=2), precision=name) for name in ("fp32", "bf16", "bf16_full"))
    assert wide == casts == {kind: 2 * size for kind, size in narrow.items()}


def test_muon_gathers_the_directions_of_shards_and_broadcasts_the_updates() -> None:
    matrices = 2 * (4 * 16 + 3 * 32)
    plain, muon = (sent(Layout(shard=4), optimizer=name) for name in ("adamw", "muon"))
    assert muon["all-gather"] - plain["all-gather"] == 4 * matrices * 3 / 4
    assert sent(Layout(shard=4), optimizer="muon", muon_width=2)["broadcast"] == 2 * matrices * 3 / 4
    assert sent(Layout(replicate=4), optimizer="muon", muon_width=2)["broadcast"] == 2 * matrices * 3 / 4


@given(st.integers(2, 9), st.integers(1, 50))
def test_a_ring_sends_the_share_that_the_plan_counts(ranks: int, part: int) -> None:
    """Each rank hands on, n - 1 times, the part that it got last."""
    held = [{rank} for rank in range(ranks)]
    last, bytes_sent = list(range(ranks)), 0
    for _ in range(ranks - 1):
        bytes_sent += part
        last = [last[rank - 1] for rank in range(ranks)]
        for rank in range(ranks):
            held[rank].add(last[rank])
    assert all(parts == set(range(ranks)) for parts in held)
    assert bytes_sent == pytest.approx((ranks - 1) / ranks * part * ranks)


class Counted(TorchDispatchMode):
    """Bytes of the whole tensor of each collective over more than one rank, by kind."""

    KINDS = {"allgather": "all-gather", "reduce_scatter": "reduce-scatter", "allreduce": "all-reduce"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2].replace("_", "").replace("reducescatter", "reduce_scatter")
        if func.namespace in ("c10d", "_c10d_functional") and (
            kind := next((self.KINDS[key] for key in self.KINDS if key in name), None)
        ):
            tensors = [arg for arg in torch.utils._pytree.tree_leaves(args) if isinstance(arg, torch.Tensor)]
            given = [arg for arg in args if isinstance(arg, int) and not isinstance(arg, bool)]
            # DTensor's own gather is given a part, and the number of ranks.
            ranks = given[0] if kind == "all-gather" and given and len(tensors) == 1 else 1
            self.bytes[kind] += ranks * max(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def ranks() -> Iterator[None]:
    """The first of four ranks whose collectives are counted, and move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def spread_over(layout: Layout, recompute: str = "none") -> Parallelised:
    """The tiny model as a run spreads it."""
    degrees = {"shard": layout.shard, "context": layout.context, "inner": layout.context * layout.tensor}
    rows = dist.new_group(list(range(layout.context))) if layout.context > 1 else None
    mesh = Mesh(torch.device("cpu"), 0, layout.devices, rows=rows, **degrees)
    weights = fresh_weights(config_from_fields(TINY), seed=1)
    mode = CONTEXT if layout.context > 1 else SHARDED if layout.shard > 1 else REPLICATED
    mode = TENSOR if layout.tensor > 1 else mode
    spread = mode.parallelise(weights, mesh, next_token, Precision("fp32", mesh.device))
    plain: Any = spread.plain
    plain.configure_training(activation_checkpointing=recompute, checkpointing_stride=1, loss="full", loss_chunk=0)
    return spread


def micro_batches(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.zeros((1, 8), dtype=torch.int64)
    return [{"input_ids": ids, "shift_labels": ids}] * count


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("layout", [Layout(shard=4), Layout(replicate=2, shard=2)], ids=["shard 4", "2 x 2"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_plan_counts_what_a_sharded_run_sends(layout: Layout, recompute: str) -> None:
    spread = spread_over(layout, recompute)
    assert isinstance(spread.plain, FSDPModule)
    with Counted() as counted:
        spread.forward_backward(micro_batches(3), 24)
    of_shard, of_replicas = ((n - 1) / n for n in (layout.shard, layout.replicate))
    shares = {"all-gather": of_shard, "reduce-scatter": of_shard, "all-reduce": 2 * of_replicas}
    found = {kind: shares[kind] * size for kind, size in counted.bytes.items()}
    assert found == pytest.approx(sent(layout, micro_batches=3))


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_plan_counts_the_keys_and_values_that_parts_of_rows_gather(recompute: str) -> None:
    layout = Layout(context=4)
    spread = spread_over(layout, recompute)
    reduced = sizes_of_buckets(spread)
    with Counted() as counted:
        spread.forward_backward(micro_batches(3), 24)
    # A list of parts, each counted; of every micro-batch two sums of the loss more.
    found = {kind: 3 / 4 * 4 * size for kind, size in counted.bytes.items()}
    found["all-gather"] -= 3 / 4 * 4 * 3 * 2 * 4
    planned = sent(layout, micro_batches=3, activation_checkpointing=recompute)
    assert found == pytest.approx({kind: planned[kind] for kind in ("all-gather", "reduce-scatter")})
    assert planned["all-reduce"] == 2 * sum(reduced) * 3 / 4


def test_a_context_divides_the_tokens_of_a_row_and_a_shard_beside_it_the_weights() -> None:
    whole, parts, sharded = (
        planned("argonne-3.0-pretrain", "h200", 8, batch__micro=8, **degrees)
        for degrees in ({}, {"parallel__context": 4}, {"parallel__context": 4, "parallel__shard": 2})
    )
    assert parts.layout == {"replicate": 2, "shard": 1, "tensor": 1, "context": 4, "pipeline": 1}
    assert parts.memory["activations"] < whole.memory["activations"] / 2
    assert parts.memory["weights"] == whole.memory["weights"]
    assert sharded.memory["moments"] == pytest.approx(whole.memory["moments"] / 8)
    assert not parts.refusals
    assert any("parallel.context" in note for note in parts.warnings)
    assert {(part["kind"], part["over"], part["ranks"]) for part in parts.traffic} == {
        ("all-reduce", "replicate", 8),
        ("all-gather", "context", 4),
        ("reduce-scatter", "context", 4),
    }


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_plan_counts_what_a_group_with_split_tensors_sends(recompute: str) -> None:
    layout = Layout(shard=2, tensor=2)
    spread = spread_over(layout, recompute)
    with Counted() as counted:
        spread.forward_backward(micro_batches(3), 24)
    shape, setup = shape_of(TINY), Setup(1, 8, shard=2, tensor=2, activation_checkpointing=recompute)
    traffic = traffic_of(shape, setup, layout, 3, "h100")
    planned = {part.kind: part.bytes for part in traffic if part.over == "tensor"}
    # What a rank holds of layers and ends: halves, but whole norms. Of each token its highest logit, its sum and that
    # of its label, of each norm the gradient of its gain.
    layers, ends = 2 * ((LAYER - 8) / 2 + 8), (ENDS - 4) / 2 + 4
    of_shards = {
        "all-gather": 2 * layers + ends,
        "reduce-scatter": layers + ends,
        "all-reduce": 3 * 8 + (2 * 2 + 1) * 4,
    }
    shares = {"all-gather": 1 / 2, "reduce-scatter": 1 / 2, "all-reduce": 2 * 1 / 2}
    found = {kind: shares[kind] * (counted.bytes[kind] - 3 * 4 * of_shards[kind]) for kind in shares}
    assert found == planned


@pytest.mark.usefixtures("ranks")
def test_the_plan_counts_what_replicas_send_once_a_step() -> None:
    spread = spread_over(Layout(replicate=4))
    reduced = sizes_of_buckets(spread)
    spread.forward_backward(micro_batches(3), 24)
    assert 2 * sum(reduced) * 3 / 4 == sent(Layout(replicate=4), micro_batches=3)["all-reduce"]


def sizes_of_buckets(spread: Parallelised) -> list[int]:
    """Bytes of each bucket of gradients, which is noted instead of reduced."""
    reduced: list[int] = []

    def reduce(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reduced.append(bucket.buffer().nbytes)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    assert isinstance(spread.model, DistributedDataParallel)
    spread.model.register_comm_hook(None, lambda state, bucket: reduce(bucket))
    return reduced


@pytest.mark.parametrize(
    ("layout", "dimension", "near"),
    [
        (Layout(replicate=8), "replicate", True),
        (Layout(replicate=9), "replicate", False),
        (Layout(replicate=2, shard=8), "shard", True),
        (Layout(replicate=2, shard=8), "replicate", False),
        (Layout(replicate=4, shard=3), "shard", False),  # a group of three would lie over the edge of a node
        (Layout(replicate=1, shard=16), "shard", False),
    ],
)
def test_a_group_is_within_a_node_where_all_of_its_ranks_are(layout: Layout, dimension: str, near: bool) -> None:
    assert layout.in_a_node(dimension) is near


def test_a_dimension_takes_the_time_of_its_own_link_and_an_unknown_card_none() -> None:
    shape, layout = shape_of(TINY), Layout(replicate=2, shard=8)
    found = traffic_of(shape, Setup(1, 8, shard=8), layout, 1, "h100")
    rates = {part.kind: part.bytes_per_second for part in found}
    assert rates == {"all-gather": 337.5e9, "reduce-scatter": 337.5e9, "all-reduce": 37.5e9}
    assert sending_seconds(found) == pytest.approx(sum(part.bytes / rates[part.kind] for part in found))  # type: ignore[operator]
    assert sending_seconds(traffic_of(shape, Setup(1, 8, shard=8), layout, 1, "Some Unknown Card")) is None


def test_a_step_takes_as_long_as_sending_where_that_is_longer() -> None:
    slow = planned("argonne-3.0-pretrain", "rtx-4090", 16, parallel__shard=16)
    assert slow.tokens_per_step / (slow.tokens_per_second or 0) == pytest.approx(slow.traffic_seconds)
    fast = planned("argonne-3.0-pretrain", "h200", 8)
    assert fast.tokens_per_step / (fast.tokens_per_second or 0) > 10 * (fast.traffic_seconds or 0)


def test_the_device_with_most_rows_is_waited_for() -> None:
    even, odd = (planned("argonne-3.0-pretrain", "h200", 4, batch__tokens_per_step=1024 * rows) for rows in (32, 29))
    assert (odd.tokens_per_second or 0) / (even.tokens_per_second or 1) == pytest.approx(29 / 32)


def test_the_smallest_shard_that_fits_is_recommended_and_the_rest_are_replicas() -> None:
    plan = planned("argonne-3.0-pretrain", "a100-40gb", 8)
    assert (plan.layout["replicate"], plan.layout["shard"]) == (4, 2)
    assert plan.refusals == [
        "memory: a whole copy does not fit on one a100-40gb; this plan shards weights, gradients and moments, so start "
        "it with --parallel.shard 2"
    ]
    asked = planned("argonne-3.0-pretrain", "a100-40gb", 8, parallel__shard=2)
    assert (asked.memory, asked.layout, asked.refusals) == (plan.memory, plan.layout, [])
    assert planned("argonne-3.0-pretrain", "h200", 8).layout["shard"] == 1


def test_a_shard_that_is_asked_for_is_planned_though_a_whole_copy_fits() -> None:
    plan = planned("argonne-3.0-pretrain", "h200", 8, parallel__shard=4)
    assert (plan.layout["replicate"], plan.layout["shard"], plan.refusals) == (2, 4, [])


def test_degrees_that_are_too_small_are_told_the_shard_that_fits_on_the_same_devices() -> None:
    plan = planned("argonne-3.0-pretrain", "rtx-4090", 8, parallel__shard=2)
    assert not plan.fits
    assert "would fit on 8 x rtx-4090 (--parallel.shard 8)" in (plan.advice or "")


def test_fewer_rows_than_devices_are_told() -> None:
    assert any("4 rows for 8 devices" in note for note in planned("argonne-2.0-pretrain", "h200", 8).warnings)
    assert not any("rows for" in note for note in planned("argonne-3.0-pretrain", "h200", 8).warnings)


def test_replicas_hold_their_gradients_in_buckets_all_the_time() -> None:
    alone, copies = (
        planned("argonne-1.0-pretrain", "h200", gpus, batch__tokens_per_step=2048 * 8 * gpus, batch__steps="[]")
        for gpus in (1, 8)
    )
    assert (alone.micro_rows, alone.micro_batches) == (copies.micro_rows, copies.micro_batches) == (8, 1)
    assert copies.memory["gradients"] == 4 * copies.parameters
    assert "gradients" not in alone.memory


def test_the_command_takes_degrees_and_tells_what_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "argonne-2.0-pretrain", "--gpu", "h100", "--gpus", "16", "--parallel.shard", "8"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "replicate 2, shard 8" in said
    assert re.search(r"all-gather over shard 8, within a node at an assumed 337\.5 GB/s", said)
    assert re.search(r"all-reduce over replicate 2, between nodes at an assumed 37\.5 GB/s", said)
    assert main([*asked, "--json"]) == 0
    kinds = [part["kind"] for part in json.loads(capsys.readouterr().out)["traffic"]]
    assert kinds == ["all-gather", "reduce-scatter", "all-reduce"]


@pytest.mark.parametrize("degrees", [("--parallel.shard", "3"), ("--parallel.replicate", "3"), ("--gpus", "0")])
def test_degrees_that_do_not_make_the_devices_end_with_2(
    degrees: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "argonne-2.0-pretrain", "--gpu", "h100", "--gpus", "8", *degrees]) == 2
    assert re.search(r"do not make 8 devices; give --gpus|--gpus: found 0", capsys.readouterr().err)


def test_degrees_that_do_not_make_the_devices_name_those_that_would() -> None:
    with pytest.raises(InputError, match="give --gpus a multiple of 3, or other degrees"):
        planned("argonne-2.0-pretrain", "h100", 8, parallel__shard=3)
    with pytest.raises(InputError, match="give --gpus 6, or other degrees"):
        planned("argonne-2.0-pretrain", "h100", 8, parallel__shard=3, parallel__replicate=2)


def test_a_single_device_sends_nothing_and_says_nothing_of_it() -> None:
    plan = planned("argonne-3.0-pretrain", "h200", 1)
    assert (plan.traffic, plan.traffic_seconds) == ([], 0)
    assert not any("sends" in line for line in plan_lines(plan))


@pytest.mark.parametrize("name", ["plans", "shards", "fits", "links"])
def test_the_page_has_what_the_command_gives(name: str) -> None:
    begin, end = f"<!-- {name} begin -->\n", f"\n<!-- {name} end -->"
    assert PAGE.read_text().split(begin)[1].split(end)[0] == meshes.markdown()[name]


def test_every_card_of_the_plan_has_a_link_and_the_page_says_what_is_assumed() -> None:
    from argonne.plan import device_names

    assert set(LINKS) == set(device_names()) - {"cpu"}
    assert f"{100 * LINK_USE:.0f} %" in PAGE.read_text()
    assert f"nodes of {NODE}" in PAGE.read_text()

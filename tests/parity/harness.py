"""What a step comes to: on the workers of a mesh, started once for many cases, and in one process. In float64.

Every piece is the product's own: mesh, mode, loader, optimizer, step. Only the model is tiny, with rough weights, and
the rows are drawn from the step's number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from argonne.config import DpoSection, OptimSection, ParallelSection
from argonne.data.loader import Array, Arrays, Loader
from argonne.model.build import Weights, build_model, config_from_fields, empty_model
from argonne.parallel.compile import compile_blocks, eager_blocks
from argonne.parallel.context import CONTEXT
from argonne.parallel.launch import run_workers
from argonne.parallel.mesh import Mesh, open_mesh
from argonne.parallel.objective import Head, Loss, MicroBatch, Objective
from argonne.parallel.parallelise import REPLICATED
from argonne.parallel.pipeline import PIPELINE
from argonne.parallel.shard import SHARDED
from argonne.parallel.tensor import TENSOR
from argonne.presets import preset
from argonne.train.objectives import next_token, next_token_by_row
from argonne.train.optim import Precision, build_optimizer
from argonne.train.preference import preference
from argonne.train.trainer import Trained, take_step
from tests.model.conftest import roughen
from tests.parity import mutations

VOCABULARY, LENGTH, PAIRS = 401, 32, 2
# Of every generation: odd where ranks could divide it, so that parts are uneven.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 46,
    "num_attention_heads": 6,
    "head_dim": 10,
    "intermediate_size": 54,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
RATE = 1e-2

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A model, how it is spread, and what a step does. `rows`: of a global batch; five on four ranks leave one with a
    row that only fills up. masked: rank 0's rows train nothing. untrained: so many first places of every row train
    nothing. fails: the first pass raises in the middle on every rank, as where compiling fails, and the step is tried
    again. answers: so many tokens are written in the end, one at a time, after a prompt.
    """

    generation: str = "3.0"
    replicate: int = 1
    shard: int = 1
    objective: str = "next_token"
    documents: bool = False
    recompute: str = "none"
    loss: str = "chunked"
    optimizer: str = "adamw"
    micro: int = 8
    rows: int = 8
    z_loss: float = 0.0
    masked: bool = False
    fails: bool = False
    compile: bool = False
    steps: int = 5
    context: int = 1
    length: int = LENGTH
    untrained: int = 0
    kernel: str = "auto"
    mutation: str = ""
    tensor: int = 1
    pipeline: int = 1
    schedule: str = "1f1b"
    layers: int = 2
    heads: tuple[int, int] | None = None  # of queries and keys, else 6 and 2 or 6
    dropout: float = 0.0
    answers: int = 0

    @property
    def world(self) -> int:
        return self.replicate * self.shard * self.context * self.tensor * self.pipeline

    @property
    def parts(self) -> int:
        """Ranks that hold one copy of the model, or of a stage of it, between them."""
        return self.tensor * (self.shard * self.context if self.shard > 1 else 1)

    @property
    def split(self) -> tuple[int, int]:
        return (self.tensor * 10 + self.pipeline, self.shard) if self.tensor > 1 else (1, 1)

    def alone(self) -> Case:
        """The same on one process, as it should be."""
        one = {"replicate": 1, "shard": 1, "context": 1, "tensor": 1, "pipeline": 1}
        return dataclasses.replace(self, **one, mutation="", fails=False, compile=False)


@dataclass(frozen=True)
class Found:
    """loss: summed over all ranks, by its count. copies: what each rank holds of the weights in the end, hashed.
    held_out: the loss of evaluation. logits: after the prompt and after each token that was written. differing: of what
    two stages hold, what is not the same.
    """

    loss: float
    gradients: Tensors
    norm: float
    weights: Tensors
    copies: list[int] = field(default_factory=list)
    held_out: float = 0.0
    logits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    differing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Drawn:
    """Rows of a step by its number; the data of a loader."""

    case: Case
    reads_model: bool = False

    @property
    def unit(self) -> str:
        return "pairs" if self.case.objective == "dpo" else "tokens"

    def rows(self, step: int) -> int:
        return self.case.rows

    def check(self) -> None: ...

    def not_waiting(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def read(self, step: int, first: int, count: int, rows: int) -> Arrays:
        case, length, draw = self.case, self.case.length, np.random.default_rng(step)
        shape = (case.rows, length)
        ids = draw.integers(0, VOCABULARY, (case.rows, length + 1))
        labels = np.where(draw.random(shape) < 0.8, ids[:, 1:], -100)
        if case.masked:
            labels[: -(-case.rows // 2)] = -100
        labels[:, : case.untrained] = -100
        starts = draw.random(shape) < 0.1
        place = np.arange(length)
        positions = place - np.maximum.accumulate(np.where(starts | (place == 0), place, 0), axis=1)
        arrays = {
            "input_ids": Array(ids[:, :-1], 0),
            "shift_labels": Array(labels, -100),
            "tokens": Array((labels >= 0).sum(1), 0),
            "source": Array(np.zeros(case.rows, np.int64), -1),
        }
        if case.documents:
            arrays["position_ids"] = Array(positions, place)
        if case.objective == "dpo":
            arrays["answer"] = Array(place // (length // (2 * PAIRS)) + np.zeros(shape, np.int64), 0)
            arrays["reference"] = Array(draw.normal(-40.0, 5.0, (case.rows, PAIRS, 2)), 0.0)
            arrays["pairs"] = Array(np.full(case.rows, PAIRS), 0)
        return {name: array.cut(first, count, rows) for name, array in arrays.items()}


class Planted(Exception):
    """In the middle of a forward pass."""


def objective_of(case: Case) -> Objective:
    named = {"next_token": next_token, "by_row": next_token_by_row, "dpo": preference(DpoSection(beta=0.05))}
    objective, left = named[case.objective], [case.fails]

    def failing(head: Head, hidden: Tensor, micro: MicroBatch) -> Loss:
        if left.pop():
            left.append(False)
            raise Planted
        left.append(False)
        return objective(head, hidden, micro)

    return failing if case.fails else objective


def rough_weights(case: Case) -> Weights:
    """Weights far from their initial values, in order, one at a time."""
    released = preset(f"argonne-{case.generation}").fields
    grouped = released["num_key_value_heads"] < released["num_attention_heads"]
    kinds = ["full_attention", "sliding_attention" if released["sliding_window"] else "full_attention"]
    own = {"num_key_value_heads": 2 if grouped else 6, "num_hidden_layers": case.layers}
    own |= {"layer_types": (kinds * case.layers)[: case.layers]}
    if released["sliding_window"]:
        own |= {"sliding_window": 9}
    if case.heads is not None:
        own |= dict(zip(("num_attention_heads", "num_key_value_heads"), case.heads, strict=True))
    dropped = {"hidden_dropout": case.dropout, "attention_dropout": case.dropout}
    config = config_from_fields({**released, **SIZES, **own, **dropped})
    whole = roughen(build_model(config, seed=0, dtype=torch.float64))
    tensors = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    empty = empty_model(config)
    empty.configure_training(
        attention=case.kernel,
        activation_checkpointing=case.recompute,
        loss=case.loss,
        loss_chunk=7,
        z_loss=case.z_loss,
    )
    return Weights(empty, lambda: iter(sorted(tensors.items())))


def whole(tensor: Tensor) -> np.ndarray:
    value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return value.detach().clone().numpy()


def joined(mesh: Mesh, mine: Tensors, differing: list[str]) -> Tensors:
    """What all ranks hold under its name. differing: gets those of which two stages hold other bits."""
    found: Tensors = {}
    for part in mesh.gather(mine) if mesh.pipeline > 1 else [mine]:
        for name, value in part.items():
            if not np.array_equal(found.setdefault(name, value), value):
                differing.append(name)
    return found


def compute(case: Case, mesh: Mesh) -> Found:
    """Loss and gradients of step 0, then the weights after all steps."""
    precision = Precision("fp32", mesh.device)
    modes = {PIPELINE: case.pipeline, TENSOR: case.tensor, CONTEXT: case.context, SHARDED: case.shard}
    mode = next((mode for mode, degree in modes.items() if degree > 1), REPLICATED)
    model = mode.parallelise(rough_weights(case), mesh, objective_of(case), precision)
    optim = OptimSection(lr=RATE, name=case.optimizer, muon_dtype="float64", muon_lr=RATE, weight_decay=0.1)
    optimizer = build_optimizer(model.plain, optim, mesh)
    if case.compile:
        torch.compiler.reset()  # or the layers of earlier cases count against the limit of graphs
        compile_blocks(model.plain, tensor=case.tensor > 1)
    trained, data = Trained(model, optimizer, precision), Drawn(case)
    with Loader(data, mesh.data_rank, mesh.data_size, case.micro, prefetch=0) as loader:
        batches = [loader.batch(step) for step in range(case.steps)]
    counts = [mesh.sum_later([batch.count * mesh.speaks_for_its_rows])()[0] for batch in batches]
    if case.fails:
        with contextlib.suppress(Planted):
            model.forward_backward(batches[0].micro_batches, counts[0])
    optimizer.zero_grad(set_to_none=True)
    torch.manual_seed(mesh.rank % mesh.inner)
    sums = model.forward_backward(batches[0].micro_batches, counts[0])
    named = dict(model.plain.named_parameters())
    norm = model.gradient_norm(list(named.values()))
    gradients = {name: whole(parameter.grad) for name, parameter in named.items() if parameter.grad is not None}
    gradients = joined(mesh, gradients, differing := [])
    loss = sum(mesh.gather(float(sums.total))) / counts[0]
    for batch, count in zip(batches, counts, strict=True):
        take_step(trained, batch, count, RATE, grad_clip=1.0)
    held = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in named.values()]
    mine = crc32(b"".join(part.detach().numpy().tobytes() for part in held))
    weights = joined(mesh, {name: whole(parameter) for name, parameter in named.items()}, differing)
    with eager_blocks(model.plain):
        evaluated = sum(float(model.evaluate(micro).total) for micro in batches[0].micro_batches)
        logits = written(model.plain, case.answers)
    held_out = sum(mesh.gather(evaluated)) / (mesh.inner * mesh.pipeline)
    return Found(loss, gradients, float(norm), weights, mesh.gather(mine), held_out, logits, differing)


def written(model: Any, count: int) -> np.ndarray:
    """Logits (1 + count, 2, V) of a prompt of five tokens, and of tokens that follow it, one at a time with a cache."""
    model.eval()
    ids = torch.arange(2 * (5 + count)).reshape(2, -1)
    found, cache = [], None
    with torch.no_grad():
        for part in ids.split([5] + [1] * count, dim=1) if count else ():
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[:, -1].numpy())
    return np.array(found)


def _work(cases: Sequence[Case]) -> list[Found]:
    """One worker's life: every case, each on a mesh of its own."""
    torch.set_num_threads(1)
    found = []
    for number, case in enumerate(cases):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # ranks meet under another name in the store
        parallel = ParallelSection(
            replicate=case.replicate,
            shard=case.shard,
            context=case.context,
            tensor=case.tensor,
            pipeline=case.pipeline,
            schedule=case.schedule,
        )
        with open_mesh(parallel, "cpu", timeout_seconds=20) as mesh, mutations.planted(case.mutation):
            result = compute(case, mesh)
            found.append(result if mesh.is_main else dataclasses.replace(result, gradients={}, weights={}))
    return found


def on_workers(cases: Sequence[Case]) -> dict[Case, Found]:
    """What each case comes to; workers are started once for each number of them, and for each mesh with tensor
    parallelism: DTensor remembers the groups of a mesh by its shape, and those of another case are gone.
    """
    found: dict[Case, Found] = {}
    for world, shape in sorted({(case.world, case.split) for case in cases}):
        mine = [case for case in cases if (case.world, case.split) == (world, shape)]
        results = run_workers(
            _work, (mine,), count=world, max_restarts=0, grace_seconds=5, preload=("tests.parity.harness",)
        )
        found |= dict(zip(mine, results[0], strict=True))
    return found


def in_one_process(case: Case) -> Found:
    return compute(case.alone(), Mesh(torch.device("cpu")))


def problems(case: Case, found: Found, expected: Found, relative: float = 1e-9) -> list[str]:
    """Where the two differ: loss and norm by themselves, a gradient by the largest of its tensor, weights by the
    largest or by what so many steps can move them; and copies of the model that are not equal bit for bit.
    """
    wrong = []
    width = case.world // case.pipeline
    for stage in (found.copies[first : first + width] for first in range(0, case.world, width)):
        if stage != stage[: case.parts] * (width // case.parts):
            wrong.append(f"copies of the model differ: {found.copies}")
    wrong += [f"{name} differs between stages" for name in found.differing]
    if case.answers and not np.allclose(found.logits, expected.logits, relative * 100, relative * 100):
        wrong.append(f"logits of what is written: {np.abs(found.logits - expected.logits).max():.2e}")
    numbers = ((name, getattr(found, name), getattr(expected, name)) for name in ("loss", "norm", "held_out"))
    for name, mine, theirs in numbers:
        if not abs(mine - theirs) <= max(relative, 1e-6 if name == "loss" else 0) * abs(theirs):  # sums are fp32
            wrong.append(f"{name}: {mine} instead of {theirs}")
    if found.gradients.keys() != expected.gradients.keys():
        return [*wrong, f"gradients of {sorted(found.gradients.keys() ^ expected.gradients.keys())}"]
    largest = max(float(np.abs(one).max()) for one in expected.gradients.values())
    for name, theirs in expected.gradients.items():
        # A bias of keys moves no weight of attention: its gradient is rounding alone.
        scale = 1e-3 * largest if name.endswith("k_proj.bias") else float(np.abs(theirs).max())
        error = float(np.abs(found.gradients[name] - theirs).max())
        if not error <= relative * scale:
            wrong.append(f"gradient of {name}: {error:.2e} of {scale:.2e}")
    for name, theirs in expected.weights.items():
        scale = max(float(np.abs(theirs).max()), case.steps * RATE)
        if name.endswith("k_proj.bias"):
            continue  # Adam makes whole steps of its rounding
        error = float(np.abs(found.weights[name] - theirs).max())
        if not error <= 10 * relative * scale:
            wrong.append(f"weights of {name}: {error:.2e} of {scale:.2e}")
    return wrong

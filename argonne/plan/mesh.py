"""Degrees of parallelism over a number of devices, and what a device sends in a step, by kind of collective.

Bytes are those of rings, as NCCL runs them: of n ranks each sends (n - 1) / n of the whole tensor in an all-gather or a
reduce-scatter, and twice that in an all-reduce (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for
clusters of workstations", 2009). How often each happens follows the modes of `argonne/parallel`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.keys import check, check_heads, check_mesh
from argonne.plan.memory import Setup
from argonne.plan.shape import ModelShape

NODE = 8  # devices that a node is assumed to have
# Of a link's rate by its data sheet, what collectives of large tensors are assumed to reach.
LINK_USE = 0.75
_PCIE_4, _PCIE_5 = 32, 64  # 16 lanes
# GB/s by data sheet that one device sends, (to its node, to other nodes): NVLink where every device of a node has it,
# else its PCIe slot; and the network that such nodes usually have, a device's share of it.
LINKS: Mapping[str, tuple[float, float]] = {
    "b200": (900, 50),  # NVLink 5, 1,800 both ways; a 400 Gbit/s adapter a device, as in the HGX reference
    **dict.fromkeys(("gh200", "h200", "h100"), (450, 50)),  # NVLink 4, 900 both ways; the same adapters
    **dict.fromkeys(("h100-nvl", "h100-pcie"), (_PCIE_5, 25)),  # bridges join pairs only; 400 Gbit/s for two
    **dict.fromkeys(("a100-80gb", "a100-40gb"), (300, 25)),  # NVLink 3, 600 both ways; a 200 Gbit/s adapter a device
    "v100": (150, 6.25),  # NVLink 2, 300 both ways; four adapters of 100 Gbit/s for eight
    "rtx-5090": (_PCIE_5, 1.5625),  # here and below: 100 Gbit/s for eight
    **dict.fromkeys(("l40s", "a6000", "a10", "a10g", "l4", "rtx-4090", "rtx-3090"), (_PCIE_4, 1.5625)),
    "t4": (16, 1.5625),  # PCIe 3
}


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; their product is the number of devices."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1

    @property
    def data_parallel(self) -> int:
        return self.replicate * self.shard

    @property
    def inner(self) -> int:
        """Devices that work on the same rows."""
        return self.tensor * self.context * self.pipeline

    @property
    def parts(self) -> int:
        """Devices that hold one copy of weights, gradients and moments between them."""
        return self.shard * self.context if self.shard > 1 else 1

    @property
    def copies(self) -> int:
        return self.data_parallel * self.context // self.parts

    @property
    def devices(self) -> int:
        return self.data_parallel * self.inner

    @property
    def speed(self) -> float:
        """Assumed share of the speed that waiting for others leaves, where sending takes less time than computing."""
        return (
            (0.95 if self.shard > 1 else 1.0) * (0.85 if self.tensor > 1 else 1.0) * (0.9 if self.context > 1 else 1.0)
        )

    @property
    def told(self) -> str:
        return " x ".join(f"{name} {degree}" for name, degree in asdict(self).items() if degree > 1) or "one process"

    def in_a_node(self, dimension: str, node: int = NODE) -> bool:
        """Are the ranks of each group of this dimension on one node? Tensor and context are the innermost dimensions of
        the mesh, then shard, then replicate, then pipeline (argonne/parallel/mesh.py).
        """
        data = self.shard * self.replicate
        outer = {"pipeline": data * self.pipeline, "replicate": data, "shard": self.shard}.get(dimension, 1)
        span = self.tensor * self.context * outer
        return self.devices <= node or node % span == 0


def layouts(recipe: Recipe, shape: ModelShape, devices: int, node: int = NODE) -> list[Layout]:
    """What the recipe's degrees can be on these devices, least communication first: replicas, shards within a node of
    so many devices and over more, tensors and parts of rows within a node, pipelines. The first that fits is the one to
    recommend. Where no degree is open, a shard of 1 beside open replicas is. Raises InputError where there is none.
    """
    asked = recipe.parallel
    opened = asked.open or ("shard",) * (asked.shard == 1 and asked.replicate == 0)
    divisors = [degree for degree in range(1, devices + 1) if devices % degree == 0]
    names = ("shard", "tensor", "context", "pipeline")
    found = []
    for degrees in product(*(divisors if name in opened else (getattr(asked, name),) for name in names)):
        layout = Layout(1, *degrees)
        replicate, left = divmod(devices, layout.devices)
        if not left and asked.replicate in (0, replicate):
            found.append(replace(layout, replicate=replicate))
    if not found:
        told = ", ".join(f"{name} {getattr(asked, name) or 'auto'}" for name in ("replicate", *names))
        least = math.prod(max(1, getattr(asked, name)) for name in ("replicate", *names))
        raise InputError(
            f"[parallel]: {told} do not make {devices} devices; give --gpus "
            f"{'' if asked.replicate and not asked.open else 'a multiple of '}{least}, or other degrees"
        )
    if asked.open:
        refused = [refusal_of(recipe, layout) or _misplaced(recipe, shape, layout, node) for layout in found]
        if all(refused):
            raise InputError(refused[0] or "")
        found = [layout for layout, why in zip(found, refused, strict=True) if why is None]
    return sorted(
        found, key=lambda one: (one.pipeline, one.context, one.tensor, not one.in_a_node("shard", node), one.shard)
    )


def _misplaced(recipe: Recipe, shape: ModelShape, layout: Layout, node: int) -> str | None:
    """Why a layout is not one to choose for this model."""
    stages = layout.pipeline * (recipe.parallel.stages if recipe.parallel.schedule == "interleaved" else 1)
    if layout.pipeline > 1 and stages > shape.num_hidden_layers:
        return f"parallel.pipeline: {stages} stages are more than the model's {shape.num_hidden_layers} layers"
    inner = {"tensor", "context"} & {*recipe.parallel.open}
    if far := [name for name in inner if getattr(layout, name) > 1 and not layout.in_a_node(name, node)]:
        return f"parallel.{far[0]}: a group of {getattr(layout, far[0])} is more than a node of {node}"
    try:
        check_heads(shape.num_attention_heads, layout.tensor)
        check(replace(recipe, parallel=replace(recipe.parallel, **asdict(layout))))
    except InputError as error:
        return str(error)
    return None


def refusal_of(recipe: Recipe, layout: Layout) -> str | None:
    """Why no run starts in this layout, None where one does."""
    try:
        check_mesh(replace(recipe.parallel, **asdict(layout)), layout.devices)
    except InputError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Sent:
    """What one device sends in a step by one kind of collective.

    over: the dimension of the mesh whose groups, of `ranks` ranks, take part. bytes_per_second: assumed; None where no
    link is known.
    """

    kind: str
    over: str
    ranks: int
    bytes: float
    in_a_node: bool
    bytes_per_second: float | None

    @property
    def seconds(self) -> float | None:
        return None if self.bytes_per_second is None else self.bytes / self.bytes_per_second


def traffic_of(shape: ModelShape, setup: Setup, layout: Layout, micro_batches: int, device: str) -> list[Sent]:
    """What a device sends in a step. Counts and sums for loss, norm and stopping are left out: a few bytes each.

    Shards: in each micro-batch every layer is gathered twice, forward and backward, the rest of the model once, and all
    gradients are reduced to their shard. Replicas add their gradients once a step. All in the weights' own dtype:
    autocast narrows them only where they are used. Muon gathers the directions of split matrices; the ranks of a
    tensor group, else of a shard group, or replicas of whole ones, share its work and broadcast the updates.

    Tensor: the stream is gathered where attention and MLP enter, and summed into its parts where they leave, backward
    the other way round; so at the embedding, and where the head enters, whose gradient is summed whole. Gradients of
    gains, and of heads of keys that do not divide, are left out. Parts of rows gather the keys and values of every
    layer in each forward pass, and their gradients are reduced to their part.

    Pipeline: of the stage that holds most. Hidden states go on, and their gradients back, once a micro-batch and stage;
    both ends exchange the gradient of a tied weight. A stage keeps what it gathered for a backward pass until the next
    forward one, and reduces once a step. Between stages the stream is whole on every rank of a tensor group.
    """
    part = max(setup.ranks(shape), key=lambda one: len(one.layers) * shape.layer_parameters() + one.ends(shape))
    count, pipelined = len(part.layers), layout.pipeline > 1
    layers = setup.wide * count * shape.layer_parameters() / layout.tensor
    whole = layers + setup.wide * part.ends(shape) / layout.tensor
    gathered = micro_batches * (layers + whole) if not pipelined else micro_batches * layers + whole
    matrices = count * (shape.attention_weights + shape.mlp_weights) / layout.tensor
    muon = matrices if setup.optimizer == "muon" else 0.0
    of_shard, of_copies, of_replicas, of_context, of_tensor = (
        (n - 1) / n for n in (layout.parts, layout.copies, layout.replicate, layout.context, layout.tensor)
    )
    keys = setup.narrow * 2 * shape.key_width * setup.tokens * layout.context * count / layout.tensor
    again = 1 + setup.share_recomputed(shape.num_hidden_layers)
    recomputed, both = sum(map(setup.recomputes, part.layers)), 2 * count  # attentions and MLPs
    stream = setup.tokens * shape.hidden_size * micro_batches
    # Once for each edge of the stages besides: forward where the stream leaves whole, backward where it entered so.
    texts = stream * (setup.wide * (both + 2 * setup.stages + 2 * recomputed) + setup.narrow * both)
    # The MLP's output is not needed again without a norm on it.
    again_summed = recomputed * (2 if shape.sandwich_norm else 1)
    summed = stream * (setup.wide * (both + part.first) + setup.narrow * (both + again_summed))
    sharers = "tensor" if of_tensor else "shard" if of_shard else "replicate"
    updates = (of_tensor * layout.tensor or of_shard or of_replicas) * setup.muon_width * muon
    sent = [
        ("send", "pipeline", pipelined * _passed_on(shape, setup, setup.wide * stream)),
        ("all-gather", "shard", of_shard * (gathered + setup.wide * muon)),
        ("reduce-scatter", "shard", of_shard * (1 if pipelined else micro_batches) * whole),
        ("all-reduce", "replicate", 2 * of_copies * whole / layout.parts),
        ("all-gather", "context", of_context * micro_batches * again * keys),
        ("reduce-scatter", "context", of_context * micro_batches * keys),
        ("all-gather", "tensor", of_tensor * (texts + setup.wide * muon * layout.tensor)),
        ("reduce-scatter", "tensor", of_tensor * summed),
        ("all-reduce", "tensor", 2 * of_tensor * part.last * setup.wide * stream),
        ("broadcast", sharers, updates),
    ]
    return [_sent(layout, device, *found) for found in sent if found[2]]


def _passed_on(shape: ModelShape, setup: Setup, hidden: float) -> float:
    """Bytes that the busiest rank of a pipeline sends to its neighbours; hidden: those of one stage's output."""
    table = setup.wide * shape.vocab_size * shape.hidden_size / setup.tensor / setup.shard
    at_an_end = (2 * setup.stages - 1) * hidden + table * shape.tie_word_embeddings
    return max(at_an_end, 2 * setup.stages * hidden if setup.pipeline > 2 else 0.0)


def _sent(layout: Layout, device: str, kind: str, over: str, size: float) -> Sent:
    near = layout.in_a_node(over)
    link = LINKS.get(device)
    rate = None if link is None else 1e9 * LINK_USE * link[0 if near else 1]
    sizes = asdict(layout) | {"shard": layout.parts, "replicate": layout.copies}
    ranks = sizes[over]
    return Sent(kind, over, ranks, size, near, rate)


def sending_seconds(traffic: list[Sent]) -> float | None:
    """How long a device sends in a step, one collective after the other; None where a link is not known."""
    times = [sent.seconds for sent in traffic]
    return None if None in times else sum(time for time in times if time is not None)

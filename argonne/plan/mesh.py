"""Degrees of parallelism over a number of devices, and what a device sends in a step, by kind of collective.

Bytes are those of rings, as NCCL runs them: of n ranks each sends (n - 1) / n of the whole tensor in an all-gather or a
reduce-scatter, and twice that in an all-reduce (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for
clusters of workstations", 2009). How often each happens follows the modes of `argonne/parallel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.keys import check_mesh
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
            (0.95 if self.shard > 1 else 1.0)
            * (0.85 if self.tensor > 1 else 1.0)
            * (0.9 if self.context * self.pipeline > 1 else 1.0)
        )

    def in_a_node(self, dimension: str) -> bool:
        """Are the ranks of each group of this dimension on one node? Tensor and context are the innermost dimensions of
        the mesh, then shard, then replicate (argonne/parallel/mesh.py).
        """
        outer = {"replicate": self.shard * self.replicate, "shard": self.shard}.get(dimension, 1)
        span = self.tensor * self.context * outer
        return self.devices <= NODE or NODE % span == 0


def layouts(recipe: Recipe, devices: int) -> Iterator[Layout]:
    """The recipe's degrees; where it shards nothing and leaves the replicas open, then every other shard degree,
    rising: the first that fits is the one to recommend. Raises InputError for degrees that do not make the devices.
    """
    asked = recipe.parallel
    fixed = Layout(max(1, asked.replicate), asked.shard, asked.tensor, asked.context, asked.pipeline)
    copies, left = divmod(devices, fixed.devices)
    if left or (asked.replicate and copies != 1):
        raise InputError(
            f"[parallel]: replicate {asked.replicate or 'auto'}, shard {asked.shard}, tensor {asked.tensor}, context "
            f"{asked.context}, pipeline {asked.pipeline} do not make {devices} devices; give --gpus "
            f"{'' if asked.replicate else 'a multiple of '}{fixed.devices}, or other degrees"
        )
    yield replace(fixed, replicate=copies * fixed.replicate)
    if asked.shard == 1 and asked.replicate == 0:
        for shard in range(2, copies + 1):
            if copies % shard == 0:
                yield replace(fixed, replicate=copies // shard, shard=shard)


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
    """
    part = layout.tensor * layout.pipeline
    layers = setup.wide * shape.num_hidden_layers * shape.layer_parameters() / part
    whole = setup.wide * shape.parameters() / part
    matrices = shape.num_hidden_layers * (shape.attention_weights + shape.mlp_weights) / part
    muon = matrices if setup.optimizer == "muon" else 0.0
    of_shard, of_copies, of_replicas, of_context, of_tensor = (
        (n - 1) / n for n in (layout.parts, layout.copies, layout.replicate, layout.context, layout.tensor)
    )
    keys = setup.narrow * 2 * shape.key_width * setup.tokens * layout.context * shape.num_hidden_layers / part
    again = 1 + setup.share_recomputed(shape.num_hidden_layers)
    recomputed = sum(map(setup.recomputes, range(shape.num_hidden_layers)))
    both = 2 * shape.num_hidden_layers  # attentions and MLPs
    stream = setup.tokens * shape.hidden_size * micro_batches
    gathered = stream * (setup.wide * (both + 2 + 2 * recomputed) + setup.narrow * both)
    # The MLP's output is not needed again without a norm on it.
    again_summed = recomputed * (2 if shape.sandwich_norm else 1)
    summed = stream * (setup.wide * (both + 1) + setup.narrow * (both + again_summed))
    sharers = "tensor" if of_tensor else "shard" if of_shard else "replicate"
    updates = (of_tensor * layout.tensor or of_shard or of_replicas) * setup.muon_width * muon
    sent = [
        ("all-gather", "shard", of_shard * (micro_batches * (layers + whole) + setup.wide * muon)),
        ("reduce-scatter", "shard", of_shard * micro_batches * whole),
        ("all-reduce", "replicate", 2 * of_copies * whole / layout.parts),
        ("all-gather", "context", of_context * micro_batches * again * keys),
        ("reduce-scatter", "context", of_context * micro_batches * keys),
        ("all-gather", "tensor", of_tensor * (gathered + setup.wide * muon * layout.tensor)),
        ("reduce-scatter", "tensor", of_tensor * summed),
        ("all-reduce", "tensor", 2 * of_tensor * setup.wide * stream),
        ("broadcast", sharers, updates),
    ]
    return [_sent(layout, device, *found) for found in sent if found[2]]


def _sent(layout: Layout, device: str, kind: str, over: str, size: float) -> Sent:
    near = layout.in_a_node(over)
    link = LINKS.get(device)
    rate = None if link is None else 1e9 * LINK_USE * link[0 if near else 1]
    sizes = {"shard": layout.parts, "replicate": layout.copies, "context": layout.context, "tensor": layout.tensor}
    ranks = sizes[over]
    return Sent(kind, over, ranks, size, near, rate)


def sending_seconds(traffic: list[Sent]) -> float | None:
    """How long a device sends in a step, one collective after the other; None where a link is not known."""
    times = [sent.seconds for sent in traffic]
    return None if None in times else sum(time for time in times if time is not None)

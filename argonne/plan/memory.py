"""Memory of a training step, by part: which tensors are alive at the moment when most are. Pure arithmetic, in bytes.

The counts follow the code: `argonne/model/modeling_argonne.py` for what autograd keeps of a layer,
`argonne/model/loss.py` for the head and the loss, `argonne/train/step.py` for gradients and moments. Several moments of
a step can be its highest; the plan takes the largest:

- loss: every layer's activations are kept, and the loss holds logits of a chunk and its two gradients;
- backward of a layer: its largest temporaries (and its activations again, where it is recomputed) above what the layers
  below it keep and the gradients of those above it;
- embedding: all gradients exist, and the head's and the embedding's share of a tied weight are added;
- update: weights, gradients and moments.

Of a pipeline each rank has its own layers, with the activations of every micro-batch that is on its way, and the ends
are on one each: the plan takes the rank that holds most.

Widths: `wide` bytes for the residual stream and norms (fp32 under autocast too), `narrow` bytes for what the matrix
products read (2 under autocast).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from argonne.plan.shape import ModelShape
from argonne.plan.stages import Part, parts_of

MIB = 1024**2
# The loss's own choice of a chunk (argonne/model/loss.py, rows_of_chunk): bytes of fp32 logits held at once.
CHUNK_BYTES_CPU, CHUNK_BYTES_GPU, CHUNK_LEAST = 32 * MIB, 1024 * MIB, 256
# A CPU process beside its tensors: code of the libraries that only training touches, their work space, stacks, blocks
# too small to be returned.
PROCESS_CPU = 45e6
# A GPU process: the CUDA context and its libraries' work space, as cards of these years show them.
PROCESS_GPU = 0.8e9
# What Python, torch, transformers, pyarrow and tokenizers take before anything is built; a GPU plan counts the card
# alone.
LIBRARIES_CPU = 0.4e9
PARTS = ("weights", "moments", "gradients", "activations", "logits and loss", "temporaries", "process")


@dataclass(frozen=True)
class Setup:
    """How one device runs a micro-batch. `accumulates`: gradients are held during the pass: of earlier micro-batches,
    or in the buckets of DDP. shard: devices that hold one copy of the model between them. schedule, stages,
    micro_batches: of a pipeline; `stages` are those of one device.
    """

    rows: int
    sequence_length: int
    precision: str = "fp32"
    activation_checkpointing: str = "none"
    checkpointing_stride: int = 2
    loss: str = "full"
    loss_chunk: int = 0
    optimizer: str = "adamw"
    muon_width: int = 4
    cpu: bool = False
    accumulates: bool = False
    shard: int = 1
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    schedule: str = "1f1b"
    stages: int = 1
    micro_batches: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        return self.rows * math.ceil(self.sequence_length / self.context)

    @property
    def wide(self) -> int:
        return 2 if self.precision == "bf16_full" else 4

    @property
    def narrow(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def recomputes(self, layer: int) -> bool:
        """Is this layer run again in the backward pass instead of keeping its activations?"""
        nth = self.activation_checkpointing == "every_nth" and layer % self.checkpointing_stride == 0
        return nth or self.activation_checkpointing == "full"

    def ranks(self, shape: ModelShape) -> list[Part]:
        """What each rank of the pipeline holds; the whole model where there is one."""
        return parts_of(shape, self.pipeline, self.stages, self.schedule, self.micro_batches)

    def share_recomputed(self, layers: int) -> float:
        return sum(self.recomputes(layer) for layer in range(layers)) / layers


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the highest moment of a step, by part, and which moment that is."""

    parts: dict[str, float]
    peak: str

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def memory_of(shape: ModelShape, setup: Setup) -> Memory:
    """The highest moment of a training step, on the rank of a pipeline where it is highest."""
    found: dict[str, dict[str, float]] = {}
    for rank, part in enumerate(setup.ranks(shape)):
        where = f", rank {rank} of the pipeline" if setup.pipeline > 1 else ""
        found |= {f"{moment}{where}": sizes for moment, sizes in peaks(shape, setup, part).items()}
    peak = max(found, key=lambda name: sum(found[name].values()))
    return Memory({part: found[peak][part] for part in PARTS if found[peak].get(part)}, peak)


def peaks(shape: ModelShape, setup: Setup, part: Part | None = None) -> dict[str, dict[str, float]]:
    """Bytes by part at each moment that can be the highest, on one rank of a pipeline, else on its first."""
    part = part or setup.ranks(shape)[0]
    state = State.of(shape, setup, part)
    always = {"weights": state.weights, "moments": state.peaks, "process": PROCESS_CPU if setup.cpu else PROCESS_GPU}
    held = state.held if setup.accumulates else 0.0
    stream = setup.tokens * shape.hidden_size * setup.wide
    share = stream / setup.tensor
    kept = [share if setup.recomputes(layer) else activations_of_layer(shape, setup, layer) for layer in part.layers]
    others = sum(kept) * (part.in_flight - 1)
    if setup.pipeline > 1:  # of every micro-batch what comes from other stages has its place; and what goes there
        others += setup.micro_batches * stream * (2 * setup.stages - part.first - part.last)
        others += part.in_flight * stream * (setup.stages - part.last)
    # The last norm keeps its input, and an RMS norm its normalised value.
    tail = share * (2 if shape.norm_type == "rms" else 1)
    head = 4.0 * shape.vocab_size * shape.hidden_size / setup.tensor
    # The head's gradient: part of the embedding's where they are tied, and then waiting for it; else one of the
    # gradients.
    waits = part.last and (shape.tie_word_embeddings or not setup.accumulates or setup.shard > 1)
    waiting = head if waits else 0.0
    # When the embedding's backward pass ends: of a tied weight two shares to be added. Sharded, the group of embedding
    # and head is whole: both shares and their sum, or both gradients and the copies that are sent.
    ends = head * (setup.accumulates + shape.tie_word_embeddings)
    if setup.shard > 1:
        ends = head * (3 if shape.tie_word_embeddings else 4)
    found = {"update": {**always, "gradients": state.gradients, "temporaries": state.update_temporaries}}
    if part.last:
        found["loss"] = {
            **always,
            "gradients": held,
            "activations": others + sum(kept) + tail,
            "logits and loss": loss_temporaries(shape, setup) + head + 2 * stream,
        }
    if part.first:
        found["embedding"] = {**always, "gradients": state.held, "temporaries": ends + 2 * stream}
    # Going down, activations are given up and, where none are held yet, gradients appear: any layer can be the highest
    # moment.
    for place, layer in enumerate(part.layers):
        above = 0.0 if setup.accumulates else state.gradients_of_layer * (len(part.layers) - 1 - place)
        found[f"backward of layer {layer}"] = {
            **always,
            "gradients": held + waiting + above,
            "activations": others + sum(kept[: place + 1]),
            "temporaries": backward_work(shape, setup, layer),
        }
    return found


@dataclass(frozen=True)
class State:
    """Bytes of what lives from step to step, on one device; held: gradients between micro-batches."""

    weights: float
    gradients: float
    held: float
    peaks: float
    gradients_of_layer: float
    update_temporaries: float

    @staticmethod
    def of(shape: ModelShape, setup: Setup, part: Part | None = None) -> State:
        """fp32 weights, gradients and AdamW's two moments, 16 bytes a parameter (8 with bf16 throughout), over the
        degrees that split them.

        Muon keeps one moment of the layers' matrices, and its update holds the direction and the orthogonal matrix of
        all of them.
        """
        part = part or setup.ranks(shape)[0]
        ends = part.ends(shape)
        local = len(part.layers) * shape.layer_parameters() + ends
        split = setup.shard * setup.tensor
        size = setup.wide
        gathered = 0.0
        if setup.shard > 1:  # two layers and the ends are whole at a time: one computes, the next is on its way
            gathered = size * (2 * shape.layer_parameters() + ends) / setup.tensor
        # A stage reduces its gradients once a step: until then they, and its weights, are whole.
        whole = setup.shard > 1 and setup.pipeline > 1
        if whole:
            gathered = size * local / setup.tensor
        if setup.narrow < size:  # autocast keeps narrow copies until their backward pass, of gathered weights too
            gathered += setup.narrow * local / setup.tensor * part.in_flight
        of_layer = size * shape.layer_parameters() / split
        matrices = turning = 0.0
        if setup.optimizer == "muon":
            matrices = len(part.layers) * (shape.attention_weights + shape.mlp_weights) / split
            short, long = sorted((shape.hidden_size, shape.intermediate_size))
            # One matrix in its Newton-Schulz iteration.
            turning = setup.muon_width * (2.0 * short * long + 3.0 * short * short)
            if setup.shard > 1:  # one for each rank of the group is whole at a time, with its update
                turning += setup.shard * (size + setup.muon_width) * short * long
        return State(
            weights=size * local / split + gathered,
            gradients=size * local / split,
            held=size * local / (setup.tensor if whole else split),
            peaks=2 * size * local / split - size * matrices,
            gradients_of_layer=of_layer,
            update_temporaries=matrices * (size + setup.muon_width) + turning,
        )


def activations_of_layer(shape: ModelShape, setup: Setup, layer: int) -> float:
    """Bytes that autograd keeps of a layer that is not recomputed until its backward pass: what each operation's
    derivative reads.
    """
    hidden, queries, keys = (size / setup.tensor for size in (shape.hidden_size, shape.query_width, shape.key_width))
    wide, narrow, middle = setup.wide, setup.narrow, shape.intermediate_size / setup.tensor
    inner = wide * hidden if shape.norm_type == "rms" else 0  # an RMS norm keeps its normalised value beside its input
    # Twice: residual stream, norm, the norm's output that the products read, whole.
    a_token = 2.0 * (wide * hidden + inner + narrow * shape.hidden_size)
    if shape.sandwich_norm:
        a_token += 2 * (wide + narrow) * hidden
    a_token += (wide + narrow) * (queries * shape.q_norm + keys * (shape.k_norm + shape.v_norm))
    a_token += attention_kept(shape, setup, shape.windows()[layer])
    a_token += narrow * middle * (4 if shape.mlp_gated else 2)
    if shape.hidden_dropout:
        a_token += 2 * (wide if setup.cpu else 1) * hidden
    return setup.tokens * a_token


def attention_kept(shape: ModelShape, setup: Setup, window: int | None) -> float:
    """Bytes a token that attention keeps: q, k, v, the output and the log-sum of each query, or the whole weights where
    no fused kernel runs.
    """
    narrow, length = setup.narrow, setup.sequence_length
    heads, queries, keys = (
        size / setup.tensor for size in (shape.num_attention_heads, shape.query_width, shape.key_width)
    )
    projections = narrow * (2 * queries + 2 * keys * setup.context)  # keys and values of whole rows
    # The CPU's fused kernel has no dropout: weights, mask and dropped weights are whole.
    if setup.cpu and shape.attention_dropout:
        return projections + narrow * 3 * heads * length
    if setup.context > 1:  # under a mask in the products' type, on a GPU repeated for the queries that share a key head
        own = length if window is None else min(length, length / setup.context + window)
        repeated = 1 if setup.cpu else queries / keys
        return projections + 4 * heads + narrow * own * repeated
    # Of `_windowed` in argonne/model/kernels.py: blocks of queries, each with its own and the block's keys before it.
    block = max(32, window or 0)
    if window is None or block >= length:
        return projections + 4 * heads
    others = (-(-length // block) - 1) * block / length
    own_queries = 0.0 if setup.rows == 1 and length % block == 0 else others * queries
    blocks = own_queries + others * (queries + 4 * keys) + block / length * queries
    return projections + narrow * blocks + 4 * heads * (1 + others)


def backward_work(shape: ModelShape, setup: Setup, layer: int) -> float:
    """Bytes of temporaries while a layer runs backward, above what all layers keep; a recomputed layer's activations
    come back first.
    """
    middle = shape.intermediate_size / setup.tensor
    gradients = setup.tokens * setup.narrow * (2 * middle if shape.mlp_gated else middle)
    stream = setup.tokens * shape.hidden_size * setup.wide
    # Its input is kept anyway.
    again = activations_of_layer(shape, setup, layer) - stream / setup.tensor if setup.recomputes(layer) else 0.0
    # The gradient of the MLP's last product is made where the temporaries are most. Sharded, all gradients of the layer
    # are whole, and copied to be sent.
    weight = setup.wide * shape.hidden_size * middle
    if setup.shard > 1:
        weight = 2 * setup.wide * shape.layer_parameters() / setup.tensor
    return again + gradients + weight + 2 * stream


def loss_temporaries(shape: ModelShape, setup: Setup) -> float:
    """Bytes of logits that exist at once, of as many rows as argonne/model/loss.py chooses."""
    vocabulary = shape.vocab_size / setup.tensor
    budget = (CHUNK_BYTES_CPU if setup.cpu else CHUNK_BYTES_GPU) // (4 * shape.vocab_size)
    chunk = setup.loss_chunk or max(CHUNK_LEAST, budget // 64 * 64)
    rows = setup.tokens if setup.loss == "full" else min(chunk, setup.tokens)
    capped = 1 if shape.final_logit_softcapping else 0
    in_place = setup.cpu and setup.narrow == setup.wide
    a_logit = setup.wide * (1 + capped) if in_place else 4 * (2 + capped)  # a softcap keeps its slope beside
    # The head in the products' dtype, and a chunk's share of its gradient.
    cast = 0.0 if in_place else 2 * setup.narrow * vocabulary * shape.hidden_size
    return rows * vocabulary * a_logit + cast + 3 * rows * shape.hidden_size * setup.wide

"""The recipe: a tree of frozen dataclasses. Every key has a type, a default and a one-line meaning.

`argonne/recipe.py` reads, overrides, resolves, compares and writes it. Nothing else decides anything about a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


def key(
    default: Any, meaning: str, choices: tuple[Any, ...] = (), metavar: str | None = None, parse: Callable[[str], Any] | None = None
) -> Any:
    """A recipe key or a flag: its default (MISSING = required), its meaning (shown by --help and written into the saved config), its choices.

    metavar, parse: how a flag's value is called in the help and read from its text.
    """
    return field(default=default, metadata={"meaning": meaning, "choices": choices, "metavar": metavar, "parse": parse})


@dataclass(frozen=True)
class ModelSection:
    """What the model is. A preset or `init_from` gives every field; any field given here overrides it. Unset = from there."""

    preset: str | None = key(None, "model preset by name (`argonne models` lists them)")
    init_from: str | None = key(None, "start from this run, checkpoint, exported folder or Hub id: weights and config")
    initializer: str = key(
        "scaled", "fresh weights: normal 0.02 with scaled residual projections, or the earlier code's widths", ("scaled", "argonne")
    )
    vocab_size: int | None = key(None, "entries of the embedding table")
    hidden_size: int | None = key(None, "width of the residual stream")
    num_hidden_layers: int | None = key(None, "decoder layers")
    num_attention_heads: int | None = key(None, "query heads")
    num_key_value_heads: int | None = key(None, "key and value heads; query heads must be a multiple")
    head_dim: int | None = key(None, "width of a head; hidden_size need not equal heads x head_dim")
    intermediate_size: int | None = key(None, "width of the MLP; unset in a preset-less model: 8/3 hidden, rounded up to 256")
    max_position_embeddings: int | None = key(None, "longest context; raised to data.sequence_length in training")
    position_embedding: str | None = key(None, "how positions enter", ("rope", "learned"))
    rope_theta: float | None = key(None, "base of the rotary frequencies")
    norm_type: str | None = key(None, "kind of every norm", ("rms", "layer"))
    rms_norm_eps: float | None = key(None, "epsilon of every norm")
    hidden_act: str | None = key(None, "MLP activation", ("silu", "gelu"))
    mlp_gated: bool | None = key(None, "SwiGLU-style gate in the MLP")
    attention_bias: bool | None = key(None, "biases in the attention projections")
    mlp_bias: bool | None = key(None, "biases in the MLP projections")
    attention_dropout: float | None = key(None, "dropout on attention probabilities in training")
    hidden_dropout: float | None = key(None, "dropout on embeddings and on the outputs of attention and MLP in training")
    tie_word_embeddings: bool | None = key(None, "head shares the embedding's weight")
    q_norm: bool | None = key(None, "RMS norm of each query head before RoPE")
    k_norm: bool | None = key(None, "RMS norm of each key head before RoPE")
    v_norm: bool | None = key(None, "RMS norm of each value head")
    sandwich_norm: bool | None = key(None, "norms after attention and after the MLP as well")
    layer_types: tuple[str, ...] | None = key(None, "full_attention or sliding_attention, one a layer")
    sliding_window: int | None = key(None, "keys a query of a sliding layer sees, itself included")
    final_logit_softcapping: float | None = key(None, "logits become cap * tanh(logits / cap); 0 = none")


@dataclass(frozen=True)
class SourceSection:
    """One source of a mixture."""

    path: str = key("", "token set: a folder written by `argonne prepare`, or a token file of a known format")
    weight: float = key(1.0, "share of the tokens, relative to the other sources")
    max_epochs: float = key(1.0, "passes over the source before the run is refused")


@dataclass(frozen=True)
class DataSection:
    sources: tuple[SourceSection, ...] = key((), "token sets and their weights: [{ path, weight, max_epochs }]")
    input: tuple[str, ...] = key((), "globs of text files, instead of sources: the first that matches is tokenised ahead of the trainer")
    tokenizer: str | None = key(None, "folder of the tokenizer (with `input`; otherwise the token set's own)")
    text_column: str = key("text", "column or field that holds the text (with `input`)")
    sequence_length: int = key(1024, "tokens of a training row")
    order: str = key("sequential", "order of the windows", ("sequential", "shuffled"))
    document_mask: bool = key(False, "attention and targets do not cross documents")
    documents: str = key("packed", "windows across documents, within long ones, or the first of each", ("packed", "within", "first-window"))
    reader: str = key("every-rank", "who reads the shards", ("every-rank", "rank-0"))
    verify: str = key("background", "when the shards' hashes are checked", ("background", "before", "off"))
    prefetch: str = key("steps", "with `input`: start when the first steps' tokens are there, or wait for all", ("steps", "all"))
    hold_out: float = key(0.0, "with `input`: share of the documents held out (a token set brings its own)")
    max_drop_fraction: float = key(0.1, "abort when more rows than this were dropped")
    quality_filter: bool = key(False, "with `input`: drop text that is mostly digits or symbols")
    bos: bool = key(False, "with `input`: begin each document with the tokenizer's BOS")


@dataclass(frozen=True)
class BatchChange:
    """The batch from one step on."""

    step: int = key(0, "first step with these values")
    tokens_per_step: int | None = key(None, "tokens of the global batch from there")
    sequence_length: int | None = key(None, "tokens of a row from there")


@dataclass(frozen=True)
class BatchSection:
    tokens_per_step: int = key(65536, "tokens of the global batch: a multiple of the sequence length")
    micro: int | str = key("auto", "rows a forward pass holds on one device, or auto")
    steps: tuple[BatchChange, ...] = key((), "changes during the run: [{ step, tokens_per_step, sequence_length }]")


@dataclass(frozen=True)
class OptimSection:
    name: str = key("adamw", "optimizer; muon: matrices by Muon, the rest by AdamW", ("adamw", "muon"))
    lr: float = key(3e-4, "peak learning rate")
    betas: tuple[float, float] = key((0.9, 0.95), "AdamW's decay rates of the moments")
    eps: float = key(1e-8, "AdamW's epsilon")
    weight_decay: float = key(0.1, "decoupled weight decay")
    decay_all: bool = key(False, "decay norms, biases and embeddings too, as the family's own runs did")
    grad_clip: float = key(1.0, "largest global gradient norm; 0 = no clipping")
    muon_lr: float = key(0.02, "peak learning rate of the matrices under Muon")
    muon_momentum: float = key(0.95, "Muon's momentum")
    muon_dtype: str = key("float32", "dtype of Muon's orthogonalisation", ("float32", "bfloat16"))
    max_skipped: int = key(10, "steps in a row with a non-finite gradient before the run aborts")


@dataclass(frozen=True)
class RateChange:
    """The learning rate from one step on (schedule kind `steps`)."""

    step: int = key(0, "first step with this rate")
    lr: float = key(0.0, "learning rate from there")


@dataclass(frozen=True)
class ScheduleSection:
    kind: str = key("wsd", "shape of the learning rate", ("cosine", "wsd", "constant", "steps"))
    warmup: int = key(0, "steps of linear warmup")
    decay: float | None = key(
        None, "wsd: steps of the final decay (whole number from 1 on) or share of the run (below 1); 0 = none, on purpose"
    )
    min_ratio: float | None = key(None, "final rate as a share of the peak (default 0.1)")
    min_lr: float | None = key(None, "final rate, instead of min_ratio")
    steps: tuple[RateChange, ...] = key((), "kind steps: [{ step, lr }]")


@dataclass(frozen=True)
class TrainSection:
    steps: int | None = key(None, "length of the run in optimizer steps")
    tokens: int | None = key(None, "length of the run in tokens, instead of steps")
    epochs: float | None = key(None, "length of the run in passes over the data, instead of steps")
    precision: str = key("auto", "auto: bf16 on CUDA, fp32 on the CPU", ("auto", "bf16", "fp16", "fp32", "bf16_full"))
    device: str = key("auto", "where to train", ("auto", "cpu", "cuda", "mps"))
    compile: str = key("auto", "compile each block; auto: on CUDA", ("auto", "on", "off"))
    activation_checkpointing: str = key("auto", "recompute layers in the backward pass", ("auto", "none", "every_nth", "full"))
    checkpointing_stride: int = key(2, "every_nth: recompute one layer in this many")
    attention: str = key("auto", "attention kernel", ("auto", "flash", "varlen", "flex", "sdpa", "math"))
    loss: str = key("auto", "cross-entropy over whole logits or in chunks", ("auto", "full", "chunked"))
    loss_chunk: int = key(0, "rows of a chunk; 0 = chosen")
    z_loss: float = key(0.0, "weight of the squared log-partition penalty")
    deterministic: bool = key(False, "bit-identical results on a GPU, slower")
    threads: int = key(0, "CPU threads a worker; 0 = cores divided by workers")
    return_memory: str = key("auto", "CPU: give freed memory back at once, slower; auto: in runs planned above 1 GB", ("auto", "on", "off"))


@dataclass(frozen=True)
class CheckpointSection:
    every_steps: int = key(0, "save after this many steps; 0 = not by steps")
    every_minutes: float = key(30.0, "save after this many minutes; 0 = not by time")
    keep_last: int = key(2, "newest checkpoints kept")
    keep_every: int = key(0, "checkpoints whose step is a multiple are kept for good; 0 = none")
    keep_best: bool = key(False, "the checkpoint with the lowest held-out loss is kept too")
    asynchronous: bool = key(False, "write while training goes on")
    sample_prompt: str = key("Long long time ago", "prompt of the text sampled at each checkpoint; empty = none")
    sample_tokens: int = key(100, "tokens sampled at each checkpoint")


@dataclass(frozen=True)
class EvalSection:
    every_steps: int = key(0, "held-out loss after this many steps; 0 = at the end only")
    windows: int = key(64, "held-out windows read each time; 0 = none")
    tasks: tuple[str, ...] = key((), "tasks measured at the end")


@dataclass(frozen=True)
class LogSection:
    every_steps: int = key(10, "steps between log lines")
    tensorboard: bool = key(True, "write TensorBoard files where tensorboard is installed")
    wandb: str | None = key(None, "Weights & Biases project; unset = off")
    telemetry_limit: str = key("5m", "a sample or a held-out evaluation that takes longer is given up; training goes on")


@dataclass(frozen=True)
class ParallelSection:
    nproc: int = key(0, "local worker processes; 0 = one a GPU, one on the CPU")
    replicate: int = key(0, "data-parallel degree; 0 = what is left")
    shard: int = key(1, "degree of fully sharded data parallelism")
    tensor: int = key(1, "degree of tensor parallelism")
    context: int = key(1, "degree of context parallelism")
    pipeline: int = key(1, "degree of pipeline parallelism")
    max_restarts: int = key(3, "restarts of failed workers")
    timeout: str = key("20m", "a worker that makes no step for this long is taken for hung: stacks are written and all stop")
    async_tensor: bool = key(False, "overlap tensor-parallel collectives with compute (CUDA)")


@dataclass(frozen=True)
class StopSection:
    wall_time: str | None = key(None, "stop and save after this long: seconds, or 90m, 12h, 1-12:00:00")
    deadline: str | None = key(None, "stop and save before this moment: ISO 8601, or Unix seconds")
    grace: str = key("15m", "time a stopping run has for its save")


@dataclass(frozen=True)
class Recipe:
    stage: str = key("pretrain", "which stage this recipe runs", ("pretrain", "midtrain", "sft", "cot-sft", "dpo"))
    seed: int = key(444, "seed of weights, order and dropout")
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    batch: BatchSection = field(default_factory=BatchSection)
    optim: OptimSection = field(default_factory=OptimSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    train: TrainSection = field(default_factory=TrainSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    eval: EvalSection = field(default_factory=EvalSection)
    log: LogSection = field(default_factory=LogSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    stop: StopSection = field(default_factory=StopSection)

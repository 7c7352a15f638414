"""The recipe: a tree of frozen dataclasses. Every key has a type, a default and a one-line meaning.

`argonne/recipe.py` reads, overrides, resolves, compares and writes it. Nothing else decides anything about a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from argonne.declare import key
from argonne.operation import CheckpointSection, EvalSection, LogSection, ParallelSection, StopSection

# Stages that read conversations, and those that read running text.
CHAT_STAGES = ("sft", "cot-sft", "dpo")
CHAT = "stage = sft | cot-sft | dpo"
TUNED = "stage = sft | cot-sft"
PREFERENCE = "stage = dpo"
TEXT = "stage = pretrain | midtrain"


@dataclass(frozen=True)
class ModelSection:
    """What the model is. A preset or `init_from` gives every field; any field given here overrides it. Unset = from
    there.
    """

    preset: str | None = key(None, "model preset by name (`argonne models` lists them)")
    init_from: str | None = key(None, "start from this run, checkpoint, exported folder or Hub id: weights and config")
    initializer: str = key(
        "scaled",
        "fresh weights: normal 0.02 with scaled residual projections, or the earlier code's widths",
        ("scaled", "argonne"),
        needs="not model.init_from",
    )
    vocab_size: int | None = key(None, "entries of the embedding table", bounds="at least 1")
    hidden_size: int | None = key(None, "width of the residual stream", bounds="at least 1")
    num_hidden_layers: int | None = key(None, "decoder layers", bounds="at least 1")
    num_attention_heads: int | None = key(None, "query heads", bounds="at least 1")
    num_key_value_heads: int | None = key(None, "key and value heads; query heads are a multiple", bounds="at least 1")
    head_dim: int | None = key(None, "width of a head; hidden_size need not be heads x head_dim", bounds="at least 1")
    intermediate_size: int | None = key(
        None, "width of the MLP; unset in a preset-less model: 8/3 hidden, rounded up to 256", bounds="at least 1"
    )
    max_position_embeddings: int | None = key(
        None, "longest context; raised to data.sequence_length in training", bounds="at least 1"
    )
    position_embedding: str | None = key(None, "how positions enter", ("rope", "learned"))
    rope_theta: float | None = key(
        None, "base of the rotary frequencies", bounds="more than 0", needs="model.position_embedding = rope"
    )
    norm_type: str | None = key(None, "kind of every norm", ("rms", "layer"))
    rms_norm_eps: float | None = key(None, "epsilon of every norm", bounds="more than 0")
    hidden_act: str | None = key(None, "MLP activation", ("silu", "gelu"))
    mlp_gated: bool | None = key(None, "SwiGLU-style gate in the MLP")
    attention_bias: bool | None = key(None, "biases in the attention projections")
    mlp_bias: bool | None = key(None, "biases in the MLP projections")
    attention_dropout: float | None = key(
        None, "dropout on attention probabilities in training", bounds="from 0 to below 1"
    )
    hidden_dropout: float | None = key(
        None, "dropout on embeddings and on the outputs of attention and MLP in training", bounds="from 0 to below 1"
    )
    tie_word_embeddings: bool | None = key(None, "head shares the embedding's weight")
    q_norm: bool | None = key(None, "RMS norm of each query head before RoPE")
    k_norm: bool | None = key(None, "RMS norm of each key head before RoPE")
    v_norm: bool | None = key(None, "RMS norm of each value head")
    sandwich_norm: bool | None = key(None, "norms after attention and after the MLP as well")
    layer_types: tuple[str, ...] | None = key(None, "full_attention or sliding_attention, one a layer")
    sliding_window: int | None = key(
        None,
        "keys a query of a sliding layer sees, itself included",
        bounds="at least 0",
        needs="model.layer_types has sliding_attention",
    )
    final_logit_softcapping: float | None = key(
        None, "logits become cap * tanh(logits / cap); 0 = none", bounds="at least 0"
    )


@dataclass(frozen=True)
class SourceSection:
    """One source of a mixture."""

    path: str = key(
        "",
        "token set: a folder written by `argonne prepare`, or a token file of a known format; of sft: conversations, a "
        "file, folder or glob of jsonl or parquet",
        changes="order",
    )
    weight: float = key(1.0, "share of the tokens, relative to the other sources", bounds="at least 0", changes="order")
    max_epochs: float = key(1.0, "passes over the source before a run is refused", bounds="more than 0", changes="end")


@dataclass(frozen=True)
class DataSection:
    sources: tuple[SourceSection, ...] = key(
        (), "token sets and their weights: [{ path, weight, max_epochs }]", changes="order"
    )
    input: tuple[str, ...] = key(
        (),
        "globs of text files, instead of sources: the first that matches is tokenised ahead of the trainer",
        needs=TEXT,
        changes="order",
    )
    tokenizer: str | None = key(
        None, "folder of the tokenizer (with `input`; otherwise the token set's own)", changes="order"
    )
    text_column: str = key("text", "column or field that holds the text", needs="data.input", changes="order")
    sequence_length: int = key(1024, "tokens of a training row", bounds="at least 1", changes="order")
    order: str = key("sequential", "order of the windows", ("sequential", "shuffled"), needs=TEXT, changes="order")
    document_mask: bool = key(False, "attention and targets do not cross documents", needs=TEXT)
    documents: str = key(
        "packed",
        "windows across documents, within long ones, or the first of each",
        ("packed", "within", "first-window"),
        needs=TEXT,
        changes="order",
    )
    reader: str = key(
        "every-rank",
        "who reads the shards",
        ("every-rank", "rank-0"),
        changes="speed",
        needs="parallel.nproc != 1",
        free=True,
    )
    verify: str = key(
        "background",
        "when the shards' hashes are checked",
        ("background", "before", "off"),
        needs=TEXT,
        changes="speed",
        free=True,
    )
    prefetch: str = key(
        "steps",
        "start at the first steps' tokens, or wait for all",
        ("steps", "all"),
        changes="speed",
        needs="data.input",
        free=True,
    )
    hold_out: float = key(
        0.0,
        "share of the documents held out (a token set brings its own)",
        bounds="from 0 to below 1",
        needs="data.input",
        changes="order",
    )
    max_drop_fraction: float = key(
        0.1, "abort when more rows than this were dropped", bounds="from 0 to 1", needs="data.input", changes="end"
    )
    quality_filter: bool = key(False, "drop text that is mostly digits or symbols", needs="data.input", changes="order")
    bos: bool = key(False, "begin each document with the tokenizer's BOS", needs="data.input", changes="order")


@dataclass(frozen=True)
class ChatSection:
    """How conversations become rows (stages sft, cot-sft and dpo)."""

    template: str = key(
        "chatml", "Qwen's ChatML, or USER: and ASSISTANT:", ("chatml", "plain"), needs=CHAT, changes="order"
    )
    loss_on: str = key(
        "assistant", "all answers, the last one, or everything", ("assistant", "last", "all"), needs=TUNED
    )
    history_reasoning: str = key(
        "drop", "traces of earlier turns, in training and serving", ("drop", "keep"), needs=CHAT, changes="order"
    )
    too_long: str = key(
        "drop",
        "what happens to a conversation longer than a row",
        ("drop", "drop_oldest_turns", "truncate"),
        needs="stage = sft",
        changes="order",
    )
    hold_out: float = key(
        0.02, "share of the conversations held out", bounds="from 0 to below 1", needs=CHAT, changes="order"
    )
    max_drop_fraction: float = key(
        0.1, "abort when more conversations than this were dropped", bounds="from 0 to 1", needs=CHAT, changes="end"
    )
    probes: int = key(
        8,
        "held-out questions asked at each checkpoint, beside checkpoint.sample_prompt and eight fixed ones",
        bounds="at least 0",
        needs=f"{CHAT} and checkpoint.sample_prompt",
        changes="text",
        free=True,
    )
    cache: str | None = key(
        None,
        "folder of rendered conversations, to share among runs; unset: in the run",
        needs=CHAT,
        changes="files",
        free=True,
    )


@dataclass(frozen=True)
class DpoSection:
    """How pairs are compared (stage dpo)."""

    loss: str = key(
        "sigmoid",
        "which loss of a pair; argonne/train/preference.py has their formulas",
        ("sigmoid", "robust", "ipo", "hinge", "apo-zero", "apo-down"),
        needs=PREFERENCE,
    )
    beta: float = key(0.1, "how much a margin counts", bounds="more than 0", needs=PREFERENCE)
    smoothing: float = key(
        0.0,
        "share of the pairs whose answers are thought to be exchanged",
        bounds="from 0 to below 0.5",
        needs=f"{PREFERENCE} and dpo.loss = sigmoid | robust",
    )
    scores: str = key(
        "sum",
        "an answer's score: the sum of its tokens' log-probabilities, or their mean",
        ("sum", "mean"),
        needs=PREFERENCE,
    )
    chosen_weight: float = key(
        0.0,
        "weight of the chosen answer's mean negative log-likelihood, added to the loss",
        bounds="at least 0",
        needs=PREFERENCE,
    )


@dataclass(frozen=True)
class BatchChange:
    """The batch from one step on."""

    step: int = key(0, "first step with these values", bounds="at least 1", changes="order")
    tokens_per_step: int | None = key(None, "tokens of a global batch from there", bounds="at least 1", changes="order")
    sequence_length: int | None = key(None, "tokens of a row from there", bounds="at least 1", changes="order")


@dataclass(frozen=True)
class BatchSection:
    tokens_per_step: int = key(
        65536, "tokens of the global batch: a multiple of the sequence length", bounds="at least 1", changes="order"
    )
    micro: int | str = key("auto", "rows a forward pass holds on one device, or auto", changes="speed", free=True)
    steps: tuple[BatchChange, ...] = key(
        (), "changes during the run: [{ step, tokens_per_step, sequence_length }]", changes="order"
    )


@dataclass(frozen=True)
class OptimSection:
    name: str = key("adamw", "optimizer; muon: matrices by Muon, the rest by AdamW", ("adamw", "muon"))
    lr: float = key(3e-4, "peak learning rate", bounds="more than 0")
    betas: tuple[float, float] = key((0.9, 0.95), "AdamW's decay rates of the moments", bounds="from 0 to below 1")
    eps: float = key(1e-8, "AdamW's epsilon", bounds="more than 0")
    weight_decay: float = key(0.1, "decoupled weight decay", bounds="at least 0")
    decay_all: bool = key(
        False, "decay norms, biases and embeddings too, as the family's own runs did", needs="optim.weight_decay != 0"
    )
    grad_clip: float = key(1.0, "largest global gradient norm; 0 = no clipping", bounds="at least 0")
    muon_lr: float = key(
        0.02, "peak learning rate of the matrices under Muon", bounds="more than 0", needs="optim.name = muon"
    )
    muon_momentum: float = key(0.95, "Muon's momentum", bounds="from 0 to below 1", needs="optim.name = muon")
    muon_dtype: str = key(
        "float32", "dtype of Muon's orthogonalisation", ("float32", "bfloat16"), needs="optim.name = muon"
    )
    max_skipped: int = key(
        10, "steps in a row with a non-finite gradient before the run aborts", bounds="at least 0", changes="end"
    )


@dataclass(frozen=True)
class RateChange:
    """The learning rate from one step on (schedule kind `steps`)."""

    step: int = key(0, "first step with this rate", bounds="at least 0")
    lr: float = key(0.0, "learning rate from there", bounds="more than 0")


@dataclass(frozen=True)
class ScheduleSection:
    kind: str = key("wsd", "shape of the learning rate", ("cosine", "wsd", "constant", "steps"))
    warmup: int = key(0, "steps of linear warmup", bounds="at least 0")
    decay: float | None = key(
        None,
        "wsd: steps of the final decay (whole number from 1 on) or share of the run (below 1); 0 = none, on purpose",
        bounds="at least 0",
        needs="schedule.kind = wsd",
    )
    min_ratio: float | None = key(
        None,
        "final rate as a share of the peak (default 0.1)",
        bounds="from 0 to 1",
        needs="schedule.kind = cosine | wsd and schedule.decay != 0",
    )
    min_lr: float | None = key(
        None,
        "final rate, instead of min_ratio",
        bounds="at least 0",
        needs="schedule.kind = cosine | wsd and schedule.decay != 0",
    )
    steps: tuple[RateChange, ...] = key((), "kind steps: [{ step, lr }]", needs="schedule.kind = steps")


@dataclass(frozen=True)
class TrainSection:
    steps: int | None = key(None, "length of the run in optimizer steps", bounds="at least 1", changes="weights")
    tokens: int | None = key(None, "length of the run in tokens, instead of steps", bounds="at least 1")
    epochs: float | None = key(None, "length of the run in passes over the data", bounds="more than 0")
    precision: str = key(
        "auto", "auto: bf16 on CUDA; on a CPU where that is faster", ("auto", "bf16", "fp16", "fp32", "bf16_full")
    )
    device: str = key("auto", "where to train", ("auto", "cpu", "cuda", "mps"))
    compile: str = key("auto", "compile each block; auto: on CUDA", ("auto", "on", "off"), changes="speed", free=True)
    activation_checkpointing: str = key(
        "auto",
        "recompute layers in the backward pass",
        ("auto", "none", "every_nth", "full"),
        changes="speed",
        free=True,
    )
    checkpointing_stride: int = key(
        2,
        "every_nth: recompute one layer in this many",
        bounds="at least 1",
        needs="train.activation_checkpointing = every_nth | auto",
        changes="speed",
        free=True,
    )
    attention: str = key("auto", "attention kernel", ("auto", "flash", "varlen", "flex", "blocks", "sdpa", "math"))
    loss: str = key(
        "auto", "cross-entropy over whole logits or in chunks", ("auto", "full", "chunked"), changes="speed", free=True
    )
    loss_chunk: int = key(
        0,
        "rows of a chunk; 0 = chosen",
        bounds="at least 0",
        needs="train.loss = chunked | auto",
        changes="speed",
        free=True,
    )
    z_loss: float = key(
        0.0, "weight of the squared log-partition penalty", bounds="at least 0", needs=f"{TEXT} | sft | cot-sft"
    )
    deterministic: bool = key(False, "bit-identical results on a GPU, slower", changes="speed")
    threads: int = key(
        0, "CPU threads a worker; 0 = cores divided by workers", bounds="at least 0", changes="speed", free=True
    )
    return_memory: str = key(
        "auto",
        "CPU: give freed memory back at once; auto: in runs above 1 GB",
        ("auto", "on", "off"),
        changes="speed",
        free=True,
    )


@dataclass(frozen=True)
class Recipe:
    stage: str = key(
        "pretrain", "which stage this recipe runs", ("pretrain", "midtrain", "sft", "cot-sft", "dpo"), changes="order"
    )
    seed: int = key(444, "seed of weights, order and dropout", bounds="at least 0")
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    chat: ChatSection = field(default_factory=ChatSection)
    dpo: DpoSection = field(default_factory=DpoSection)
    batch: BatchSection = field(default_factory=BatchSection)
    optim: OptimSection = field(default_factory=OptimSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    train: TrainSection = field(default_factory=TrainSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    eval: EvalSection = field(default_factory=EvalSection)
    log: LogSection = field(default_factory=LogSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    stop: StopSection = field(default_factory=StopSection)
    # Keys that a person wrote, in the recipe's own file or on the command line: no key itself, and no part of what a
    # recipe says.
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

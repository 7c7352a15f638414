"""Every key lives: another value changes exactly what the key declares. A key without a flip here fails; so does one
that does nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.config import Recipe
from argonne.errors import InputError
from argonne.keys import all_keys, check_mesh, with_value
from argonne.report.records import read_metrics
from argonne.stages import pretrain, setup
from argonne.train.checkpoint import LAST
from argonne.train.trainer import Trainer
from tests.train.helpers import stored

Nano = Callable[..., Recipe]
Keys = dict[str, str]
STEPS = {
    "train.steps": "4",
    "checkpoint.every_steps": "2",
    "eval.every_steps": "2",
    "eval.windows": "2",
    "checkpoint.sample_tokens": "3",
    "schedule.warmup": "2",
}
TWO = {"parallel.nproc": "2", "parallel.timeout": "60s"}
BARE: Keys = {}


@dataclass(frozen=True)
class Flip:
    """`to`: the other value, said instead of `without`. `under`: what both runs say. `live`: where a run holds what
    nothing else shows.
    """

    to: str
    under: Keys = field(default_factory=dict)
    without: tuple[str, ...] = ()
    live: Callable[[Trainer], Any] | None = None


def options(trainer: Trainer) -> Any:
    model: Any = trainer.parallelised.plain
    return model.model.training_options


FLIPS = {
    "stage": Flip('"midtrain"'),
    "seed": Flip("7"),
    "model.preset": Flip('"nano-2.5"', {"model.layer_types": "none"}),
    "model.initializer": Flip('"argonne"'),
    "model.vocab_size": Flip("600"),
    "model.hidden_size": Flip("48"),
    "model.num_hidden_layers": Flip("3"),
    "model.num_attention_heads": Flip("4"),
    "model.num_key_value_heads": Flip("2"),
    "model.head_dim": Flip("8"),
    "model.intermediate_size": Flip("96"),
    "model.max_position_embeddings": Flip("64", {"model.preset": '"nano-1.0"', "model.num_key_value_heads": "2"}),
    "model.position_embedding": Flip('"learned"'),
    "model.rope_theta": Flip("500.0"),
    "model.norm_type": Flip('"layer"', {"model.sandwich_norm": "false"}),
    "model.rms_norm_eps": Flip("1e-2"),
    "model.hidden_act": Flip('"gelu"'),
    "model.mlp_gated": Flip("false"),
    "model.attention_bias": Flip("true"),
    "model.mlp_bias": Flip("true"),
    "model.attention_dropout": Flip("0.3"),
    "model.hidden_dropout": Flip("0.3"),
    "model.tie_word_embeddings": Flip("false"),
    "model.q_norm": Flip("false"),
    "model.k_norm": Flip("false"),
    "model.v_norm": Flip("false"),
    "model.sandwich_norm": Flip("false"),
    "model.layer_types": Flip('["sliding_attention", "sliding_attention"]', {"model.sliding_window": "4"}),
    "model.sliding_window": Flip("4"),
    "model.final_logit_softcapping": Flip("2.0"),
    "data.order": Flip('"shuffled"'),
    "data.document_mask": Flip("true"),
    "data.documents": Flip('"within"'),
    "data.sequence_length": Flip("64"),
    "data.reader": Flip('"rank-0"', TWO),
    "data.verify": Flip('"off"', live=lambda trainer: vars(trainer.data)["_verification"] is None),
    "batch.tokens_per_step": Flip("512"),
    "batch.micro": Flip("2", live=lambda trainer: trainer.loader.micro_rows),
    "batch.steps": Flip("[{ step = 2, tokens_per_step = 512 }]"),
    "optim.name": Flip('"muon"'),
    "optim.lr": Flip("1e-3"),
    "optim.betas": Flip("[0.5, 0.9]"),
    "optim.eps": Flip("1e-3"),
    "optim.weight_decay": Flip("0.9"),
    "optim.decay_all": Flip("true"),
    "optim.grad_clip": Flip("0.01"),
    "optim.muon_lr": Flip("0.5", {"optim.name": '"muon"'}),
    "optim.muon_momentum": Flip("0.5", {"optim.name": '"muon"'}),
    "optim.muon_dtype": Flip('"bfloat16"', {"optim.name": '"muon"'}),
    "optim.max_skipped": Flip("2", live=lambda trainer: trainer.policy.limit),
    "schedule.kind": Flip('"constant"'),
    "schedule.warmup": Flip("1"),
    "schedule.decay": Flip("0.9", {"schedule.warmup": "0"}),
    "schedule.min_ratio": Flip("0.9"),
    "schedule.min_lr": Flip("1e-5"),
    "schedule.steps": Flip(
        "[{ step = 2, lr = 1e-5 }]", {"schedule.kind": '"steps"', "schedule.steps": "[{ step = 3, lr = 1e-4 }]"}
    ),
    "train.steps": Flip("5"),
    "train.tokens": Flip("768", without=("train.steps",)),
    "train.epochs": Flip("0.008", without=("train.steps",)),
    "train.precision": Flip('"bf16"'),
    "train.activation_checkpointing": Flip('"full"', live=lambda trainer: options(trainer).activation_checkpointing),
    "train.checkpointing_stride": Flip(
        "1",
        {"train.activation_checkpointing": '"every_nth"'},
        live=lambda trainer: options(trainer).checkpointing_stride,
    ),
    "train.attention": Flip('"math"'),
    "train.loss": Flip('"chunked"', live=lambda trainer: options(trainer).loss),
    "train.loss_chunk": Flip("16", {"train.loss": '"chunked"'}, live=lambda trainer: options(trainer).loss_chunk),
    "train.z_loss": Flip("0.1"),
    "train.deterministic": Flip("true", live=lambda trainer: torch.are_deterministic_algorithms_enabled()),
    "train.threads": Flip("2", live=lambda trainer: torch.get_num_threads()),
    "checkpoint.every_steps": Flip("1"),
    "checkpoint.every_minutes": Flip("1e-6"),
    "checkpoint.keep_last": Flip("1"),
    "checkpoint.keep_every": Flip("2", {"checkpoint.every_steps": "1"}),
    "checkpoint.keep_best": Flip(
        "true", {"optim.lr": "1.0", "checkpoint.keep_last": "1", "checkpoint.every_steps": "1", "eval.every_steps": "1"}
    ),
    "checkpoint.asynchronous": Flip("true", live=lambda trainer: trainer.saver.keep.asynchronous),
    "checkpoint.sample_prompt": Flip('"The"'),
    "checkpoint.sample_tokens": Flip("9"),
    "eval.every_steps": Flip("1"),
    "eval.windows": Flip("1"),
    "eval.tasks": Flip('["bpb"]'),
    "eval.task_limit": Flip("2", {"eval.tasks": '["bpb"]'}),
    "log.every_steps": Flip("2"),
    "log.tensorboard": Flip("true"),
    "log.telemetry_limit": Flip('"0s"'),
    "parallel.nproc": Flip("2", live=lambda trainer: trainer.mesh.world_size),
    "stop.wall_time": Flip('"0s"'),
    "stop.deadline": Flip('"2020-01-01T00:00:00+00:00"'),
}
# What acts beside a run of this kind, each with its own tests: a device or a library that is not here, text instead of
# tokens, several processes.
ELSEWHERE = {
    "parallel.context": "tests/parallel/test_context.py",
    "model.init_from": "tests/stages/test_continue.py",
    "data.sources": "tests/data/test_phases.py",
    "data.input": "tests/prepare/test_from_text.py",
    "data.tokenizer": "tests/tokens/test_shards.py",
    "data.text_column": "tests/prepare/test_from_text.py",
    "data.prefetch": "tests/prepare/test_text_kill.py",
    "data.hold_out": "tests/prepare/test_from_text.py",
    "data.max_drop_fraction": "tests/prepare/test_from_text.py",
    "data.quality_filter": "tests/prepare/test_from_text.py",
    "data.bos": "tests/prepare/test_from_text.py",
    **{
        f"chat.{name}": "tests/stages/test_sft.py"
        for name in (
            *("template", "loss_on", "history_reasoning", "too_long", "hold_out", "max_drop_fraction", "cache"),
            "probes",
        )
    },
    **{f"dpo.{name}": "tests/stages/test_dpo.py" for name in ("loss", "beta", "smoothing", "scores", "chosen_weight")},
    "train.device": "tests/parallel/test_mesh.py",
    "train.compile": "tests/train/test_recovery.py",
    "train.return_memory": "tests/train/test_allocator.py",
    "log.wandb": "tests/train/test_telemetry.py",
    "log.trackio": "tests/train/test_telemetry.py",
    "parallel.replicate": "tests/parallel/test_sharded.py",
    "parallel.shard": "tests/seam/test_seam.py",
    "parallel.tensor": "tests/parallel/test_tensor.py",
    "parallel.pipeline": "tests/parallel/test_pipeline.py",
    "parallel.schedule": "tests/parallel/test_pipeline.py",
    "parallel.stages": "tests/parallel/test_pipeline.py",
    "parallel.max_restarts": "tests/parallel/test_failures.py",
    "parallel.timeout": "tests/parallel/test_failures.py",
    "stop.grace": "tests/parallel/test_failures.py",
}
REFUSED = ("parallel.async_tensor",)


@dataclass(frozen=True)
class Seen:
    """What a run left: the outcome, its weights, what it read, its files and records, its texts, and the live value."""

    end: Any
    weights: Any
    order: Any
    files: Any
    text: Any
    live: Any


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """Reference runs by what they say."""
    return {}


def task_tokens(record: dict[str, Any]) -> int:
    """Of a task's record, 0 of another."""
    return int(record.get("values", {}).get("tokens", 0))


def look(recipe: Recipe, folder: Path, patch: pytest.MonkeyPatch) -> Seen:
    values: dict[str, Any] = {}
    plain = Trainer.fit

    def fit(self: Trainer, *arguments: Any, **named: Any) -> Any:
        values.update({path: flip.live(self) for path, flip in FLIPS.items() if flip.live is not None})
        return plain(self, *arguments, **named)

    threads = torch.get_num_threads()
    with patch.context() as inner:
        inner.setattr(Trainer, "fit", fit)
        outcome = pretrain.run(recipe, folder).outcome
    torch.set_num_threads(threads)
    manifest = json.loads((folder / "manifest.json").read_text())
    state = json.loads((folder / LAST / "state.json").read_text())
    metrics = read_metrics(folder)
    data = state["data"]
    records = sorted(
        (
            record["event"],
            record["step"],
            record.get("tokens") if record["event"] == "held_out" else task_tokens(record),
        )
        for record in metrics.records
    )
    names = sorted(
        {
            str(path.relative_to(folder)).split("events.out")[0]
            for path in folder.rglob("*")
            if "stacks" not in path.name
        }
    )
    return Seen(
        end=outcome,
        weights=stored(folder / LAST),
        order=(data["phases"], data["positions"], data["tokens"], manifest["stage"]),
        files=(names, records),
        text=[(record["prompt"], record["text"]) for record in metrics.of("sample")],
        live=values,
    )


def verify(path: str, before: Seen, after: Seen) -> None:
    """The two runs differ in what the key declares, and keys that promise to leave the weights alone do."""
    changes = all_keys()[path].metadata["changes"]
    if changes == "speed":
        assert (before.end, before.order, before.text) == (after.end, after.order, after.text)
        assert before.weights.keys() == after.weights.keys()
        if FLIPS[path].live is not None:
            assert before.live.get(path) != after.live.get(path)
        for name, raw in before.weights.items():
            left, right = (
                torch.frombuffer(bytearray(part), dtype=torch.float32) for part in (raw, after.weights[name])
            )
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)
    elif changes == "end":
        assert (before.end, before.live.get(path)) != (after.end, after.live.get(path))
    else:
        assert getattr(before, changes) != getattr(after, changes)
        if changes in ("files", "text"):
            assert before.weights == after.weights


@pytest.mark.parametrize("path", FLIPS)
def test_another_value_changes_what_the_key_declares(
    nano: Nano, tmp_path: Path, seen: dict[str, Seen], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    flip = FLIPS[path]
    base = {**STEPS, **flip.under}
    name = json.dumps(base)
    if name not in seen:
        seen[name] = look(nano(**base), tmp_path / "before", monkeypatch)
    if path in ("stage", "model.preset"):
        after = dataclasses.replace(nano(**base), stage="midtrain") if path == "stage" else nano("nano-2.5", **base)
    else:
        after = nano(**{**base, **dict.fromkeys(flip.without, "none"), path: flip.to})
    verify(path, seen[name], look(after, tmp_path / "after", monkeypatch))


def test_every_key_has_a_flip_or_a_test_elsewhere() -> None:
    root = Path(__file__).resolve().parent.parent.parent
    known = {*FLIPS, *ELSEWHERE, *REFUSED}
    assert set(all_keys()) - known == set()
    assert known - set(all_keys()) == set()
    for path, file in ELSEWHERE.items():
        assert path.rpartition(".")[2] in (root / file).read_text(), f"{file} does not try {path}"


@pytest.mark.parametrize("path", REFUSED)
def test_a_key_that_is_not_built_is_refused(nano: Nano, path: str) -> None:
    with pytest.raises(InputError, match=path):
        check_mesh(nano(**{path: "true"}).parallel, 2)


PLANTED = (
    "seed",
    "optim.eps",
    "optim.weight_decay",
    "schedule.min_ratio",
    "data.order",
    "train.z_loss",
    "checkpoint.keep_last",
    "checkpoint.sample_tokens",
    "eval.windows",
    "train.loss",
)


@pytest.mark.parametrize("path", PLANTED)
def test_a_planted_dead_key_is_found(
    nano: Nano, tmp_path: Path, seen: dict[str, Seen], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    flip = FLIPS[path]
    reference = nano(**STEPS, **flip.under)
    value = functools.reduce(getattr, path.split("."), reference)

    def session(**given: Any) -> setup.Session:
        return setup.Session(**{**given, "recipe": with_value(given["recipe"], path, value)})  # as if nobody read it

    before = look(reference, tmp_path / "before", monkeypatch)
    monkeypatch.setattr(pretrain, "Session", session)
    after = look(nano(**{**STEPS, **flip.under, path: flip.to}), tmp_path / "after", monkeypatch)
    with pytest.raises(AssertionError):
        verify(path, before, after)

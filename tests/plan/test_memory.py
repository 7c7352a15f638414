"""Planned memory beside what processes of their own really held while they trained: eight shapes alone and five on two
ranks that share the model, each within a tenth.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from argonne.plan.memory import Memory, Setup, memory_of
from argonne.plan.shape import shape_of

SCRIPT = Path(__file__).with_name("measured_step.py")
ROOT = Path(__file__).resolve().parent.parent.parent
SECOND: dict[str, Any] = {"rope_theta": 1e4, "max_position_embeddings": 1024}
THIRD: dict[str, Any] = {
    **SECOND,
    "q_norm": True,
    "k_norm": True,
    "v_norm": True,
    "sandwich_norm": True,
    "final_logit_softcapping": 15.0,
}
FIRST: dict[str, Any] = {
    "position_embedding": "learned",
    "norm_type": "layer",
    "hidden_act": "gelu",
    "mlp_gated": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
}


def sized(
    base: dict[str, Any], vocabulary: int, hidden: int, layers: int, heads: tuple[int, int], head_dim: int, mlp: int
) -> dict[str, Any]:
    return {
        **base,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim,
        "intermediate_size": mlp,
    }


def windowed(model: dict[str, Any], window: int) -> dict[str, Any]:
    kinds = ["sliding_attention" if layer % 2 else "full_attention" for layer in range(model["num_hidden_layers"])]
    return {**model, "layer_types": kinds, "sliding_window": window}


def case(
    model: dict[str, Any], length: int, rows: int, micro: int, loss: str = "full", checkpointing: str = "none"
) -> dict[str, Any]:
    return {
        "model": model,
        "sequence_length": length,
        "rows": rows,
        "micro": micro,
        "loss": loss,
        "checkpointing": checkpointing,
    }


# Planned total, and what varies.
SHAPES = {
    "1.4 GB, vocabulary 151,669, whole logits": case(sized(SECOND, 151_669, 256, 2, (4, 2), 64, 768), 128, 8, 8),
    "1.7 GB, every layer recomputed": case(sized(SECOND, 8192, 768, 12, (12, 4), 64, 2048), 512, 8, 8, "full", "full"),
    "2.8 GB, wide": case(sized(SECOND, 8192, 1536, 6, (16, 8), 96, 4096), 128, 4, 4),
    "1.7 GB, every second layer recomputed, two micro-batches": case(
        sized(SECOND, 8192, 512, 16, (8, 4), 64, 1536), 256, 16, 8, "chunked", "every_nth"
    ),
    "2.0 GB, deep": case(sized(SECOND, 4096, 384, 24, (6, 2), 64, 1024), 256, 8, 8),
    "3.3 GB, 3.0's layers and window, long rows": case(
        windowed(sized(THIRD, 4096, 384, 6, (6, 2), 64, 1024), 256), 1024, 10, 10
    ),
    "2.1 GB, vocabulary 151,669 in chunks, two micro-batches": case(
        sized(SECOND, 151_669, 512, 4, (8, 4), 64, 1536), 512, 4, 2, "chunked"
    ),
    "7.0 GB, large, two micro-batches": case(sized(SECOND, 16_384, 2048, 8, (16, 8), 128, 5632), 128, 2, 1),
}
SMALL = case(sized(THIRD, 4096, 512, 3, (8, 2), 64, 1536), 256, 4, 2, "chunked")
MUON = {**case(sized(SECOND, 4096, 768, 6, (12, 4), 64, 2048), 128, 2, 2), "optimizer": "muon"}
DROPOUT = case(sized(FIRST, 4096, 384, 6, (6, 6), 64, 1536), 256, 8, 8)


def shared(model: dict[str, Any], length: int, rows: int, micro: int, **more: Any) -> dict[str, Any]:
    return {**case(model, length, rows, micro), "shard": 2, **more}


SHARED = {
    "deep": shared(sized(SECOND, 1024, 512, 12, (8, 4), 64, 1344), 64, 1, 1),
    "deep, in autocast's copies": shared(sized(SECOND, 1024, 512, 12, (8, 4), 64, 1344), 64, 1, 1, precision="bf16"),
    "wide, two micro-batches": shared(sized(SECOND, 1024, 1024, 8, (16, 8), 64, 2688), 64, 2, 1),
    "a table of 80,000": shared(sized(SECOND, 80_000, 512, 2, (8, 4), 64, 1344), 64, 1, 1),
    "two tables of 80,000, two micro-batches": shared(
        sized({**SECOND, "tie_word_embeddings": False}, 80_000, 512, 2, (8, 4), 64, 1344), 64, 2, 1
    ),
}


# Parts of rows of 1,024 tokens, one without a window and one where every second layer has one.
PARTS = {
    "parts of one row": {**case(sized(SECOND, 1024, 512, 8, (8, 4), 64, 1344), 1024, 1, 1), "context": 2},
    "parts of two rows, third generation": {
        **case(sized(THIRD, 1024, 384, 8, (6, 3), 64, 1024), 1024, 2, 2),
        "context": 2,
    },
}


def planned(shape: dict[str, Any]) -> Memory:
    setup = Setup(
        optimizer=shape.get("optimizer", "adamw"),
        rows=shape["micro"],
        sequence_length=shape["sequence_length"],
        activation_checkpointing=shape["checkpointing"],
        loss=shape["loss"],
        cpu=True,
        accumulates=shape["micro"] < shape["rows"] or shape.get("context", 1) > 1,  # in DDP's buckets
        precision=shape.get("precision", "fp32"),
        shard=shape.get("shard", 1),
        context=shape.get("context", 1),
    )
    return memory_of(shape_of(shape["model"], shape["sequence_length"]), setup)


def measured(shape: dict[str, Any]) -> float:
    """Bytes of the highest RSS above that after the imports, or of torch's tensors where the case asks for a profile;
    of several ranks, the larger.
    """
    ranks = shape.get("shard", 1) * shape.get("context", 1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, str(SCRIPT), json.dumps(shape)]
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank)} if ranks > 1 else None,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate() for process in started]
    assert all(process.returncode == 0 for process in started), said[0][1][-2000:]
    results = [json.loads(out.splitlines()[-1]) for out, _ in said]
    return max(float(result.get("tensors", result["peak"])) for result in results)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.campaign) for name in SHAPES])
def test_a_process_holds_what_was_planned_for_it(name: str) -> None:
    plan, found = planned(SHAPES[name]), measured(SHAPES[name])
    assert plan.total == pytest.approx(1e9 * float(name.split()[0]), rel=0.04)
    assert found == pytest.approx(plan.total, rel=0.1), plan.parts


@pytest.mark.campaign
@pytest.mark.parametrize("name", SHARED)
def test_ranks_that_share_a_model_hold_what_was_planned_for_each(name: str) -> None:
    plan, found = planned(SHARED[name]), measured(SHARED[name])
    print(f"{name}: planned {plan.total / 1e9:.3f} GB, measured {found / 1e9:.3f}, {found / plan.total:.3f}")
    assert found == pytest.approx(plan.total, rel=0.1), (plan.peak, plan.parts)


@pytest.mark.campaign
@pytest.mark.parametrize("name", PARTS)
def test_ranks_that_hold_parts_of_rows_hold_what_was_planned_for_each(name: str) -> None:
    plan, found = planned(PARTS[name]), measured({**PARTS[name], "profile": True})
    tensors = plan.total - plan.parts["process"]
    print(f"{name}: planned {tensors / 1e9:.3f} GB of tensors, measured {found / 1e9:.3f}, {found / tensors:.3f}")
    assert found == pytest.approx(tensors, rel=0.1), (plan.peak, plan.parts)


@pytest.mark.campaign
def test_muon_is_planned_with_one_moment_and_the_directions_of_its_update() -> None:
    plan, found = planned(MUON), measured(MUON)
    assert plan.peak == "update"
    assert found == pytest.approx(plan.total, rel=0.1), plan.parts


@pytest.mark.campaign
def test_dropout_on_a_cpu_is_planned_with_whole_attention_weights() -> None:
    plan, found = planned(DROPOUT), measured(DROPOUT)
    assert found == pytest.approx(plan.total, rel=0.1), plan.parts


def test_a_small_process_holds_what_was_planned_for_it() -> None:
    plan, found = planned(SMALL), measured(SMALL)
    assert found == pytest.approx(plan.total, rel=0.15), plan.parts

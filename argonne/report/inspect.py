"""What any artifact is: a token set, a run, a checkpoint or an exported model, with its hashes verified and its
lineage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.errors import InputError
from argonne.files import hash_list_of, read_json, verify_directory
from argonne.layout import Kind

Facts = dict[str, Any]
EXPECTED = "expected a token set, a tokenizer, a run, a checkpoint or a model folder"


def inspect_path(path: Path) -> Facts:
    """Facts of the artifact at `path`: kind, what it holds, lineage, and `problems`, one line for each thing that does
    not verify.

    Raises InputError where nothing is there or it is no artifact of ours.
    """
    kind = layout.kind_of(path)
    if kind in _READERS:
        return _READERS[kind](path)
    if layout.is_pattern(path):
        return _tokens(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file():
        raise InputError(f"{path}: a {path.suffix or 'plain'} file; {EXPECTED}")
    found = ", ".join(sorted(item.name for item in path.iterdir())[:5]) or "nothing"
    raise InputError(f"{path}: found {found} in it; {EXPECTED}")


def _tokens(path: Path) -> Facts:
    from argonne.tokens.inspection import inspect_tokens

    return inspect_tokens(path)


def _tokenizer(path: Path) -> Facts:
    from argonne.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id,
        "pad_id": tokenizer.pad_id,
    }
    return {
        "kind": "tokenizer",
        "path": str(path),
        **facts,
        "fingerprint": tokenizer.fingerprint,
        "problems": _sealed(path),
    }


def _sealed(path: Path) -> list[str]:
    return verify_directory(path) if hash_list_of(path).exists() else []


def _shape(path: Path) -> Facts:
    config = read_json(path / layout.MODEL_CONFIG)
    names = (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "sliding_window",
    )
    return {name: config[name] for name in names if config.get(name) is not None}


def _checkpoint(path: Path) -> Facts:
    from argonne.model.load import tokens_before
    from argonne.train.checkpoint import read_state, stored_shapes

    problems = verify_directory(path)
    facts: Facts = {"kind": "checkpoint", "path": str(path), "problems": problems}
    if problems:
        return facts
    state, shapes = read_state(path), stored_shapes(path)
    return facts | {
        "step": state["step"],
        "tokens": state["tokens"],
        "tokens_before": tokens_before(state),
        "run_id": state["run_id"],
        "parent": state.get("parent"),
        "parameters": sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("model.")),
        "tensors": len(shapes),
        "tokenizer_fingerprint": state["tokenizer_fingerprint"],
        "model": _shape(path),
    }


def _run(path: Path) -> Facts:
    from argonne.plan import compare_plan
    from argonne.report.records import read_metrics
    from argonne.train.checkpoint import list_checkpoints

    saved = list_checkpoints(path)
    problems = [problem for item in saved for problem in verify_directory(item.path)] + _sealed(
        path / layout.FINAL_MODEL
    )
    metrics = read_metrics(path) if (path / layout.METRICS).is_file() else None
    last = metrics.last("step") if metrics else None
    plan = next(
        (path / name for name in (layout.COMPUTE_PLAN, layout.LEGACY_COMPUTE_PLAN) if (path / name).is_file()), None
    )
    return {
        "kind": "run",
        "path": str(path),
        "status": (layout.ending_of(path) or "neither stopped nor complete").lower(),
        "manifest": read_json(path / layout.MANIFEST),
        "checkpoints": [item.path.name for item in saved],
        "plan_against_measured": compare_plan(read_json(plan), metrics.records, metrics.hours)
        if metrics and plan
        else None,
        "last_step": {name: last[name] for name in ("step", "tokens", "loss", "tokens_per_second")} if last else None,
        "problems": problems,
    }


def _exported(path: Path) -> Facts:
    from safetensors import SafetensorError, safe_open

    from argonne.model.load import family_config

    written = path / layout.EXPORT_RECORD
    record = read_json(written) if written.is_file() else {}
    if not record:
        family_config(path)  # another family is refused by name
    problems, parameters = _sealed(path), 0
    for file in sorted(path.glob(layout.WEIGHTS)):
        try:
            with safe_open(file, "pt") as tensors:
                parameters += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            problems.append(f"{file}: {error}")
    if not any(path.glob(layout.WEIGHTS)):
        problems.append(f"{path}: no safetensors file, so it holds no weights")
    mixed = path / layout.MERGE_RECORD
    merged = [
        f"{part['weight']:g} x {part['model']} (run {part['run_id']}, step {part['step']})"
        for part in (read_json(mixed)["merged"] if mixed.is_file() else [])
    ]
    engines = {engine: f"{of['verdict']} ({of['why']})" for engine, of in record.get("engines", {}).items()}
    return {
        "kind": "exported model",
        "path": str(path),
        **({"class": record["class"], "engines": engines} if record else {}),
        **({"average_of": merged} if merged else {}),
        "parameters": parameters,
        "model": _shape(path),
        "has_tokenizer": layout.tokenizer_of(path) is not None,
        "verified_by_hashes": hash_list_of(path).exists(),
        "problems": problems,
    }


_READERS: dict[Kind, Callable[[Path], Facts]] = {
    Kind.TOKEN_SET: _tokens,
    Kind.UNFINISHED_TOKEN_SET: _tokens,
    Kind.TOKEN_FILE: _tokens,
    Kind.TOKENIZER: _tokenizer,
    Kind.RUN: _run,
    Kind.CHECKPOINT: _checkpoint,
    Kind.MODEL_FOLDER: _exported,
    Kind.LEGACY_FOLDER: _exported,
}


def render(facts: Facts) -> str:
    """The facts as indented lines for a person, problems last."""
    lines = [f"{facts['path']}: {facts['kind']}"]
    lines += _lines({name: value for name, value in facts.items() if name not in ("path", "kind", "problems")}, "  ")
    lines += [f"  PROBLEM: {problem}" for problem in facts["problems"]] or ["  everything verifies"]
    return "\n".join(lines)


def _lines(values: Facts, indent: str) -> list[str]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            found.append(f"{indent}{name}:")
            for item in value:
                found += [f"{indent}  - " + ", ".join(f"{key} {_shown(inner)}" for key, inner in item.items())]
        else:
            found.append(f"{indent}{name}: {_shown(value)}")
    return found


def _shown(value: Any) -> str:
    if value is None or value in ({}, []):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items()) + ")"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:,}" if isinstance(value, int) else str(value)

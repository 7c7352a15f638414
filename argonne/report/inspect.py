"""What any artifact is: a token set, a run, a checkpoint or an exported model, with its hashes verified and its
lineage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.errors import InputError
from argonne.files import hash_list_of, read_json
from argonne.layout import Kind
from argonne.report.chain import chain_of
from argonne.report.checks import Checks
from argonne.report.links import Link

Facts = dict[str, Any]
EXPECTED = "expected a token set, a tokenizer, a run, a checkpoint or a model folder"


def inspect_path(path: Path, results: Sequence[Path] = ()) -> Facts:
    """Facts of the artifact at `path`: kind, what it holds, the chain of what it was made of, and `problems`, one line
    for each thing that does not verify.

    results: folders of `argonne eval --out` that are said to be of it. Raises InputError where nothing is there or it
    is no artifact of ours, and for a folder without results.
    """
    checks, kind = Checks(), layout.kind_of(path)
    if kind in _READERS:
        facts = _READERS[kind](path, checks)
        links = chain_of(path, results, checks)
        told = {"chain": [asdict(link) for link in links]} if links else {}
        problems = [*facts.pop("problems"), *(problem for link in links for problem in link.problems)]
        return {**facts, **told, "problems": list(dict.fromkeys(problems))}
    if layout.is_pattern(path):
        return _tokens(path, checks)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file():
        raise InputError(f"{path}: a {path.suffix or 'plain'} file; {EXPECTED}")
    found = ", ".join(sorted(item.name for item in path.iterdir())[:5]) or "nothing"
    raise InputError(f"{path}: found {found} in it; {EXPECTED}")


def _tokens(path: Path, checks: Checks) -> Facts:
    return dict(checks.tokens(str(path)))


def _tokenizer(path: Path, checks: Checks) -> Facts:
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
        "problems": checks.problems_if_sealed(path),
    }


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


def _checkpoint(path: Path, checks: Checks) -> Facts:
    from argonne.model.load import tokens_before
    from argonne.model.stored import StoredTensors
    from argonne.train.checkpoint import read_state

    problems = checks.problems(path)
    facts: Facts = {"kind": "checkpoint", "path": str(path), "problems": problems}
    if problems:
        return facts
    state, shapes = read_state(path), StoredTensors(path).shapes
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


def _run(path: Path, checks: Checks) -> Facts:
    from argonne.plan import compare_plan
    from argonne.report.records import read_metrics
    from argonne.train.checkpoint import list_checkpoints

    saved = list_checkpoints(path)
    problems = [problem for item in saved for problem in checks.problems(item.path)]
    problems += checks.problems_if_sealed(path / layout.FINAL_MODEL)
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


def _exported(path: Path, checks: Checks) -> Facts:
    from safetensors import SafetensorError, safe_open

    from argonne.model.load import family_config

    written = path / layout.EXPORT_RECORD
    record = read_json(written) if written.is_file() else {}
    if not record:
        family_config(path)  # another family is refused by name
    problems, parameters = checks.problems_if_sealed(path), 0
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


def _for_one_engine(path: Path, checks: Checks) -> Facts:
    record = read_json(path / layout.EXPORT_RECORD)
    told = {name: record[name] for name in ("class", "dtype", "parameters", "tokenizer", "notes", "proof")}
    engines = {engine: f"{of['verdict']} ({of['why']})" for engine, of in record["engines"].items()}
    kind = layout.kind_of(path).value.removeprefix("an ")
    return {"kind": kind, "path": str(path), **told, "engines": engines, "problems": checks.problems_if_sealed(path)}


_READERS: dict[Kind, Callable[[Path, Checks], Facts]] = {
    Kind.TOKEN_SET: _tokens,
    Kind.UNFINISHED_TOKEN_SET: _tokens,
    Kind.TOKEN_FILE: _tokens,
    Kind.TOKENIZER: _tokenizer,
    Kind.RUN: _run,
    Kind.CHECKPOINT: _checkpoint,
    Kind.MODEL_FOLDER: _exported,
    Kind.LEGACY_FOLDER: _exported,
    Kind.GGUF_EXPORT: _for_one_engine,
    Kind.ONNX_EXPORT: _for_one_engine,
}


def render(facts: Facts) -> str:
    """The facts as indented lines for a person, problems last."""
    lines = [f"{facts['path']}: {facts['kind']}"]
    apart = ("path", "kind", "chain", "problems")
    lines += _lines({name: value for name, value in facts.items() if name not in apart}, "  ")
    if facts.get("chain"):
        lines += ["  chain:", *(f"    {Link(**link).line()}" for link in facts["chain"])]
    left = any(link["not_checked"] for link in facts.get("chain", []))
    sound = "no problem was found; what was not checked is named above" if left else "everything verifies"
    if facts.get("verified") is False:
        sound = "sizes agree, no hashes to verify"
    lines += [f"  PROBLEM: {problem}" for problem in facts["problems"]] or [f"  {sound}"]
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

"""The matrix of docs/exports.md: what each engine computes from an export of each generation, asked in its own process.
Nano-sized models whose gains, biases and softcap matter; an engine that is not installed is named as unproven.

python -m benchmarks.engines [--write] [--transformers PYTHON ...]     `make test-engines` installs the engines first
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from argonne.errors import InputError
from argonne.presets import FULL, presets
from argonne.publish.engines import DIFFERENT, EXACT, REFUSES, UNPROVEN
from argonne.publish.proof import Mismatch, is_installed
from benchmarks.harness import write_table

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "exports.md"
FULL_LAYERS: dict[str, Any] = {"layer_types": (FULL,) * 4, "sliding_window": None}
GENERATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "1.0": ("nano-1.0", {}),
    "2.5": ("nano-2.5", {}),
    "3.0": ("nano-3.0", FULL_LAYERS),
    "3.0 with window": ("nano-3.0", {}),
}
ROWS = (
    *(("transformers", kind) for kind in ("hf", "native")),
    *(("llama.cpp", kind) for kind in ("gguf", "gguf bf16", "gguf q8_0", "native")),
    *(("mlx", kind) for kind in ("native", "hf")),
    ("onnx", "onnx"),
    *((engine, kind) for engine in ("vllm", "sglang") for kind in ("native", "hf")),
)


def save(generation: str, folder: Path) -> Path:
    """A model folder of the generation with rough weights, and no tokenizer: ids are compared."""
    import torch

    from argonne.model.build import build_model, config_from_fields
    from argonne.model.save import save_model_folder

    preset, changes = GENERATIONS[generation]
    model = build_model(config_from_fields({**presets()[preset].fields, **changes}), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() == 1 else 0.03))
    folder.mkdir(parents=True)
    save_model_folder(model, folder, eos_id=None)
    return folder


def exported(model: Path, kind: str, out: Path, engines: Sequence[str] = ()) -> dict[str, Any]:
    """The record of an export. Raises InputError where it, or one of `engines` for it, is refused."""
    from argonne.publish.export import export_model
    from argonne.publish.gguf_export import export_gguf
    from argonne.publish.onnx_export import export_onnx

    name, _, dtype = kind.partition(" ")
    if name == "gguf":
        return export_gguf(model, out, dtype=dtype or "f32", engines=engines)
    if name == "onnx":
        return export_onnx(model, out, engines=engines)
    return export_model(model, out, kind=name, engines=engines)


class Matrix:
    """Cells, each export made once. pythons: where other transformers are."""

    def __init__(self, pythons: Sequence[str], scratch: Path) -> None:
        self.pythons, self.scratch, self.reasons = pythons, scratch, list[str]()
        self.models = {generation: save(generation, scratch / "models" / generation) for generation in GENERATIONS}
        self.made: dict[tuple[str, str], dict[str, Any] | str] = {}

    def record(self, kind: str, generation: str) -> dict[str, Any] | str:
        """Of the export, or why there is none."""
        if (kind, generation) not in self.made:
            out = self.folder(kind, generation)
            out.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.made[kind, generation] = exported(self.models[generation], kind, out)
            except Mismatch:
                raise
            except InputError as error:
                self.made[kind, generation] = str(error).partition("; instead: ")[0]
        return self.made[kind, generation]

    def folder(self, kind: str, generation: str) -> Path:
        return self.scratch / kind / generation

    def cells(self, engine: str, kind: str, generation: str) -> list[tuple[str, str]]:
        """What the engine computed, and its version: one, or one for each other transformers."""
        record = self.record(kind, generation)
        if isinstance(record, str):
            return [(self.refused(record), "")]
        verdict, why = record["engines"][engine].values()
        if verdict in (DIFFERENT, REFUSES):
            if why.startswith(f"in {engine} "):
                raise RuntimeError(f"{generation} --as {kind}: {why}")
            return [(self.refused(f"--for {engine}: of a {record['class']} it {verdict}: {why}"), "")]
        if verdict == UNPROVEN:
            return [(UNPROVEN, "not run")]
        if engine == "transformers" and self.pythons:
            return [self.loaded_by(python, kind, generation) for python in self.pythons]
        proof = record["proofs"][engine] if engine in record.get("proofs", ()) else record["proof"]
        text = f"{proof['relative_difference']:.0e}"
        return [(text if verdict == EXACT else f"{text}, rounded", proof["version"])]

    def refused(self, reason: str) -> str:
        self.reasons += [] if reason in self.reasons else [reason]
        return f"refused ({self.reasons.index(reason) + 1})"

    def loaded_by(self, python: str, kind: str, generation: str) -> tuple[str, str]:
        """A folder loaded by the transformers of another environment."""
        from argonne.model.load import load_model
        from argonne.publish.proof import expected_file, prove

        with expected_file(load_model(self.models[generation]).model) as expected:
            proof = prove(self.folder(kind, generation), expected, python=python)
        return f"{proof['relative_difference']:.0e}", proof["version"]

    def lines(self) -> Iterator[str]:
        """The table, and below it the reasons of what is refused."""
        yield "| engine | `--as` | " + " | ".join(self.models) + " |"
        yield "|" + " --- |" * (len(self.models) + 2)
        for engine, kind in ROWS:
            asked: dict[str, list[str]] = {}  # version -> a cell a generation
            for place, generation in enumerate(self.models):
                for cell, version in self.cells(engine, kind, generation):
                    asked.setdefault(version, [""] * len(self.models))[place] = cell
            refused = asked.pop("", [""] * len(self.models))
            for version, found in (asked or {"": refused}).items():
                told = engine if version in ("", "not run") else version
                row = [cell or other for cell, other in zip(found, refused, strict=True)]
                yield f"| {told} | {kind} | " + " | ".join(row) + " |"
        yield ""
        yield from (f"{number}. {reason}" for number, reason in enumerate(self.reasons, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/exports.md")
    parser.add_argument("--transformers", nargs="+", default=[], metavar="PYTHON", help="environments with others")
    options = parser.parse_args()
    missing = [engine for engine in ("llama.cpp", "mlx", "onnx") if not is_installed(engine)]
    if options.write and (missing or not options.transformers):
        parser.error(f"--write wants every engine and --transformers; missing: {', '.join(missing) or 'no engine'}")
    with tempfile.TemporaryDirectory() as scratch:
        pythons = [os.path.abspath(python) for python in options.transformers]
        table = "\n".join(Matrix(pythons, Path(scratch)).lines())
    print(table)
    if options.write:
        write_table(DOCUMENT, "engines", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""import, export: move a model in and out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from argonne.cli.command import Verbs, json_flag, model_argument, out_flag, show
from argonne.errors import InputError


def add_verbs(verb: Verbs, arguments: Sequence[str]) -> None:
    imports = verb("import", import_legacy)
    imports.add_argument(
        "path", type=Path, metavar="PATH", help="model folder or .pt training checkpoint in an earlier format"
    )
    out_flag(imports)
    imports.add_argument(
        "--attention",
        default="full",
        choices=("full", "as-config"),
        help="full: as the released weights were trained (default)",
    )
    imports.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="cast the weights (default: as they are stored)"
    )
    json_flag(imports)
    export = verb("export", export_model)
    model_argument(export)
    export.add_argument(
        "--as", dest="kind", required=True, choices=("hf", "native", "pt"), help="custom class, a stock class, or .pt"
    )
    export.add_argument(
        "--for",
        dest="engines",
        nargs="+",
        default=(),
        metavar="ENGINE",
        help="stop where one of these is known to compute something else: transformers, vllm, sglang, llama.cpp, mlx",
    )
    out_flag(export)
    json_flag(export)


def import_legacy(options: argparse.Namespace) -> None:
    from argonne.legacy.convert import import_checkpoint

    how = {"attention": options.attention, "dtype": options.dtype}
    show(import_checkpoint(options.path, options.out, **how), as_json=options.json)


def export_model(options: argparse.Namespace) -> None:
    if options.kind == "pt":
        from argonne.legacy.export_pt import export_pt

        if options.engines:
            raise InputError("--for asks about engines, and --as pt is for earlier Argonne code alone; leave --for out")
        show(export_pt(Path(options.model), options.out), as_json=options.json)
        return
    from argonne.publish.export import export_model

    done = export_model(Path(options.model), options.out, kind=options.kind, engines=options.engines)
    engines = [f"  {engine}: {of['verdict']} ({of['why']})" for engine, of in done["engines"].items()]
    lines = [f"{name}: {value}" for name, value in done.items() if name not in ("engines", "format_version")]
    show(done, "\n".join([*lines, "engines:", *engines]), as_json=options.json)

"""import, export, merge: move a model in and out, average several."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from argonne import layout
from argonne.cli.command import Verbs, json_flag, model_argument, out_flag, progress_bar, show
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
    merge = verb("merge", merge_models)
    merge.add_argument("parts", nargs="+", metavar="MODEL:WEIGHT", help="models and their weights, which sum to 1")
    merge.add_argument("--out", type=Path, metavar="DIR", help="folder for the average; with --sweep of the best")
    merge.add_argument(
        "--sweep", metavar="TASK", help="measure a grid of weights of two models (MODEL MODEL) on a task"
    )
    merge.add_argument("--grid", type=int, metavar="N", help="steps of the grid (default: 10)")
    merge.add_argument("--data", type=Path, metavar="DIR", help="what the task reads, as in eval")
    merge.add_argument("--limit", type=int, metavar="N", help="of the task, as in eval")
    json_flag(merge)


def import_legacy(options: argparse.Namespace) -> None:
    from argonne.legacy.convert import import_checkpoint

    how = {"attention": options.attention, "dtype": options.dtype}
    show(import_checkpoint(options.path, options.out, **how), as_json=options.json)


def merge_models(options: argparse.Namespace) -> None:
    if options.out is not None and options.out.exists():
        raise InputError(f"{options.out} exists already; choose another name or remove it")
    if options.sweep is None:
        _merge(options)
        return
    grid = 10 if options.grid is None else options.grid
    if grid < 1:
        raise InputError(f"--grid: found {grid}, expected at least 1 step")
    if len(options.parts) != 2:
        raise InputError(f"--sweep: found {len(options.parts)} models, expected two; its grid is a line between them")
    for name in options.parts:
        layout.check_model_name(name)
    from argonne.evaluate.sweep import headline_of, sweep, sweep_lines
    from argonne.publish.merge import open_mixer

    headline_of(options.sweep)
    mixer = open_mixer(options.parts)
    with progress_bar("averages") as progress:
        found = sweep(mixer, options.sweep, grid, options.data, limit=options.limit, progress=progress)
    lines = sweep_lines(found, (options.parts[0], options.parts[1]))
    if options.out is not None:
        found |= mixer.save(options.out, [found["best"], 1 - found["best"]])
        lines.append(f"the best is written to {options.out}")
    show(found, "\n".join(lines), as_json=options.json)


def _merge(options: argparse.Namespace) -> None:
    if options.out is None:
        raise InputError("--out: not given; name the folder for the average, or measure a grid with --sweep TASK")
    for flag in ("grid", "data", "limit"):
        if getattr(options, flag) is not None:
            raise InputError(f"--{flag}: is for --sweep TASK; add that, or leave it out")
    for word in options.parts:
        layout.check_model_name(word.rpartition(":")[0] or word)
    from argonne.publish.merge import open_mixer, parse_parts

    parts = parse_parts(options.parts)
    done = open_mixer([part.name for part in parts]).save(options.out, [part.weight for part in parts])
    made = ", ".join(f"{part['weight']:g} x {part['model']}" for part in done["merged"])
    show(done, f"{options.out}: {made}", as_json=options.json)


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

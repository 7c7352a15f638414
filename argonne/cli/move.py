"""import, export, publish, merge: move a model in and out, average several."""

from __future__ import annotations

import argparse
import sys
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
        "--as",
        dest="kind",
        required=True,
        choices=("hf", "native", "gguf", "onnx", "pt"),
        help="custom class, a stock class, a file for llama.cpp, a graph for onnxruntime, or .pt",
    )
    export.add_argument(
        "--dtype", choices=("f32", "bf16", "q8_0"), help="of the matrices of a gguf (default: as they are stored)"
    )
    export.add_argument(
        "--for",
        dest="engines",
        nargs="+",
        default=(),
        metavar="ENGINE",
        help="who must be able to read it: transformers, vllm, sglang, llama.cpp, mlx, onnx; stop where one computes "
        "something else",
    )
    out_flag(export)
    json_flag(export)
    publish_flags(verb("publish", publish_model))
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


def publish_flags(publish: argparse.ArgumentParser) -> None:
    publish.add_argument("path", type=Path, metavar="DIR", help="export (hf or native), or a run, checkpoint or model")
    publish.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository on the Hub")
    publish.add_argument("--source", metavar="MODEL", help="what DIR was exported from, where its record does not say")
    publish.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="DIR", help="folders of argonne eval --out, for the card"
    )
    publish.add_argument("--license", metavar="NAME", help="for the card, as the Hub names it: apache-2.0, mit, ...")
    publish.add_argument("--private", action="store_true", help="nobody else may see the repository")
    publish.add_argument("--replace", action="store_true", help="the repository holds something: replace it, at once")
    publish.add_argument("--sign", type=Path, metavar="KEY", help="private key (PEM) that signs every file")
    publish.add_argument("--dry-run", action="store_true", help="all but the push; needs no network")
    publish.add_argument("--out", type=Path, metavar="DIR", help="keep the staged folder there")
    json_flag(publish)


def import_legacy(options: argparse.Namespace) -> None:
    from argonne.legacy.convert import import_checkpoint

    how = {"attention": options.attention, "dtype": options.dtype}
    show(import_checkpoint(options.path, options.out, **how), as_json=options.json)


def publish_model(options: argparse.Namespace) -> None:
    if not options.path.exists():
        raise InputError(f"{options.path}: no such folder; give an export, a run, a checkpoint or a model folder")
    from argonne.publish.publish import publish
    from argonne.publish.stage import PublishOptions

    given = (options.repo, options.source, tuple(options.results), options.license, options.private, options.replace)
    how = PublishOptions(*given, options.sign)

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    done = publish(options.path, how, dry_run=options.dry_run, out=options.out, log=log)
    if options.dry_run:
        kept = f" (staged in {options.out})" if options.out else ""
        text = f"{options.path}: may be published as {options.repo}{kept}; nothing was pushed"
    else:
        text = f"{options.path}: is {options.repo} at commit {done['commit'][:12]}, compared file by file"
    show(done, text, as_json=options.json)


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
    if options.dtype is not None and options.kind != "gguf":
        raise InputError(f"--dtype is for --as gguf; --as {options.kind} keeps the weights' own, leave it out")
    engines = [engine for word in options.engines for engine in word.split(",") if engine]
    if options.kind == "pt":
        from argonne.legacy.export_pt import export_pt

        if engines:
            raise InputError("--for asks about engines, and --as pt is for earlier Argonne code alone; leave --for out")
        show(export_pt(Path(options.model), options.out), as_json=options.json)
        return
    if options.kind == "gguf":
        from argonne.publish.gguf_export import export_gguf

        done = export_gguf(Path(options.model), options.out, dtype=options.dtype, engines=engines)
    elif options.kind == "onnx":
        from argonne.publish.onnx_export import export_onnx

        done = export_onnx(Path(options.model), options.out, engines=engines)
    else:
        from argonne.publish.export import export_model

        done = export_model(Path(options.model), options.out, kind=options.kind, engines=engines)
    found = [f"  {engine}: {of['verdict']} ({of['why']})" for engine, of in done["engines"].items()]
    shown = {**done, "source": done["source"]["model"]}
    lines = [f"{name}: {value}" for name, value in shown.items() if name not in ("engines", "format_version")]
    show(done, "\n".join([*lines, "engines:", *found]), as_json=options.json)

"""`argonne train`: text to a trained model in one command, with the same functions as the verbs: prepare, a size for
the text and the machine, a recipe to keep, the run and its report.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
import tomllib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from argonne import files
from argonne.config import Recipe
from argonne.errors import InputError
from argonne.keys import all_keys, unmet
from argonne.operation import ParallelSection
from argonne.plan import Device, make_plan
from argonne.plan.sizes import CHARACTERS_A_TOKEN, Choice, choose_size, vocabulary_for
from argonne.prepare.documents import find_files
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.prepare.textual import is_compressed
from argonne.recipe import (
    ALTERNATIVES,
    build,
    differences,
    leaves,
    load_recipe,
    parse_value,
    resolve,
    to_tree,
    toml_value,
)
from argonne.tokens.manifest import read_manifest
from argonne.tokens.tokenizer import load_tokenizer

BEGUN, RECIPE, TOKENS, RUN = "begun.json", "recipe.toml", "tokens", "run"  # in the folder
HOURS_CPU, HOURS_GPU = 0.5, 1.0
HOLD_OUT, HOLD_OUT_LARGE, LARGE_TEXT = 0.05, 0.005, 100e6  # of so many bytes on
UNPACKED = 4  # bytes of text in a byte of a packed file
# What training reaches of the rate of one large fp32 product. Whole steps measured on one core of a server: 0.43 of it
# at 1M parameters, 0.49 at 3M, 0.55 at 5M, 0.62 at 14M; evaluation, samples and a second thread cost some.
STEP_SHARE, MEASURE_SECONDS = 0.4, 0.3
# Why a key has its value, where its meaning does not say.
WHY = {
    "model.vocab_size": "entries of the tokenizer",
    "data.sources": "max_epochs: a run that would read the text more often is refused",
    "data.order": "windows in a new order at each pass",
    "batch.tokens_per_step": "more for a larger model, fewer where there would be few steps",
    "optim.name": "for the matrices, AdamW for the rest: with little text about twice as far as AdamW alone",
    "optim.lr": "peak rate of embeddings and gains; falls with the width",
    "train.steps": "what the time or the text allows",
    "checkpoint.every_steps": "a quarter of the run",
    "eval.every_steps": "ten points of the held-out curve; fewer of a short run",
}


@dataclass(frozen=True)
class Asked:
    """What the command says. hours: of training; None: as the device is. overrides: recipe keys, as text."""

    text: tuple[str, ...]
    out: Path
    hours: float | None = None
    tokenizer: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def tree(self) -> dict[str, Any]:
        """What must be the same for the work in the folder to go on."""
        tree = {"TEXT": list(self.text), "--hours": self.hours, "--tokenizer": self.tokenizer}
        return tree | {f"--{path}": value for path, value in self.overrides.items()}


def run_first(asked: Asked, *, dry_run: bool = False, started: float | None = None) -> None:
    """Everything from text to a trained model below `asked.out`; the same command goes on where it was, by the recipe
    that lies there. Raises InputError for wrong input and for a folder that was begun otherwise, Stopped where it was
    asked to stop. dry_run: print the recipe, as far as it can be known, and write nothing.
    """
    begun, kept = _begun(asked), asked.out / RECIPE
    if kept.exists():
        recipe, lines = kept.read_text(encoding="utf-8"), [f"{kept} is there already, and is what runs"]
        if not dry_run:
            _prepare(asked, begun)
    else:
        text_bytes = _text_bytes(asked)
        device, gpus = _machine(str(asked.overrides.get("train.device", "auto")))
        hours = asked.hours if asked.hours is not None else HOURS_CPU if device.name == "cpu" else HOURS_GPU
        if not begun:
            own = None if asked.tokenizer is None else load_tokenizer(asked.tokenizer).vocab_size
            begun = {
                "asked": asked.tree(),
                "vocabulary": own or vocabulary_for(text_bytes, hours, device, gpus),
                "hold_out": HOLD_OUT if text_bytes < LARGE_TEXT else HOLD_OUT_LARGE,
            }
        tokens, vocabulary = int(text_bytes * (1 - begun["hold_out"]) / CHARACTERS_A_TOKEN), begun["vocabulary"]
        # Before anything is written: too little text and wrong keys are found here.
        recipe, lines = _recipe(asked, choose_size(tokens, vocabulary, hours, device, gpus), tokens, device, gpus)
        lines = [f"estimated from {text_bytes / 1e6:,.1f} MB of files; nothing is written", *lines]
        if not dry_run:
            asked.out.mkdir(parents=True, exist_ok=True)
            files.write_json(asked.out / BEGUN, begun)
            made = _prepare(asked, begun)
            tokens, vocabulary = made["tokens"], made["tokenizer"]["vocab_size"]
            choice = choose_size(tokens, vocabulary, hours, device, gpus)
            recipe, lines = _recipe(asked, choice, tokens, device, gpus, held_out=made["held_out"]["tokens"])
            files.write_text(kept, recipe)
    _say("A size for this text, this machine and this time", *lines)
    if dry_run:
        print(recipe, end="")
    else:
        _train(kept, asked.out / RUN, started)


def _begun(asked: Asked) -> dict[str, Any]:
    """What the folder was begun with; nothing where it is new."""
    out = asked.out
    if not out.exists() or (out.is_dir() and all(entry.name.startswith(files.TEMPORARY) for entry in out.iterdir())):
        return {}
    if not (out / BEGUN).is_file():
        raise InputError(f"--out {out}: exists, and was not made by `argonne train`; choose another")
    begun: dict[str, Any] = files.read_json(out / BEGUN)
    if changed := differences(begun["asked"], asked.tree()):
        told = "; ".join(f"{name} {old!r}, now {new!r}" for name, (old, new) in changed.items())
        raise InputError(
            f"{out}: was begun with {told}; give the same, or edit {out / RECIPE} and go on with `{_pretrain(out)}`, "
            "or choose another --out"
        )
    return begun


def _text_bytes(asked: Asked) -> float:
    """Bytes of text, about: of packed files more than they have."""
    for folder in map(Path, asked.text):
        if folder.is_dir() and asked.out.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--out {asked.out}: lies in {folder}, whose text is read; choose a folder elsewhere")
    found = find_files(asked.text, outside=asked.out)
    packed = ("parquet", "arrow")
    return sum(file.bytes * (UNPACKED if file.format in packed or is_compressed(file.path) else 1) for file in found)


def _machine(asked: str) -> tuple[Device, int]:
    """The device that training takes, its speed measured where the plan knows none, and how many of it there are."""
    import torch

    from argonne.parallel.mesh import choose_device, worker_count
    from argonne.stages.setup import planned_device

    place = choose_device(asked, where="train.device")
    device, count = planned_device(place), worker_count(ParallelSection(), asked) if place.type == "cuda" else 1
    if device.bf16 or device.fp16:
        return device, count
    side, kind = (1024, torch.float32) if place.type == "cpu" else (4096, torch.bfloat16)
    left = torch.ones(side, side, device=place, dtype=kind)
    products, begin, spent = -1, 0.0, 0.0
    while spent < MEASURE_SECONDS:
        float((left @ left)[0, 0])  # waits for it
        products += 1
        begin = begin or time.perf_counter()  # the first warms up
        spent = time.perf_counter() - begin
    return replace(device, sustained=STEP_SHARE * products * 2 * side**3 / spent), count


def _prepare(asked: Asked, begun: Mapping[str, Any]) -> dict[str, Any]:
    """The token set, made or found; its manifest."""
    own, out, share, size = asked.tokenizer, asked.out / TOKENS, begun["hold_out"], begun["vocabulary"]
    tokenizer = ("--train-tokenizer", str(size)) if own is None else ("--tokenizer", own)
    words = ("argonne", "prepare", "--input", *asked.text, *tokenizer, "--hold-out", str(share), "--out", str(out))
    _say("The text as tokens, and a part that is never trained on", f"$ {shlex.join(words)}")
    which: dict[str, Any] = {"train_tokenizer": size} if own is None else {"tokenizer": Path(own)}
    prepare(PrepareOptions(input=asked.text, out=out, hold_out=share, **which))
    manifest = read_manifest(out)
    _say(None, f"{manifest['tokens']:,} tokens to train on, {manifest['held_out']['tokens']:,} held out: {out}")
    return manifest


def _recipe(
    asked: Asked, choice: Choice, text_tokens: int, device: Device, gpus: int, held_out: int | None = None
) -> tuple[str, list[str]]:
    """The recipe as text, each key with why, and the lines that tell the choice. Raises InputError for a key of the
    command that no recipe could have, and for a run that would be refused.
    """
    chosen = choice.recipe
    source = {"path": str(asked.out / TOKENS), "max_epochs": 1e9}
    ours = {
        **{f"model.{name}": value for name, value in to_tree(chosen.model).items() if value and name != "initializer"},
        "data.sources": [source],
        "data.sequence_length": chosen.data.sequence_length,
        "data.order": "shuffled",
        "batch.tokens_per_step": chosen.batch.tokens_per_step,
        "optim.name": chosen.optim.name,
        "optim.lr": chosen.optim.lr,
        "schedule.kind": "wsd",
        "schedule.decay": 0.4,
        "train.steps": chosen.train.steps,
    }
    if fixed := asked.overrides.keys() & {"data.sources", "data.input", "data.tokenizer", "stage"}:
        raise InputError(f"--{min(fixed)}: the command's TEXT says it; use `argonne pretrain` with a recipe")
    given = {path: parse_value(path, text) for path, text in asked.overrides.items()}
    for ways in ALTERNATIVES:  # one that is given takes the place of ours
        if given.keys() & set(ways):
            ours = {path: value for path, value in ours.items() if path not in ways}
    plan = make_plan(_settled(ours, given)[1], gpu=device, gpus=gpus)
    if plan.refusals:
        raise InputError(f"the run would be refused: {plan.refusals[0]}")
    steps, tokens = plan.steps or chosen.train.steps or 1, plan.tokens or choice.tokens
    ours |= {
        "data.sources": [source | {"max_epochs": math.ceil(tokens / text_tokens) + 1}],
        "schedule.warmup": min(100, steps // 20),
        "checkpoint.every_steps": max(1, steps // 4),
        "log.every_steps": max(1, steps // 100),
    }
    if held_out is None or held_out > chosen.data.sequence_length:
        ours["eval.every_steps"] = max(25, steps // 10)
    values, recipe = _settled(ours, given)
    rate, model, kept = plan.tokens_per_second or choice.rate, recipe.model, asked.out / RECIPE
    lines = [
        f"{plan.parameters / 1e6:,.2f}M parameters: {model.num_hidden_layers} layers of width {model.hidden_size}, "
        f"{model.vocab_size:,} entries of the tokenizer",
        f"{tokens:,} tokens in {steps:,} steps: the text {tokens / text_tokens:,.2g} times, "
        f"{tokens / plan.parameters:,.2g} a parameter",
        f"about {tokens / rate / 60:,.2g} minutes on {gpus} x {device.name} at {rate:,.0f} tokens/s"
        f"{' (measured just now)' if device.sustained else ''}",
        choice.larger or "this is the largest size",
        f"other sizes: --hours, other text, or edit {kept}",
    ]
    return _toml(values, given, [f"{kept}, by `argonne train`. Edit it, then: {_pretrain(asked.out)}", *lines]), lines


def _pretrain(out: Path) -> str:
    return shlex.join(("argonne", "pretrain", str(out / RECIPE), "--run", str(out / RUN)))


def _settled(ours: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], Recipe]:
    """What is given, and of ours what acts beside it: as keys, and as the recipe in which a person gave each."""
    whole = build(Recipe, tomllib.loads(_toml({**ours, **given})))
    values = {**{path: value for path, value in ours.items() if not unmet(whole, path)}, **given}
    tree = tomllib.loads(_toml(values))
    return values, resolve(replace(build(Recipe, tree), given=frozenset(leaves(tree))))


def _toml(values: Mapping[str, Any], given: Container[str] = (), head: Sequence[str] = ()) -> str:
    """`section.key -> value` as TOML, each with why it is so. given: those that the command says."""
    keys, lines = all_keys(), [f"# {line}" for line in head]
    sections: dict[str, list[str]] = {"": []}
    for path in (*filter(values.__contains__, keys), *(path for path in values if path not in keys)):
        sections.setdefault(path.rpartition(".")[0], []).append(path)
    for section, paths in sections.items():
        lines += ["", f"[{section}]"] * bool(section)
        for path in paths:
            why = (
                "as given"
                if path in given
                else WHY.get(path) or (keys[path].metadata["meaning"] if path in keys else "")
            )
            lines.append(f"{path.rpartition('.')[2]} = {toml_value(to_tree(values[path]))}  # {why}")
    return "\n".join(lines) + "\n"


def _train(recipe_file: Path, run_folder: Path, started: float | None) -> None:
    from argonne.stages.ending import finish_or_stop
    from argonne.stages.pretrain import run
    from argonne.train.guard import StopWatch

    _say("Training", f"$ {_pretrain(recipe_file.parent)}")
    recipe = load_recipe(str(recipe_file))
    watch = StopWatch(recipe.stop, started=started)
    with watch.listening():
        outcome = run(recipe, run_folder, watch=watch).outcome
    finish_or_stop(outcome, run_folder)


def _say(heading: str | None, *lines: str) -> None:
    told = [f"\n{heading}"] * (heading is not None) + [f"  {line}" for line in lines]
    print("\n".join(told), file=sys.stderr, flush=True)

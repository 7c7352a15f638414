"""`argonne demo`: every stage at laptop size, with the same functions as the verbs, on text that every
Python carries.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from argonne import layout
from argonne.errors import InputError
from argonne.stages.corpus import MODULES, write_corpus

RECIPE = "nano-3.0-demo"
VOCABULARY = 2048
HOLD_OUT = 0.05
PROMPTS = ("Return a list of", "The following example")


def run_demo(
    out: Path,
    *,
    overrides: Mapping[str, str] | None = None,
    modules: Sequence[str] = MODULES,
    log: Callable[[str], None] | None = None,
) -> None:
    """Collect a corpus, train a tokenizer, prepare, pretrain with a stop and a resume, measure, generate and write a
    report, all below `out`.

    Interrupted, it goes on where it was. `overrides`: recipe keys, as on the command line. Raises InputError where
    `out` is something else.
    """
    demo = _Demo(Path(out), dict(overrides or {}), modules, log or partial(print, flush=True))
    demo.corpus()
    demo.prepare()
    demo.train()
    demo.measure()
    demo.generate()
    demo.report()


class _Demo:
    def __init__(
        self, out: Path, overrides: dict[str, str], modules: Sequence[str], log: Callable[[str], None]
    ) -> None:
        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "corpus.jsonl").exists())):
            raise InputError(f"{out}: exists and is no demo folder; choose another with --out")
        self.out, self.modules, self.log, self.started = out, modules, log, time.monotonic()
        self.tokens, self.run = out / "tokens", out / "run"
        source = f"[{{ path = {json.dumps(str(self.tokens))}, max_epochs = 20.0 }}]"
        self.overrides = {"data.sources": source, **overrides}

    def heading(self, number: int, text: str, command: str = "") -> None:
        self.log(f"\n[{number}/6] {text}   ({time.monotonic() - self.started:.0f} s so far)")
        if command:
            self.log(f"      $ {command}")

    def corpus(self) -> None:
        self.heading(1, "A corpus: the documentation that this Python carries")
        path = self.out / "corpus.jsonl"
        found = write_corpus(self.out / "corpus.jsonl.new", modules=self.modules)
        if path.exists() and path.read_bytes() == found.path.read_bytes():
            found.path.unlink()  # the one that is there keeps its date, so that an interrupted demo goes on
        else:
            found.path.replace(path)
        self.log(
            f"      {found.documents:,} documents, {found.bytes / 1e6:.2f} MB of text, from {found.modules} modules "
            f"(parsed, not imported)\n      left out: {found.too_short} very short, {found.repeated} repeated, "
            f"{len(found.missing)} modules this Python lacks"
        )

    def prepare(self) -> None:
        from argonne.prepare.options import PrepareOptions
        from argonne.prepare.prepare import prepare
        from argonne.tokens.formats import open_tokens

        source, target = str(self.out / "corpus.jsonl"), str(self.tokens)
        flags = f"--train-tokenizer {VOCABULARY} --hold-out {HOLD_OUT}"
        command = f"argonne prepare --input {shlex.quote(source)} {flags} --out {shlex.quote(target)}"
        self.heading(2, f"A tokenizer of {VOCABULARY:,} entries, and the text as tokens", command)
        prepare(PrepareOptions(input=(source,), out=self.tokens, train_tokenizer=VOCABULARY, hold_out=HOLD_OUT))
        made = open_tokens(self.tokens)
        self.log(
            f"      {made.train.tokens:,} tokens to train on, {made.held_out.tokens:,} held out "
            f"({made.held_out.documents} documents)"
        )

    def train(self) -> None:
        from argonne.recipe import load_recipe
        from argonne.stages.pretrain import run

        recipe = load_recipe(RECIPE, self.overrides)
        steps = recipe.train.steps or 0
        keys = " ".join(f"--{path} {shlex.quote(value)}" for path, value in self.overrides.items())
        command = f"argonne pretrain {RECIPE} --run {shlex.quote(str(self.run))} {keys}"
        self.heading(
            3,
            f"Pretraining: {steps} steps of {recipe.batch.tokens_per_step:,} tokens; stopped in the middle, then "
            "resumed",
            command,
        )
        middle = steps // 2
        result = run(recipe, self.run, stop_after_step=middle)
        if not result.outcome.complete:
            self.log(
                f"      Stopped on purpose after step {result.outcome.step}. Everything is in the checkpoint; the same "
                "command goes on:"
            )
            run(recipe, self.run)

    def measure(self) -> None:
        from argonne.evaluate.run import baseline_results, evaluate
        from argonne.tokens.tokenizer import load_tokenizer

        command = f"argonne eval {shlex.quote(str(self.run))} --tasks bpb"
        self.heading(4, "How well it predicts text it has never seen, in bits per byte (lower is better)", command)
        found = evaluate(self.run, ["bpb"], self.tokens)["tasks"]["bpb"]
        others = baseline_results(self.tokens, load_tokenizer(self.tokens / layout.TOKENIZER))
        self.log(f"      on {found['documents']:,} held-out documents, {found['bytes']:,} bytes:")
        for name, value in (
            (f"all {VOCABULARY:,} tokens as likely", others["uniform"]),
            ("token frequencies (unigram)", others["unigram"]),
            ("xz -9", others["xz"]),
            ("xz -9 behind the training text", others["xz_after_training_text"]),
            ("bigram model, same tokens", others["bigram"]),
        ):
            self.log(f"      {name:34} {value:6.3f}")
        error = found["standard_error"]
        spread = "" if error is None else f"  (standard error {error:.3f})"
        self.log(f"      {'this model':34} {found['bits_per_byte']:6.3f}{spread}")

    def generate(self) -> None:
        from argonne.serve.engine import open_engine
        from argonne.serve.options import SamplingOptions

        command = f"argonne generate {shlex.quote(str(self.run))} --prompt {shlex.quote(PROMPTS[0])}"
        self.heading(
            5, "What it writes (a model of this size has learned the look of the text, not its sense)", command
        )
        engine = open_engine(self.run)
        for prompt, text in zip(
            PROMPTS, engine.complete(PROMPTS, SamplingOptions(max_new_tokens=60, seed=1)), strict=True
        ):
            self.log("\n".join(f"      | {line}" for line in f"{prompt}{text}".splitlines()))
            self.log("")

    def report(self) -> None:
        from argonne.report.report import write_report

        self.heading(6, "The report", f"argonne report {shlex.quote(str(self.run))}")
        page = write_report([self.run])
        self.log(f"      open {page} in a browser: loss, rate, gradient norm, throughput, samples, configuration")
        self.log(f"\nDone in {time.monotonic() - self.started:.0f} s. What to try next:")
        run, sources = shlex.quote(str(self.run)), shlex.quote(self.overrides["data.sources"])
        for command, meaning in (
            (f"argonne generate {run} --prompt 'class ' --temperature 0.5", "your own prompt"),
            (f"argonne inspect {run}", "what the run is: hashes verified, where it came from"),
            (
                "argonne prepare --input 'YOUR/*.txt' --train-tokenizer 2048 --hold-out 0.05 --out tokens/mine",
                "your own text, then:",
            ),
            (
                'argonne pretrain nano-3.0 --run runs/mine --data.sources \'[{ path = "tokens/mine", max_epochs = 20 '
                "}]' --train.steps 1000",
                "a longer run; stop it with Ctrl-C or kill, start it again and it goes on exactly where it was",
            ),
            (f"argonne report {run} runs/mine --out both.html", "two runs in the same axes"),
            (
                f"argonne pretrain nano-2.5 --run runs/older --data.sources {sources}",
                "an earlier architecture on the same text",
            ),
            ("argonne models", "the architectures of all generations, with their exact sizes"),
        ):
            self.log(f"  {command}\n      {meaning}")

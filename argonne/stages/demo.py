"""`argonne demo`: the whole way at laptop size, with the same functions as the verbs, on text that every Python carries
and on generated lessons.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from argonne import files, layout
from argonne.config import Recipe
from argonne.errors import InputError, Stopped
from argonne.stages import lessons
from argonne.stages.corpus import MODULES, write_corpus

VOCABULARY = 2048
HOLD_OUT = 0.05
FACTS = 0.3  # of the tokens of pretraining and midtraining
PASSES = 20.0  # over a source, at most
MERGE = {"cot-sft": 0.15, "dpo": 0.85}
ANSWER_TOKENS, THINKING_TOKENS = 40, 100  # of an answer at most: the longest worked steps take 90
TEXT_TOKENS = 50_000  # of held-out documentation
QUESTIONS, TURNS = 500, 200
SAMPLED = 100  # of the questions are answered once more, at temperature 0.8: so the wording is free
MEASURED = "measured"
# Asked of the model after each stage; the page shows the answers side by side.
PROBES = (
    "Hello, my name is Ada.",
    "What is 347 + 285?",
    "What is 520 - 64?",
    "Say red ball twice.",
    "What is json.dumps?",
)


@dataclass(frozen=True)
class Lesson:
    """A stage of the way, whose run has the name of its verb. `start`: the run whose weights it begins with."""

    verb: str
    recipe: str
    start: str | None
    title: str


LESSONS = (
    Lesson("pretrain", "nano-3.0-demo", None, "Pretraining on documentation and facts"),
    Lesson("midtrain", "nano-3.0-demo-midtrain", "pretrain", "Midtraining: four times the context"),
    Lesson("sft", "nano-3.0-demo-sft", "midtrain", "Chat: conversations, loss on the answers"),
    Lesson("cot-sft", "nano-3.0-demo-cot-sft", "sft", "Thinking first: worked steps before each answer"),
    Lesson("dpo", "nano-3.0-demo-dpo", "cot-sft", "Preferences: an answer in a sentence is better"),
)
WAY = 4 + len(LESSONS)


def run_demo(
    out: Path,
    *,
    seed: int = Recipe.seed,
    scale: float = 1.0,
    modules: Sequence[str] = MODULES,
    log: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Corpus, tokenizer, pretraining with a stop and a resume, midtraining, chat, worked steps, preferences, an
    average, and what each of them changed, all below `out`. Returns the measures of each stage.

    Interrupted, it goes on where it was. `scale`: of steps, lessons and questions. Raises InputError where `out` is
    something else, or was begun with another seed or scale.
    """
    demo = _Demo(Path(out), seed, scale, modules, log or partial(print, flush=True))
    demo.prepare()
    for lesson in LESSONS:
        demo.teach(lesson)
    demo.merge()
    demo.report()
    return demo.measured


class _Demo:
    def __init__(self, out: Path, seed: int, scale: float, modules: Sequence[str], log: Callable[[str], None]) -> None:
        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "demo.json").exists())):
            raise InputError(f"{out}: exists and is no demo folder; choose another with --out")
        asked = {"seed": seed, "scale": scale}
        if out.exists() and any(out.iterdir()) and (found := files.read_json(out / "demo.json")) != asked:
            raise InputError(f"{out}: was begun with {found}, now {asked}; choose another folder with --out")
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / "demo.json", asked)
        self.out, self.seed, self.scale, self.modules, self.log = out, seed, scale, modules, log
        self.started, self.number = time.monotonic(), 0
        self.measured: dict[str, dict[str, Any]] = {}

    def path(self, name: str) -> str:
        return str(self.out / name)

    def scaled(self, count: int) -> int:
        return max(1, round(count * self.scale))

    def heading(self, text: str) -> None:
        self.number += 1
        self.log(f"\n[{self.number}/{WAY}] {text}   ({time.monotonic() - self.started:.0f} s so far)")

    def command(self, *words: str) -> None:
        self.log(f"      $ argonne {shlex.join(words)}")

    def write(self, name: str, rows: Sequence[lessons.Row]) -> None:
        """A file that is there as it would be written keeps its date, so that an interrupted demo goes on."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = self.out / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            files.write_text(path, text)

    # ------------------------------------------------------------------------------------------------- text to tokens

    def prepare(self) -> None:
        from argonne.prepare.options import PrepareOptions, TokenizerOptions
        from argonne.prepare.planning import train_tokenizer_on_files
        from argonne.prepare.prepare import prepare
        from argonne.tokens.formats import open_tokens
        from argonne.tokens.tokenizer import load_tokenizer

        self.heading("A corpus: the documentation that this Python carries, and facts of single digits")
        found, corpus = write_corpus(self.out / "corpus.jsonl.new", modules=self.modules), self.out / "corpus.jsonl"
        if corpus.exists() and corpus.read_bytes() == found.path.read_bytes():
            found.path.unlink()  # as `write` does
        else:
            found.path.replace(corpus)
        self.write("facts.jsonl", list(islice(lessons.facts(self.seed), self.scaled(2000))))
        self.log(
            f"      {found.documents:,} documents, {found.bytes / 1e6:.2f} MB of text, from {found.modules} modules "
            f"(parsed, not imported)\n      left out: {found.too_short} very short, {found.repeated} repeated, "
            f"{len(found.missing)} modules this Python lacks"
        )
        self.heading(f"A tokenizer of {VOCABULARY:,} entries, and the text as tokens")
        inputs, tokenizer = (self.path("corpus.jsonl"), self.path("facts.jsonl")), self.out / layout.TOKENIZER
        size = ("--vocab-size", str(VOCABULARY), "--out", str(tokenizer))
        self.command("tokenizer", "train", "--input", *inputs, *size)
        if not tokenizer.exists():
            train_tokenizer_on_files(TokenizerOptions(input=inputs, vocab_size=VOCABULARY, out=tokenizer))
        for source, name, held_out in ((inputs[0], "documentation", HOLD_OUT), (inputs[1], "facts", 0.0)):
            told = ("--input", source, "--tokenizer", str(tokenizer), "--hold-out", str(held_out))
            self.command("prepare", *told, "--out", self.path(name))
            prepare(PrepareOptions(input=(source,), out=self.out / name, tokenizer=tokenizer, hold_out=held_out))
        made = open_tokens(self.out / "documentation")
        self.log(
            f"      {made.train.tokens:,} tokens of documentation to train on, {made.held_out.tokens:,} held out "
            f"({made.held_out.documents} documents)"
        )
        self.quoted = partial(lessons.quotations, made, load_tokenizer(tokenizer))

    # ------------------------------------------------------------------------------------------------- the stages

    def overrides(self, lesson: Lesson) -> dict[str, str]:
        """What the recipe is told on the command line: where things lie, the seed, and a shorter run at a scale."""
        from argonne.recipe import load_recipe

        told = {"data.sources": self.sources(lesson), "seed": str(self.seed)}
        if lesson.start is not None:
            told["model.init_from"] = json.dumps(self.path(lesson.start))
        if self.scale != 1.0:
            steps = load_recipe(lesson.recipe, {}).train.steps or 1
            told |= {"train.steps": str(max(4, self.scaled(steps))), "schedule.warmup": "1"}
        return told

    def sources(self, lesson: Lesson) -> str:
        def table(name: str, weight: float = 1.0) -> str:
            return f"{{ path = {json.dumps(self.path(name))}, weight = {weight:g}, max_epochs = {PASSES:g} }}"

        if lesson.verb in ("pretrain", "midtrain"):
            return f"[{table('documentation', 1 - FACTS)}, {table('facts', FACTS)}]"
        return f"[{table(self.lesson_file(lesson))}]"

    def lesson_file(self, lesson: Lesson) -> str:
        """Write what a chat stage learns from; its name."""
        seed = self.seed + LESSONS.index(lesson)
        if lesson.verb == "sft":
            counts = [self.scaled(count) for count in (2700, 300, 1000)]
            name, rows = "chat.jsonl", list(lessons.conversations(self.quoted(seed), counts, seed, thinking=False))
        elif lesson.verb == "cot-sft":
            counts = [self.scaled(count) for count in (7000, 1400, 14_000)]
            name, rows = "thoughts.jsonl", list(lessons.conversations(self.quoted(seed), counts, seed, thinking=True))
        else:
            name, rows = "pairs.jsonl", lessons.pair_rows(self.scaled(700), seed)
        self.write(name, rows)
        return name

    def teach(self, lesson: Lesson) -> None:
        """Run one stage as its verb does, then measure what came of it."""
        from argonne.recipe import load_recipe
        from argonne.stages.pretrain import run
        from argonne.train.guard import StopWatch

        self.heading(lesson.title)
        told, folder = self.overrides(lesson), self.out / lesson.verb
        recipe = load_recipe(lesson.recipe, told)
        self.command(
            lesson.verb,
            lesson.recipe,
            *("--run", str(folder)),
            *(word for key, value in told.items() for word in (f"--{key}", value)),
        )
        stop = (recipe.train.steps or 0) // 2 if lesson.start is None else None
        watch = StopWatch(recipe.stop)
        with watch.listening():
            outcome = run(recipe, folder, watch=watch, stop_after_step=stop).outcome
            if not outcome.complete and watch.reason() is None:
                self.log(
                    f"      Stopped on purpose after step {outcome.step}. Everything is in the checkpoint; the same "
                    "command goes on:"
                )
                outcome = run(recipe, folder, watch=watch).outcome
        if not outcome.complete:
            raise Stopped(f"{folder}: stopped at step {outcome.step} ({outcome.reason}); the same demo goes on there")
        self.measure(lesson.verb)
        if lesson.start is None:
            self.baselines()

    def merge(self) -> None:
        from argonne.publish.merge import open_mixer

        self.heading("The average of two models' weights")
        out = self.out / "model"
        self.command("merge", *(f"{self.path(name)}:{weight:g}" for name, weight in MERGE.items()), "--out", str(out))
        if not out.exists():
            open_mixer([self.path(name) for name in MERGE]).save(out, list(MERGE.values()))
        self.measure("model")

    # ------------------------------------------------------------------------------------------------- measures

    def measure(self, name: str) -> None:
        """What a stage's model can do, kept beside its answers in `measured/`; said in a line."""
        from argonne.evaluate.run import evaluate
        from argonne.model.load import load_model

        model, kept = self.path(name), self.out / MEASURED / f"{name}.json"
        questions = self.out / "questions.txt"
        files.write_text(questions, "\n".join(PROBES) + "\n")
        tokens = ANSWER_TOKENS if name in ("pretrain", "midtrain", "sft") else THINKING_TOKENS
        asked: dict[str, dict[str, Any]] = {
            "sums": {"limit": self.scaled(QUESTIONS), "tokens": tokens},
            "sums, sampled": {"limit": self.scaled(SAMPLED), "tokens": tokens, "samples": 1},
            "turns": {"limit": self.scaled(TURNS), "tokens": tokens},
            "bpb": {"data": self.path("documentation"), "limit": TEXT_TOKENS},
            "probes": {"data": questions, "tokens": tokens},
        }
        for what, how in asked.items():
            words = (word for flag, value in how.items() for word in (f"--{flag}", str(value)))
            self.command("eval", model, "--tasks", what.partition(",")[0], *words)
        if not kept.exists():
            loaded, results = load_model(model), {}
            for what, how in asked.items():
                (results[what],) = evaluate(model, [what.partition(",")[0]], loaded=loaded, **how)["tasks"].values()
            results["sums"]["sampled"] = results.pop("sums, sampled")["sampled"]
            kept.parent.mkdir(exist_ok=True)
            files.write_json(kept, results)
        found = self.measured[name] = files.read_json(kept)
        sums, talk = found["sums"], found["turns"]
        self.log(
            f"      {found['bpb']['bits_per_byte']:.3f} bits per byte of unseen documentation; right: "
            f"{sums['exact_match']:.1%} of {sums['questions']} unseen problems, {talk['exact_match']:.1%} of "
            f"{talk['questions']} unseen turns"
        )
        if sums["closed"]:
            self.log(
                f"      thinks and closes it: {sums['closed']:.1%}; its last result is the answer: "
                f"{sums['consistent']:.1%}; answers in a sentence: {sums['sentences']:.1%}, sampled "
                f"{sums['sampled']['sentences']:.1%}"
            )

    def baselines(self) -> None:
        from argonne.evaluate.run import baseline_results
        from argonne.tokens.tokenizer import load_tokenizer

        tokens = self.out / "documentation"
        others = baseline_results(tokens, load_tokenizer(tokens / layout.TOKENIZER), limit=TEXT_TOKENS)
        self.log("      beside it, in bits per byte of the same text (lower is better):")
        for name, key in (
            (f"all {VOCABULARY:,} tokens as likely", "uniform"),
            ("token frequencies (unigram)", "unigram"),
            ("xz -9", "xz"),
            ("xz -9 behind the training text", "xz_after_training_text"),
            ("bigram model, same tokens", "bigram"),
        ):
            self.log(f"      {name:34} {others[key]:6.3f}")
        self.log(f"      {'this model':34} {self.measured[LESSONS[0].verb]['bpb']['bits_per_byte']:6.3f}")

    def report(self) -> None:
        from argonne.report.report import write_report
        from argonne.report.way_page import write_way_page

        self.heading("The report: what each stage changed")
        pages = {lesson.verb: write_report([self.out / lesson.verb]) for lesson in LESSONS}
        page = self.out / layout.REPORT
        write_way_page(page, self.measured, {lesson.verb: lesson.title for lesson in LESSONS}, pages)
        self.log(f"      open {page} in a browser: the measures and the answers after each stage, side by side")
        self.log(f"\nDone in {time.monotonic() - self.started:.0f} s. What to try next:")
        for words, meaning in (
            (("chat", self.path("model")), "talk to it"),
            (("generate", self.path("pretrain"), "--prompt", "class "), "the text that the base model writes"),
            (("inspect", self.path("cot-sft")), "what a run is: hashes verified, where it came from"),
            (("report", self.path("sft"), self.path("cot-sft")), "two runs in the same axes"),
            (
                ("merge", *(f"{self.path(name)}:{weight:g}" for name, weight in MERGE.items()), "--sweep", "sums"),
                "other averages",
            ),
            (
                ("prepare", "--input", "YOUR/*.txt", "--train-tokenizer", "2048", "--out", "tokens/mine"),
                "your own text, then:",
            ),
            (
                ("pretrain", "nano-3.0", "--run", "runs/mine", "--data.sources", "tokens/mine"),
                "a run of your own; stop it with Ctrl-C or kill, start it again and it goes on exactly where it was",
            ),
            (("models",), "the architectures of all generations, with their exact sizes"),
        ):
            self.log(f"  argonne {shlex.join(words)}\n      {meaning}")

"""`argonne rehearse`: recipes one after the other, small, on this CPU, by the commands that a user would type."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.config import CHAT_STAGES, ModelSection, Recipe, SourceSection
from argonne.errors import InputError, first_line
from argonne.plan.shape import weights_on_disk
from argonne.rehearse import checks, commands
from argonne.rehearse.checks import Machine
from argonne.rehearse.sample import sample
from argonne.rehearse.shrink import Small, shrink, write_small
from argonne.rehearse.weights import chat_ends, small_weights

TRIES = 3  # to stop a run in its middle: a small one may be over first


@dataclass(frozen=True)
class Part:
    """One recipe of a chain: its name, the verb that trains it, the recipe with everything the command line says, its
    run folder, flags of the verb. former: the part whose run it starts from.
    """

    name: str
    verb: str
    recipe: Recipe
    folder: Path
    flags: tuple[str, ...] = ()
    former: int | None = None


@dataclass
class Rehearsed:
    """What came of a part: the small recipe, the small run, seconds."""

    part: Part
    small: Small
    run: Path
    seconds: float


def rehearse(parts: Sequence[Part], machine: Machine, log: Callable[[str], None]) -> list[Rehearsed]:
    """Check the real runs, then train, stop, resume, evaluate, export and load each small one, in a folder that is
    removed at the end. Nothing else is written.

    Raises InputError naming the phase, the recipe and what the command said; then the folder stays.
    """
    began = time.monotonic()

    def tell(text: str) -> None:
        log(f"[{time.monotonic() - began:4.0f} s] {text}")

    real: list[Recipe] = []
    for part in parts:
        with _phase("the check", part):
            former = None if part.former is None else real[part.former]
            real.append(checks.settled(checks.real_recipe(part.recipe, former), machine))
            checks.check_run(real[-1], part.folder, machine)
    with _phase("the check", parts[0]):
        checks.check_disk(
            [(part.folder, checks.bytes_needed(recipe)) for part, recipe in zip(parts, real, strict=True)]
        )
    parts = [
        replace(part, recipe=replace(part.recipe, parallel=recipe.parallel, given=recipe.given))
        for part, recipe in zip(parts, real, strict=True)
    ]
    tell("checked: the real recipes, their data, folders and disk")
    folder = Path(tempfile.mkdtemp(prefix="argonne-rehearsal-"))
    commands.load()
    done: list[Rehearsed] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the commands end with this one
    try:
        for number, part in enumerate(parts):
            start = None if part.former is None else done[part.former].run
            done.append(_Rehearsal(part, start, folder / f"{number + 1}-{part.folder.name}", machine, tell).play())
    finally:
        signal.signal(signal.SIGTERM, before)
    shutil.rmtree(folder)
    return done


def summary(done: Sequence[Rehearsed]) -> list[str]:
    """What passed, and what no CPU could show."""
    untold = dict.fromkeys(said for one in done for said in one.small.untold)
    return [
        *(f"{one.part.name}: passed in {one.seconds:.0f} s ({len(one.small.changed)} keys changed)" for one in done),
        f"not rehearsed: {'; '.join(untold)}",
    ]


@contextmanager
def _phase(what: str, part: Part) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"rehearsal: {what} of {part.name}: {error}") from None


class _Rehearsal:
    def __init__(
        self, part: Part, start: Path | None, place: Path, machine: Machine, tell: Callable[[str], None]
    ) -> None:
        self.part, self.start, self.place, self.tell = part, start, place, tell
        self.workers = machine.gpus
        self.recipe, self.run, self.export = part.recipe, place / place.name, place / "export"
        self.chat = part.recipe.stage in CHAT_STAGES
        self.took: dict[str, float] = {}  # seconds of each command

    def play(self) -> Rehearsed:
        began = time.monotonic()
        self.place.mkdir()
        with _phase("the data", self.part):
            small = self.shrunk()
        for path, (before, after) in small.changed.items():
            self.tell(f"{self.part.name}: {path}: {_shown(before)} -> {_shown(after)}")
        self.file = write_small(self.part.name, small, self.place)
        self.train(small.recipe)
        self.evaluate(small.recipe)
        self.hand_on()
        seconds = time.monotonic() - began
        parts = ", ".join(f"{phase} {took:.1f} s" for phase, took in self.took.items())
        self.tell(f"{self.part.name}: took {seconds:.1f} s: {parts}")
        return Rehearsed(self.part, small, self.run, seconds)

    def shrunk(self) -> Small:
        instead: dict[str, Any] = {}
        recipe = self.part.recipe
        if recipe.model.init_from is not None or self.start is not None:
            instead["model.init_from"] = str(self.start or self.small_start(str(recipe.model.init_from)))
        if self.chat:
            instead["data.sources"] = sample(recipe.data.sources, self.place)
        return shrink(recipe, workers=self.workers, instead=instead)

    def small_start(self, start: str) -> Path:
        """Small weights of the kind that the recipe starts from, with the same tokenizer."""
        fields = weights_on_disk(start)
        if fields is None:
            raise InputError(
                f"model.init_from: {start} is not on this disk; download it first, or rehearse the recipe that makes "
                "it too"
            )
        alone = replace(Recipe(), stage="pretrain", model=ModelSection(**fields), parallel=self.part.recipe.parallel)
        model = shrink(replace(alone, train=replace(alone.train, steps=1))).recipe.model
        to = self.place / "weights"
        self.forked("the weights to start from", partial(small_weights, start, model, to))
        return to

    # ----------------------------------------------------------------------------------------------------- phases

    def train(self, small: Recipe) -> None:
        """Start, be stopped in the middle, resume, be complete."""
        words = [self.part.verb, str(self.file), "--run", str(self.run), *self.part.flags]
        steps = small.train.steps or 1
        middle = max(1, steps // 2)
        for left in reversed(range(TRIES if steps > 1 else 0)):
            code = self.command("training", words, lambda: self.steps_done() >= middle)
            if code == 3 and layout.ending_of(self.run) == layout.STOPPED:
                self.tell(
                    f"{self.part.name}: trained, and stopped by SIGTERM after step {self.steps_done()} of {steps}"
                )
                break
            if code != 0:
                self.fail("training")
            if not left:
                raise InputError(
                    f"rehearsal: training of {self.part.name}: SIGTERM did not stop it: {self.log_of('training')}"
                )
            shutil.rmtree(self.run)
        if self.command("resuming", words) != 0 or layout.ending_of(self.run) != layout.COMPLETE:
            self.fail("resuming")
        self.check_saves(small, steps)
        self.tell(f"{self.part.name}: resumed, and complete at step {self.steps_done()}")

    def steps_done(self) -> int:
        return max((int(record["step"]) for record in self.records("step")), default=0)

    def records(self, event: str) -> list[dict[str, Any]]:
        path = self.run / layout.METRICS
        lines = path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []
        return [record for record in map(json.loads, filter(None, lines)) if record["event"] == event]

    def check_saves(self, small: Recipe, steps: int) -> None:
        """A save that fails is a warning in a long run; in a rehearsal it is the thing looked for."""
        saved = {record["step"] for record in self.records("checkpoint")}
        due = {*range(small.checkpoint.every_steps, steps + 1, small.checkpoint.every_steps), steps}
        if missing := sorted(due - saved):
            said = [str(record["message"]) for record in self.records("warning") if record["step"] in missing]
            raise InputError(
                f"rehearsal: saving of {self.part.name}: no checkpoint at step {missing[0]}: "
                f"{said[0] if said else 'see ' + str(self.log_of('training'))}"
            )

    def evaluate(self, small: Recipe) -> None:
        """The recipe's tasks, with its data; else what its kind of model can be asked."""
        asked = [task.partition(":") for task in small.eval.tasks]
        if not asked and self.chat:
            asked = [("turns", "", "")]
        if not asked and self.records("held_out"):
            asked = [("bpb", "", "")]
        for name, _, data in asked:
            limit = ["--limit", "2000" if name == "bpb" else "2"] if name != "probes" else []
            short = ["--tokens", "8"] if name in ("turns", "sums", "gsm8k", "gsm8k_base", "probes") else []
            more = [*limit, *short, *(["--data", data] if data else [])]
            self.command("evaluation", ["eval", str(self.run), "--tasks", name, *more], wanted=0)
        if asked:
            self.tell(f"{self.part.name}: evaluated ({', '.join(name for name, *_ in asked)})")

    def hand_on(self) -> None:
        """An export, and one who loads it."""
        self.command("export", ["export", str(self.run), "--as", "hf", "--out", str(self.export)], wanted=0)
        prompt = self.part.recipe.checkpoint.sample_prompt or "Hello"
        words = ["generate", str(self.export), "--prompt", prompt, "--max-new-tokens", "4"]
        self.command("loading the export", words, wanted=0)
        if self.chat:
            self.forked("the chat template", partial(chat_ends, self.export))
        self.tell(f"{self.part.name}: exported, proven in a fresh process, and loaded")

    # ----------------------------------------------------------------------------------------------------- commands

    def log_of(self, phase: str) -> Path:
        return self.place / f"{phase.replace(' ', '-')}.log"

    def command(
        self, phase: str, words: list[str], watch: Callable[[], bool] = lambda: False, wanted: int | None = None
    ) -> int:
        code = self.timed(phase, lambda: commands.run_command(words, self.log_of(phase), watch))
        if wanted is not None and code != wanted:
            self.fail(phase)
        return code

    def forked(self, phase: str, work: Callable[[], None]) -> None:
        def code() -> int:
            try:
                work()
            except InputError as error:
                print(f"argonne: {first_line(error)}", file=sys.stderr)
                return error.exit_code
            return 0

        if self.timed(phase, lambda: commands.run_forked(code, self.log_of(phase))) != 0:
            self.fail(phase)

    def timed(self, phase: str, command: Callable[[], int]) -> int:
        began = time.monotonic()
        code = command()
        self.took[phase] = self.took.get(phase, 0.0) + time.monotonic() - began
        return code

    def fail(self, phase: str) -> None:
        path = self.log_of(phase)
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        said = [line.removeprefix("argonne: ") for line in lines if line.startswith("argonne: ")]
        told = (said or lines or ["it ended without a word"])[-1]
        raise InputError(f"rehearsal: {phase} of {self.part.name}: {told} (all it said: {path})")


def _shown(value: Any) -> str:
    """A value in a line of the table."""
    if isinstance(value, tuple) and len(value) > 4 and all(isinstance(item, str) for item in value):
        return f"{len(value)} layers"
    if isinstance(value, tuple) and value and isinstance(value[0], SourceSection):
        value = ", ".join(f"{source.path} (at most {source.max_epochs:g} passes)" for source in value)
    text = "unset" if value is None else str(value)
    return text if len(text) <= 100 else text[:97] + "..."

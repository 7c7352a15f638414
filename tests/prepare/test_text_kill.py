"""Training from text through the command line, with trainer and tokenising process killed: bit for bit prepare and then
training.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from argonne import layout
from argonne.train.checkpoint import LAST
from tests.crash.killing import Watcher, _wait_a_moment
from tests.prepare.commands import Commands, tokenisers, wait_for_end
from tests.prepare.helpers import content
from tests.tokensets import words
from tests.train.helpers import curve, stored

UNITS, STEPS = 64, 40
NANO = {
    "model.hidden_size": "32",
    "model.num_hidden_layers": "2",
    "model.head_dim": "16",
    "model.num_attention_heads": "2",
    "model.num_key_value_heads": "1",
    "model.intermediate_size": "64",
    "data.sequence_length": "32",
    "batch.tokens_per_step": "256",
    "batch.micro": "4",
    "train.steps": str(STEPS),
    "train.threads": "1",
    "schedule.warmup": "3",
    "log.every_steps": "1",
    "log.tensorboard": "false",
    "checkpoint.every_steps": "2",
    "checkpoint.sample_prompt": "",
    "eval.windows": "0",
}


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    started = Commands()
    yield started
    started.close()


@dataclass
class Text:
    """A text, its tokenizer, its tokens from `argonne prepare`, and a folder for runs."""

    pattern: str
    tokenizer: Path
    tokens: Path
    folder: Path
    commands: Commands

    def pretrain(self, name: str, **keys: str) -> list[str]:
        """The command line of a run on the text, or on the sources among the keys."""
        text = (
            {}
            if "data.sources" in keys
            else {"data.input": json.dumps([self.pattern]), "data.tokenizer": str(self.tokenizer)}
        )
        flags = [
            word
            for key, value in {**NANO, "data.sources": "[]", **text, **keys}.items()
            for word in (f"--{key}", value)
        ]
        return ["pretrain", "nano-3.0", "--run", str(self.folder / name), *flags]

    def finish(self, name: str, *, ranks: int = 1, **keys: str) -> Path:
        self.commands.run(self.pretrain(name, **keys), self.folder / f"{name}.log", ranks=ranks)
        return self.folder / name

    def trained_on_prepared(self, *, ranks: int = 1, **keys: str) -> Path:
        """What a run on the text must equal."""
        sources = f"[{{ path = {json.dumps(str(self.tokens))}, max_epochs = 99 }}]"
        return self.finish("whole", ranks=ranks, **{"data.sources": sources, **keys})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, commands: Commands) -> tuple[str, Path]:
    """(pattern of the text, its tokens)"""
    folder = tmp_path_factory.mktemp("text")
    for number in range(UNITS):
        rows = [{"text": words(40 + number, 10 * number + row)} for row in range(10)]
        (folder / f"part_{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pattern, out = str(folder / "*.jsonl"), folder / "tokens"
    argv = ["prepare", "--input", pattern, "--tokenizer", str(tokenizer_folder), "--out", str(out), "--workers", "1"]
    commands.run(argv, folder / "prepare.log")
    return pattern, out


@pytest.fixture
def text(prepared: tuple[str, Path], tmp_path: Path, tokenizer_folder: Path, commands: Commands) -> Iterator[Text]:
    yield Text(prepared[0], tokenizer_folder, prepared[1], tmp_path, commands)
    if commands.pids:  # the test failed while a command ran
        commands.kill()


class Session(Watcher):
    """One start of a run on text: its ranks and the process that tokenises for them."""

    def __init__(self, text: Text, name: str, *, ranks: int = 1, **keys: str) -> None:
        self.run, self.text = text.folder / name, text
        super().__init__(
            self.run, text.commands.start(text.pretrain(name, **keys), text.folder / f"{name}.log", ranks=ranks)
        )

    def wait_for_tokeniser(self) -> bool:
        return self.wait_until(lambda: bool(tokenisers(self.run)))

    def units(self) -> int:
        """Finished units; all of them once the manifest has replaced their records."""
        return (
            UNITS
            if (self.run / "data" / layout.MANIFEST).exists()
            else len(list((self.run / "data" / layout.UNITS).glob("[0-9]*.json")))
        )

    def wait_for_units(self, count: int) -> bool:
        return self.wait_until(lambda: self.units() >= count)

    def signal_tokenisers(self, number: int) -> list[int]:
        found = tokenisers(self.run)
        for pid in found:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        return found

    def kill(self) -> list[int]:
        """`kill -9` to all ranks; returns the tokenising processes that ran then."""
        left = tokenisers(self.run)
        codes = self.text.commands.kill()
        assert set(codes) <= {0, -signal.SIGKILL}, (self.text.folder / f"{self.run.name}.log").read_text()[-4000:]
        return left


def assert_same(run: Path, whole: Path, expected_tokens: Path, steps: int = STEPS) -> None:
    """Step, tokens, loss, gradient norm and rate of each step, every weight and moment, and every byte
    of the tokens.
    """
    assert [record["step"] for record in curve(run)] == list(range(1, steps + 1))
    assert curve(run) == curve(whole)
    assert stored(run / LAST) == stored(whole / LAST)
    shards = {name: found for name, found in content(run / "data").items() if name.startswith("tokens-")}
    assert shards
    assert shards.items() <= content(expected_tokens).items()
    assert tokenisers(run) == []


def test_three_kills_of_the_trainer_and_one_of_its_tokeniser_leave_no_trace(text: Text) -> None:
    whole = text.trained_on_prepared()

    session = Session(text, "run")
    assert session.wait_for_tokeniser()
    left = session.kill()  # the tokeniser has hardly begun: it is still importing
    assert left
    wait_for_end(left)
    assert session.units() == 0, "the tokeniser went on without its trainer"

    session = Session(text, "run")
    assert session.wait_for_units(3)
    left = session.signal_tokenisers(signal.SIGSTOP)
    assert session.units() < UNITS, "the work was done before it could be stopped"
    assert session.wait_for_step(3)
    session.kill()  # while the tokeniser is in the middle of a unit
    assert session.signal_tokenisers(signal.SIGCONT) == left
    wait_for_end(left)

    session = Session(text, "run")
    assert session.wait_for_tokeniser()
    wait_for_end(session.signal_tokenisers(signal.SIGKILL))
    assert session.wait_for_step(20)
    wait_for_end(session.kill())

    text.finish("run")
    assert_same(text.folder / "run", whole, text.tokens)


def test_two_ranks_read_the_same_text_whoever_reads_it_and_survive_the_death_of_one(text: Text) -> None:
    whole = text.trained_on_prepared(ranks=2)
    session = Session(text, "run", ranks=2)
    assert session.wait_for_units(8)
    session.signal_tokenisers(signal.SIGSTOP)
    assert session.units() < UNITS, "the work was done before it could be stopped"
    assert session.wait_for_step(5)
    os.kill(text.commands.pids[1], signal.SIGKILL)
    session.kill()
    wait_for_end(session.signal_tokenisers(signal.SIGKILL))
    text.finish("run", ranks=2, **{"data.reader": '"rank-0"'})
    assert_same(text.folder / "run", whole, text.tokens)


def test_text_is_tokenised_to_the_end_where_the_run_asks_for_all_of_it(text: Text) -> None:
    keys = {"data.prefetch": '"all"', "train.steps": "4"}
    session = Session(text, "run", **keys)
    assert session.wait_for_units(2)
    wait_for_end(session.signal_tokenisers(signal.SIGKILL))
    wait_for_end(session.kill())
    assert content(text.finish("run", **keys) / "data") == content(text.tokens)


@pytest.mark.campaign
@pytest.mark.parametrize("ranks", [1, 2], ids=["1 rank", "2 ranks"])
@pytest.mark.parametrize("seed", range(3))
def test_a_campaign_of_kills_at_random_moments_leaves_no_trace(text: Text, seed: int, ranks: int) -> None:
    """Trainer, tokenising process or both, whichever the dice say, after a random unit or step and a random moment
    more.
    """
    steps, wanted, draw = 400, 20, random.Random(seed)
    keys = {"train.steps": str(steps)}
    whole = text.trained_on_prepared(ranks=ranks, **keys)
    kills = during_work = number = 0
    while (
        kills < 6 or during_work < 4
    ):  # a fast machine may finish a run before it was killed so often: then another one
        name, number, inside = f"run-{number}", number + 1, 0
        while inside < wanted and not (text.folder / name / "COMPLETE").exists():
            session = Session(text, name, ranks=ranks, **keys)
            saved = max(
                (int(path.name.rpartition("_")[2]) for path in session.run.glob("checkpoint_step_*")), default=0
            )
            if session.units() < UNITS and draw.random() < 0.85:
                session.wait_for_tokeniser()
                session.wait_for_units(session.units() + draw.randint(0, 2))
                if draw.random() < 0.7:
                    session.signal_tokenisers(signal.SIGSTOP)  # else it would be done before many kills
            else:
                session.wait_for_step(
                    min(steps - 1, saved + draw.randint(1, max(1, 2 * (steps - saved) // (wanted - inside))))
                )
            _wait_a_moment(draw, 0.05)
            during_work += session.units() < UNITS
            _kill_some(session, draw)
            kills, inside = kills + 1, inside + 1
        text.finish(name, ranks=ranks, **keys)
        assert_same(text.folder / name, whole, text.tokens, steps)
    print(f"{kills} kills in {number} runs, {during_work} while units were left")


def _kill_some(session: Session, draw: random.Random) -> None:
    """End the session, or its tokenising process first, or both."""
    target = draw.choice(["trainer", "tokeniser", "both"])
    if target != "trainer":
        wait_for_end(session.signal_tokenisers(signal.SIGKILL))
    if target == "tokeniser":
        session.wait_for_tokeniser()
        _wait_a_moment(draw, 0.5)
    left = session.kill()
    session.signal_tokenisers(signal.SIGCONT)
    wait_for_end(left)

"""What every test may use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from argonne.config import Recipe

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"

# Whatever starts the tests: what `make test` sets, read by huggingface_hub when it is first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A busy machine is no failure: no example of a property test has a time limit.
settings.register_profile("argonne", deadline=None)
settings.load_profile("argonne")

# Helpers that assert: their failures show the values too.
pytest.register_assert_rewrite("tests.data.rows", "tests.prepare.commands", "tests.prepare.helpers", "tests.tour")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text, tokenizers and golden files beside the repository; developers have it,
    users need not.
    """
    if not SHARED.is_dir():
        reason = f"needs the developers' material in {SHARED.name}/ beside the repository"
        if os.environ.get("ARGONNE_REQUIRE_SHARED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return SHARED


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real token set: Python's own help topics, a tokenizer of 512 entries, a tenth of the
    documents held out.
    """
    from pydoc_data.topics import topics

    from argonne.prepare.options import PrepareOptions
    from argonne.prepare.prepare import prepare

    folder = tmp_path_factory.mktemp("tokens")
    text = folder / "topics.jsonl"
    text.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))
    return prepare(PrepareOptions(input=(str(text),), out=folder / "set", train_tokenizer=512, hold_out=0.1, workers=1))


# Keys of the nano recipe that do nothing where others say so.
IDLE: dict[str, dict[str, tuple[str, ...]]] = {
    "checkpoint.sample_tokens": {"checkpoint.sample_prompt": ("", '""')},
    "eval.every_steps": {"eval.windows": ("0",)},
}


def _without_idle(base: dict[str, str], overrides: dict[str, str]) -> dict[str, str]:
    """Both together, without what `base` alone says of things that the overrides switch off."""
    asked = {**base, **overrides}
    idle = [
        key
        for key, off in IDLE.items()
        if key not in overrides and all(asked.get(name) in values for name, values in off.items())
    ]
    return {key: value for key, value in asked.items() if key not in idle}


@pytest.fixture(scope="session")
def nano(tokens: Path) -> Callable[..., Recipe]:
    """Makes recipes of very small runs on `tokens`: `nano(**{"optim.lr": "1e-3"})`."""
    from argonne.recipe import load_recipe

    def make(preset: str = "nano-3.0", **overrides: str) -> Recipe:
        base = {
            "model.preset": f'"{preset}"',
            "model.vocab_size": "512",
            "model.hidden_size": "32",
            "model.num_hidden_layers": "2",
            "model.head_dim": "16",
            "model.num_attention_heads": "2",
            "model.num_key_value_heads": "2" if preset == "nano-1.0" else "1",
            "model.intermediate_size": "64",
            "data.sources": f"[{{ path = {json.dumps(str(tokens))}, max_epochs = 9 }}]",
            "data.sequence_length": "32",
            "batch.tokens_per_step": "256",
            "batch.micro": "4",
            "train.steps": "12",
            "train.threads": "1",
            "schedule.warmup": "3",
            "log.every_steps": "1",
            "log.tensorboard": "false",
            "checkpoint.every_steps": "4",
            "checkpoint.sample_tokens": "4",
            "eval.every_steps": "6",
            "eval.windows": "4",
        }
        return load_recipe("nano-3.0", _without_idle(base, overrides))

    return make


@pytest.fixture(scope="session")
def base(nano: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pretrained model with a tokenizer that has the turn tokens."""
    from argonne.stages.pretrain import run

    folder = tmp_path_factory.mktemp("base")
    recipe = nano(
        **{
            "model.max_position_embeddings": "128",
            "train.steps": "2",
            "schedule.warmup": "0",
            "schedule.decay": "0",
            "schedule.min_ratio": "none",
            "checkpoint.sample_prompt": "",
        }
    )
    run(recipe, folder / "run")
    return folder / "run"


@pytest.fixture
def chat(base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Makes recipes of small fine-tuning runs, on 60 conversations where no other file is given:
    `chat("nano-3.0-cot-sft", path, **{"optim.lr": "1e-3"})`.
    """
    from argonne.recipe import load_recipe
    from tests.tuning import conversations, write

    source = write(tmp_path / "chat.jsonl", conversations(60))

    def make(name: str = "nano-3.0-sft", path: Path = source, **overrides: str) -> Recipe:
        given = {
            "model.init_from": json.dumps(str(base)),
            "data.sources": f"[{{ path = {json.dumps(str(path))}, max_epochs = 9 }}]",
            "data.sequence_length": "128",
            "batch.tokens_per_step": "512",
            "train.epochs": "none",
            "train.steps": "6",
            "train.threads": "1",
            "schedule.warmup": "1",
            "checkpoint.every_steps": "3",
            "checkpoint.sample_tokens": "4",
            "eval.every_steps": "3",
            "eval.windows": "2",
            "chat.hold_out": "0.1",
            "log.every_steps": "1",
            "log.tensorboard": "false",
        }
        return load_recipe(name, _without_idle(given, overrides))

    return make


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 400 entries."""
    from argonne.tokens.tokenizer import train_tokenizer
    from tests.tokensets import words

    return train_tokenizer(
        (words(200, seed) for seed in range(50)), 400, tmp_path_factory.mktemp("tokenizer") / "small"
    )


@pytest.fixture(scope="session")
def numbers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with an entry for each of the first 4,096 numbers."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("tokenizer") / "numbers"
    folder.mkdir()
    Tokenizer(models.WordLevel({str(number): number for number in range(4096)}, unk_token="0")).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text('{"eos_token": "4095"}')
    return folder


@pytest.fixture
def write_tokens(tmp_path: Path, numbers_folder: Path) -> Callable[..., Path]:
    """Writes token sets of numbers: `write_tokens("a", [50, 31])`; see `write_token_set`."""
    from tests.tokensets import write_token_set

    def write(name: str, lengths: Sequence[int], **more: Any) -> Path:
        return write_token_set(tmp_path / name, numbers_folder, lengths, **more)

    return write


@pytest.fixture
def slurm(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A SLURM of one node: the one that runs here, or one started for this test."""
    if (
        shutil.which("sinfo")
        and "idle" in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, check=False).stdout
    ):
        yield
        return
    folder = str(tmp_path_factory.mktemp("slurm"))
    if os.geteuid() != 0:
        pytest.skip("needs a running SLURM, or root to start one")
    start = subprocess.run([str(shared / "slurm/start_slurm.sh"), folder], capture_output=True, text=True, check=False)
    if "ready" not in start.stdout:
        pytest.skip(f"SLURM could not be started: {start.stderr.strip()[-200:]}")
    yield
    subprocess.run([str(shared / "slurm/stop_slurm.sh"), folder], check=False)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """End with every skip and its reason: nothing is left out in silence."""
    reasons: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons.setdefault(reason.removeprefix("Skipped: "), []).append(report.nodeid)
    terminalreporter.section("skipped tests and why")
    if not reasons:
        terminalreporter.write_line("none")
    for reason, tests in sorted(reasons.items()):
        more = f" and {len(tests) - 1} more" if len(tests) > 1 else ""
        terminalreporter.write_line(f"{len(tests):4d}  {reason}: {tests[0]}{more}")

"""Faults that would end a run on a booked GPU, each planted before the launch: the rehearsal fails, and says which."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rehearse.commands import Rehearsals
from tests.tuning import conversations, pairs, write

pytestmark = pytest.mark.campaign
TEXT = 'base = "nano-3.0"\n[data]\n'


@dataclass(frozen=True)
class Fault:
    """What is typed, what is spoiled before, what the rehearsal says of it: its phase and the command's own words."""

    words: str
    said: tuple[str, ...]
    spoil: Callable[[Path], object] = lambda folder: None
    plant: str | None = None


def change(name: str, text: str) -> Callable[[Path], object]:
    """More lines for a recipe."""
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


def other_tokenizer(folder: Path) -> None:
    from argonne.prepare.options import PrepareOptions
    from argonne.prepare.prepare import prepare

    how = PrepareOptions(input=(str(folder / "topics.jsonl"),), out=folder / "other", train_tokenizer=400, workers=1)
    prepare(how)
    (folder / "next.toml").write_text(
        'base = "nano-3.0-continue"\n[data]\nsources = [{ path = "other", max_epochs = 99.0 }]\n'
    )


def nothing_held_out(folder: Path) -> None:
    from argonne.prepare.options import PrepareOptions
    from argonne.prepare.prepare import prepare

    shutil.rmtree(folder / "tokens")
    prepare(
        PrepareOptions(input=(str(folder / "topics.jsonl"),), out=folder / "tokens", train_tokenizer=512, workers=1)
    )
    change("pre.toml", "[eval]\nevery_steps = 50\n")(folder)


def damaged_shard(folder: Path) -> None:
    shard = next((folder / "tokens").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-1000])


def no_answers(folder: Path) -> None:
    write(folder / "chat.jsonl", [{"messages": row["messages"][:1]} for row in conversations(60)])


def equal_pairs(folder: Path) -> None:
    write(folder / "pairs.jsonl", [{**row, "rejected": row["chosen"]} for row in pairs(60)])


def run_of_another_recipe(folder: Path) -> None:
    run = folder / "runs/pre/checkpoint_step_3"
    run.mkdir(parents=True)
    from argonne.recipe import load_recipe, to_tree

    (run / "state.json").write_text(
        json.dumps({"format_version": 1, "step": 3, "recipe": to_tree(load_recipe("nano-3.0", {"optim.lr": "0.1"}))})
    )
    (run.parent / "checkpoint_last").symlink_to(run.name)


FAULTS = {
    "an unknown key": Fault(
        "rehearse pre.toml",
        ("the check of pre.toml", "did you mean 'train.steps'?"),
        change("pre.toml", "[train]\nstep = 9\n"),
    ),
    "a missing data file": Fault(
        "rehearse pre.toml sft.toml",
        ("the check of sft.toml", "chat.jsonl"),
        lambda folder: (folder / "chat.jsonl").unlink(),
    ),
    "a missing token set": Fault(
        "rehearse pre.toml",
        ("the check of pre.toml", "tokens: no such file"),
        lambda folder: shutil.rmtree(folder / "tokens"),
    ),
    "a damaged token set": Fault("rehearse pre.toml", ("pre.toml", "tokens"), damaged_shard),
    "a missing column": Fault(
        "rehearse text.toml",
        ("of text.toml", "body"),
        lambda folder: (folder / "text.toml").write_text(
            TEXT + 'input = ["topics.jsonl"]\ntokenizer = "tokens/tokenizer"\ntext_column = "body"\n'
        ),
    ),
    "a folder that is no tokenizer": Fault(
        "rehearse text.toml",
        ("the check of text.toml", "expected tokenizer.json"),
        lambda folder: (folder / "text.toml").write_text(TEXT + 'input = ["topics.jsonl"]\ntokenizer = "."\n'),
    ),
    "a wrong tokenizer": Fault(
        "rehearse pre.toml next.toml",
        ("training of next.toml", "is not the one the weights were trained with"),
        other_tokenizer,
    ),
    "a tokenizer larger than the model's table": Fault(
        "rehearse pre.toml",
        ("the check of pre.toml", "model.vocab_size: found 100"),
        change("pre.toml", "[model]\nvocab_size = 100\n"),
    ),
    "a key that contradicts the next stage": Fault(
        "rehearse pre.toml sft.toml",
        ("the check of sft.toml", "model.hidden_size: found 256"),
        change("sft.toml", "[model]\nhidden_size = 256\n"),
    ),
    "a base model of another generation": Fault(
        "rehearse old.toml sft.toml",
        ("the check of sft.toml", "model.sandwich_norm: found True"),
        lambda folder: (
            (folder / "old.toml").write_text((folder / "pre.toml").read_text() + '[model]\npreset = "nano-2.5"\n'),
            change("sft.toml", "[model]\nsandwich_norm = true\n")(folder),
        ),
    ),
    "a context longer than its positions allow": Fault(
        "rehearse pre.toml mid.toml",
        ("the check of mid.toml", "positions would repeat"),
        change("mid.toml", "[model]\nrope_theta = 100.0\n"),
    ),
    "a run that will not exist": Fault(
        "rehearse sft.toml", ("the check of sft.toml", "runs/nano-3.0 has no weights; train it first")
    ),
    "degrees that do not fit": Fault(
        "rehearse pre.toml --gpus 3 --parallel.shard 2",
        ("the check of pre.toml", "[parallel]: found replicate auto x shard 2"),
    ),
    "a card that is too small": Fault(
        "rehearse argonne-3.0-pretrain --gpu l4 --gpus 1 --data.sources tokens --train.steps 1 --schedule.warmup 0 "
        "--schedule.decay 0 --batch.tokens_per_step 1024",
        ("the check of argonne-3.0-pretrain", "memory: a step is planned with"),
    ),
    "a deadline before the first save": Fault(
        "rehearse pre.toml --stop.wall_time 10m", ("the check of pre.toml", "stop.wall_time: ends the run 600 s")
    ),
    "a job too short for a save": Fault(
        "rehearse pre.toml --time 20m", ("the check of pre.toml", "--time: ends the run 1,200 s")
    ),
    "a disk that the run does not fit on": Fault(
        "rehearse pre.toml", ("the check of pre.toml", "make room"), plant="no_room"
    ),
    "a disk that is full at a save": Fault(
        "rehearse pre.toml", ("saving of pre.toml", "No space left on device"), plant="full_disk_at_a_save"
    ),
    "more passes than are allowed": Fault(
        "rehearse pre.toml --train.steps 90000", ("the check of pre.toml", "more than its max_epochs 200")
    ),
    "a warmup longer than the run": Fault(
        "rehearse pre.toml --train.steps none --train.tokens 40960",
        ("the check of pre.toml", "schedule.warmup: found 20 steps, more than the run's 10"),
    ),
    "a name error in the save path": Fault(
        "rehearse pre.toml",
        ("training of pre.toml", "name 'save_tokeniser' is not defined"),
        plant="name_error_in_the_save",
    ),
    "a name error in the final export": Fault(
        "rehearse pre.toml", ("resuming of pre.toml", "name 'whole' is not defined"), plant="name_error_in_the_export"
    ),
    "a checkpoint that does not load": Fault(
        "rehearse pre.toml", ("resuming of pre.toml", "KeyError"), plant="resume_without_the_optimizer"
    ),
    "a run that cannot be stopped": Fault(
        "rehearse pre.toml", ("training of pre.toml", "SIGTERM did not stop it"), plant="deaf_to_sigterm"
    ),
    "an export that nothing loads": Fault(
        "rehearse pre.toml", ("export of pre.toml", "modeling_argonne"), plant="export_without_its_code"
    ),
    "a template without a turn end": Fault(
        "rehearse pre.toml sft.toml",
        ("the chat template of sft.toml", "ends with none of the tokens"),
        plant="template_without_a_turn_end",
    ),
    "an empty data set": Fault(
        "rehearse pre.toml sft.toml",
        ("training of sft.toml", "chat.jsonl"),
        lambda folder: (folder / "chat.jsonl").write_text(""),
    ),
    "a chat file without assistant turns": Fault(
        "rehearse pre.toml sft.toml", ("training of sft.toml", "no-answer"), no_answers
    ),
    "pairs that are identical": Fault(
        "rehearse pre.toml dpo.toml", ("training of dpo.toml", "chosen-is-rejected"), equal_pairs
    ),
    "conversations where pairs are needed": Fault(
        "rehearse pre.toml dpo.toml",
        ("training of dpo.toml", "pairs.jsonl"),
        lambda folder: shutil.copyfile(folder / "chat.jsonl", folder / "pairs.jsonl"),
    ),
    "answers that do not think": Fault(
        "rehearse pre.toml cot.toml",
        ("training of cot.toml", "no-think"),
        lambda folder: shutil.copyfile(folder / "chat.jsonl", folder / "thoughts.jsonl"),
    ),
    "a held-out set that is missing": Fault(
        "rehearse pre.toml", ("training of pre.toml", "eval.every_steps", "holds nothing out"), nothing_held_out
    ),
    "an evaluation without data": Fault(
        "rehearse pre.toml",
        ("training of pre.toml", "eval.tasks", "nowhere"),
        change("pre.toml", '[eval]\ntasks = ["gsm8k:nowhere"]\n'),
    ),
    "answers longer than the context": Fault(
        "rehearse pre.toml sft.toml",
        ("training of sft.toml", "do not fit into the context"),
        change("sft.toml", "[checkpoint]\nsample_tokens = 2000\n"),
    ),
    "a run folder of another recipe": Fault(
        "rehearse pre.toml",
        ("the check of pre.toml", "belongs to another recipe", "optim.lr: 0.1 -> 0.003"),
        run_of_another_recipe,
    ),
    "a run folder that cannot be written": Fault(
        "rehearse pre.toml --run topics.jsonl/run", ("the check of pre.toml", "cannot be written")
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_launch_fails_in_the_rehearsal_and_is_named(
    name: str, rehearsals: Rehearsals, folder: Path
) -> None:
    fault = FAULTS[name]
    fault.spoil(folder)
    before = sorted(folder.rglob("*"))
    code, said = rehearsals.run(fault.words, folder, fault.plant)
    last = said.splitlines()[-1]
    assert code == 2, said
    assert last.startswith("argonne: rehearsal: "), said
    assert [part for part in fault.said if part not in last] == [], last
    after = {path for path in folder.rglob("*") if folder / "tmp" not in path.parents}
    assert after - set(before) == {folder / "tmp"}

"""`argonne rehearse` as it is typed: a chain passes and leaves nothing; what is wrong is named with its phase."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.parallel.pbs import Pbs, with_commands
from tests.prepare.helpers import content
from tests.rehearse.commands import ROOT, Rehearsals


def test_a_chain_is_trained_stopped_resumed_evaluated_exported_and_leaves_nothing(
    rehearsals: Rehearsals, folder: Path
) -> None:
    before = content(folder)
    code, said = rehearsals.run("rehearse pre.toml sft.toml", folder)
    assert code == 0, said
    for name, evaluated, steps in (("pre.toml", "bpb", 12), ("sft.toml", "turns", 6)):
        for done in ("trained, and stopped by SIGTERM", f"resumed, and complete at step {steps}"):
            assert f"{name}: {done}" in said
        assert f"{name}: evaluated ({evaluated})" in said
        assert f"{name}: exported, proven in a fresh process, and loaded" in said
        assert re.search(rf"{name}: took \S+ s: training \S+ s, resuming \S+ s, evaluation \S+ s, export \S+ s", said)
    assert "pre.toml: model.hidden_size: 128 -> 32" in said
    assert "sft.toml: model.init_from: runs/pre -> " in said
    assert "not rehearsed: kernels of the card" in said
    assert content(folder) == before


def test_a_name_error_in_the_save_fails_with_phase_recipe_and_its_own_words(
    rehearsals: Rehearsals, folder: Path
) -> None:
    code, said = rehearsals.run("rehearse pre.toml", folder, plant="name_error_in_the_save")
    assert code == 2
    last = said.splitlines()[-1]
    assert last.startswith("argonne: rehearsal: training of pre.toml: NameError: name 'save_tokeniser' is not defined")
    assert Path(last.rpartition("all it said: ")[2].rstrip(")")).is_file()


def test_what_the_check_finds_costs_no_run(rehearsals: Rehearsals, folder: Path) -> None:
    code, said = rehearsals.run("rehearse pre.toml --gpus 3 --parallel.shard 2", folder)
    assert code == 2
    assert said.startswith("argonne: rehearsal: the check of pre.toml: [parallel]: found replicate auto x shard 2 on 3")
    assert list((folder / "tmp").iterdir()) == []


def test_launch_hands_nothing_in_before_the_rehearsal_has_passed(rehearsals: Rehearsals, folder: Path) -> None:
    words = "launch slurm pre.toml --rehearse --gpus 3 --parallel.shard 2"
    code, said = rehearsals.run(words, folder)
    assert code == 2
    assert "rehearsal: the check of pre.toml: [parallel]" in said
    assert not (folder / "runs").exists()


def test_launch_hands_in_what_has_passed_its_rehearsal(folder: Path, tmp_path: Path) -> None:
    pbs = Pbs(tmp_path / "pbs")
    words = ["launch", "pbs", "pre.toml", "--rehearse", "--time", "2h"]
    environment = os.environ | {"PATH": with_commands(pbs), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "argonne", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1.server\n"), done.stderr
    passed, handed_in = "pre.toml: took ", "runs/pre: argonne pretrain pre.toml --run runs/pre\n"
    assert 0 < done.stderr.index(passed) < done.stderr.index(handed_in)
    (job,) = pbs.folder.glob("job-*")
    assert "-m argonne pretrain pre.toml --run runs/pre" in job.read_text()
    assert not list(tmp_path.glob("argonne-rehearsal-*"))


def test_a_card_is_told_to_a_launch_that_rehearses(rehearsals: Rehearsals, folder: Path) -> None:
    assert rehearsals.run("launch slurm pre.toml --gpu h200", folder) == (
        2,
        "argonne: --gpu: is for --rehearse; add that, or leave it out\n",
    )


def test_degrees_that_are_auto_need_a_machine(rehearsals: Rehearsals, folder: Path) -> None:
    code, said = rehearsals.run("rehearse pre.toml --parallel.shard auto", folder)
    assert code == 2
    assert "parallel.shard: found auto, and the devices of the real run are not known; give --gpus and --gpu" in said


def test_degrees_that_are_auto_are_rehearsed_as_the_real_machine_has_them(rehearsals: Rehearsals, folder: Path) -> None:
    (folder / "mine.toml").write_text('base = "pre.toml"\n')
    (folder / "pre.toml").write_text((folder / "pre.toml").read_text() + '[parallel]\nshard = "auto"\n')
    code, said = rehearsals.run("rehearse mine.toml --gpus 2 --gpu h200", folder)
    assert code == 0, said[-3000:]
    assert "mine.toml: parallel.nproc: 0 -> 2" in said
    assert "(auto)" not in said

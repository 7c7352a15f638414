"""Typical mistakes through the real command: one line that leads on, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PREPARE = "prepare --input a.txt --out out"
MISTAKES = {
    "": "required: VERB",
    "pretrian nano-3.0": "did you mean 'pretrain'?",
    "pretrain": "required: RECIPE",
    "pretrain nano-3.0 --steps 5": "did you mean 'train.steps'?",
    "pretrain nano-3.0.toml": "did you mean the packaged recipe 'nano-3.0'?",
    "pretrain nano-3": "did you mean 'nano-3.0'?",
    "pretrain section.toml": "'trian'; did you mean 'train'?",
    "pretrain broken.toml": "broken.toml: not valid TOML",
    "pretrain nano-3.0 --train.stps 5": "did you mean 'train.steps'?",
    "pretrain nano-3.0 --train.steps five": "train.steps: found 'five', expected a whole number",
    "pretrain nano-3.0 --train.steps": "--train.steps: a value is missing",
    "pretrain nano-3.0 --data.sources nowhere": "token set nowhere: no such file or folder",
    'pretrain nano-3.0 --data.sources {"path":"x"}': "shorter as --data.sources tokens/a:0.7 tokens/b:0.3",
    "pretrain nano-3.0 --data.sources [{path=x}]": "the whole in single quotes",
    "pretrain nano-3.0 --data.input none*.txt --data.tokenizer .": "data.input: none of 'none*.txt' matches a file",
    "pretrain nano-3.0 --data.input a.txt": "data.tokenizer: not set",
    "pretrain nano-3.0 --data.input a.txt --data.tokenizer .": "expected tokenizer.json",
    "pretrain nano-3.0 --optim.lr inf": "optim.lr: found inf, expected more than 0",
    "pretrain nano-3.0 --optim.name adam": "expected one of 'adamw', 'muon'",
    "pretrain nano-3.0 --optim.muon_lr 0.1": "it acts only with optim.name = muon",
    "pretrain nano-3.0 --schedule.kind constant --schedule.min_ratio 0.1": "acts only with schedule.kind = cosine",
    "pretrain nano-3.0 --batch.tokens_per_step 7": "expected a multiple of the sequence length 256",
    "continue nano-3.0": "give --init-from MODEL",
    "sft nano-3.0": "or use argonne pretrain",
    "sft nano-3.0-sft --data.sources none*.jsonl": "input 'none*.jsonl': matches no file",
    "sft nano-3.0-sft --data.order shuffled": "it acts only with stage = pretrain | midtrain",
    f"{PREPARE} --holdout 0.1": "did you mean '--hold-out'?",
    PREPARE: "exactly one of --tokenizer FOLDER and --train-tokenizer",
    "prepare --input none*.txt --out out --train-tokenizer 300": "matches no file",
    f"{PREPARE} --train-tokenizer 300 --split blank_line": "did you mean 'blank-lines'?",
    "tokenizer train --input a.txt --out out --vocab-size 300 --split line": "did you mean 'lines'?",
    f"{PREPARE} --train-tokenizer 300 --hold-out 2": "expected a share from 0 to below 1",
    "prepare --input a.txt --out a.txt --train-tokenizer 300": "is a file; give a folder",
    f"{PREPARE} --train-tokenizer 300 --workers -1": "expected 0 (one a core) or more",
    f"{PREPARE} --tokenizer nowhere": "tokenizer nowhere: no such folder",
    "tokenizer train --input a.txt --out out --vocab-size 5": "expected at least 283",
    "tokenizer": "required: train",
    "report nowhere": "no metrics.jsonl there",
    "eval nowhere": "nowhere: no such file or folder",
    "export a.txt": "required: --as, --out",
    "completion nosuchshell": "nosuchshell",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_typical_mistake_is_one_line_that_leads_on_and_exit_code_2(mistake: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n\nmore text\n")
    (tmp_path / "section.toml").write_text('base = "nano-3.0"\n[trian]\nsteps = 3\n')
    (tmp_path / "broken.toml").write_text("steps = \n")
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "argonne", *mistake.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("argonne: ")
    assert done.stderr.count("\n") == 1
    assert MISTAKES[mistake] in done.stderr
    assert sorted(tmp_path.rglob("*")) == before

"""DPO on right against wrong worked steps, from the model that the demo left: `python -m benchmarks.wrong_steps DEMO`.

A wrong answer is the right one with one digit of one step changed, and everything after it as that digit asks. What is
told: held-out accuracy against the reference, and exact match before and after.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random

from argonne.evaluate.run import evaluate
from argonne.evaluate.sums import SENTENCE, Problem, problems
from argonne.recipe import load_recipe
from argonne.report.records import read_metrics
from argonne.stages.lessons import Row, thought
from argonne.stages.pretrain import run


def wrong(problem: Problem, draw: Random) -> str:
    """The worked steps and answer with one wrong digit."""
    lines = problem.steps.splitlines()
    place = draw.randrange(1, len(lines) - 1)
    digits = str(problem.result).zfill(len(lines) - 2)
    at = len(digits) - place
    digit = draw.choice([other for other in "0123456789" if other != digits[at]])
    words = lines[place].split(" ")
    words[1] = words[1][:-1] + digit
    result = int(digits[:at] + digit + digits[at + 1 :])
    return thought("\n".join([*lines[:place], " ".join(words), *lines[place + 1 : -1], f"= {result}"]), told(result))


def told(result: int) -> str:
    return SENTENCE.format(result)


def pairs(count: int, seed: int) -> list[Row]:
    draw = Random(seed)
    return [
        {"prompt": one.question, "chosen": thought(one.steps, told(one.result)), "rejected": wrong(one, draw)}
        for one in islice(problems(seed, unseen=False), count)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows, tuned = Path(folder) / "pairs.jsonl", Path(folder) / "dpo"
        rows.write_text("".join(json.dumps(row) + "\n" for row in pairs(700, 7)), encoding="utf-8")
        given = {
            "data.sources": f"[{{ path = {json.dumps(str(rows))}, max_epochs = 20 }}]",
            "model.init_from": json.dumps(str(options.demo / "cot-sft")),
            "train.steps": str(options.steps),
            "optim.lr": str(options.lr),
        }
        run(load_recipe("nano-3.0-demo-dpo", given), tuned)
        held_out = read_metrics(tuned).of("held_out")
        for name, model in (("before", options.demo / "cot-sft"), ("after", tuned)):
            found = evaluate(model, ["sums"], tokens=100)["tasks"]["sums"]
            print(f"{name}: exact match {found['exact_match']:.1%} of {found['questions']}")
        for record in held_out:
            metrics = record["metrics"]
            print(f"step {record['step']}: held-out accuracy {metrics['accuracy']:.2f}, margin {metrics['margin']:.3f}")


if __name__ == "__main__":
    main()

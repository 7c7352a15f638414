"""Does midtraining on long documents teach the positions that the earlier context had not, and does the same number of
tokens at the old length not? `python -m benchmarks.midtraining BOOKS.parquet` trains a small model on books at its old
length, goes on from it twice under another RoPE base, and draws the held-out loss by position.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "midtraining.svg"
RESULT = ROOT / "benchmarks" / "results" / "midtraining.json"
OLD, LONG = 128, 512  # tokens a row
PREFIX = "loss_by_position/"
# Nano-3.0 at half its width, so that a core is done in minutes; attention without windows, or only every second layer
# would see beyond the old context at all.
MODEL = {
    "model.hidden_size": "64",
    "model.num_attention_heads": "2",
    "model.num_key_value_heads": "1",
    "model.intermediate_size": "192",
    "model.layer_types": json.dumps(["full_attention"] * 4),
}
QUIET = {
    "train.threads": "1",
    "log.every_steps": "50",
    "log.tensorboard": "false",
    "checkpoint.every_steps": "0",
    "checkpoint.sample_tokens": "1",
}
Bands = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """Steps of 2,048 tokens, bases of the positions, held-out rows of LONG tokens."""

    first_steps: int = 400
    more_steps: int = 300
    old_base: float = 50
    new_base: float = 1e6
    windows: int = 200


def argonne(*arguments: str) -> None:
    """One command of the product in a process of its own."""
    subprocess.run([sys.executable, "-m", "argonne", *arguments], cwd=ROOT, check=True)


def train(verb: str, recipe: str, run: Path, keys: Mapping[str, str], *more: str) -> None:
    flags = [part for key, value in keys.items() for part in (f"--{key}", value)]
    argonne(verb, recipe, "--run", str(run), *more, *flags)


def held_out(run: Path) -> list[Bands]:
    """The loss by band of positions in each evaluation of a run, in order."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    told = [record["metrics"] for record in records if record["event"] == "held_out"]
    return [{name.removeprefix(PREFIX): loss for name, loss in of.items()} for of in told]


def experiment(books: Path, folder: Path, settings: Settings) -> dict[str, Bands]:
    """Loss by band of positions on held-out rows of LONG tokens: before, after midtraining, after the control."""
    tokens = folder / "tokens"
    argonne(
        "prepare", "--input", str(books), "--train-tokenizer", "2048", "--hold-out", "0.1", "--out", str(tokens),
        "--workers", "1",
    )  # fmt: skip
    data = {**QUIET, "data.sources": f"[{{ path = {json.dumps(str(tokens))}, max_epochs = 20.0 }}]"}
    first = {
        **MODEL, "model.max_position_embeddings": str(OLD), "model.rope_theta": str(settings.old_base),
        "data.sequence_length": str(OLD), "train.steps": str(settings.first_steps), "eval.windows": "64",
        "eval.every_steps": "0",
    }  # fmt: skip
    train("pretrain", "nano-3.0-demo", folder / "first", {**data, **first})
    muon = {"optim.name": "muon", "optim.lr": "5e-3", "batch.tokens_per_step": "2048", "eval.every_steps": "0"}
    more = {
        **data, **muon, "model.rope_theta": str(settings.new_base), "schedule.decay": "0.4",
        "train.steps": str(settings.more_steps),
    }  # fmt: skip

    def rows(length: int, windows: int) -> dict[str, str]:
        sizes = {"data.sequence_length": str(length), "model.max_position_embeddings": str(length)}
        return {**more, **sizes, "eval.windows": str(windows)}

    start = ("--init-from", str(folder / "first"))
    train("midtrain", "nano-3.0-midtrain", folder / "long", rows(LONG, settings.windows), *start)
    train("midtrain", "nano-3.0-midtrain", folder / "control", rows(OLD, 8), *start)
    # Weights are evaluated before the first step: of the control, on the long rows.
    look = {**rows(LONG, settings.windows), "train.steps": "1", "schedule.warmup": "0", "schedule.decay": "0"}
    train("midtrain", "nano-3.0-midtrain", folder / "look", look, "--init-from", str(folder / "control"))
    before, after = (held_out(folder / "long")[place] for place in (0, -1))
    return {"before": before, "after": after, "control": held_out(folder / "look")[0]}


def within_and_beyond(bands: Bands) -> tuple[float, float]:
    """Mean loss at positions (OLD / 2, OLD] and (OLD, LONG]."""
    width = {name: 1 + last - first for name in bands for first, last in [map(int, name.split("-"))]}
    beyond = [name for name in bands if int(name.split("-")[0]) > OLD]
    mean = sum(bands[name] * width[name] for name in beyond) / sum(width[name] for name in beyond)
    return bands[f"{OLD // 2 + 1}-{OLD}"], mean


def draw(found: Mapping[str, Bands], picture: Path) -> None:
    """The three as steps over the position, on an axis that doubles."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    labels = {
        "before": ("before: the weights under the new base", "#8a8a8a"),
        "control": (f"control: as many tokens in rows of {OLD}", "#c4621b"),
        "after": (f"midtrained on rows of {LONG}", "#2563a8"),
    }
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "argonne", "font.size": 10.5}):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name, (label, colour) in labels.items():
            edges = [0.5 * LONG / 8, *(int(band.split("-")[1]) for band in found[name])]
            axes.stairs(list(found[name].values()), edges, baseline=None, label=label, color=colour, linewidth=2)
        axes.axvline(OLD, color="#8a8a8a", linestyle=":", linewidth=1, ymax=0.78)
        axes.set_xscale("log", base=2)
        ticks = [LONG // parts for parts in (8, 4, 2, 1)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlim(0.5 * LONG / 8, LONG)
        axes.set_xlabel(f"position in the row, tokens (dotted: the old context, {OLD})")
        axes.set_ylabel("held-out loss, nats per token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(picture, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("books", type=Path, help="long documents: parquet with a column text")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = experiment(options.books.resolve(), (options.folder or Path(name)).resolve(), Settings())
    means = {name: within_and_beyond(bands) for name, bands in found.items()}
    facts = {"settings": asdict(Settings()), "bands": found, "within_and_beyond": means}
    RESULT.write_text(json.dumps(facts, indent=2) + "\n")
    draw(found, PICTURE)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()

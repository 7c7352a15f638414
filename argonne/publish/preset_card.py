"""The model card of a release: sizes from its preset, training as its documents say it, what here repeats it.

`python -m tools.preset_cards --write` puts them into docs/models. `releases.toml` holds what no preset or recipe knows.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from argonne.errors import InputError
from argonne.plan.published import PUBLISHED
from argonne.presets import SLIDING, Preset, preset, presets
from argonne.recipe import load_recipe, recipe_names

UNKNOWN = "not at hand"
ROWS = (
    "corpus", "tokens", "steps", "batch", "sequence", "documents", "learning rate", "optimizer", "precision",
    "parallelism", "checkpoints", "hardware", "cost", "final loss",
)  # fmt: skip


def releases() -> Mapping[str, Any]:
    """What `releases.toml` tells, by the preset's name."""
    return tomllib.loads(Path(__file__).with_name("releases.toml").read_text(encoding="utf-8"))


def preset_card(name: str) -> str:
    """Markdown. Raises InputError for a preset that no card is kept of."""
    told = releases()
    if name not in told:
        raise InputError(f"no card of {name!r} is kept; there is one of each of {', '.join(told)}")
    return "\n".join([*_lines(preset(name), told[name]), ""])


def _lines(of: Preset, told: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"# {of.release}", "")
    yield "<!-- By `python -m tools.preset_cards --write`, from argonne/presets.py and publish/releases.toml. -->"
    yield from ("", f"Preset `{of.name}`; status: {of.status}; id on the Hub: {of.hub or UNKNOWN}.")
    yield from ("", "## The model", "", *_table(_sizes(of)))
    yield from (
        "",
        "## How it was trained",
        "",
        "As published; `*` = read in the earlier code instead.",
    )
    yield from ("", *_table((row, told["training"].get(row, UNKNOWN)) for row in ROWS), "")
    contradiction = PUBLISHED[f"{of.name}-pretrain"].contradiction()
    notes = [*([f"{contradiction}."] if contradiction else []), *told["more"].get("notes", [])]
    yield from (f"- {note}" for note in notes)
    yield from ("", "## How it was measured", "", *_measured(**told["more"].get("mmlu", {})))
    yield from ("", "## Here", "", "| recipe | stage | starts from |", "| --- | --- | --- |")
    for recipe in (name for name in recipe_names() if name.startswith(of.name) and name not in presets()):
        loaded = load_recipe(recipe)
        yield f"| `{recipe}` | {loaded.stage} | {loaded.model.init_from or 'fresh weights'} |"
    yield from ("", "[Recipes](../recipes.md) says where each value is from, [models](../model.md) how the generations")
    yield "differ and how `argonne import` reads the weights, [exports](../exports.md) which engines compute them."


def _table(rows: Any) -> Iterator[str]:
    yield from ("| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows))


def _sizes(of: Preset) -> Iterator[tuple[str, str]]:
    has = of.fields
    learned, gated, rms = has["position_embedding"] == "learned", has["mlp_gated"], has["norm_type"] == "rms"
    epsilon = f"{has['rms_norm_eps']:.0e}".replace("e-0", "e-")
    window, cap = has["sliding_window"], has["final_logit_softcapping"]
    more = [text for text, on in (("q, k and v", has["q_norm"]), ("sandwich", has["sandwich_norm"])) if on]
    local = [f"{layer}" for layer, kind in enumerate(has["layer_types"]) if kind == SLIDING]
    yield "parameters", f"{of.parameters:,}" if of.parameters else UNKNOWN
    yield "layers", f"{has['num_hidden_layers']}"
    yield "hidden size", f"{has['hidden_size']:,}"
    yield "query / key heads", f"{has['num_attention_heads']} / {has['num_key_value_heads']}"
    yield "head size", f"{has['head_dim']}"
    yield "MLP", f"{'SwiGLU' if gated else 'GELU (erf)'}, {has['intermediate_size']:,}"
    yield "norm", ", ".join([f"{'RMSNorm' if rms else 'LayerNorm'}, epsilon {epsilon}", *more])
    yield "positions", "learned" if learned else f"RoPE, base {has['rope_theta']:,.0f}"
    yield "context", f"{has['max_position_embeddings']:,}"
    yield "vocabulary", f"{has['vocab_size']:,} ({of.tokenizer})"
    yield "head", "shares the embedding's weight" if has["tie_word_embeddings"] else "its own weight"
    yield "biases", "all linear layers but the head" if has["attention_bias"] else "none"
    yield "dropout in training", f"{has['hidden_dropout']:g}"
    yield "attention", f"the last {window} keys in layers {', '.join(local)}; all in the others" if local else "full"
    yield "softcap of the logits", f"{cap:g}" if cap else "none"


def _measured(
    right: int = 0, questions: int = 0, subjects: Mapping[str, tuple[int, int]] | None = None
) -> Iterator[str]:
    """`right` of MMLU's `questions`, with the standard error of a share: sqrt(p (1 - p) / n); and of each subject."""
    if not questions:
        yield f"Benchmarks of the release: {UNKNOWN}."
        return
    share = right / questions
    error = math.sqrt(share * (1 - share) / questions)
    yield (
        f"MMLU, no examples, as published: {right:,} of {questions:,} = {share:.4f} (standard error {error:.4f}; "
        "guessing gives 0.25)."
    )
    yield from ("", "| subject | right | questions | accuracy |", "| --- | --- | --- | --- |")
    for name, (one, of) in (subjects or {}).items():
        yield f"| {name} | {one} | {of:,} | {one / of:.4f} |"

"""The model card: README.md of a published model, rendered from its config, its trainings and its evaluations. Nothing
in it is typed by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from argonne import layout
from argonne.errors import InputError
from argonne.files import human, read_json
from argonne.publish.source import Trained

LOSS_PLOT = "images/loss.png"
SCALES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "THOUSAND": 1e3, "MILLION": 1e6, "BILLION": 1e9}
_NUMBER = r"(\d[\d,]*(?:\.\d+)?)\s*(K|M|B|T|thousand|million|billion)?"
COUNTS = re.compile(rf"{_NUMBER}[\s-]*parameters?\b|\bparameters?\W{{1,6}}{_NUMBER}(?![\w%.])", re.IGNORECASE)
# Where the benchmarks lie on the Hub, for .eval_results: (data set, its task).
BENCHMARKS = {
    "mmlu": ("cais/mmlu", "all"),
    "hellaswag": ("Rowan/hellaswag", "default"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "piqa": ("ybisk/piqa", "plain_text"),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
    "lambada": ("EleutherAI/lambada_openai", "default"),
    "gsm8k": ("openai/gsm8k", "main"),
    "gsm8k_base": ("openai/gsm8k", "main"),
}
MEASURES = ("accuracy", "exact_match", "bits_per_byte")
COUNTED = ("questions", "documents")


@dataclass(frozen=True)
class CardFacts:
    """What a card tells. config: as published. is_chat: with a chat template. merged: weight and
    name of each model that it is the average of."""

    repository: str
    config: Any
    parameters: int
    dtype: str
    kind: str
    is_chat: bool
    past: Sequence[Trained]
    results: Sequence[Mapping[str, Any]]
    engines: Mapping[str, Mapping[str, str]]
    merged: Sequence[tuple[float, str]]
    license: str | None
    has_plot: bool


def front_matter(text: str) -> dict[str, Any] | None:
    """The YAML with which a card begins; None where it has none, or it is damaged."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        read = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return None
    return read if isinstance(read, dict) else None


def counts_in(text: str) -> Iterator[tuple[str, float, float]]:
    """(as written, lowest, highest) of each number of parameters that a text tells: what rounds to it."""
    for match in COUNTS.finditer(text):
        digits, scale = (match[1], match[2]) if match[1] else (match[3], match[4])
        digits = digits.rstrip(",").replace(",", "")
        unit = SCALES[scale.upper()] if scale else 1.0
        half = 0.5 * unit * 10.0 ** -len(digits.partition(".")[2]) if scale else 0.0
        yield match[0].strip(), float(digits) * unit - half, float(digits) * unit + half


def read_results(folders: Sequence[Path], weights: Sequence[str]) -> list[dict[str, Any]]:
    """What `argonne eval --out` wrote into each folder. Raises InputError where it is of other weights."""
    found = []
    for folder in folders:
        results: dict[str, Any] = read_json(folder / layout.RESULTS)
        if results.get("weights") not in weights:
            raise InputError(
                f"{folder / layout.RESULTS}: is of other weights ({str(results.get('weights'))[:12]}, "
                f"{results.get('model')}) than what is published ({weights[0][:12]}); evaluate "
                "that (argonne eval MODEL --out DIR)"
            )
        if results.get("int8"):
            raise InputError(f"{folder / layout.RESULTS}: was measured with weights rounded to int8; evaluate without")
        found.append(results)
    return found


def measured(results: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """task, measure, value, error, count of each task."""
    for result in results:
        for task, values in result["tasks"].items():
            measure = next((name for name in MEASURES if name in values), None)
            if measure is None:
                continue
            count = next(((name, values[name]) for name in COUNTED if name in values), ("items", None))
            yield {
                "task": task,
                "measure": measure,
                "value": values[measure],
                "error": values.get("standard_error"),
                "count": count,
                "shots": result.get("shots") or 0,
                "whole": result.get("limit") is None,
            }


def eval_results(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Files of `.eval_results` by name, in the Hub's format (huggingface.co/docs/hub/eval-results), of the tasks whose
    data set lies there.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files = {}
    for row in measured(results):
        if row["task"] not in BENCHMARKS or not row["whole"]:
            continue
        dataset, task = BENCHMARKS[row["task"]]
        error = "" if row["error"] is None else f", standard error {100 * row['error']:.2f}"
        notes = f"{row['measure']} in %, {row['count'][1]:,} {row['count'][0]}{error}, {row['shots']} examples"
        entry = EvalResultEntry(dataset, task, round(100 * row["value"], 2), notes=f"{notes}; argonne eval")
        files[f"{row['task']}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def model_card(facts: CardFacts) -> str:
    """README.md."""
    name = facts.repository.rpartition("/")[2]
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {"license": facts.license} if facts.license else {}
    head["tags"] = ["argonne", facts.config.model_type, *(["conversational"] if facts.is_chat else [])]
    what = "A chat model" if facts.is_chat else "A base language model"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"{what} of the Argonne family: {facts.parameters:,} parameters, trained with argonne.",
        "## Use",
        f"```python\n{snippet(facts)}```",
        "## Model",
        _table(("", ""), _shape(facts)),
        "## Training",
        _trainings(facts.past),
        *([_average(facts.merged)] if facts.merged else []),
        *([f"![Loss by step]({LOSS_PLOT})"] if facts.has_plot else []),
        "## Evaluation",
        _evaluations(facts.results),
        "## Engines",
        "**Use it in no engine that computes something else**: the text looks plausible and is another model's.",
        _table(("engine", "result", "why"), [(name, of["verdict"], of["why"]) for name, of in facts.engines.items()]),
        "## How it was checked",
        "`argonne publish` loaded this folder in a fresh offline process before it was pushed: logits equal the "
        "checkpoint's, with a cache and without, beyond any window; answers end where those of training did; "
        "tokenizer, configuration, dtype and every tensor are the training's; the Python of this card ran as it "
        "stands.",
    ]
    return "\n\n".join(parts) + "\n"


def snippet(facts: CardFacts) -> str:
    """Python that loads the model and writes a text, as it stands in the card."""
    trust = ", trust_remote_code=True" if facts.kind == "hf" else ""
    length = min(150, facts.config.max_position_embeddings)
    load = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{facts.repository}"{trust})
model = AutoModelForCausalLM.from_pretrained("{facts.repository}"{trust})
"""
    if facts.is_chat:
        return f"""{load}
messages = [{{"role": "user", "content": "What is a rainbow?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
outputs = model.generate(**inputs, max_new_tokens={length // 2}, do_sample=True, top_p=0.95, temperature=0.7)
print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
    return f"""{load}
inputs = tokenizer("Once upon a time", return_tensors="pt")
outputs = model.generate(**inputs, max_length={length}, do_sample=True, top_k=50, top_p=0.95, temperature=0.7)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _shape(facts: CardFacts) -> list[tuple[str, str]]:
    config = facts.config
    rows = [
        ("parameters", f"{facts.parameters:,}"),
        ("layers", config.num_hidden_layers),
        ("hidden size", f"{config.hidden_size:,}"),
        (
            "query heads, key heads, head size",
            f"{config.num_attention_heads}, {config.num_key_value_heads}, {config.head_dim}",
        ),
        ("MLP", f"{config.intermediate_size:,}, {config.hidden_act}{', gated' if config.mlp_gated else ''}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("positions", config.position_embedding),
        ("embeddings tied", "yes" if config.tie_word_embeddings else "no"),
        ("dtype", facts.dtype),
    ]
    if config.sliding_window is not None:
        local = config.layer_types.count("sliding_attention")
        rows.insert(7, ("window", f"{config.sliding_window:,} tokens on {local} of {config.num_hidden_layers} layers"))
    return [(name, str(value)) for name, value in rows]


def _trainings(past: Sequence[Trained]) -> str:
    if not past:
        return "How it was trained is not on the disk that it was published from."
    rows = []
    for training in past:
        state, recipe = training.state, training.state["recipe"]
        phases = state.get("data", {}).get("phases", [])
        sources = dict.fromkeys(source["name"] for phase in phases for source in phase.get("sources", []))
        best = state.get("progress", {}).get("best_held_out")
        rows.append(
            (
                recipe["stage"],
                f"{state['step']:,}",
                human(state["tokens"]),
                f"{training.longest_row:,}",
                f"{recipe['optim']['name']} {recipe['optim']['lr']:g}",
                ", ".join(sources) or "-",
                "-" if best is None else f"{best:.4f}",
            )
        )
    head = ("stage", "steps", "tokens", "longest row", "optimizer, learning rate", "data", "lowest held-out loss")
    return _table(head, rows)


def _average(merged: Sequence[tuple[float, str]]) -> str:
    return f"Its weights are the average {' + '.join(f'{weight:g} x {name}' for weight, name in merged)}."


def _evaluations(results: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in measured(results):
        value, error = row["value"], row["error"]
        shown = f"{value:.4f}" if row["measure"] == "bits_per_byte" else f"{100 * value:.2f} %"
        spread = "-" if error is None else f"{error:.4f}" if row["measure"] == "bits_per_byte" else f"{100 * error:.2f}"
        name, count = row["count"]
        rows.append(
            (row["task"], row["measure"].replace("_", " "), shown, spread, f"{count:,} {name}" if count else "-")
        )
    if not rows:
        return "It was not evaluated."
    return _table(("task", "measure", "value", "standard error", "of"), rows)

"""What each engine computes from an exported folder: exactly the model, something else, or nobody has tried.

A claim about an engine, never about a file. Only transformers is run at every export; the rest was measured once, or
read in the engine's sources (docs/model.md says which).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from argonne.errors import InputError

EXACT, UNPROVEN, DIFFERENT, REFUSES = "exact", "unproven", "computes something else", "loads nothing"
ENGINES = ("transformers", "vllm", "sglang", "llama.cpp", "mlx")


class Standing(NamedTuple):
    """A verdict and why."""

    verdict: str
    why: str


PROVEN = Standing(EXACT, "this folder was loaded by it in a fresh process and compared")
OWN_CLASS = Standing(UNPROVEN, "its own class reads the same fields, by its sources; not run there")
BACKEND = Standing(
    UNPROVEN, "by its Transformers backend (--model-impl transformers), whose calls are tested; not run there"
)
GELU = "its Gemma 4 computes GELU whatever hidden_activation says"
TANH = "its GPT-2 computes the GELU of tanh, which moves logits by 1e-3 of the largest; it stops at the missing n_ctx"
LIKE_LLAMA = {
    "vllm": OWN_CLASS,
    "sglang": OWN_CLASS,
    "llama.cpp": Standing(EXACT, "measured on this class; its converter must know the tokenizer"),
    "mlx": Standing(EXACT, "measured on this class with mlx-lm 0.32.2"),
}
OTHERS = {
    "GPT2LMHeadModel": {
        "vllm": OWN_CLASS,
        "sglang": OWN_CLASS,
        "llama.cpp": Standing(DIFFERENT, TANH),
        "mlx": Standing(DIFFERENT, TANH),
    },
    "LlamaForCausalLM": LIKE_LLAMA,
    "MistralForCausalLM": {**LIKE_LLAMA, "llama.cpp": OWN_CLASS},
    "Gemma4ForCausalLM": {
        "vllm": Standing(UNPROVEN, "releases since its change 40588 compute SiLU, earlier ones stop; not run there"),
        "sglang": OWN_CLASS,
        "llama.cpp": Standing(DIFFERENT, f"{GELU}; its converter stops at the missing global_head_dim"),
        "mlx": Standing(DIFFERENT, f"{GELU}; it stops at shapes, but with heads of 512 it loads and is wrong"),
    },
}
CUSTOM = {
    "vllm": BACKEND,
    "sglang": BACKEND,
    "llama.cpp": Standing(REFUSES, "it knows no such architecture"),
    "mlx": Standing(REFUSES, "it knows no such model_type"),
}
INSTEAD = (
    "2.x with --as native is exact there; 1.x and 3.x run in transformers, in vLLM and SGLang with --as hf and their "
    "Transformers backend, and under `argonne generate`"
)


def standings(class_name: str, config: Any) -> dict[str, Standing]:
    """Every engine's standing for a folder of `class_name`, made from a model with this ArgonneConfig."""
    found = {"transformers": PROVEN, **OTHERS.get(class_name, CUSTOM)}
    if class_name in ("LlamaForCausalLM", "MistralForCausalLM"):
        if config.rope_type != "default":
            found["llama.cpp"] = Standing(UNPROVEN, "not measured with scaled rotary positions")
            found["mlx"] = Standing(DIFFERENT, "it reads rope_scaling, which transformers 5 does not write")
        if config.sliding_window is not None:
            found["llama.cpp"] = Standing(DIFFERENT, "its Mistral has no window, by its sources")
            found["mlx"] = Standing(DIFFERENT, "it learns of a window by layer_types, which this class does not have")
    return found


def check_engines(wanted: Sequence[str], class_name: str, found: dict[str, Standing]) -> None:
    """Raise InputError for an engine of `--for` that is unknown, that computes something else or does not load it."""
    for engine in wanted:
        if engine not in ENGINES:
            raise InputError(f"--for is {engine!r}; expected some of {', '.join(ENGINES)}")
        verdict, why = found[engine]
        if verdict in (DIFFERENT, REFUSES):
            raise InputError(f"--for {engine}: of a {class_name} it {verdict}: {why}; instead: {INSTEAD}")


def model_card(record: dict[str, Any]) -> str:
    """README.md of an export: its class, how it was proven and the table of engines."""
    rows = [f"| {engine} | {of['verdict']} | {of['why']} |" for engine, of in record["engines"].items()]
    trust = ", trust_remote_code=True" if record["kind"] == "hf" else ""
    return "\n".join(
        [
            f"# {record['class']}",
            "",
            f"Written by `argonne export --as {record['kind']}`: {record['parameters']:,} parameters in "
            f"{record['dtype']}. Load it with `AutoModelForCausalLM.from_pretrained(DIR{trust})`.",
            "",
            "What each engine computes from this folder. **Use it in no engine that computes something else**: the "
            "text looks plausible and is another model's.",
            "",
            "| engine | result | why |",
            "| --- | --- | --- |",
            *rows,
            "",
            f"In a fresh process logits differ by {record['proof']['relative_difference']:.1e} of the largest (fp32).",
            "",
        ]
    )

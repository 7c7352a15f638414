"""What each engine computes from an exported folder: exactly the model, something else, or nobody has tried.

What stands here is known before an engine is asked: a pair that is wrong by construction is refused, and the rest is
unproven until the engine, where it is installed, has loaded the artifact (`proof`). docs/exports.md has the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from argonne import layout
from argonne.errors import InputError

EXACT, UNPROVEN, DIFFERENT, REFUSES = "exact", "unproven", "computes something else", "loads nothing"
ROUNDED = "exact but for rounding"
ENGINES = ("transformers", "vllm", "sglang", "llama.cpp", "mlx", "onnx")


class Standing(NamedTuple):
    """A verdict and why."""

    verdict: str
    why: str


PROVEN = Standing(EXACT, "this folder was loaded by it in a fresh process and compared")
OWN_CLASS = Standing(UNPROVEN, "its own class reads the same fields, by its sources")
BACKEND = Standing(UNPROVEN, "by its Transformers backend (--model-impl transformers), whose calls are tested")
CONVERTED = Standing(UNPROVEN, "it reads files; --as gguf writes one and proves it there")
GRAPH = Standing(REFUSES, "onnxruntime reads graphs; --as onnx writes one and proves it there")
GELU = "its Gemma 4 computes GELU whatever hidden_activation says"
ERF = "its GPT-2 computes the GELU of tanh, which moves logits by 1e-3 of the largest"
TANH = f"{ERF}; it stops at the missing n_ctx"
LIKE_LLAMA = {"vllm": OWN_CLASS, "sglang": OWN_CLASS, "llama.cpp": CONVERTED, "mlx": OWN_CLASS, "onnx": GRAPH}
OTHERS = {
    "GPT2LMHeadModel": {
        "vllm": OWN_CLASS,
        "sglang": OWN_CLASS,
        "llama.cpp": Standing(DIFFERENT, TANH),
        "mlx": Standing(DIFFERENT, TANH),
        "onnx": GRAPH,
    },
    "LlamaForCausalLM": LIKE_LLAMA,
    "MistralForCausalLM": LIKE_LLAMA,
    "Gemma4ForCausalLM": {
        "vllm": Standing(UNPROVEN, "releases since its change 40588 compute SiLU, earlier ones stop"),
        "sglang": OWN_CLASS,
        "llama.cpp": Standing(DIFFERENT, f"{GELU}; its converter stops at the missing global_head_dim"),
        "mlx": Standing(DIFFERENT, f"{GELU}; it stops at shapes, but with heads of 512 it loads and is wrong"),
        "onnx": GRAPH,
    },
}
CUSTOM = {
    "vllm": BACKEND,
    "sglang": BACKEND,
    "llama.cpp": Standing(REFUSES, "it knows no such architecture"),
    "mlx": Standing(REFUSES, "it knows no such model_type"),
    "onnx": GRAPH,
}
INSTEAD = (
    "every model with --as onnx is exact in onnxruntime, 2.x with --as gguf in llama.cpp and with --as native in mlx; "
    "1.x and 3.x run in transformers, in vLLM and SGLang with --as hf and their Transformers backend, and under "
    "`argonne generate`"
)


def standings(class_name: str, config: Any) -> dict[str, Standing]:
    """Every engine's standing for a folder of `class_name`, made from a model with this ArgonneConfig."""
    found = {"transformers": PROVEN, **OTHERS.get(class_name, CUSTOM)}
    if class_name in ("LlamaForCausalLM", "MistralForCausalLM"):
        if config.hidden_act != "silu":
            stops = Standing(REFUSES, "its Llama takes no activation but SiLU, by its sources")
            wrong = Standing(DIFFERENT, "its Llama computes SiLU whatever hidden_act says")
            found |= {"vllm": stops, "sglang": stops, "llama.cpp": wrong, "mlx": wrong}
        if config.rope_type != "default":
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
    load, proof = f"AutoModelForCausalLM.from_pretrained(DIR{trust})", record["proof"]
    files = {"gguf": f"llama-server -m {layout.GGUF_FILE}", "onnx": f'InferenceSession("{layout.ONNX_FILE}")'}
    load = files.get(record["kind"], load)
    proven = proof.get("why") or (
        f"In a fresh process logits differ by {proof['relative_difference']:.1e} of the largest (fp32)."
    )
    return "\n".join(
        [
            f"# {record['class']}",
            "",
            f"Written by `argonne export --as {record['kind']}`: {record['parameters']:,} parameters in "
            f"{record['dtype']}. Load it with `{load}`.",
            "",
            "What each engine computes from this folder. **Use it in no engine that computes something else**: the "
            "text looks plausible and is another model's.",
            "",
            "| engine | result | why |",
            "| --- | --- | --- |",
            *rows,
            "",
            proven,
            *record.get("notes", []),
            "",
        ]
    )

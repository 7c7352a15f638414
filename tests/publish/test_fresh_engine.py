"""What each engine is asked: it passes a sound artifact, and three planted faults do not pass. Run here in this
process; that it runs in a fresh one is shown by the tests of each export.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from argonne.model import ArgonneForCausalLM
from argonne.model.build import Weights
from argonne.model.save import save_model_folder
from argonne.publish import fresh_engine, fresh_llama_cpp, fresh_load, proof
from argonne.publish.export import save_native
from argonne.publish.gguf_export import write_gguf
from argonne.publish.native import native_twin
from argonne.publish.proof import DRIVERS, Mismatch, ask, expected_file, is_installed, prove
from tests.model.conftest import GENERATIONS
from tests.publish.test_export import model_of

# o_proj is 60 x 60: transposed, it still fits. Two layers: a graph takes seconds a layer.
SQUARE: dict[str, Any] = {**GENERATIONS["2"], "hidden_size": 60, "num_hidden_layers": 2}
NO_IDS = {"eos_id": None, "bos_id": None, "pad_id": None}
ABOUT: dict[str, Any] = {"threads": 1, "texts": {}, "controls": {}, "eos": None}
# These compute SiLU whatever they are told: the fault is theirs, and the artifact that of the very model.
ALWAYS_SILU = ("llama.cpp", "mlx")


def save_hf(model: ArgonneForCausalLM, folder: Path) -> Path:
    save_model_folder(model, folder, eos_id=None)
    return folder


def save_stock(model: ArgonneForCausalLM, folder: Path) -> Path:
    save_native(native_twin(model), folder, NO_IDS, torch.float32)
    return folder


def save_gguf(model: ArgonneForCausalLM, folder: Path) -> Path:
    tensors = sorted((name, parameter.detach()) for name, parameter in model.named_parameters())
    write_gguf(folder / "model.gguf", Weights(model, lambda: iter(tensors)), "f32", None)
    return folder / "model.gguf"


def save_onnx(model: ArgonneForCausalLM, folder: Path) -> Path:
    from argonne.publish.onnx_export import write_onnx

    write_onnx(model, folder / "model.onnx")
    return folder / "model.onnx"


WRITERS: dict[str, tuple[str, Callable[[ArgonneForCausalLM, Path], Path]]] = {
    "transformers, the custom class": ("transformers", save_hf),
    "transformers, a stock class": ("transformers", save_stock),
    "llama.cpp": ("llama.cpp", save_gguf),
    "mlx": ("mlx", save_stock),
    "onnx": ("onnx", save_onnx),
}


@pytest.fixture(params=WRITERS)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if not is_installed(WRITERS[name][0]):
        pytest.skip(f"{WRITERS[name][0]} is not installed (pip install {DRIVERS[WRITERS[name][0]].install})")
    return name


def compare_here(
    artifact: Path, expected: Path, script: str = "fresh_load.py", engine: str = "", **how: Any
) -> dict[str, Any]:
    if script == "fresh_load.py":
        return fresh_load.compare(str(artifact), str(expected))
    if script == "fresh_llama_cpp.py":
        return fresh_llama_cpp.compare(str(artifact), str(expected))
    return fresh_engine.compare(getattr(fresh_engine, engine)(str(artifact)), str(expected))


def asked(name: str, written: ArgonneForCausalLM, expected: ArgonneForCausalLM, folder: Path) -> dict[str, Any]:
    """Write one model for an engine and ask it for the other."""
    engine, write = WRITERS[name]
    artifact = write(written, folder)
    with expected_file(expected, ABOUT) as file:
        return prove(artifact, file) if engine == "transformers" else ask(engine, artifact, file)


def faulty(fault: str) -> ArgonneForCausalLM:
    changes = {"another epsilon": {"rms_norm_eps": 1e-3}, "another activation": {"hidden_act": "gelu"}}
    model = model_of({**SQUARE, **changes.get(fault, {})})
    if fault == "a transposed weight":
        weight = model.model.layers[1].self_attn.o_proj.weight
        weight.data = weight.data.T.contiguous()
    return model


def test_an_engine_passes_a_sound_artifact(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "run_fresh", compare_here)
    figures = asked(engine, model_of(SQUARE), model_of(SQUARE), tmp_path)
    assert figures["relative_difference"] < 1e-5
    assert figures["greedy_gap"] == 0
    assert figures["version"].split()[0] in ("transformers", "llama-cpp-python", "mlx-lm", "onnxruntime")


@pytest.mark.parametrize("fault", ["a transposed weight", "another epsilon", "another activation"])
def test_a_planted_fault_does_not_pass(
    fault: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "run_fresh", compare_here)
    written, own = faulty(fault), fault == "another activation" and engine in ALWAYS_SILU
    with pytest.raises(Mismatch, match="logits differ by"):
        asked(engine, written, faulty(fault) if own else model_of(SQUARE), tmp_path)


def loaded(read: Callable[[list[int]], Any], *, log_probabilities: bool = False) -> fresh_engine.Loaded:
    return fresh_engine.Loaded("some engine 1", read, fresh_engine.again(read), log_probabilities)


@pytest.fixture
def expected(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    save_file(proof.expectations(model_of(SQUARE)), tmp_path / "expected.safetensors")
    return tmp_path / "expected.safetensors"


@torch.no_grad()
def logits_of(ids: list[int], model: ArgonneForCausalLM) -> Any:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


def test_what_is_not_a_number_makes_its_difference_so(expected: Path) -> None:
    model = model_of(SQUARE)

    def broken(ids: list[int]) -> Any:
        found = logits_of(ids, model)
        found[-1, 3] = float("nan")
        return found

    figures = fresh_engine.compare(loaded(broken), str(expected))
    assert figures["relative_difference"] != figures["relative_difference"]
    assert figures["greedy_gap"] != figures["greedy_gap"]


def test_text_that_parts_from_the_models_is_seen_though_the_logits_read_at_once_are_right(expected: Path) -> None:
    model = model_of(SQUARE)
    right = loaded(lambda ids: logits_of(ids, model))
    wrong = right._replace(follow=lambda prompt, tokens: (-row for row in right.follow(prompt, tokens)))
    assert fresh_engine.compare(right, str(expected))["greedy_gap"] == 0
    figures = fresh_engine.compare(wrong, str(expected))
    assert figures["relative_difference"] < 1e-6
    assert figures["greedy_gap"] > 0.1
    assert figures["greedy_equal"] < figures["greedy_tokens"] == 64


def test_vllm_is_compared_by_the_log_probabilities_that_it_gives(
    expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with vLLM's interface: it is not installed here."""
    model, made = model_of(SQUARE), []

    class LLM:
        def __init__(self, **how: Any) -> None:
            made.append(how)

        def generate(self, prompts: list[dict[str, list[int]]], params: Any, use_tqdm: bool) -> list[Any]:
            assert params.prompt_logprobs == params.logprobs == -1
            found = torch.log_softmax(torch.from_numpy(logits_of(prompts[0]["prompt_token_ids"], model)), -1)
            rows = [{token: SimpleNamespace(logprob=float(value)) for token, value in enumerate(row)} for row in found]
            answer = SimpleNamespace(logprobs=[rows[-1]])
            return [SimpleNamespace(prompt_logprobs=[None, *rows[:-1]], outputs=[answer])]

    stand_in: Any = SimpleNamespace(LLM=LLM, SamplingParams=lambda **how: SimpleNamespace(**how), __version__="1")
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    assert fresh_engine.compare(fresh_engine.vllm("DIR"), str(expected))["relative_difference"] < 1e-6
    assert made[0]["model"] == "DIR"
    model.model.norm.weight.data *= 1.01
    assert fresh_engine.compare(fresh_engine.vllm("DIR"), str(expected))["relative_difference"] > 1e-4

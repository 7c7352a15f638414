"""`argonne export --as gguf`: a file that llama.cpp computes as the model does, proven there, or refused by name."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from argonne import layout
from argonne.cli import main
from argonne.errors import InputError
from argonne.model.save import save_model_folder
from argonne.publish import gguf_export
from argonne.publish.engines import EXACT, ROUNDED, UNPROVEN
from argonne.publish.gguf_export import export_gguf, interleaved
from argonne.report.inspect import inspect_path, render
from tests.model.conftest import GENERATIONS
from tests.publish.test_export import model_of

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama_cpp is not installed (pip install llama-cpp-python)"
)
LLAMA = {**GENERATIONS["2"], "vocab_size": 410}  # the tokenizer has 400 ids: ten rows are spare
BLOCKS = {**LLAMA, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "tied": LLAMA,
    "untied": {**LLAMA, "tie_word_embeddings": False},
    "heads that do not divide the hidden size": {**LLAMA, "hidden_size": 50},
    "as many key as query heads": {**LLAMA, "num_key_value_heads": 6},
    "another rotary base": {**LLAMA, "rope_theta": 5e5},
    "biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
}


@pytest.fixture
def save(tokenizer_folder: Path, tmp_path: Path) -> Any:
    """save(fields) -> a model folder with rough weights and a byte-level tokenizer."""

    def write(fields: dict[str, Any], dtype: torch.dtype = torch.float32, eos: int | list[int] | None = None) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tokenizer_folder, folder)
        save_model_folder(model_of(fields, dtype), folder, eos_id=eos)
        return folder

    return write


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without llama_cpp."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else found(name))


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@needs_llama_cpp
@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_the_model_writes_its_text_and_gives_its_ids(name: str, save: Any, tmp_path: Path) -> None:
    report = export_gguf(save(SHAPES[name]), tmp_path / "out")
    assert report["proof"]["relative_difference"] < 1e-5
    assert report["proof"]["greedy_equal"] == report["proof"]["greedy_tokens"] == 64
    assert report["proof"]["texts"] == 200
    assert report["engines"]["llama.cpp"]["verdict"] == EXACT
    assert report["dtype"] == "f32"


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["bf16", "q8_0"])
def test_rounded_weights_are_close_in_llama_cpp_and_not_called_exact(dtype: str, save: Any, tmp_path: Path) -> None:
    report = export_gguf(save(BLOCKS), tmp_path / "out", dtype=dtype)
    assert report["engines"]["llama.cpp"]["verdict"] == ROUNDED
    assert 1e-4 < report["proof"]["relative_difference"] < gguf_export.TOLERANCE[dtype]


@needs_llama_cpp
def test_weights_stored_in_bf16_stay_so(save: Any, tmp_path: Path) -> None:
    assert export_gguf(save(LLAMA, torch.bfloat16), tmp_path / "out")["dtype"] == "bf16"


@needs_llama_cpp
@pytest.mark.parametrize(
    ("planted", "value", "message"),
    [
        ("interleaved", lambda tensor, heads: tensor, "in llama.cpp logits differ by"),
        ("chat_template", lambda tokenizer: "{% nonsense %}", "does not load in a fresh process"),
    ],
)
@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_a_wrong_file_is_caught_before_it_is_put_in_place(
    planted: str, value: Any, message: str, dtype: str, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(BLOCKS)
    monkeypatch.setattr(gguf_export, planted, value)
    with pytest.raises(RuntimeError, match=message):
        export_gguf(folder, tmp_path / "out", dtype=dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@needs_llama_cpp
def test_another_pattern_than_the_tokenizers_own_is_caught(
    save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argonne.publish.gguf_tokenizer.pre_tokenizer_name", lambda head, where: "gpt-2")
    with pytest.raises(RuntimeError, match=r"llama\.cpp gives other ids for \d+ texts, as for "):
        export_gguf(save(LLAMA), tmp_path / "out")


@pytest.mark.parametrize("broken", ["relative_difference", "greedy_gap"])
@pytest.mark.parametrize("value", [float("nan"), 0.01])
def test_each_difference_fails_the_proof_also_one_that_is_not_a_number(
    broken: str, value: float, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"relative_difference": 0.0, "greedy_gap": 0.0, "other_ids": [], broken: value}
    monkeypatch.setattr("argonne.publish.proof.run_fresh", lambda *told: found)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(RuntimeError, match=f"by {value:.1e}"):
        export_gguf(save(LLAMA), tmp_path / "out")


@pytest.mark.usefixtures("alone")
def test_where_llama_cpp_is_not_installed_nothing_is_said_to_be_proven(
    save: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(save(LLAMA)), "--as", "gguf", "--out", str(out)]) == 0
    said = "not proven in llama.cpp: it is not installed (pip install llama-cpp-python)"
    record = json.loads((out / layout.EXPORT_RECORD).read_text())
    assert record["engines"]["llama.cpp"] == {"verdict": UNPROVEN, "why": said}
    for text in (capsys.readouterr().out, (out / layout.MODEL_CARD).read_text(), render(inspect_path(out))):
        assert said in text
        assert EXACT not in text


def test_without_the_package_gguf_the_line_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'argonne\[gguf\]'"):
        export_gguf(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (GENERATIONS["1"], "its GPT-2 computes the GELU of tanh"),
        (GENERATIONS["3"], "it has no q, k or v norm; .*its Gemma 4 computes GELU"),
        (GENERATIONS["3-window"], "it has no local layers"),
        ({**LLAMA, "final_logit_softcapping": 15.0}, "it has no softcap"),
        ({**LLAMA, "hidden_act": "gelu"}, "its MLP computes SiLU"),
        ({**LLAMA, "layer_types": ["sliding_attention"] * 4, "sliding_window": 9}, "it has no local layers"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_with_what_works_instead(
    fields: dict[str, Any], reason: str, save: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"--as gguf: .*{reason}.*; instead: .*2\.x with --as gguf.*--as hf"):
        export_gguf(save(fields), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_scaled_rotary_positions_are_refused(save: Any, tmp_path: Path) -> None:
    folder = save(LLAMA)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="its rotary positions are written unscaled, here linear"):
        export_gguf(folder, tmp_path / "out")


def test_a_refusal_ends_with_exit_code_2(save: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(GENERATIONS["1"])
    assert main(["export", str(folder), "--as", "gguf", "--out", str(tmp_path / "out")]) == 2
    assert "GELU of tanh" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--as", "native", "--dtype", "bf16"], "--dtype is for --as gguf"),
        (["--as", "gguf", "--for", "mlx"], "--for mlx: --as gguf is for llama.cpp"),
        (["--as", "gguf", "--dtype", "q8_0"], "rows of .* have 48 numbers, expected a multiple of 32"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    flags: list[str], said: str, save: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(save(LLAMA)), *flags, "--out", str(tmp_path / "out")]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_weights_that_are_not_finite_are_refused_and_nothing_is_left(save: Any, tmp_path: Path) -> None:
    folder = save(LLAMA)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 1] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.3\.mlp\.up_proj\.weight holds NaN"):
        export_gguf(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.usefixtures("alone")
def test_the_file_says_what_the_config_says(save: Any, tmp_path: Path) -> None:
    export_gguf(save({**LLAMA, "rope_theta": 5e5}, eos=[5, 3]), tmp_path / "out")
    told = fields_of(tmp_path / "out" / layout.GGUF_FILE)
    expected = {
        "general.architecture": "llama",
        "llama.context_length": 96,
        "llama.embedding_length": 48,
        "llama.block_count": 4,
        "llama.feed_forward_length": 56,
        "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 10,
        "llama.attention.value_length": 10,
        "llama.rope.dimension_count": 10,
        "llama.rope.freq_base": 5e5,
        "llama.vocab_size": 410,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.bos_token_id": 5,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: told[name] for name in expected} == expected
    assert told["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("dtype", "near"), [("f32", 0), ("bf16", 4e-3), ("q8_0", 1e-2)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_file_holds_every_tensor_with_q_and_k_turned(
    dtype: str, near: float, tied: bool, save: Any, tmp_path: Path
) -> None:
    folder = save({**BLOCKS, "tie_word_embeddings": tied})
    export_gguf(folder, tmp_path / "out", dtype=dtype)
    written = {one.name: one for one in GGUFReader(tmp_path / "out" / layout.GGUF_FILE).tensors}
    stored = load_file(folder / "model.safetensors")
    assert len(written) == len(stored)
    assert ("output.weight" in written) == (not tied)
    query = interleaved(stored["model.layers.2.self_attn.q_proj.weight"], 4)
    assert query[:3].equal(stored["model.layers.2.self_attn.q_proj.weight"][[0, 8, 1]])
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
    }
    expected = {name: stored[ours] for name, ours in names.items()} | {"blk.2.attn_q.weight": query}
    for name, tensor in expected.items():
        found = dequantize(written[name].data, written[name].tensor_type)
        assert np.abs(found - tensor.numpy()).max() <= near * tensor.abs().max()
    assert written["blk.0.attn_norm.weight"].tensor_type.name == "F32"


@pytest.mark.usefixtures("alone")
def test_a_model_without_a_tokenizer_is_for_ids_alone(save: Any, tmp_path: Path) -> None:
    folder = save(LLAMA)
    for name in layout.TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    assert "llama.cpp takes ids alone" in export_gguf(folder, tmp_path / "out")["tokenizer"]
    assert fields_of(tmp_path / "out" / layout.GGUF_FILE)["tokenizer.ggml.model"] == "none"


@pytest.mark.usefixtures("alone")
def test_inspect_knows_the_export_and_verifies_it(save: Any, tmp_path: Path) -> None:
    export_gguf(save(LLAMA), tmp_path / "out")
    assert inspect_path(tmp_path / "out")["problems"] == []
    file = tmp_path / "out" / layout.GGUF_FILE
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.gguf" in inspect_path(tmp_path / "out")["problems"][0]

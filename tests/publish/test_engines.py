"""Which engines an export is exact in: said in its output, its README and `inspect`; what is wrong is not offered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne import layout
from argonne.cli import main
from argonne.errors import InputError
from argonne.publish.engines import DIFFERENT, ENGINES, EXACT, REFUSES, UNPROVEN, standings
from argonne.publish.export import export_model, save_native
from argonne.publish.native import native_twin
from argonne.report.inspect import inspect_path, render
from tests.model.conftest import GENERATIONS
from tests.publish.test_export import FOUND, NATIVE, model_of, saved


@pytest.fixture(autouse=True)
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof itself is tested in test_export.py and test_fresh_load.py."""
    monkeypatch.setattr(
        "argonne.publish.export.prove", lambda folder, expected: {**FOUND, "class": class_in(folder / "config.json")}
    )


def class_in(config: Path) -> str:
    name: str = json.loads(config.read_text())["architectures"][0]
    return name


def verdicts(name: str, fields: dict[str, Any], *, custom: bool = False) -> dict[str, str]:
    model = model_of(fields)
    kind = "ArgonneForCausalLM" if custom else native_twin(model).model_class.__name__
    return {engine: standing.verdict for engine, standing in standings(kind, model.config).items()}


@pytest.mark.parametrize(
    ("name", "llama_cpp", "mlx"),
    [
        ("1", DIFFERENT, DIFFERENT),
        ("2", UNPROVEN, UNPROVEN),
        ("2 with floor heads", UNPROVEN, UNPROVEN),
        ("2 all local", DIFFERENT, DIFFERENT),
        ("3", DIFFERENT, DIFFERENT),
    ],
)
def test_a_stock_class_is_exact_in_transformers_and_elsewhere_unproven_or_wrong(
    name: str, llama_cpp: str, mlx: str
) -> None:
    expected = [EXACT, UNPROVEN, UNPROVEN, llama_cpp, mlx, REFUSES]
    assert verdicts(name, NATIVE[name][0]) == dict(zip(ENGINES, expected, strict=True))


def test_the_custom_class_is_loaded_by_engines_with_a_transformers_backend_alone() -> None:
    expected = [EXACT, UNPROVEN, UNPROVEN, REFUSES, REFUSES, REFUSES]
    for name in ("1", "2", "3-window"):
        assert verdicts(name, GENERATIONS[name], custom=True) == dict(zip(ENGINES, expected, strict=True))


def test_a_gate_of_another_activation_is_for_transformers_alone() -> None:
    """Llama elsewhere is SiLU: llama.cpp and mlx-lm do not look, vLLM and SGLang stop."""
    found = verdicts("2", {**GENERATIONS["2"], "hidden_act": "gelu"})
    assert found == dict(zip(ENGINES, [EXACT, REFUSES, REFUSES, DIFFERENT, DIFFERENT, REFUSES], strict=True))


def test_scaled_rotary_positions_take_the_proof_away() -> None:
    model = model_of(NATIVE["2"][0])
    model.config.rope_scaling = {"rope_type": "linear", "factor": 2.0}
    found = standings("LlamaForCausalLM", model.config)
    assert [found[engine].verdict for engine in ("llama.cpp", "mlx")] == [UNPROVEN, DIFFERENT]


@pytest.mark.parametrize(("name", "kind"), [("3", "native"), ("3", "hf"), ("1", "native"), ("2", "hf")])
@pytest.mark.parametrize("engine", ["llama.cpp", "mlx"])
def test_an_engine_that_would_compute_something_else_is_refused_with_what_works_instead(
    name: str, kind: str, engine: str, tmp_path: Path
) -> None:
    folder = saved(NATIVE[name][0], tmp_path / "model")
    with pytest.raises(InputError, match=rf"--for {engine}: .*instead: .*2\.x with --as gguf in llama\.cpp") as caught:
        export_model(folder, tmp_path / "out", kind=kind, engines=["transformers", engine])
    assert ("GELU" in str(caught.value)) == (kind == "native")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_engine_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    folder = saved(GENERATIONS["2"], tmp_path / "model")
    with pytest.raises(
        InputError, match=r"--for is 'ollama'; expected some of transformers, vllm, sglang, llama\.cpp, mlx, onnx"
    ):
        export_model(folder, tmp_path / "out", engines=["ollama"])


def test_engines_that_fit_are_exported_for(tmp_path: Path) -> None:
    folder, fitting = saved(NATIVE["2"][0], tmp_path / "model"), [engine for engine in ENGINES if engine != "onnx"]
    assert export_model(folder, tmp_path / "out", kind="native", engines=fitting)["class"] == "LlamaForCausalLM"


def test_engines_are_named_with_commas_or_spaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(NATIVE["2"][0], tmp_path / "model")
    for words in (["vllm,onnx"], ["vllm", "onnx"], ["vllm,", "onnx"]):
        assert main(["export", str(folder), "--as", "native", "--for", *words, "--out", str(tmp_path / "out")]) == 2
        assert "--for onnx: of a LlamaForCausalLM it loads nothing: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["hf", "native"])
def test_output_readme_and_inspect_name_every_engine(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = saved(NATIVE["3"][0], tmp_path / "model"), tmp_path / "out"
    assert main(["export", str(folder), "--as", kind, "--out", str(out)]) == 0
    printed, readme = capsys.readouterr().out, (out / layout.MODEL_CARD).read_text()
    record = json.loads((out / layout.EXPORT_RECORD).read_text())
    assert list(record["engines"]) == list(ENGINES)
    facts = inspect_path(out)
    assert facts["class"] == record["class"] == class_in(out / "config.json")
    assert facts["problems"] == []
    for engine, of in record["engines"].items():
        assert f"  {engine}: {of['verdict']} ({of['why']})" in printed
        assert f"| {engine} | {of['verdict']} | {of['why']} |" in readme
        assert f"    {engine}: {of['verdict']} ({of['why']})" in render(facts)
    assert ("trust_remote_code" in readme) == (kind == "hf")


def test_engines_are_no_matter_of_the_earlier_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "x", "--as", "pt", "--for", "mlx", "--out", str(tmp_path / "out")]) == 2
    assert "leave --for out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "absent"), [("1", "n_ctx"), ("3", "global_head_dim"), ("3 last layer full", "global_head_dim")]
)
def test_an_engine_that_would_be_wrong_does_not_find_the_key_that_it_needs(
    name: str, absent: str, tmp_path: Path
) -> None:
    """llama.cpp's converter and mlx-lm stop without it; with it they would go on to another activation."""
    save_native(
        native_twin(model_of(NATIVE[name][0])), tmp_path, dict.fromkeys(("eos_id", "bos_id", "pad_id")), torch.float32
    )
    assert absent not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("name", ["2", "2 with floor heads"])
def test_the_rotary_base_stands_where_mlx_reads_it(name: str, tmp_path: Path) -> None:
    """Found with mlx-lm 0.32.2: it read 10,000 for 500,000, and logits were off by 0.14 of the largest."""
    twin = native_twin(model_of({**NATIVE[name][0], "rope_theta": 5e5}))
    save_native(twin, tmp_path, dict.fromkeys(("eos_id", "bos_id", "pad_id")), torch.float32)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5

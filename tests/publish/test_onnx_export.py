"""`argonne export --as onnx`: a graph that onnxruntime computes as the model does, or refused by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from argonne import layout
from argonne.cli import main
from argonne.errors import InputError
from argonne.publish import onnx_export
from argonne.publish.engines import EXACT, UNPROVEN
from argonne.publish.onnx_export import export_onnx, write_onnx
from argonne.publish.proof import Mismatch
from argonne.report.inspect import inspect_path, render
from tests.model.conftest import GENERATIONS
from tests.publish.test_export import model_of, saved

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed (pip install 'argonne[onnx]')",
)
LAYERS = {"num_hidden_layers": 2}  # a graph takes seconds a layer
SMALL: dict[str, dict[str, Any]] = {
    **{name: {**fields, **LAYERS} for name, fields in GENERATIONS.items()},
    "3-window": {**GENERATIONS["3-window"], **LAYERS, "layer_types": ["full_attention", "sliding_attention"]},
}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph itself takes seconds and is tested below; here its name will do."""
    monkeypatch.setattr(onnx_export, "write_onnx", lambda model, file: file.write_bytes(b"graph"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with what writes a graph and without onnxruntime."""
    found = importlib.util.find_spec
    here = {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: here[name] if name in here else found(name))


@needs_onnx
@pytest.mark.parametrize("name", SMALL)
def test_onnxruntime_computes_every_generation_for_any_number_of_texts_of_any_length(name: str, tmp_path: Path) -> None:
    import onnxruntime

    model = model_of(SMALL[name])
    write_onnx(model, tmp_path / layout.ONNX_FILE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [layout.ONNX_FILE, layout.ONNX_WEIGHTS]
    session = onnxruntime.InferenceSession(str(tmp_path / layout.ONNX_FILE), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    for rows, length in ((1, 1), (1, 2), (3, 9), (2, 10), (1, 40), (2, 96)):
        ids = torch.randint(0, 97, (rows, length), generator=generator)
        (found,) = session.run(["logits"], {"input_ids": ids.numpy()})
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits.numpy()
        assert found.shape == (rows, length, 97)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert "sdpa" not in model.attention_paths()  # it runs by its own attention again


@needs_onnx
def test_an_export_is_proven_in_a_fresh_process_and_has_what_a_text_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = saved(SMALL["3-window"], tmp_path / "model", torch.bfloat16), tmp_path / "out"
    assert main(["export", str(folder), "--as", "onnx", "--for", "onnx", "--out", str(out)]) == 0
    record = json.loads((out / layout.EXPORT_RECORD).read_text())
    assert record["proof"]["relative_difference"] < 1e-5
    assert record["proof"]["greedy_equal"] == record["proof"]["greedy_tokens"] == 64
    assert record["engines"]["onnx"]["verdict"] == EXACT
    for name in (layout.ONNX_FILE, layout.ONNX_WEIGHTS, "tokenizer.json", "chat_template.jinja"):
        assert (out / name).is_file()
    assert json.loads((out / layout.GENERATION_CONFIG).read_text())["eos_token_id"] == [5, 3]
    facts = inspect_path(out)
    assert facts["kind"] == "export for onnxruntime"
    assert facts["problems"] == []
    for text in (capsys.readouterr().out, (out / layout.MODEL_CARD).read_text(), render(facts)):
        assert record["engines"]["onnx"]["why"] in text
    weights = out / layout.ONNX_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    assert layout.ONNX_WEIGHTS in inspect_path(out)["problems"][0]


@needs_onnx
def test_a_wrong_graph_is_caught_before_it_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(SMALL["1"], tmp_path / "model")

    def wrong(model: Any, file: Path) -> None:
        write_onnx(model_of({**SMALL["1"], "rms_norm_eps": 1e-3}), file)

    monkeypatch.setattr(onnx_export, "write_onnx", wrong)
    with pytest.raises(Mismatch, match="in onnx logits differ by"):
        export_onnx(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.usefixtures("written", "alone")
def test_where_onnxruntime_is_not_installed_nothing_is_said_to_be_proven(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    folder = saved(SMALL["2"], tmp_path / "model")
    assert main(["export", str(folder), "--as", "onnx", "--for", "onnx", "--out", str(out)]) == 0
    said = "not proven in onnx: it is not installed (pip install onnxruntime)"
    assert json.loads((out / layout.EXPORT_RECORD).read_text())["engines"]["onnx"]["verdict"] == UNPROVEN
    for text in (capsys.readouterr().out, (out / layout.MODEL_CARD).read_text(), render(inspect_path(out))):
        assert said in text
        assert EXACT not in text


def test_without_what_writes_a_graph_the_line_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'argonne\[onnx\]'"):
        export_onnx(tmp_path, tmp_path / "out")


def test_another_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--for mlx: --as onnx is for onnx \(onnxruntime\) alone"):
        export_onnx(tmp_path, tmp_path / "out", engines=["onnx", "mlx"])


@pytest.mark.usefixtures("written", "alone")
def test_positions_that_change_with_the_length_of_a_text_are_refused(tmp_path: Path) -> None:
    folder = saved(SMALL["2"], tmp_path / "model")
    config = json.loads((folder / layout.MODEL_CONFIG).read_text())
    config["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.0}
    (folder / layout.MODEL_CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match="rotary positions of type dynamic change with the length of a text"):
        export_onnx(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.usefixtures("written", "alone")
def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(SMALL["2"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 1] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        export_onnx(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]

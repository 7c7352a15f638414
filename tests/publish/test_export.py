"""Exports: complete, exact, loaded by stock transformers in a fresh process, refused where they cannot be exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.errors import InputError
from argonne.model import ArgonneForCausalLM
from argonne.model.build import build_model, config_from_fields
from argonne.model.load import load_model
from argonne.model.save import save_model_folder
from argonne.model.stored import fingerprint_of_weights
from argonne.publish.engines import EXACT
from argonne.publish.export import export_model, save_native
from argonne.publish.fresh_load import compare
from argonne.publish.native import native_twin
from argonne.publish.proof import expectations, expected_file, is_installed, prove
from argonne.tokens.tokenizer import load_tokenizer
from tests.model.conftest import GENERATIONS, SIZES, THIRD, WINDOW, roughen

LAST_FULL = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
NATIVE: dict[str, tuple[dict[str, Any], str]] = {
    "1": ({**GENERATIONS["1"], "hidden_size": 60, "intermediate_size": 240}, "GPT2LMHeadModel"),
    "2": (GENERATIONS["2"], "LlamaForCausalLM"),
    "2 untied": ({**GENERATIONS["2"], "tie_word_embeddings": False}, "LlamaForCausalLM"),
    "2 with floor heads": ({**GENERATIONS["2"], "hidden_size": 50}, "MistralForCausalLM"),
    "2 all local": (
        {**GENERATIONS["2"], "layer_types": ["sliding_attention"] * 4, "sliding_window": 9},
        "MistralForCausalLM",
    ),
    "3": (GENERATIONS["3"], "Gemma4ForCausalLM"),
    "3 untied": ({**GENERATIONS["3"], "tie_word_embeddings": False}, "Gemma4ForCausalLM"),
    "3 last layer full": ({**SIZES, **THIRD, **LAST_FULL}, "Gemma4ForCausalLM"),
}
DIFFERENCES = ["relative_difference", "loss_difference", "second_difference", "greedy_gap", "static_gap"]
FOUND: dict[str, Any] = {"class": "SomeForCausalLM", "greedy_equal": True, **dict.fromkeys(DIFFERENCES, 0.0)}
TOKENIZER = {"eos_token": "<end>", "chat_template": "{{ messages }}"}


def model_of(fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> ArgonneForCausalLM:
    return roughen(build_model(config_from_fields(fields), seed=0, dtype=dtype)).eval()


def saved(fields: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model folder with a tokenizer of 97 words and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    save_model_folder(model_of(fields, dtype), folder, eos_id=[5, 3])
    words = {f"w{index}": index for index in range(97)}
    tokenizer = Tokenizer(
        models.WordLevel({"<end>": 96, **{word: index for word, index in words.items() if index < 96}}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**TOKENIZER, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.7, "do_sample": True}))
    return folder


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_twin_has_the_same_logits_and_the_same_text(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    fields, expected_class = NATIVE[name]
    model = model_of(fields)
    twin = native_twin(model)
    assert twin.model_class.__name__ == expected_class
    save_native(twin, tmp_path, {"eos_id": None, "bos_id": None, "pad_id": None}, torch.float32)
    other = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(other).__name__ == expected_class
    expected = expectations(model)
    with torch.no_grad():
        found = other(input_ids=expected["input_ids"]).logits
    assert (found - expected["logits"]).abs().max() < 2e-5 * expected["logits"].abs().max()
    prompt, new = int(expected["prompt_length"]), expected["greedy_ids"].shape[1] - int(expected["prompt_length"])
    greedy = other.generate(expected["input_ids"][:, :prompt], max_new_tokens=new, do_sample=False, pad_token_id=0)
    assert torch.equal(greedy, expected["greedy_ids"])


@pytest.mark.parametrize(("name", "kind"), [("1", "hf"), ("3-window", "hf"), ("3 last layer full", "native")])
def test_an_export_is_complete_and_proven_in_a_fresh_process(name: str, kind: str, tmp_path: Path) -> None:
    fields = NATIVE[name][0] if name in NATIVE else GENERATIONS[name]
    report = export_model(saved(fields, tmp_path / "model"), tmp_path / "out", kind=kind)
    assert report["proof"]["relative_difference"] < 1e-4
    assert report["proof"]["greedy_equal"]
    assert report["proof"]["hidden_shape"][-1] == fields["hidden_size"]
    source = tmp_path / "model"
    assert report["source"]["model"] == str(source)
    assert report["source"]["weights"] == fingerprint_of_weights(source)
    assert report["source"]["tokenizer"] == load_tokenizer(source).fingerprint
    family = "Argonne1" if name == "1" else "Argonne"
    assert report["class"] == (f"{family}ForCausalLM" if kind == "hf" else NATIVE[name][1])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [5, 3]
    assert generation["temperature"] == 0.7
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    if kind == "hf":
        assert config["auto_map"] == {
            "AutoConfig": f"configuration_argonne.{family}Config",
            "AutoModel": f"modeling_argonne.{family}BaseModel",
            "AutoModelForCausalLM": f"modeling_argonne.{family}ForCausalLM",
            "AutoModelForSequenceClassification": f"modeling_argonne.{family}ForSequenceClassification",
        }
        assert config["layer_types"] == model_of(fields).config.layer_types
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.skipif(not is_installed("mlx"), reason="mlx is not installed (pip install mlx-lm 'mlx[cpu]')")
@pytest.mark.parametrize("name", ["2", "2 with floor heads"])
def test_a_native_export_of_2_is_proven_in_mlx_too(name: str, tmp_path: Path) -> None:
    folder = saved({**NATIVE[name][0], "rope_theta": 5e5}, tmp_path / "model")
    report = export_model(folder, tmp_path / "out", kind="native", engines=["mlx"])
    assert report["engines"]["mlx"]["verdict"] == EXACT
    assert report["proofs"]["mlx"]["greedy_equal"] == report["proofs"]["mlx"]["greedy_tokens"] == 64


REWARD = """
import sys, torch
sys.modules["argonne"] = None
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
folder, again = sys.argv[1:]
how = {"trust_remote_code": True, "local_files_only": True}
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0, **how).eval()
model.save_pretrained(again)
other = AutoModelForSequenceClassification.from_pretrained(again, **how).eval()
left, right = torch.tensor([[0, 0, 7, 8, 9]]), torch.tensor([[7, 8, 9, 0, 0]])
one = other(torch.tensor([[7, 8, 9]])).logits
assert one.shape == (1, 1) and type(other).__name__.endswith("ForSequenceClassification"), one
for ids in (left, right):
    assert torch.allclose(model(ids, attention_mask=(ids != 0).long()).logits, one, atol=1e-5)
loss = model(torch.cat([left, right]), attention_mask=(torch.cat([left, right]) != 0).long(), labels=torch.ones(2)).loss
loss.backward()
assert model.score.weight.grad.any() and model.model.embed_tokens.weight.grad.any()
stored = load_file(folder + "/model.safetensors")
assert all(torch.equal(value, stored["model." + name]) for name, value in model.model.state_dict().items())
"""


@pytest.mark.parametrize("name", ["1", "3-window"])
def test_a_reward_model_starts_from_an_export(name: str, tmp_path: Path) -> None:
    folder = saved(GENERATIONS[name], tmp_path / "model")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", REWARD, str(folder), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_a_model_whose_last_layer_is_local_has_no_native_class_and_every_reason_is_named(tmp_path: Path) -> None:
    folder = saved(GENERATIONS["3-window"], tmp_path / "model")
    with pytest.raises(
        InputError, match="Gemma4ForCausalLM: its last layer must be full attention, here it is sliding_attention"
    ) as caught:
        export_model(folder, tmp_path / "out", kind="native")
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM"):
        assert name in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"v_norm": False}, "Gemma4ForCausalLM: it has q, k and v norms"),
        ({"sandwich_norm": False}, "Gemma4ForCausalLM: it has norms after attention and MLP"),
        ({"attention_bias": True}, "Gemma4ForCausalLM: its projections have no biases"),
    ],
)
def test_a_mixture_of_generations_is_refused_with_its_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        native_twin(model_of({**GENERATIONS["3"], **change}))


def test_a_wrong_export_is_caught_before_it_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The comparison itself, in this process: that it runs in a fresh one is shown above.
    monkeypatch.setattr(
        "argonne.publish.proof.run_fresh", lambda folder, expected, **how: compare(str(folder), str(expected))
    )
    model = model_of(GENERATIONS["2"])
    twin = native_twin(model)
    twin.state["model.layers.2.mlp.up_proj.weight"] = twin.state["model.layers.2.mlp.up_proj.weight"] * 1.01
    save_native(twin, tmp_path, {"eos_id": None, "bos_id": None, "pad_id": None}, torch.float32)
    with expected_file(model) as expected, pytest.raises(RuntimeError, match="logits differ by"):
        prove(tmp_path, expected)


@pytest.mark.parametrize("kind", ["hf", "native"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_exported(kind: str, value: float, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved({**GENERATIONS["2"], "hidden_size": 60}, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.3\.mlp\.up_proj\.weight holds NaN or infinity in 1 of 3,360 places"):
        export_model(folder, tmp_path / "out", kind=kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("broken", DIFFERENCES)
@pytest.mark.parametrize("value", [float("nan"), 0.01])
def test_each_difference_fails_the_proof_also_one_that_is_not_a_number(
    broken: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argonne.publish.proof.run_fresh", lambda *paths, **how: {**FOUND, broken: value})
    with pytest.raises(RuntimeError, match=f"by {value:.1e}"):
        prove(tmp_path, tmp_path)


@pytest.mark.parametrize("known_by", ["config", "generation config", "tokenizer"])
@pytest.mark.parametrize("way", ["hf", "native", "save_pretrained"])
def test_the_pad_id_survives_every_way_out(
    way: str, known_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved({**GENERATIONS["2"], "hidden_size": 60}, tmp_path / "model")
    places = {
        "config": "config.json",
        "generation config": "generation_config.json",
        "tokenizer": "tokenizer_config.json",
    }
    for name in places.values():
        about = json.loads((folder / name).read_text())
        own = {"pad_token": "w7"} if known_by == "tokenizer" else {"pad_token_id": 7}
        given = own if name == places[known_by] else {"pad_token_id": None}
        (folder / name).write_text(json.dumps({**about, **given}))
    monkeypatch.setattr("argonne.publish.export.prove", lambda folder, expected: FOUND)
    if way == "save_pretrained":
        load_model(folder).model.save_pretrained(tmp_path / "out")
    else:
        export_model(folder, tmp_path / "out", kind=way)
    written = [json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert [about.get("pad_token_id") for about in written] == [7, 7]


def test_an_existing_folder_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    folder = saved(GENERATIONS["2"], tmp_path / "model")
    with pytest.raises(InputError, match="exists already"):
        export_model(folder, folder, kind="hf")
    with pytest.raises(InputError, match="--as is 'onnx'; expected hf or native"):
        export_model(folder, tmp_path / "out", kind="onnx")


SNIPPET = """
import sys
sys.modules["argonne"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer

for PATH in PATHS:
    tokenizer = AutoTokenizer.from_pretrained(PATH, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)
    inputs = tokenizer("w1 w2 w3", return_tensors="pt")
    outputs = model.generate(**inputs, max_length=150, do_sample=True, top_k=50, top_p=0.95, temperature=0.7)
    print("@@", outputs.shape[1], len(tokenizer.decode(outputs[0], skip_special_tokens=True)))
"""


def test_the_published_usage_snippet_runs_on_each_generation(tmp_path: Path) -> None:
    paths = [
        str(saved({**GENERATIONS[name], "max_position_embeddings": 150}, tmp_path / name))
        for name in ("1", "2", "3-window")
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", SNIPPET.replace("PATHS", repr(paths))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = done.stdout.split("@@")[1:]
    assert len(answers) == 3
    for answer in answers:
        length, characters = (int(x) for x in answer.split())
        assert 3 < length <= 150
        assert characters > 0

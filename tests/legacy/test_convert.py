"""Everything that the family's earlier code wrote loads: logits, losses, gradients, cached decoding, greedy text."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import argonne.publish.fresh_load
from argonne.errors import InputError
from argonne.legacy.convert import import_checkpoint, load_legacy, modern_name
from argonne.legacy.reader import read_legacy
from argonne.publish.export import save_native
from argonne.publish.native import native_twin
from argonne.publish.proof import expectations

FIXTURES = ["a10_odd108", "a15_sdpa_odd81", "a20_floor_headdim", "a25_base", "a30_full", "a30fa2_full", "a40_shape"]


@pytest.fixture(params=FIXTURES)
def golden(request: pytest.FixtureRequest, shared: Path) -> Path:
    return shared / "golden" / request.param


@pytest.fixture
def editable(shared: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A writable copy of the config and weights of a fixture."""

    def copy(name: str) -> Path:
        folder = tmp_path / "earlier"
        folder.mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(shared / "golden" / name / file, folder / file)
        return folder

    return copy


def attention_of(golden: Path) -> str:
    return "as-config" if golden.name == "a30fa2_full" else "full"


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_logits_and_the_outputs_of_every_block_are_the_earlier_ones(golden: Path) -> None:
    model, _ = load_legacy(golden, attention_of(golden))
    tensors = load_file(golden / "tensors.safetensors")
    with torch.no_grad():
        out = model(input_ids=tensors["input_ids"], output_hidden_states=True)
        wide = model.to(torch.float64)(input_ids=tensors["input_ids"]).logits
    assert_close(out.logits, tensors["logits"])
    assert_close(wide, tensors["logits_f64"])
    for layer in range(model.config.num_hidden_layers - 1):
        assert_close(out.hidden_states[layer + 1], tensors[f"block_out.{layer}"])


def test_loss_and_every_gradient_are_the_earlier_ones(golden: Path) -> None:
    model, earlier = load_legacy(golden, attention_of(golden))
    tensors, expected = load_file(golden / "tensors.safetensors"), load_file(golden / "grads.safetensors")
    targets = tensors["targets_preshifted"]
    loss = model(input_ids=tensors["input_ids"], shift_labels=targets, loss_reduction="mean", use_cache=False).loss
    assert abs(loss - tensors["loss_preshifted"]) < 1e-5 * tensors["loss_preshifted"]
    loss.backward()
    found = dict(model.named_parameters())
    largest = max(gradient.abs().max() for gradient in expected.values())
    compared = 0
    for name, gradient in expected.items():
        if name.endswith("attn.key.bias"):  # truly zero: what is stored is rounding noise
            continue
        new = modern_name(name, model.config)
        assert new is not None
        if new == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        mine = found[new].grad
        assert mine is not None
        gradient = gradient[0] if name == "position_embedding" else gradient
        assert (mine - gradient).abs().max() <= 1e-3 * max(gradient.abs().max(), 1e-3 * largest), name
        compared += 1
    assert compared >= len(found) - 2 * model.config.num_hidden_layers
    assert not earlier.messages or golden.name.startswith("a30")


def test_greedy_text_is_the_earlier_one(golden: Path) -> None:
    tensors = load_file(golden / "tensors.safetensors")
    if "greedy_ids" not in tensors:
        assert golden.name == "a10_odd108"  # 1.0 could only sample
        return
    prompt = json.loads((golden / "meta.json").read_text())["greedy_prompt_len"]
    expected = tensors["greedy_ids"]
    model, _ = load_legacy(golden, attention_of(golden))
    if golden.name == "a30fa2_full":
        found = earlier_windowed_decode(model, load_legacy(golden, "full")[0], expected[:, :prompt], expected.shape[1])
    else:
        found = model.generate(expected[:, :prompt], max_length=expected.shape[1], do_sample=False, pad_token_id=0)
    different = (found != expected).nonzero()
    if len(different):
        first = int(different[0, 1])
        best = model(input_ids=expected[:, :first]).logits[0, -1].topk(2).values
        assert best[0] - best[1] < 1e-4


def earlier_windowed_decode(windowed: Any, full: Any, ids: torch.Tensor, length: int) -> torch.Tensor:
    """The earlier code applied its window to the prompt and forgot it in cached decoding; its stored text is of that
    mixture.

    Ours keeps the window in both (test_caches.py), so its own greedy text differs from the twelfth token on, and
    rightly so.
    """
    cache, step, model = DynamicCache(), ids, windowed
    while ids.shape[1] < length:
        step = model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        ids, model = torch.cat([ids, step], 1), full
    return ids


def test_cached_decoding_is_the_earlier_one(golden: Path) -> None:
    tensors = load_file(golden / "tensors.safetensors")
    expected = tensors.get("logits_incremental", tensors["logits"])
    model, _ = load_legacy(golden, attention_of(golden))
    cache, found = None, []
    with torch.no_grad():
        for step in range(expected.shape[1]):
            out = model(input_ids=tensors["input_ids"][:, step : step + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    assert_close(torch.cat(found, 1), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_masks_are_the_earlier_ones(side: str, shared: Path) -> None:
    golden = shared / "golden" / "a25_base"
    model, _ = load_legacy(golden)
    tensors = load_file(golden / "tensors.safetensors")
    mask = tensors[f"attention_mask_{side}"]
    positions = torch.arange(mask.shape[1])[None].expand_as(
        mask
    )  # the earlier code did not shift positions for left padding
    with torch.no_grad():
        found = model(input_ids=tensors["input_ids"], attention_mask=mask, position_ids=positions).logits
    assert_close(found[mask.bool()], tensors[f"logits_mask_{side}"][mask.bool()])


def test_an_import_is_a_complete_folder(golden: Path, tmp_path: Path) -> None:
    out = tmp_path / "imported"
    report = import_checkpoint(golden, out, attention=attention_of(golden))
    names = {path.name for path in out.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_argonne.py",
        "configuration_argonne.py",
    } <= names
    assert {"attention.py", "fused.py", "kernels.py", "layers.py", "loss.py"} <= names
    config = json.loads((out / "config.json").read_text())
    assert set(config["auto_map"]) == {
        *("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"),
    }
    assert config["layer_types"] == report["layer_types"]
    again = AutoModelForCausalLM.from_pretrained(out)
    tensors = load_file(golden / "tensors.safetensors")
    with torch.no_grad():
        assert_close(again(input_ids=tensors["input_ids"]).logits, tensors["logits"])


def test_every_import_loads_in_a_fresh_process_where_argonne_is_not_installed(shared: Path, tmp_path: Path) -> None:
    lines = []
    for name in FIXTURES:
        golden = shared / "golden" / name
        import_checkpoint(golden, tmp_path / name, attention=attention_of(golden))
        tensors = load_file(golden / "tensors.safetensors")
        model, _ = load_legacy(golden, attention_of(golden))
        expected = {**expectations(model), "input_ids": tensors["input_ids"], "logits": tensors["logits"]}
        save_file(expected, tmp_path / f"{name}.safetensors")
        lines.append(
            f"print('@@' + json.dumps(compare({str(tmp_path / name)!r}, {str(tmp_path / name)!r} + '.safetensors')))"
        )
    script = "import json, sys\nsys.modules['argonne'] = None\nfrom fresh_load import compare\n" + "\n".join(lines)
    folder = Path(argonne.publish.fresh_load.__file__).parent
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line[2:]) for line in done.stdout.splitlines() if line.startswith("@@")]
    assert len(found) == len(FIXTURES)
    for answer in found:
        assert answer["relative_difference"] < 1e-4
        assert answer["greedy_equal"] or answer["greedy_gap"] < 1e-4


NATIVE_CLASS = {
    "a10": "GPT2LMHeadModel",
    "a15": "GPT2LMHeadModel",
    "a20": "MistralForCausalLM",
    "a25": "LlamaForCausalLM",
}


def test_the_native_twin_of_an_import_has_the_earlier_logits(golden: Path, tmp_path: Path) -> None:
    model, _ = load_legacy(golden, attention_of(golden))
    if golden.name == "a30fa2_full":
        with pytest.raises(InputError, match="last layer must be full attention, here it is sliding_attention"):
            native_twin(model)
        return
    twin = native_twin(model)
    assert twin.model_class.__name__ == NATIVE_CLASS.get(golden.name[:3], "Gemma4ForCausalLM")
    save_native(twin, tmp_path, {"eos_id": None, "bos_id": None, "pad_id": None}, torch.float32)
    tensors = load_file(golden / "tensors.safetensors")
    other = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(other(input_ids=tensors["input_ids"]).logits, tensors["logits"])


def test_a_window_of_the_config_is_kept_only_when_asked_for(shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden" / "a30fa2_full"
    full = import_checkpoint(golden, tmp_path / "full")
    assert full["sliding_window"] is None
    assert set(full["layer_types"]) == {"full_attention"}
    assert any("imported as full attention" in message for message in full["messages"])
    kept = import_checkpoint(golden, tmp_path / "kept", attention="as-config")
    assert kept["sliding_window"] == 9  # 8 earlier keys and the own one
    assert kept["layer_types"] == ["full_attention", "sliding_attention"] * 2


def pipelined(tensors: dict[str, torch.Tensor], keep_blocks: bool) -> dict[str, torch.Tensor]:
    """Two layers as two stages of one block each, as the pipelined 1.x code wrote them."""
    staged = {}
    for name, tensor in tensors.items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            staged[f"pipeline_stages.{layer}.0.{rest}"] = tensor.clone()
        if keep_blocks or not name.startswith("blocks."):
            staged[name] = tensor
    return staged


VARIANTS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "pipelined, repeated": lambda tensors: pipelined(tensors, keep_blocks=True),
    "pipelined only": lambda tensors: pipelined(tensors, keep_blocks=False),
    "compiled": lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
    "compiled inside": lambda tensors: {
        name.replace(".attn.", "._orig_mod.attn."): tensor for name, tensor in tensors.items()
    },
    "data parallel": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["folder", "bin", "pt"])
def test_pipelined_and_compiled_files_load_in_every_container(
    variant: str, kind: str, editable: Any, shared: Path
) -> None:
    folder = editable("a15_sdpa_odd81")
    tensors = VARIANTS[variant](load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    path = folder
    if kind == "folder":
        save_file(tensors, folder / "model.safetensors")
    elif kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        path = folder / "checkpoint_step_70.pt"
        torch.save(
            {
                "global_step": 70,
                "tokens_processed": 1,
                "loss": 2.0,
                "model_state_dict": tensors,
                "optimizer_state_dict": {},
            },
            path,
        )
    model, _ = load_legacy(path)
    expected = load_file(shared / "golden" / "a15_sdpa_odd81" / "tensors.safetensors")
    with torch.no_grad():
        assert_close(model(input_ids=expected["input_ids"]).logits, expected["logits"])


def test_stages_of_several_blocks_are_counted_through(tmp_path: Path) -> None:
    tensors = {
        f"pipeline_stages.{s}.{j}.ln1.weight": torch.full((2,), float(3 * s + j)) for s in range(2) for j in range(3)
    }
    torch.save(tensors, tmp_path / "x.pt")
    (tmp_path / "config.json").write_text('{"model_type": "argonne"}')
    found = read_legacy(tmp_path / "x.pt").tensors
    assert [int(found[f"blocks.{layer}.ln1.weight"][0]) for layer in range(6)] == list(range(6))


def test_padded_vocabulary_rows_are_trimmed_with_a_message(editable: Any, shared: Path) -> None:
    folder = editable("a25_base")
    tensors = load_file(folder / "model.safetensors")
    padded = torch.cat([tensors["embed_tokens.weight"], torch.ones(9, 64)])
    tensors["embed_tokens.weight"], tensors["lm_head.weight"] = padded, padded.clone()
    save_file(tensors, folder / "model.safetensors")
    model, earlier = load_legacy(folder)
    assert sum("140 rows trimmed to the vocabulary of 131" in message for message in earlier.messages) == 2
    expected = load_file(shared / "golden" / "a25_base" / "tensors.safetensors")
    assert_close(model(input_ids=expected["input_ids"]).logits, expected["logits"])


def test_a_training_checkpoint_without_config_is_recognised_by_its_shapes(tmp_path: Path) -> None:
    from argonne.model.build import build_model, config_from_fields
    from argonne.presets import presets

    model = build_model(config_from_fields(presets()["nano-2.5"].fields), seed=0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = name.removeprefix("model.").replace("layers.", "blocks.").replace("self_attn", "attn")
        tensors[old.replace("input_layernorm", "input_norm").replace("post_attention_layernorm", "post_norm")] = tensor
    path = tmp_path / "run" / "inner" / "checkpoint_step_5.pt"
    path.parent.mkdir(parents=True)
    torch.save({"global_step": 5, "model_state_dict": tensors}, path)
    found, earlier = load_legacy(path)
    assert any("nano-2.5" in message for message in earlier.messages)
    assert torch.equal(found.model.layers[3].mlp.up_proj.weight, model.model.layers[3].mlp.up_proj.weight)


class Bomb:
    """A pickle that runs code when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_with_code_in_it_is_refused_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "checkpoint_step_1.pt").write_bytes(pickle.dumps({"model_state_dict": Bomb(marker)}))
    torch.save({"model_state_dict": Bomb(marker)}, tmp_path / "checkpoint_step_2.pt")
    for name in ("checkpoint_step_1.pt", "checkpoint_step_2.pt"):
        with pytest.raises(InputError, match=name):
            import_checkpoint(tmp_path / name, tmp_path / "out")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (
        lambda f: change_tensors(f, lambda t: t.pop("blocks.1.attn.q_norm.weight")),
        "layers.1.self_attn.q_norm.weight is missing",
    ),
    "unknown": (lambda f: change_tensors(f, lambda t: t.update(extra=torch.ones(1))), "parameter extra is unknown"),
    "mis-shaped": (
        lambda f: change_tensors(f, lambda t: t.update({"norm.weight": torch.ones(47)})),
        r"norm.weight has shape \(47,\), expected \(48,\)",
    ),
    "too few rows": (
        lambda f: change_tensors(f, lambda t: t.update({"embed_tokens.weight": torch.ones(100, 48)})),
        "embed_tokens.weight has shape",
    ),
    "untied": (
        lambda f: change_tensors(f, lambda t: t["lm_head.weight"].add_(1)),
        "lm_head.weight differs from embed_tokens.weight",
    ),
    "truncated": (truncate, "truncated or damaged"),
    "other family": (lambda f: change_config(f, model_type="llama"), "model_type is 'llama'"),
    "experiment": (lambda f: change_config(f, attn_gate=True), "attn_gate is True"),
    "heads": (lambda f: change_config(f, num_key_value_heads=2), "not a multiple"),
    "norms off": (lambda f: change_config(f, qk_norm=False), "q_norm.weight is unknown|k_norm.weight is unknown"),
    "NaN": (
        lambda f: change_tensors(f, lambda t: t["blocks.2.mlp.up_proj.weight"][3, 5:7].fill_(torch.nan)),
        r"layers.2.mlp.up_proj.weight holds NaN or infinity in 2 of 3,840 places",
    ),
    "infinity": (
        lambda f: change_tensors(f, lambda t: t["norm.weight"][0].fill_(-torch.inf)),
        "norm.weight holds NaN or infinity in 1 of 48",
    ),
    "unknown prefix": (
        lambda f: change_tensors(f, lambda t: t.update({"submodule.norm.weight": t["norm.weight"] + 1})),
        "parameter submodule.norm.weight is unknown",
    ),
    "several dtypes": (
        lambda f: change_tensors(f, lambda t: t.update({"norm.weight": t["norm.weight"].half()})),
        r"several dtypes \(float16, float32\); choose one with --dtype",
    ),
    "partial rotation": (lambda f: change_config(f, partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "unknown field": (lambda f: change_config(f, residual_scale=0.5), "residual_scale is 0.5, a field that no known"),
    "words for a number": (lambda f: change_config(f, hidden_size="48"), "hidden_size is '48'; expected int"),
    "words for an alias": (lambda f: change_config(f, n_embd="48"), "n_embd is '48'; expected a number"),
    "words for a switch": (lambda f: change_config(f, qk_norm="yes"), "qk_norm is 'yes'; expected true or false"),
    "words for a window": (
        lambda f: change_config(f, local_attention_window="8"),
        "local_attention_window is '8'; expected a whole number",
    ),
    "words for a rate": (lambda f: change_config(f, attention_dropout="0"), "attention_dropout is '0'; expected float"),
    "a number for a list": (lambda f: change_config(f, layer_types=3), r"layer_types is 3; expected list\[str\]"),
    "a switch for a number": (lambda f: change_config(f, vocab_size=True), "vocab_size is True; expected int"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "needs its config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights in it"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_is_named_and_leaves_nothing_behind(fault: str, editable: Any, tmp_path: Path) -> None:
    folder = editable("a30_full")
    breaking, message = BROKEN[fault]
    breaking(folder)
    with pytest.raises(InputError, match=message):
        import_checkpoint(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_mixed_dtypes_become_the_one_that_is_asked_for(dtype: str, editable: Any, tmp_path: Path) -> None:
    folder = editable("a30_full")
    change_tensors(folder, lambda t: t.update({"norm.weight": t["norm.weight"].half()}))
    report = import_checkpoint(folder, tmp_path / "out", dtype=dtype)
    assert report["dtype"] == dtype
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype}"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_weights_that_do_not_fit_the_dtype_asked_for_are_refused(editable: Any, tmp_path: Path) -> None:
    folder = editable("a30_full")
    change_tensors(folder, lambda t: t["norm.weight"][0].fill_(1e6))
    with pytest.raises(InputError, match=r"as torch.float16: model.norm.weight holds NaN or infinity in 1 of 48"):
        import_checkpoint(folder, tmp_path / "out", dtype="float16")
    with pytest.raises(InputError, match="--dtype is 'int8'"):
        import_checkpoint(folder, tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


def test_the_pad_id_survives_an_import(editable: Any, tmp_path: Path) -> None:
    folder = editable("a25_base")
    change_config(folder, pad_token_id=7, eos_token_id=3)
    import_checkpoint(folder, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "out" / name).read_text())
        assert (written["pad_token_id"], written["eos_token_id"]) == (7, 3)


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    torch.save({"model_state_dict": {"transformer.wte.weight": torch.ones(2, 2)}}, tmp_path / "gpt2.pt")
    with pytest.raises(InputError, match="not an Argonne checkpoint"):
        import_checkpoint(tmp_path / "gpt2.pt", tmp_path / "out")
    torch.save({"world_size": 8, "tensor_parallel": True, "rank": 0, "model_state_dict": {}}, tmp_path / "shard.pt")
    with pytest.raises(InputError, match="one of 8 tensor-parallel shards"):
        import_checkpoint(tmp_path / "shard.pt", tmp_path / "out")
    with pytest.raises(InputError, match="--attention is 'none'"):
        import_checkpoint(tmp_path / "shard.pt", tmp_path / "out", attention="none")

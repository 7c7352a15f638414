"""The family's `checkpoint_step_<N>.pt`: read as its trainer wrote it, written as its trainer reads it, refused where
it does not fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from argonne.cli import main
from argonne.config import Recipe
from argonne.errors import InputError
from argonne.files import write_json
from argonne.layout import last_checkpoint
from argonne.legacy.convert import import_checkpoint
from argonne.legacy.export_pt import export_pt
from argonne.legacy.training import CLASSES, class_order, restore
from argonne.model.build import build_model, config_from_fields
from argonne.model.load import read_checkpoint_tensors
from argonne.recipe import to_toml
from argonne.stages.pretrain import run
from argonne.stages.start import architecture_fields
from argonne.train.checkpoint import LAST, run_tensors
from argonne.train.optim import build_optimizer
from tests.legacy.family import ROWS, T, earlier_file, earlier_parameters, opened, sources, spelled_out
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]


@pytest.mark.parametrize("preset", ["nano-2.5", "nano-3.0"])
def test_exported_as_pt_and_resumed_equals_uninterrupted(preset: str, in_order: Nano, tmp_path: Path) -> None:
    recipe = in_order(preset)
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "cut", stop_after_step=6)
    facts = export_pt(tmp_path / "cut", tmp_path / "exported")
    assert (facts["step"], facts["tokens_processed"], facts["data_position"]) == (6, 6 * ROWS * T, 6 * ROWS * T)
    run(recipe, tmp_path / "new", resume_from=Path(facts["path"]), stop_after_step=9)
    run(recipe, tmp_path / "new", resume_from=Path(facts["path"]))  # the same command again resumes the run itself
    assert curve(tmp_path / "new") == curve(tmp_path / "whole")[6:]
    assert stored(tmp_path / "new" / LAST) == stored(tmp_path / "whole" / LAST)
    lineage = json.loads((tmp_path / "new" / "manifest.json").read_text())["parent"]
    assert lineage["checkpoint"] == "checkpoint_step_6.pt"


def test_a_run_exported_in_its_second_pass_goes_on_exactly(in_order: Nano, short_file: Path, tmp_path: Path) -> None:
    recipe = in_order(**sources(short_file))
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "cut", stop_after_step=6)
    facts = export_pt(tmp_path / "cut" / "checkpoint_step_6", tmp_path / "exported")
    assert facts["data_position"] == (6 * ROWS - 999 // T) * T  # 31 rows a pass
    run(recipe, tmp_path / "new", resume_from=Path(facts["path"]))
    assert curve(tmp_path / "new") == curve(tmp_path / "whole")[6:]


def test_the_earlier_trainers_own_calls_take_an_exported_file(in_order: Nano, tmp_path: Path) -> None:
    recipe = in_order()
    run(recipe, tmp_path / "cut", stop_after_step=4)
    content = torch.load(export_pt(tmp_path / "cut", tmp_path / "exported")["path"], weights_only=True)
    assert list(content["model_state_dict"]) == [*spelled_out("3.0"), "lm_head.weight"]
    assert (
        content["model_state_dict"]["lm_head.weight"].data_ptr()
        == content["model_state_dict"]["embed_tokens.weight"].data_ptr()
    )
    parameters = earlier_parameters(recipe, "3.0")
    optimizer = torch.optim.AdamW(parameters, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    optimizer.load_state_dict(content["optimizer_state_dict"])
    scheduler.load_state_dict(content["scheduler_state_dict"])
    ours = load_state(tmp_path / "cut" / LAST)
    for parameter, name in zip(parameters, spelled_out("3.0").values(), strict=True):
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], ours[f"optim.exp_avg_sq.{name}"])
        assert optimizer.state[parameter]["step"] == 4
    assert (scheduler.last_epoch, optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[0]["betas"]) == (
        4,
        0.1,
        (0.9, 0.95),
    )
    assert content["loss"] == curve(tmp_path / "cut")[3]["loss"]
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (config["local_attention_window"], config["interleaved_local_attention"]) == (
        63,
        True,
    )  # w earlier keys and the own one


def load_state(folder: Path) -> dict[str, Tensor]:
    from argonne.model.load import read_checkpoint_tensors

    return read_checkpoint_tensors(folder)


@pytest.mark.parametrize("generation", ["1.0", "1.5", "2.5", "3.0"])
def test_every_weight_and_moment_lands_on_its_own_parameter(generation: str, nano: Nano, tmp_path: Path) -> None:
    recipe = nano({"1": "nano-1.0", "2": "nano-2.5", "3": "nano-3.0"}[generation[0]])
    tree = earlier_file(tmp_path / "checkpoint_step_3.pt", recipe, generation)
    model = build_model(config_from_fields(architecture_fields(recipe.model)), seed=0)
    optimizer = build_optimizer(model, recipe.optim)
    restore(opened(tmp_path / "checkpoint_step_3.pt", recipe), model, optimizer, lambda text: None)
    found = run_tensors(model, optimizer)
    assert len(found) == 4 * len(spelled_out(generation))
    for number, (old, new) in enumerate(spelled_out(generation).items()):
        entry = tree["optimizer_state_dict"]["state"][number]
        expected = {
            "optim.exp_avg": entry["exp_avg"],
            "optim.exp_avg_sq": entry["exp_avg_sq"],
            "model": tree["model_state_dict"][old],
        }
        for kind, value in expected.items():
            assert torch.equal(found[f"{kind}.{new}"], value[0] if old == "position_embedding" else value), (kind, old)
        assert found[f"optim.step.{new}"] == 3


def test_the_order_is_that_of_the_earlier_classes_themselves(shared: Path) -> None:
    for folder in sorted((shared / "golden").glob("a*")):
        state = json.loads((folder / "meta.json").read_text())["state_dict"]
        names = [name for name in state if not name.endswith(".attn.mask")]
        assert any(class_order(set(names), kind) == names for kind in CLASSES), folder.name


def test_padded_vocabulary_rows_are_trimmed_in_weights_and_moments_and_said(nano: Nano, tmp_path: Path) -> None:
    recipe = nano(**{"model.vocab_size": "500"})
    padded = nano(**{"model.vocab_size": "512"})
    tree = earlier_file(tmp_path / "checkpoint_step_3.pt", padded)
    model = build_model(config_from_fields(architecture_fields(recipe.model)), seed=0)
    optimizer, said = build_optimizer(model, recipe.optim), []
    restore(opened(tmp_path / "checkpoint_step_3.pt", recipe), model, optimizer, said.append)
    found = run_tensors(model, optimizer)
    assert torch.equal(found["model.model.embed_tokens.weight"], tree["model_state_dict"]["embed_tokens.weight"][:500])
    assert torch.equal(
        found["optim.exp_avg.model.embed_tokens.weight"], tree["optimizer_state_dict"]["state"][0]["exp_avg"][:500]
    )
    assert "512 rows trimmed to the vocabulary of 500" in "\n".join(said)


def test_an_earlier_run_goes_on_with_its_next_window_step_and_our_rate(
    in_order: Nano, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = in_order(**{"train.steps": "5"})
    earlier_file(tmp_path / "checkpoint_step_3.pt", recipe)
    run(recipe, tmp_path / "new", resume_from=tmp_path / "checkpoint_step_3.pt")
    steps = curve(tmp_path / "new")
    assert [(record["step"], record["tokens"]) for record in steps] == [(4, 4 * ROWS * T), (5, 5 * ROWS * T)]
    run(recipe, tmp_path / "ours")
    assert [record["lr"] for record in steps] == [record["lr"] for record in curve(tmp_path / "ours")[3:]]
    said = capfd.readouterr().err
    assert "token 768, row 24 of 32 tokens" in said
    assert "optim.weight_decay: 0.1 on all -> 0 and 0.1" in said


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def spoilt(path: Path, recipe: Recipe, how: str) -> list[str]:
    """Write a file that is spoilt in one way; words that the refusal must hold."""
    tree = earlier_file(path, recipe)
    weights, state = tree["model_state_dict"], tree["optimizer_state_dict"]["state"]
    words = {
        "code": ["would run its code"],
        "truncated": ["truncated or damaged"],
        "no steps": ["global_step is missing"],
        "no optimizer": ["optimizer_state_dict is missing"],
        "missing weight": ["model.layers.1.mlp.up_proj.weight is missing"],
        "unknown weight": ["blocks.0.attn.gate_proj.weight is unknown"],
        "mis-shaped weight": ["blocks.1.mlp.down_proj.weight has shape (3, 3), expected (32, 64)"],
        "mis-shaped moment": ["exp_avg_sq of parameter 5 (blocks.0.attn.q_norm.weight) is (17,), expected shape (16,)"],
        "NaN weight": ["model.layers.1.mlp.up_proj.weight holds NaN or infinity in 1 of"],
        "infinite moment": ["optim.exp_avg_sq.model.layers.0.self_attn.q_norm.weight holds NaN or infinity in 1 of 16"],
        "missing moment": ["no state of parameter 7 (blocks.0.attn.v_norm_layer.weight)"],
        "fewer moments": ["this model's 30 parameters, found 29 parameters"],
        "two groups": ["one parameter group, found 2 groups"],
        "rearranged": ["order of no earlier class"],
        "other count": ["tokens_processed is 2, fewer than the 3 steps"],
        "other rotary base": ["rope_theta = 10000.0, the recipe says model.rope_theta = 1000000.0"],
    }[how]
    group = tree["optimizer_state_dict"]["param_groups"][0]
    if how == "code":
        tree["loss"] = Bomb(path.parent / "exploded")
    elif how in ("no steps", "no optimizer"):
        del tree["global_step" if how == "no steps" else "optimizer_state_dict"]
    elif how == "missing weight":
        del weights["blocks.1.mlp.up_proj.weight"]
    elif how == "unknown weight":
        weights["blocks.0.attn.gate_proj.weight"] = torch.zeros(2, 2)
    elif how == "mis-shaped weight":
        weights["blocks.1.mlp.down_proj.weight"] = torch.zeros(3, 3)
    elif how == "NaN weight":
        weights["blocks.1.mlp.up_proj.weight"][0, 0] = torch.nan
    elif how == "infinite moment":
        state[5]["exp_avg_sq"].view(-1)[0] = torch.inf
    elif how == "mis-shaped moment":
        state[5]["exp_avg_sq"] = torch.zeros(17)
    elif how == "missing moment":
        del state[7]
    elif how == "fewer moments":
        group["params"] = group["params"][:-1]
    elif how == "two groups":
        tree["optimizer_state_dict"]["param_groups"] = [
            {**group, "params": [0]},
            {**group, "params": group["params"][1:]},
        ]
    elif how == "rearranged":
        tree["model_state_dict"] = dict(sorted(weights.items()))
    elif how == "other count":
        tree["tokens_processed"] = 2
    elif how == "other rotary base":
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": T,
            "rope_theta": 1e4,
        }
        (path.parent / "config.json").write_text(json.dumps({"model_type": "argonne2", "logit_softcap": 15.0, **sizes}))
    torch.save(tree, path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    return [path.name, *words]


SPOILT = [
    *(
        "code",
        "truncated",
        "no steps",
        "no optimizer",
        "missing weight",
        "unknown weight",
        "mis-shaped weight",
        "NaN weight",
        "infinite moment",
        "mis-shaped moment",
    ),
    *("missing moment", "fewer moments", "two groups", "rearranged", "other count", "other rotary base"),
]


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_file_is_refused_by_name_with_exit_code_2_and_nothing_is_written(
    how: str, in_order: Nano, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = in_order()
    words = spoilt(tmp_path / "checkpoint_step_3.pt", recipe, how)
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    command = ["pretrain", str(tmp_path / "recipe.toml"), "--run", str(tmp_path / "run")]
    assert main([*command, "--resume-from", str(tmp_path / "checkpoint_step_3.pt")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert all(word in said for word in words), said
    assert not (tmp_path / "exploded").exists()
    left = [path.name for path in (tmp_path / "run").rglob("*")]
    assert not [name for name in left if name.startswith(("checkpoint", "config", "metrics", ".tmp"))]


def test_ids_survive_a_pt_file_and_weights_that_are_not_finite_do_not(
    in_order: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(in_order(), tmp_path / "run", stop_after_step=1)
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["eos_token_id"] is not None
    write_json(checkpoint / "config.json", {**config, "pad_token_id": 7})
    monkeypatch.setattr("argonne.legacy.export_pt.verify_directory", lambda folder: [])  # the config was changed above
    export_pt(tmp_path / "run", tmp_path / "exported")
    import_checkpoint(next((tmp_path / "exported").glob("*.pt")), tmp_path / "imported")
    for folder in ("exported", "imported"):
        written = json.loads((tmp_path / folder / "config.json").read_text())
        assert (written["eos_token_id"], written["pad_token_id"]) == (config["eos_token_id"], 7)

    def damaged(folder: Path) -> dict[str, torch.Tensor]:
        return {**read_checkpoint_tensors(folder), "model.model.norm.weight": torch.tensor([1.0, torch.nan])}

    monkeypatch.setattr("argonne.legacy.export_pt.read_checkpoint_tensors", damaged)
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN or infinity in 1 of 2 places"):
        export_pt(tmp_path / "run", tmp_path / "nan")
    assert not (tmp_path / "nan").exists()


def test_muon_is_refused_by_name_in_both_directions(in_order: Nano, tmp_path: Path) -> None:
    recipe = in_order(**{"optim.name": "muon"})
    earlier_file(tmp_path / "checkpoint_step_3.pt", recipe)
    with pytest.raises(InputError, match=r"optim\.name is muon"):
        run(recipe, tmp_path / "new", resume_from=tmp_path / "checkpoint_step_3.pt")
    run(recipe, tmp_path / "muon", stop_after_step=1)
    with pytest.raises(InputError, match=r"optim\.name is muon"):
        export_pt(tmp_path / "muon", tmp_path / "exported")


def test_what_the_earlier_class_cannot_express_is_refused_by_name(in_order: Nano, tmp_path: Path) -> None:
    cases = {
        "head_dim is 8": {"model.head_dim": "8"},
        "q_norm is False and k_norm True": {"model.q_norm": "false"},
        "layer_types": {"model.layer_types": '["sliding_attention", "full_attention"]'},
        "position_embedding is 'learned'": {"preset": "nano-1.0"},
    }
    for number, (words, overrides) in enumerate(cases.items()):
        preset = overrides.pop("preset", "nano-3.0")
        run(in_order(preset, **overrides), tmp_path / str(number), stop_after_step=1)
        with pytest.raises(InputError, match=words):
            export_pt(tmp_path / str(number), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_an_export_is_complete_or_absent_and_takes_no_ones_place(
    in_order: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = in_order(**{"train.steps": "4", "schedule.decay": "0", "schedule.warmup": "1"})
    run(recipe, tmp_path / "whole")
    with pytest.raises(InputError, match="has no optimizer state"):
        export_pt(tmp_path / "whole" / "final_model", tmp_path / "exported")

    def full(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"checkpoint_step_4\.pt: could not be written"):
            export_pt(tmp_path / "whole", tmp_path / "exported")
    assert not [path for path in (tmp_path / "exported").iterdir() if "checkpoint" in path.name]
    assert Path(export_pt(tmp_path / "whole", tmp_path / "exported")["path"]).is_file()
    with pytest.raises(InputError, match="exists already"):
        export_pt(tmp_path / "whole", tmp_path / "exported")

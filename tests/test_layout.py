"""Names and kinds on disk: what a path is, told once for every reader."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from argonne import layout
from argonne.errors import InputError
from argonne.files import HASH_LIST, seal_directory
from argonne.layout import Kind, kind_of
from argonne.plan import make_plan
from argonne.recipe import load_recipe
from argonne.report.inspect import inspect_path

FOLDERS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "token set": (Kind.TOKEN_SET, ("manifest.json", "sha256.json", "tokens-00000.bin", "tokens-00000.idx")),
    "token set whose plan is still there": (Kind.TOKEN_SET, ("manifest.json", "plan.json", "tokens-00000.bin")),
    "planned, no unit done": (Kind.UNFINISHED_TOKEN_SET, ("plan.json", ".turn")),
    "manifest lost": (Kind.UNFINISHED_TOKEN_SET, ("tokens-00000.bin", "tokens-00000.idx")),
    "tokenizer": (Kind.TOKENIZER, ("tokenizer.json", "tokenizer_config.json")),
    "tokenizer of two files": (Kind.TOKENIZER, ("vocab.json", "merges.txt")),
    "half a tokenizer": (Kind.NOTHING, ("vocab.json",)),
    "run": (Kind.RUN, ("config.toml", "manifest.json", "metrics.jsonl", "compute_plan.json")),
    "run of earlier versions": (Kind.RUN, ("config.toml", "manifest.json", "metrics.jsonl", "plan.json")),
    "run without metrics": (Kind.RUN, ("config.toml", "manifest.json", "run.lock")),
    "run ended before it began": (Kind.RUN, ("config.toml", "run.lock", "compute_plan.json")),
    "run that has metrics only": (Kind.RUN, ("metrics.jsonl",)),
    "checkpoint": (Kind.CHECKPOINT, ("state.json", "config.json", "recipe.toml", "sha256.json")),
    "model folder": (Kind.MODEL_FOLDER, ("config.json", "tokenizer.json", "generation_config.json")),
    "model folder with a config.toml of its owner": (Kind.MODEL_FOLDER, ("config.json", "config.toml")),
    "pickled weights": (Kind.LEGACY_FOLDER, ("config.json", "pytorch_model.bin")),
    "earlier training checkpoint": (Kind.LEGACY_FOLDER, ("config.json", "checkpoint_step_3.pt")),
    "weights without a config": (Kind.NOTHING, ("model.safetensors",)),
    "export for llama.cpp": (Kind.GGUF_EXPORT, ("model.gguf", "argonne_export.json", "README.md")),
    "export for onnxruntime": (Kind.ONNX_EXPORT, ("model.onnx", "model.onnx.data", "argonne_export.json", "README.md")),
    "somebody's files": (Kind.NOTHING, ("notes.txt", "data.json")),
    "empty": (Kind.NOTHING, ()),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_is_known_by_the_names_in_it(case: str, tmp_path: Path) -> None:
    kind, names = FOLDERS[case]
    for name in names:
        (tmp_path / name).write_text("{}")
    assert kind_of(tmp_path) is kind
    assert kind_of(str(tmp_path)) is kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train.bin", Kind.TOKEN_FILE),
        ("megatron.idx", Kind.TOKEN_FILE),
        ("datatrove.ds", Kind.TOKEN_FILE),
        ("documents.json", Kind.TOKEN_FILE),
        ("checkpoint_step_3.pt", Kind.LEGACY_FILE),
        ("weights.pth", Kind.LEGACY_FILE),
        ("text.jsonl", Kind.NOTHING),
        ("README", Kind.NOTHING),
    ],
)
def test_a_file_is_known_by_its_suffix_and_only_where_it_is(name: str, kind: Kind, tmp_path: Path) -> None:
    assert kind_of(tmp_path / name) is Kind.NOTHING
    (tmp_path / name).write_bytes(b"")
    assert kind_of(tmp_path / name) is kind


def test_raw_tokens_and_patterns_are_token_files_wherever_they_lead() -> None:
    assert kind_of("raw-uint16:nowhere/train.bin") is Kind.TOKEN_FILE
    assert kind_of("nowhere/tokens-*.bin") is Kind.TOKEN_FILE
    assert kind_of("nowhere/*.txt") is Kind.NOTHING


def test_a_file_whose_name_looks_like_a_pattern_stands_for_itself(tmp_path: Path) -> None:
    assert layout.is_pattern(tmp_path / "run [1]")
    (tmp_path / "run [1]").mkdir()
    assert not layout.is_pattern(tmp_path / "run [1]")


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("model.layers.0.mlp.up_proj.weight", Kind.MODEL_FOLDER),
        ("blocks.0.mlp.up_proj.weight", Kind.LEGACY_FOLDER),
        ("_orig_mod.blocks.0.mlp.up_proj.weight", Kind.LEGACY_FOLDER),
        ("pipeline_stages.1.0.mlp.up_proj.weight", Kind.LEGACY_FOLDER),
    ],
)
def test_earlier_weights_are_known_by_the_names_of_their_tensors(tensor: str, kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"norm.weight": np.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({tensor: np.ones(2)}, tmp_path / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    assert kind_of(tmp_path) is kind


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\x04\0\0\0\0\0\0\0nope", b"\x02\0\0\0\0\0\0\0[]", b"\x01\0\0\0\0\0\0\0" + b"1"]
)
def test_weights_that_cannot_be_read_leave_a_model_folder_one(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    assert kind_of(tmp_path) is Kind.MODEL_FOLDER


def test_a_checkpoint_that_lost_its_state_is_still_one(tmp_path: Path) -> None:
    for name in ("state.json", "config.json"):
        (tmp_path / name).write_text("{}")
    seal_directory(tmp_path)
    (tmp_path / "state.json").unlink()
    assert kind_of(tmp_path) is Kind.CHECKPOINT
    (tmp_path / "sha256.json").write_text("[1")
    assert kind_of(tmp_path) is Kind.MODEL_FOLDER


def test_the_model_of_a_run_is_its_final_one_else_the_last_checkpoint(tmp_path: Path) -> None:
    assert layout.model_of_run(tmp_path) is None
    checkpoint = tmp_path / layout.checkpoint_name(20)
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    (tmp_path / "checkpoint_last").symlink_to(checkpoint.name)
    assert layout.model_of_run(tmp_path) == checkpoint
    (tmp_path / "final_model").mkdir()
    assert layout.model_of_run(tmp_path) == checkpoint
    (tmp_path / "final_model" / "config.json").write_text("{}")
    assert layout.model_of_run(tmp_path) == tmp_path / "final_model"


@pytest.mark.parametrize("names", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_the_tokenizer_of_a_model_lies_in_its_folder_or_in_one_of_its_name(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    assert layout.tokenizer_of(tmp_path) is None
    (tmp_path / "tokenizer").mkdir()
    for place in (tmp_path / "tokenizer", tmp_path):
        for name in names:
            (place / name).write_text("{}")
        assert layout.tokenizer_of(tmp_path) == place


@pytest.mark.parametrize(
    ("name", "step"), [("checkpoint_step_20", 20), ("checkpoint_step_x", None), ("checkpoint_step_20.pt", None)]
)
def test_a_checkpoints_name_tells_its_step(name: str, step: int | None) -> None:
    assert layout.step_in_name(Path("runs/one") / name) == step


@pytest.mark.parametrize("name", ["compute_plan.json", "plan.json"])
def test_inspect_shows_the_compute_plan_of_a_run_under_its_name_and_its_earlier_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("seed = 1\n")
    (tmp_path / "manifest.json").write_text('{"run_id": "one"}')
    record = {
        "event": "step",
        "step": 3,
        "time": 1.0,
        "tokens": 12288,
        "loss": 2.0,
        "memory_gb": 0.5,
        "tokens_per_second": 9.0,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / name).write_text(json.dumps(make_plan(load_recipe("nano-3.0")).to_dict()))
    rows = {row["name"]: row for row in inspect_path(tmp_path)["plan_against_measured"]}
    assert rows["tokens"]["measured"] == 12288
    assert rows["memory_gb"]["planned"] > 0


def test_a_model_that_is_something_else_of_ours_is_refused_by_its_kind(tmp_path: Path) -> None:
    from argonne.model.load import resolve_model

    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is a token set; expected a run, a checkpoint or a model folder"):
        resolve_model(tmp_path)


def test_no_run_or_model_is_read_as_text_to_evaluate(tokens: Path, tmp_path: Path) -> None:
    from argonne.evaluate.texts import open_texts
    from argonne.tokens.tokenizer import load_tokenizer

    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "samples.md").write_text("text that the model wrote itself")
    with pytest.raises(InputError, match=r"no manifest\.json in this folder, so it is no finished token set"):
        open_texts(tmp_path, load_tokenizer(tokens / "tokenizer"))


def names_of_layout() -> set[str]:
    """Names with a shape of their own; suffixes stand for formats too, and `data` and `tokenizer` are words for other
    things.
    """
    values = [value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str | tuple)]
    flat = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
    return {name for name in flat if isinstance(name, str) and ("." in name[1:] or "_" in name or name.isupper())} - {
        HASH_LIST
    }


def test_no_module_spells_a_name_of_the_layout_itself() -> None:
    package = Path(layout.__file__).parent
    names, found = names_of_layout(), []
    assert {"state.json", "final_model", "metrics.jsonl", "STOPPED", "*.safetensors"} <= names
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package.parent).as_posix()
        if path.name == "layout.py":
            continue
        constants = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        found += [f"{place}:{node.lineno}: {node.value}" for node in constants if node.value in names]
    assert found == []

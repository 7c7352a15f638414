"""Wrong input, as a user meets it: one clear line that names the thing, exit code 2, no traceback, nothing
half-written.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import logging

from argonne.cli import main
from argonne.files import seal_directory

RECIPE = """
base = "nano-3.0"
data = {{ sources = [{{ path = {tokens}, max_epochs = 9 }}], sequence_length = 32 }}
batch = {{ tokens_per_step = 128 }}
train = {{ steps = 4, threads = 1 }}
schedule = {{ warmup = 1 }}
checkpoint = {{ every_steps = 2, sample_tokens = 2 }}
eval = {{ windows = 2 }}
log = {{ tensorboard = false }}
[model]
vocab_size = 512
hidden_size = 32
num_hidden_layers = 2
head_dim = 16
num_attention_heads = 2
num_key_value_heads = 1
"""
Refused = Callable[..., str]
# The handler of transformers' log keeps the stderr of the moment it is made: not that of a test which ends before it.
logging.get_logger()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; returns its message. `notes`: it may say other things before."""

    def run(*arguments: object, notes: bool = False) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        *before, message = captured.err.strip().splitlines()
        assert notes or before == []
        assert message.startswith("argonne: ")
        return message

    return run


@pytest.fixture(scope="module")
def recipe(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(RECIPE.format(tokens=json.dumps(str(tokens))))
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path) -> Path:
    """A finished run of four steps, with checkpoints of the steps 2 and 4."""
    folder = recipe.parent / "trained"
    assert main(["pretrain", str(recipe), "--run", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def other_tokens(recipe: Path) -> Path:
    """The same text under another tokenizer."""
    text = recipe.parent / "other.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 200)
    folder = recipe.parent / "other"
    assert (
        main(["prepare", "--input", str(text), "--train-tokenizer", "290", "--out", str(folder), "--workers", "1"]) == 0
    )
    return folder


RECIPE_FAULTS = {
    "an unknown key": (["--schedule.warmpu", "1"], ["'schedule.warmpu'", "did you mean 'schedule.warmup'?"]),
    "another library's key": (["--optim.learning_rate", "1"], ["'optim.learning_rate'", "did you mean 'optim.lr'?"]),
    "a key without its section": (["--lr", "1"], ["'lr'", "optim.lr"]),
    "a key without a value": (["--optim.lr"], ["optim.lr", "value is missing"]),
    "a value of another type": (["--optim.lr", "fast"], ["optim.lr", "'fast'", "a number"]),
    "a choice that is none": (["--schedule.kind", "linear"], ["schedule.kind", "'linear'", "cosine"]),
    "WSD without decay": (["--schedule.decay", "none"], ["schedule.decay", "0 on purpose"]),
    "a warmup longer than the run": (["--schedule.warmup", "20"], ["schedule.warmup", "20", "4"]),
    "key heads that do not divide": (
        ["--model.num_attention_heads", "3", "--model.num_key_value_heads", "2"],
        ["3", "multiple", "= 2"],
    ),
    "an odd rotary head": (["--model.head_dim", "15"], ["model.head_dim", "15", "even"]),
    "an unknown preset": (["--model.preset", "argonne-3.1"], ["argonne-3.1", "argonne-3.0"]),
    "a model smaller than the vocabulary": (["--model.vocab_size", "300"], ["model.vocab_size", "300", "512"]),
    "a row longer than the corpus": (
        ["--data.sequence_length", "1000000", "--batch.tokens_per_step", "1000000"],
        ["data.sequence_length", "1,000,001"],
    ),
    "a batch that is no multiple of the row": (
        ["--batch.tokens_per_step", "100"],
        ["batch.tokens_per_step", "100", "32"],
    ),
    "a run longer than the data": (["--train.steps", "100000"], ["max_epochs"]),
    "a source that is not there": (["--data.sources", '[{ path = "nowhere" }]'], ["nowhere", "no such file"]),
    "a source by its path alone": (["--data.sources", "nowhere"], ["nowhere", "no such file"]),
    "a source that is no table": (["--data.sources", "[3]"], ["data.sources", "expected a table such as"]),
    "weights that are not there": (["--init-from", "nowhere"], ["nowhere", "no such file"]),
    "a wall time that is none": (["--wall-time", "soon"], ["stop.wall_time", "'soon'", "90m"]),
    "a number below its range": (
        ["--model.num_hidden_layers", "0"],
        ["model.num_hidden_layers", "found 0", "at least 1"],
    ),
    "a share that is none": (["--optim.betas", "[0.9, 1.5]"], ["optim.betas", "found 1.5", "below 1"]),
    "a parallelism that is not built": (["--parallel.async_tensor", "true"], ["parallel.async_tensor", "found true"]),
    "more stages than layers": (["--parallel.pipeline", "99"], ["parallel.pipeline", "found 99", "at most"]),
    "a duration that is none": (["--stop.grace", "soon"], ["stop.grace", "'soon'"]),
    "a stage of another verb": (["--stage", "sft"], ["stage", "'sft'"]),
    "a stray argument": (["stray"], ["stray", "--section.key"]),
}


@pytest.mark.parametrize(("arguments", "expected"), RECIPE_FAULTS.values(), ids=RECIPE_FAULTS)
def test_a_recipe_fault_is_named_and_leaves_no_run_folder(
    arguments: list[str], expected: list[str], recipe: Path, tmp_path: Path, refused: Refused
) -> None:
    message = refused("pretrain", recipe, "--run", tmp_path / "run", *arguments)
    assert [part for part in expected if part not in message] == []
    assert list(tmp_path.iterdir()) == []


def test_heads_that_do_not_divide_the_width_are_refused_without_a_head_dim(
    tokens: Path, tmp_path: Path, refused: Refused
) -> None:
    bare = tmp_path / "bare.toml"
    sizes = "model = { hidden_size = 32, num_hidden_layers = 1, num_attention_heads = 3 }"
    bare.write_text(f"{sizes}\ntrain = {{ steps = 1 }}\nschedule = {{ kind = 'constant' }}\n")
    message = refused("pretrain", bare, "--run", tmp_path / "run")
    assert "model.num_attention_heads: 3 does not divide model.hidden_size = 32" in message


@pytest.mark.parametrize(
    ("name", "part"), [("nano-3.1", "did you mean 'nano-3.0'"), ("nowhere.toml", "no such file"), ("/", "is a folder")]
)
def test_a_recipe_that_is_not_there_is_refused_with_the_packaged_names(name: str, part: str, refused: Refused) -> None:
    message = refused("pretrain", name)
    assert part in message
    assert "argonne-3.0-pretrain" in message


def test_a_forced_attention_kernel_that_cannot_run_is_refused(recipe: Path, tmp_path: Path, refused: Refused) -> None:
    message = refused("pretrain", recipe, "--run", tmp_path / "run", "--train.attention", "flash", notes=True)
    assert "train.attention" in message
    assert "CUDA" in message


def test_a_run_folder_that_is_a_file_is_refused(recipe: Path, refused: Refused) -> None:
    assert "a file is in the way" in refused("pretrain", recipe, "--run", recipe)


def test_a_finished_run_asked_for_another_recipe_says_so(recipe: Path, trained: Path, refused: Refused) -> None:
    message = refused("pretrain", recipe, "--run", trained, "--train.steps", 8)
    assert "train.steps: 4 -> 8" in message
    assert "--resume-from" in message
    assert main(["pretrain", str(recipe), "--run", str(trained)]) == 0


def test_continue_without_weights_is_refused(recipe: Path, refused: Refused) -> None:
    assert "--init-from" in refused("continue", recipe)


PREPARE_FAULTS = {
    "an empty glob": (["--input", "{folder}/*.parquet"], ["matches no file"]),
    "a missing column": (
        ["--input", "{folder}/text.jsonl", "--text-column", "body"],
        ["'body'", "missing 3", "--text-column"],
    ),
    "a missing parquet column": (
        ["--input", "{folder}/text.pq/one.parquet", "--text-column", "body"],
        ["'body'", "it has text"],
    ),
    "a truncated parquet file": (
        ["--input", "{folder}/text.pq/cut.parquet"],
        ["cut.parquet", "not a readable parquet file"],
    ),
    "an unknown kind of file": (["--input", "{folder}/text.docx"], ["text.docx", ".parquet"]),
    "a tokenizer that is not there": (
        ["--input", "{folder}/text.jsonl", "--tokenizer", "nowhere"],
        ["tokenizer nowhere", "no such folder"],
    ),
    "no tokenizer": (["--input", "{folder}/text.jsonl"], ["--tokenizer", "--train-tokenizer"]),
}


@pytest.mark.parametrize("case", PREPARE_FAULTS)
def test_a_prepare_fault_is_named_and_leaves_no_folder(
    case: str, tmp_path: Path, tokens: Path, refused: Refused
) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "text.pq").mkdir()
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n' * 3)
    (tmp_path / "text.docx").write_text("one")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "text.pq" / "one.parquet")
    (tmp_path / "text.pq" / "cut.parquet").write_bytes((tmp_path / "text.pq" / "one.parquet").read_bytes()[:-20])
    arguments, expected = PREPARE_FAULTS[case]
    if "tokenizer" not in case:
        arguments = [*arguments, "--tokenizer", str(tokens / "tokenizer")]
    message = refused(
        "prepare", *(item.format(folder=tmp_path) for item in arguments), "--out", tmp_path / "out", "--workers", 1
    )
    assert [part for part in expected if part not in message] == []
    assert not (tmp_path / "out").exists()


def _truncated(folder: Path) -> None:
    tensors = next(folder.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-100])


def _without_state(folder: Path) -> None:
    (folder / "state.json").unlink()


def _unreadable_state(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": ')


def _of_a_later_version(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format_version": 9}))
    seal_directory(folder)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_truncated, ".safetensors"),
        (_without_state, "state.json"),
        (_unreadable_state, "state.json"),
        (_of_a_later_version, "format version 9"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_resume_generate_and_inspect(
    damage: Callable[[Path], None], expected: str, trained: Path, recipe: Path, tmp_path: Path, refused: Refused
) -> None:
    folder = tmp_path / "checkpoint_step_2"
    shutil.copytree(trained / "checkpoint_step_2", folder)
    damage(folder)
    for message in (
        refused("pretrain", recipe, "--run", tmp_path / "run", "--resume-from", folder),
        refused("generate", folder, "--prompt", "One"),
        refused("inspect", folder),
        refused("continue", recipe, "--run", tmp_path / "run", "--init-from", folder),
    ):
        assert folder.name in message
        assert expected in message
    assert not (tmp_path / "run").exists()


def test_what_is_no_checkpoint_at_all_is_refused_by_resume_generate_and_inspect(
    recipe: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"model": 1}))
    (tmp_path / "notes.txt").write_text("no model")
    for name in ("empty", "pickle.pt", "notes.txt", "nowhere"):
        path = tmp_path / name
        for message in (
            refused("pretrain", recipe, "--run", tmp_path / "run", "--resume-from", path),
            refused("generate", path, "--prompt", "One"),
            refused("inspect", path),
        ):
            assert name in message
    assert "argonne import" in refused("generate", tmp_path / "pickle.pt", "--prompt", "One")
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_architecture_is_refused_by_name(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    for message in (
        refused("generate", tmp_path, "--prompt", "One"),
        refused("inspect", tmp_path),
        refused("eval", tmp_path),
    ):
        assert "'llama'" in message
        assert "LlamaForCausalLM" in message


def test_an_exported_model_that_is_not_whole_is_refused(trained: Path, tmp_path: Path, refused: Refused) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(trained / "final_model", tmp_path / name))

    cut, no_weights, no_tokenizer, other_sizes = map(copy, ("cut", "no_weights", "no_tokenizer", "other_sizes"))
    _truncated(cut)
    (no_weights / "model.safetensors").unlink()
    for path in no_tokenizer.glob("tokenizer*"):
        path.unlink()
    config = json.loads((other_sizes / "config.json").read_text())
    (other_sizes / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    assert "truncated or damaged" in refused("generate", cut, "--prompt", "One")
    assert "no safetensors file" in refused("generate", no_weights, "--prompt", "One")
    assert "no tokenizer in it" in refused("generate", no_tokenizer, "--prompt", "One")
    # transformers reports mismatched shapes in words of its own before the message
    assert "has shape (512, 32), expected (512, 48)" in refused("generate", other_sizes, "--prompt", "One", notes=True)
    for folder in (cut, no_weights, no_tokenizer, other_sizes):
        assert folder.name in refused("inspect", folder)


def test_a_checkpoint_of_another_model_is_refused_by_the_field_that_was_given(
    trained: Path, recipe: Path, tmp_path: Path, refused: Refused
) -> None:
    message = refused(
        "pretrain",
        recipe,
        "--run",
        tmp_path / "run",
        "--resume-from",
        trained / "checkpoint_step_2",
        "--model.intermediate_size",
        96,
        notes=True,
    )
    assert "model.intermediate_size: found 96, but the weights that training starts with have 384" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["--resume-from", "--init-from"])
def test_data_of_another_tokenizer_is_refused_for_trained_weights(
    how: str, trained: Path, recipe: Path, other_tokens: Path, tmp_path: Path, refused: Refused
) -> None:
    sources = f"[{{ path = {json.dumps(str(other_tokens))}, max_epochs = 9 }}]"
    weights = trained / "checkpoint_step_2"
    message = refused(
        "continue", recipe, "--run", tmp_path / "run", how, weights, "--data.sources", sources, notes=True
    )
    assert "is not the one the weights were trained with" in message
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_refuses_data_of_another_tokenizer_even_where_the_sources_may_change(
    recipe: Path, other_tokens: Path, tmp_path: Path, refused: Refused
) -> None:
    assert main(["pretrain", str(recipe), "--run", str(tmp_path / "run"), "--wall-time", "0.001"]) == 3
    sources = f"[{{ path = {json.dumps(str(other_tokens))}, max_epochs = 9 }}]"
    again = ("pretrain", recipe, "--run", tmp_path / "run", "--data.sources", sources)
    assert "--allow data.sources" in refused(*again, notes=True)
    assert "is not the one the weights were trained with" in refused(*again, "--allow", "data.sources", notes=True)


def test_evaluation_on_tokens_of_another_tokenizer_is_refused(
    trained: Path, other_tokens: Path, refused: Refused
) -> None:
    assert "another tokenizer" in refused("eval", trained, "--data", other_tokens)

"""A sound model goes up in one commit; each planted defect is named and nothing is pushed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from argonne import layout
from argonne.cli import main
from argonne.evaluate.run import evaluate
from argonne.files import read_json, seal_directory
from argonne.model.load import load_model
from argonne.publish.behaviour import expectations_of
from argonne.publish.card import front_matter
from argonne.publish.checks import CHECKS, Staged
from argonne.publish.export import export_model
from argonne.publish.fresh_publish import look
from argonne.publish.proof import expected_file
from argonne.publish.signature import verify
from argonne.publish.stage import PublishOptions, stage
from argonne.recipe import load_recipe
from argonne.report.inspect import inspect_path
from argonne.stages.pretrain import run
from tests.publish.hub import StandIn
from tests.publish.test_signature import make_key, public_of
from tests.tuning import conversations, write

NAME = "someone/small"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model: a pretrained one, tuned on rows as long as its context."""
    place = tmp_path_factory.mktemp("tuned")
    source = write(place / "chat.jsonl", conversations(60))
    given = {
        "model.init_from": json.dumps(str(base)),
        "data.sources": f"[{{ path = {json.dumps(str(source))}, max_epochs = 9 }}]",
        "data.sequence_length": "128",
        "batch.tokens_per_step": "512",
        "train.epochs": "none",
        "train.steps": "4",
        "train.threads": "1",
        "schedule.warmup": "1",
        "checkpoint.sample_prompt": '""',
        "eval.every_steps": "2",
        "eval.windows": "2",
        "chat.hold_out": "0.1",
        "log.every_steps": "1",
        "log.tensorboard": "false",
    }
    run(load_recipe("nano-3.0-sft", given), place / "run")
    return place / "run"


@pytest.fixture(scope="session")
def staged_folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `publish --dry-run --out` leaves of it, every check passed."""
    out = tmp_path_factory.mktemp("staged") / "further" / "small"  # made where it is missing
    assert main(["publish", str(trained), "--repo", NAME, "--dry-run", "--license", "mit", "--out", str(out)]) == 0
    return out


def pushes(hub: StandIn) -> list[str]:
    """Calls that change anything."""
    return [call for call in hub.calls if not call.startswith("GET ")]


def test_a_sound_model_goes_up_in_one_commit_with_its_evaluation(
    hub: StandIn, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(trained, ["sums"], device="cpu", limit=3, tokens=4, out=tmp_path / "measured")
    capsys.readouterr()
    key = make_key(tmp_path)
    given = ["publish", str(trained), "--repo", NAME, "--private", "--results", str(tmp_path / "measured"), "--json"]
    assert main([*given, "--sign", str(key)]) == 0
    said = capsys.readouterr()
    repository = hub.repositories[NAME]
    assert [message for _, message, _ in repository.commits] == ["initial commit", "argonne publish of small"]
    assert repository.private
    assert json.loads(said.out)["commit"] == repository.commits[-1][0]
    assert [line.split()[0] for line in said.err.splitlines() if line.startswith("  ")] == ["ok"] * 9
    files = hub.files(NAME)
    assert {WEIGHTS, "config.json", "images/loss.png", "chat_template.jinja", "modeling_argonne.py"} <= {*files}
    card = files["README.md"].decode()
    assert "| sums | exact match | 0.00 % | 0.00 | 3 questions |" in card
    assert "| sft | 4 |" in card
    about = front_matter(card)
    assert about is not None
    assert about["tags"] == ["argonne", "argonne2", "conversational"]
    assert not [path for path in trained.parent.iterdir() if path.name.startswith(".tmp")]
    for name, data in files.items():
        (tmp_path / "online" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "online" / name).write_bytes(data)
    assert verify(tmp_path / "online", public_of(key)) == []
    assert inspect_path(tmp_path / "online")["problems"] == []


Plant = Callable[[Path], None]


def in_json(name: str, **values: Any) -> Plant:
    def plant(folder: Path) -> None:
        read = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**read, **values}))

    return plant


def without(name: str, key: str) -> Plant:
    def plant(folder: Path) -> None:
        read = json.loads((folder / name).read_text())
        del read[key]
        (folder / name).write_text(json.dumps(read))

    return plant


def in_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Plant:
    def plant(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return plant


def in_text(name: str, old: str, new: str) -> Plant:
    def plant(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return plant


def swapped_tokenizer(folder: Path) -> None:
    read = json.loads((folder / "tokenizer.json").read_text())
    words = read["model"]["vocab"]
    one, other = [word for word in words if len(word) == 3][:2]
    words[one], words[other] = words[other], words[one]
    (folder / "tokenizer.json").write_text(json.dumps(read))


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def moved(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] *= 1.001


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


DEFECTS: dict[str, tuple[Plant, str]] = {
    "missing auto_map": (without("config.json", "auto_map"), "auto_map names None as AutoConfig"),
    "wrong EOS": (in_json("generation_config.json", eos_token_id=7), "ends an answer at [7], training at"),
    "stale context": (in_json("config.json", max_position_embeddings=4096), "max_position_embeddings is 4096"),
    "unused window": (
        in_json("config.json", layer_types=["full_attention"] * 2),
        "sliding_window is 64, and no layer is sliding_attention",
    ),
    "swapped tokenizer": (swapped_tokenizer, "tokenizer.json is not the training's"),
    "truncated shard": (truncated, "model.safetensors is truncated or damaged"),
    "dtype lie": (in_json("config.json", dtype="bfloat16"), "is float32, config.json says bfloat16"),
    "pickle file": (lambda folder: torch.save({}, folder / "extra.json"), "extra.json is a pickle"),
    "absolute path": (
        in_text("README.md", "# small", "# small\n\nFrom /home/somebody/runs/first."),
        "README.md names '/home/somebody/runs/first.'",
    ),
    "token in a file": (
        in_json("generation_config.json", comment="hf_" + "a1" * 12),
        "generation_config.json holds a token of the Hub (hf_a1a1...)",
    ),
    "wrong parameter count in the card": (
        in_text("README.md", " parameters, trained", "000 parameters, trained"),
        "it says '35,200000 parameters', the model has",
    ),
    "failing snippet": (
        in_text("README.md", "return_dict=True", "return_dict=False"),
        "the card's Python of line",
    ),
    "moved logits": (in_weights(moved), "model.norm.weight is not the tensor of the model that was trained"),
    "NaN in a weight": (in_weights(not_finite), "model.layers.1.mlp.up_proj.weight holds NaN or infinity"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_planted_defect_is_named_and_nothing_is_pushed(
    defect: str, hub: StandIn, trained: Path, staged_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, told = DEFECTS[defect]
    folder = shutil.copytree(staged_folder, tmp_path / "small")
    plant(folder)
    seal_directory(folder)  # so that the hashes do not tell
    assert main(["publish", str(folder), "--repo", NAME, "--source", str(trained)]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "nothing was pushed" in said
    assert pushes(hub) == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def staged_from(folder: Path, trained: Path, place: Path) -> Staged:
    place.mkdir(parents=True, exist_ok=True)
    staged = stage(folder, place / "small", PublishOptions(NAME, str(trained)))
    seal_directory(staged.folder)
    return staged


def test_a_flipped_byte_is_found_wherever_it_lies(staged_folder: Path, trained: Path, tmp_path: Path) -> None:
    staged = staged_from(staged_folder, trained, tmp_path)
    draw = random.Random(0)
    names = [WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    header = 8 + int.from_bytes((staged.folder / WEIGHTS).read_bytes()[:8], "little")
    sizes = [(staged.folder / name).stat().st_size for name in names]
    for number in range(1000):
        name = draw.choices(names, sizes if number % 2 else [1] * len(names))[0]
        path = staged.folder / name
        whole = path.read_bytes()
        place = draw.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        assert list(CHECKS["files"](staged)), (name, place)
        # Not by their hashes alone: the tensors and the words are the training's.
        if name == WEIGHTS and place >= header:
            assert list(CHECKS["weights"](staged)), (name, place)
        elif name not in (WEIGHTS, "tokenizer_config.json"):
            assert list(CHECKS["tokenizer"](staged)), (name, place)
        path.write_bytes(whole)
    assert list(CHECKS["files"](staged)) == []


FAULTS: dict[str, tuple[Plant, str]] = {
    "another epsilon": (in_json("config.json", rms_norm_eps=0.3), "logits behind a cache differ"),
    "another window": (in_json("config.json", sliding_window=16), "logits behind a cache differ"),
    "one end of two": (in_json("generation_config.json", eos_token_id=[0]), "an answer goes on behind the id"),
    "a template of another model": (in_text("chat_template.jinja", "<|im_start|>", "<|im_end|>"), "chat template: "),
    "no pad token": (without("tokenizer_config.json", "pad_token"), "tokenizer: it has no pad token"),
    "another length": (in_json("tokenizer_config.json", model_max_length=7), "model_max_length is 7, the context 128"),
    "other words": (swapped_tokenizer, "tokenizer: '"),
    "none": (lambda folder: None, ""),
}


@pytest.fixture(scope="module")
def expected(staged_folder: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a reader must find in the staged folder, as `behaviour` writes it down."""
    staged = staged_from(staged_folder, trained, tmp_path_factory.mktemp("expected"))
    with expected_file(staged.source.model, expectations_of(staged)) as file:
        yield file


@pytest.mark.parametrize("fault", FAULTS)
def test_readers_would_see_each_fault_too(
    fault: str, staged_folder: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here in this process; that it runs in a fresh one is shown above."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(staged_folder, tmp_path / "small")
    plant, told = FAULTS[fault]
    plant(folder)
    found = look(str(folder), str(expected), json.loads(expected.with_suffix(".json").read_text()))
    assert any(told in line for line in found) if told else found == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["nothing"], "nothing: no such folder"),
        (["texts"], "texts: is nothing of ours; expected an export, a run or a model folder"),
        (["small", "--repo", "small"], "--repo: found 'small', expected ORG/NAME"),
        (["small", "--source", "gone"], "gone, which is not on this disk"),
        (["small"], "its record does not say where its model lies; name it with --source MODEL"),
        (["small", "--source", "{base}"], "is of other weights"),
        (["small", "--source", "{trained}", "--out", "texts"], "texts exists already"),
        (["small", "--source", "{trained}", "--results", "texts"], "results.json: no such file"),
    ],
)
def test_bad_input_is_told_in_a_line(
    given: list[str],
    told: str,
    base: Path,
    trained: Path,
    staged_folder: Path,
    hub: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(staged_folder, "small")
    Path("texts").mkdir()
    words = [word.format(base=base, trained=trained) for word in given]
    assert main(["publish", *words, *([] if "--repo" in words else ["--repo", NAME])]) == 2
    assert told in capsys.readouterr().err
    assert pushes(hub) == []


def test_results_of_another_model_are_refused(
    base: Path, trained: Path, hub: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(base, ["bpb"], device="cpu", limit=200, out=tmp_path / "other")
    given = ["publish", str(trained), "--repo", NAME, "--results", str(tmp_path / "other"), "--dry-run"]
    assert main(given) == 2
    assert "results.json: is of other weights" in capsys.readouterr().err


def test_what_would_do_nothing_or_leave_an_old_signature_is_refused(
    staged_folder: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(staged_folder, tmp_path / "small")
    given = ["publish", str(folder), "--repo", NAME, "--source", str(trained), "--dry-run"]
    assert main([*given, "--license", "mit"]) == 2
    assert "--license: README.md is a card of yours" in capsys.readouterr().err
    (folder / layout.SIGNATURE).write_text("{}")
    assert main(given) == 2
    assert "is signed, and what is published is staged anew" in capsys.readouterr().err


def test_a_card_of_ones_own_is_kept(staged_folder: Path, trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(staged_folder, tmp_path / "small")
    card = (folder / layout.MODEL_CARD).read_text() + "\nWritten by hand.\n"
    (folder / layout.MODEL_CARD).write_text(card)
    staged = staged_from(folder, trained, tmp_path / "again")
    assert (staged.folder / layout.MODEL_CARD).read_text() == card
    assert list(CHECKS["files"](staged)) == []


@pytest.mark.parametrize("change", [{}, {"rope_theta": 5e5}, {"rms_norm_eps": 1e-5}])
def test_the_configuration_of_a_llama_is_compared_with_what_other_engines_read_of_it(
    change: dict[str, float], nano: Any, tmp_path: Path
) -> None:
    few = {"data.sequence_length": "256", "batch.tokens_per_step": "1024", "train.steps": "6", "eval.every_steps": "0"}
    run(nano("nano-2.5", **few, **{"checkpoint.sample_prompt": '""'}), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "export", kind="native")
    staged = staged_from(tmp_path / "export", tmp_path / "run", tmp_path / "staged")
    in_json("config.json", **change)(staged.folder)
    found = [what.split()[0] for what, _ in CHECKS["configuration"](staged)]
    assert found == list(change)


PUBLISHED = """---
library_name: transformers
---
{count} parameters

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch

model_path = "PursuitOfDataScience/Argonne-1.5"

# 1) Load the custom Argonne model with trust_remote_code=True
model = AutoModelForCausalLM.from_pretrained(
    model_path,
    trust_remote_code=True
)

# 2) Load the tokenizer
tokenizer = AutoTokenizer.from_pretrained(model_path)

# 3) Inference
prompt = "The meaning of life is "
inputs = tokenizer(prompt, return_tensors="pt")

# call generate with typical HF params
outputs = model.generate(**inputs, max_length=150, do_sample=True, top_k=50, top_p=0.95, temperature=0.7)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
```
"""


def parameters_of(model: Path) -> int:
    return load_model(model).model.num_parameters()


def test_a_base_model_of_the_first_generation_passes_as_a_stock_class(nano: Any, tmp_path: Path) -> None:
    more = {"data.sequence_length": "256", "batch.tokens_per_step": "1024", "train.steps": "6"}
    run(nano("nano-1.0", **more, **{"eval.every_steps": "0", "checkpoint.sample_prompt": '""'}), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "export", kind="native")
    given = ["publish", str(tmp_path / "export"), "--repo", "someone/first", "--dry-run", "--out"]
    assert main([*given, str(tmp_path / "staged")]) == 0
    card = (tmp_path / "staged" / "README.md").read_text()
    published = (
        "outputs = model.generate(**inputs, max_length=150, do_sample=True, top_k=50, top_p=0.95, temperature=0.7)"
    )
    assert published in card
    assert "trust_remote_code" not in card
    # What was published with 1.5, word for word.
    (tmp_path / "staged" / "README.md").write_text(PUBLISHED.format(count=f"{parameters_of(tmp_path / 'run'):,}"))
    again = ["publish", str(tmp_path / "staged"), "--repo", "PursuitOfDataScience/Argonne-1.5", "--dry-run"]
    assert main([*again, "--source", str(tmp_path / "run")]) == 0
    assert read_json(tmp_path / "staged" / "config.json")["architectures"] == ["GPT2LMHeadModel"]

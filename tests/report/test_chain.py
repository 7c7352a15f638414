"""`argonne inspect` walks back from an export to the tokens, verifies each link, and names the one that is broken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from argonne.cli import main
from argonne.config import Recipe
from argonne.evaluate.run import evaluate
from argonne.files import read_json, seal_directory, write_json
from argonne.layout import EXPORT_RECORD, FINAL_MODEL, LAST, RESULTS
from argonne.publish.export import export_model
from argonne.publish.merge import open_mixer
from argonne.recipe import load_recipe
from argonne.report.inspect import inspect_path, render
from argonne.stages.pretrain import run
from argonne.stages.sft import SFT
from argonne.tokens.tokenizer import load_tokenizer, train_tokenizer
from tests.tuning import conversations, write

EXPORT, CHAT, BASE = Path("exports/chat"), Path("runs/chat"), Path("runs/base")


@pytest.fixture(scope="module")
def made(tokens: Path, nano: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a whole chain, each thing named by its path in it: a token set, a base run of two steps, a
    chat run from it, an export of the chat run, and measurements of the export and of both runs.
    """
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tokens, folder / "set")
    write(folder / "chat.jsonl", conversations(60))
    write(folder / "text.jsonl", [{"text": f"Some text, number {number}."} for number in range(9)])
    few = {"train.steps": "2", "schedule.warmup": "0", "log.tensorboard": "false", "eval.every_steps": "0"}
    with chdir(folder):
        data = "[{ path = 'set', max_epochs = 9 }]"
        sizes = {"model.max_position_embeddings": "128", "schedule.decay": "0", "schedule.min_ratio": "none"}
        run(nano(**few, **sizes, **{"data.sources": data, "checkpoint.sample_prompt": ""}), BASE)
        more = {
            "model.init_from": json.dumps(str(BASE)),
            "data.sources": "[{ path = 'chat.jsonl', max_epochs = 9 }]",
            "data.sequence_length": "128",
            "batch.tokens_per_step": "512",
            "train.epochs": "none",
            "train.threads": "1",
            "chat.hold_out": "0",
            "chat.probes": "0",
            "checkpoint.sample_tokens": "4",
        }
        run(load_recipe("nano-3.0-sft", few | more), CHAT, stage=SFT)
        export_model(CHAT, EXPORT)
        for name, model in (("export", EXPORT), ("chat", CHAT), ("base", BASE), ("last", CHAT / LAST)):
            evaluate(model, ["bpb"], "text.jsonl", device="cpu", out=Path("measured", name))
    return folder


@pytest.fixture
def chain(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to break, and the working directory."""
    folder = shutil.copytree(made, tmp_path / "chain", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def links(path: Path, *results: str) -> dict[str, dict[str, Any]]:
    """The links by what they are and their name."""
    found = inspect_path(path, [Path("measured", name) for name in results])["chain"]
    return {f"{link['what']} {link['name']}": link for link in found}


def problems(path: Path = EXPORT, *results: str) -> list[str]:
    found: list[str] = inspect_path(path, [Path("measured", name) for name in results])["problems"]
    return found


def change_weight(folder: Path, *, sealed: bool) -> Path:
    """Flip a bit of one number of the weights; `sealed`: and write the list of hashes anew, as a forger would."""
    file = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")  # the format: a length, that much JSON, the numbers
    tensors = json.loads(content[8:header])
    (name,) = (name for name in tensors if name.endswith("embed_tokens.weight") and "optim" not in name)
    content[header + tensors[name]["data_offsets"][0]] ^= 1
    file.write_bytes(content)
    if sealed:
        seal_directory(folder)
    return file


def swap_tokenizer(folder: Path, where: Path) -> None:
    """Put another tokenizer of the same size into a folder, and seal `folder` anew."""
    size = load_tokenizer(where).vocab_size
    other = load_tokenizer(train_tokenizer([f"Other words {number}. " for number in range(4000)], size, Path("other")))
    assert other.fingerprint != load_tokenizer(where).fingerprint
    other.save(where)
    seal_directory(folder)


def test_a_sound_chain_verifies_from_the_export_to_the_tokens(chain: Path) -> None:
    found = links(EXPORT, "export", "chat")
    assert list(found) == [
        "export exports/chat",
        "final model runs/chat/final_model",
        "checkpoint runs/chat/checkpoint_step_2",
        "run runs/chat",
        "conversations chat.jsonl",
        "tokenizer of runs/chat",
        "final model runs/base/final_model",
        "checkpoint runs/base/checkpoint_step_2",
        "run runs/base",
        "token set set",
        "tokenizer of runs/base",
        "evaluation measured/export",
        "evaluation measured/chat",
    ]
    assert all(link["verified"] for link in found.values())
    assert {name: link["not_checked"] for name, link in found.items() if link["not_checked"]} == {
        "conversations chat.jsonl": ["the files themselves"],
        "evaluation measured/export": ["its numbers"],
        "evaluation measured/chat": ["its numbers"],
    }
    assert problems(EXPORT, "export", "chat") == []


def test_what_is_said_to_be_verified_was(chain: Path) -> None:
    found = links(EXPORT)
    weights, tokenizer = (read_json(EXPORT / EXPORT_RECORD)["source"][name] for name in ("weights", "tokenizer"))
    assert found["final model runs/chat/final_model"]["verified"] == [
        "its files by sha256",
        f"the fingerprint of its weights {weights[:12]} as exports/chat says",
        f"the fingerprint of its tokenizer {tokenizer[:12]} as exports/chat says",
    ]
    told = read_json(EXPORT / EXPORT_RECORD)["source"]
    assert found["run runs/chat"]["verified"] == [
        f"id {told['run_id']} as its manifest says",
        f"id {told['run_id']} as exports/chat says",
        "step 2 as exports/chat says",
        f"tokens {told['tokens']:,} as exports/chat says",
    ]
    assert found["token set set"]["verified"][:2] == ["its files by sha256", "the tokens that runs/base read"]
    assert "its weights, tensor by tensor those of runs/chat/final_model" in found["export exports/chat"]["verified"]


@pytest.mark.parametrize("path", [CHAT, CHAT / LAST, CHAT / "checkpoint_step_2", CHAT / FINAL_MODEL])
def test_the_chain_of_a_run_a_checkpoint_and_a_final_model_goes_as_far(path: Path, chain: Path) -> None:
    found = links(path, "chat", "last")
    assert {"run runs/chat", "run runs/base", "token set set", "conversations chat.jsonl"} < set(found)
    assert problems(path, "chat", "last") == []


def test_results_of_a_final_model_are_of_the_checkpoint_that_it_was_made_of(chain: Path) -> None:
    """Under other names in other files, of another fingerprint: compared tensor by tensor."""
    told = links(CHAT / LAST, "chat")["evaluation measured/chat"]["verified"]
    assert told == [
        "it is of the weights of runs/chat/final_model, tensor by tensor those of runs/chat/checkpoint_last"
    ]
    change_weight(CHAT / FINAL_MODEL, sealed=True)
    assert "is of other weights" in problems(CHAT / LAST, "chat")[-1]


def test_a_merge_goes_back_through_each_of_its_parts(chain: Path) -> None:
    shutil.copytree(BASE / FINAL_MODEL, "plain")
    open_mixer([str(BASE), "plain"]).save(Path("mixed"), [0.5, 0.5])
    found = links(Path("mixed"))
    assert next(iter(found)) == "merge mixed"
    assert {"run runs/base", "token set set", "model plain"} < set(found)
    assert found["model plain"]["not_checked"][-1] == "where it comes from, which nothing in it tells"
    assert problems(Path("mixed")) == []


def test_a_changed_weight_of_the_export_is_named(chain: Path) -> None:
    file = change_weight(EXPORT, sealed=False)
    assert problems() == [f"{file} has other bytes than were written (sha256 differs)"]


def test_a_changed_weight_of_an_export_that_was_sealed_anew_is_named(chain: Path) -> None:
    change_weight(EXPORT, sealed=True)
    (problem,) = problems()
    assert "exports/chat: 1 of its tensors are not those of runs/chat/final_model: " in problem


def test_a_changed_weight_of_the_final_model_is_named(chain: Path) -> None:
    file = change_weight(CHAT / FINAL_MODEL, sealed=False)
    assert problems()[0] == f"{file} has other bytes than were written (sha256 differs)"


def test_a_final_model_of_other_weights_that_was_sealed_anew_is_named(chain: Path) -> None:
    change_weight(CHAT / FINAL_MODEL, sealed=True)
    told = problems()
    assert told[0].startswith("runs/chat/final_model: the fingerprint of its weights is ")
    assert told[0].endswith(" as exports/chat says")
    assert "checkpoint_step_2: 1 of its tensors are not those of runs/chat/final_model" in told[1]


def test_a_changed_weight_of_a_checkpoint_is_named(chain: Path) -> None:
    file = change_weight(CHAT / "checkpoint_step_2", sealed=False)
    assert problems() == [f"{file} has other bytes than were written (xxh3_128 differs)"]
    seal_directory(CHAT / "checkpoint_step_2")
    assert "checkpoint_step_2: 1 of its tensors are not those of" in problems()[0]


def test_a_damaged_state_ends_the_chain_there_and_is_not_believed(chain: Path) -> None:
    state = CHAT / "checkpoint_step_2" / "state.json"
    state.write_text(state.read_text().replace('"step": 2', '"step": 3'))
    assert "state.json has other bytes than were written" in problems()[0]
    found = links(EXPORT)
    assert list(found)[-1] == "run runs/chat"
    assert found["run runs/chat"]["verified"] == []


def test_a_run_of_the_same_name_that_is_another_is_named(chain: Path) -> None:
    shutil.rmtree(CHAT)
    shutil.copytree(BASE, CHAT, symlinks=True)
    told = "\n".join(problems())
    assert "runs/chat/final_model: the fingerprint of its weights is " in told
    assert "runs/chat: id is " in told


def test_a_parent_of_the_same_name_that_is_another_is_named(chain: Path) -> None:
    shutil.rmtree(BASE)
    shutil.copytree(CHAT, BASE, symlinks=True)
    assert any(problem.startswith("runs/base: id is ") for problem in problems())


def test_a_run_whose_manifest_tells_another_id_than_its_checkpoint_is_named(chain: Path) -> None:
    manifest = CHAT / "manifest.json"
    write_json(manifest, read_json(manifest) | {"run_id": "another"})
    assert problems()[0].endswith("but another as its manifest says")


def test_a_changed_token_shard_is_named(chain: Path) -> None:
    shard = Path("set/tokens-00000.bin")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert problems() == [f"{shard} has other bytes than were written (sha256 differs)"]


def test_a_token_set_of_other_tokens_is_named(chain: Path) -> None:
    """Sound in itself, but not what was trained on."""
    write(Path("more.jsonl"), [{"text": f"More text, number {number}."} for number in range(900)])
    shutil.move("set/tokenizer", "tokenizer")
    shutil.rmtree("set")
    assert main(["prepare", "--input", "more.jsonl", "--tokenizer", "tokenizer", "--out", "set", "--workers", "1"]) == 0
    assert problems() == ["set: holds other tokens than runs/base was trained on"]


@pytest.mark.parametrize(
    ("folder", "where", "told"),
    [
        (EXPORT, EXPORT, "exports/chat: the fingerprint of its tokenizer is"),
        (CHAT / FINAL_MODEL, CHAT / FINAL_MODEL, "runs/chat/final_model: the fingerprint of its tokenizer is"),
        (CHAT / "checkpoint_step_2", CHAT / "checkpoint_step_2/tokenizer", "checkpoint_step_2: its tokenizer is"),
        (Path("set"), Path("set/tokenizer"), "set: the fingerprint of its tokenizer is"),
    ],
)
def test_a_swapped_tokenizer_is_named_where_it_lies_even_if_sealed_anew(
    folder: Path, where: Path, told: str, chain: Path
) -> None:
    swap_tokenizer(folder, where)
    assert any(told in problem for problem in problems())


def test_a_changed_unit_of_rendered_conversations_is_named(chain: Path) -> None:
    (file,) = (CHAT / "conversations").glob("*/unit-00000/train.bin")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    (problem,) = problems()
    assert f"{file.name} has other bytes" in problem


def test_results_of_another_model_are_named_even_if_it_is_an_ancestor(chain: Path) -> None:
    (problem,) = problems(EXPORT, "base")
    assert problem == "measured/base/results.json: is of other weights (runs/base/final_model), not of exports/chat"
    shutil.rmtree(BASE)
    (problem,) = problems(EXPORT, "base")
    assert problem.startswith("measured/base/results.json: is of other weights (runs/base, fingerprint ")


def test_results_are_known_by_the_record_where_the_model_is_gone(chain: Path) -> None:
    shutil.rmtree(CHAT)
    record, results = EXPORT / EXPORT_RECORD, Path("measured/chat", RESULTS)
    told = read_json(record)
    # The files of such an export are those of its source: of another kind they are not.
    write_json(record, told | {"source": told["source"] | {"weights": "f" * 64}})
    write_json(results, read_json(results) | {"weights": "f" * 64})
    seal_directory(EXPORT)
    link = links(EXPORT, "chat")["evaluation measured/chat"]
    assert link["verified"] == ["it is of the weights of runs/chat, as exports/chat says"]


def test_results_that_do_not_tell_their_weights_are_not_checked(chain: Path) -> None:
    file = Path("measured/chat", RESULTS)
    write_json(file, {name: value for name, value in read_json(file).items() if name != "weights"})
    link = links(EXPORT, "chat")["evaluation measured/chat"]
    assert (link["verified"], link["problems"]) == ([], [])
    assert link["not_checked"] == ["of which weights it is, which the results of earlier versions do not tell"]


def test_what_is_not_on_this_disk_is_said_not_to_be(chain: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    facts = inspect_path(chain / EXPORT)
    assert [link["what"] for link in facts["chain"]] == ["export", "model"]
    assert facts["chain"][1]["not_checked"] == [f"it is not on this disk (looked for from {tmp_path})"]
    assert facts["chain"][1]["verified"] == facts["problems"] == []
    assert "no problem was found; what was not checked is named above" in render(facts)


@pytest.mark.parametrize("gone", ["set", "runs/base", "runs/chat/conversations"])
def test_a_link_that_is_gone_is_not_checked_and_no_problem(gone: str, chain: Path) -> None:
    shutil.rmtree(gone)
    assert problems() == []
    assert "not on this disk" in render(inspect_path(EXPORT))


def test_an_export_without_hashes_or_source_says_what_it_cannot_tell(chain: Path) -> None:
    os.remove(EXPORT / "sha256.json")
    record = read_json(EXPORT / EXPORT_RECORD)
    write_json(EXPORT / EXPORT_RECORD, {name: value for name, value in record.items() if name != "source"})
    (link,) = inspect_path(EXPORT)["chain"]
    assert link["verified"] == []
    assert link["not_checked"] == [
        "its files, of which no list of hashes lies there",
        "what it was made of, which the records of earlier versions do not tell",
    ]


def test_a_run_that_went_on_keeps_the_checkpoint_its_child_began_with_or_says_that_it_does_not(
    chain: Path, nano: Callable[..., Recipe]
) -> None:
    few = {"log.tensorboard": "false", "eval.every_steps": "0", "checkpoint.sample_prompt": "", "schedule.warmup": "0"}
    recipe = few | {"data.sources": "[{ path = 'set', max_epochs = 9 }]", "train.steps": "4"}
    run(nano(**recipe), Path("runs/parent"), stop_after_step=2)
    run(nano(**recipe, **{"model.init_from": "'runs/parent'"}), Path("runs/child"))
    run(nano(**recipe), Path("runs/parent"))
    child = Path("runs/child")
    assert problems(child) == []
    assert "checkpoint runs/parent/checkpoint_step_2" in links(child)
    assert links(child)["run runs/parent"]["not_checked"] == []
    shutil.rmtree("runs/parent/checkpoint_step_2")
    assert problems(child) == []
    told = links(child)["run runs/parent"]["not_checked"]
    assert told == ["its weights of step 2, which it does not keep: it is at step 4"]


def test_the_command_prints_a_line_for_each_link_and_its_exit_code_tells_a_broken_one(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", str(EXPORT), "--results", "measured/export"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "    token set set: verified: its files by sha256, the tokens that runs/base read" in printed
    assert (
        "    evaluation measured/export: verified: it is of the weights of exports/chat; not checked: its n" in printed
    )
    assert main([*words, "--results", "measured/base", "--json"]) == 2
    said = capsys.readouterr()
    assert [link["what"] for link in json.loads(said.out)["chain"]][-2:] == ["evaluation", "evaluation"]
    assert "does not verify: measured/base/results.json: is of other weights" in said.err


def test_results_are_of_models_and_lie_where_they_are_said_to(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "set/tokenizer", "--results", "measured/chat"]) == 2
    assert "--results: set/tokenizer is a tokenizer; results are of a model" in capsys.readouterr().err
    assert main(["inspect", str(EXPORT), "--results", "set"]) == 2
    assert "set/results.json: no such file" in capsys.readouterr().err


def test_weights_that_are_not_a_number_do_not_count_as_equal(chain: Path) -> None:
    file = sorted(EXPORT.glob("*.safetensors"))[0]
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, file, {"format": "pt"})
    seal_directory(EXPORT)
    assert f"{file}: model.embed_tokens.weight holds NaN or infinity" in problems()[0]

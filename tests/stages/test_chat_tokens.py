"""Weights whose tokenizer cannot end a turn become a chat model: tokens, rows, records, resume, export, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from argonne.cli import main
from argonne.config import Recipe
from argonne.data.chat import ChatTemplate, Conversation, Message
from argonne.errors import InputError
from argonne.layout import CONTENT_TOKENS, TURN_TOKENS
from argonne.legacy.convert import import_checkpoint
from argonne.model.load import mean_row
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.recipe import load_recipe
from argonne.report.inspect import inspect_path, render
from argonne.report.records import read_metrics
from argonne.stages.pretrain import run
from argonne.stages.sft import SFT
from argonne.tokens.tokenizer import load_tokenizer, train_tokenizer
from argonne.train.checkpoint import LAST
from tests.legacy.family import spelled_out
from tests.stages.test_sft import conversations, write
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
Chat = Callable[..., Recipe]
ADDED = [*TURN_TOKENS, *CONTENT_TOKENS]
ENTRIES = 400
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def bare_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's help topics in ids of a tokenizer as of 1.x."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("bare")
    text = folder / "topics.jsonl"
    text.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)[:20]))
    tokenizer = train_tokenizer((topics[name] for name in sorted(topics)[:20]), ENTRIES, folder / "bpe", bare=True)
    return prepare(PrepareOptions(input=(str(text),), out=folder / "set", tokenizer=str(tokenizer), workers=1))


@pytest.fixture(scope="module")
def weights(nano: Nano, bare_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs of two steps: `weights("nano-1.0", rows=400)` has no row to spare, and each is trained once."""
    folder = tmp_path_factory.mktemp("weights")

    def make(preset: str = "nano-1.0", rows: int = ENTRIES) -> Path:
        place = folder / f"{preset}-{rows}"
        if not place.exists():
            overrides = {
                "data.sources": f"[{{ path = {json.dumps(str(bare_tokens))}, max_epochs = 9 }}]",
                "model.vocab_size": str(rows),
                "model.max_position_embeddings": "128",
                "model.intermediate_size": "128",  # four times as wide, as in 1.x
                "train.steps": "2",
                "schedule.warmup": "0",
                "schedule.decay": "0",
                "checkpoint.sample_prompt": "",
                "eval.windows": "0",
            }
            run(nano(preset, **overrides), place)
        return place

    return make


@pytest.fixture
def chat(weights: Callable[..., Path], tmp_path: Path) -> Chat:
    """Makes recipes that tune a 1.x-like model, or what `start` names, on 60 conversations."""
    source = write(tmp_path / "chat.jsonl", conversations(60))

    def make(name: str = "nano-1.0-sft", start: Path | None = None, path: Path = source, **overrides: str) -> Recipe:
        given = {
            "model.preset": "none",
            "model.init_from": json.dumps(str(start or weights())),
            "data.sources": f"[{{ path = {json.dumps(str(path))}, max_epochs = 9 }}]",
            "data.sequence_length": "128",
            "batch.tokens_per_step": "512",
            "train.epochs": "none",
            "train.steps": "4",
            "train.threads": "1",
            "schedule.warmup": "1",
            "checkpoint.every_steps": "2",
            "checkpoint.sample_tokens": "2",
            "eval.every_steps": "0",
            "eval.windows": "0",
            "log.every_steps": "1",
            "log.tensorboard": "false",
        }
        return load_recipe(name, {**given, **overrides})

    return make


def tune(recipe: Recipe, folder: Path, **how: Any) -> Path:
    assert run(recipe, folder, stage=SFT, **how).outcome.step == (how.get("stop_after_step") or recipe.train.steps)
    return folder


def rows_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: table for name, table in load_file(folder / "model.safetensors").items() if name in (EMBEDDING, HEAD)}


# ----------------------------------------------------------------------------------------------------- tokens and rows


def test_a_stage_adds_the_tokens_says_so_and_keeps_a_record(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tune(chat(), tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("added to the tokenizer")]
    assert "<|im_start|> 400, <|im_end|> 401, <think> 402" in line
    assert "embedding 400 -> 408 rows" in line
    recorded = json.loads((folder / "manifest.json").read_text())["added_tokens"]
    assert recorded["ids"] == {token: ENTRIES + number for number, token in enumerate(ADDED)}
    assert recorded["rows"] == [400, 408]
    (event,) = read_metrics(folder).of("added_tokens")
    assert {name: event[name] for name in recorded} == recorded
    assert "<|im_end|>: 401" in render(inspect_path(folder))
    assert inspect_path(folder / "tokenizer")["vocab_size"] == 408
    assert not inspect_path(folder)["problems"]


@pytest.mark.parametrize(("preset", "tables"), [("nano-1.0", [EMBEDDING, HEAD]), ("nano-3.0", [EMBEDDING])])
def test_new_rows_of_embedding_and_head_begin_as_the_mean_of_their_own_others(
    preset: str, tables: list[str], weights: Callable[..., Path], chat: Chat, tmp_path: Path
) -> None:
    still = {"optim.lr": "1e-30", "optim.weight_decay": "0.0"}
    folder = tune(chat(start=weights(preset), **still), tmp_path / "run")
    before, after = rows_of(weights(preset) / "final_model"), rows_of(folder / "final_model")
    assert sorted(before) == sorted(after) == sorted(tables)
    for name, table in after.items():
        assert len(table) == 408
        assert torch.equal(table[:400], before[name])
        torch.testing.assert_close(table[400:], before[name].double().mean(0).float().expand(8, -1), rtol=0, atol=1e-9)
    config = json.loads((folder / "final_model" / "config.json").read_text())
    assert config["vocab_size"] == 408


def test_a_table_with_spare_rows_keeps_its_size_and_they_begin_as_the_mean_too(
    weights: Callable[..., Path], chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = weights("nano-3.0", rows=512)
    folder = tune(chat(start=start, **{"optim.lr": "1e-30", "optim.weight_decay": "0.0"}), tmp_path / "run")
    before, after = rows_of(start / "final_model")[EMBEDDING], rows_of(folder / "final_model")[EMBEDDING]
    assert "the embedding stays at 512 rows" in capsys.readouterr().err
    assert torch.equal(after[:400], before[:400])
    assert torch.equal(after[408:], before[408:])
    torch.testing.assert_close(after[400:408], before[:400].double().mean(0).float().expand(8, -1), rtol=0, atol=1e-9)


def test_a_table_with_too_few_spare_rows_grows_by_the_rest(
    weights: Callable[..., Path], chat: Chat, tmp_path: Path
) -> None:
    folder = tune(chat(start=weights("nano-1.0", rows=403)), tmp_path / "run")
    assert json.loads((folder / "manifest.json").read_text())["added_tokens"]["rows"] == [403, 408]
    assert {len(table) for table in rows_of(folder / "final_model").values()} == {408}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_mean_of_many_rows_is_taken_in_double_precision(dtype: torch.dtype) -> None:
    table = torch.randn(9000, 3, generator=torch.Generator().manual_seed(1)).to(dtype) + 100
    torch.testing.assert_close(mean_row(table), table.double().mean(0), rtol=1e-14, atol=0)


def test_weights_with_fewer_rows_than_their_tokenizer_are_refused(
    weights: Callable[..., Path], chat: Chat, tmp_path: Path
) -> None:
    start = shutil.copytree(weights() / "final_model", tmp_path / "start")
    (start / "tokenizer.json").unlink()
    tree = json.loads((weights() / "final_model" / "tokenizer.json").read_text())
    tree["model"]["vocab"] |= {f"more{number}": ENTRIES + number for number in range(9)}
    (tmp_path / "larger").mkdir()
    (tmp_path / "larger" / "tokenizer.json").write_text(json.dumps(tree))
    recipe = chat(start=start, **{"data.tokenizer": json.dumps(str(tmp_path / "larger"))})
    with pytest.raises(InputError, match=r"model\.vocab_size: found 400, but the data's tokenizer has 417 entries"):
        tune(recipe, tmp_path / "run")


# ------------------------------------------------------------------------------------------------------ where it starts


def as_run(base: Path, folder: Path) -> Path:
    return base


def as_checkpoint(base: Path, folder: Path) -> Path:
    return base / LAST


def as_exported(base: Path, folder: Path) -> Path:
    return base / "final_model"


def as_bfloat16(base: Path, folder: Path) -> Path:
    shutil.copytree(base / "final_model", folder)
    file = folder / "model.safetensors"
    save_file({name: table.bfloat16() for name, table in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def as_imported(base: Path, folder: Path) -> Path:
    """Through a folder as the earlier code of 1.5 wrote it."""
    legacy = folder.with_name("legacy")
    legacy.mkdir()
    today = load_file(base / "final_model" / "model.safetensors")
    tables = {old: today[name] for old, name in spelled_out("1.5").items()}
    tables["position_embedding"] = tables["position_embedding"][None]
    save_file(tables, legacy / "model.safetensors")
    sizes = {"n_embd": 32, "n_head": 2, "n_layer": 2, "block_size": 128, "vocab_size": ENTRIES, "dropout": 0.1}
    (legacy / "config.json").write_text(json.dumps({"model_type": "argonne", **sizes}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / "final_model" / name, legacy / name)
    import_checkpoint(legacy, folder)
    return folder


@pytest.mark.parametrize("form", [as_run, as_checkpoint, as_exported, as_bfloat16, as_imported])
def test_any_form_of_the_weights_can_be_started_from(
    form: Callable[[Path, Path], Path], weights: Callable[..., Path], chat: Chat, tmp_path: Path
) -> None:
    folder = tune(chat(start=form(weights(), tmp_path / "start")), tmp_path / "run")
    assert {len(table) for table in rows_of(folder / "final_model").values()} == {408}


def test_a_run_that_was_stopped_is_the_one_that_was_not(chat: Chat, tmp_path: Path) -> None:
    whole = tune(chat(), tmp_path / "whole")
    cut = tune(chat(), tmp_path / "cut", stop_after_step=2)
    kept = (cut / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    recorded = json.loads((cut / "manifest.json").read_text())["added_tokens"]
    tune(chat(), cut)
    assert stored(whole / LAST) == stored(cut / LAST)
    assert curve(whole) == curve(cut)
    assert (cut / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == kept
    assert json.loads((cut / "manifest.json").read_text())["added_tokens"] == recorded
    assert len(read_metrics(cut).of("added_tokens")) == 1


@pytest.mark.parametrize("reader", ["every-rank", "rank-0"])
def test_two_ranks_train_the_batches_of_one(chat: Chat, tmp_path: Path, reader: str) -> None:
    calm = {"model.attention_dropout": "0.0", "model.hidden_dropout": "0.0"}  # each rank draws its own
    one = tune(chat(**calm), tmp_path / "one")
    asked = {**calm, "parallel.nproc": "2", "parallel.timeout": "60s", "data.reader": json.dumps(reader)}
    two = tune(chat(**asked), tmp_path / "two")
    for left, right in zip(curve(one), curve(two), strict=True):
        assert left == pytest.approx(right, rel=1e-4)


def test_a_run_goes_on_when_the_weights_it_began_with_are_gone(
    weights: Callable[..., Path], chat: Chat, tmp_path: Path
) -> None:
    start = shutil.copytree(weights() / "final_model", tmp_path / "start")
    folder = tune(chat(start=start), tmp_path / "run", stop_after_step=2)
    shutil.rmtree(start)
    tune(chat(start=start), folder)
    assert json.loads((folder / "manifest.json").read_text())["added_tokens"]["rows"] == [400, 408]


def test_the_whole_state_of_such_a_run_begins_another(chat: Chat, tmp_path: Path) -> None:
    first = tune(chat(), tmp_path / "first")
    longer = {"train.steps": "6"}
    second = tune(chat(**longer), tmp_path / "second", resume_from=first / "checkpoint_step_2")
    assert {len(table) for table in rows_of(second / "final_model").values()} == {408}
    assert json.loads((second / "manifest.json").read_text())["added_tokens"]["rows"] == [408, 408]


def test_the_whole_state_of_running_text_is_refused(weights: Callable[..., Path], chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--resume-from .*run of stage pretrain, and sft reads.*give --init-from it"):
        tune(chat(), tmp_path / "run", resume_from=weights() / LAST)
    with pytest.raises(InputError, match=r"argonne import .*\.pt --out DIR`, then --init-from DIR"):
        tune(chat(), tmp_path / "run", resume_from=tmp_path / "checkpoint_step_9.pt")


def test_the_whole_state_of_a_model_without_the_tokens_is_refused(chat: Chat, tmp_path: Path) -> None:
    first = tune(chat(**{"chat.template": '"plain"'}), tmp_path / "plain")
    with pytest.raises(InputError, match=r"--resume-from: .*no rows for <\|im_start\|>.*--init-from"):
        tune(chat(), tmp_path / "run", resume_from=first / "checkpoint_step_2", allow=["data.sources"])


def test_a_damaged_tokenizer_of_the_run_is_told(chat: Chat, tmp_path: Path) -> None:
    folder = tune(chat(), tmp_path / "run", stop_after_step=2)
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("<think>", "<thank>"))
    with pytest.raises(InputError, match=r"tokenizer\.json has other bytes.*remove the folder"):
        tune(chat(), folder)
    shutil.rmtree(folder / "tokenizer")
    tune(chat(), folder)


@pytest.mark.parametrize("started", [False, True], ids=["a new run", "its own run"])
def test_another_tokenizer_is_refused_though_it_gets_the_same_tokens(started: bool, chat: Chat, tmp_path: Path) -> None:
    other = train_tokenizer(["other words in another order " * 9], 300, tmp_path / "other", bare=True)
    if started:
        tune(chat(), tmp_path / "run", stop_after_step=2)
    recipe, allowed = chat(**{"data.tokenizer": json.dumps(str(other))}), ["data", "data.sources"]
    with pytest.raises(InputError, match="is not the one the weights were trained"):
        tune(recipe, tmp_path / "run", allow=allowed)
    if started:
        tune(chat(), tmp_path / "run")


# -------------------------------------------------------------------------------------------------------- what it needs


def test_the_plain_template_adds_nothing(chat: Chat, tmp_path: Path) -> None:
    folder = tune(chat(**{"chat.template": '"plain"'}), tmp_path / "run")
    assert {len(table) for table in rows_of(folder / "final_model").values()} == {400}
    assert not (folder / "tokenizer").exists()
    assert "added_tokens" not in json.loads((folder / "manifest.json").read_text())


def test_a_tokenizer_that_ends_turns_gets_thoughts_only_where_they_are_trained(
    weights: Callable[..., Path], chat: Chat, tmp_path: Path
) -> None:
    """As Qwen2.5's, with which 2.0 was trained."""
    start = shutil.copytree(weights("nano-3.0", rows=512) / "final_model", tmp_path / "start")
    tree = json.loads((start / "tokenizer.json").read_text())
    for number, token in enumerate(TURN_TOKENS):
        entry = {"id": ENTRIES + number, "content": token, "special": True, "normalized": False}
        tree["added_tokens"].append({**entry, "single_word": False, "lstrip": False, "rstrip": False})
    (start / "tokenizer.json").write_text(json.dumps(tree))
    folder = tune(chat(start=start), tmp_path / "sft")
    assert not (folder / "tokenizer").exists()
    thoughts = write(tmp_path / "thoughts.jsonl", conversations(40, think=True))
    folder = tune(chat("nano-3.0-cot-sft", folder, thoughts), tmp_path / "cot")
    recorded = json.loads((folder / "manifest.json").read_text())["added_tokens"]
    assert recorded["ids"] == {token: 402 + number for number, token in enumerate(CONTENT_TOKENS)}
    assert recorded["rows"] == [512, 512]


def test_a_later_stage_adds_nothing_more(chat: Chat, tmp_path: Path) -> None:
    first = tune(chat(), tmp_path / "sft")
    thoughts = write(tmp_path / "thoughts.jsonl", conversations(40, think=True))
    second = tune(chat("nano-3.0-cot-sft", first, thoughts), tmp_path / "cot")
    assert "added_tokens" not in json.loads((second / "manifest.json").read_text())
    assert not (second / "tokenizer").exists()
    tokenizers = [load_tokenizer(folder / "final_model").fingerprint for folder in (first, second)]
    assert tokenizers[0] == tokenizers[1]


def test_rows_longer_than_the_learned_positions_are_refused(chat: Chat, tmp_path: Path) -> None:
    longer = {"data.sequence_length": "256"}
    with pytest.raises(InputError, match=r"max_position_embeddings: found 256, .* have 128"):
        tune(chat(**longer), tmp_path / "run")


def test_a_dry_run_tells_the_rows_that_the_run_will_have(
    chat: Chat, tmp_path: Path, weights: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["sft", "nano-1.0-sft", "--init-from", str(weights()), "--data.sources", str(tmp_path / "chat.jsonl")]
    more = ["--data.sequence_length", "128", "--run", str(tmp_path / "run"), "--dry-run"]
    assert main([*asked, *more]) == 0
    assert "\nvocab_size = 408" in capsys.readouterr().out
    assert main([*asked, *more, "--chat.template", "plain"]) == 0
    assert "\nvocab_size = 400" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_with_a_hole_ends_with_exit_code_2(
    weights: Callable[..., Path], chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = shutil.copytree(weights("nano-1.0", rows=512) / "final_model", tmp_path / "start")
    tree = json.loads((start / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    gone = max(vocabulary, key=vocabulary.get)
    vocabulary["hole"] = vocabulary.pop(gone) + 9
    tree["model"]["merges"] = [merge for merge in tree["model"]["merges"] if "".join(merge) != gone]
    (start / "tokenizer.json").write_text(json.dumps(tree))
    asked = ["sft", "nano-1.0-sft", "--init-from", str(start), "--data.sources", str(tmp_path / "chat.jsonl")]
    assert main([*asked, "--data.sequence_length", "128", "--run", str(tmp_path / "run")]) == 2
    assert "its vocabulary has holes" in capsys.readouterr().err
    assert not (tmp_path / "run" / "tokenizer").exists()


# ----------------------------------------------------------------------------------------------------------- the export


@pytest.mark.parametrize("preset", ["nano-1.0", "nano-3.0"])
def test_transformers_loads_it_renders_our_ids_and_stops_at_the_turn_end(
    preset: str, weights: Callable[..., Path], chat: Chat, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = tune(chat(start=weights(preset)), tmp_path / "run") / "final_model"
    how: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
    theirs, model = AutoTokenizer.from_pretrained(final, **how), AutoModelForCausalLM.from_pretrained(final, **how)
    messages = [{"role": "system", "content": "Sums."}, {"role": "user", "content": "What is 1 + 2?\n\nSay it."}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    template = ChatTemplate(load_tokenizer(final))
    turns = tuple(Message(turn["role"], turn["content"]) for turn in messages)
    assert list(rendered) == template.prompt(Conversation(turns)).tolist()

    def ended(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -9.0).index_fill(1, torch.tensor([template.turn_end_id]), 9.0)

    said = model.generate(torch.tensor([rendered]), max_new_tokens=5, do_sample=False, logits_processor=[ended])
    assert said[0, len(rendered) :].tolist() == [template.turn_end_id]

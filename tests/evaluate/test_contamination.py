"""Items of a measurement that stand in what the model, or an ancestor of it, was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from argonne.cli.command import main
from argonne.config import Recipe
from argonne.evaluate import lineage
from argonne.evaluate.contamination import contamination_of, lines
from argonne.evaluate.lineage import sources_of
from argonne.evaluate.requests import Task
from argonne.evaluate.run import evaluate
from argonne.layout import CONVERSATIONS, FINAL_MODEL
from argonne.prepare.options import PrepareOptions
from argonne.prepare.prepare import prepare
from argonne.publish.export import export_model
from argonne.publish.merge import open_mixer
from argonne.stages.pretrain import run
from argonne.stages.sft import SFT
from tests.tuning import conversations, write

# Items: of 14 words of their own, but for the last, of 5.
ITEMS = [" ".join(f"{word}{number}" for word in "abcdefghijklmn") for number in range(6)] + ["one two three four five"]
FILLER = [" ".join(f"filler{number}x{word}" for word in range(40)) for number in range(30)]
IN_FIRST, IN_SECOND, ACROSS, IN_CHAT = ITEMS[:4]
Find = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def make_set(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str]], Path]:
    def make(texts: Sequence[str]) -> Path:
        folder = tmp_path_factory.mktemp("set")
        write(folder / "text.jsonl", [{"text": text} for text in texts])
        return prepare(PrepareOptions((str(folder / "text.jsonl"),), folder / "set", tokens / "tokenizer", workers=1))

    return make


@pytest.fixture(scope="module")
def first_set(make_set: Callable[[Sequence[str]], Path]) -> Path:
    planted = f"Before it: {IN_FIRST.upper().replace(' ', ', ')}. After it."
    half = len(ACROSS) // 2
    return make_set([*FILLER, planted, f"filler {ACROSS[:half]}", f"{ACROSS[half:]} filler"])


@pytest.fixture(scope="module")
def train(nano: Callable[..., Recipe]) -> Callable[..., Path]:
    """A run of two steps on a token set, from the weights of another where one is given."""

    def make(folder: Path, tokens: Path, source: Path | None = None, **how: Any) -> Path:
        keys = {
            "data.sources": f"[{{ path = {json.dumps(str(tokens))}, max_epochs = 9 }}]",
            "model.max_position_embeddings": "128",
            "train.steps": "2",
            "schedule.warmup": "0",
            "schedule.decay": "0",
            "schedule.min_ratio": "none",
            "checkpoint.sample_prompt": "",
            "eval.every_steps": "0",
        }
        run(
            nano(**keys | ({"model.init_from": json.dumps(str(source))} if source else {}) | how.pop("keys", {})),
            folder,
            **how,
        )
        return folder

    return make


@pytest.fixture(scope="module")
def ancestor(first_set: Path, train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "first", first_set)


@pytest.fixture
def second(make_set: Callable[[Sequence[str]], Path], train: Callable[..., Path], ancestor: Path) -> Path:
    """A run that goes on from the ancestor's weights, on tokens of its own."""
    folder = ancestor.parent / "second"
    return folder if folder.exists() else train(folder, make_set([*FILLER, f"so {IN_SECOND}!"]), ancestor)


@pytest.fixture
def find(tmp_path: Path) -> Find:
    """What --contamination says of lambada on the items."""
    data = tmp_path / "lambada_test.jsonl"
    write(data, [{"text": text} for text in ITEMS])

    def found(model: Path) -> dict[str, Any]:
        values = evaluate(model, ["lambada"], data, device="cpu", contamination=lambda read, total: None)["tasks"][
            "lambada"
        ]
        assert len(values["items"]) == len(ITEMS)
        return {**values["contamination"], "right": [item["correct"] for item in values["items"]]}

    return found


def test_items_in_the_sets_of_a_run_and_of_its_ancestor_are_named_those_across_documents_are_not(
    second: Path, ancestor: Path, first_set: Path, find: Find
) -> None:
    found = find(second)
    assert found["items"] == [0, 1]
    assert found["found_in"][0] == [str(first_set)]
    assert found["not_checked"] == []
    assert {one["source"]: one["documents"] for one in found["checked"]} == {
        str(first_set): 33,
        found["found_in"][1][0]: 31,
    }
    assert found["too_short"] == 1
    assert find(ancestor)["items"] == [0]


def test_an_item_is_found_by_one_part_alone_where_it_is_short_or_has_no_spaces(
    make_set: Callable[[Sequence[str]], Path], train: Callable[..., Path], tmp_path: Path
) -> None:
    class Asked:
        name = "asked"

        def texts(self) -> list[tuple[str, ...]]:
            short = "how many eggs do the sixteen ducks lay"
            return [(short, "forty two of them"), ("中国的首都是哪里请从以下选项中选择", "北京"), ("what is it", "tea")]

    planted = ["Q: How many eggs do the sixteen ducks lay? A: none", "问：中国的首都是哪里？请从以下选项中选择！"]
    folder = train(tmp_path / "run", make_set([*FILLER, *planted]))
    results = {"asked": {"items": [{"correct": True}] * 3}}
    found = contamination_of(folder, cast(Sequence[Task], [Asked()]), results)["asked"]
    assert (found["items"], found["too_short"]) == ([0, 1], 1)


def test_the_scores_with_and_without_the_found_items_are_those_of_counting_by_hand(second: Path, find: Find) -> None:
    found = find(second)
    right = np.array(found["right"], dtype=float)
    for name, part in (("with", right), ("without", right[2:])):
        assert found[name]["questions"] == len(part)
        assert found[name]["accuracy"] == pytest.approx(part.mean())
        assert found[name]["standard_error"] == pytest.approx(part.std() / np.sqrt(len(part) - 1))


def test_a_set_that_is_gone_or_holds_other_tokens_is_not_checked(
    make_set: Callable[[Sequence[str]], Path], train: Callable[..., Path], find: Find, tmp_path: Path
) -> None:
    tokens, other = make_set([*FILLER, IN_FIRST]), make_set(FILLER)
    folder = train(tmp_path / "run", tokens)
    assert find(folder)["items"] == [0]
    tokens.rename(tokens.with_name("moved"))
    found = find(folder)
    assert (found["checked"], found["items"], found["without"]) == ([], [], None)
    assert [one["source"] for one in found["not_checked"]] == [str(tokens)]
    assert "no such" in found["not_checked"][0]["why"]
    assert lines(found)[0].strip() == "contamination: not checked"
    other.rename(tokens)
    assert "holds other tokens" in find(folder)["not_checked"][0]["why"]


def test_conversations_are_checked_as_they_were_rendered_else_in_their_files(
    second: Path, first_set: Path, chat: Callable[..., Recipe], find: Find, tmp_path: Path
) -> None:
    asked = {"messages": [{"role": "user", "content": f"Say {IN_CHAT}"}, {"role": "assistant", "content": "No."}]}
    source = write(tmp_path / "planted.jsonl", [*conversations(60), asked])
    folder = tmp_path / "chat"
    run(
        chat(
            path=source,
            **{
                "model.init_from": json.dumps(str(second)),
                "eval.every_steps": "0",
                "chat.hold_out": "0",
                "chat.probes": "0",
            },
        ),
        folder,
        stage=SFT,
    )
    write(source, conversations(3))  # what it holds now is not what was trained on
    found = find(folder)
    assert found["items"] == [0, 1, 3]
    assert found["found_in"][2] == [str(source)]
    assert {one["source"]: one["documents"] for one in found["checked"]}[str(source)] == 61
    shutil.rmtree(folder / CONVERSATIONS)
    assert find(folder)["items"] == [0, 1]
    write(source, [asked])
    assert find(folder)["items"] == [0, 1, 3]
    source.unlink()
    found = find(folder)
    assert found["items"] == [0, 1]
    assert [one["source"] for one in found["not_checked"]] == [str(source)]


def test_the_run_of_a_checkpoint_that_was_resumed_from_is_found_beside_or_not_checked(
    make_set: Callable[[Sequence[str]], Path], train: Callable[..., Path], ancestor: Path, tmp_path: Path
) -> None:
    start = shutil.copytree(ancestor, tmp_path / "start", symlinks=True)
    longer = train(
        tmp_path / "longer",
        make_set(FILLER),
        resume_from=start / "checkpoint_step_2",
        keys={"train.steps": "4"},
        allow=["data.sources"],
    )
    names = [source.name for source in sources_of(longer) if not source.why]
    assert len(names) == 2
    shutil.rmtree(start)
    assert sorted(source.why[:20] for source in sources_of(longer)) == [
        "",
        "holds other tokens t",
        "is not on this disk,",
    ]


def test_a_merge_has_the_sources_of_its_parts_an_export_has_none(
    ancestor: Path, second: Path, find: Find, tmp_path: Path
) -> None:
    open_mixer([str(ancestor), str(second)]).save(tmp_path / "merged", [0.5, 0.5])
    assert find(tmp_path / "merged")["items"] == [0, 1]
    assert find(second / FINAL_MODEL)["items"] == [0, 1]
    export_model(second, tmp_path / "exported")
    found = find(tmp_path / "exported")
    assert found["checked"] == []
    assert "model folder" in found["not_checked"][0]["why"]


def test_what_an_ancestor_read_after_its_weights_were_taken_is_not_in_the_lineage(
    make_set: Callable[[Sequence[str]], Path], train: Callable[..., Path], ancestor: Path, tmp_path: Path
) -> None:
    steps = {"train.steps": "4"}
    start = train(tmp_path / "start", make_set([*FILLER, IN_FIRST]), keys=steps, stop_after_step=2)
    child = train(tmp_path / "child", make_set(FILLER), start)
    before = {source.name for source in sources_of(child)}
    assert len(before) == 2
    later = make_set([*FILLER, IN_SECOND]).rename(tmp_path / "later")
    train(start, later, keys=steps, allow=["data.sources"])
    assert str(later) in {source.name for source in sources_of(start)}
    assert {source.name for source in sources_of(child)} <= before


def test_a_run_id_that_is_another_one_now_is_not_taken_for_the_ancestor(
    ancestor: Path, second: Path, make_set: Callable[[Sequence[str]], Path], train: Callable[..., Path], tmp_path: Path
) -> None:
    start = shutil.copytree(ancestor, tmp_path / "start", symlinks=True)
    child = train(tmp_path / "child", make_set(FILLER), start)
    shutil.rmtree(start)
    shutil.copytree(second, start, symlinks=True)
    assert [source.why[:12] for source in sources_of(child) if source.why] == ["holds the ru"]


@pytest.mark.parametrize("at", [0, 14, 30])
def test_a_long_document_is_read_in_pieces_that_lose_no_words(
    at: int, ancestor: Path, make_set: Callable[[Sequence[str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lineage, "TOKENS_AT_ONCE", 256)
    monkeypatch.setattr(lineage, "OVERLAP", 100)
    text = " ".join(f"w{number}" for number in range(300))
    tokens = lineage.open_tokens(make_set([*FILLER[:at], text, *FILLER[at:]]))
    reader = lineage.load_tokenizer(tokens.path)
    documents = [list(pieces) for pieces, _ in lineage._of_stream(tokens.train, reader, None)]
    assert len(documents) == 31
    assert len(documents[at]) > 2
    for number in range(300 - 13):
        run_of_words = " ".join(f"w{number + word}" for word in range(13))
        assert any(f"{run_of_words} " in f"{piece} " for piece in documents[at]), number


def test_tokens_without_document_ends_are_cut_at_the_end_of_text(ancestor: Path, first_set: Path) -> None:
    stream = lineage.open_tokens(first_set)
    reader = lineage.load_tokenizer(first_set)
    bare = lineage.TokenStream([lineage.open_tokens(str(file)).train.shards[0] for file in first_set.glob("*.bin")])
    told = [list(pieces) for pieces, _ in lineage._of_stream(stream.train, reader, None)]
    assert reader.eos_id is not None
    assert [list(pieces) for pieces, _ in lineage._of_stream(bare, reader, reader.eos_id)] == told


def test_contamination_of_tasks_without_items_is_refused(second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(second), "--tasks", "bpb,probes", "--contamination"]) == 2
    assert "--contamination: is for --tasks gsm8k" in capsys.readouterr().err


def test_the_command_names_items_and_sources_and_keeps_them(
    second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "lambada_test.jsonl", [{"text": text} for text in ITEMS])
    words = ["eval", str(second), "--tasks", "lambada", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*words, "--contamination"]) == 0
    told = capsys.readouterr().out
    assert "contamination: 2 of 7 items found: 0 (" in told
    assert "1 items not found are too short to check" in told
    kept = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["lambada"]["contamination"]
    assert kept["items"] == [0, 1]

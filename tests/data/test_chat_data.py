"""Conversations as the data of a run: masks, boundaries, resume, shares of ranks."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argonne.config import BatchChange, BatchSection, SourceSection
from argonne.data import packing
from argonne.data.chat_data import ConversationData, open_conversations
from argonne.errors import InputError
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer
from tests.data.rows import global_rows
from tests.data.test_rendered import row, write
from tests.tokensets import words

LENGTH = 192


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources; each answer says which conversation it is of."""
    folder = tmp_path_factory.mktemp("conversations")
    for name, count in (("a", 60), ("b", 40)):
        rows = [row(words(n % 7 + 1, n), f"{name} {n} " + words(n % 11, n), "And?", "No.") for n in range(count)]
        write(folder / f"{name}.jsonl", rows)
    return folder


def opened(
    folder: Path,
    tokenizer: TextTokenizer,
    names: str = "ab",
    weights: Sequence[float] = (3, 1),
    max_epochs: float = 50,
    rows: int = 4,
    seed: int = 1,
    state: dict[str, Any] | None = None,
    steps: tuple[BatchChange, ...] = (),
    length: int = LENGTH,
    allow: frozenset[str] = frozenset(),
    hold_out: float = 0.0,
) -> ConversationData:
    sources = [
        SourceSection(path=str(folder / f"{name}.jsonl"), weight=weight, max_epochs=max_epochs)
        for name, weight in zip(names, weights, strict=False)
    ]
    batch = BatchSection(tokens_per_step=rows * length, steps=steps)
    return open_conversations(
        sources,
        tokenizer=tokenizer,
        sequence_length=length,
        cache=folder / "cache",
        batch=batch,
        seed=seed,
        state=state,
        allow=allow,
        hold_out=hold_out,
    )


def documents(arrays: dict[str, np.ndarray], place: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, labels) of each document of a row, by the positions that restart."""
    starts = [*np.flatnonzero(arrays["position_ids"][place] == 0), arrays["position_ids"].shape[1]]
    return [
        (arrays["input_ids"][place, begin:end], arrays["shift_labels"][place, begin:end])
        for begin, end in itertools.pairwise(starts)
    ]


def read(data: ConversationData, step: int, rows: int | None = None) -> dict[str, np.ndarray]:
    count = data.rows(step)
    return {name: array.values for name, array in data.read(step, 0, count, rows or count).items()}


def test_a_row_holds_whole_conversations_with_the_answers_as_targets(folder: Path, tokenizer: TextTokenizer) -> None:
    data = opened(folder, tokenizer)
    seen = 0
    for step in range(3):
        arrays = read(data, step)
        for place in range(data.rows(step)):
            for ids, labels in documents(arrays, place):
                text = tokenizer.decode(ids)
                if not text.startswith("<|im_start|>user"):
                    assert (labels == -100).all()  # what fills the row
                    continue
                answers = [part.partition("assistant\n")[2] for part in text.split("<|im_start|>")[1:]]
                expected = "".join(answer.removesuffix("\n") for answer in answers if answer)
                assert tokenizer.decode(labels[labels >= 0]) == expected
                # A label stands at the place before its token; the last place of a conversation has none.
                assert labels[-1] == -100
                assert (labels[:-1][labels[:-1] >= 0] == ids[1:][labels[:-1] >= 0]).all()
                seen += 1
        assert arrays["tokens"].tolist() == (arrays["shift_labels"] >= 0).sum(axis=1).tolist()
    assert seen > 30


def test_an_epoch_holds_every_conversation_once(
    folder: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BLOCK", 16)
    data = opened(folder, tokenizer, "a", rows=1)
    found = []
    for step in range(data.tokens_per_epoch // LENGTH):
        texts = [tokenizer.decode(ids) for ids, _ in documents(read(data, step), 0)]
        found += [text.partition("assistant\n")[2].split(" ")[1] for text in texts if text.startswith("<|im_start|>")]
    assert sorted(map(int, found)) == list(range(60))
    assert data.passes(data.tokens_per_epoch // LENGTH) == {"a.jsonl": 1.0}


@pytest.mark.parametrize("step", [0, 1, 5, 17, 40])
def test_a_resumed_run_reads_on_where_it_stopped(folder: Path, tokenizer: TextTokenizer, step: int) -> None:
    """Across epoch ends, and with fewer rows a step from there on it still gives each row once."""
    whole = opened(folder, tokenizer)
    state = json.loads(json.dumps(whole.state(step)))
    resumed = opened(folder, tokenizer, state=state)
    for number in (step, step + 1, step + 9):
        assert all((read(whole, number)[name] == read(resumed, number)[name]).all() for name in read(whole, number))
    narrow = opened(folder, tokenizer, state=state, rows=2)
    joined = np.concatenate([read(narrow, number)["input_ids"] for number in (step, step + 1)])
    assert (joined == read(whole, step)["input_ids"]).all()


def test_ranks_together_read_the_rows_of_one(folder: Path, tokenizer: TextTokenizer) -> None:
    data = opened(folder, tokenizer, rows=5)
    alone = global_rows(data, [0, 1, 2])
    for world in (2, 3):
        for one, many in zip(alone, global_rows(data, [0, 1, 2], world, prefetch=2), strict=True):
            assert (one == many).all()


def test_rows_that_fill_up_train_nothing(folder: Path, tokenizer: TextTokenizer) -> None:
    arrays = read(opened(folder, tokenizer), 0, rows=6)
    assert (arrays["shift_labels"][4:] == -100).all()
    assert (arrays["source"][4:].tolist(), arrays["tokens"][4:].tolist()) == ([-1, -1], [0, 0])
    assert (arrays["position_ids"][4:] == np.arange(LENGTH)).all()


def test_sources_have_their_shares_and_their_limits(folder: Path, tokenizer: TextTokenizer) -> None:
    data = opened(folder, tokenizer, max_epochs=1)
    assert np.bincount(read(data, 0)["source"]).tolist() == [3, 1]
    assert data.tokens_by_source(2) == {"a.jsonl": 6 * LENGTH, "b.jsonl": 2 * LENGTH}
    with pytest.raises(InputError, match=r"a.jsonl would be read .* its max_epochs is 1"):
        data.check_steps(1000)


def test_seeds_differ_and_equal_seeds_do_not(folder: Path, tokenizer: TextTokenizer) -> None:
    first, again, other = (read(opened(folder, tokenizer, seed=seed), 0)["input_ids"] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_another_seed_on_resume_is_refused(folder: Path, tokenizer: TextTokenizer) -> None:
    state = opened(folder, tokenizer).state(3)
    with pytest.raises(InputError, match="seed: the checkpoint trained with 1, the recipe says 2"):
        opened(folder, tokenizer, state=state, seed=2)


def test_other_conversations_under_the_same_name_on_resume_are_refused(
    folder: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    state = opened(folder, tokenizer, "a").state(3)
    write(tmp_path / "a.jsonl", [row("x", "y")])
    with pytest.raises(InputError, match="holds other tokens than the checkpoint trained on"):
        opened(tmp_path, tokenizer, "a", state=state)


def test_the_same_conversations_twice_are_refused(folder: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match=r"holds the same conversations as a\.jsonl"):
        opened(folder, tokenizer, "aa")


def test_held_out_rows_are_the_same_at_each_call_and_never_trained_on(folder: Path, tokenizer: TextTokenizer) -> None:
    data = opened(folder, tokenizer, hold_out=0.3)
    calls = [list(data.held_out(6, 4)) for _ in range(2)]
    assert [len(batch["input_ids"]) for batch in calls[0]] == [4, 2]
    assert all((one[name] == other[name]).all() for one, other in zip(*calls, strict=True) for name in one)

    def answers(arrays: dict[str, np.ndarray]) -> set[str]:
        parts = [tokenizer.decode(ids) for place in range(len(arrays["tokens"])) for ids, _ in documents(arrays, place)]
        return {part.partition("assistant\n")[2] for part in parts if part.startswith("<|im_start|>")}

    held = set().union(*(answers({name: part.numpy() for name, part in batch.items()}) for batch in calls[0]))
    trained = set().union(*(answers(read(data, step)) for step in range(15)))
    assert held
    assert not held & trained
    assert list(opened(folder, tokenizer).held_out(6, 4)) == []


def test_the_banner_accounts_for_every_row(folder: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [row("Well?", "Yes."), "{broken", row("Well?", "No.", "Why?")])
    data = opened(tmp_path, tokenizer, "a")
    text = "\n".join(data.description)
    assert "a.jsonl: 3 rows = 2 used + 1 dropped; 100.00 % of the batch" in text
    assert "dropped: invalid-json 1 (a.jsonl:2)" in text
    assert "1 rows whose last turns, which nothing answers, were left out" in text
    assert "turns end with <|im_end|> (3), which is trained" in text


def test_the_sample_marks_what_is_trained(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [row("Well?", "Yes.")])
    expected = "<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n"
    assert opened(tmp_path, tokenizer, "a").sample() == expected


def test_no_source_is_an_error(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.sources: empty; name files of conversations"):
        opened(tmp_path, tokenizer, "")


@pytest.mark.parametrize("name", ["chat/oasst_conversations", "reasoning/gsm8k_think"])
def test_shared_conversations_fill_rows_to_99_percent(shared: Path, tmp_path: Path, name: str) -> None:
    lines = (shared / "data" / f"{name}.jsonl").read_text().split("\n")
    (tmp_path / "some.jsonl").write_text("\n".join(lines[:1500]))
    data = open_conversations(
        [SourceSection(path=str(tmp_path / "some.jsonl"), max_epochs=math.inf)],
        tokenizer=load_tokenizer(shared / "tokenizers" / "qwen3"),
        sequence_length=1024,
        cache=tmp_path / "cache",
        batch=BatchSection(tokens_per_step=1024),
        seed=0,
    )
    assert data.rendered[0].account.tokens / data.tokens_per_epoch > 0.99

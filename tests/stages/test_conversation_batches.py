"""Conversations packed into rows train what they train one by one: losses, gradients, logits, and nothing of one
another.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from argonne.data.chat import Conversation
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer
from tests.data.chats import as_messages, as_tools, conversations
from tests.data.test_rendered import row, write
from tests.stages.gradients import (
    TINY,
    Found,
    assert_equal,
    gradients,
    in_micro_batches,
    in_one_process,
    make,
    on_ranks,
    one_by_one,
    opened,
    rendered,
)
from tests.tokensets import words

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [row(words(n % 7 + 1, n), words(n % 9 + 1, n + 1), "And?", words(n % 5 + 2, n + 2)) for n in range(26)]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums over threads would differ from run to run by rounding, and tests run beside one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("conversations") / "some.jsonl", ROWS)


@pytest.fixture(scope="module")
def expected(tokenizer: TextTokenizer) -> dict[str, Found]:
    """Of each generation: the loss and the gradients of the conversations one by one."""
    return {generation: one_by_one(make(generation), rendered(ROWS, tokenizer)) for generation in TINY}


@pytest.mark.parametrize(("length", "seed"), [(256, 1), (256, 2), (512, 1), (195, 3)])
@pytest.mark.parametrize("generation", TINY)
def test_loss_and_gradients_do_not_depend_on_the_packing(
    generation: str, length: int, seed: int, source: Path, tokenizer: TextTokenizer, expected: dict[str, Found]
) -> None:
    data = opened(source, tokenizer, length, seed)
    assert_equal(in_one_process(make(generation), data, 2), expected[generation])


@pytest.mark.parametrize("micro_rows", [1, 2, 99])
@pytest.mark.parametrize("generation", TINY)
def test_loss_and_gradients_do_not_depend_on_the_micro_batch(
    generation: str, micro_rows: int, source: Path, tokenizer: TextTokenizer, expected: dict[str, Found]
) -> None:
    data = opened(source, tokenizer)
    assert_equal(in_one_process(make(generation), data, min(micro_rows, data.rows(0))), expected[generation])


@pytest.mark.parametrize("generation", TINY)
def test_loss_and_gradients_do_not_depend_on_the_ranks(
    generation: str, source: Path, tokenizer: TextTokenizer, tokenizer_folder: Path, expected: dict[str, Found]
) -> None:
    assert opened(source, tokenizer).rows(0) % 2 == 1
    found, masked = on_ranks(generation, source, tokenizer_folder, micro_rows=1)
    assert masked == [0, 1]
    assert_equal(found, expected[generation])


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("generation", TINY)
def test_a_micro_batch_of_filler_rows_adds_nothing(
    generation: str, place: str, source: Path, tokenizer: TextTokenizer, expected: dict[str, Found]
) -> None:
    data = opened(source, tokenizer)
    rows = data.rows(0)
    whole, filler = (
        {name: torch.from_numpy(array.values) for name, array in data.read(0, 0, count, filled).items()}
        for count, filled in ((rows, rows), (0, 2))
    )
    assert not (filler["shift_labels"] >= 0).any()
    micro_batches = [filler, whole] if place == "first" else [whole, filler]
    found = in_micro_batches(make(generation), micro_batches, int(whole["tokens"].sum()))
    assert_equal(found, expected[generation])


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(conversations(), min_size=1, max_size=6), micro_rows=st.integers(1, 3), seed=st.integers(0, 3))
def test_whatever_is_said_trains_packed_what_it_trains_alone(
    drawn: list[Conversation],
    micro_rows: int,
    seed: int,
    tokenizer: TextTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rows: list[dict[str, Any]] = [{"messages": as_messages(one), "tools": as_tools(one)} for one in drawn]
    alone = rendered(rows, tokenizer)
    assume(alone)
    source = write(tmp_path_factory.mktemp("drawn") / "some.jsonl", rows)
    model = make("3-window")
    assert_equal(in_one_process(model, opened(source, tokenizer, seed=seed), micro_rows), one_by_one(model, alone))


def packed(source: Path, tokenizer: TextTokenizer) -> list[dict[str, torch.Tensor]]:
    """The rows of an epoch, each a batch of one."""
    data = opened(source, tokenizer)
    return [
        {name: torch.from_numpy(array.values) for name, array in data.read(0, number, 1, 1).items()}
        for number in range(data.rows(0))
    ]


def documents(batch: dict[str, torch.Tensor]) -> list[slice]:
    """Where each document of a row lies, the padding too."""
    begins = np.flatnonzero(batch["position_ids"][0].numpy() == 0).tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise([*begins, batch["input_ids"].shape[1]])]


@pytest.mark.parametrize("kernel", ["sdpa", "math"])
@pytest.mark.parametrize("generation", TINY)
def test_packed_rows_give_each_conversation_the_logits_that_it_has_alone(
    generation: str, kernel: str, source: Path, tokenizer: TextTokenizer
) -> None:
    model = make(generation)
    model.configure_training(attention=kernel)
    left = {tuple(one.ids.tolist()): one for one in rendered(ROWS, tokenizer)}
    assert len(left) == len(ROWS)
    with torch.no_grad():
        for batch in packed(source, tokenizer):
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            for place in documents(batch):
                if (one := left.pop(tuple(batch["input_ids"][0, place].tolist()), None)) is not None:
                    ids = torch.from_numpy(one.ids.astype("int64"))[None]
                    alone = model(input_ids=ids, use_cache=False).logits
                    torch.testing.assert_close(logits[:, place], alone, rtol=0, atol=1e-11)
    assert not left


PATHS = {
    "sdpa": {"sdpa-documents", "sdpa-documents-window"},
    "math": {"math"},
    "dense mask": {"sdpa-mask"},
    "transformers' sdpa": {"sdpa"},
    "transformers' eager": {"eager"},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("generation", TINY)
def test_no_gradient_of_a_conversation_reaches_another_one(
    generation: str, path: str, source: Path, tokenizer: TextTokenizer
) -> None:
    """Exactly zero to the embeddings of those before it and behind it."""
    model, how = make(generation), {}
    batch = max(packed(source, tokenizer), key=lambda one: len(documents(one)))
    length = batch["input_ids"].shape[1]
    if path in ("sdpa", "math"):
        model.configure_training(attention=path)
    elif path == "dense mask":
        how["attention_mask"] = torch.arange(length)[None] != length - 2  # a hole, in what fills the row
    else:
        model.set_attn_implementation(path.removeprefix("transformers' "))
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    places = [place for place in documents(batch) if (batch["shift_labels"][0, place] >= 0).any()]
    assert len(places) >= 3
    for place in places:
        labels = torch.full_like(batch["shift_labels"], -100)
        labels[:, place] = batch["shift_labels"][:, place]
        given = {"inputs_embeds": embedded, "position_ids": batch["position_ids"], "shift_labels": labels, **how}
        loss = model(**given, use_cache=False, loss_reduction="sum").loss
        reached = torch.autograd.grad(loss, embedded)[0][0].abs().amax(1)
        assert (reached[place][: int((labels[0, place] >= 0).nonzero().max()) + 1] > 0).all()
        reached[place] = 0.0
        assert reached.max().item() == 0.0
    taken = {module.attention_path for module in model.modules() if hasattr(module, "attention_path")}
    assert taken <= PATHS[path]


def test_a_gradient_that_is_off_by_little_is_seen(tokenizer: TextTokenizer) -> None:
    model = make("2")
    loss, found = one_by_one(model, rendered(ROWS[:2], tokenizer))
    assert_equal((loss, gradients(model)), (loss, found))
    name = next(iter(found))
    with pytest.raises(AssertionError, match=name.replace(".", r"\.")):
        assert_equal((loss, {**found, name: found[name] * (1 + 1e-11)}), (loss, found))

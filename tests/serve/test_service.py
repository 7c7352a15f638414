"""The thread that answers: pieces in order, places kept free, failures that stay with those they concern."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from argonne.errors import InputError
from argonne.serve.decoder import Decoder
from argonne.serve.engine import complete_ids
from argonne.serve.options import SamplingOptions, Shaping
from argonne.serve.service import Draining, OutOfTime, Overloaded, Request, Service, StepFailed, Ticket
from argonne.serve.text_stream import TextStream
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from tests.serve.test_engine import TEXTS, make_model

GREEDY = SamplingOptions(max_new_tokens=12, temperature=0.0)
SAMPLED = SamplingOptions(max_new_tokens=12, temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("tokenizer") / "bpe"))


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(max_position_embeddings=256)


@pytest.fixture
def service(model: Any, tokenizer: TextTokenizer) -> Iterator[Service]:
    made = Service({"it": (Decoder(model, rows=4, deterministic=True), tokenizer)}, queue_limit=8)
    yield made
    made.close()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 120))


async def texts_of(ticket: Ticket) -> list[str]:
    texts = [""] * ticket.request.size
    async with ticket:
        async for piece in ticket:
            texts[piece.number] += piece.text
    return texts


def alone(model: Any, tokenizer: TextTokenizer, prompt: list[int], options: SamplingOptions) -> str:
    """By a decoder of one's own with as many rows."""
    decoder = Decoder(model, rows=4, deterministic=True)
    answer = decoder.submit(prompt, options, [])
    while decoder.busy:
        decoder.step()
    stream = TextStream(tokenizer, prompt)
    return "".join([*map(stream.push, answer.ids), stream.finish()])


async def until_idle(service: Service) -> None:
    while service.held:
        await asyncio.sleep(0)


def test_every_answer_of_many_is_what_it_is_alone(service: Service, model: Any, tokenizer: TextTokenizer) -> None:
    async def ask() -> list[list[str]]:
        tickets = [service.submit("it", Request([[5, 9, 33 + number]], SAMPLED, [], count=2)) for number in range(6)]
        return list(await asyncio.gather(*map(texts_of, tickets)))

    for number, texts in enumerate(run(ask())):
        assert texts == [alone(model, tokenizer, [5, 9, 33 + number], SAMPLED.with_seed(copy)) for copy in range(2)]


def test_several_prompts_of_a_request_have_the_numbers_and_seeds_of_their_order(
    service: Service, model: Any, tokenizer: TextTokenizer
) -> None:
    async def ask() -> list[str]:
        return await texts_of(service.submit("it", Request([[7, 8], [9, 10]], SAMPLED, [])))

    assert run(ask()) == [
        alone(model, tokenizer, [7, 8], SAMPLED),
        alone(model, tokenizer, [9, 10], SAMPLED.with_seed(1)),
    ]


def test_more_answers_than_may_wait_are_refused_and_room_returns(service: Service) -> None:
    async def ask() -> None:
        ticket = service.submit("it", Request([[5]], GREEDY, [], count=12))
        with pytest.raises(Overloaded, match="12 answers run or wait, no more than 12 may"):
            service.submit("it", Request([[5]], GREEDY, []))
        await texts_of(ticket)
        await until_idle(service)
        await texts_of(service.submit("it", Request([[5]], GREEDY, [], count=12)))

    run(ask())


def test_a_client_that_leaves_frees_its_slots_and_the_others_go_on(
    service: Service, model: Any, tokenizer: TextTokenizer
) -> None:
    async def ask() -> list[str]:
        endless = replace(GREEDY, max_new_tokens=250)
        leaving = service.submit("it", Request([[5]], endless, [], count=3))
        staying = service.submit("it", Request([[6]], GREEDY, []))
        async with leaving:
            async for _ in leaving:
                break
        texts = await texts_of(staying)
        await until_idle(service)
        return texts

    assert run(ask()) == [alone(model, tokenizer, [6], GREEDY)]
    assert service.hosted["it"].decoder.running == 0
    assert service.metrics.tokens_out < 3 * 250


def test_what_a_step_raises_fails_those_that_run_and_the_thread_goes_on(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = service.hosted["it"].decoder
    step = decoder.step

    async def ask() -> None:
        def broken() -> Any:
            step()
            raise RuntimeError("planted")

        monkeypatch.setattr(decoder, "step", broken)
        with pytest.raises(StepFailed, match="RuntimeError"):
            await texts_of(service.submit("it", Request([[5]], GREEDY, [], count=2)))
        monkeypatch.setattr(decoder, "step", step)
        assert len(await texts_of(service.submit("it", Request([[5]], GREEDY, [], count=2)))) == 2
        await until_idle(service)

    run(ask())
    assert "planted" in capsys.readouterr().err


class Broken:
    """A constraint that breaks at the third token."""

    def __init__(self) -> None:
        self.left = 2

    def allowed(self, vocabulary: int) -> torch.Tensor:
        if not self.left:
            raise InputError("no such grammar")
        self.left -= 1
        return torch.ones(vocabulary, dtype=torch.bool)

    def accept(self, token: int) -> None: ...


def test_a_constraint_that_breaks_ends_its_own_request_and_no_other(
    service: Service, model: Any, tokenizer: TextTokenizer
) -> None:
    async def ask() -> list[str]:
        other = service.submit("it", Request([[6]], GREEDY, []))
        with pytest.raises(InputError, match="no such grammar"):
            await texts_of(service.submit("it", Request([[5]], GREEDY, [0], count=2, constraints=[Broken(), Broken()])))
        texts = await texts_of(other)
        await until_idle(service)
        return texts

    assert run(ask()) == [alone(model, tokenizer, [6], GREEDY)]


def test_an_answer_that_takes_too_long_is_ended(service: Service) -> None:
    async def ask() -> None:
        service.time_limit = 0.0
        with pytest.raises(OutOfTime):
            await texts_of(service.submit("it", Request([[5]], replace(GREEDY, max_new_tokens=250), [])))
        await until_idle(service)

    run(ask())


def test_a_stop_text_ends_the_answer_and_is_named(service: Service, model: Any, tokenizer: TextTokenizer) -> None:
    whole = alone(model, tokenizer, [5, 9], GREEDY)
    stop = whole[3:5]

    async def ask() -> tuple[str, str | None]:
        text, named = "", None
        ticket = service.submit("it", Request([[5, 9]], GREEDY, [], Shaping(stop=("never", stop))))
        async with ticket:
            async for piece in ticket:
                text, named = text + piece.text, piece.stop_text
        return text, named

    assert run(ask()) == (whole[: whole.index(stop)], stop)


def test_one_that_drains_takes_no_request_and_can_drop_those_that_run(service: Service) -> None:
    async def ask() -> None:
        ticket = service.submit("it", Request([[5]], replace(GREEDY, max_new_tokens=250), []))
        service.draining = True
        with pytest.raises(Draining):
            service.submit("it", Request([[5]], GREEDY, []))
        service.drop_all()
        with pytest.raises(Draining):
            await texts_of(ticket)
        await until_idle(service)

    run(ask())


def test_the_answers_of_the_service_are_those_of_complete_ids(model: Any, tokenizer: TextTokenizer) -> None:
    service = Service({"it": (Decoder(model, rows=1), tokenizer)})
    try:

        async def ask() -> list[int]:
            ids: list[int] = []
            ticket = service.submit("it", Request([[40, 41]], SAMPLED, []))
            async with ticket:
                async for piece in ticket:
                    ids += piece.ids
            return ids

        assert run(ask()) == complete_ids(model, [[40, 41]], SAMPLED, [])[0].ids
    finally:
        service.close()

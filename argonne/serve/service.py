"""Answers for many clients at once: a thread that owns the decoders, and tickets by which an event loop hears of them.

Requests go into the thread by a queue and pieces of text come back by `call_soon_threadsafe`, once a step. What a
decoder holds is touched by the thread alone.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from argonne.serve.decoder import Answer, Decoder
from argonne.serve.engine import Spoken
from argonne.serve.metrics import Metrics
from argonne.serve.options import SamplingOptions, Shaping
from argonne.serve.sampling import Constraint, TokenLogprobs
from argonne.tokens.tokenizer import TextTokenizer


class Overloaded(Exception):
    """As many answers wait as may."""


class Draining(Exception):
    """The server ends and takes no new request, or did not wait longer for this one."""


class OutOfTime(Exception):
    """A request took longer than a request may."""


class StepFailed(Exception):
    """A step of the model raised an exception; the server's log has it."""


@dataclass(frozen=True)
class Request:
    """Answers that one client asks for: `count` of each prompt, the seed of each the one before plus 1. constraints:
    one for each answer, or none; with them there are stops.
    """

    prompts: Sequence[Sequence[int]]
    options: SamplingOptions
    stops: Sequence[int]
    shaping: Shaping = field(default_factory=Shaping)
    count: int = 1
    constraints: Sequence[Constraint] = ()

    @property
    def size(self) -> int:
        return len(self.prompts) * self.count


@dataclass(frozen=True)
class Piece:
    """What is new of an answer: its number within the request, text and tokens; `stop` as an Answer's once it has
    ended.
    """

    number: int
    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop: str | None = None
    stop_text: str | None = None


@dataclass(eq=False)
class Hosted:
    """A model's decoder and tokenizer in the thread. `held`: answers that were accepted and have not ended."""

    decoder: Decoder
    tokenizer: TextTokenizer
    held: int = 0


@dataclass(eq=False)
class _Voice:
    """An answer, its growing text, and whom to tell."""

    ticket: Ticket
    number: int
    answer: Answer
    spoken: Spoken
    told: int = 0

    def piece(self) -> Piece | Exception:
        """What is new. An exception: the answer failed by it."""
        if self.answer.fault is not None:
            return self.answer.fault
        text = self.spoken.more()
        answer, told = self.answer, self.told
        self.told = len(answer.ids)
        stopped_by = self.spoken.stopped_by
        logprobs = tuple(answer.logprobs[told:])
        return Piece(self.number, text, tuple(answer.ids[told:]), logprobs, answer.stop, stopped_by)


class Ticket:
    """An accepted request as the event loop sees it: `async with ticket:` and in it `async for piece in ticket`. Left
    before the last answer has ended, by whatever way, its answers are cancelled.
    """

    def __init__(self, service: Service, hosted: Hosted, request: Request, time_limit: float) -> None:
        self._service, self.hosted, self.request = service, hosted, request
        self.loop = asyncio.get_running_loop()
        self.begun, self.deadline = time.monotonic(), self.loop.time() + time_limit
        self.first_told = False
        self.held = self._unheard = request.size  # answers that have not ended: in the thread, and as heard here
        self.inbox: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    async def __aenter__(self) -> Ticket:
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._unheard:
            self._service.cancel(self)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises OutOfTime, StepFailed, Draining, and what the request's constraints raise."""
        while self._unheard:
            try:
                async with asyncio.timeout_at(self.deadline):
                    piece = await self.inbox.get()
            except TimeoutError:
                raise OutOfTime("the answer took longer than this server lets one take") from None
            if isinstance(piece, Exception):
                raise piece
            self._unheard -= piece.stop is not None
            yield piece


class Service:
    """`queue_limit`: answers beyond the decoder's rows that may wait for one model."""

    def __init__(
        self,
        models: Mapping[str, tuple[Decoder, TextTokenizer]],
        *,
        queue_limit: int = 128,
        time_limit: float = 600.0,
        metrics: Metrics | None = None,
    ) -> None:
        self.hosted = {name: Hosted(*both) for name, both in models.items()}
        self.queue_limit, self.time_limit, self.metrics = queue_limit, time_limit, metrics or Metrics()
        self.draining = False
        self._inbox: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of Hosted.held
        self._voices: dict[Answer, _Voice] = {}
        self._thread = threading.Thread(target=self._run, name="argonne-service", daemon=True)
        self._thread.start()

    # --------------------------------------------------------------------------------------------- the event loop

    def most(self, name: str) -> int:
        """Answers of a model that this server holds at once."""
        return self.hosted[name].decoder.slots.count + self.queue_limit

    def submit(self, name: str, request: Request) -> Ticket:
        """Accept a request for the model of this name. Raises Overloaded and Draining."""
        if self.draining:
            raise Draining("the server is ending and takes no new request")
        hosted = self.hosted[name]
        with self._lock:
            if hosted.held + request.size > self.most(name):
                raise Overloaded(f"{hosted.held} answers run or wait, no more than {self.most(name)} may; ask later")
            hosted.held += request.size
        ticket = Ticket(self, hosted, request, self.time_limit)
        self._inbox.put(("submit", ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        self._inbox.put(("cancel", ticket))

    @property
    def held(self) -> int:
        return sum(hosted.held for hosted in self.hosted.values())

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def load(self) -> tuple[dict[str, int], dict[str, int]]:
        """Answers that run, and that wait, by model."""
        running = {name: hosted.decoder.running for name, hosted in self.hosted.items()}
        return running, {name: max(0, hosted.held - running[name]) for name, hosted in self.hosted.items()}

    def drop_all(self) -> None:
        """End every answer that still runs or waits: its client is told that the server ends."""
        self._inbox.put(("drop", None))

    def close(self) -> None:
        """End the thread, and what it still computes."""
        self.draining = True
        self._inbox.put(("close", None))
        self._thread.join()

    # --------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        going = True
        while going:
            busy = [hosted for hosted in self.hosted.values() if hosted.decoder.busy]
            going = self._listen(wait=not busy)
            for hosted in busy if going else ():
                self._step(hosted)

    def _listen(self, wait: bool) -> bool:
        """Do what was asked since the last step; False where that is the end."""
        while True:
            try:
                what, ticket = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if ticket is None:
                told = Draining("the server is ending")
                self._fail({voice.ticket for voice in self._voices.values()}, told)
                if what == "close":
                    return False
            elif what == "submit":
                self._begin(ticket)
            else:
                self._fail({ticket}, None)

    def _begin(self, ticket: Ticket) -> None:
        request, hosted = ticket.request, ticket.hosted
        decoder = hosted.decoder
        try:
            for place, prompt in enumerate(request.prompts):
                first: Answer | None = None
                for copy in range(request.count):
                    number = place * request.count + copy
                    answer = decoder.submit(
                        prompt,
                        request.options.with_seed(number),
                        request.stops,
                        shaping=request.shaping,
                        constraint=request.constraints[number] if request.constraints else None,
                        like=first,
                    )
                    first = first or answer
                    spoken = Spoken(decoder, answer, hosted.tokenizer)
                    self._voices[answer] = _Voice(ticket, number, answer, spoken)
        except Exception as error:  # this request's affair alone
            self._fail({ticket}, error)
            return
        self.metrics.tokens_in += sum(map(len, request.prompts))

    def _step(self, hosted: Hosted) -> None:
        """One token more for each that runs; whatever is raised fails these and no others."""
        try:
            changed = hosted.decoder.step()
            told = [(voice, voice.piece()) for answer in changed if (voice := self._voices.get(answer))]
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            voices = [voice for voice in self._voices.values() if voice.ticket.hosted is hosted]
            ran = {voice.ticket for voice in voices if voice.answer.slot is not None or voice.answer.stop is not None}
            self._fail(
                ran or {voice.ticket for voice in voices},
                StepFailed(f"the model failed ({type(error).__name__}); the log says where"),
            )
            return
        now = time.monotonic()
        for voice, piece in told:
            ticket = voice.ticket
            if voice.answer not in self._voices:  # it failed with another of its request
                continue
            if isinstance(piece, Exception):
                self._fail({ticket}, None)
                continue
            self.metrics.tokens_out += len(piece.ids)
            if not ticket.first_told:
                ticket.first_told = True
                self.metrics.first_token.observe(now - ticket.begun)
            if piece.stop is not None:
                self._end(voice)
                if ticket.held == 0:
                    self.metrics.total.observe(now - ticket.begun)
        _send((voice.ticket, piece) for voice, piece in told)

    def _fail(self, tickets: set[Ticket], error: Exception | None) -> None:
        """End all answers of these tickets. error: what their clients hear, None where they have left."""
        for voice in [voice for voice in self._voices.values() if voice.ticket in tickets]:
            ticket = voice.ticket
            ticket.hosted.decoder.end(voice.answer)
            self._end(voice)
        for ticket in tickets:
            self._release(ticket, ticket.held)  # of answers that never began
        if error is not None:
            _send((ticket, error) for ticket in tickets)

    def _end(self, voice: _Voice) -> None:
        del self._voices[voice.answer]
        self._release(voice.ticket, 1)

    def _release(self, ticket: Ticket, count: int) -> None:
        ticket.held -= count
        with self._lock:
            ticket.hosted.held -= count


def _send(told: Iterable[tuple[Ticket, Piece | Exception]]) -> None:
    """Into the tickets' inboxes, with one call for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Piece | Exception]]] = {}
    for ticket, piece in told:
        by_loop.setdefault(ticket.loop, []).append((ticket, piece))
    for loop, listed in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, listed)
        except RuntimeError:  # the loop is closed: nobody listens any more
            continue


def _put_all(listed: Sequence[tuple[Ticket, Piece | Exception]]) -> None:
    for ticket, piece in listed:
        ticket.inbox.put_nowait(piece)

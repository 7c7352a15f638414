"""Many answers at once: they join and leave at every step, each bit for bit what it would be with other neighbours.

A step reads at most `chunk` tokens of prompts, in pieces cut at multiples of `chunk`, and then gives every running
answer one token. The pass over running answers has a fixed number of rows, a bucket: in fp32 a row's result depends on
the number of rows of a matrix product, not on what stands in the others.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from argonne.errors import InputError
from argonne.serve.options import SamplingOptions, Shaping
from argonne.serve.sampling import Chooser, Constraint, TokenLogprobs, check_finite
from argonne.serve.slots import Slots

ROWS = (1, 2, 4, 8, 16, 32, 64)
CHUNK = 256


@dataclass(eq=False)
class Answer:
    """A request and what was generated so far, without the stop token. `stop`: None while it runs, then "eos", "length"
    (max_new_tokens), "context" (the model's is full), "stop" (a stop text), "cancelled" or "failed". fault: of its own
    choices or constraint, by which it failed and no other. number: the order they came in.
    """

    number: int
    prompt: Sequence[int]
    options: SamplingOptions
    stops: frozenset[int]
    chooser: Chooser
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stop: str | None = None
    fault: Exception | None = None
    like: Answer | None = None  # of the same prompt, read before
    slot: int | None = None
    read: int = 0  # tokens whose keys lie in the slot
    first_logits: Tensor | None = None  # behind the prompt


class Decoder:
    """Runs answers on one model. `rows`: at most so many at once; `context`: tokens of a prompt and its answer at most.
    `deterministic`: always the largest bucket, so that an answer does not depend on the load either.
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int = 32,
        context: int | None = None,
        chunk: int = CHUNK,
        deterministic: bool = False,
    ) -> None:
        own = int(model.config.max_position_embeddings)
        self.model, self.context, self.chunk = model, min(context or own, own), chunk
        self.buckets = [rows] if deterministic else [*(bucket for bucket in ROWS if bucket < rows), rows]
        self.slots = Slots(rows, self.context)
        self._held: list[Answer | None] = [None] * rows
        self._waiting: deque[Answer] = deque()
        self._numbers = itertools.count()
        config = model.config
        self._windows = {
            kind: config.sliding_window if kind == "sliding_attention" else None for kind in set(config.layer_types)
        }
        self._device = next(model.parameters()).device

    # ------------------------------------------------------------------------------------------------- requests

    def submit(
        self,
        prompt: Sequence[int],
        options: SamplingOptions,
        stops: Iterable[int],
        *,
        shaping: Shaping | None = None,
        constraint: Constraint | None = None,
        like: Answer | None = None,
    ) -> Answer:
        """Queue a request. `like`: an answer to the same prompt, whose reading of it is shared. Raises InputError for
        an empty prompt or one that fills the context.
        """
        if not prompt:
            raise InputError("prompt: found no token, expected at least one; give some text")
        if len(prompt) >= self.context:
            raise InputError(
                f"prompt: found {len(prompt):,} tokens, expected fewer than the model's context of {self.context:,}; "
                "shorten it"
            )
        chooser = Chooser(options, shaping, constraint)
        answer = Answer(next(self._numbers), prompt, options, frozenset(stops), chooser, like=like)
        self._waiting.append(answer)
        return answer

    def end(self, answer: Answer, stop: str = "cancelled") -> None:
        """End an answer that runs or waits; its slot is free at once."""
        if answer.stop is None:
            answer.stop = stop
            if answer.slot is None:
                self._waiting.remove(answer)
            else:
                self._held[answer.slot], answer.slot = None, None
            answer.first_logits = answer.like = None

    @property
    def running(self) -> int:
        return sum(answer is not None for answer in self._held)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return bool(self.running or self._waiting)

    # ------------------------------------------------------------------------------------------------- steps

    def step(self) -> list[Answer]:
        """One round; the answers that got a token or ended in it."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            with torch.no_grad():
                return list(dict.fromkeys([*self._read_prompts(), *self._decode()]))
        finally:
            if training:
                self.model.train()

    def _admit(self) -> None:
        for slot, held in enumerate(self._held):
            if held is None and self._waiting:
                answer = self._held[slot] = self._waiting.popleft()
                answer.slot = slot

    def _read_prompts(self) -> list[Answer]:
        """Read `chunk` tokens of prompts, the oldest first; a prompt that is read gets its first token."""
        left, changed = self.chunk, []
        while left > 0:
            self._admit()
            unread = [held for held in self._held if held and held.read < len(held.prompt)]
            if not unread:
                break
            answer = min(unread, key=lambda one: one.number)  # never by slot: those that come later find lower ones
            assert answer.slot is not None
            if (like := answer.like) and like.first_logits is not None and like.slot is not None:
                self.slots.copy(like.slot, answer.slot, len(answer.prompt))
                answer.read, logits = len(answer.prompt), like.first_logits
            else:
                piece = answer.prompt[answer.read : answer.read + self.chunk]
                self.slots.row_at(answer.slot, answer.read, len(piece))
                positions = torch.arange(answer.read, answer.read + len(piece))[None]
                logits = self._forward(torch.tensor([piece]), positions)[0]
                answer.read += len(piece)
                left -= len(piece)
            if answer.read == len(answer.prompt):
                answer.first_logits = logits
                check_finite(logits)
                self._take(answer, logits, int(logits.argmax()))
                changed.append(answer)
        return changed

    def _decode(self) -> list[Answer]:
        """One token more for every answer whose prompt is read."""
        running = [held for held in self._held if held and held.ids]
        if not running:
            return []
        self._compact(running)
        last = max(answer.slot or 0 for answer in running)
        rows = next(bucket for bucket in self.buckets if bucket > last)
        ids = torch.zeros(rows, 1, dtype=torch.int64)
        places = torch.zeros(rows, dtype=torch.int64)
        for slot, held in enumerate(self._held[:rows]):
            if held is not None:  # one that still reads its prompt: what is written is overwritten by its next piece
                places[slot] = held.read
        for answer in running:
            assert answer.slot is not None
            ids[answer.slot, 0] = answer.ids[-1]
        self.slots.rows_at(places)
        logits = self._forward(ids, places[:, None])
        taken = [answer.slot for answer in running if answer.slot is not None]
        check_finite(logits[taken])
        likeliest = logits.argmax(-1).tolist()  # once for all rows: a call for each takes a tenth of the step
        for answer, slot in zip(running, taken, strict=True):
            answer.read += 1
            self._take(answer, logits[slot], likeliest[slot])
        return running

    def _compact(self, running: Sequence[Answer]) -> None:
        """Move the last answers into free slots where a smaller bucket holds all that run."""
        wanted = next(bucket for bucket in self.buckets if bucket >= len(running))
        for answer in running:
            if answer.slot is None or answer.slot < wanted:
                continue
            free = next((slot for slot, held in enumerate(self._held[:wanted]) if held is None), None)
            if free is not None:
                self.slots.copy(answer.slot, free, answer.read)
                self._held[answer.slot], self._held[free] = None, answer
                answer.slot = free

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """(rows, vocabulary) logits behind the last token of each row."""
        out = self.model(
            input_ids=ids.to(self._device),
            attention_mask=self.slots.masks(self._windows, self._device),
            position_ids=positions.to(self._device),
            past_key_values=self.slots,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _take(self, answer: Answer, logits: Tensor, likeliest: int) -> None:
        """Choose the next token; the answer ends with a stop token, and where its tokens or the context are used up."""
        plain = answer.chooser.takes_the_likeliest
        try:
            token, logprobs = (likeliest, None) if plain else answer.chooser.choose(logits, answer.ids)
        except Exception as fault:  # whoever waits for the answer raises it: see Answer
            answer.fault = fault
            self.end(answer, "failed")
            return
        if token in answer.stops:
            self.end(answer, "eos")
            return
        answer.ids.append(token)
        if logprobs is not None:
            answer.logprobs.append(logprobs)
        if len(answer.ids) == answer.options.max_new_tokens:
            self.end(answer, "length")
        elif len(answer.prompt) + len(answer.ids) == self.context:
            self.end(answer, "context")

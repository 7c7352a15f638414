"""Many answers at once: they join and leave at every step, each bit for bit what it would be with other neighbours.

A step reads about `chunk` tokens of prompts, in pieces cut at multiples of `chunk`, and then gives every running answer
one token. Passes have a fixed number of rows, a bucket, and prompts a fixed width: in fp32 a row's result depends on
the number of rows of a matrix product, not on what stands in the others.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from argonne.errors import InputError
from argonne.serve.forward import Forward, can_be_served_so
from argonne.serve.lookup import Lookup
from argonne.serve.options import SamplingOptions, Shaping
from argonne.serve.sampling import Chooser, Constraint, TokenLogprobs, choose_together
from argonne.serve.slots import LENGTH_STEP, Slots

ROWS = (1, 2, 4, 8, 16, 32, 64)
WIDTHS = (16, 32)  # of a pass that reads prompts; beyond them multiples of LENGTH_STEP
CHUNK = 256
FIXED = 64  # tokens of a pass that reads prompts of a fixed number of rows
PATIENCE = 4


def common(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens with which both begin."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


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
    first_logits: Tensor | None = None  # behind the prompt, once it is read
    lookup: Lookup | None = None

    def __post_init__(self) -> None:
        self.tokens = np.array(self.prompt)


class Decoder:
    """Runs answers on one model. `rows`: at most so many at once; `context`: tokens of a prompt and its answer at most.
    `deterministic`: always the largest bucket, so that an answer does not depend on the load either. `patience`: steps
    in a row that only read, while fewer answers run than are still to be read.
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int = 32,
        context: int | None = None,
        chunk: int = CHUNK,
        deterministic: bool = False,
        patience: int = PATIENCE,
    ) -> None:
        own = int(model.config.max_position_embeddings)
        self.model, self.context, self.chunk = model, min(context or own, own), chunk
        self.deterministic, self.patience, self._read_in_a_row = deterministic, patience, 0
        self.buckets = [rows] if deterministic else [*(bucket for bucket in ROWS if bucket < rows), rows]
        self.slots = Slots(rows, self.context)
        self._held: list[Answer | None] = [None] * rows
        self._left: list[Answer | None] = [None] * rows  # an ended answer whose keys still lie there
        self._waiting: deque[Answer] = deque()
        self._numbers = itertools.count()
        config = model.config
        self._windows = {
            kind: config.sliding_window if kind == "sliding_attention" else None for kind in set(config.layer_types)
        }
        self._device = next(model.parameters()).device
        self._pass = Forward(model) if can_be_served_so(model) else None

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
                self._left[answer.slot], self._held[answer.slot], answer.slot = answer, None, None
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
            with torch.inference_mode():
                changed = self._read_prompts()
                running = [held for held in self._held if held and held.ids]
                unread = sum(held is not None and not held.ids for held in self._held)
                if unread > len(running) and self._read_in_a_row < self.patience:
                    self._read_in_a_row += 1  # a pass costs the same for few answers as for all that fit in it
                else:
                    self._read_in_a_row = 0
                    changed += self._decode(running)
                return list(dict.fromkeys(changed))
        finally:
            if training:
                self.model.train()

    def _admit(self) -> None:
        free = [slot for slot, held in enumerate(self._held) if held is None]
        while free and self._waiting:
            answer = self._waiting.popleft()
            answer.read, source = max((self._shared(answer, slot), -slot) for slot in range(self.slots.count))
            slot = -source if -source in free else free[0]
            if answer.read and slot != -source:
                self.slots.copy(-source, slot, answer.read)
            free.remove(slot)
            answer.slot, self._held[slot], self._left[slot] = slot, answer, None

    def _shared(self, answer: Answer, slot: int) -> int:
        """Tokens at the beginning of the prompt whose keys lie in a slot already. Where bits count, whole pieces of a
        prompt: another pass would have given others.
        """
        other = self._held[slot] or self._left[slot]
        if other is None:
            return 0
        size = common(other.tokens, answer.tokens)
        if size == len(other.prompt) and not self.deterministic:
            size += common(np.array(other.ids), answer.tokens[size:])
        size = min(size, other.read, len(answer.prompt) - 1)
        return size // self.chunk * self.chunk if self.deterministic else size

    def _read_prompts(self) -> list[Answer]:
        """Read `chunk` tokens of prompts, the oldest first; a prompt that is read gets its first token."""
        left, changed = self.chunk, []
        while left > 0:
            self._admit()
            unread = sorted((held for held in self._held if held and not held.ids), key=lambda one: one.number)
            shared = [answer for answer in unread if answer.like and answer.like.first_logits is not None]
            if shared:
                for answer in shared:
                    self._share(answer)
                read = shared
            elif unread:  # never by slot: those that come later find lower ones
                width = self._width(unread[0])
                alike = [answer for answer in unread if self._width(answer) == width and not self._follows(answer)]
                read = alike[: self._rows_to_read(width)]
                left -= width * self._read_pieces(read, width)
            else:
                break
            whole = [answer for answer in read if answer.first_logits is not None]
            if whole:
                self._take(whole, torch.stack([one.first_logits for one in whole if one.first_logits is not None]))
            changed += whole
        return changed

    @staticmethod
    def _follows(answer: Answer) -> bool:
        """Whether another answer is reading the same prompt."""
        return answer.like is not None and answer.like.stop is None

    def _share(self, answer: Answer) -> None:
        like = answer.like
        assert like is not None
        assert like.slot is not None
        assert answer.slot is not None
        self.slots.copy(like.slot, answer.slot, len(answer.prompt))
        answer.read, answer.first_logits = len(answer.prompt), like.first_logits

    def _width(self, answer: Answer) -> int:
        """Tokens of the pass that reads its next piece: by its own length alone, so that its bits are too."""
        size = min(len(answer.prompt) - answer.read, self.chunk)
        return next((width for width in WIDTHS if width >= size), -(-size // LENGTH_STEP) * LENGTH_STEP)

    def _rows_to_read(self, width: int) -> int:
        """Of a pass, at most; where the number is fixed, few, as prompts mostly come one by one."""
        tokens = min(self.chunk, FIXED) if self.deterministic else self.chunk
        return max(1, min(tokens // width, self.slots.count))

    def _read_pieces(self, answers: Sequence[Answer], width: int) -> int:
        """Read the next pieces of prompts in one pass, each at the end of its row; the number of rows."""
        most = self._rows_to_read(width)
        rows = most if self.deterministic else next(count for count in (*ROWS, most) if count >= len(answers))
        ids, places = torch.zeros(rows, width, dtype=torch.int64), torch.full((rows, width), -1)
        slots = [int(answers[0].slot or 0)] * rows
        for row, answer in enumerate(answers):
            piece = answer.prompt[answer.read : answer.read + self.chunk]
            slots[row] = int(answer.slot or 0)
            ids[row, width - len(piece) :] = torch.tensor(piece)
            places[row, width - len(piece) :] = torch.arange(answer.read, answer.read + len(piece))
        for answer, logits in zip(answers, self._forward(ids, slots, places), strict=False):
            answer.read = min(answer.read + self.chunk, len(answer.prompt))
            if answer.read == len(answer.prompt):
                answer.first_logits = logits
        return rows

    def _decode(self, running: Sequence[Answer]) -> Sequence[Answer]:
        """One token more for every answer whose prompt is read."""
        running = [answer for answer in running if answer.stop is None]
        if not running:
            return []
        if len(running) == 1 and self._guess(running[0]):
            return running
        self._compact(running)
        last = max(answer.slot or 0 for answer in running)
        rows = next(bucket for bucket in self.buckets if bucket > last)
        ids, places = torch.zeros(rows, 1, dtype=torch.int64), torch.full((rows, 1), -1)
        for answer in running:
            assert answer.slot is not None
            ids[answer.slot, 0], places[answer.slot, 0] = answer.ids[-1], answer.read
            answer.read += 1
        logits = self._forward(ids, range(rows), places)
        self._take(running, logits[[answer.slot for answer in running]])
        return running

    def _guess(self, answer: Answer) -> bool:
        """Check a guess of the next tokens, where only the likeliest are wanted. Is there one?"""
        if self._pass is None or self.deterministic or not answer.chooser.is_plain:
            return False
        if answer.lookup is None:
            answer.lookup = Lookup(answer.prompt)
        answer.lookup.add(answer.ids[len(answer.lookup) - len(answer.prompt) :])
        room = min(answer.options.max_new_tokens, self.context - len(answer.prompt)) - len(answer.ids)
        guessed = answer.lookup.guess(room - 1)
        size = 1 + len(guessed)
        if size > 1:
            assert answer.slot is not None
            places = torch.arange(answer.read, answer.read + size)[None]
            logits = self._forward(torch.tensor([[answer.ids[-1], *guessed]]), [answer.slot], places, size)
            for row, guess in enumerate([*guessed, None]):
                answer.read += 1
                self._take([answer], logits[row : row + 1])
                if answer.stop is not None or answer.ids[-1] != guess:
                    break
            answer.lookup.was_right(len(guessed), row)
        return size > 1

    def _compact(self, running: Sequence[Answer]) -> None:
        """Move the last answers into free slots where a smaller bucket holds all that run."""
        wanted = next(bucket for bucket in self.buckets if bucket >= len(running))
        for answer in running:
            if answer.slot is None or answer.slot < wanted:
                continue
            free = next((slot for slot, held in enumerate(self._held[:wanted]) if held is None), None)
            if free is not None:
                self.slots.copy(answer.slot, free, answer.read)
                self._held[answer.slot], self._held[free], self._left[free] = None, answer, None
                answer.slot = free

    def _forward(self, ids: Tensor, slots: Sequence[int], places: Tensor, last: int = 1) -> Tensor:
        """(rows x last, vocabulary) logits behind the last tokens of each row; see Slots.at."""
        self.slots.at(slots, places, self._device)
        ids, positions = ids.to(self._device), places.clamp(min=0).to(self._device)
        if self._pass is not None:
            return self._pass(ids, self.slots, positions, partial(self.slots.masks, self._windows, self._device), last)
        out = self.model(
            input_ids=ids,
            attention_mask=self.slots.masks(self._windows, self._device),
            position_ids=positions,
            past_key_values=self.slots,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _take(self, answers: Sequence[Answer], logits: Tensor) -> None:
        """Choose the next token of each from its row; an answer ends with a stop token, and where its tokens or the
        context are used up.
        """
        choices = choose_together([answer.chooser for answer in answers], logits, [answer.ids for answer in answers])
        for answer, choice in zip(answers, choices, strict=True):
            if isinstance(choice, Exception):  # whoever waits for the answer raises it: see Answer
                answer.fault = choice
                self.end(answer, "failed")
                continue
            token, logprobs = choice
            if token in answer.stops:
                self.end(answer, "eos")
                continue
            answer.ids.append(token)
            if logprobs is not None:
                answer.logprobs.append(logprobs)
            if len(answer.ids) == answer.options.max_new_tokens:
                self.end(answer, "length")
            elif len(answer.prompt) + len(answer.ids) == self.context:
                self.end(answer, "context")

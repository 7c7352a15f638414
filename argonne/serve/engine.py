"""Prompts to texts: one engine for `argonne generate` and `chat`, the trainer's samples, evaluation and serving."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from argonne import layout
from argonne.errors import InputError
from argonne.files import read_json
from argonne.serve.decoder import Answer, Decoder
from argonne.serve.options import SamplingOptions, Shaping
from argonne.serve.sampling import Constraint
from argonne.serve.text_stream import TextStream, overlap
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from argonne.model.load import LoadedModel

ROWS = 32
Result = TypeVar("Result")


def to_the_end(work: Generator[None, None, Result]) -> Result:
    """What the work returns, all of it done at once."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result


@dataclass(frozen=True)
class Completion:
    """New ids of one prompt, without the stop token. `stop`: "eos", "length" (max_new_tokens) or "context" (the model's
    is full).
    """

    ids: list[int]
    stop: str


def decoder_for(model: Any, prompts: Sequence[Sequence[int]], most: Sequence[int], rows: int = ROWS) -> Decoder:
    """One that has room for these prompts with so many new tokens, in passes of the same number of rows throughout; for
    a single one guesses are checked too.
    """
    longest = max((len(prompt) + count for prompt, count in zip(prompts, most, strict=True)), default=1)
    return Decoder(
        model,
        rows=max(1, min(rows, len(prompts))),
        context=longest,
        deterministic=len(prompts) > 1,
        patience=len(prompts),
    )


def complete_ids(
    model: Any, prompts: Sequence[Sequence[int]], options: SamplingOptions, eos_ids: Sequence[int]
) -> list[Completion]:
    """All prompts, to their ends; the seed of each is the one before plus 1."""
    return to_the_end(completing(model, prompts, options, eos_ids))


def completing(
    model: Any, prompts: Sequence[Sequence[int]], options: SamplingOptions, eos_ids: Sequence[int]
) -> Generator[None, None, list[Completion]]:
    """The same as work that yields after every step."""
    decoder = decoder_for(model, prompts, [options.max_new_tokens] * len(prompts))
    answers = [decoder.submit(prompt, options.with_seed(row), eos_ids) for row, prompt in enumerate(prompts)]
    while decoder.busy:
        decoder.step()
        yield
    return list(map(completion_of, answers))


def completion_of(answer: Answer) -> Completion:
    """An answer that has ended. Raises what it failed by."""
    if answer.fault is not None:
        raise answer.fault
    return Completion(answer.ids, str(answer.stop))


class Spoken:
    """The text of an answer while it grows: never half a character, never what may become a stop text. `stopped_by`:
    the stop text that ended it.
    """

    stopped_by: str | None = None

    def __init__(self, decoder: Decoder, answer: Answer, tokenizer: TextTokenizer) -> None:
        self._decoder, self.answer = decoder, answer
        self._stream, self._read, self._held = TextStream(tokenizer, answer.prompt), 0, ""

    def more(self) -> str:
        """The text that is certain since the last call. Ends the answer where a stop text stands in it."""
        answer, stops = self.answer, self.answer.chooser.shaping.stop
        for token in answer.ids[self._read :]:
            self._held += self._stream.push(token)
        self._read = len(answer.ids)
        if answer.stop is not None:
            self._held += self._stream.finish()
        found = [(place, text) for text in stops if (place := self._held.find(text)) >= 0]
        if found:
            self._decoder.end(answer, "stop")
            answer.stop = "stop"
            place, self.stopped_by = min(found)
            told, self._held = self._held[:place], ""
            return told
        kept = 0 if answer.stop is not None else max((overlap(self._held, text) for text in stops), default=0)
        told, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return told


def stream_ids(
    model: Any, tokenizer: TextTokenizer, prompt: Sequence[int], options: SamplingOptions, stops: Sequence[int]
) -> Generator[str, None, None]:
    """Pieces of the continuation of one prompt, as soon as they are certain."""
    for _, piece in stream_several(model, tokenizer, prompt, [options], stops, Shaping(), [None]):
        yield piece


def stream_several(
    model: Any,
    tokenizer: TextTokenizer,
    prompt: Sequence[int],
    options: Sequence[SamplingOptions],
    stops: Sequence[int],
    shaping: Shaping,
    constraints: Sequence[Constraint | None],
) -> Generator[tuple[int, str], None, None]:
    """(number, piece) of continuations of one prompt, which is read once: all of the first, then of the second, ..."""
    decoder = decoder_for(model, [prompt] * len(options), [one.max_new_tokens for one in options])
    answers: list[Answer] = []
    for how, constraint in zip(options, constraints, strict=True):
        like = answers[0] if answers else None
        answers.append(decoder.submit(prompt, how, stops, shaping=shaping, constraint=constraint, like=like))
    for number, answer in enumerate(answers):
        spoken = Spoken(decoder, answer, tokenizer)
        while answer.stop is None:
            decoder.step()
            yield number, spoken.more()
        yield number, spoken.more()  # of one that ended while those before it were shown
        completion_of(answer)


def stop_ids(model: Any, tokenizer: TextTokenizer) -> list[int]:
    """Where generation ends: the tokenizer's ends of a document and of a turn, and what the model's generation config
    names.
    """
    return sorted({*tokenizer.stop_ids, *_named_ends(model)})


def _named_ends(model: Any) -> list[int]:
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [token for token in (named if isinstance(named, list) else [named]) if token is not None]


def prompt_ids(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """Ids of the prompt. An empty prompt starts a document, as training saw it: after BOS, or after the EOS of the one
    before.
    """
    ids = tokenizer.encode(prompt)
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    return ids if ids or start is None else [start]


def stream_text(
    model: Any, tokenizer: TextTokenizer, prompt: str, options: SamplingOptions
) -> Generator[str, None, None]:
    """Pieces of the continuation, one a token ("" while a character is incomplete); never the EOS."""
    return stream_ids(model, tokenizer, prompt_ids(tokenizer, prompt), options, stop_ids(model, tokenizer))


@dataclass(frozen=True)
class Engine:
    """A model with its tokenizer, opened once and used often."""

    model: Any
    tokenizer: TextTokenizer
    folder: Path

    def streams(
        self,
        prompt: str,
        options: Sequence[SamplingOptions],
        shaping: Shaping | None = None,
        form: Mapping[str, object] | None = None,
    ) -> Generator[tuple[int, str], None, None]:
        """(number, piece) of a continuation by each of the options, one after the other. form: what they must be; see
        argonne.serve.structured.
        """
        stops = stop_ids(self.model, self.tokenizer)
        constraints: list[Constraint | None] = [None] * len(options)
        if form is not None:
            from argonne.serve.structured import constraint_of

            constraints = [constraint_of(self.tokenizer, form, stops) for _ in options]
        ids = prompt_ids(self.tokenizer, prompt)
        return stream_several(self.model, self.tokenizer, ids, options, stops, shaping or Shaping(), constraints)


def open_engine(model_path: str | Path, *, device: str = "auto", int8: bool = False) -> Engine:
    """Load a run, a checkpoint or an exported folder for generation. int8: see argonne.serve.quantize. Raises
    InputError where it is none, or its tokenizer is missing.
    """
    from argonne.model.load import load_model
    from argonne.parallel.mesh import choose_device
    from argonne.serve.forward import can_be_served_so
    from argonne.serve.quantize import pack, quantize

    loaded = load_model(Path(model_path), device=choose_device(device))
    tokenizer = tokenizer_of(loaded, Path(model_path))
    if int8:
        quantize(loaded.model)
    if can_be_served_so(loaded.model):
        pack(loaded.model)
    return Engine(loaded.model, tokenizer, loaded.folder)


def tokenizer_of(loaded: LoadedModel, name: Path) -> TextTokenizer:
    """The tokenizer beside a model. name: by which it was opened. Raises InputError where there is none, it has more
    entries than the model, or is not the one of the training.
    """
    if loaded.tokenizer_folder is None:
        raise InputError(f"{loaded.folder}: no tokenizer in it; copy the tokenizer's files there")
    tokenizer, rows = load_tokenizer(loaded.tokenizer_folder), int(loaded.model.config.vocab_size)
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"{name}: its tokenizer in {tokenizer.folder} has ids up to {tokenizer.vocab_size - 1:,}, the model's "
            f"embedding {rows:,} rows: it is another model's tokenizer; put the model's own there"
        )
    trained, found = _recorded(name.expanduser(), loaded.folder), tokenizer.fingerprint
    if trained not in (None, found):
        raise InputError(
            f"{name}: its tokenizer in {tokenizer.folder} has the fingerprint {found[:12]}, the training's had "
            f"{str(trained)[:12]}: the same id means something else in each; put the training's own there"
        )
    return tokenizer.ending_as(_named_ends(loaded.model))


def _recorded(path: Path, folder: Path) -> str | None:
    """The fingerprint of the tokenizer that a checkpoint, or the last one of a run, was trained with."""
    for place in (folder, layout.last_checkpoint(path), layout.last_checkpoint(folder.parent)):
        if place is not None and (place / layout.STATE).is_file():
            state: Any = read_json(place / layout.STATE)
            return state.get("tokenizer_fingerprint") if isinstance(state, dict) else None
    return None

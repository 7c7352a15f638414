"""Generation: a key-value cache, batches of prompts, streaming. One engine for `argonne generate`, the trainer's
samples and serving.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from argonne.errors import InputError
from argonne.serve.options import SamplingOptions
from argonne.serve.sampling import Sampler
from argonne.serve.text_stream import TextStream
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer

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


def stream_ids(
    model: Any, prompts: Sequence[Sequence[int]], options: SamplingOptions, eos_ids: Sequence[int]
) -> Iterator[list[int | None]]:
    """Continue every prompt by one token a step: yields a list with each row's new id, None for a row that has ended.

    A row ends after its EOS (which is yielded) or where options or the model's context end. Dropout is off meanwhile,
    and the model's mode is put back after. Raises InputError for an empty prompt or one that fills the model's context.
    """
    room = _room(model, prompts)
    device = next(model.parameters()).device
    sampler = Sampler(options, len(prompts))
    stops = frozenset(eos_ids)
    longest = max(map(len, prompts))
    filler = next(iter(stops), 0)
    ids = torch.tensor([[filler] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    padded = not bool(mask.all())
    running = [True] * len(prompts)
    cache: Any = None
    training = model.training
    model.eval()
    try:
        for _ in range(min(options.max_new_tokens, room)):
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            with torch.no_grad():
                out = model(
                    input_ids=ids,
                    attention_mask=mask if padded else None,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            cache = out.past_key_values
            chosen = sampler.choose(out.logits[:, -1])
            found = chosen.tolist()
            yield [token if alive else None for token, alive in zip(found, running, strict=True)]
            running = [alive and token not in stops for token, alive in zip(found, running, strict=True)]
            if not any(running):
                return
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    finally:
        model.train(training)


def _room(model: Any, prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that fit behind the longest prompt."""
    if not prompts or not all(prompts):
        raise InputError("prompt: found no token, expected at least one; give some text")
    longest, context = max(map(len, prompts)), int(model.config.max_position_embeddings)
    if longest >= context:
        raise InputError(
            f"prompt: found {longest:,} tokens, expected fewer than the model's context of {context:,}; shorten it"
        )
    return context - longest


def complete_ids(
    model: Any, prompts: Sequence[Sequence[int]], options: SamplingOptions, eos_ids: Sequence[int]
) -> list[Completion]:
    """All prompts in one batch, to their ends."""
    return to_the_end(completing(model, prompts, options, eos_ids))


def completing(
    model: Any, prompts: Sequence[Sequence[int]], options: SamplingOptions, eos_ids: Sequence[int]
) -> Generator[None, None, list[Completion]]:
    """The same as work that yields after every token."""
    rows: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for step in stream_ids(model, prompts, options, eos_ids):
        for number, token in enumerate(step):
            if token in eos_ids:
                ended[number] = True
            elif token is not None:
                rows[number].append(token)
        yield
    limit = "length" if options.max_new_tokens <= _room(model, prompts) else "context"
    return [Completion(row, "eos" if end else limit) for row, end in zip(rows, ended, strict=True)]


def stop_ids(model: Any, tokenizer: TextTokenizer) -> list[int]:
    """Where generation ends: the tokenizer's EOS and what the model's generation config names (a chat model's turn
    end).
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in [tokenizer.eos_id, *named] if token is not None})


def prompt_ids(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """Ids of the prompt. An empty prompt starts a document, as training saw it: after BOS, or after the EOS of the one
    before.
    """
    ids = tokenizer.encode(prompt)
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    return ids if ids or start is None else [start]


def stream_text(model: Any, tokenizer: TextTokenizer, prompt: str, options: SamplingOptions) -> Iterator[str]:
    """Pieces of the continuation, as soon as they are certain; never half a character, never the EOS."""
    ids, stops = prompt_ids(tokenizer, prompt), stop_ids(model, tokenizer)
    text = TextStream(tokenizer, ids)
    for (token,) in stream_ids(model, [ids], options, stops):
        if token is not None and token not in stops and (piece := text.push(token)):
            yield piece
    if piece := text.finish():
        yield piece


@dataclass(frozen=True)
class Engine:
    """A model with its tokenizer, opened once and used often."""

    model: Any
    tokenizer: TextTokenizer
    folder: Path

    def stream(self, prompt: str, options: SamplingOptions) -> Iterator[str]:
        return stream_text(self.model, self.tokenizer, prompt, options)

    def complete(self, prompts: Sequence[str], options: SamplingOptions) -> list[str]:
        """Continuations of several prompts, computed as one batch."""
        rows = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        done = complete_ids(self.model, rows, options, stop_ids(self.model, self.tokenizer))
        texts = []
        for ids, completion in zip(rows, done, strict=True):
            stream = TextStream(self.tokenizer, ids)
            texts.append("".join([*map(stream.push, completion.ids), stream.finish()]))
        return texts


def open_engine(model_path: str | Path, *, device: str = "auto") -> Engine:
    """Load a run, a checkpoint or an exported folder for generation. Raises InputError where it is none, or its
    tokenizer is missing.
    """
    from argonne.model.load import load_model
    from argonne.parallel.mesh import choose_device

    loaded = load_model(Path(model_path), device=choose_device(device))
    if loaded.tokenizer_folder is None:
        raise InputError(f"{loaded.folder}: no tokenizer in it; copy the tokenizer's files there")
    return Engine(loaded.model, load_tokenizer(loaded.tokenizer_folder), loaded.folder)


def generate_text(
    model_path: str | Path, prompt: str, options: SamplingOptions | None = None, *, device: str = "auto"
) -> Iterator[str]:
    """Open the model and stream the continuation of `prompt`: what `argonne generate` prints."""
    return open_engine(model_path, device=device).stream(prompt, options or SamplingOptions())

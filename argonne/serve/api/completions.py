"""POST /v1/completions: what follows a text, or several."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence

from argonne.serve.api.answered import finish_reason, frame, new_id, openai_error, usage_of
from argonne.serve.api.asked import (
    MOST_CHOICES,
    MOST_COPIES,
    Served,
    bias_of,
    constraints_of,
    model_of,
    sampling_of,
    stops_of,
)
from argonne.serve.api.chat import form_of, include_usage, no_such_penalty
from argonne.serve.api.fields import ApiError, Fields, wrong
from argonne.serve.engine import prompt_ids, stop_ids
from argonne.serve.options import Shaping
from argonne.serve.sampling import TokenLogprobs
from argonne.serve.service import Request, Ticket

TOKENS, MOST_LISTED = 16, 5  # as OpenAI: new tokens where none are asked for, and alternatives at most


class CompletionsWork:
    """Raises ApiError for what is not understood."""

    def __init__(self, fields: Fields, models: Mapping[str, Served]) -> None:
        self.served = model_of(fields, models)
        engine = self.served.engine
        prompts, texts = _prompts_of(fields.take("prompt"), self.served)
        most = fields.whole("max_tokens", 1, 2**31) or TOKENS
        options = sampling_of(fields, self.served, prompts, most)
        count = fields.whole("n", 1, MOST_COPIES) or 1
        if len(prompts) * count > MOST_CHOICES:
            raise ApiError(400, f"prompt: found {len(prompts) * count} answers, expected at most {MOST_CHOICES}")
        logprobs = fields.whole("logprobs", 0, MOST_LISTED)
        shaping = Shaping(logprobs, bias_of(fields, self.served), stops_of(fields, "stop"))
        form = form_of(fields.table("response_format"))
        self.stream, self.include_usage = fields.flag("stream"), include_usage(fields)
        echo = fields.flag("echo")
        if echo and logprobs is not None:
            raise ApiError(400, "echo: the prompt's own logprobs are not there; leave out one of the two", param="echo")
        no_such_penalty(fields)
        fields.only("suffix", (), "text between two others is not made here; leave it out")
        fields.only("best_of", (1,), "only 1 is known here; use n and choose yourself")
        fields.ignored("user")
        fields.end()
        stops = stop_ids(engine.model, engine.tokenizer)
        constraints = constraints_of(self.served, form, stops, len(prompts) * count, chat=False)
        self.request = Request(prompts, options, stops, shaping, count, constraints)
        self._echoed = [text if echo else "" for text in texts for _ in range(count)]
        self._head: dict[str, object] = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.served.name,
        }

    async def whole(self, ticket: Ticket) -> dict[str, object]:
        size = self.request.size
        texts, stops = list(self._echoed), [""] * size
        ids: list[list[int]] = [[] for _ in range(size)]
        found: list[list[TokenLogprobs]] = [[] for _ in range(size)]
        async for piece in ticket:
            texts[piece.number] += piece.text
            ids[piece.number] += piece.ids
            found[piece.number] += piece.logprobs
            stops[piece.number] = piece.stop or ""
        choices = [
            self._choice(number, texts[number], self._logprobs(ids[number], found[number], 0), stops[number])
            for number in range(size)
        ]
        return {**self._head, "choices": choices, "usage": usage_of(self.request, sum(map(len, ids)))}

    async def events(self, ticket: Ticket) -> AsyncIterator[str]:
        counts, offsets = [0] * self.request.size, [0] * self.request.size
        usage: dict[str, object] = {"usage": None} if self.include_usage else {}
        for number, text in enumerate(self._echoed):
            if text:
                yield frame({**self._head, "choices": [self._choice(number, text, None, None)], **usage})
        async for piece in ticket:
            number = piece.number
            logprobs = self._logprobs(piece.ids, piece.logprobs, offsets[number])
            offsets[number] += sum(map(self._length, piece.ids))
            counts[number] += len(piece.ids)
            if piece.text or piece.stop is not None or logprobs:
                yield frame(
                    {**self._head, "choices": [self._choice(number, piece.text, logprobs, piece.stop)], **usage}
                )
        if self.include_usage:
            yield frame({**self._head, "choices": [], "usage": usage_of(self.request, sum(counts))})
        yield "data: [DONE]\n\n"

    def failed(self, error: ApiError) -> str:
        return frame(openai_error(error))

    def _choice(self, number: int, text: str, logprobs: object, stop: str | None) -> dict[str, object]:
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(stop)}

    def _word(self, token: int) -> str:
        """As OpenAI writes it: a part of a character by its bytes, so that no two tokens are one."""
        raw = self.served.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _length(self, token: int) -> int:
        return len(self.served.bytes_of(token).decode(errors="replace"))

    def _logprobs(self, ids: Sequence[int], found: Sequence[TokenLogprobs], offset: int) -> dict[str, object] | None:
        """text_offset: characters of the tokens before, each token read alone."""
        if self.request.shaping.logprobs is None:
            return None
        offsets = []
        for token in ids:
            offsets.append(offset)
            offset += self._length(token)
        return {
            "tokens": list(map(self._word, ids)),
            "token_logprobs": [max(one.chosen, -9999.0) for one in found],
            "top_logprobs": [
                {self._word(token): max(value, -9999.0) for token, value in one.likeliest} for one in found
            ],
            "text_offset": offsets,
        }


def _prompts_of(value: object, served: Served) -> tuple[list[list[int]], list[str]]:
    """Ids and texts of a text, of token ids, or of a list of either."""
    if value is None:
        raise ApiError(400, "prompt: is missing", param="prompt")
    listed = value if isinstance(value, list) and not all(_is_id(one, served) for one in value) else [value]
    tokenizer = served.engine.tokenizer
    prompts, texts = [], []
    for one in listed:
        if isinstance(one, str):
            prompts.append(prompt_ids(tokenizer, one))
            texts.append(one)
        elif isinstance(one, list) and one and all(_is_id(token, served) for token in one):
            prompts.append(one)
            texts.append(tokenizer.decode(one))
        else:
            raise wrong("prompt", one, "a text, token ids of the model, or a list of texts or of lists of ids")
    if not all(prompts):
        raise ApiError(400, "prompt: found no token, expected at least one; give some text", param="prompt")
    return prompts, texts


def _is_id(value: object, served: Served) -> bool:
    return type(value) is int and 0 <= value < served.engine.model.config.vocab_size

"""What the APIs read alike: the model, sampling, conversations, tools and the form of the answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from argonne.data.chat import ChatTemplate, Conversation, Message
from argonne.data.conversations import ADVICE, Fault, message_of, tools_of
from argonne.errors import InputError
from argonne.layout import THINK_TOKENS
from argonne.serve.api.fields import ApiError, Fields, wrong
from argonne.serve.decoder import Decoder
from argonne.serve.engine import Engine
from argonne.serve.options import SamplingOptions
from argonne.serve.sampling import Constraint
from argonne.tokens.tokenizer import byte_letters

MOST_COPIES, MOST_CHOICES, MOST_STOPS, MOST_STOP_LENGTH = 16, 128, 8, 256
SEEDS = 2**63 - 1


@dataclass(frozen=True)
class Served:
    """A model under its id. template: how it is asked in turns, None where it cannot be, which `no_chat` explains."""

    name: str
    engine: Engine
    decoder: Decoder
    template: ChatTemplate | None
    no_chat: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def chat(self) -> ChatTemplate:
        """Raises ApiError where the model has no chat template."""
        if self.template is None:
            raise ApiError(400, f"{self.name}: {self.no_chat}; ask it by /v1/completions", param="model")
        return self.template

    @cached_property
    def words(self) -> dict[int, str]:
        """The token of each id, as tokenizer.json writes it."""
        return {number: token for token, number in self.engine.tokenizer.entries.items()}

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for, of a character only a part perhaps."""
        text = self.engine.tokenizer.decode([token])
        if "\ufffd" not in text:
            return text.encode()
        word, known = self.words.get(token, ""), byte_letters()
        return bytes(known[each] for each in word) if known.keys() >= {*word} else text.encode()


# ------------------------------------------------------------------------------------------------- what is asked


def named(name: str, models: Mapping[str, Served]) -> Served:
    if name not in models:
        known = ", ".join(map(repr, models))
        raise ApiError(404, f"model: found {name[:100]!r}, expected {known}", param="model", code="model_not_found")
    return models[name]


def model_of(fields: Fields, models: Mapping[str, Served]) -> Served:
    return named(fields.needed("model"), models)


def sampling_of(fields: Fields, served: Served, prompts: Sequence[Sequence[int]], most: int | None) -> SamplingOptions:
    """Sampling as the API's fields say it. most: new tokens, None for what the context leaves."""
    longest, context = max(map(len, prompts)), served.decoder.context
    if longest + (most or 1) > context:
        asked = f"{longest:,} tokens of the prompt and {most or 1:,} of the answer"
        raise ApiError(
            400,
            f"found {asked}, expected at most the model's context of {context:,} in all; shorten one",
            param="messages" if served.template else "prompt",
            code="context_length_exceeded",
        )
    try:
        return SamplingOptions(
            max_new_tokens=most or context - longest,
            temperature=fields.number("temperature", 1.0, 0, 2),
            top_p=fields.number("top_p", 1.0, 0, 1),
            top_k=fields.whole("top_k", 0, SEEDS) or 0,
            min_p=fields.number("min_p", 0.0, 0, 1),
            repetition_penalty=fields.number("repetition_penalty", 1.0, 0),
            seed=secrets.randbits(62) if (seed := fields.whole("seed", -SEEDS, SEEDS)) is None else seed,
        )
    except InputError as error:
        raise ApiError(400, str(error), param=str(error).partition(":")[0]) from None


def stops_of(fields: Fields, name: str) -> tuple[str, ...]:
    value = fields.take(name)
    listed = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(listed, list)
        or len(listed) > MOST_STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= MOST_STOP_LENGTH for text in listed)
    ):
        expected = f"at most {MOST_STOPS} texts of 1 to {MOST_STOP_LENGTH} characters"
        raise wrong(fields.path(name), value, expected)
    return tuple(listed)


def bias_of(fields: Fields, served: Served) -> dict[int, float]:
    table, size = fields.table("logit_bias"), int(served.engine.model.config.vocab_size)
    found: dict[int, float] = {}
    for name, value in table.rest().items() if table else ():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < size):
            raise wrong("logit_bias", name, f"token ids below {size}")
        found[int(name)] = Fields({name: value}, "logit_bias").number(name, 0.0, -100, 100)
    return found


def conversation_of(turns: Sequence[object], tools: Sequence[object], where: str = "messages") -> Conversation:
    """Turns in the shape of chat completions. A system message only begins, results of tools follow a call; other
    orders are shown to the model as they stand.
    """
    found: list[Message] = []
    for place, turn in enumerate(turns):
        try:
            message = message_of(turn)
            if (message.role == "system" and place) or (
                message.role == "tool" and (not found or found[-1].role not in ("assistant", "tool"))
            ):
                raise Fault("roles-out-of-order")
        except Fault as fault:
            named, advice = f"{where}[{place}]", ADVICE.get(str(fault))
            raise ApiError(400, f"{named}: {fault}{f': {advice}' if advice else ''}", param=named) from None
        found.append(message)
    try:
        return Conversation(tuple(found), tuple(tools_of(list(tools))))
    except Fault as fault:
        raise ApiError(400, f"tools: {fault}", param="tools") from None


def prompt_of(served: Served, conversation: Conversation, where: str = "messages") -> list[int]:
    try:
        return [int(token) for token in served.chat.prompt(conversation)]
    except InputError as error:
        raise ApiError(400, f"{where}: {error}", param=where) from None


def function_of(fields: Fields, schema: str = "parameters") -> dict[str, object]:
    """A tool as the template shows it. schema: the field of its parameters."""
    function: dict[str, object] = {"name": fields.needed("name")}
    if (description := fields.text("description")) is not None:
        function["description"] = description
    if (parameters := fields.table(schema)) is not None:
        function["parameters"] = parameters.rest()
    fields.ignored("strict")
    fields.end()
    return {"type": "function", "function": function}


def constraints_of(
    served: Served, spec: Mapping[str, object] | None, stops: Sequence[int], count: int, *, chat: bool
) -> list[Constraint]:
    """What the answers may be: one for each, none where nothing was asked. chat: a model that thinks first may."""
    if spec is None:
        return []
    from argonne.serve.structured import constraint_of

    tokenizer = served.engine.tokenizer
    thinks = chat and all(tokenizer.token_to_id(token) is not None for token in THINK_TOKENS)
    try:
        return [constraint_of(tokenizer, spec, stops, after_thought=thinks) for _ in range(count)]
    except InputError as error:
        raise ApiError(400, f"response_format: {error}", param="response_format") from None

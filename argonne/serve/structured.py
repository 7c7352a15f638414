"""Answers of a given form: any JSON object, a JSON schema, a regular expression, or one of several texts.

By llguidance: before each token it tells which ones the form allows. JSON comes without white space, which a small
model would write without end, and what a schema leaves open gets bounds (argonne.serve.bounds). Where the form is
complete only the stop tokens are allowed. Added tokens (`<think>`, the turn tokens) are never part of the form.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from argonne.errors import InputError
from argonne.layout import THINK_TOKENS
from argonne.serve.bounds import Json, bounded
from argonne.tokens.tokenizer import TextTokenizer, byte_letters

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

KINDS = ("json_object", "json_schema", "regex", "choice")
COMPACT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
MOST_NEWLINES = 2  # between a trace and what it led to: what the template writes there


def constraint_of(
    tokenizer: TextTokenizer, spec: Mapping[str, object], stops: Sequence[int], *, after_thought: bool = False
) -> Structure:
    """What keeps one answer to `spec`: {"type": "json_object"}, {"type": "json_schema", "schema": {..}}, {"type":
    "regex", "pattern": ..} or {"type": "choice", "choices": [..]}.

    after_thought: an answer that begins with `<think>` is free until `</think>`. Raises InputError where llguidance is
    not installed, the tokenizer is not byte-level BPE, there are no stops, or the form is wrong or too large.
    """
    if not stops:
        raise InputError("structured output: found no stop token, with which an answer of the form could end; name one")
    vocabulary, grammar = _vocabulary(tokenizer), _grammar(spec)
    thought = [tokenizer.token_to_id(token) for token in THINK_TOKENS] if after_thought else []
    if None in thought:
        raise InputError(
            f"{tokenizer.folder}: {' and '.join(THINK_TOKENS)} are no tokens of it; leave after_thought out"
        )
    from llguidance import LLMatcher

    matcher = LLMatcher(vocabulary.trie, grammar, log_level=0)
    if matcher.is_error():
        raise InputError(f"{spec['type']}: {_reason(matcher)}; mend it")
    return Structure(matcher, vocabulary, stops, [token for token in thought if token is not None])


class Structure:
    """The constraint of one answer; see argonne.serve.sampling.Constraint."""

    def __init__(
        self, matcher: LLMatcher, vocabulary: Vocabulary, stops: Sequence[int], thought: Sequence[int]
    ) -> None:
        self._matcher, self._vocabulary, self._stops = matcher, vocabulary, list(stops)
        self._thought = dict(zip(("begin", "end"), thought, strict=False))
        self._thinking, self._fresh, self._newlines = False, True, 0

    def allowed(self, vocabulary: int) -> Tensor:
        """(vocabulary,) bool: ids that may come next. Raises InputError where the form takes too much work."""
        found = torch.zeros(max(vocabulary, len(self._vocabulary.tokens)), dtype=torch.bool)
        if self._thinking:
            found[:] = True
            found[self._stops] = False
            return found[:vocabulary]
        if not self._matcher.is_stopped():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            known = np.unpackbits(bits, count=len(self._vocabulary.tokens), bitorder="little")
            found[: len(known)] = torch.from_numpy(known).bool()
            found[self._vocabulary.special_token_ids] = False
        if self._matcher.is_accepting():
            found[self._stops] = True
        if self._fresh and self._thought:
            found[self._thought["begin"]] = True
        if self._newlines:
            found[[token for token, size in self._vocabulary.newlines.items() if size <= self._newlines]] = True
        if self._matcher.is_error() or not found[:vocabulary].any():
            raise InputError(f"structured output: {_reason(self._matcher)}; ask for a simpler form")
        return found[:vocabulary]

    def accept(self, token: int) -> None:
        """Go on behind a token that was allowed; a stop token ends it."""
        fresh, self._fresh = self._fresh, False
        if self._thinking:
            if token == self._thought["end"]:
                self._thinking, self._newlines = False, MOST_NEWLINES
        elif fresh and token == self._thought.get("begin"):
            self._thinking = True
        elif self._newlines and token in self._vocabulary.newlines and not self._matcher.validate_tokens([token]):
            self._newlines -= self._vocabulary.newlines[token]
        elif token not in self._stops:
            self._newlines = 0
            if not self._matcher.consume_token(token):
                raise InputError(f"structured output: token {token} does not fit: {_reason(self._matcher)}")


class Vocabulary:
    """What a tokenizer's ids stand for, as llguidance asks for it. trie: what it makes of it. special_token_ids: those
    that no text makes. newlines: ids of nothing but newlines, and of how many.
    """

    bos_token_id = None

    def __init__(self, tokenizer: TextTokenizer) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise InputError(
                "structured output needs llguidance, which is not installed; install argonne[structured]"
            ) from None
        found = _token_bytes(tokenizer)
        self.tokens = [f"<{number}>".encode() if token is None else token for number, token in enumerate(found)]
        self.special_token_ids = [number for number, token in enumerate(found) if token is None]
        # Masked like the others: which tokens end an answer is each request's.
        self.eos_token_id = self.special_token_ids[0] if tokenizer.eos_id is None else tokenizer.eos_id
        self.newlines = {number: len(token) for number, token in enumerate(self.tokens) if not token.strip(b"\n")}
        self._encode = tokenizer.encode
        self.trie = LLTokenizer(TokenizerWrapper(self))

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


@functools.lru_cache(maxsize=2)
def _vocabulary(tokenizer: TextTokenizer) -> Vocabulary:
    """150,000 entries take seconds."""
    return Vocabulary(tokenizer)


def _token_bytes(tokenizer: TextTokenizer) -> list[bytes | None]:
    """Of each id its bytes, None of added and control tokens and of holes. Raises InputError where it is not
    byte-level BPE.
    """
    value = byte_letters()
    added = {int(token["id"]) for token in tokenizer.head.get("added_tokens", [])} | tokenizer.controls
    found: list[bytes | None] = [None] * tokenizer.vocab_size
    whole = tokenizer.has_pre_tokens
    for text, number in tokenizer.entries.items():
        if number not in added and whole:
            whole = all(letter in value for letter in text)
            found[number] = bytes(value.get(letter, 0) for letter in text)
    if not whole or not {bytes([number]) for number in range(256)} <= {*found}:
        raise InputError(
            f"{tokenizer.folder}: structured output needs a tokenizer of byte-level BPE with all 256 bytes, which it "
            "is not; use a model with one"
        )
    return found


def _grammar(spec: Mapping[str, object]) -> str:
    """llguidance's words for it. Raises InputError where it is no such spec."""
    kind = spec.get("type")
    value = spec.get({"json_schema": "schema", "regex": "pattern", "choice": "choices"}.get(str(kind), ""))
    if kind == "json_object":
        return _of_schema(bounded({"type": "object"}))
    if kind == "json_schema":
        if not isinstance(value, dict):
            raise InputError(f"json_schema: found a {type(value).__name__}, expected an object with the schema")
        try:
            return _of_schema(bounded(value))
        except RecursionError:
            raise InputError("json_schema: schemas stand within schemas too deeply; make it flatter") from None
    from llguidance import LLMatcher, regex_to_lark

    if kind == "regex":
        if not isinstance(value, str):
            raise InputError(f"regex: found a {type(value).__name__}, expected a text")
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(value, 'd')}/")  # digits: 0 to 9 only
    if kind == "choice":
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, str) and one for one in value):
            raise InputError(f"choice: found {value!r}, expected a list of texts of at least one character")
        return LLMatcher.grammar_from_regex("|".join(map(_quoted, value)))
    raise InputError(f"structured output: found type {kind!r}, expected {', '.join(KINDS)}")


def _of_schema(schema: Mapping[str, Json]) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=COMPACT)


def _quoted(text: str) -> str:
    return "".join(letter if re.match("[A-Za-z0-9]", letter) else f"\\x{{{ord(letter):x}}}" for letter in text)


def _reason(matcher: LLMatcher) -> str:
    told = matcher.get_error().partition("<state>")[0].split()
    return " ".join(told) or "no token may come next"

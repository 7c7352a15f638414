"""Answers of a given form, by models that know nothing: whatever they say fits, and it ends."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.errors import InputError
from argonne.serve.bounds import MOST_ITEMS, MOST_KEY
from argonne.serve.decoder import Answer, Decoder
from argonne.serve.options import SamplingOptions
from argonne.serve.structured import Structure, constraint_of
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from tests.serve.test_engine import make_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "home": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "lived": {"type": "number"}},
            "required": ["city"],
        },
    },
    "required": ["name", "home"],
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "nested objects with optional fields": PERSON,
    "an enum": {"enum": ["red", "green", 3, None]},
    "an array of numbers": {"type": "array", "items": {"type": "number"}, "minItems": 2},
    "an integer without bounds": {"type": "integer"},
    "a number above a bound": {"type": "number", "exclusiveMinimum": 10**15},
    "$ref to itself": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "boolean"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
            }
        },
    },
    "anyOf": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "array", "items": {"const": 1}}]},
    "allOf": {"allOf": [{"type": "string", "maxLength": 9}, {"minLength": 2}]},
    "a map": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "a string": {"type": "string"},
    "anything": {},
}
OBJECT = {"type": "json_object"}
THINKING = {"type": "choice", "choices": ["yes", "no"]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    texts = ['{"name": "Ada", "age": 36}\n\n', "red green 🙂 yes no maybe\n"] * 30
    return load_tokenizer(train_tokenizer(texts, 320, tmp_path_factory.mktemp("tokenizer") / "bpe"))


@pytest.fixture(scope="module")
def model(tokenizer: TextTokenizer) -> Any:
    return make_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)


def answers(
    model: Any, tokenizer: TextTokenizer, spec: dict[str, Any], count: int = 20, tokens: int = 4000, **more: Any
) -> list[Answer]:
    """Answers to one prompt, which is read once."""
    decoder = Decoder(model, rows=count)
    options, stops = SamplingOptions(tokens, temperature=1.0, top_p=1.0), [tokenizer.eos_id]
    found: list[Answer] = []
    for number in range(count):
        constraint = constraint_of(tokenizer, spec, stops, **more)
        like = found[0] if found else None
        found.append(decoder.submit([5, 6], options.with_seed(number), stops, constraint=constraint, like=like))
    while decoder.busy:
        decoder.step()
    return found


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_of_a_model_that_knows_nothing_end_and_are_valid(
    model: Any, tokenizer: TextTokenizer, name: str
) -> None:
    schema = SCHEMAS[name]
    found = answers(model, tokenizer, {"type": "json_schema", "schema": schema})
    assert [answer.stop for answer in found] == ["eos"] * 20
    for answer in found:
        jsonschema.validate(json.loads(tokenizer.decode(answer.ids)), schema)
    assert len({tuple(answer.ids) for answer in found}) > 1


def test_any_json_object_ends_within_its_bounds(model: Any, tokenizer: TextTokenizer) -> None:
    for answer in answers(model, tokenizer, OBJECT):
        value = json.loads(tokenizer.decode(answer.ids))
        assert isinstance(value, dict)
        assert all(len(key) <= MOST_KEY for key in value)
        assert len(value) <= MOST_ITEMS


def test_an_answer_that_is_cut_says_so(model: Any, tokenizer: TextTokenizer) -> None:
    (found,) = answers(model, tokenizer, {"type": "json_schema", "schema": PERSON}, count=1, tokens=6)
    assert (found.stop, len(found.ids)) == ("length", 6)


@pytest.mark.parametrize("pattern", [r"[a-c]{2,9}", r"\d{4}-\d\d", "(ja/|nein)!?", "ü🙂?"])
def test_a_regular_expression_is_matched_whole(model: Any, tokenizer: TextTokenizer, pattern: str) -> None:
    for answer in answers(model, tokenizer, {"type": "regex", "pattern": pattern}, count=8):
        assert answer.stop == "eos"
        assert re.fullmatch(pattern, tokenizer.decode(answer.ids))


def test_a_choice_is_one_of_them_whatever_signs_they_hold(model: Any, tokenizer: TextTokenizer) -> None:
    choices = ["red", "(a|b)*", 'say "no"\n', "🙂", "red wine", "\x7f\\d"]
    found = answers(model, tokenizer, {"type": "choice", "choices": choices}, count=40)
    texts = {tokenizer.decode(answer.ids) for answer in found}
    assert texts <= {*choices}
    assert len(texts) >= 4


def walk(structure: Structure, tokenizer: TextTokenizer, seed: int, most: int = 6000) -> list[int]:
    """Allowed tokens, drawn evenly, up to the stop."""
    draw, ids = random.Random(seed), []
    while len(ids) < most:
        allowed = structure.allowed(tokenizer.vocab_size).nonzero()[:, 0].tolist()
        assert allowed, "no token may come next"
        token = draw.choice(allowed)
        structure.accept(token)
        if token == tokenizer.eos_id:
            return ids
        assert token not in added(tokenizer)
        ids.append(token)
    raise AssertionError("it does not end")


def added(tokenizer: TextTokenizer) -> set[int]:
    return {token["id"] for token in tokenizer.head["added_tokens"]}


scalars = st.one_of(
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-(2**53), 2**53 - 99),
        st.integers(0, 99),
    ),
    st.builds(lambda low: {"type": "number", "minimum": low}, st.integers(-(2**53), 2**53)),
    st.builds(
        lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more}, *[st.integers(0, 20)] * 2
    ),
    st.builds(lambda values: {"enum": values}, st.lists(st.text(max_size=5) | st.booleans(), min_size=1)),
    st.sampled_from([{"type": "null"}, {"type": ["boolean", "integer"]}, {"type": "string", "format": "date"}]),
)
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.builds(lambda item, most: {"type": "array", "items": item, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda fields, few: {"type": "object", "properties": fields, "required": [*fields][:few]},
            st.dictionaries(st.sampled_from("abcdé"), inner, max_size=3),
            st.integers(0, 3),
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=40)
@given(schema=schemas, seed=st.integers(0, 999))
def test_some_token_may_always_come_next_until_the_answer_is_valid(
    tokenizer: TextTokenizer, schema: dict[str, Any], seed: int
) -> None:
    stops = [tokenizer.eos_id]
    ids = walk(constraint_of(tokenizer, {"type": "json_schema", "schema": schema}, stops), tokenizer, seed)
    jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)


def test_a_complete_answer_leaves_only_the_stops_which_it_accepts(tokenizer: TextTokenizer) -> None:
    structure = constraint_of(tokenizer, {"type": "regex", "pattern": "ab"}, [3, tokenizer.eos_id])
    for token in tokenizer.encode("ab"):
        structure.accept(token)
    assert structure.allowed(400).nonzero()[:, 0].tolist() == sorted([3, tokenizer.eos_id])
    assert structure.allowed(400).shape == (400,)
    structure.accept(3)


def test_an_answer_that_may_go_on_may_also_stop(tokenizer: TextTokenizer) -> None:
    structure = constraint_of(tokenizer, {"type": "regex", "pattern": "a*"}, [tokenizer.eos_id])
    allowed = structure.allowed(tokenizer.vocab_size)
    assert allowed[tokenizer.eos_id]
    assert allowed[tokenizer.encode("a")[0]]


def test_no_added_token_stands_inside(tokenizer: TextTokenizer) -> None:
    structure = constraint_of(tokenizer, {"type": "regex", "pattern": "(?s:.*)"}, [tokenizer.eos_id])
    allowed = {*structure.allowed(tokenizer.vocab_size).nonzero()[:, 0].tolist()}
    assert allowed & added(tokenizer) == {tokenizer.eos_id}
    assert len(allowed) > 100


# --------------------------------------------------------------------------------------------------------- thinking


def test_behind_a_trace_the_form_begins_and_within_it_everything_is_free(tokenizer: TextTokenizer) -> None:
    begin, end = (tokenizer.token_to_id(token) for token in ("<think>", "</think>"))
    structure = constraint_of(tokenizer, THINKING, [tokenizer.eos_id], after_thought=True)
    assert structure.allowed(320)[begin]
    structure.accept(begin)
    within = structure.allowed(320)
    assert int(within.sum()) == 319
    assert not within[tokenizer.eos_id]
    for token in [*tokenizer.encode("maybe {"), end]:
        structure.accept(token)
    newline = tokenizer.encode("\n")[0]
    for _ in range(2):
        assert structure.allowed(320)[newline]
        structure.accept(newline)
    last = structure.allowed(320)
    assert not last[newline]
    assert not last[begin]
    for token in tokenizer.encode("yes"):
        structure.accept(token)
    assert structure.allowed(320).nonzero()[:, 0].tolist() == [tokenizer.eos_id]


def test_an_answer_without_a_trace_has_the_form_from_its_beginning(tokenizer: TextTokenizer) -> None:
    structure = constraint_of(tokenizer, THINKING, [tokenizer.eos_id], after_thought=True)
    structure.accept(tokenizer.encode("no")[0])
    assert not structure.allowed(320)[tokenizer.token_to_id("<think>")]
    plain = constraint_of(tokenizer, THINKING, [tokenizer.eos_id])
    assert not plain.allowed(320)[tokenizer.token_to_id("<think>")]


# ----------------------------------------------------------------------------------------------------------- refused


def nested(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(levels):
        found = {"items": found}
    return found


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "yaml"}, "found type 'yaml', expected json_object, json_schema, regex, choice"),
        ({"type": "json_schema", "schema": {"type": "objekt"}}, "json_schema: .*objekt"),
        ({"type": "json_schema", "schema": {"not": {}}}, "json_schema: .*Unimplemented"),
        ({"type": "json_schema", "schema": []}, "json_schema: found a list"),
        ({"type": "json_schema", "schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "json_schema: "),
        ({"type": "json_schema", "schema": {"$ref": "#/$defs/none"}}, "json_schema: "),
        ({"type": "json_schema", "schema": {"$defs": 3, "type": {}, "properties": []}}, "json_schema: "),
        ({"type": "json_schema", "schema": {"allOf": 3, "items": 4}}, "json_schema: "),
        (
            {"type": "json_schema", "schema": {"items": {"maximum": -(10**27)}}},
            "maximum: found -1000.*, expected at most",
        ),
        (
            {"type": "json_schema", "schema": {"multipleOf": 62615533}},
            "multipleOf: found 62615533, expected at most 1,000",
        ),
        ({"type": "regex", "pattern": "("}, "regex: .*unclosed group"),
        ({"type": "json_schema", "schema": nested(100_000)}, "json_schema: .*too deeply"),
        ({"type": "regex"}, "regex: found a NoneType"),
        ({"type": "choice", "choices": []}, r"choice: found \[\]"),
        ({"type": "choice", "choices": ["a", ""]}, "choice: found"),
    ],
)
def test_a_wrong_form_is_refused_with_the_reason(tokenizer: TextTokenizer, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        constraint_of(tokenizer, spec, [tokenizer.eos_id])


def test_without_a_stop_token_no_form_could_end(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match="found no stop token"):
        constraint_of(tokenizer, OBJECT, [])


def test_another_kind_of_tokenizer_is_refused(numbers_folder: Path) -> None:
    with pytest.raises(InputError, match="needs a tokenizer of byte-level BPE"):
        constraint_of(load_tokenizer(numbers_folder), OBJECT, [0])


def test_a_missing_package_is_named(tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"install argonne\[structured\]"):
        constraint_of(load_tokenizer(tokenizer.folder), OBJECT, [0])


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "gpt2", "bare"])
def test_the_familys_tokenizers_spell_answers_of_a_form(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "tokenizers" / name
    if name == "bare":
        folder = train_tokenizer(["one two three "] * 9, 280, tmp_path / "bare", bare=True)
    tokenizer = load_tokenizer(folder)
    ids = walk(constraint_of(tokenizer, {"type": "json_schema", "schema": PERSON}, [tokenizer.eos_id]), tokenizer, 3)
    jsonschema.validate(json.loads(tokenizer.decode(ids)), PERSON)
    text = json.dumps({"name": "Zoë 🙂", "home": {"city": "Ur"}}, separators=(",", ":"), ensure_ascii=False)
    structure = constraint_of(tokenizer, {"type": "json_schema", "schema": PERSON}, [tokenizer.eos_id])
    for token in tokenizer.encode(text):
        assert structure.allowed(tokenizer.vocab_size)[token]
        structure.accept(token)
    assert torch.equal(structure.allowed(tokenizer.vocab_size).nonzero()[:, 0], torch.tensor([tokenizer.eos_id]))

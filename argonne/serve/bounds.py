"""JSON schemas with an end: what a schema leaves open gets a bound, so that a small model cannot write without end.

A bound that the schema gives itself stands, and a `pattern` is one. What is allowed stays valid under the schema as it
was; a schema that recurs through `$ref` stays as deep as it is written, and an explicit `additionalProperties` beside
`properties` that are not all required may be used any number of times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from argonne.errors import InputError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MOST_CHARACTERS = 400  # of a string
MOST_KEY = 40  # characters of a key that the schema does not name
MOST_ITEMS = 20  # of an array, and keys of an object that the schema does not name
LARGEST, SMALLEST_STEP = 10**15 - 1, 1e-6  # of numbers: 15 digits, and 6 behind the point; no exponents
MOST_LEVELS = 3  # of arrays and objects within a value of which the schema says nothing

# Beyond them llguidance rounds (bounds are doubles), ends the process (a range below what 64 bits hold) or takes
# minutes (of a multiple).
MOST_OF_A_BOUND, MOST_OF_A_MULTIPLE = 2**53, 1000

# Where a schema holds schemas: by name, in a list, or one.
NAMED = ("properties", "patternProperties", "$defs", "definitions")
LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
# A schema with one of them says by others what it allows.
ELSEWHERE = {"$ref", "const", "enum", "anyOf", "oneOf"}
OF_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
ANY = "argonne_any_"


def bounded(schema: Mapping[str, Json]) -> dict[str, Json]:
    """The schema with a bound for whatever it leaves open. Raises InputError for numbers that are too large in it."""
    found = _bounded(dict(schema) or {"$comment": "anything"})
    assert isinstance(found, dict)
    held = found.get("$defs", {})
    if isinstance(held, dict):  # else it is wrong, which the grammar's compiler says
        found["$defs"] = {**held, **{f"{ANY}{level}": _any(level) for level in range(MOST_LEVELS + 1)}}
    return found


def _any(levels: int) -> Json:
    """Any value with so many levels of arrays and objects."""
    within: Json = {"$ref": f"#/$defs/{ANY}{levels - 1}"}
    holders: list[Json] = [{"type": "array", "items": within}, {"type": "object", "additionalProperties": within}]
    scalars: list[Json] = [{"type": "null"}, {"type": "boolean"}, {"type": "number"}, {"type": "string"}]
    return {"anyOf": [_bounded(one) for one in (*scalars, *(holders if levels else []))]}


def _bounded(schema: Json, *, branch: bool = False) -> Json:
    """branch: it is one of an allOf, which together have an end."""
    if schema is True or schema == {}:
        return {} if branch else _anything()
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Json] = {}
    for name, value in schema.items():
        most = MOST_OF_A_MULTIPLE if name == "multipleOf" else MOST_OF_A_BOUND
        if name in OF_NUMBERS and isinstance(value, (int, float)) and abs(value) > most:
            raise InputError(f"json_schema: {name}: found {value}, expected at most {most:,}; leave it out")
        if name in NAMED and isinstance(value, dict):
            found[name] = {key: _bounded(one) for key, one in value.items()}
        elif name in LISTED and isinstance(value, list):
            found[name] = [_bounded(one, branch=name == "allOf") for one in value]
        else:
            found[name] = _bounded(value) if name in ("items", "additionalProperties") else value
    branches = found.get("allOf")
    beside = [one for one in branches if isinstance(one, dict)] if isinstance(branches, list) else []
    whole = {name: value for one in (*beside, found) for name, value in one.items()}
    if branch or ELSEWHERE & whole.keys():
        return found
    ends = (
        _ends(whole) if beside else _ends(whole) | _ends_of_object(whole)
    )  # one branch may not close another's object
    return {**found, **ends}


def _ends(schema: dict[str, Json]) -> dict[str, Json]:
    """The bounds of strings, numbers and arrays that it lacks."""
    found: dict[str, Json] = {}
    if _allows(schema, "string") and not schema.keys() & {"maxLength", "pattern"}:
        found["maxLength"] = max(MOST_CHARACTERS, _whole(schema, "minLength"))
    if _allows(schema, "number", "integer"):
        if not schema.keys() & {"minimum", "exclusiveMinimum"}:
            found["minimum"] = min(-LARGEST, 10 * _whole(schema, "maximum", "exclusiveMaximum"))
        if not schema.keys() & {"maximum", "exclusiveMaximum"}:
            found["maximum"] = max(LARGEST, 10 * _whole(schema, "minimum", "exclusiveMinimum"))
        if _allows(schema, "number") and "multipleOf" not in schema:
            found["multipleOf"] = SMALLEST_STEP
    if _allows(schema, "array"):
        if "maxItems" not in schema:
            found["maxItems"] = max(MOST_ITEMS, _whole(schema, "minItems"))
        if "items" not in schema:
            found["items"] = _anything()
    return found


def _ends_of_object(schema: dict[str, Json]) -> dict[str, Json]:
    if not _allows(schema, "object") or schema.get("additionalProperties") is False:
        return {}
    if "properties" in schema:  # others would be made up
        return {} if "additionalProperties" in schema else {"additionalProperties": False}
    found: dict[str, Json] = {"maxProperties": max(MOST_ITEMS, _whole(schema, "minProperties")), **schema}
    if "patternProperties" not in schema:
        values = schema.get("additionalProperties", _anything())
        found |= {"patternProperties": {f"^.{{1,{MOST_KEY}}}$": values}, "additionalProperties": False}
    return found if "additionalProperties" in found else {**found, "additionalProperties": False}


def _anything() -> Json:
    return {"$ref": f"#/$defs/{ANY}{MOST_LEVELS}"}


def _allows(schema: dict[str, Json], *types: str) -> bool:
    named = schema.get("type", [*types])
    return any(one in types for one in (named if isinstance(named, list) else [named]))


def _whole(schema: dict[str, Json], *names: str) -> int:
    """The number that one of these keywords sets; 0 where none does."""
    return next((int(value) for name in names if isinstance(value := schema.get(name), (int, float))), 0)

"""The models that a server starts with: opened, checked and named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from argonne import layout
from argonne.serve.api.asked import Served
from argonne.serve.chat import chat_template_of
from argonne.serve.decoder import Decoder
from argonne.serve.engine import Engine, open_engine
from argonne.serve.options import ServeOptions


def open_served(names: Sequence[str], options: ServeOptions) -> dict[str, Served]:
    """The models by their ids. Raises InputError for what is no model of this family, or one with a tokenizer that is
    not its own.
    """
    found: dict[str, Served] = {}
    for name in names:
        engine = open_engine(name, device=options.device, int8=options.quantize == "int8")
        model_id = _unique(Path(layout.followed(Path(name))).absolute().name, found)
        found[model_id] = served(model_id, engine, options)
    return found


def served(model_id: str, engine: Engine, options: ServeOptions) -> Served:
    decoder = Decoder(engine.model, rows=options.rows, context=options.context, deterministic=options.deterministic)
    template, problem = chat_template_of(engine.tokenizer)
    return Served(model_id, engine, decoder, template, problem)


def _unique(name: str, taken: dict[str, Served]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found

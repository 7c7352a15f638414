"""The models that a server starts with: opened, checked and named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from argonne import layout
from argonne.errors import InputError
from argonne.files import read_json
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
        check_tokenizer(name, engine)
        model_id = _unique(Path(layout.followed(Path(name))).absolute().name, found)
        found[model_id] = served(model_id, engine, options)
    return found


def served(model_id: str, engine: Engine, options: ServeOptions) -> Served:
    decoder = Decoder(engine.model, rows=options.rows, context=options.context, deterministic=options.deterministic)
    template, problem = chat_template_of(engine.tokenizer)
    return Served(model_id, engine, decoder, template, problem)


def check_tokenizer(name: str, engine: Engine) -> None:
    """Raise InputError where the tokenizer has more entries than the model, or is not the one of the training."""
    size, rows = engine.tokenizer.vocab_size, int(engine.model.config.vocab_size)
    if size > rows:
        raise InputError(
            f"{name}: its tokenizer in {engine.tokenizer.folder} has ids up to {size - 1:,}, the model's embedding "
            f"{rows:,} rows: it is another model's tokenizer; put the model's own there"
        )
    trained, found = _recorded(Path(name).expanduser(), engine.folder), engine.tokenizer.fingerprint
    if trained not in (None, found):
        raise InputError(
            f"{name}: its tokenizer in {engine.tokenizer.folder} has the fingerprint {found[:12]}, the training's had "
            f"{str(trained)[:12]}: the same id means something else in each; put the training's own there"
        )


def _recorded(path: Path, folder: Path) -> str | None:
    """The fingerprint of the tokenizer that a checkpoint, or the last one of a run, was trained with."""
    for place in (folder, layout.last_checkpoint(path), layout.last_checkpoint(folder.parent)):
        if place is not None and (place / layout.STATE).is_file():
            state: Any = read_json(place / layout.STATE)
            return state.get("tokenizer_fingerprint") if isinstance(state, dict) else None
    return None


def _unique(name: str, taken: dict[str, Served]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found

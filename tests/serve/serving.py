"""A server of tiny models for tests, within this process: its address, its parts, and a client of sockets."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import torch

from argonne.data.chat import Conversation, Message, template_of
from argonne.layout import CHAT_TEMPLATE
from argonne.serve.api.asked import Served
from argonne.serve.decoder import Decoder
from argonne.serve.engine import Engine
from argonne.serve.hosting import served
from argonne.serve.options import SamplingOptions, ServeOptions, Shaping
from argonne.serve.parts import Parts
from argonne.serve.server import Server, build_app, listen
from argonne.serve.service import Service
from argonne.serve.text_stream import TextStream
from argonne.tokens.tokenizer import load_tokenizer, train_tokenizer
from tests.serve.test_engine import TEXTS, make_model

CONTEXT, ROWS = 1024, 8


def make_engine(folder: Path, *, chat: bool = True, **changes: Any) -> Engine:
    """A model of random weights; one that is asked in turns where `chat`."""
    tokenizer = load_tokenizer(train_tokenizer(TEXTS, 310, folder))
    if chat:
        (folder / CHAT_TEMPLATE).write_text(template_of(tokenizer).jinja)
    model = make_model(**{"vocab_size": tokenizer.vocab_size, "max_position_embeddings": CONTEXT, **changes})
    return Engine(model, tokenizer, folder)


class Scripted(torch.nn.Module):
    """A model that says `script` whatever it is asked, one request at a time, in one piece of prompt."""

    def __init__(self, engine: Engine, text: str) -> None:
        super().__init__()
        self.inner, self.config, self.calls = engine.model, engine.model.config, 0
        end = template_of(engine.tokenizer).turn_end_id
        self.script = [*engine.tokenizer.encode(text), *[end] * CONTEXT]

    def forward(self, **inputs: Any) -> Any:
        out = self.inner(**inputs)
        self.calls = 0 if inputs["input_ids"].shape[1] > 1 else self.calls + 1
        out.logits = torch.full_like(out.logits, -10.0)
        out.logits[..., self.script[self.calls]] = 10.0
        return out


def scripted(engine: Engine, text: str) -> Engine:
    return Engine(Scripted(engine, text), engine.tokenizer, engine.folder)


@dataclass
class Running:
    port: int
    service: Service
    models: Mapping[str, Served]
    server: Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, body: object = None, *, method: str = "POST", headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        """(status, body, headers) of one request; bytes are sent as they are, all else as JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            raw, told = answer.read(), dict(answer.getheaders())
        finally:
            connection.close()
        kind = told.get("content-type", "")
        return answer.status, json.loads(raw) if kind.startswith("application/json") else raw.decode(), told

    def until_idle(self) -> None:
        """Until no answer runs: a test that never gets there times out."""
        idle = threading.Event()
        while self.service.held:
            idle.wait(0.005)


@contextmanager
def running(engines: Mapping[str, Engine], *, key: str | None = None, **changes: Any) -> Iterator[Running]:
    options = ServeOptions(**{"rows": ROWS, "deterministic": True, "device": "cpu", **changes})
    models = {name: served(name, engine, options) for name, engine in engines.items()}
    service = Service(
        {name: (model.decoder, model.engine.tokenizer) for name, model in models.items()},
        queue_limit=options.queue,
        time_limit=options.time_limit,
    )
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = Server(build_app(models, service, options, key), service, options.grace)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Running(port, service, models, server)
        finally:
            server.should_exit = True
            thread.join()
            service.close()


def expected_text(
    engine: Engine,
    prompt: list[int],
    options: SamplingOptions,
    stops: Any,
    shaping: Shaping | None = None,
    rows: int = ROWS,
) -> str:
    """The answer as it is alone: a decoder of its own with as many rows."""
    decoder = Decoder(engine.model, rows=rows, deterministic=True)
    answer = decoder.submit(prompt, options, stops, shaping=shaping)
    while decoder.busy:
        decoder.step()
    stream = TextStream(engine.tokenizer, prompt)
    return "".join([*map(stream.push, answer.ids), stream.finish()])


def chat_prompt(engine: Engine, *said: str) -> tuple[list[int], tuple[int, ...]]:
    """Ids of a conversation that begins with a user, and where its answer ends."""
    template = template_of(engine.tokenizer)
    turns = tuple(Message(("user", "assistant")[place % 2], text) for place, text in enumerate(said))
    return [int(token) for token in template.prompt(Conversation(turns))], template.stop_ids


def raw(port: int, data: bytes) -> bytes:
    """What the server says to these bytes until it closes, or its first answer has come."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(data)
        return connection.recv(65536)


def visible(text: str) -> str:
    """What an API tells as the text of an answer: a model of random weights too may think and call."""
    parts = Parts()
    return "".join(part.text for part in [*parts.push(text), *parts.finish()] if part.kind == "text")

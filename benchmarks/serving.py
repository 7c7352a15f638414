"""The server over HTTP: 64 clients at once beside one, each with a chat request of its own, streamed.

Tokens a second over all clients, and from a request to its first token (median and 95th percentile). The model is
`nano-3.0` with random weights, whose answers have their full length: the text does not matter to the time.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

from benchmarks.harness import Benchmark, Column, main, peak_memory_mb

CLIENTS, REQUESTS, TOKENS, CONTEXT = 64, 128, 16, 512
ALONE = 8  # requests of the single client: a rate needs no more of them
SAID = "Tell me what the topics of this language are, and which of them one should read first."


def measure(clients: int, requests: int, tokens: int = TOKENS) -> dict[str, float]:
    """`requests` chat requests of `tokens` tokens each, `clients` at a time."""
    from pydoc_data.topics import topics

    from argonne.data.chat import template_of
    from argonne.layout import CHAT_TEMPLATE
    from argonne.model.build import build_model, config_from_fields
    from argonne.presets import preset
    from argonne.serve.engine import Engine
    from argonne.serve.hosting import served
    from argonne.serve.options import ServeOptions
    from argonne.serve.server import Server, build_app, listen
    from argonne.serve.service import Service
    from argonne.tokens.tokenizer import load_tokenizer, train_tokenizer

    options = ServeOptions(rows=CLIENTS, device="cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = train_tokenizer(list(topics.values())[:50], 2048, Path(name) / "tokenizer")
        tokenizer = load_tokenizer(folder)
        (folder / CHAT_TEMPLATE).write_text(template_of(tokenizer).jinja)
        fields = {**preset("nano-3.0").fields, "vocab_size": 2048, "max_position_embeddings": CONTEXT}
        model = build_model(config_from_fields(fields), seed=0).eval()
        models = {"it": served("it", Engine(model, tokenizer, folder), options)}
        service = Service({"it": (models["it"].decoder, tokenizer)})
        with listen("127.0.0.1", 0) as listener:
            port = listener.getsockname()[1]
            server = Server(build_app(models, service, options), service, 0.0)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            try:
                stops = {str(token): -100 for token in (*models["it"].chat.stop_ids,)}
                with ThreadPoolExecutor(clients) as pool:
                    ask = lambda number: request(port, number, tokens, stops)  # noqa: E731 - the loop's only function
                    list(pool.map(ask, range(clients)))  # warm
                    begun = time.perf_counter()
                    found = list(pool.map(ask, range(requests)))
                    seconds = time.perf_counter() - begun
            finally:
                server.should_exit = True
                thread.join()
                service.close()
    firsts = sorted(first for first, _ in found)
    return {
        "rate": sum(count for _, count in found) / seconds,
        "first": 1000 * statistics.median(firsts),
        "slow": 1000 * firsts[min(len(firsts) - 1, round(0.95 * len(firsts)))],
        "peak": peak_memory_mb(),
    }


def request(port: int, number: int, tokens: int, bias: dict[str, int]) -> tuple[float, int]:
    """(seconds to the first token, tokens) of one streamed answer."""
    body = {
        "model": "it",
        "messages": [{"role": "user", "content": f"{number}. {SAID}"}],
        "max_tokens": tokens,
        "seed": number,
        "logit_bias": bias,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    client = HTTPConnection("127.0.0.1", port)
    begun = time.perf_counter()
    client.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    answer = client.getresponse()
    first, count = 0.0, 0
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
        if not first and (delta.get("content") or delta.get("reasoning_content")):
            first = time.perf_counter() - begun
        count = (chunk.get("usage") or {}).get("completion_tokens", count)
    client.close()
    return first, count


BENCHMARK = Benchmark(
    name="serving",
    module="benchmarks.serving",
    contestants={
        "64 clients at once": lambda _: measure(CLIENTS, REQUESTS),
        "one client": lambda _: measure(1, ALONE),
    },
    points={"nano": f"nano-3.0, vocabulary 2,048, {TOKENS} tokens an answer, streamed chat over HTTP, fp32, CPU"},
    columns=(
        Column("rate", "tokens/s"),
        Column("first", "first token, median ms"),
        Column("slow", "first token, 95th percentile ms"),
        Column("peak", "peak memory, MB"),
    ),
    relative_to="one client",
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))

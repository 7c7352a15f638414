"""How text is continued: the flags of `argonne generate`, without anything heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from argonne.declare import key
from argonne.errors import InputError

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingOptions:
    """How text is continued. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token; the same seed gives
    the same text.
    """

    max_new_tokens: int = key(200, "tokens at most")
    temperature: float = key(0.8, "0 = greedy")
    top_k: int = key(0, "sample from the k likeliest; 0 = all")
    top_p: float = key(0.95, "sample from the likeliest that make up p")
    min_p: float = key(0.0, "drop what is less likely than this share of the likeliest; 0 = nothing")
    repetition_penalty: float = key(1.0, "divides (a positive logit) of what was generated before; 1 = none")
    seed: int = key(0, "of the choices: the same seed gives the same text")

    def __post_init__(self) -> None:
        for name, value, good, expected in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "more than 0"),
        ):
            if not good:
                raise InputError(f"{name}: found {value}, expected {expected}")

    def with_seed(self, number: int) -> SamplingOptions:
        """The same for the answer of this number: its seed is so much larger."""
        return replace(self, seed=self.seed + number)


@dataclass(frozen=True)
class ServeOptions:
    """How `argonne serve` listens, and what it lets a client have."""

    host: str = key("127.0.0.1", "address to listen at", metavar="ADDRESS")
    port: int = key(8000, "0 = one that is free")
    allow_host: tuple[str, ...] = key((), "names by which clients call the server, beside loopback's", metavar="NAME")
    api_key_env: str | None = key(None, "environment variable with the key that clients must give", metavar="NAME")
    rows: int = key(32, "answers that a model computes at once")
    queue: int = key(128, "answers that may wait for a model; those beyond are refused (429)")
    context: int | None = key(None, "tokens of a prompt and its answer at most; none = the model's context")
    time_limit: float = key(600.0, "seconds a request may take")
    grace: float = key(30.0, "seconds that running answers have after SIGTERM")
    body_limit: int = key(4 * 2**20, "bytes of a request at most")
    body_seconds: float = key(30.0, "seconds in which a request's body must have come")
    deterministic: bool = key(False, "an answer does not depend on how many run beside it, in its last bit either")
    device: str = key("auto", "auto, cpu, cuda or mps")
    quantize: str = key("none", "int8 = weights in int8, on a CPU", choices=("none", "int8"))

    def __post_init__(self) -> None:
        for name, value, good, expected in (
            ("port", self.port, 0 <= self.port < 2**16, "from 0 to 65535"),
            ("rows", self.rows, self.rows >= 1, "at least 1"),
            ("queue", self.queue, self.queue >= 0, "0 or more"),
            ("context", self.context, self.context is None or self.context >= 2, "at least 2"),
            ("time_limit", self.time_limit, 0 < self.time_limit < math.inf, "more than 0"),
            ("grace", self.grace, 0 <= self.grace < math.inf, "0 or more"),
            ("body_limit", self.body_limit, self.body_limit >= 1, "at least 1"),
            ("body_seconds", self.body_seconds, 0 < self.body_seconds < math.inf, "more than 0"),
        ):
            if not good:
                raise InputError(f"--{name.replace('_', '-')}: found {value}, expected {expected}")


@dataclass(frozen=True)
class Shaping:
    """What a request asks beside its options. logprobs: report each token's, with so many alternatives; None = not.
    logit_bias: added to the logits of these ids. stop: texts at which the answer ends, without them.
    """

    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise InputError(f"logprobs: found {self.logprobs}, expected from 0 to {MOST_LOGPROBS}")
        if any(not text for text in self.stop):
            raise InputError("stop: found an empty text, expected texts of at least one character")

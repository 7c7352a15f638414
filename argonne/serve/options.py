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
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "more than 0; 1 is none",
            ),
        ):
            if not good:
                raise InputError(f"{name}: found {value}, expected {expected}")

    def with_seed(self, number: int) -> SamplingOptions:
        """The same for the answer of this number: its seed is so much larger."""
        return replace(self, seed=self.seed + number)


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

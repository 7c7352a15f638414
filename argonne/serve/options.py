"""How text is continued: the flags of `argonne generate`, without anything heavy."""

from __future__ import annotations

from dataclasses import dataclass

from argonne.declare import key
from argonne.errors import InputError


@dataclass(frozen=True)
class SamplingOptions:
    """How text is continued. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token; the same seed gives
    the same text.
    """

    max_new_tokens: int = key(200, "tokens at most")
    temperature: float = key(0.8, "0 = greedy")
    top_k: int = key(0, "sample from the k likeliest; 0 = all")
    top_p: float = key(0.95, "sample from the likeliest that make up p")
    seed: int = key(0, "of the choices: the same seed gives the same text")

    def __post_init__(self) -> None:
        for name, value, good, expected in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1"),
        ):
            if not good:
                raise InputError(f"{name}: found {value}, expected {expected}")

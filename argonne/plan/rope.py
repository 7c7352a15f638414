"""Which context a base of rotary positions carries.

Pair i of a head of d dimensions turns by theta^(-2i/d) a token, so that its angle comes round after 2 pi theta^(2i/d)
tokens.
"""

from __future__ import annotations

import math

from argonne.config import ModelSection
from argonne.errors import InputError
from argonne.presets import DEFAULTS


def longest_wavelength(theta: float, head_dim: int) -> float:
    """Tokens after which the slowest pair has turned once; beyond, every pair shows angles a second time (the aliasing
    bound of arXiv 2602.10959, exact for heads of d dimensions).
    """
    return 2 * math.pi * theta ** ((head_dim - 2) / head_dim)


def discerned(theta: float, head_dim: int, context: int) -> int:
    """Up to which distance, at most `context`, attention can prefer a similar token to a random one: the first distance
    m at which the sum of cos(m theta^(-2i/d)) over all pairs i is negative ("Base of RoPE Bounds Context Length",
    arXiv 2405.14591).
    """
    turns = [theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
    return next((m for m in range(context) if sum(math.cos(m * turn) for turn in turns) < 0), context)


def check_rope(model: ModelSection, head_dim: int, context: int) -> None:
    """Raise InputError where even the slowest pair turns more than once within the context: then no pair tells a token
    from one a turn away.
    """
    theta = _theta(model, head_dim)
    if theta is None or (reach := longest_wavelength(theta, head_dim)) >= context:
        return
    least = (context / (2 * math.pi)) ** (head_dim / (head_dim - 2))
    raise InputError(
        f"model.rope_theta: found {theta:g}, whose longest wavelength with heads of {head_dim} is {reach:,.0f} tokens, "
        f"and a context of {context:,}: positions would repeat; give at least {math.ceil(least):,}, or a shorter "
        "context (model.max_position_embeddings, data.sequence_length)"
    )


def short_base(model: ModelSection, head_dim: int, context: int) -> str | None:
    """What to know of a base below the paper's bound for the context; None for one above it."""
    theta = _theta(model, head_dim)
    if theta is None or (found := discerned(theta, head_dim, context)) == context:
        return None
    return (
        f"model.rope_theta {theta:g} tells similar tokens from others up to a distance of {found:,}, and the context "
        f"is {context:,} (arXiv 2405.14591); a higher base reaches further"
    )


def _theta(model: ModelSection, head_dim: int) -> float | None:
    """None where nothing is turned, or by a single pair, of which no base makes a slow one."""
    turned = model.position_embedding != "learned" and head_dim > 2
    return float(model.rope_theta or DEFAULTS["rope_theta"]) if turned else None

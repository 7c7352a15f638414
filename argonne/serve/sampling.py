"""Choosing the next token from logits. Every answer has a chooser of its own, so that its choices do not depend on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from argonne.errors import InputError
from argonne.serve.options import SamplingOptions, Shaping

NOT_FINITE = "the model's logits are not finite: its weights are damaged or its training diverged"
COLDEST = 1e-30
FEW = 512  # of the likeliest tokens are looked at first: sorting a vocabulary of 150,000 takes longer than a layer


class Constraint(Protocol):
    """What an answer may be, token by token."""

    def allowed(self, vocabulary: int) -> Tensor:
        """(vocabulary,) bool: ids that may come next."""
        ...

    def accept(self, token: int) -> None: ...


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities under the model itself: of the token that was chosen, and of the likeliest ones."""

    chosen: float
    likeliest: tuple[tuple[int, float], ...]


Choice = tuple[int, TokenLogprobs | None]


class Chooser:
    """Draws one token a step. The generator lives on the CPU and belongs to this object: global random state is never
    touched.
    """

    def __init__(
        self, options: SamplingOptions, shaping: Shaping | None = None, constraint: Constraint | None = None
    ) -> None:
        self.options, self.shaping, self.constraint = options, shaping or Shaping(), constraint
        self.generator = torch.Generator().manual_seed(options.seed)

    @property
    def is_plain(self) -> bool:
        """Whatever was generated, the likeliest token is taken, and nothing else is told."""
        return (
            self.options.temperature == 0
            and self.options.repetition_penalty == 1
            and self.constraint is None
            and self.shaping == Shaping()
        )

    def shape(self, logits: Tensor, generated: Sequence[int]) -> None:
        """Change (vocabulary,) logits behind `generated` in place, as the options ask."""
        penalty = self.options.repetition_penalty
        if penalty != 1 and generated:  # Keskar et al. 2019 (arXiv 1909.05858), of what was generated, not the prompt
            ids = torch.tensor(sorted(set(generated)), device=logits.device)
            found = logits[ids]
            logits[ids] = torch.where(found > 0, found / penalty, found * penalty)
        for token, value in self.shaping.logit_bias.items():
            logits[token] += value
        if self.constraint is not None:
            logits[~self.constraint.allowed(len(logits)).to(logits.device)] = -torch.inf

    def tell(self, token: int, logits: Tensor) -> Choice:
        """What was chosen, from the model's own (vocabulary,) logits."""
        if self.constraint is not None:
            self.constraint.accept(token)
        if self.shaping.logprobs is None:
            return token, None
        logs = torch.log_softmax(logits, dim=-1)
        best = logs.topk(min(self.shaping.logprobs, len(logs)))
        listed = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return token, TokenLogprobs(float(logs[token]), listed)


def choose_together(
    choosers: Sequence[Chooser], logits: Tensor, generated: Sequence[Sequence[int]]
) -> list[Choice | Exception]:
    """The next id of each row of (rows, vocabulary) logits behind what was `generated`, the same as alone; or what its
    chooser failed by, and no other.

    Those that ask for the same kind of draw are drawn in one go: one costs as much as a layer of a small model.
    """
    logits = logits.float()
    shaped = logits if all(chooser.is_plain for chooser in choosers) else logits.clone()
    found: dict[int, Choice | Exception] = {}
    alike: dict[tuple[float, int, float, float], list[int]] = {}
    for row, (chooser, finite) in enumerate(zip(choosers, torch.isfinite(logits.amax(-1)).tolist(), strict=True)):
        options = chooser.options
        if finite:
            try:
                chooser.shape(shaped[row], generated[row])
                if chooser.constraint is not None and not bool(torch.isfinite(shaped[row].amax())):
                    raise InputError("the form of the answer allows no token here")
                alike.setdefault((options.temperature, options.top_k, options.top_p, options.min_p), []).append(row)
            except Exception as fault:
                found[row] = fault
        else:
            found[row] = InputError(NOT_FINITE)
    for rows in alike.values():
        drawn = draw(
            shaped if len(rows) == len(shaped) else shaped[rows],
            choosers[rows[0]].options,
            [choosers[row].generator for row in rows],
        )
        for row, token in zip(rows, drawn, strict=True):
            try:
                found[row] = choosers[row].tell(token, logits[row])
            except Exception as fault:
                found[row] = fault
    return [found[row] for row in range(len(choosers))]


def draw(logits: Tensor, options: SamplingOptions, generators: Sequence[torch.Generator]) -> list[int]:
    """An id for each row of (rows, vocabulary) logits, by the generator of that row. No row depends on another."""
    if options.temperature == 0:
        if logits.device.type == "cpu":  # numpy's takes a tenth of torch's time, and the first of equal ones too
            return [int(token) for token in logits.numpy().argmax(-1)]
        return [int(token) for token in logits.argmax(-1)]
    # From the largest on, and by no less than fp32 can tell from 0: a temperature next to 0 gives no NaN.
    above = logits - logits.amax(-1, keepdim=True)
    probabilities = torch.softmax(above / max(options.temperature, COLDEST), dim=-1)
    kept, ids = likeliest(probabilities, options)
    if options.top_k:
        kept = kept[:, : options.top_k]
    ladder = kept.cumsum(-1)
    if options.top_p < 1:  # Holtzman et al. 2020: the smallest set that holds `top_p` of the mass
        total = ladder[:, -1:] if options.top_k else 1.0
        before = torch.nn.functional.pad(ladder[:, :-1], (1, 0))
        kept = kept.where(before < options.top_p * total, 0)
    if options.min_p:
        kept = kept.where(kept >= options.min_p * kept[:, :1], 0)
    size = (kept > 0).sum(-1, keepdim=True)  # the rest, behind them, is 0
    draws = torch.cat([torch.rand(1, generator=generator) for generator in generators]).to(ladder.device)
    places = torch.searchsorted(ladder, draws[:, None] * ladder.gather(-1, size - 1), right=True).minimum(size - 1)
    return [int(token) for token in ids.gather(-1, places)[:, 0]]


def likeliest(probabilities: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """The probabilities of each row that the options can keep, the largest first, of equal ones the smaller id, and
    their ids.
    """
    if probabilities.shape[-1] > FEW:
        few, ids = probabilities.topk(FEW)
        mass = few[:, :-1].cumsum(-1)[:, -1]
        enough = (0 < options.top_k < FEW) | (mass > options.top_p if options.top_p < 1 else mass < 0)
        if bool((enough & (few[:, -1] < few[:, -2])).all()):
            order = ids.argsort(-1)  # then by value, which keeps the order of ids among equal ones
            few, ids = few.gather(-1, order), ids.gather(-1, order)
            found = few.sort(dim=-1, descending=True, stable=True)
            return found.values, ids.gather(-1, found.indices)
    found = probabilities.sort(dim=-1, descending=True, stable=True)
    return found.values, found.indices

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


def check_finite(logits: Tensor) -> None:
    """Raises InputError where a row of (rows, vocabulary) logits holds no finite number or a NaN."""
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise InputError("the model's logits are not finite: its weights are damaged or its training diverged")


class Chooser:
    """Draws one token a step. The generator lives on the CPU and belongs to this object: global random state is never
    touched.
    """

    def __init__(
        self, options: SamplingOptions, shaping: Shaping | None = None, constraint: Constraint | None = None
    ) -> None:
        self.options, self.shaping, self.constraint = options, shaping or Shaping(), constraint
        self._generator = torch.Generator().manual_seed(options.seed)

    @property
    def takes_the_likeliest(self) -> bool:
        """Whatever was generated: nothing but the largest logit decides, and nothing else is told."""
        unshaped = not self.shaping.logit_bias and self.shaping.logprobs is None and self.constraint is None
        return self.options.temperature == 0 and self.options.repetition_penalty == 1 and unshaped

    def choose(self, logits: Tensor, generated: Sequence[int]) -> tuple[int, TokenLogprobs | None]:
        """The next id after `generated`, from (vocabulary,) logits that `check_finite` has seen."""
        logits = logits.float()
        token = self._draw(self._shaped(logits, generated))
        if self.constraint is not None:
            self.constraint.accept(token)
        if self.shaping.logprobs is None:
            return token, None
        logs = torch.log_softmax(logits, dim=-1)
        best = logs.topk(min(self.shaping.logprobs, len(logs)))
        listed = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return token, TokenLogprobs(float(logs[token]), listed)

    def _shaped(self, logits: Tensor, generated: Sequence[int]) -> Tensor:
        penalty, bias = self.options.repetition_penalty, self.shaping.logit_bias
        if (penalty != 1 and generated) or bias or self.constraint is not None:
            logits = logits.clone()
        if penalty != 1 and generated:  # Keskar et al. 2019 (arXiv 1909.05858), of what was generated, not the prompt
            ids = torch.tensor(sorted(set(generated)), device=logits.device)
            found = logits[ids]
            logits[ids] = torch.where(found > 0, found / penalty, found * penalty)
        for token, value in bias.items():
            logits[token] += value
        if self.constraint is not None:
            logits[~self.constraint.allowed(len(logits)).to(logits.device)] = -torch.inf
        return logits

    def _draw(self, logits: Tensor) -> int:
        options = self.options
        if options.temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / options.temperature, dim=-1)
        kept, ids = self._likeliest(probabilities)
        if options.top_k:
            kept = kept[: options.top_k]
        if options.top_p < 1:  # Holtzman et al. 2020: the smallest set that holds `top_p` of the mass
            total = 1.0 if not options.top_k else float(kept.sum())
            kept = kept[: 1 + int((kept.cumsum(0) < options.top_p * total).sum())]
        if options.min_p:
            kept = kept[kept >= options.min_p * kept[0]]
        kept = kept[kept > 0]
        ladder = kept.cumsum(0)
        draw = torch.rand(1, generator=self._generator).to(ladder.device)
        place = min(int(torch.searchsorted(ladder, draw * ladder[-1:], right=True)), len(kept) - 1)
        return int(ids[place])

    def _likeliest(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The probabilities that the options can keep, the largest first, of equal ones the smaller id, and their
        ids.
        """
        options, size = self.options, len(probabilities)
        if size > FEW:
            few, ids = probabilities.topk(FEW)
            enough = 0 < options.top_k < FEW or (options.top_p < 1 and float(few[:-1].sum()) > options.top_p)
            if enough and float(few[-1]) < float(few[-2]):
                order = torch.argsort(ids)  # then by value, which keeps the order of ids among equal ones
                few, ids = few[order], ids[order]
                found = few.sort(descending=True, stable=True)
                return found.values, ids[found.indices]
        found = probabilities.sort(descending=True, stable=True)
        return found.values, found.indices

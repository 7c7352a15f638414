"""Choosing the next token from logits. Every row has a generator of its own, so that a row's choices do not depend on
its neighbours.
"""

from __future__ import annotations

import torch

from argonne.errors import InputError
from argonne.serve.options import SamplingOptions


class Sampler:
    """Draws one token a row and step. The generators live on the CPU and belong to this object: global random state is
    never touched.
    """

    def __init__(self, options: SamplingOptions, rows: int) -> None:
        self.options = options
        self._generators = [torch.Generator().manual_seed(options.seed + row) for row in range(rows)]

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) logits -> (rows,) int64 ids. Raises InputError where a row holds no
        finite logit or a NaN.
        """
        logits = logits.float()
        if not torch.isfinite(logits.amax(dim=-1)).all():
            raise InputError("the model's logits are not finite: its weights are damaged or its training diverged")
        if self.options.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities, ids = torch.softmax(logits / self.options.temperature, dim=-1).sort(
            dim=-1, descending=True, stable=True
        )
        if self.options.top_k:
            probabilities = probabilities.clone()
            probabilities[:, self.options.top_k :] = 0
        if self.options.top_p < 1:  # Holtzman et al. 2020: the smallest set that holds `top_p` of the mass
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(
                before >= self.options.top_p * probabilities.sum(dim=-1, keepdim=True), 0.0
            )
        last_kept = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
        ladder = probabilities.cumsum(dim=-1)
        draws = torch.stack([torch.rand(1, generator=generator) for generator in self._generators]).to(ladder.device)
        places = torch.searchsorted(ladder, draws * ladder[:, -1:], right=True).clamp_max(last_kept)
        return ids.gather(1, places).squeeze(1)

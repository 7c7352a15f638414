"""The loss over a vocabulary that is split over processes equals the whole one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from argonne.model.loss import LossOptions, summed_loss, token_log_probs

RANKS, VOCABULARY, ROWS = 2, 13, 9
CUTS = [0, 7, 13]  # uneven on purpose
SOFTCAPS = (None, 2.0)


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    targets[2] = -100
    return hidden, weight, targets, torch.randn(ROWS, generator=generator, dtype=torch.float64)


def results(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, mix: torch.Tensor, options: LossOptions
) -> list[torch.Tensor]:
    hidden, weight = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)
    loss = summed_loss(hidden, weight, targets, options)
    log_p, log_z = token_log_probs(hidden, weight, targets, options)
    first = torch.autograd.grad(loss, (hidden, weight))
    second = torch.autograd.grad((mix * log_p).sum() + (mix * mix * log_z).sum(), (hidden, weight))
    return [loss.detach(), log_p.detach(), first[0], second[0], first[1], second[1]]


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    hidden, weight, targets, mix = example()
    group = dist.group.WORLD
    found = {}
    for softcap in SOFTCAPS:
        options = LossOptions(softcap, 0.1, 4, group, CUTS[rank])
        found[softcap] = results(hidden, weight[CUTS[rank] : CUTS[rank + 1]], targets, mix, options)
    torch.save(found, f"{folder}/rank{rank}")
    dist.destroy_process_group()


def test_a_split_vocabulary_gives_the_loss_and_the_gradients_of_the_whole(tmp_path: Path) -> None:
    workers = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(RANKS)]
    assert [worker.wait(timeout=300) for worker in workers] == [0] * RANKS
    hidden, weight, targets, mix = example()
    ranks: list[Any] = [torch.load(tmp_path / f"rank{rank}") for rank in range(RANKS)]
    for softcap in SOFTCAPS:
        whole = results(hidden, weight, targets, mix, LossOptions(softcap, 0.1, 4))
        parts = [found[softcap] for found in ranks]
        for part in parts:
            for found, expected in zip(part[:4], whole[:4], strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for index in (4, 5):
            torch.testing.assert_close(torch.cat([part[index] for part in parts]), whole[index], rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2])

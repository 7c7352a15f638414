"""The largest micro-batch, found by trying before the first step: all workers together, upward from
the plan's guess.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import torch
from torch import nn

from argonne.parallel.mesh import Mesh
from argonne.parallel.objective import MicroBatch, Objective
from argonne.parallel.parallelise import loss_of, placed
from argonne.train.optim import Precision
from argonne.train.recovery import is_out_of_memory

# Allocator fragmentation and the longest row of a real run come on top of what two tries show.
HEADROOM = 0.95


def largest_that_fits(fits: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest number of rows from 1 to `most` that fits, up to an eighth; 1 is taken as it is. `fits` is asked as
    rarely as that allows.
    """
    low, high = 0, most + 1
    rows = max(1, min(guess, most))
    while True:
        if fits(rows):
            low = rows
        else:
            high = rows
        if low >= most or high - low <= max(1, low // 8):
            return max(1, low)
        rows = min(most, low + max(1, low // 4)) if high > most else (low + high) // 2


def probe_micro_rows(
    model: nn.Module,
    objective: Objective,
    precision: Precision,
    mesh: Mesh,
    micro_of: Callable[[int], MicroBatch],
    *,
    guess: int,
    most: int,
) -> int:
    """Rows of a micro-batch that every worker holds forward and backward beside weights, gradients and moments. CUDA
    only.

    micro_of(rows): a micro-batch of so many rows. Two passes a try, without touching weights, gradients, moments or the
    generators' state.
    """

    total = torch.cuda.get_device_properties(mesh.device).total_memory

    def fits(rows: int) -> bool:
        micro, failed = micro_of(rows), False
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(mesh.device)
        try:
            for _ in range(2):
                with precision.autocast():
                    loss = loss_of(model, placed(micro, mesh.device), objective).total
                (loss / micro["input_ids"].numel()).backward()
                del loss
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = True
        model.zero_grad(set_to_none=True)
        gc.collect()
        used = torch.cuda.max_memory_reserved(mesh.device)
        with contextlib.suppress(torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        return mesh.largest(int(failed or used > HEADROOM * total)) == 0

    with torch.random.fork_rng(devices=[mesh.device]):
        return largest_that_fits(fits, guess, most)

"""Rows that a run reads, put together from all ranks, and its data opened again at a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings

from argonne.config import BatchSection, DataSection, SourceSection
from argonne.data.dataset import TrainingData, open_training_data
from argonne.data.loader import Loader

SLOW = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def section(
    *paths: Path, length: int = 8, max_epochs: float = 100.0, weights: tuple[float, ...] = (), **more: Any
) -> DataSection:
    sources = tuple(
        SourceSection(path=str(path), weight=weights[number] if weights else 1.0, max_epochs=max_epochs)
        for number, path in enumerate(paths)
    )
    return DataSection(sources=sources, sequence_length=length, **more)


def global_rows(
    data: TrainingData, steps: range | list[int], world: int = 1, micro: int = 3, prefetch: int = 0
) -> list[np.ndarray]:
    """The rows of each step in global order, (rows, T) inputs and targets and the source, put together
    from all ranks.
    """
    found = []
    loaders = [Loader(data, rank, world, micro, prefetch=prefetch) for rank in range(world)]
    for step in steps:
        rows = []
        batches = [loader.batch(step) for loader in loaders]
        assert len({len(batch.micro_batches) for batch in batches}) == 1
        for batch in batches:
            for micro_batch in batch.micro_batches:
                sources = micro_batch["source"]
                keep = sources.numpy() >= 0
                assert (micro_batch["shift_labels"].numpy()[~keep] == -100).all()
                joined = np.concatenate(
                    [micro_batch["input_ids"].numpy(), micro_batch["shift_labels"].numpy(), sources.numpy()[:, None]],
                    axis=1,
                )
                rows.append(joined[keep])
        found.append(np.concatenate(rows))
    for loader in loaders:
        loader.close()
    return found


def starts(rows: list[np.ndarray]) -> list[int]:
    """First token of each row (tokens are their own positions); checks that the row is a window and its targets are one
    further.
    """
    found = np.concatenate(rows)
    length = (found.shape[1] - 1) // 2
    inputs, labels = found[:, :length], found[:, length:-1]
    assert (inputs == inputs[:, :1] + np.arange(length)).all()
    assert (labels == inputs + 1).all()
    return inputs[:, 0].tolist()


def resumed(chosen: DataSection, batch: BatchSection, data: TrainingData, step: int) -> TrainingData:
    return open_training_data(chosen, batch, 3, state=json.loads(json.dumps(data.state(step))))

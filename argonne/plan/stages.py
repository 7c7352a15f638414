"""A model in the stages of a pipeline: the layers of each rank, the micro-batches it holds at once, its idle time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from argonne.keys import check_layers
from argonne.plan.shape import ModelShape


@dataclass(frozen=True)
class Part:
    """What one rank of a pipeline holds: layers, whether the embedding and the head are there, and how many
    micro-batches have passed all of its layers forward and none backward, at most.
    """

    layers: tuple[int, ...]
    first: bool = True
    last: bool = True
    in_flight: float = 1.0

    def ends(self, shape: ModelShape) -> int:
        """Parameters outside of layers. A tied weight lies at both ends."""
        table = shape.vocab_size * shape.hidden_size
        found = shape.parameters() - shape.num_hidden_layers * shape.layer_parameters()
        norm = shape.hidden_size * (2 if shape.norm_type == "layer" else 1)
        head = 0 if shape.tie_word_embeddings and self.first else table
        before = found - norm - (0 if shape.tie_word_embeddings else table)
        return before * self.first + (norm + head) * self.last


def cut(costs: Sequence[float], last: float, stages: int) -> list[range]:
    """Layers in so many runs, at least one in each, so that the dearest costs as little as can be. last: what the last
    stage does besides.
    """
    until = [0.0, *accumulate(costs)]

    @cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        if left == 1:
            return until[-1] - until[first] + last, (len(costs),)
        found = []
        for end in range(first + 1, len(costs) - left + 2):
            rest, ends = best(end, left - 1)
            found.append((max(until[end] - until[first], rest), (end, *ends)))
        return min(found)

    ends = best(0, stages)[1]
    return [range(first, end) for first, end in zip((0, *ends), ends, strict=False)]


@cache
def runs_of(shape: ModelShape, stages: int) -> tuple[range, ...]:
    """The layers of each stage, by what they cost a token: their weights, and what attention reads behind it. Raises
    InputError for more stages than layers.
    """
    check_layers(shape.num_hidden_layers, stages, 1)
    length = shape.max_position_embeddings
    reach = [length / 2 if window is None else min(length, window) for window in shape.windows()]
    costs = [shape.layer_parameters() + 2 * shape.query_width * keys for keys in reach]
    return tuple(cut(costs, shape.vocab_size * shape.hidden_size, stages))


def parts_of(shape: ModelShape, pipeline: int, stages: int, schedule: str, micro_batches: int) -> list[Part]:
    """What each rank holds; stages: of one rank, its first `pipeline` before its second."""
    if pipeline == 1:
        return [Part(tuple(range(shape.num_hidden_layers)))]
    runs, found = runs_of(shape, pipeline * stages), []
    rounds = max(1, micro_batches // pipeline)
    # Where micro-batches do not fit the order, torch is given one with all forward passes first.
    all_first = schedule == "gpipe" or (micro_batches % rounds if stages > 1 else micro_batches < pipeline)
    for rank in range(pipeline):
        held = pipeline - rank
        if stages > 1:
            held = (stages - 1) * (micro_batches // rounds) + 2 * (pipeline - 1 - rank) + 1
        in_flight = micro_batches if all_first else min(micro_batches, held / stages)
        mine = tuple(layer for run in runs[rank::pipeline] for layer in run)
        found.append(Part(mine, rank == 0, rank == pipeline - 1, in_flight))
    return found


def idle_share(pipeline: int, stages: int, micro_batches: int) -> float:
    """Of a step's time, that in which a rank waits for the first micro-batch to come and the last to return."""
    return (pipeline - 1) / (stages * micro_batches + pipeline - 1)

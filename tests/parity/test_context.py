"""Context parallelism against one process, in float64: the tokens of every row split over 2 and 4 ranks, beside shards
and replicas.
"""

from __future__ import annotations

import itertools

import pytest

from tests.parity import mutations
from tests.parity.harness import Case, Found, in_one_process, on_workers, problems
from tests.parity.test_parity import name_of

FACTORS = {
    "generation": ("1.0", "2.0", "2.5", "3.0", "4.0"),
    "mode": ((1, 1, 2), (1, 1, 4), (1, 2, 2), (2, 1, 2)),
    "objective": ("next_token", "by_row", "dpo"),
    "documents": (False, True),
    "recompute": ("none", "full", "every_nth"),
    "loss": ("chunked", "full"),
    "optimizer": ("adamw", "muon"),
    "micro": (8, 1),
    "length": (32, 30),
    "z_loss": (0.0, 1e-3),
    "kernel": ("auto", "math"),
    "untrained": (0, 16),
}


def _case(
    generation: str,
    degrees: tuple[int, int, int],
    objective: str,
    documents: bool,
    recompute: str,
    loss: str,
    optimizer: str,
    micro: int,
    length: int,
    z_loss: float,
    kernel: str,
    untrained: int,
) -> Case:
    """degrees: replicate, shard, context."""
    replicate, shard, context = degrees
    return Case(
        *(generation, replicate, shard, objective, documents, recompute, loss, optimizer, micro),
        z_loss=z_loss,
        context=context,
        length=length,
        kernel=kernel,
        untrained=untrained,
    )


# Every pair of two factors' values occurs.
COVERING = (
    _case("1.0", (2, 1, 2), "next_token", True, "every_nth", "full", "muon", 1, 30, 0.001, "auto", 0),
    _case("3.0", (1, 1, 2), "by_row", True, "full", "chunked", "adamw", 8, 32, 0.0, "math", 16),
    _case("4.0", (1, 2, 2), "dpo", False, "none", "full", "muon", 8, 30, 0.001, "math", 16),
    _case("2.0", (1, 1, 4), "next_token", False, "none", "chunked", "adamw", 1, 32, 0.0, "math", 0),
    _case("2.5", (1, 2, 2), "dpo", True, "every_nth", "chunked", "adamw", 1, 32, 0.0, "auto", 16),
    _case("2.0", (1, 1, 2), "by_row", False, "full", "chunked", "muon", 8, 30, 0.001, "auto", 0),
    _case("4.0", (1, 1, 4), "by_row", True, "full", "full", "adamw", 1, 30, 0.0, "auto", 16),
    _case("1.0", (2, 1, 2), "by_row", False, "every_nth", "chunked", "adamw", 8, 32, 0.001, "math", 16),
    _case("2.5", (1, 1, 2), "next_token", False, "every_nth", "full", "muon", 8, 32, 0.0, "math", 0),
    _case("3.0", (2, 1, 2), "dpo", False, "none", "full", "muon", 1, 32, 0.0, "auto", 0),
    _case("2.0", (1, 1, 4), "dpo", True, "every_nth", "full", "muon", 8, 32, 0.001, "math", 16),
    _case("1.0", (1, 1, 2), "dpo", True, "none", "chunked", "adamw", 1, 30, 0.0, "auto", 0),
    _case("3.0", (1, 2, 2), "next_token", False, "full", "full", "adamw", 1, 30, 0.001, "math", 16),
    _case("4.0", (1, 2, 2), "next_token", False, "every_nth", "chunked", "muon", 8, 32, 0.001, "math", 0),
    _case("2.5", (2, 1, 2), "by_row", True, "none", "chunked", "adamw", 1, 30, 0.001, "auto", 16),
    _case("2.5", (1, 1, 4), "dpo", True, "full", "chunked", "adamw", 1, 32, 0.0, "auto", 16),
    _case("1.0", (1, 2, 2), "by_row", False, "full", "chunked", "adamw", 8, 32, 0.0, "math", 0),
    _case("2.0", (2, 1, 2), "next_token", True, "full", "chunked", "adamw", 1, 30, 0.0, "math", 16),
    _case("3.0", (1, 1, 4), "dpo", True, "every_nth", "full", "adamw", 1, 30, 0.0, "auto", 16),
    _case("1.0", (1, 1, 4), "next_token", False, "none", "full", "adamw", 8, 32, 0.0, "auto", 16),
    _case("4.0", (2, 1, 2), "by_row", True, "every_nth", "full", "adamw", 8, 30, 0.0, "math", 0),
    _case("4.0", (1, 1, 2), "dpo", False, "every_nth", "full", "adamw", 1, 30, 0.001, "auto", 16),
    _case("2.0", (1, 2, 2), "by_row", False, "every_nth", "full", "adamw", 8, 32, 0.001, "math", 0),
)
QUICK = (
    Case("1.0", context=2, documents=True, recompute="full", length=31),
    Case("2.0", context=2, objective="dpo", z_loss=1e-3, micro=1),
    Case("2.5", 2, 1, context=2, documents=True, optimizer="muon"),
    Case("3.0", 1, 2, context=2, documents=True, objective="by_row", recompute="every_nth"),
    Case("4.0", context=4, z_loss=1e-3, length=30),
    Case("3.0", context=2, untrained=16, rows=5),  # the first rank trains nothing
    Case("3.0", context=4, length=5, documents=True, kernel="math"),  # the last rank holds only what fills up
    Case("3.0", context=2, length=2, fails=True),
)
LONG = (Case("3.0", 1, 2, context=2, steps=100), Case("2.5", context=2, steps=100))
PLANTED = (
    Case("3.0", context=2, mutation=mutations.WINDOW_EDGE),
    Case("3.0", context=2, documents=True, mutation=mutations.DOCUMENT_EDGE),
    Case("3.0", context=2, mutation=mutations.RESTARTED),
    Case("1.0", context=2, mutation=mutations.RESTARTED),
    Case("3.0", context=2, mutation=mutations.OWN_KEYS_ONLY),
    Case("3.0", context=2, mutation=mutations.MEAN_OF_PARTS),
    Case("3.0", context=2, untrained=16, mutation=mutations.LOCAL_COUNT),
    Case("3.0", context=2, objective="dpo", mutation=mutations.OWN_ROWS),
    Case("3.0", 1, 2, context=2, mutation=mutations.LOCAL_NORM),
)


@pytest.fixture(scope="module")
def found() -> dict[Case, Found]:
    return on_workers([*QUICK, *PLANTED])


@pytest.mark.parametrize("case", QUICK, ids=name_of)
def test_parts_of_rows_give_what_whole_rows_give(found: dict[Case, Found], case: Case) -> None:
    assert problems(case, found[case], in_one_process(case)) == []


@pytest.mark.parametrize("case", PLANTED, ids=name_of)
def test_a_planted_fault_is_seen(found: dict[Case, Found], case: Case) -> None:
    assert problems(case, found[case], in_one_process(case))


def test_every_pair_of_two_factors_is_tried() -> None:
    def value(case: Case, name: str) -> object:
        return (case.replicate, case.shard, case.context) if name == "mode" else getattr(case, name)

    for one, other in itertools.combinations(FACTORS, 2):
        tried = {(value(case, one), value(case, other)) for case in COVERING}
        assert tried == set(itertools.product(FACTORS[one], FACTORS[other])), (one, other)


@pytest.mark.campaign
def test_every_pair_of_features_gives_what_one_process_gives() -> None:
    together = on_workers(COVERING)
    assert {case: wrong for case in COVERING if (wrong := problems(case, together[case], in_one_process(case)))} == {}


@pytest.mark.campaign
def test_copies_are_equal_bit_for_bit_after_a_hundred_steps_on_parts_of_rows() -> None:
    for case, one in on_workers(LONG).items():
        assert one.copies == one.copies[: case.parts] * (case.world // case.parts)


@pytest.mark.campaign
def test_compiled_layers_on_parts_of_rows_give_what_one_process_gives() -> None:
    cases = [
        Case("3.0", context=2, documents=True, compile=True),
        Case("2.5", 1, 2, context=2, compile=True, recompute="full", micro=1),
    ]
    together = on_workers(cases)
    assert [problems(case, together[case], in_one_process(case)) for case in cases] == [[], []]

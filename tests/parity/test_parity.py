"""Every way to spread a model against one process, in float64: loss, every gradient, their norm, weights after five
steps. A forward pass alone would not show what has gone wrong here before.
"""

from __future__ import annotations

import itertools

import pytest

from tests.parity import mutations
from tests.parity.harness import Case, Found, in_one_process, on_workers, problems

FACTORS = {
    "generation": ("1.0", "2.0", "2.5", "3.0", "4.0"),
    "mode": ((2, 1), (4, 1), (1, 2), (1, 4), (2, 2)),
    "objective": ("next_token", "by_row", "dpo"),
    "documents": (False, True),
    "recompute": ("none", "full", "every_nth"),
    "loss": ("chunked", "full"),
    "optimizer": ("adamw", "muon"),
    "micro": (8, 1),
    "rows": (8, 5),
    "z_loss": (0.0, 1e-3),
}
# Every pair of two factors' values occurs. In order: generation, replicate, shard, objective, documents, recomputed
# layers, loss, optimizer, rows of a micro-batch and of a step, weight of z-loss.
COVERING = (
    Case("2.5", 4, 1, "dpo", False, "none", "full", "muon", 1, 5, 0.001),
    Case("4.0", 2, 2, "by_row", True, "full", "full", "adamw", 8, 8, 0.0),
    Case("2.0", 1, 2, "next_token", False, "every_nth", "chunked", "adamw", 8, 5, 0.0),
    Case("1.0", 1, 4, "next_token", True, "full", "chunked", "muon", 1, 8, 0.001),
    Case("3.0", 2, 1, "dpo", True, "none", "chunked", "muon", 8, 8, 0.0),
    Case("3.0", 1, 2, "by_row", True, "every_nth", "full", "muon", 1, 5, 0.001),
    Case("4.0", 2, 1, "next_token", False, "none", "full", "adamw", 1, 5, 0.001),
    Case("1.0", 1, 4, "by_row", False, "none", "full", "adamw", 8, 5, 0.0),
    Case("2.5", 4, 1, "by_row", True, "every_nth", "chunked", "adamw", 8, 8, 0.0),
    Case("2.0", 2, 2, "dpo", False, "full", "chunked", "muon", 1, 5, 0.001),
    Case("4.0", 1, 2, "dpo", False, "every_nth", "chunked", "muon", 8, 8, 0.001),
    Case("3.0", 4, 1, "next_token", False, "full", "chunked", "adamw", 1, 5, 0.0),
    Case("2.0", 2, 1, "by_row", True, "full", "full", "adamw", 1, 8, 0.001),
    Case("1.0", 2, 2, "dpo", True, "every_nth", "full", "adamw", 8, 5, 0.001),
    Case("2.5", 2, 2, "next_token", False, "full", "full", "muon", 1, 5, 0.001),
    Case("3.0", 1, 4, "dpo", False, "every_nth", "full", "muon", 8, 5, 0.0),
    Case("2.5", 1, 2, "dpo", False, "none", "full", "muon", 1, 8, 0.0),
    Case("1.0", 2, 1, "next_token", True, "every_nth", "chunked", "muon", 8, 8, 0.001),
    Case("1.0", 1, 2, "by_row", True, "full", "full", "muon", 1, 8, 0.0),
    Case("2.0", 4, 1, "by_row", False, "none", "full", "adamw", 8, 8, 0.0),
    Case("3.0", 2, 2, "dpo", True, "none", "chunked", "muon", 8, 5, 0.0),
    Case("2.0", 1, 4, "dpo", False, "none", "full", "muon", 8, 5, 0.0),
    Case("1.0", 4, 1, "next_token", False, "every_nth", "chunked", "muon", 8, 5, 0.0),
    Case("2.5", 2, 1, "dpo", True, "full", "full", "adamw", 1, 8, 0.0),
    Case("2.5", 1, 4, "dpo", True, "every_nth", "full", "muon", 1, 8, 0.001),
    Case("4.0", 1, 4, "dpo", False, "none", "chunked", "adamw", 1, 8, 0.0),
    Case("4.0", 4, 1, "next_token", True, "every_nth", "full", "muon", 1, 5, 0.001),
)
MASKED = (
    Case("3.0", 2, 1, masked=True),
    Case("1.0", 1, 2, masked=True, micro=1),
    Case("2.5", 2, 2, "dpo", masked=True),
)
FAILING = (
    Case("3.0", 2, 1, fails=True, micro=1),
    Case("3.0", 1, 2, fails=True, micro=1),
    Case("1.0", 2, 2, fails=True),
)
LONG = (Case("2.5", 4, 1, steps=100), Case("3.0", 2, 2, steps=100))
PLANTED = (
    Case("3.0", 1, 2, masked=True, mutation=mutations.LOCAL_COUNT),
    Case("3.0", 2, 1, masked=True, mutation=mutations.LOCAL_COUNT),
    Case("3.0", 1, 2, mutation=mutations.LOCAL_NORM),
    Case("3.0", 1, 2, mutation=mutations.ROOT_ONLY),
    Case("3.0", 2, 1, mutation=mutations.TIED_TWICE),
    Case("3.0", 2, 2, mutation=mutations.NO_ALL_REDUCE),
    Case("3.0", 2, 2, optimizer="muon", mutation=mutations.DEFAULT_GROUP),
    Case("3.0", 1, 2, optimizer="muon", mutation=mutations.OF_PARTS),
)


@pytest.fixture(scope="module")
def found() -> dict[Case, Found]:
    return on_workers([*COVERING, *MASKED, *FAILING, *LONG, *PLANTED])


def name_of(case: Case) -> str:
    degrees = f"{case.replicate}x{case.shard}" + f"x{case.context}" * (case.context > 1)
    return f"{case.generation}-{degrees}-{case.objective}" + f"-{case.mutation}" * bool(case.mutation)


@pytest.mark.parametrize("case", [*COVERING, *MASKED, *FAILING], ids=name_of)
def test_a_mesh_gives_what_one_process_gives(found: dict[Case, Found], case: Case) -> None:
    assert problems(case, found[case], in_one_process(case)) == []


@pytest.mark.campaign
def test_compiled_layers_on_a_sharded_mesh_give_what_one_process_gives() -> None:
    cases = [Case("3.0", 1, 2, compile=True), Case("2.5", 2, 2, compile=True, recompute="full", micro=1)]
    together = on_workers(cases)
    assert [problems(case, together[case], in_one_process(case)) for case in cases] == [[], []]


def test_every_pair_of_two_factors_is_tried() -> None:
    def value(case: Case, name: str) -> object:
        return (case.replicate, case.shard) if name == "mode" else getattr(case, name)

    for one, other in itertools.combinations(FACTORS, 2):
        tried = {(value(case, one), value(case, other)) for case in COVERING}
        assert tried == set(itertools.product(FACTORS[one], FACTORS[other])), (one, other)


@pytest.mark.parametrize("case", LONG, ids=name_of)
def test_copies_are_equal_bit_for_bit_after_a_hundred_steps(found: dict[Case, Found], case: Case) -> None:
    copies = found[case].copies
    assert copies == copies[: case.shard] * case.replicate
    assert len(set(copies)) == case.shard


@pytest.mark.parametrize("case", PLANTED, ids=name_of)
def test_a_planted_fault_is_seen(found: dict[Case, Found], case: Case) -> None:
    assert problems(case, found[case], in_one_process(case))

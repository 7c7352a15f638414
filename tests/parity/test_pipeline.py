"""Pipelines against one process: every generation, stages that divide the layers and that do not, each order of
micro-batches, alone and over copies, shards and split layers; and faults as they have been made, each seen.
"""

from __future__ import annotations

import pytest

from tests.parity import mutations
from tests.parity.harness import Case, Found, in_one_process, on_workers, problems

PAIR = (
    Case("1.0", pipeline=2, layers=3, documents=True, micro=1, rows=5, optimizer="muon"),
    Case("2.0", pipeline=2, micro=2, objective="by_row", loss="full", schedule="gpipe"),
    Case("2.5", pipeline=2, micro=4, objective="dpo", recompute="full", z_loss=1e-3),
    Case("3.0", pipeline=2, micro=2, layers=5, schedule="interleaved", documents=True, recompute="every_nth"),
    Case("4.0", pipeline=2, micro=8, masked=True),  # fewer micro-batches than stages
)
SQUARE = (
    Case("3.0", pipeline=2, shard=2, micro=1, optimizer="muon", documents=True),
    Case("2.5", pipeline=2, tensor=2, micro=2, objective="dpo", z_loss=1e-3),
    Case("1.0", pipeline=2, tensor=2, micro=4, layers=3, length=31, documents=True),
    Case("4.0", pipeline=4, layers=5, micro=1, documents=True),
)
SPREADS = ({"replicate": 2}, {"shard": 2}, {"tensor": 2})
WIDE = (
    *(
        Case(generation, pipeline=2, layers=4, micro=micro, schedule=schedule, optimizer=optimizer, documents=True)
        for generation in ("1.0", "2.0", "2.5", "3.0", "4.0")
        for schedule, micro in (("gpipe", 4), ("1f1b", 1), ("interleaved", 2))
        for optimizer in ("adamw", "muon")
    ),
    *(
        Case(generation, pipeline=2, micro=2, objective=objective, optimizer=optimizer, recompute=recompute, **spread)
        for generation in ("1.0", "2.0", "2.5", "3.0", "4.0")
        for spread in SPREADS
        for objective, optimizer, recompute in (("dpo", "adamw", "none"), ("by_row", "muon", "full"))
    ),
    *(Case("3.0", pipeline=2, layers=4, schedule="interleaved", micro=1, masked=True, **spread) for spread in SPREADS),
    Case("3.0", pipeline=3, layers=7, micro=1, z_loss=1e-3, loss="full"),
    Case("2.0", pipeline=3, layers=3, micro=4),
)
LONG = Case("3.0", 2, pipeline=2, micro=2, steps=100)
PLANTED = (
    Case("3.0", pipeline=2, micro=2, steps=1, mutation=mutations.TIED_APART),
    Case("3.0", pipeline=2, micro=2, steps=1, mutation=mutations.TIED_TWICE),
    Case("3.0", pipeline=2, micro=2, steps=1, mutation=mutations.OWN_STAGE),
    Case("3.0", pipeline=2, micro=2, steps=1, mutation=mutations.MEAN_OF_MICRO),
    Case("3.0", pipeline=2, micro=2, documents=True, steps=1, mutation=mutations.OTHER_MICRO),
    Case("3.0", 2, pipeline=2, micro=2, masked=True, steps=1, mutation=mutations.LOCAL_COUNT),
    Case("3.0", pipeline=2, shard=2, micro=2, steps=1, mutation=mutations.LOCAL_NORM),
    Case("3.0", 2, pipeline=2, micro=2, steps=1, mutation=mutations.NO_ALL_REDUCE),
    Case("3.0", pipeline=2, shard=2, micro=2, optimizer="muon", steps=1, mutation=mutations.DEFAULT_GROUP),
    Case("3.0", pipeline=2, tensor=2, micro=2, steps=1, mutation=mutations.OWN_INPUTS),
)


@pytest.fixture(scope="module")
def found() -> dict[Case, Found]:
    return on_workers([*PAIR, *SQUARE, *PLANTED])


def name_of(case: Case) -> str:
    mesh = f"{case.pipeline}x{case.replicate}x{case.shard}x{case.tensor}-{case.schedule}"
    return f"{case.generation}-{mesh}-{case.objective}-{case.optimizer}" + f"-{case.mutation}" * bool(case.mutation)


@pytest.mark.parametrize("case", [*PAIR, *SQUARE], ids=name_of)
def test_a_model_in_stages_gives_what_one_process_gives(found: dict[Case, Found], case: Case) -> None:
    assert problems(case, found[case], in_one_process(case)) == []


@pytest.mark.parametrize("case", PLANTED, ids=name_of)
def test_a_planted_fault_is_seen(found: dict[Case, Found], case: Case) -> None:
    assert problems(case, found[case], in_one_process(case))


@pytest.mark.campaign
def test_every_generation_on_every_mesh_gives_what_one_process_gives() -> None:
    together = on_workers(WIDE)
    wrong = {name_of(case): problems(case, together[case], in_one_process(case)) for case in WIDE}
    assert {name: told for name, told in wrong.items() if told} == {}


@pytest.mark.campaign
def test_compiled_layers_give_what_one_process_gives() -> None:
    cases = [
        Case("3.0", pipeline=2, micro=2, compile=True),
        Case("2.5", pipeline=2, shard=2, micro=2, compile=True, recompute="full"),
        Case("4.0", pipeline=2, tensor=2, micro=2, compile=True, documents=True, layers=4, schedule="interleaved"),
    ]
    together = on_workers(cases)
    assert [problems(case, together[case], in_one_process(case)) for case in cases] == [[], [], []]


@pytest.mark.campaign
def test_copies_of_stages_are_equal_bit_for_bit_after_a_hundred_steps() -> None:
    copies = on_workers([LONG])[LONG].copies
    assert (copies[0], copies[2]) == (copies[1], copies[3])

"""Tensor parallelism against one process: every generation, heads, vocabularies and columns that divide and that do
not, alone and over shards and replicas; and faults as they have been made, each seen.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.parity import mutations
from tests.parity.harness import Case, Found, in_one_process, on_workers, problems

# On two ranks the vocabulary of 401 does not divide; of the heads of keys, 3 do not. On four, 54 columns do not either.
PAIR = (
    Case("1.0", tensor=2, documents=True, micro=1, rows=5, optimizer="muon"),
    Case("2.0", tensor=2, objective="by_row", loss="full"),
    Case("2.5", tensor=2, objective="dpo", recompute="full", z_loss=1e-3),
    Case("3.0", tensor=2, optimizer="muon", documents=True, recompute="every_nth"),
    Case("4.0", tensor=2, heads=(6, 3), documents=True, masked=True),
    Case("3.0", tensor=2, heads=(6, 1), micro=1),
    # Of each text one rank has one token more than the other.
    Case("1.0", tensor=2, length=31, documents=True, answers=3),
    Case("2.5", tensor=2, length=17, recompute="full", masked=True, answers=3),
    Case("4.0", tensor=2, length=31, optimizer="muon", documents=True, answers=3),
)
SQUARE = (
    Case("3.0", shard=2, tensor=2, documents=True, micro=1, rows=5),
    Case("2.5", shard=2, tensor=2, heads=(6, 3), optimizer="muon", objective="dpo"),
)
WIDE = (
    *(
        Case(generation, tensor=4, heads=(8, keys), optimizer=optimizer, documents=True)
        for generation, keys in (("1.0", 8), ("2.0", 4), ("2.5", 2), ("3.0", 2), ("4.0", 1))
        for optimizer in ("adamw", "muon")
    ),
    *(
        Case(generation, replicate, shard, tensor=2, objective=objective, optimizer=optimizer)
        for generation in ("1.0", "2.0", "2.5", "3.0", "4.0")
        for replicate, shard in ((2, 1), (1, 2))
        for objective, optimizer in (("next_token", "adamw"), ("by_row", "muon"))
    ),
    # The last rank has fewer tokens of a text than the others, or none: nine are 3, 3, 3 and 0.
    *(
        Case(generation, tensor=4, heads=(8, 2), length=length, documents=True, answers=2)
        for generation, length in (("2.0", 30), ("2.5", 9), ("3.0", 9), ("4.0", 30))
    ),
    Case("1.0", tensor=4, heads=(8, 8), length=9, micro=1, answers=2),
    Case("3.0", 2, 1, tensor=2, length=31, objective="by_row", micro=1, rows=5),
    Case("2.5", 1, 2, tensor=2, length=28, objective="dpo", recompute="full"),
    Case("3.0", tensor=3, heads=(6, 2), z_loss=1e-3),
    Case("3.0", tensor=3, heads=(12, 4), recompute="full"),
    Case("3.0", 2, 1, tensor=2, masked=True, micro=1),
    Case("3.0", 2, 1, tensor=2, fails=True, micro=1),
)
DROPPED = tuple(
    Case(generation, tensor=2, dropout=0.2, recompute=recompute, length=31, steps=1)
    for generation in ("1.0", "3.0")
    for recompute in ("none", "full")
)
LONG = Case("3.0", 2, 1, tensor=2, steps=100)
PLANTED = (
    Case("3.0", tensor=2, steps=1, mutation=mutations.OWN_INPUTS),
    Case("3.0", tensor=2, steps=1, mutation=mutations.OWN_TOKENS),
    Case("1.0", tensor=2, steps=1, mutation=mutations.OWN_TOKENS),
    Case("3.0", tensor=2, steps=1, mutation=mutations.ORDER_OF_PARTS),
    Case("3.0", tensor=2, steps=1, mutation=mutations.OWN_GAINS),
    Case("4.0", tensor=2, steps=1, mutation=mutations.OWN_GAINS),
    Case("3.0", tensor=2, heads=(6, 3), steps=1, mutation=mutations.OWN_KEYS),
    Case("3.0", tensor=2, steps=1, mutation=mutations.OWN_VOCABULARY),
    Case("3.0", tensor=2, steps=1, mutation=mutations.LOCAL_NORM),
    Case("3.0", tensor=2, steps=1, mutation=mutations.TIED_TWICE),
    Case("3.0", tensor=2, masked=True, micro=1, optimizer="muon", steps=1, mutation=mutations.OF_PARTS),
    Case("3.0", shard=2, tensor=2, masked=True, steps=1, mutation=mutations.LOCAL_COUNT),
    Case("3.0", shard=2, tensor=2, optimizer="muon", steps=1, mutation=mutations.DEFAULT_GROUP),
)


@pytest.fixture(scope="module")
def found() -> dict[Case, Found]:
    return on_workers([*PAIR, *SQUARE, *DROPPED, *PLANTED])


def name_of(case: Case) -> str:
    heads = "" if case.heads is None else "-{}on{}".format(*case.heads)
    mesh = f"{case.replicate}x{case.shard}x{case.tensor}{heads}"
    return f"{case.generation}-{mesh}-{case.objective}-{case.optimizer}" + f"-{case.mutation}" * bool(case.mutation)


@pytest.mark.parametrize("case", [*PAIR, *SQUARE], ids=name_of)
def test_a_split_model_gives_what_one_process_gives(found: dict[Case, Found], case: Case) -> None:
    assert problems(case, found[case], in_one_process(case)) == []


@pytest.mark.parametrize("case", PLANTED, ids=name_of)
def test_a_planted_fault_is_seen(found: dict[Case, Found], case: Case) -> None:
    assert problems(case, found[case], in_one_process(case))


def test_a_layer_that_is_computed_again_drops_out_what_it_dropped_before(found: dict[Case, Found]) -> None:
    for once, again in zip(DROPPED[::2], DROPPED[1::2], strict=True):
        assert problems(again, found[again], found[once]) == []
        assert any("gradient" in told for told in problems(once, found[once], in_one_process(replace(once, dropout=0))))


@pytest.mark.campaign
def test_every_generation_on_every_mesh_gives_what_one_process_gives() -> None:
    together = on_workers(WIDE)
    wrong = {name_of(case): problems(case, together[case], in_one_process(case)) for case in WIDE}
    assert {name: told for name, told in wrong.items() if told} == {}


@pytest.mark.campaign
def test_compiled_layers_give_what_one_process_gives() -> None:
    cases = [
        Case("3.0", tensor=2, compile=True, length=31),
        Case("3.0", tensor=2, compile=True),
        Case("1.0", tensor=2, compile=True, steps=1, micro=3),
        Case("2.5", 1, 2, tensor=2, compile=True, recompute="full"),
        Case("4.0", tensor=2, compile=True, heads=(6, 3), recompute="every_nth", documents=True, steps=1),
    ]
    together = on_workers(cases)
    wrong = {name_of(case): problems(case, together[case], in_one_process(case)) for case in cases}
    assert {name: told for name, told in wrong.items() if told} == {}


@pytest.mark.campaign
def test_copies_of_split_models_are_equal_bit_for_bit_after_a_hundred_steps() -> None:
    copies = on_workers([LONG])[LONG].copies
    assert copies[:2] == copies[2:]

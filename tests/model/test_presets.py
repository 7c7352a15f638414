"""The published totals, from real modules."""

from __future__ import annotations

import pytest

from argonne.model.build import config_from_fields, count_parameters, describe_presets
from argonne.presets import presets

PUBLISHED = {
    "argonne-1.0": 275_827_680,
    "argonne-1.5": 356_516_640,
    "argonne-2.0": 4_918_072_800,
    "argonne-2.0-early": 5_558_579_200,
    "argonne-2.5": 1_273_807_360,
    "argonne-3.0": 2_882_162_688,
    "argonne-4.0": 1_038_492_672,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_exactly_the_published_number_of_parameters(name: str) -> None:
    assert count_parameters(config_from_fields(presets()[name].fields)) == PUBLISHED[name] == presets()[name].parameters


def test_every_preset_is_described_with_what_its_modules_are() -> None:
    rows = {row["name"]: row for row in describe_presets()}
    assert set(rows) == set(presets())
    third = rows["argonne-3.0"]
    assert (third["layers"], third["hidden"], third["heads"], third["kv_heads"], third["head_dim"]) == (
        24,
        3072,
        12,
        4,
        256,
    )
    assert (third["context"], third["vocabulary"], third["window"]) == (1024, 151_669, 256)
    assert rows["argonne-2.0-plan"]["parameters"] == 16_192_558_080  # its documents say 8B

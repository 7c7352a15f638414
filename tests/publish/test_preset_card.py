"""The cards of the releases: what they tell is what presets, recipes and published figures say."""

from __future__ import annotations

import re

import pytest

from argonne.errors import InputError
from argonne.plan.published import PUBLISHED, SOURCE_TOKENS
from argonne.presets import preset
from argonne.publish.preset_card import ROWS, preset_card, releases
from argonne.recipe import load_recipe

FIVE = ["argonne-1.0", "argonne-1.5", "argonne-2.0", "argonne-2.5", "argonne-3.0"]
# As docs/model.md has them, written out again; `tests/model/test_presets.py` counts the totals.
SIZES = {
    "argonne-1.0": ("275,827,680", "12", "1,296", "12 / 12", "108", "GELU (erf), 5,184", "2,048"),
    "argonne-1.5": ("356,516,640", "16", "1,296", "16 / 16", "81", "GELU (erf), 5,184", "2,048"),
    "argonne-2.0": ("4,918,072,800", "24", "4,080", "24 / 8", "170", "SwiGLU, 11,008", "4,096"),
    "argonne-2.5": ("1,273,807,360", "28", "1,792", "14 / 7", "128", "SwiGLU, 4,864", "1,024"),
    "argonne-3.0": ("2,882,162,688", "24", "3,072", "12 / 4", "256", "SwiGLU, 8,192", "1,024"),
}
BILLION = 1_000_000_000


def rows_of(name: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|`]+) \| (.+) \|$", preset_card(name), re.MULTILINE))


def number(text: str) -> float:
    """The first number of a text, `about 21.9B` and `16,384 tokens` among them."""
    found = re.search(r"([\d,.]*\d)(B?)", text)
    assert found, text
    return float(found[1].replace(",", "")) * (BILLION if found[2] else 1)


def test_there_is_a_card_of_each_release_and_of_nothing_else() -> None:
    assert list(releases()) == FIVE
    with pytest.raises(InputError, match=r"no card of 'nano-3\.0' is kept"):
        preset_card("nano-3.0")


@pytest.mark.parametrize("name", FIVE)
def test_a_card_has_the_sizes_of_its_generation(name: str) -> None:
    rows = rows_of(name)
    keys = ("parameters", "layers", "hidden size", "query / key heads", "head size", "MLP", "context")
    assert tuple(rows[key] for key in keys) == SIZES[name]
    assert number(rows["vocabulary"]) == preset(name).fields["vocab_size"]
    assert preset_card(name).startswith(f"# {preset(name).release}\n")
    assert f"status: {preset(name).status};" in preset_card(name)


@pytest.mark.parametrize("name", FIVE)
def test_what_a_card_says_was_published_is_what_a_plan_says(name: str) -> None:
    rows, published = rows_of(name), PUBLISHED[f"{name}-pretrain"]
    assert number(rows["steps"]) == published.steps
    if published.tokens is None:
        assert rows["tokens"] == "not published"
    else:
        assert round(number(rows["tokens"]) / BILLION, 2) == round(published.tokens / BILLION, 2)
    contradiction = published.contradiction()
    assert (contradiction is None) == ("does not close" not in preset_card(name))
    assert (contradiction or "") in preset_card(name)
    if published.hours is not None:
        assert rows["cost"] == f"{published.hours * int(published.devices.split()[0]):,} GPU-hours"


@pytest.mark.parametrize("name", FIVE)
def test_the_training_on_a_card_is_that_of_its_recipe(name: str) -> None:
    rows, recipe = rows_of(name), load_recipe(f"{name}-pretrain")
    assert number(rows["sequence"].replace(",", "")) == recipe.data.sequence_length
    assert float(rows["learning rate"].split()[0].rstrip(",")) == recipe.optim.lr
    assert rows["precision"].startswith(recipe.train.precision)
    if "document" not in rows["batch"]:
        assert number(rows["batch"]) == recipe.batch.tokens_per_step


def test_the_parts_of_3_0_are_the_tokens_of_its_two_recipes() -> None:
    parts = [SOURCE_TOKENS[f"argonne-3.0-{stage}"] for stage in ("pretrain", "continue")]
    assert rows_of("argonne-3.0")["tokens"] == f"76.05B ({parts[0]:,} + {parts[1]:,})"


def test_every_fact_of_a_release_has_its_row_and_what_is_missing_is_said() -> None:
    for name, told in releases().items():
        assert set(told) == {"training", "more"}
        assert set(told["training"]) <= set(ROWS), name
        assert set(told["more"]) <= {"notes", "mmlu"}
    assert rows_of("argonne-2.5")["cost"] == "not at hand"
    assert "id on the Hub: not at hand." in preset_card("argonne-2.0")


def test_mmlu_of_1_5_is_what_was_published_and_no_other_release_has_it() -> None:
    assert "3,579 of 14,042 = 0.2549 (standard error 0.0037; guessing gives 0.25)" in preset_card("argonne-1.5")
    subjects = releases()["argonne-1.5"]["more"]["mmlu"]["subjects"]
    assert (len(subjects), *map(sum, zip(*subjects.values(), strict=True))) == (57, 3579, 14042)
    assert "| high_school_psychology | 121 | 545 | 0.2220 |" in preset_card("argonne-1.5")
    assert [name for name in FIVE if "MMLU" in preset_card(name)] == ["argonne-1.5"]

"""Which context a base of rotary positions carries."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from argonne.config import ModelSection, Recipe
from argonne.errors import InputError
from argonne.plan.shape import as_trained, check_rope, discerned, longest_wavelength, shape_of, short_base
from argonne.presets import presets
from argonne.recipe import load_recipe, recipe_names
from argonne.stages.pretrain import run

Nano = Callable[..., Recipe]


def test_the_longest_wavelength_is_that_of_the_slowest_pair() -> None:
    assert longest_wavelength(1e4, 128) == pytest.approx(2 * math.pi / 1e4 ** (-126 / 128))


@pytest.mark.parametrize("head_dim", [32, 128, 256])
@pytest.mark.parametrize("theta", [50.0, 1e4, 1e6])
def test_a_context_of_one_turn_of_the_slowest_pair_is_carried_and_a_longer_one_refused(
    head_dim: int, theta: float
) -> None:
    model, reach = ModelSection(rope_theta=theta), int(longest_wavelength(theta, head_dim))
    check_rope(model, head_dim, reach)
    with pytest.raises(InputError, match=f"model.rope_theta: found {theta:g}".replace("+", "[+]")) as refused:
        check_rope(model, head_dim, reach + 1)
    least = float(str(refused.value).split("give at least ")[1].split(", or")[0].replace(",", ""))
    check_rope(ModelSection(rope_theta=least), head_dim, reach + 1)
    with pytest.raises(InputError):
        check_rope(ModelSection(rope_theta=0.999 * theta), head_dim, reach + 1)


def test_learned_positions_have_no_base() -> None:
    check_rope(ModelSection(position_embedding="learned"), 128, 10**9)
    assert short_base(ModelSection(position_embedding="learned"), 128, 10**9) is None


def test_every_preset_and_packaged_recipe_is_carried() -> None:
    for preset in presets().values():
        sizes = shape_of(preset.fields)
        model = ModelSection(position_embedding=sizes.position_embedding, rope_theta=preset.fields["rope_theta"])
        check_rope(model, sizes.head_dim, sizes.max_position_embeddings)
    for name in recipe_names():
        if load_recipe(name).model.hidden_size is not None:
            as_trained(load_recipe(name))
    check_rope(ModelSection(rope_theta=1e6), 256, 65_536)  # 3.0 as it was served


def test_the_distance_up_to_which_similar_tokens_are_told_from_others_is_the_first_negative_sum_of_cosines() -> None:
    theta, head_dim = 50.0, 32
    sums = [sum(math.cos(m * theta ** (-2 * pair / head_dim)) for pair in range(head_dim // 2)) for m in range(128)]
    first = next(m for m, value in enumerate(sums) if value < 0)
    assert discerned(theta, head_dim, 128) == first
    assert discerned(theta, head_dim, first) == first
    assert discerned(1e6, 128, 2_000) == 2_000
    told = short_base(ModelSection(rope_theta=theta), head_dim, 128)
    assert told is not None
    assert f"up to a distance of {first}, and the context is 128" in told


def test_a_run_whose_base_does_not_reach_is_refused_before_it_begins_and_a_short_base_is_told(
    nano: Nano, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"model\.rope_theta: found 6,? ?.*give at least"):
        run(nano(**{"model.rope_theta": "6"}), tmp_path / "refused")
    assert not (tmp_path / "refused" / "manifest.json").exists()
    context = {"model.max_position_embeddings": "32"}
    run(nano(**context, **{"model.rope_theta": "30"}), tmp_path / "told", stop_after_step=1)
    assert "warning: model.rope_theta 30 tells similar tokens from others up to" in capsys.readouterr().err
    run(nano(**context), tmp_path / "quiet", stop_after_step=1)
    assert "rope_theta" not in capsys.readouterr().err

"""The architecture as recipes and plans know it, without torch, against the configuration that ships
with a checkpoint.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne import presets as architecture
from argonne.errors import InputError
from argonne.model import Argonne1Config
from argonne.model.build import config_from_fields
from argonne.presets import preset

SIZES = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}


def fields_of(config: Any) -> dict[str, Any]:
    """A configuration under the names of a recipe's [model] section."""
    known = {name: getattr(config, name) for name in architecture.filled(SIZES) if name != "rope_theta"}
    theta = (config.rope_parameters or {}).get(
        "rope_theta", architecture.DEFAULTS["rope_theta"]
    )  # 1.x has none and uses none
    return {**known, "rope_theta": theta, "layer_types": tuple(config.layer_types)}


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_what_is_left_open_means_the_same_in_both(position: str) -> None:
    fields = {**SIZES, "position_embedding": position}
    config = config_from_fields(fields)
    assert isinstance(config, Argonne1Config) == (position == "learned")
    assert architecture.filled(fields) == fields_of(config)


@st.composite
def sections(draw: st.DrawFn) -> dict[str, Any]:
    """Sections with any of the fields left open, some of which cannot be."""
    layers = draw(st.integers(1, 3))
    kinds = st.lists(st.sampled_from([architecture.FULL, architecture.SLIDING, "local"]), min_size=1, max_size=3)
    choices: dict[str, st.SearchStrategy[Any]] = {
        "num_key_value_heads": st.integers(1, 4),
        "head_dim": st.integers(1, 6),
        "intermediate_size": st.integers(1, 9),
        "max_position_embeddings": st.integers(1, 99),
        "norm_type": st.sampled_from(["rms", "layer"]),
        "mlp_gated": st.booleans(),
        "attention_bias": st.booleans(),
        "attention_dropout": st.sampled_from([0.0, 0.2]),
        "tie_word_embeddings": st.booleans(),
        "q_norm": st.booleans(),
        "sandwich_norm": st.booleans(),
        "layer_types": kinds.map(tuple),
        "sliding_window": st.integers(0, 9),
        "final_logit_softcapping": st.sampled_from([0.0, 15.0]),
    }
    given_fields = {name: draw(choice) for name, choice in choices.items() if draw(st.booleans())}
    if "layer_types" not in given_fields:
        given_fields.pop("sliding_window", None)  # read as full attention, with a warning
    position = draw(st.sampled_from(["rope", "learned"]))
    heads = draw(st.integers(1, 4))
    hidden = 2 * heads * draw(st.integers(1, 4))
    sizes = {"vocab_size": 40, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "position_embedding": position, **given_fields}


@given(sections())
def test_both_refuse_the_same_sections_and_fill_the_others_alike(fields: dict[str, Any]) -> None:
    try:
        config = config_from_fields(fields)
    except InputError:
        with pytest.raises(InputError, match=r"^model\."):
            architecture.check(fields)
        return
    architecture.check(fields)
    assert architecture.filled(fields) == fields_of(config)


def test_heads_that_do_not_divide_the_width_need_a_head_dim() -> None:
    with pytest.raises(InputError, match=r"3 does not divide model\.hidden_size = 32"):
        architecture.check({**SIZES, "hidden_size": 32})
    architecture.check({**SIZES, "hidden_size": 32, "head_dim": 8})


def test_a_plan_refuses_what_a_section_and_the_model_it_starts_from_contradict(tmp_path: Any) -> None:

    from argonne.config import ModelSection, Recipe
    from argonne.plan.shape import as_trained

    fields = {name: value for name, value in preset("nano-3.0").fields.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    same = Recipe(model=ModelSection(init_from=str(tmp_path), num_key_value_heads=2))
    assert as_trained(same).model.num_key_value_heads == 2
    with pytest.raises(InputError, match=r"model\.num_key_value_heads: found 1, but the weights .* have 2"):
        as_trained(Recipe(model=ModelSection(init_from=str(tmp_path), num_key_value_heads=1)))


def test_the_architecture_loads_nothing_of_other_libraries() -> None:
    code = (
        "import sys, argonne.presets; print([name for name in ('torch', 'numpy', 'transformers') if name in "
        "sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )

"""Scaled rotary positions are Llama's, wherever and whenever they are set; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from argonne.errors import InputError
from argonne.legacy.export_pt import legacy_config
from argonne.model import ArgonneConfig, ArgonneForCausalLM
from argonne.model.load import FoundModel
from argonne.publish.native import native_twin

Make = Callable[..., ArgonneForCausalLM]
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 24},
    "yarn with all its settings": {
        "factor": 4.0,
        "original_max_position_embeddings": 24,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.8,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
}


def scaled(kind: str) -> dict[str, Any]:
    return {"rope_type": kind.split()[0], "rope_theta": 1e4, **SCALED[kind]}


@pytest.mark.parametrize("length", [40, 150])  # max_position_embeddings is 96: dynamic scaling begins there
@pytest.mark.parametrize("kind", SCALED)
def test_scaled_positions_are_llamas(kind: str, length: int, make_model: Make) -> None:
    model = make_model("2", hidden_size=60)
    ids = torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(0))
    plain = model(input_ids=ids).logits
    model.config.rope_parameters = scaled(kind)
    twin = native_twin(model)
    llama = LlamaForCausalLM(twin.config).to(torch.float64).eval()
    llama.load_state_dict(twin.state)
    found, expected = (x(input_ids=ids, use_cache=False).logits for x in (model, llama))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.detach().abs().max()))
    if kind != "dynamic" or length > 96:
        assert (found - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize("how", ["built", "loaded", "rope_scaling set", "rope_scaling loaded", "config"])
def test_scaling_holds_however_it_is_set(how: str, make_model: Make, ids: torch.Tensor, tmp_path: Path) -> None:
    model = make_model("3")
    model.save_pretrained(tmp_path)
    rope: dict[str, Any] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    earlier = {"type": "linear", "factor": 4.0}  # without the base, as earlier tools write it
    if how == "built":
        config = ArgonneConfig.from_dict({**model.config.to_dict(), "rope_parameters": rope})
        other = ArgonneForCausalLM(config).to(torch.float64)
        other.load_state_dict(model.state_dict())
    elif how == "config":
        other = ArgonneForCausalLM.from_pretrained(tmp_path, config=ArgonneConfig.from_pretrained(tmp_path))
        other.config.rope_parameters.update(rope)
    elif how == "rope_scaling loaded":
        other = ArgonneForCausalLM.from_pretrained(tmp_path, rope_scaling=earlier)
    else:
        other = ArgonneForCausalLM.from_pretrained(tmp_path)
        if how == "loaded":
            other.config.rope_parameters = rope
        else:
            other.config.rope_scaling = earlier
    model.config.rope_parameters = rope
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(other.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-12)
    other.save_pretrained(tmp_path / "again")
    again = ArgonneForCausalLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope", "rope_theta": 1e4}, "rope_type is 'longrope'; expected one of default, linear"),
        ({"rope_type": "yarn", "rope_theta": 1e4}, "rope_parameters.factor is None"),
        ({"rope_type": "linear", "factor": 2.0}, "rope_parameters.rope_theta is None"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"full_attention": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters.rope_theta is None"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_set_after_loading(
    rope: dict[str, Any], message: str, make_model: Make, ids: torch.Tensor
) -> None:
    model = make_model("2")
    model(input_ids=ids)
    model.config.rope_parameters = rope
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids)


def test_ways_out_that_know_the_base_only_refuse_scaled_positions(make_model: Make) -> None:
    config = make_model("2", hidden_size=60).config
    config.rope_parameters = scaled("yarn")
    with pytest.raises(InputError, match="rope_type is 'yarn'"):
        legacy_config(Path("checkpoint_step_4"), config)
    with pytest.raises(InputError, match=r"rope_type is 'yarn', and a recipe knows model\.rope_theta only"):
        _ = FoundModel(Path("model"), config.to_dict(), None).fields

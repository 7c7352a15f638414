"""Configs: what is refused, what earlier ones mean, what survives a file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from argonne.errors import InputError
from argonne.model import Argonne1Config, ArgonneConfig, ArgonneForCausalLM
from argonne.model.build import build_model, config_from_fields
from argonne.presets import presets


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_attention_heads": 6, "num_key_value_heads": 4},
            "num_attention_heads is 6, not a multiple of num_key_value_heads = 4",
        ),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries"),
        ({"layer_types": ["full_attention"] * 3 + ["local"]}, r"layer_types\[3\] is 'local'"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window is None"),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": 0}, "sliding_window is 0"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"norm_type": "batch"}, "norm_type is 'batch'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"final_logit_softcapping": -3.0}, "final_logit_softcapping is -3.0"),
        ({"hiden_size": 3}, "model.hiden_size"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_the_field_and_its_value(change: dict[str, Any], message: str) -> None:
    fields = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "head_dim": 8, **change}
    with pytest.raises(InputError, match=message):
        config_from_fields(fields)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_key_value_heads", 4, "num_attention_heads is 6, not a multiple of num_key_value_heads = 4"),
        ("head_dim", 7, "head_dim is 7"),
        ("num_hidden_layers", 3, "layer_types has 4 entries; expected num_hidden_layers = 3"),
        ("layer_types", ["sliding_attention"] * 4, "sliding_window is None"),
        ("sliding_window", 8, "sliding_window is 8, and layer_types has no sliding_attention"),
        ("hidden_act", "relu", "hidden_act is 'relu'"),
        ("rms_norm_eps", 0.0, "rms_norm_eps is 0.0"),
        ("attention_dropout", 1.0, "attention_dropout is 1.0"),
        ("hidden_dropout", -0.1, "hidden_dropout is -0.1"),
        ("rope_parameters", None, "rope_parameters.rope_theta is None"),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}, "rope_type is 'longrope'"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}, "rope_parameters.factor is None"),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0},
            "rope_parameters.factor is 2.0",
        ),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "rope_parameters.partial_rotary_factor is 0.5",
        ),
    ],
)
def test_a_field_that_was_changed_after_the_config_was_made_is_refused_by_its_name(
    field: str, value: Any, message: str
) -> None:
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "head_dim": 8, "vocab_size": 30}
    config = config_from_fields(sizes)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        build_model(config, seed=0)
    with pytest.raises(ValueError, match=message):
        ArgonneForCausalLM(config)


def test_learned_positions_and_scaled_rotations_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="rope_type is 'linear'; learned positions have none"):
        Argonne1Config(rope_parameters={"rope_type": "linear", "factor": 2.0})


def test_what_is_not_given_follows_the_rules() -> None:
    config = config_from_fields(
        {"vocab_size": 10, "hidden_size": 4_080, "num_hidden_layers": 2, "num_attention_heads": 24}
    )
    assert (config.intermediate_size, config.head_dim, config.num_key_value_heads) == (11_008, 170, 24)
    assert config.layer_types == ["full_attention"] * 2
    assert not any((config.q_norm, config.k_norm, config.v_norm, config.sandwich_norm))
    assert config.final_logit_softcapping is None


@pytest.mark.parametrize("name", presets())
def test_a_config_survives_its_file(name: str, tmp_path: Path) -> None:
    config = config_from_fields(presets()[name].fields)
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert isinstance(config, Argonne1Config) == name.endswith(("1.0", "1.5"))


def test_an_earlier_config_with_a_window_and_no_layer_types_is_full_attention_and_says_so() -> None:
    earlier = {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "qk_norm": True,
        "v_norm": True,
        "logit_softcap": 15.0,
    }
    with pytest.warns(UserWarning, match="window of 8") as caught:
        config = ArgonneConfig(**earlier, local_attention_window=8, interleaved_local_attention=True, rope_theta=1e6)
    assert len(caught) == 1
    assert config.layer_types == ["full_attention"] * 4
    assert config.sliding_window is None
    assert config.q_norm
    assert config.k_norm
    assert config.final_logit_softcapping == 15.0
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}


def test_stale_aliases_never_override_the_modern_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ArgonneConfig(
            hidden_size=56, n_embd=999, num_hidden_layers=2, n_layer=7, max_position_embeddings=64, block_size=32
        )
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (56, 2, 64)
    assert not hasattr(config, "block_size")
    first = Argonne1Config(n_embd=108, n_layer=2, n_head=1, block_size=24, dropout=0.25, vocab_size=120)
    assert (first.hidden_size, first.num_hidden_layers, first.num_attention_heads, first.max_position_embeddings) == (
        108,
        2,
        1,
        24,
    )
    assert first.attention_dropout == first.hidden_dropout == 0.25
    assert first.intermediate_size == 432


def test_training_switches_of_earlier_configs_are_not_carried_along() -> None:
    config = ArgonneConfig(
        hidden_size=56, use_flash_attention=True, use_gradient_checkpointing=True, z_loss_weight=0.1, mtp_horizon=2
    )
    kept = json.loads(config.to_json_string(use_diff=False))
    assert not {"use_flash_attention", "use_gradient_checkpointing", "z_loss_weight", "mtp_horizon"} & set(kept)


def test_the_same_seed_gives_the_same_weights_whatever_the_global_state() -> None:
    import torch

    config = config_from_fields(presets()["nano-3.0"].fields)
    first = build_model(config, seed=5).state_dict()
    torch.manual_seed(99)
    torch.rand(7)
    second = build_model(config, seed=5).state_dict()
    third = build_model(config, seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], third["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("initializer", "plain", "residual"), [("scaled", 0.02, 0.02 / 8**0.5), ("argonne", 128**-0.5, 8**-0.5)]
)
def test_the_initializers_have_their_widths(initializer: str, plain: float, residual: float) -> None:
    model = build_model(config_from_fields(presets()["nano-3.0"].fields), initializer=initializer, seed=0)
    layer = model.model.layers[1]
    for weight, width in (
        (model.model.embed_tokens.weight, plain),
        (layer.self_attn.q_proj.weight, plain),
        (layer.mlp.up_proj.weight, plain),
        (layer.self_attn.o_proj.weight, residual),
        (layer.mlp.down_proj.weight, residual),
    ):
        assert abs(weight.std().item() / width - 1) < 0.03
    with pytest.raises(InputError, match="initializer is 'xavier'"):
        build_model(model.config, initializer="xavier", seed=0)

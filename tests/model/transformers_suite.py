"""transformers' own model tests on Argonne's classes. test_transformers_suite.py copies this file into the unpacked
sources of transformers, as tests/models/argonne/test_modeling_argonne.py with the generations beside it, and runs it.

GenerationTesterMixin stands in for transformers' own where the sources do not carry it.
"""

from __future__ import annotations

import json
import unittest
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from argonne.model import ArgonneConfig, modeling_argonne
from argonne.model.build import config_from_fields
from argonne.model.configuration_argonne import SLIDING

from ... import test_modeling_common
from ...generation.test_utils import GenerationTesterMixin
from ...test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

GENERATIONS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("generations.json").read_text())
# transformers looks up by these names which class gets which labels, and which has no loss.
NAMES = {
    "BaseModel": modeling_auto.MODEL_MAPPING_NAMES,
    "ForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def classes(family: str) -> tuple[type, ...]:
    for name, mapping in NAMES.items():
        mapping[family.lower()] = family + name
    return tuple(getattr(modeling_argonne, family + name) for name in NAMES)


class ArgonneModelTester:
    """What transformers' tests ask of a model's tester: sizes, a config, inputs."""

    batch_size, seq_length, is_training, attention = 3, 7, True, None

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            setattr(self, name, fields[name])

    def get_config(self) -> ArgonneConfig:
        config: Any = config_from_fields(self.fields)
        config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
        config._attn_implementation = self.attention
        return config  # type: ignore[no-any-return]

    def prepare_config_and_inputs_for_common(self) -> tuple[ArgonneConfig, dict[str, Any]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), inputs


# The tests give a window to every config that has the field, and a length to rotary types that read none. Ours refuses
# both; here they are left out.
def set_all_but_a_window_without_effect(self: Any, name: str, value: Any) -> None:
    if name == "sliding_window" and SLIDING not in (self.__dict__.get("layer_types") or [SLIDING]):
        value = None
    PreTrainedConfig.__setattr__(self, name, value)


def set_rope(config: Any, rope: dict[str, Any]) -> None:
    config.rope_parameters = {name: of for name, of in rope.items() if name != "original_max_position_embeddings"}


ArgonneConfig.__setattr__ = set_all_but_a_window_without_effect  # type: ignore[method-assign]
test_modeling_common._set_config_rope_params = set_rope


class Suite(ModelTesterMixin, GenerationTesterMixin):
    """The tests of one generation; the mixins bring them."""

    generation: str

    def setUp(self) -> None:
        fields = GENERATIONS[self.generation]
        self.model_tester: Any = ArgonneModelTester(fields)
        self.all_model_classes = classes("Argonne1" if fields.get("position_embedding") == "learned" else "Argonne")

    def test_model_outputs_equivalence(self) -> None:
        """With the attention that has weights to return: they are asked for here."""
        self.model_tester.attention = "eager"
        super().test_model_outputs_equivalence()


for _name in GENERATIONS:
    _class = f"Test{_name.replace('-', '_')}"
    globals()[_class] = type(_class, (Suite, unittest.TestCase), {"generation": _name})
del Suite  # it is no test itself

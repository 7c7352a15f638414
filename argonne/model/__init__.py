"""The models. Importing this registers them for transformers' Auto classes: the one allowed effect of an import."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from argonne.model.configuration_argonne import Argonne1Config, ArgonneConfig
from argonne.model.modeling_argonne import (
    Argonne1BaseModel,
    Argonne1ForCausalLM,
    Argonne1ForSequenceClassification,
    ArgonneBaseModel,
    ArgonneForCausalLM,
    ArgonneForSequenceClassification,
    ArgonneModel,
)

for _config, _base, _causal, _score in (
    (ArgonneConfig, ArgonneBaseModel, ArgonneForCausalLM, ArgonneForSequenceClassification),
    (Argonne1Config, Argonne1BaseModel, Argonne1ForCausalLM, Argonne1ForSequenceClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _base, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)
    AutoModelForSequenceClassification.register(_config, _score, exist_ok=True)

__all__ = ["Argonne1Config", "ArgonneBaseModel", "ArgonneConfig", "ArgonneForCausalLM", "ArgonneModel"]

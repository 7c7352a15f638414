"""The models. Importing this registers them for AutoConfig, AutoModel and AutoModelForCausalLM: the one allowed effect
of an import.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from argonne.model.configuration_argonne import Argonne1Config, ArgonneConfig
from argonne.model.modeling_argonne import (
    Argonne1BaseModel,
    Argonne1ForCausalLM,
    ArgonneBaseModel,
    ArgonneForCausalLM,
    ArgonneModel,
)

for _config, _base, _causal in (
    (ArgonneConfig, ArgonneBaseModel, ArgonneForCausalLM),
    (Argonne1Config, Argonne1BaseModel, Argonne1ForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _base, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal, exist_ok=True)

__all__ = ["Argonne1Config", "ArgonneBaseModel", "ArgonneConfig", "ArgonneForCausalLM", "ArgonneModel"]

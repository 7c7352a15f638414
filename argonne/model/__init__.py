"""The models. Importing this registers them for AutoConfig, AutoModel and AutoModelForCausalLM: the one allowed effect of an import."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from argonne.model.configuration_argonne import Argonne1Config, ArgonneConfig
from argonne.model.modeling_argonne import ArgonneBaseModel, ArgonneForCausalLM, ArgonneModel

for _config in (ArgonneConfig, Argonne1Config):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    # The mapping itself: `AutoModel.register` insists on a class of its own for every config class, and one class serves both here.
    AutoModel._model_mapping.register(_config, ArgonneBaseModel, exist_ok=True)  # type: ignore[arg-type]
    AutoModelForCausalLM._model_mapping.register(_config, ArgonneForCausalLM, exist_ok=True)  # type: ignore[arg-type]

__all__ = ["Argonne1Config", "ArgonneBaseModel", "ArgonneConfig", "ArgonneForCausalLM", "ArgonneModel"]

"""`argonne import`: weights and configs of earlier Argonne files under today's names, as a complete Hugging Face
folder.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argonne import layout
from argonne.errors import InputError
from argonne.files import atomic_directory
from argonne.legacy.reader import LegacyCheckpoint, read_legacy
from argonne.model.configuration_argonne import FULL, SLIDING, Argonne1Config, ArgonneConfig
from argonne.model.load import stop_ids
from argonne.model.modeling_argonne import ArgonneForCausalLM
from argonne.model.save import copy_tokenizer, save_model_folder
from argonne.model.stored import check_finite

# Fields of 4.5 experiments that no released weights use; a checkpoint that has one on is another architecture.
EXPERIMENTAL = {
    "attn_pattern": (None, ""),
    "nope_global": (False, None),
    "attn_gate": (False, None),
    "mlp_type": ("swiglu", None),
}
# What the configs of earlier classes hold besides today's fields, all of it read or known to change nothing.
EARLIER = {
    *("n_embd", "n_layer", "n_head", "block_size", "logit_softcap", "qk_norm", "dropout", "rope_theta", "rope_scaling"),
    *("local_attention_window", "interleaved_local_attention", "use_flash_attention", "use_flash_attn"),
    *("use_gradient_checkpointing", "z_loss_weight", "mtp_horizon", "mtp_loss_weight", "loss_chunk_size"),
    *("_name_or_path", "torch_dtype", "torchscript", "use_bfloat16", "tf_legacy_loss"),
}
OUTER = {
    "token_embedding.weight": "model.embed_tokens.weight",
    "embed_tokens.weight": "model.embed_tokens.weight",
    "position_embedding": "model.embed_positions.weight",
    "ln_f": "model.norm",
    "norm": "model.norm",
    "head.weight": "lm_head.weight",
    "lm_head.weight": "lm_head.weight",
}
FIRST_INNER = {
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.proj": "self_attn.o_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


def inner_names(sandwich: bool) -> dict[str, str]:
    """Earlier module name inside a block -> today's, for 2.x (as Llama) and for sandwich models (as Gemma)."""
    names = {f"attn.{part}_proj": f"self_attn.{part}_proj" for part in "qkvo"}
    names |= {f"mlp.{part}_proj": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    names |= {
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
        "attn.v_norm_layer": "self_attn.v_norm",
    }
    names |= {
        "input_norm": "input_layernorm",
        "post_norm": "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm",
    }
    if sandwich:
        names |= {"attn_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
    return names


def modern_name(name: str, config: ArgonneConfig) -> str | None:
    """Today's name of an earlier parameter; None for one that has none. `blocks.{i}.attn.mask` is a buffer and has none
    either.
    """
    block = _BLOCK.fullmatch(name)
    if block:
        inner = FIRST_INNER if isinstance(config, Argonne1Config) else inner_names(config.sandwich_norm)
        module = inner.get(block[2])
        return None if module is None else f"model.layers.{block[1]}.{module}.{block[3]}"
    if name in OUTER:
        return OUTER[name]
    module, _, kind = name.rpartition(".")
    return f"{OUTER[module]}.{kind}" if module in OUTER and kind in ("weight", "bias") else None


def modern_config(legacy: LegacyCheckpoint, attention: str) -> ArgonneConfig:
    """The config under today's names. attention "full": no window, as the released weights were trained; "as-config":
    as it says.

    A window of w saw the keys i-w .. i in the earlier code; `sliding_window` counts the query's own key, hence w + 1.
    """
    raw = dict(legacy.config)
    for name, off in EXPERIMENTAL.items():
        if raw.pop(name, off[0]) not in off:
            raise InputError(
                f"{legacy.folder / layout.MODEL_CONFIG}: {name} is {legacy.config[name]!r}: an experiment of 4.5 "
                "that is not supported"
            )
    raw.pop("sliding_window_size", None)
    for name in ("local_attention_window", "sliding_window"):
        if not isinstance(raw.get(name), int | None):
            raise InputError(f"{legacy.folder / layout.MODEL_CONFIG}: {name} is {raw[name]!r}; expected a whole number")
    window = raw.get("local_attention_window") or raw.get("sliding_window")
    everywhere = not raw.get("local_attention_window")
    on = bool(window and window > 0) and (everywhere or raw.get("interleaved_local_attention", True))
    if "layer_types" not in raw:
        raw = {name: value for name, value in raw.items() if name not in ("local_attention_window", "sliding_window")}
    kind = Argonne1Config if raw.get("model_type") == "argonne" else ArgonneConfig
    for name in ("model_type", "transformers_version", "auto_map", "architectures"):
        raw.pop(name, None)
    known = EARLIER | {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(name for name, value in raw.items() if name not in known and value):
        raise InputError(
            f"{legacy.folder / layout.MODEL_CONFIG}: {unknown[0]} is {raw[unknown[0]]!r}, a field that no known "
            "release has; if it changes what the model computes, it cannot be imported: otherwise take the field out"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            config = kind(**raw)
            if on and attention == "as-config" and "layer_types" not in raw:
                config.layer_types = [
                    SLIDING if everywhere or layer % 2 else FULL for layer in range(config.num_hidden_layers)
                ]
                config.sliding_window = int(window or 0) + 1
            config.check_architecture()
    except (ValueError, TypeError, UserWarning) as error:
        raise InputError(f"{legacy.folder / layout.MODEL_CONFIG}: {error}") from None
    if on and attention == "full":
        legacy.messages.append(
            f"the config names a window of {window}; imported as full attention on every layer, as released weights "
            "were trained (--attention as-config keeps the window)"
        )
    if on and attention == "as-config":
        legacy.messages.append(
            f"window of {window} earlier keys and the own one: sliding_window = {config.sliding_window}"
        )
    return config


def modern_state(legacy: LegacyCheckpoint, config: ArgonneConfig, vocabulary: int | None = None) -> dict[str, Tensor]:
    """The tensors under today's names, padded vocabulary rows trimmed to `vocabulary` (default: the config's).

    Raises InputError naming the first unknown, missing or mis-shaped parameter.
    """
    if vocabulary is not None and vocabulary < config.vocab_size:
        legacy.messages.append(
            f"vocab_size {config.vocab_size} of the config becomes the {vocabulary} entries of the tokenizer"
        )
        config.vocab_size = vocabulary
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in ArgonneForCausalLM(config).state_dict().items()}
    state: dict[str, Tensor] = {}
    for name, tensor in legacy.tensors.items():
        if name.endswith(".attn.mask"):
            continue
        new = modern_name(name, config)
        if new is None or new not in expected:
            raise InputError(
                f"{legacy.folder}: parameter {name} is unknown in this architecture; config.json and weights belong "
                "to different models"
            )
        tensor = tensor[0] if new == "model.embed_positions.weight" and tensor.dim() == 3 else tensor
        rows = expected[new][0]
        is_table = rows == config.vocab_size and tensor.dim() == 2 and tensor.shape[1:] == expected[new][1:]
        if is_table and rows < tensor.shape[0] <= -(-rows // 512) * 512:
            legacy.messages.append(f"{name}: {tensor.shape[0]} rows trimmed to the vocabulary of {rows}")
            tensor = tensor[:rows].clone()
        if tensor.shape != expected[new]:
            raise InputError(
                f"{legacy.folder}: parameter {name} has shape {tuple(tensor.shape)}, expected {tuple(expected[new])}"
            )
        state[new] = tensor
    table = state.get("model.embed_tokens.weight")
    if (
        config.tie_word_embeddings
        and table is not None
        and not torch.equal(state.setdefault("lm_head.weight", table), table)
    ):
        raise InputError(  # a tied head may be stored twice or once; stored twice with different values it is not tied
            f"{legacy.folder}: lm_head.weight differs from embed_tokens.weight though tie_word_embeddings is true; "
            "set it to false in config.json if the head was trained by itself"
        )
    if missing := sorted(set(expected) - set(state)):
        raise InputError(
            f"{legacy.folder}: parameter {missing[0]} is missing from the weights ({len(missing)} of {len(expected)} "
            "are)"
        )
    return state


def load_legacy(
    path: Path, attention: str = "full", dtype: torch.dtype | None = None
) -> tuple[ArgonneForCausalLM, LegacyCheckpoint]:
    """The model of an earlier checkpoint in `dtype` (default: the stored one), and what was read. Raises InputError."""
    if attention not in ("full", "as-config"):
        raise InputError(f"--attention is {attention!r}; expected full or as-config")
    legacy = read_legacy(path)
    config = modern_config(legacy, attention)
    tokenizer, entries = layout.tokenizer_of(legacy.folder), None
    if tokenizer is not None and (tokenizer / layout.TOKENIZER_FILE).is_file():
        from tokenizers import Tokenizer

        known = Tokenizer.from_file(str(tokenizer / layout.TOKENIZER_FILE)).get_vocab(with_added_tokens=True)
        entries = 1 + max(known.values())
    state = modern_state(legacy, config, entries)
    check_finite(path, state)
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        check_finite(f"{path} as {dtype}", state)
    elif len(stored) != 1:
        raise InputError(f"{path}: tensors of several dtypes ({', '.join(stored)}); choose one with --dtype")
    with torch.device("meta"):
        model = ArgonneForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval(), legacy


def import_checkpoint(path: Path, out: Path, *, attention: str = "full", dtype: str | None = None) -> dict[str, Any]:
    """Write the Hugging Face folder `out` from an earlier checkpoint; return what it is and every message about it.

    `dtype`: float32, bfloat16 or float16 in place of the stored one.

    Raises InputError for anything that is not such a checkpoint; `out` is complete or absent.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise InputError(f"--dtype is {dtype!r}; expected float32, bfloat16 or float16")
    model, legacy = load_legacy(path, attention, getattr(torch, dtype) if dtype else None)
    ids = stop_ids(legacy.folder, legacy.config)
    if ids["eos_id"] is None:
        legacy.messages.append(
            "no end-of-text id is known: set eos_token_id in generation_config.json, or generation will not stop by "
            "itself"
        )
    with atomic_directory(out) as folder:
        save_model_folder(model, folder, **ids)
        files = copy_tokenizer(layout.tokenizer_of(legacy.folder), folder)
        if not files:
            legacy.messages.append("no tokenizer beside the weights: add its files to the folder")
    return {
        "path": str(out),
        "source": str(path),
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layer_types": list(model.config.layer_types or []),
        "sliding_window": model.config.sliding_window,
        "tokenizer_files": files,
        "messages": legacy.messages,
    }

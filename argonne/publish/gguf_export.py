"""`argonne export --as gguf`: a model as one file that llama.cpp, and what is built on it, loads; proven in it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from argonne import layout
from argonne.errors import InputError
from argonne.files import atomic_directory, write_json
from argonne.model.build import Weights
from argonne.model.configuration_argonne import SLIDING, ArgonneConfig
from argonne.model.load import load_model, resolve_model, stop_ids, stored_weights
from argonne.model.stored import check_finite
from argonne.publish.engines import ERF, GELU, INSTEAD, model_card
from argonne.publish.gguf_tokenizer import CONTROL, GgufVocabulary, chat_template, gguf_vocabulary, sample_texts
from argonne.publish.native import llama_like
from argonne.publish.proof import Mismatch, ask, expected_file, is_installed, not_installed, standing
from argonne.publish.source import source_of
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer

# How far logits may lie from the model's own, of the largest. llama.cpp rounds what it multiplies with to the type of
# the weights too: q8_0 in blocks of 32, bf16 to 8 bits.
TOLERANCE = {"f32": 1e-4, "bf16": 5e-2, "q8_0": 1e-1}
BLOCK = 32  # numbers of a row that share a scale in q8_0
TEXTS = 200
NO_TOKENIZER = "none in the model: llama.cpp takes ids alone"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}


def export_gguf(
    model_path: Path, out: Path, *, dtype: str | None = None, engines: Sequence[str] = ()
) -> dict[str, Any]:
    """Write MODEL as `out`/model.gguf and return what was written and how it was proven.

    dtype: f32, bf16 or q8_0 of the matrices; None: as the weights are stored (f16 as f32). Where llama_cpp is
    installed, a fresh process loads the file before `out` appears, and logits, greedy text and the ids of texts are
    compared. Raises InputError, before anything is written, for what llama.cpp does not compute exactly.
    """
    if out.exists():
        raise InputError(f"{out} exists already; choose another name or remove it")
    if dtype not in (None, *TOLERANCE):
        raise InputError(f"--dtype is {dtype!r}; expected one of {', '.join(TOLERANCE)}")
    if others := [engine for engine in engines if engine != "llama.cpp"]:
        raise InputError(f"--for {others[0]}: --as gguf is for llama.cpp and what is built on it; leave it out")
    if importlib.util.find_spec("gguf") is None:
        raise InputError("--as gguf needs the package gguf, which is not installed; pip install 'argonne[gguf]'")
    found = resolve_model(model_path)
    weights = stored_weights(found.folder)
    check_representable(weights.config)
    dtype = dtype or ("bf16" if weights.config.dtype == torch.bfloat16 else "f32")
    check_blocks(weights, dtype)
    ids = stop_ids(found.folder, found.config)
    tokenizer = None if found.tokenizer_folder is None else load_tokenizer(found.tokenizer_folder)
    words = None if tokenizer is None else described(tokenizer, weights.config.vocab_size, ids)
    with atomic_directory(out) as folder:
        file = folder / layout.GGUF_FILE
        write_gguf(file, weights, dtype, words)
        proof = prove(file, model_path, dtype, tokenizer, words)
        record = {
            "format_version": layout.EXPORT_VERSION,
            "class": "llama of llama.cpp",
            "kind": "gguf",
            "source": source_of(model_path, found),
            "dtype": dtype,
            "parameters": weights.model.num_parameters(),
            "engines": {"llama.cpp": standing(proof, None if dtype == "f32" else dtype)._asdict()},
            "tokenizer": NO_TOKENIZER if words is None else f"gpt2, cut as {words.vocabulary.pre}",
            "notes": [] if words is None else words.vocabulary.notes,
            "proof": proof,
        }
        write_json(folder / layout.EXPORT_RECORD, record)
        (folder / layout.MODEL_CARD).write_text(model_card(record))
    return {"path": str(out / layout.GGUF_FILE), **record}


def check_representable(config: ArgonneConfig) -> None:
    """Raise InputError saying what stands against it where llama.cpp's `llama` computes another model."""
    holds = {
        **llama_like(config),
        "its MLP computes SiLU": config.hidden_act == "silu",
        "it has no local layers": SLIDING not in (config.layer_types or []),
        f"its rotary positions are written unscaled, here {config.rope_type}": config.rope_type == "default",
    }
    if reasons := [what for what, so in holds.items() if not so]:
        nearest = f"; {ERF}" if config.position_embedding == "learned" else f"; {GELU}" if config.sandwich_norm else ""
        raise InputError(
            f"--as gguf: llama.cpp's llama is another model: {'; '.join(reasons)}{nearest}; instead: {INSTEAD}"
        )


def check_blocks(weights: Weights, dtype: str) -> None:
    for name, tensor in weights.model.named_parameters():
        if dtype == "q8_0" and tensor.dim() == 2 and tensor.shape[1] % BLOCK:
            raise InputError(
                f"--dtype q8_0: rows of {name} have {tensor.shape[1]:,} numbers, expected a multiple of {BLOCK}; use "
                "--dtype bf16"
            )


class Words(NamedTuple):
    """What a file says beside its weights. special: ids by llama.cpp's names of them."""

    vocabulary: GgufVocabulary
    special: dict[str, int]
    template: str | None


def described(tokenizer: TextTokenizer, size: int, ids: dict[str, Any]) -> Words:
    """The words of a model of `size` ids. Raises InputError for what llama.cpp cannot do as the tokenizer does."""
    ends = ids["eos_id"] if isinstance(ids["eos_id"], list) else [ids["eos_id"]]
    if None in ends or not 1 <= len(ends) <= 3:
        raise InputError(
            f"{tokenizer.folder}: a text ends with the ids {ends}, expected one to three (with none llama.cpp ends at "
            f"token 11); name them as eos_token_id in {layout.GENERATION_CONFIG}"
        )
    # The beginning too would be token 11; llama.cpp is told to put nothing in front of a text.
    begin = ends[0] if ids["bos_id"] is None else ids["bos_id"]
    special = {**dict(zip(("eos", "eot", "eom"), ends, strict=False)), "bos": begin, "pad": ids["pad_id"]}
    kept = {name: number for name, number in special.items() if number is not None}
    return Words(gguf_vocabulary(tokenizer, size), kept, chat_template(tokenizer))


def write_gguf(file: Path, weights: Weights, dtype: str, words: Words | None) -> None:
    """Write the file, one tensor in memory at a time. Raises InputError for weights that are not finite."""
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    _add_architecture(writer, weights.config)
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32"}.get(dtype, f"MOSTLY_{dtype.upper()}")])
    if words is None:
        writer.add_tokenizer_model("none")
    else:
        _add_words(writer, words)
    shapes = {name: tuple(parameter.shape) for name, parameter in sorted(weights.model.named_parameters())}
    for name, shape in shapes.items():
        form = gguf.GGMLQuantizationType[dtype.upper() if len(shape) == 2 else "F32"]
        kind = np.dtype(np.float32 if form == gguf.GGMLQuantizationType.F32 else np.uint8)
        size = shape if kind == np.float32 else gguf.quant_shape_to_byte_shape(shape, form)
        writer.add_tensor_info(gguf_name(name), size, kind, math.prod(size) * kind.itemsize, form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (given, tensor) in zip(shapes, weights.tensors(), strict=True):
        assert name == given, f"{given} came where {name} was announced"
        check_finite(file, {name: tensor})
        heads = {"q_proj": weights.config.num_attention_heads, "k_proj": weights.config.num_key_value_heads}
        turned = heads.get(name.split(".")[-2])
        writer.write_tensor_data(encoded(tensor if turned is None else interleaved(tensor, turned), dtype))
    writer.close()


def _add_architecture(writer: Any, config: ArgonneConfig) -> None:
    writer.add_type("model")
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base((config.rope_parameters or {})["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_words(writer: Any, words: Words) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.vocabulary.pre)
    writer.add_token_list(words.vocabulary.tokens)
    writer.add_token_types(words.vocabulary.types)
    writer.add_token_merges(words.vocabulary.merges)
    for name, number in words.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if words.template is not None:
        writer.add_chat_template(words.template)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter."""
    stem, leaf = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{leaf}"
    return f"{NAMES[stem]}.{leaf}"


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k: llama.cpp's llama rotates the neighbours 2i and 2i + 1, ours i and i + head_dim / 2."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def encoded(tensor: Tensor, dtype: str) -> np.ndarray:
    """A tensor as the file has it: of one dimension in fp32, as llama.cpp's converter keeps norms and biases."""
    from gguf import GGMLQuantizationType, quantize

    if tensor.dim() == 1 or dtype == "f32":
        return tensor.float().contiguous().numpy()
    if dtype == "bf16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    return quantize(tensor.float().contiguous().numpy(), GGMLQuantizationType.Q8_0)


def prove(
    file: Path, model_path: Path, dtype: str, tokenizer: TextTokenizer | None = None, words: Words | None = None
) -> dict[str, Any]:
    """Load the file in a fresh process of llama.cpp and compare. Raises Mismatch where anything differs: then nothing
    is put in place. Where llama_cpp is not installed, that is all it says.
    """
    if not is_installed("llama.cpp"):
        return {"proven": False, "why": not_installed("llama.cpp")}
    about: dict[str, Any] = {"threads": torch.get_num_threads(), "texts": {}, "controls": {}, "eos": None}
    if tokenizer is not None and words is not None:
        about["texts"] = {text: tokenizer.encode(text) for text in sample_texts(tokenizer, TEXTS)}
        named = zip(words.vocabulary.tokens, words.vocabulary.types, strict=True)
        about["controls"] = {token: number for number, (token, kind) in enumerate(named) if kind == CONTROL}
        about["eos"] = words.special["eos"]
    with expected_file(load_model(model_path).model, about) as expected:
        found = ask("llama.cpp", file, expected, TOLERANCE[dtype])
    if wrong := found.pop("other_ids"):
        raise Mismatch(f"{file}: llama.cpp gives other ids for {len(wrong)} texts, as for {wrong[0]!r}")
    return {"proven": True, **found}

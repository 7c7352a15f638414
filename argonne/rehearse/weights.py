"""Small weights in the place of given ones, and what an export for chat must say."""

from __future__ import annotations

from pathlib import Path

from argonne.config import ModelSection
from argonne.errors import InputError


def small_weights(start: str, model: ModelSection, to: Path) -> None:
    """Write a model folder of fresh weights with these fields, and with the tokenizer and the turn ends of `start`."""
    from argonne.model.build import build_model, config_from_fields
    from argonne.model.load import resolve_model, stop_ids
    from argonne.model.save import copy_tokenizer, save_model_folder
    from argonne.stages.start import architecture_fields

    found = resolve_model(start)
    to.mkdir(parents=True)
    copy_tokenizer(found.tokenizer_folder, to)
    made = build_model(config_from_fields(architecture_fields(model)), seed=0)
    save_model_folder(made, to, **stop_ids(found.folder, found.config))


def chat_ends(export: Path) -> None:
    """Raise InputError where an answer that the export's template writes does not end as its generation does."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(export, local_files_only=True)
    stops = GenerationConfig.from_pretrained(export).eos_token_id
    ends = set(stops if isinstance(stops, list) else [stops])
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]
    begun = tokenizer.apply_chat_template(turns[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    if not ends & set(whole[len(begun) :]):
        raise InputError(
            f"chat_template.jinja: an answer ends with none of the tokens {sorted(ends)} at which generation stops, so "
            "that no answer would end; give chat.template one that the tokenizer knows"
        )

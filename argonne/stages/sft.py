"""Fine-tuning on conversations, plain or with chains of thought: packed rows, loss on the assistant's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from argonne.config import Recipe
from argonne.data.chat import ChatTemplate, Conversation, Message
from argonne.data.chat_data import open_conversations
from argonne.errors import InputError
from argonne.layout import CONVERSATIONS
from argonne.stages.chat_tokens import chat_tokenizer
from argonne.stages.hooks import Shown, sample_text, show_text
from argonne.stages.pretrain import objective
from argonne.stages.stage import Stage, StageData
from argonne.train.data import Data


def conversations(recipe: Recipe, state: dict[str, Any] | None, run_folder: Path, allow: frozenset[str]) -> StageData:
    """Conversations rendered with the model's tokenizer, once for all workers of a machine, and packed."""
    chat, data = recipe.chat, recipe.data
    if not data.sources:
        raise InputError("data.sources: empty; name a file, a folder or a glob of conversations, jsonl or parquet")
    cache = Path(chat.cache) if chat.cache else run_folder / CONVERSATIONS
    return open_conversations(
        data.sources,
        tokenizer=chat_tokenizer(recipe, run_folder),
        template=chat.template,
        loss_on=chat.loss_on,
        history_reasoning=chat.history_reasoning,
        too_long=chat.too_long,
        reasoning_required=recipe.stage == "cot-sft",
        sequence_length=data.sequence_length,
        hold_out=chat.hold_out,
        max_drop_fraction=chat.max_drop_fraction,
        cache=cache,
        batch=recipe.batch,
        seed=recipe.seed,
        state=state,
        allow=allow,
    )


def show_answers(recipe: Recipe, data: Data, micro_rows: int) -> Shown:
    """Held-out loss, and the answer to `checkpoint.sample_prompt`, asked as a user would."""
    template = data.chat
    assert isinstance(template, ChatTemplate)
    question = Conversation((Message("user", recipe.checkpoint.sample_prompt),))
    prompt = template.prompt(question).tolist()
    return Shown(
        held_out=show_text(recipe, data, micro_rows).held_out,
        sample=lambda model: sample_text(model, recipe, template.tokenizer, prompt, template.stop_ids),
    )


SFT = Stage(objective, conversations, shows=show_answers)

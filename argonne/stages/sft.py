"""Fine-tuning on conversations, plain or with chains of thought: packed rows, loss on the assistant's tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from argonne.config import Recipe
from argonne.data.chat import ChatTemplate
from argonne.data.chat_data import ConversationData, Opened, open_conversations
from argonne.errors import InputError
from argonne.evaluate.probes import QUESTIONS, Question, in_words, look_at, questions_of, summary
from argonne.layout import CONVERSATIONS
from argonne.parallel.objective import Objective
from argonne.serve.engine import completing
from argonne.serve.options import SamplingOptions
from argonne.stages.chat_tokens import chat_tokenizer
from argonne.stages.hooks import Shown, show_text
from argonne.stages.stage import Stage, StageData
from argonne.train.aside import Sampled, Work
from argonne.train.data import Data
from argonne.train.objectives import next_token, next_token_by_row


def objective(recipe: Recipe, data: StageData) -> Objective:
    """Next-token loss, row by row where sources are told apart."""
    return next_token_by_row if len(data.source_names) > 1 else next_token


def conversations(recipe: Recipe, state: dict[str, Any] | None, run_folder: Path, allow: frozenset[str]) -> StageData:
    return open_chat(recipe, ConversationData, state, run_folder, allow)


def open_chat(
    recipe: Recipe, kind: type[Opened], state: dict[str, Any] | None, run_folder: Path, allow: frozenset[str]
) -> Opened:
    """Conversations, or pairs of them, rendered with the model's tokenizer, once for all workers of a machine, and
    packed.
    """
    chat, data = recipe.chat, recipe.data
    if not data.sources:
        raise InputError("data.sources: empty; name a file, a folder or a glob of conversations, jsonl or parquet")
    return open_conversations(
        data.sources,
        kind,
        tokenizer=chat_tokenizer(recipe, run_folder),
        template=chat.template,
        loss_on=chat.loss_on,
        history_reasoning=chat.history_reasoning,
        too_long=chat.too_long,
        reasoning_required=recipe.stage == "cot-sft",
        sequence_length=data.sequence_length,
        hold_out=chat.hold_out,
        max_drop_fraction=chat.max_drop_fraction,
        cache=cache_of(recipe, run_folder),
        batch=recipe.batch,
        seed=recipe.seed,
        state=state,
        allow=allow,
    )


def cache_of(recipe: Recipe, run_folder: Path) -> Path:
    return Path(recipe.chat.cache) if recipe.chat.cache else run_folder / CONVERSATIONS


def show_answers(recipe: Recipe, data: Data, micro_rows: int) -> Shown:
    """Held-out loss, and greedy answers to the probes' questions: `checkpoint.sample_prompt`, the fixed ones, held-out
    ones.
    """
    assert isinstance(data, ConversationData)
    template, prompt, tokens = data.chat, recipe.checkpoint.sample_prompt, recipe.checkpoint.sample_tokens
    if not prompt:
        return Shown(show_text(recipe, data, micro_rows).held_out)
    context = recipe.model.max_position_embeddings or recipe.data.sequence_length
    room = context - tokens
    asked = questions_of(template, [prompt, *QUESTIONS])
    longest = max(asked, key=lambda question: len(question.prompt))
    if len(longest.prompt) > room:
        raise InputError(
            f"checkpoint.sample_tokens: {tokens} tokens of answer and {len(longest.prompt)} of {longest.text[:60]!r} "
            f"do not fit into the context of {context:,}; give answers fewer, or "
            'checkpoint.sample_prompt = "" for none'
        )
    asked += [Question(template.question(ids), tuple(ids)) for ids in data.held_out_prompts(recipe.chat.probes, room)]
    return Shown(show_text(recipe, data, micro_rows).held_out, lambda model: answers(model, template, asked, tokens))


def answers(model: nn.Module, template: ChatTemplate, asked: Sequence[Question], tokens: int) -> Work[Sampled]:
    """The answers to all questions in one batch, with their measures."""
    options = SamplingOptions(tokens, temperature=0.0, top_p=1.0)
    found = yield from completing(model, [question.prompt for question in asked], options, template.stop_ids)
    probes = [look_at(question.text, done, template) for question, done in zip(asked, found, strict=True)]
    values = summary(probes)
    listed = "\n\n".join(f"**{probe.question}**\n\n{probe.answer}" for probe in probes)
    return Sampled(
        "probes",
        {**values, "probes": [dataclasses.asdict(probe) for probe in probes]},
        f"{in_words(values)}\n\n{listed}",
        f"probes: {in_words(values)}\n  ? {probes[0].question}\n  {probes[0].answer}",
    )


SFT = Stage(objective, conversations, shows=show_answers)

"""What a staged folder does in the hands of its readers: asked in fresh processes, offline and without argonne."""

from __future__ import annotations

from typing import Any

from argonne import layout
from argonne.data.chat import ChatTemplate, Conversation, Message
from argonne.publish.checks import AGAIN, Found, Staged, context_of
from argonne.publish.gguf_tokenizer import sample_texts
from argonne.publish.proof import TOLERANCE, Mismatch, expected_file, prove, run_fresh
from argonne.tokens.tokenizer import TextTokenizer

TEXTS = 200
ASKED = (("What is a rainbow?",), ("Hello!", "Hello, how can I help?", "Tell me a story."))


def behaviour(staged: Staged) -> Found:
    """It loads, computes what the checkpoint does, with a cache and without, ends its answers, reads texts as training
    did, and the card's Python runs. The source's model is fp32 afterwards.
    """
    with expected_file(staged.source.model, expectations_of(staged)) as expected:
        try:
            prove(staged.folder, expected)
            found = run_fresh(staged.folder, expected, "fresh_publish.py")
            card = run_fresh(staged.folder, expected, "fresh_card.py", staged.repository, layout.MODEL_CARD)
        except Mismatch as error:
            yield str(error).removeprefix(f"{staged.folder}: "), AGAIN
            return
    for line in found["problems"]:
        yield line, AGAIN
    if not card["blocks"]:
        yield "the card has no Python that loads the model", "add a block that begins with ```python"
    elif card["error"]:
        yield f"the card's Python of line {card['line']} fails: {card['error']}", "mend it: readers run it as it stands"


def expectations_of(staged: Staged) -> dict[str, Any]:
    """What training made of texts and conversations, and the ids that end an answer."""
    words, ends = staged.tokenizer, sorted(staged.ends())
    texts = [] if words is None else plain_texts(words)
    pad = staged.source.model.config.pad_token_id
    return {
        "tolerance": TOLERANCE,
        "context": context_of(staged.json(layout.MODEL_CONFIG)),
        "eos": ends,
        "other": next(number for number in range(len(ends) + 2) if number not in (*ends, pad)),
        "texts": texts,
        "ids": [words.encode(text) for text in texts] if words is not None else [],
        "chat": None if staged.template is None else [asked(staged.template, turns) for turns in ASKED],
    }


def plain_texts(words: TextTokenizer) -> list[str]:
    """Texts without added tokens, which are text in training and tokens to other readers."""
    added = [token["content"] for token in words.head.get("added_tokens", [])]
    return [text for text in sample_texts(words, TEXTS) if not any(token in text for token in added)]


def asked(template: ChatTemplate, turns: tuple[str, ...]) -> tuple[list[dict[str, str]], list[int]]:
    """A conversation as readers give it, and the ids that training has in front of its answer."""
    messages = [Message("assistant" if number % 2 else "user", text) for number, text in enumerate(turns)]
    given = [{"role": message.role, "content": message.content} for message in messages]
    return given, template.prompt(Conversation(tuple(messages))).tolist()

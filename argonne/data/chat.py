"""Conversations to token ids and back: one template for training, evaluation and serving.

`chatml` is Qwen's: `<|im_start|>ROLE`, a newline, the content, `<|im_end|>`, a newline; tools, tool calls and tool
results in Qwen3's words; no system prompt of its own. `plain` is how Argonne 1.x was tuned: `USER: ...`, a blank line,
`ASSISTANT: ...`, and the tokenizer's end of text as the turn end.

A conversation is a list of pieces: turn tokens, and the texts between them, which are encoded one by one with control
tokens as plain text: a user who types `<|im_end|>` does not end the turn. Other added tokens (`<think>`, `<tool_call>`)
become the tokens that the library makes of them, whoever types them, as in every engine that serves an exported folder:
inside a user's turn they open and close nothing. Where the generation prompt ends there is a boundary: an answer is
encoded alone, because generation begins there. Encoding the rendered text at once, as `jinja` makes others do, gives
the same ids but where an earlier answer begins with white space that merges with the newline before it, and where a
content holds a control token, which they parse.

Traces of reasoning: with `history_reasoning = "drop"` an answer keeps its own only after the last user message, as in
Qwen3. An earlier answer then stands there without it; it is no target, nor are the answers to the same question after
it, for which serving would have shown the trace: `Rendered.context_only` counts them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from argonne.data import jinja
from argonne.errors import InputError
from argonne.layout import CHAT_TEMPLATE, TURN_TOKENS
from argonne.tokens.tokenizer import TextTokenizer

VERSION = 1
TEMPLATES = ("chatml", "plain")
LOSS_ON = ("assistant", "last", "all")
HISTORY = ("drop", "keep")
THINK, THINK_END = "<think>", "</think>"


@dataclass(frozen=True)
class ToolCall:
    """A call of a function; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One turn. role: system, user, assistant or tool. reasoning: the trace where it is a field of its own; inline
    traces stay in `content`.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def words(self) -> str:
        """The content without an inline trace."""
        return self.content.rpartition(THINK_END)[2].lstrip("\n") if self.has_trace else self.content

    @property
    def has_trace(self) -> bool:
        return self.reasoning is not None or THINK_END in self.content

    def answer(self, trace: bool = True) -> str:
        """All that the assistant says in this turn, tool calls included, with or without its trace."""
        text = self.content if trace else self.words
        if trace and self.reasoning is not None:
            text = "{}\n{}\n{}\n\n{}".format(THINK, self.reasoning.strip("\n"), THINK_END, self.content.lstrip("\n"))
        calls = (
            f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'
            for call in self.tool_calls
        )
        return text + ("\n" if self.words and self.tool_calls else "") + "\n".join(calls)


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the functions that may be called, each as the text of a JSON object. context: of how many of
    the first turns nothing is trained.
    """

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()
    context: int = field(default=0, repr=False)

    @property
    def characters(self) -> int:
        return sum(len(turn.content) for turn in self.messages)

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) or any(turn.role == "tool" or turn.tool_calls for turn in self.messages)


@dataclass(frozen=True)
class Rendered:
    """A conversation as training sees it. ids: (tokens,) uint32. trained: (tokens,) bool, the tokens that are targets.

    context_only: answers that are shown without their trace, or after one that is, and so are no targets.
    """

    ids: np.ndarray
    trained: np.ndarray
    context_only: int = 0


# A turn token or a text, and whether it is trained.
Piece = tuple[int | str, bool]


class ChatTemplate:
    """The template of a tokenizer. Raises InputError where the tokenizer lacks the turn tokens, or a text could make
    them.
    """

    def __init__(self, tokenizer: TextTokenizer, template: str = "chatml", history_reasoning: str = "drop") -> None:
        for name, value, known in (
            ("template", template, TEMPLATES),
            ("history_reasoning", history_reasoning, HISTORY),
        ):
            if value not in known:
                raise InputError(f"{name}: found {value!r}, expected {' or '.join(map(repr, known))}")
        self.tokenizer, self.template, self.history_reasoning = tokenizer, template, history_reasoning
        if template == "plain":
            if tokenizer.eos_id is None:
                raise InputError(
                    f"{tokenizer.folder}: has no end of text, with which the plain template ends a turn; name one as "
                    "eos_token in tokenizer_config.json"
                )
            self.turn_end_id = tokenizer.eos_id
        else:
            ids = [tokenizer.token_to_id(token) for token in TURN_TOKENS]
            for token, found in zip(TURN_TOKENS, ids, strict=True):
                if found is None:
                    raise InputError(
                        f"{tokenizer.folder}: {token} is no token of it, so that no turn could end; use "
                        'chat.template = "plain", or a model whose tokenizer has the turn tokens'
                    )
            self.turn_start_id, self.turn_end_id = (found for found in ids if found is not None)
        tokenizer.check_text({self.turn_end_id})

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Where generation ends: the turn end, and the end of text."""
        end = self.tokenizer.eos_id
        return (self.turn_end_id,) if end in (None, self.turn_end_id) else (self.turn_end_id, end)

    @property
    def jinja(self) -> str:
        """The chat_template.jinja of an exported folder."""
        if self.template == "plain":
            return jinja.plain(self.tokenizer.decode([self.turn_end_id]), self.history_reasoning == "drop")
        return jinja.chatml(self.history_reasoning == "drop")

    def prompt(self, conversation: Conversation) -> np.ndarray:
        """(tokens,) uint32: the conversation and the beginning of the answer that is to come, id for id what training
        shows before it.
        """
        if not conversation.messages or conversation.messages[-1].role == "assistant":
            raise InputError("a prompt ends with a user's or a tool's message, found the end of an answer; add one")
        shown = [False] * len(conversation.messages)
        return self._encoded([list(self._pieces(conversation, self._traces(conversation), shown, True))])[0][0]

    def render(self, conversation: Conversation, loss_on: str = "assistant") -> Rendered:
        """The ids of the conversation and which of them are trained: of the assistant's turns the answer, its tool
        calls and the turn end ("assistant"), of the last one only ("last"), or everything ("all").
        """
        return self.render_batch([conversation], loss_on)[0]

    def render_batch(self, conversations: Sequence[Conversation], loss_on: str = "assistant") -> list[Rendered]:
        """Many at once: texts are encoded together, on the threads that `tokenizers` is allowed."""
        if loss_on not in LOSS_ON:
            raise InputError(f"loss_on: found {loss_on!r}, expected {' or '.join(map(repr, LOSS_ON))}")
        listed, context = [], []
        for conversation in conversations:
            traces, trained = self._traces(conversation), self.targets(conversation, loss_on)
            answers = sum(turn.role == "assistant" for turn in conversation.messages[conversation.context :])
            context.append(answers - sum(trained) if loss_on == "assistant" else 0)
            pieces = self._pieces(conversation, traces, trained)
            listed.append([(what, loss_on == "all" or value) for what, value in pieces])
        return [Rendered(*found, left) for found, left in zip(self._encoded(listed), context, strict=True)]

    def targets(self, conversation: Conversation, loss_on: str = "assistant") -> list[bool]:
        """Of each message, whether it is an answer that is trained: serving would have come to it, and shown it, as it
        stands.
        """
        turns, traces = conversation.messages, self._traces(conversation)
        last = max((number for number, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
        found, hidden = [], False
        for number, (turn, trace) in enumerate(zip(turns, traces, strict=True)):
            answers = turn.role == "assistant"
            hidden = (hidden and turn.role != "user") or (answers and turn.has_trace and not trace)
            told = number >= conversation.context and (loss_on != "last" or number == last)
            found.append(answers and not hidden and told)
        return found

    def words(self, ids: Sequence[int] | np.ndarray) -> str:
        """What an answer's ids say, without the turn end and, in the plain template, the space that begins it."""
        text = self.tokenizer.decode([int(token) for token in ids if int(token) not in self.stop_ids])
        return text.removeprefix(" ") if self.template == "plain" else text

    def question(self, prompt: Sequence[int]) -> str:
        """What the last user of a prompt of ids said, for a person to read."""
        text = self.tokenizer.decode(list(prompt))
        if self.template == "plain":
            return text.rpartition("USER: ")[2].removesuffix("\n\nASSISTANT:")
        start, end = (self.tokenizer.decode([token]) for token in (self.turn_start_id, self.turn_end_id))
        return text.rpartition(f"{start}user\n")[2].partition(end)[0]

    def _traces(self, conversation: Conversation) -> list[bool]:
        """Of each message, whether its trace would be shown."""
        turns = conversation.messages
        last_user = max((number for number, turn in enumerate(turns) if turn.role == "user"), default=-1)
        return [self.history_reasoning == "keep" or number > last_user for number in range(len(turns))]

    def _pieces(
        self, conversation: Conversation, traces: Sequence[bool], trained: Sequence[bool], prompt: bool = False
    ) -> Iterator[Piece]:
        if self.template == "plain":
            yield from self._plain(conversation, traces, trained, prompt)
            return
        turns, number = conversation.messages, 0
        if conversation.tools:
            number = int(bool(turns) and turns[0].role == "system")
            yield from self._turn(jinja.tools_text(turns[0].content if number else None, conversation.tools))
        while number < len(turns):
            turn, value = turns[number], trained[number]
            if turn.role == "assistant":
                yield from ((self.turn_start_id, False), ("assistant\n", False))
                yield from ((turn.answer(traces[number]), value), (self.turn_end_id, value), ("\n", False))
            elif turn.role == "tool":
                results = list(itertools.takewhile(lambda each: each.role == "tool", turns[number:]))
                listed = (f"\n<tool_response>\n{each.content}\n</tool_response>" for each in results)
                yield from self._turn("user" + "".join(listed))
                number += len(results) - 1
            else:
                yield from self._turn(f"{turn.role}\n{turn.content}")
            number += 1
        if prompt:
            yield from ((self.turn_start_id, False), ("assistant\n", False))

    def _turn(self, text: str) -> Iterator[Piece]:
        yield from ((self.turn_start_id, False), (text, False), (self.turn_end_id, False), ("\n", False))

    def _plain(
        self, conversation: Conversation, traces: Sequence[bool], trained: Sequence[bool], prompt: bool
    ) -> Iterator[Piece]:
        if conversation.uses_tools:
            raise InputError('template "plain" has no words for tools; use chat.template = "chatml"')
        before = ""
        for turn, trace, value in zip(conversation.messages, traces, trained, strict=True):
            if turn.role == "assistant":
                yield from ((f"{before}ASSISTANT:", False), (f" {turn.answer(trace)}", value))
                yield self.turn_end_id, value
                before = "\n\n"
            else:
                before += f"{turn.role.upper()}: {turn.content}\n\n"
        if prompt:
            yield f"{before}ASSISTANT:", False

    def _encoded(self, listed: Sequence[Sequence[Piece]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, trained) of each list of pieces. Texts that stand in every conversation are encoded once."""
        texts = [what for pieces in listed for what, _ in pieces if isinstance(what, str) and what not in self._fixed]
        encoded = iter(self.tokenizer.encode_batch(texts))
        found = []
        for pieces in listed:
            parts: list[np.ndarray] = []
            for what, _ in pieces:
                if isinstance(what, str):
                    parts.append(self._fixed[what] if what in self._fixed else next(encoded))
                else:
                    parts.append(np.array([what], np.uint32))
            sizes = [len(part) for part in parts]
            trained = np.repeat(np.array([value for _, value in pieces], bool), sizes)
            found.append((np.concatenate([np.zeros(0, np.uint32), *parts]), trained))
        return found

    @cached_property
    def _fixed(self) -> dict[str, np.ndarray]:
        texts = ("\n", "assistant\n", "\n\nASSISTANT:")
        return dict(zip(texts, self.tokenizer.encode_batch(texts), strict=True))


def template_of(tokenizer: TextTokenizer) -> ChatTemplate:
    """How the model of this tokenizer is asked: by the template that lies beside it, where it is one of ours; else as
    tuning would, by ChatML where the tokenizer has the turn tokens, by the plain template where it has not.
    """
    file = tokenizer.folder / CHAT_TEMPLATE
    written = file.read_text(encoding="utf-8") if file.is_file() else None
    known, problems = [], []
    for name, history in itertools.product(TEMPLATES, HISTORY):
        try:
            known.append(ChatTemplate(tokenizer, name, history))
        except InputError as problem:
            problems.append(problem)
    if not known:
        raise problems[0]
    return next((template for template in known if template.jinja == written), known[0])

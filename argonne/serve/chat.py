"""A conversation with a model, turn by turn: what `argonne chat` shows in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator

from argonne import layout
from argonne.data.chat import ChatTemplate, Conversation, Message, template_of
from argonne.errors import InputError
from argonne.serve.engine import Engine, stream_ids
from argonne.serve.options import SamplingOptions
from argonne.tokens.tokenizer import TextTokenizer

HELP = "/new begins another conversation, /quit ends; Ctrl-C stops an answer"


def chat_template_of(tokenizer: TextTokenizer) -> tuple[ChatTemplate | None, str]:
    """How the model is asked in turns, or why it cannot be: a base model has no template beside its tokenizer."""
    file = tokenizer.folder / layout.CHAT_TEMPLATE
    if not file.is_file():
        return None, f"is a base model: no {layout.CHAT_TEMPLATE} lies beside its tokenizer"
    try:
        template = template_of(tokenizer)
    except InputError as error:
        return None, f"cannot be asked in turns: {error}"
    if template.jinja != file.read_text(encoding="utf-8"):
        return None, f"has a {layout.CHAT_TEMPLATE} that is none of argonne's"
    return template, ""


class Chat:
    """Keeps the conversation and answers under it. `dropped`: turns that no longer fit into the model's context. Raises
    InputError for a model that cannot be asked in turns.
    """

    def __init__(self, engine: Engine, options: SamplingOptions, system: str | None = None) -> None:
        template, problem = chat_template_of(engine.tokenizer)
        if template is None:
            raise InputError(
                f"{engine.folder}: {problem}; tune it on conversations first (argonne sft), or use generate"
            )
        self.engine, self.options, self.template = engine, options, template
        self.system = (Message("system", system),) if system else ()
        self.turns: list[Message] = []
        self.dropped = 0

    def prompt(self) -> list[int]:
        """The conversation in ids, its oldest question and answer left out until the answer has half the context, or
        as much as it may take.
        """
        context = int(self.engine.model.config.max_position_embeddings)
        while True:
            ids = self.template.prompt(Conversation((*self.system, *self.turns)))
            room = min(self.options.max_new_tokens, context // 2)
            if len(ids) + room <= context or len(self.turns) < 3:
                return [int(token) for token in ids]
            self.turns, self.dropped = self.turns[2:], self.dropped + 2

    def answer(self, said: str) -> Generator[str, None, None]:
        """Pieces of the answer to what was said, as soon as they are certain. Left early, what was shown counts as the
        answer.
        """
        before = self.turns, self.dropped
        self.turns = [*self.turns, Message("user", said)]
        ids, stops, pieces = self.prompt(), self.template.stop_ids, []
        try:
            for piece in stream_ids(self.engine.model, self.engine.tokenizer, ids, self.options, stops):
                pieces.append(piece)
                yield piece
        except InputError:
            self.turns, self.dropped = before  # too long a question: the conversation stands as it did
            raise
        finally:
            if self.turns and self.turns[-1].role == "user":
                self.turns.append(Message("assistant", "".join(pieces)))


def talk(chat: Chat, read: Callable[[str], str], write: Callable[[str], None]) -> None:
    """Questions and answers until `/quit` or the end of input. `read` shows its prompt and gives a line, or raises
    EOFError.
    """
    write(f"{HELP}\n")
    while True:
        try:
            said = read("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if said == "/quit":
            return
        if said == "/new":
            chat.turns.clear()
            write("a new conversation\n")
        elif said.startswith("/"):
            write(f"{said.split()[0]} is not known: {HELP}\n")
        elif said:
            before = chat.dropped
            try:
                for piece in chat.answer(said):
                    write(piece)
            except KeyboardInterrupt:
                write(" [stopped]")
            except InputError as error:
                write(str(error))
            write("\n")
            if chat.dropped > before:
                write(f"[{chat.dropped - before} earlier turns no longer fit into the context and were left out]\n")

"""A conversation with a model, turn by turn: what `argonne chat` shows in a terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from argonne import layout
from argonne.data.chat import ChatTemplate, Conversation, Message, template_of
from argonne.errors import InputError
from argonne.serve.engine import Engine, stream_ids
from argonne.serve.options import SamplingOptions
from argonne.serve.parts import THINK, THINK_END, Part, Parts
from argonne.tokens.tokenizer import TextTokenizer

HELP = """\
/retry           another answer to the last question, by the next seed
/back            take the last question and its answer back
/system TEXT     what the model is told before the conversation; without TEXT nothing
/set NAME VALUE  a setting of the answers; /set alone shows them
/think           fold the thoughts away, or show them again
/save FILE       write the conversation as argonne sft reads it
/new, /quit      begin another conversation; end, as Ctrl-D does
Ctrl-C           stop an answer; end where none is being given"""
# What stands before and behind thoughts: in a text, on a terminal (dim), and instead of them.
TAGS, DIM, FOLDED = (f"{THINK}\n", f"\n{THINK_END}\n\n"), ("\033[2m", "\033[0m\n\n"), ("[thinking] ", "")


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
    """Keeps the conversation and answers under it. `dropped`: so many of the first turns no longer fit into the model's
    context. Raises InputError for a model that cannot be asked in turns.
    """

    def __init__(self, engine: Engine, options: SamplingOptions, system: str | None = None) -> None:
        template, problem = chat_template_of(engine.tokenizer)
        if template is None:
            raise InputError(f"{engine.folder}: {problem}; tune it on conversations (argonne sft), or use generate")
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
            ids = self.template.prompt(Conversation((*self.system, *self.turns[self.dropped :])))
            room = min(self.options.max_new_tokens, context // 2)
            if len(ids) + room <= context or len(self.turns) - self.dropped < 3:
                return [int(token) for token in ids]
            self.dropped += 2

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


@dataclass
class Terminal:
    """What is shown of a chat, and what is typed there. thoughts: what is written before and behind them."""

    chat: Chat
    write: Callable[[str], None]
    thoughts: tuple[str, str]
    folded: bool = False
    thinking: bool = False

    def answer(self, said: str) -> None:
        """Until the end, or Ctrl-C."""
        before, parts, end = self.chat.dropped, Parts(), ""
        try:
            for piece in self.chat.answer(said):
                self._tell(parts.push(piece))
            self._tell(parts.finish())
        except (KeyboardInterrupt, InputError) as error:
            end = str(error) or " [stopped]"
        self._tell([Part("text", f"{end}\n")])
        if (left := self.chat.dropped - before) > 0:
            self.write(f"[{left} earlier turns no longer fit into the context and were left out]\n")

    def _tell(self, parts: Iterable[Part]) -> None:
        for part in parts:
            if (thinks := part.kind == "reasoning" and bool(part.text)) != self.thinking:
                self.write((FOLDED if self.folded else self.thoughts)[self.thinking])
                self.thinking = thinks
            if not (thinks and self.folded):
                self.write(part.text or (part.name and f"{part.name}({part.arguments})"))

    def command(self, word: str, rest: str) -> str:
        """Do what a line that begins with / says; what to tell of it."""
        chat = self.chat
        if word == "/new":
            chat.turns, chat.dropped = [], 0
            return "a new conversation"
        if word == "/system":
            chat.system = (Message("system", rest),) if rest else ()
            return f"what the model is told before the conversation: {rest or 'nothing'}"
        if word == "/think":
            self.folded = not self.folded
            return "thoughts are folded away" if self.folded else "thoughts are shown"
        if word == "/set":
            return self._set(*rest.split())
        if word == "/save":
            turns = [{"role": turn.role, "content": turn.content} for turn in (*chat.system, *chat.turns)]
            try:
                with Path(rest).expanduser().open("x", encoding="utf-8") as out:
                    out.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
            except OSError as error:
                return f"/save {rest}: cannot be written ({error.strerror}); name a file that is not there yet"
            return f"{len(turns)} turns are in {rest}"
        if word not in ("/retry", "/back"):
            return HELP if word == "/help" else f"{word} is not known:\n{HELP}"
        if not chat.turns:
            return f"{word}: nothing was asked yet"
        before = *chat.turns, question, _ = chat.turns
        chat.dropped = min(chat.dropped, len(chat.turns))
        if word == "/back":
            return f"taken back: {question.content}"
        chat.options = chat.options.with_seed(1)
        self.answer(question.content)
        if len(chat.turns) < len(before):  # it could not be answered
            chat.turns = before
        return ""

    def _set(self, name: str = "", value: str = "", *more: str) -> str:
        name, held = name.replace("-", "_"), asdict(self.chat.options)
        if more or (name and (name not in held or not value)):
            return f"/set: expected a name and a value, the name one of {', '.join(held)}"
        try:
            self.chat.options = replace(self.chat.options, **{name: type(held[name])(value)} if name else {})
        except (InputError, ValueError) as error:
            return str(error) if isinstance(error, InputError) else f"{name}: found {value!r}, expected a number"
        return ", ".join(f"{one} {number}" for one, number in asdict(self.chat.options).items())

    def talk(self, read: Callable[[str], str]) -> None:
        """Until `/quit` or the end of input. `read` shows its prompt and gives a line, or raises EOFError."""
        self.write("/help lists what can be typed beside questions\n")
        while True:
            self.write("\n")
            try:
                said = read("> ").strip()
            except (EOFError, KeyboardInterrupt):
                said = "/quit"
                self.write("\n")
            word, _, rest = said.partition(" ")
            if word == "/quit":
                return
            if said and not said.startswith("/"):
                self.answer(said)
            elif said and (told := self.command(word, rest.strip())):
                self.write(f"{told}\n")


def remember_lines(write: Callable[[str], None]) -> None:
    """The arrow keys bring back what was typed, in earlier conversations too where their file can be had."""
    import atexit
    import readline

    file = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "argonne" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        readline.read_history_file(file)
        readline.set_history_length(1000)
        atexit.register(readline.write_history_file, file)
    except OSError as error:
        write(f"[what you type is not kept for the next time: {file}: {error.strerror}]\n")

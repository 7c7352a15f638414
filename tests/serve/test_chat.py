"""A conversation in the terminal: what the model is shown, what is kept, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from argonne.cli import main
from argonne.data.chat import Message, template_of
from argonne.layout import CHAT_TEMPLATE
from argonne.model.save import save_model_folder
from argonne.serve.chat import Chat, talk
from argonne.serve.engine import Engine
from argonne.serve.options import SamplingOptions
from argonne.tokens.tokenizer import load_tokenizer, train_tokenizer
from tests.serve.test_engine import make_model

OPTIONS = SamplingOptions(max_new_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = train_tokenizer(["Hello there, how are you? "] * 30, 300, tmp_path_factory.mktemp("tokenizer") / "bpe")
    tokenizer = load_tokenizer(folder)
    (folder / CHAT_TEMPLATE).write_text(template_of(tokenizer).jinja)
    return Engine(make_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=128), tokenizer, folder)


def conversation(chat: Chat, *lines: str) -> str:
    """What is written while these lines are typed, then the end of input."""
    typed, written = iter(lines), []

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    talk(chat, read, written.append)
    return "".join(written)


def test_each_question_is_asked_after_the_conversation_so_far(engine: Engine) -> None:
    chat = Chat(engine, OPTIONS, system="Be brief.")
    conversation(chat, "Hello", "And then?")
    assert [(turn.role, turn.content) for turn in chat.turns[::2]] == [("user", "Hello"), ("user", "And then?")]
    chat.turns.append(Message("user", "more"))
    shown = engine.tokenizer.decode(chat.prompt())
    places = [shown.index(text) for text in ("Be brief.", "Hello", "And then?", "more")]
    assert places == sorted(places)


def test_what_is_written_is_what_is_kept(engine: Engine) -> None:
    chat = Chat(engine, OPTIONS)
    written = conversation(chat, "Hello")
    assert chat.turns[1].role == "assistant"
    assert chat.turns[1].content in written


def test_the_oldest_turns_go_when_the_context_is_full_and_that_is_told(engine: Engine) -> None:
    chat = Chat(engine, OPTIONS)
    written = conversation(chat, *["Hello there, how are you today and tomorrow?"] * 8)
    assert chat.dropped > 0
    assert "no longer fit into the context" in written
    chat.turns.append(Message("user", "more"))
    assert len(chat.prompt()) + OPTIONS.max_new_tokens <= 128


def test_a_question_beyond_the_context_is_told_and_the_conversation_stands(engine: Engine) -> None:
    chat = Chat(engine, OPTIONS)
    written = conversation(chat, "Hello", "x " * 400)
    assert "expected fewer than the model's context of 128" in written
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]


def test_commands_are_no_questions(engine: Engine) -> None:
    chat = Chat(engine, OPTIONS)
    written = conversation(chat, "Hello", "/new", "/other", "", "/quit", "never read")
    assert chat.turns == []
    assert "a new conversation" in written
    assert "/other is not known" in written


def test_an_answer_that_is_stopped_stays_in_the_conversation(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(engine, OPTIONS)
    answer = Chat.answer

    def interrupted(self: Chat, said: str) -> Iterator[str]:
        pieces = answer(self, said)
        yield next(pieces)
        pieces.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "answer", interrupted)
    assert "[stopped]" in conversation(chat, "Hello")
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]


def test_the_command_talks_to_a_model_on_disk_and_refuses_what_cannot_be_asked_in_turns(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("chat", "base"):
        engine.tokenizer.save(tmp_path / name)
        ids = {"eos_id": engine.tokenizer.eos_id, "bos_id": None, "pad_id": engine.tokenizer.pad_id}
        save_model_folder(engine.model, tmp_path / name, **ids)
    (tmp_path / "base" / CHAT_TEMPLATE).unlink()
    lines = iter(["Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    asked = ["--system", "Be brief.", "--max-new-tokens", "4", "--temperature", "0"]
    assert main(["chat", str(tmp_path / "chat"), *asked]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert main(["chat", str(tmp_path / "base")]) == 2
    assert "is a base model: no chat_template.jinja" in capsys.readouterr().err

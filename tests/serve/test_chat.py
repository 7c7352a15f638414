"""A conversation in the terminal: what the model is shown, what is kept, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from argonne.cli import main
from argonne.data.chat import Message, template_of
from argonne.data.conversations import message_of
from argonne.layout import CHAT_TEMPLATE
from argonne.model.save import save_model_folder
from argonne.serve.chat import DIM, TAGS, Chat, Terminal
from argonne.serve.engine import Engine
from argonne.serve.options import SamplingOptions
from argonne.tokens.tokenizer import load_tokenizer, train_tokenizer
from tests.serve.serving import scripted
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

    Terminal(chat, written.append, TAGS).talk(read)
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
    assert "/other is not known:\n/retry " in written
    assert conversation(chat, "/help").count("/save FILE") == 1


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


def test_retry_answers_the_last_question_anew_by_the_next_seed(engine: Engine) -> None:
    chat = Chat(engine, SamplingOptions(max_new_tokens=8, temperature=1.0, seed=3))
    conversation(chat, "Hello", "And then?", "/retry", "/retry")
    alone = Chat(engine, SamplingOptions(max_new_tokens=8, temperature=1.0, seed=5))
    alone.turns = chat.turns[:2]
    list(alone.answer("And then?"))
    assert chat.turns == alone.turns
    assert chat.options.seed == 5


def test_a_retry_that_finds_no_room_leaves_the_conversation_as_it_was(engine: Engine) -> None:
    chat = Chat(engine, OPTIONS)
    written = conversation(chat, "Hello", "/system " + "x " * 400, "/retry")
    assert "expected fewer than the model's context of 128" in written
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]


def test_back_takes_question_and_answer_away_also_those_that_no_longer_fitted(engine: Engine) -> None:
    chat = Chat(engine, OPTIONS)
    said = ["Hello there, how are you today and tomorrow?"] * 6
    assert "taken back: Hello there" in conversation(chat, *said, "/back")
    assert len(chat.turns) == 10  # those that were left out are kept
    assert chat.dropped > 0
    written = conversation(chat, *["/back"] * 6, "Hello")
    assert "/back: nothing was asked yet" in written
    assert chat.dropped == 0
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]


def test_system_is_told_from_then_on(engine: Engine) -> None:
    chat = Chat(engine, OPTIONS)
    conversation(chat, "/system Be brief.", "Hello")
    chat.turns.append(Message("user", "more"))
    assert "Be brief." in engine.tokenizer.decode(chat.prompt())
    assert "conversation: nothing" in conversation(chat, "/system")
    assert "Be brief." not in engine.tokenizer.decode(chat.prompt())


def test_settings_are_shown_changed_and_refused_by_the_words_of_the_flags(engine: Engine) -> None:
    chat = Chat(engine, OPTIONS)
    assert "temperature 0.5, top_k 7" in conversation(chat, "/set temperature 0.5", "/set top-k 7", "/set")
    for typed, told in {
        "/set temperature -1": "temperature: found -1.0, expected 0 (greedy) or more",
        "/set top_k half": "top_k: found 'half', expected a number",
        "/set heat 1": "/set: expected a name and a value, the name one of max_new_tokens, temperature",
        "/set seed": "/set: expected a name and a value",
    }.items():
        assert told in conversation(chat, typed)
    assert (chat.options.temperature, chat.options.top_k) == (0.5, 7)


def test_what_is_saved_is_a_line_that_sft_reads_and_no_file_is_written_over(engine: Engine, tmp_path: Path) -> None:
    chat = Chat(engine, OPTIONS, "Be brief.")
    file = tmp_path / "talk.jsonl"
    assert f"3 turns are in {file}" in conversation(chat, "Hello", f"/save {file}")
    saved = file.read_text()
    turns = tuple(message_of(turn) for turn in json.loads(saved)["messages"])
    assert turns == (*chat.system, *chat.turns)
    assert "(File exists); name a file that is not there yet" in conversation(chat, f"/save {file}")
    assert file.read_text() == saved


def test_thoughts_are_set_apart_or_folded_away(engine: Engine) -> None:
    thinks = scripted(engine, "<think>\none and one\n</think>\n\nTwo.")
    for thoughts, folded, expected in (
        (TAGS, False, "<think>\none and one\n</think>\n\nTwo.\n"),
        (DIM, False, "\033[2mone and one\033[0m\n\nTwo.\n"),
        (DIM, True, "[thinking] Two.\n"),
    ):
        chat, written = Chat(thinks, SamplingOptions(60, 0.0)), []
        terminal = Terminal(chat, written.append, thoughts, folded)
        terminal.answer("1 + 1")
        assert "".join(written) == expected
        assert chat.turns[1].content == "<think>\none and one\n</think>\n\nTwo."


@pytest.fixture(scope="module")
def models(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`chat` and `base`, on disk; their context is long enough to stop an answer in it."""
    folder, model = (
        tmp_path_factory.mktemp("models"),
        make_model(vocab_size=engine.tokenizer.vocab_size, max_position_embeddings=8192),
    )
    for name in ("chat", "base"):
        engine.tokenizer.save(folder / name)
        ids = {"eos_id": engine.tokenizer.eos_id, "bos_id": None, "pad_id": engine.tokenizer.pad_id}
        save_model_folder(model, folder / name, **ids)
    (folder / "base" / CHAT_TEMPLATE).unlink()
    return folder


def test_the_command_talks_to_a_model_on_disk_and_refuses_what_cannot_be_asked_in_turns(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    asked = ["--system", "Be brief.", "--max-new-tokens", "4", "--temperature", "0"]
    assert main(["chat", str(models / "chat"), *asked]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert main(["chat", str(models / "base")]) == 2
    assert "is a base model: no chat_template.jinja" in capsys.readouterr().err


class Typed:
    """`argonne chat` in a terminal of its own."""

    def __init__(self, model: Path, home: Path, *flags: str) -> None:
        self.end, inner = pty.openpty()
        environment: Mapping[str, str] = {
            **os.environ,
            "XDG_STATE_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "TERM": "dumb",
        }
        command = [sys.executable, "-m", "argonne", "chat", str(model), "--device", "cpu", *flags]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), inner)
        self.process = subprocess.Popen(command, **streams, env=environment, start_new_session=True, preexec_fn=_own)
        os.close(inner)
        self.shown = ""

    def until(self, pattern: str) -> str:
        """What is shown up to this; a test in which it never comes times out."""
        while not (found := re.search(pattern, self.shown)):
            self.shown += os.read(self.end, 4096).decode(errors="replace")
        told, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return told

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())


def _own() -> None:
    """The terminal becomes the one whose Ctrl-C reaches the command."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_in_a_terminal_answers_stream_ctrl_c_stops_them_and_lines_come_back(models: Path, tmp_path: Path) -> None:
    home = tmp_path / "state"
    here = Typed(models / "chat", home, "--temperature", "0", "--max-new-tokens", "60")
    here.until("/help lists .*\n")
    here.until("> ")
    here.type("Hello\n")
    here.until("> ")
    here.type("/set max_new_tokens 7000\n")
    here.until("max_new_tokens 7000, .*\n")
    here.until("> ")
    here.type("\033[A\033[A\n")  # two lines up: the question
    here.until("Hello\r\n.")  # and the answer begins
    here.type("\x03")
    assert "[stopped]" in here.until("\n> ")
    here.type("\x04")
    assert here.process.wait() == 0
    assert (home / "argonne" / "chat_history").read_text().splitlines() == [
        "Hello",
        "/set max_new_tokens 7000",
        "Hello",
    ]
    assert (home / "argonne" / "chat_history").stat().st_mode & 0o077 == 0
    again = Typed(models / "chat", home)
    again.until("> ")
    again.type("\033[A\033[A")
    again.until("/set max_new_tokens 7000")
    # Not Ctrl-C: a signal that comes while readline still draws is told only with the next key.
    again.type("\x15\x04")
    assert again.process.wait() == 0


def test_a_history_that_cannot_be_kept_is_told_once_and_the_chat_goes_on(models: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file, no folder")
    here = Typed(models / "chat", tmp_path / "state", "--max-new-tokens", "4")
    shown = here.until("> ")
    assert shown.count("what you type is not kept for the next time") == 1
    here.type("Hello\n")
    here.until("> ")
    here.type("/quit\n")
    assert here.process.wait() == 0

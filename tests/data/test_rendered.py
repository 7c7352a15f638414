"""The cache of rendered conversations: every row accounted for, nothing rendered twice, long rows by the policy."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argonne.data import rendered
from argonne.data.chat import ChatTemplate, Conversation, Message
from argonne.data.rendered import TRAINED, RenderedSet, RenderOptions, is_held_out, render_files
from argonne.errors import InputError
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from tests.tokensets import words

LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return load_tokenizer(tokenizer_folder)


def row(question: str, *more: str) -> dict[str, Any]:
    turns = [question, *more]
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]}


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows))
    return path


def render(path: Path | str, tokenizer: TextTokenizer, cache: Path | None = None, **more: Any) -> RenderedSet:
    limit = more.pop("max_drop_fraction", 1.0)
    template = ChatTemplate(tokenizer, more.pop("template", "chatml"), more.pop("history_reasoning", "drop"))
    options = RenderOptions(**{"sequence_length": LENGTH, **more})
    where = cache or Path(path).parent / "cache"
    return render_files(str(path), template, options, where, max_drop_fraction=limit, stream=None)


def texts(opened: RenderedSet, tokenizer: TextTokenizer, side: str = "train") -> list[tuple[str, str]]:
    """(all, what is trained) of each conversation."""
    stream, found, begin = getattr(opened, side), [], 0
    for end in opened.ends[side].tolist():
        marked = np.empty(end - begin, np.uint32)
        stream.copy(begin, marked)
        trained = marked[(marked & TRAINED) > 0] & ~TRAINED
        found.append((tokenizer.decode(marked & ~TRAINED), tokenizer.decode(trained)))
        begin = end
    return found


def test_what_is_kept_is_what_the_template_renders(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row("Well?", "Yes."), row("Zürich?", "你好", "And?", "No.")])
    assert texts(render(path, tokenizer), tokenizer) == [
        ("<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n", "Yes.<|im_end|>"),
        (
            "<|im_start|>user\nZürich?<|im_end|>\n<|im_start|>assistant\n你好<|im_end|>\n"
            "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n",
            "你好<|im_end|>No.<|im_end|>",
        ),
    ]


def test_every_row_is_used_or_named_with_its_line(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    bad = ["{broken", {"text": "x"}, row("only asked"), row("x", " "), row("x", words(100)), {"messages": "x"}, "7"]
    lines: list[Any] = []
    for each in bad:
        lines += [row("Well?", "Yes."), each, ""]
    account = render(write(tmp_path / "a.jsonl", lines), tokenizer).account
    assert account.rows == account.used + sum(account.drops.values()) == 14
    assert account.examples == {
        "invalid-json": ["a.jsonl:2", "a.jsonl:20"],
        "unknown-shape": ["a.jsonl:5", "a.jsonl:17"],
        "no-answer": ["a.jsonl:8"],
        "empty-answer": ["a.jsonl:11"],
        "too-long": ["a.jsonl:14"],
    }
    assert "too-long 1 (a.jsonl:14; raise data.sequence_length" in account.dropped()


def test_lines_are_those_of_the_whole_file_in_every_unit(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argonne.prepare.documents.unit_bytes", lambda files: 97)
    lines = [row("Well?", words(n % 7 + 1, n)) if n % 5 else f"{{broken {n}" for n in range(1, 60)]
    monkeypatch.setattr(rendered, "EXAMPLES", 99)
    opened = render(write(tmp_path / "a.jsonl", lines), tokenizer)
    assert len(list(opened.folder.glob("unit-*"))) > 20
    assert opened.account.examples == {"invalid-json": [f"a.jsonl:{n}" for n in range(5, 60, 5)]}
    assert len(opened.ends["train"]) == 48


def test_all_kinds_of_files_give_the_same(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [row("Well?", words(3, n)) for n in range(40)] + [{"messages": [{"role": "user", "content": "x"}]}]
    table = pa.Table.from_pylist(rows)
    expected = None
    for number, name in enumerate(("a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow", "b.arrow")):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / name
        if name.endswith(".parquet"):
            parquet.write_table(table, path, row_group_size=7)
        elif name.endswith(".arrow"):
            make = pa.ipc.new_file if name[0] == "a" else pa.ipc.new_stream
            with make(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=9)
        else:
            text = "".join(json.dumps(each) + "\n" for each in rows).encode()
            path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        opened = render(path.parent, tokenizer, tmp_path / f"cache-{number}")
        expected = expected or texts(opened, tokenizer)
        assert (texts(opened, tokenizer), opened.account.examples) == (expected, {"no-answer": [f"{name}:41"]})


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz"])
def test_a_file_that_cannot_be_read_is_named(tokenizer: TextTokenizer, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such thing" * 9)
    with pytest.raises(InputError, match=f"{name}: .*(readable|cannot be read)"):
        render(tmp_path / name, tokenizer)


def test_plain_text_is_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="plain text has no fields"):
        render(write(tmp_path / "a.txt", ["x"]), tokenizer)


def test_rows_of_which_none_is_usable_are_an_error(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["{broken", row("only asked")])
    with pytest.raises(InputError, match=r"none of 2 rows can be trained on: invalid-json 1 \(a.jsonl:1"):
        render(path, tokenizer)


def test_more_drops_than_allowed_are_an_error_also_out_of_the_cache(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["{broken", row("x", "y"), row("x", "z"), row("x", "w")])
    render(path, tokenizer, max_drop_fraction=0.25)
    with pytest.raises(
        InputError, match=r"1 of 4 rows were dropped, more than chat\.max_drop_fraction 0.2: invalid-json"
    ):
        render(path, tokenizer, max_drop_fraction=0.2)


TURNS = ("Well?", "Yes.", words(20), words(20), "And?", "No.")


@pytest.mark.parametrize(
    ("policy", "trained"),
    [("drop", None), ("drop_oldest_turns", ["No.<|im_end|>"]), ("truncate", ["Yes.<|im_end|>"])],
)
def test_long_rows_are_treated_as_the_policy_says(
    tokenizer: TextTokenizer, tmp_path: Path, policy: str, trained: list[str] | None
) -> None:
    path = write(tmp_path / "a.jsonl", [row(*TURNS), row("x", "y")])
    opened = render(path, tokenizer, too_long=policy)
    assert [part for _, part in texts(opened, tokenizer)] == [*(trained or []), "y<|im_end|>"]
    assert (opened.account.drops["too-long"], sum(opened.account.notes.values())) == ((1, 0) if not trained else (0, 1))


def test_the_oldest_turns_go_and_the_system_prompt_stays(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    long = row(*TURNS)
    long["messages"].insert(0, {"role": "system", "content": "Be brief."})
    opened = render(write(tmp_path / "a.jsonl", [long]), tokenizer, too_long="drop_oldest_turns")
    text, _ = texts(opened, tokenizer)[0]
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAnd?")


@pytest.mark.parametrize("begin", range(1, 41, 3))
def test_truncation_never_ends_inside_a_trace(tokenizer: TextTokenizer, tmp_path: Path, begin: int) -> None:
    """Wherever the cut lies, the last answer has its trace whole and a word behind it, or is not there."""
    answer = f"<think>\nso\n</think>\n\n{words(60)}"
    opened = render(
        write(tmp_path / "a.jsonl", [row("Well?", "Yes.", "a" * begin, answer), row("x", "y")]),
        tokenizer,
        too_long="truncate",
        sequence_length=LENGTH,
        history_reasoning="keep",
    )
    trained = texts(opened, tokenizer)[0][1].removeprefix("Yes.<|im_end|>")
    assert not trained or (answer.startswith(trained) and trained.partition("</think>")[2].strip())


def test_truncation_cuts_an_answer_without_a_trace_at_the_end_of_the_row(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    opened = render(write(tmp_path / "a.jsonl", [row("Well?", words(60))]), tokenizer, too_long="truncate")
    assert opened.ends["train"].tolist() == [LENGTH]


def test_with_reasoning_required_long_rows_and_broken_traces_are_dropped(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    answers = ["<think>\nhm\n</think>\n\nYes.", "Yes.", "<think>\nhm", f"<think>\n{words(60)}\n</think>\n\nYes."]
    path = write(tmp_path / "a.jsonl", [row("Well?", answer) for answer in answers])
    opened = render(path, tokenizer, reasoning_required=True, too_long="truncate")
    assert dict(opened.account.drops) == {"no-think": 1, "unclosed-think": 1, "too-long": 1}
    assert len(opened.ends["train"]) == 1


def test_answers_that_serving_would_have_come_to_otherwise_are_counted(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    thought = "<think>\nhm\n</think>\n\nYes."
    account = render(write(tmp_path / "a.jsonl", [row("x", thought, "y", thought)]), tokenizer).account
    assert dict(account.notes) == {"answers not trained, because their trace is not shown to later turns": 1}


def test_tools_under_the_plain_template_are_a_drop(tmp_path: Path) -> None:
    bare = load_tokenizer(train_tokenizer([words(300)], 300, tmp_path / "bare", bare=True))
    rows = [row("x", "y"), {**row("x", "y"), "tools": [{"name": "f"}]}]
    opened = render(write(tmp_path / "a.jsonl", rows), bare, template="plain")
    assert dict(opened.account.drops) == {"tools-in-plain-template": 1}


def test_equal_conversations_are_held_out_together_in_every_file(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    rows = [row(f"What is {n}?", "That.") for n in range(200)]
    opened = [
        render(write(tmp_path / f"{name}.jsonl", listed), tokenizer, tmp_path / name, hold_out=0.2)
        for name, listed in (("a", rows), ("b", rows[::-1]))
    ]
    held = [set(texts(one, tokenizer, "held_out")) for one in opened]
    assert held[0] == held[1]
    assert 20 < len(held[0]) < 60
    assert opened[0].account.held_out == len(held[0])
    assert not held[0] & set(texts(opened[0], tokenizer))


def test_nothing_is_held_out_where_nothing_is_asked_for() -> None:
    assert not is_held_out(Conversation((Message("user", "x"),)), 0.0)


def test_a_change_of_what_decides_the_tokens_is_another_cache(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row("x", "y", "z", "w")])
    changes: list[dict[str, Any]] = [{}, {"sequence_length": 99}, {"loss_on": "last"}, {"too_long": "truncate"}]
    changes += [{"hold_out": 1e-9}, {"history_reasoning": "keep"}, {"template": "plain"}]
    found = [render(path, tokenizer, **change).fingerprint for change in changes]
    write(path, [row("x", "y", "z", "v")])
    assert len({*found, render(path, tokenizer).fingerprint}) == len(changes) + 1


def test_where_the_files_lie_changes_nothing(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = (write(tmp_path / place / "a.jsonl", [row("x", "y")]) for place in (".", "other"))
    assert render(first, tokenizer).fingerprint == render(second, tokenizer, tmp_path / "cache-2").fingerprint


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InputError, match="too_long: found 'cut', expected 'drop' or"):
        RenderOptions(LENGTH, too_long="cut")


KILLED = """
import os, signal, sys
from pathlib import Path
from argonne.data import rendered
from argonne.prepare import documents
from tests.data.test_rendered import render
from argonne.tokens.tokenizer import load_tokenizer
documents.unit_bytes = lambda files: 997
first, left = rendered.render_unit, [int(sys.argv[3])]
def one_more(*arguments):
    left[0] -= 1
    print(arguments[1].index, flush=True)
    made = first(*arguments)
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return made
rendered.render_unit = one_more
render(sys.argv[1], load_tokenizer(sys.argv[2]))
"""


def test_after_a_kill_no_finished_unit_is_rendered_again_and_the_bytes_are_the_same(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    paths = [
        write(tmp_path / place / "a.jsonl", [row("Well?", words(n % 9, n) + "x") for n in range(60)]) for place in ".b"
    ]
    command = [sys.executable, "-c", KILLED, str(paths[0]), str(tokenizer.folder), "4"]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode == -signal.SIGKILL
    monkeypatch.setattr("argonne.prepare.documents.unit_bytes", lambda files: 997)
    made = []
    whole = rendered.render_unit
    monkeypatch.setattr(rendered, "render_unit", lambda *parts: made.append(parts[1].index) or whole(*parts))
    opened = render(paths[0], tokenizer)
    assert made == list(range(3, len(list(opened.folder.glob("unit-*")))))
    assert not list(opened.folder.glob(".tmp-*"))
    made.clear()
    assert texts(render(paths[0], tokenizer), tokenizer) == texts(render(paths[1], tokenizer), tokenizer)
    assert made == list(range(len(list(opened.folder.glob("unit-*")))))


def test_what_killed_writers_left_in_a_cache_is_collected_when_it_is_opened_again(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [row("Well?", "Yes.")])
    opened = render(path, tokenizer)
    left = [opened.folder / ".tmp-1-packed-x-000000.npy", opened.folder.parent / ".tmp-hashes-of-input.json-1"]
    foreign = opened.folder.parent / ".tmp-of-another"
    for file in (*left, foreign):
        file.touch()
    render(path, tokenizer)
    assert [file.exists() for file in left] == [False, False]
    assert foreign.exists()


def test_two_processes_at_once_render_once(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row("Well?", words(5, n)) for n in range(60)])
    command = [sys.executable, "-c", KILLED, str(path), str(tokenizer.folder), "-1"]
    running = [subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE) for _ in range(2)]
    made = [number for process in running for number in process.communicate(timeout=120)[0].split()]
    assert [process.returncode for process in running] == [0, 0]
    units = len(list(render(path, tokenizer).folder.glob("unit-*")))
    assert sorted(map(int, made)) == list(range(units))

"""The chat template: what is trained, what serving feeds, and what transformers makes of the exported template."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from argonne.data.chat import HISTORY, ChatTemplate, Conversation, Message, ToolCall
from argonne.errors import InputError
from argonne.tokens.chat_tokens import kept_chat_tokens
from argonne.tokens.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from tests.data.chats import TEXTS, as_messages, as_tools, conversations, spans
from tests.tokensets import words

ANSWER = Message("assistant", "Yes.")
ASKED = Message("user", "Well?")
THOUGHT = Message("assistant", "<think>\nhm\n</think>\n\nYes.")


@pytest.fixture(scope="module")
def ours(tokenizer_folder: Path) -> TextTokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """As of Argonne 1.x: no turn tokens, and a pre-tokenizer in which spaces merge with the newline before them."""
    texts = (words(200, seed) for seed in range(20))
    return load_tokenizer(train_tokenizer(texts, 400, tmp_path_factory.mktemp("bare") / "bare", bare=True))


@pytest.fixture(scope="module")
def widened(bare: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return kept_chat_tokens(bare, tmp_path_factory.mktemp("widened") / "tokenizer")


@pytest.fixture(scope="module")
def qwen(shared: Path) -> TextTokenizer:
    return load_tokenizer(shared / "tokenizers" / "qwen3")


def nfc(tokenizer: TextTokenizer, text: str) -> str:
    """What the tokenizer's normalizer leaves of a text."""
    return tokenizer.decode(tokenizer.encode(text))


def check_masks(template: ChatTemplate, conversation: Conversation) -> None:
    rendered = template.render(conversation)
    end = template.tokenizer.decode([template.turn_end_id])
    turns = conversation.messages
    answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    last_user = max(number for number, turn in enumerate(turns) if turn.role == "user")
    hidden = {
        number
        for number in answers
        if template.history_reasoning == "drop"
        and any(
            turns[other].has_trace and other <= last_user
            for other in answers
            if other <= number and not any(turn.role == "user" for turn in turns[other:number])
        )
    }
    space = " " if template.template == "plain" else ""
    expected = [
        nfc(template.tokenizer, space + turns[number].answer()) + end for number in answers if number not in hidden
    ]
    assert [template.tokenizer.decode(span) for span in spans(rendered)] == expected
    assert rendered.context_only == len(hidden)


def check_prompts(template: ChatTemplate, conversation: Conversation) -> None:
    """Before each trained answer stands what serving feeds for it."""
    rendered = template.render(conversation)
    begins = np.flatnonzero(np.diff(rendered.trained.astype(int), prepend=0) == 1)
    fed = []
    for number, turn in enumerate(conversation.messages):
        if turn.role == "assistant":
            fed.append(template.prompt(dataclasses.replace(conversation, messages=conversation.messages[:number])))
    found = {begin: rendered.ids[:begin].tolist() for begin in begins.tolist()}
    prompts = {len(ids): ids.tolist() for ids in fed}
    assert found == {begin: prompts.get(begin) for begin in found}


@pytest.mark.parametrize("history", ["drop", "keep"])
@given(conversation=conversations())
@settings(max_examples=60)
def test_exactly_the_answers_their_tool_calls_and_their_turn_ends_are_trained(
    ours: TextTokenizer, widened: TextTokenizer, history: str, conversation: Conversation
) -> None:
    for tokenizer in (ours, widened):
        check_masks(ChatTemplate(tokenizer, history_reasoning=history), conversation)


@pytest.mark.parametrize("history", ["drop", "keep"])
@given(conversation=conversations())
@settings(max_examples=60)
def test_serving_feeds_id_for_id_what_training_shows_before_the_answer(
    ours: TextTokenizer, history: str, conversation: Conversation
) -> None:
    check_prompts(ChatTemplate(ours, history_reasoning=history), conversation)


@given(conversation=conversations(tools=False))
@settings(max_examples=60)
def test_the_plain_template_trains_the_same_and_feeds_the_same(bare: TextTokenizer, conversation: Conversation) -> None:
    template = ChatTemplate(bare, "plain")
    check_masks(template, conversation)
    check_prompts(template, conversation)


@given(text=TEXTS)
def test_no_content_ends_a_turn_or_begins_one(ours: TextTokenizer, text: str) -> None:
    template = ChatTemplate(ours)
    ids = template.render(Conversation((Message("user", text), Message("assistant", text)))).ids.tolist()
    assert (ids.count(template.turn_start_id), ids.count(template.turn_end_id)) == (2, 2)


def test_the_plain_template_is_how_1_was_tuned(bare: TextTokenizer) -> None:
    template = ChatTemplate(bare, "plain")
    rendered = template.render(Conversation((ASKED, ANSWER, ASKED, ANSWER)))
    one = "USER: Well?\n\nASSISTANT: Yes.<|end_of_text|>"
    assert bare.decode(rendered.ids) == f"{one}\n\n{one}"
    assert [template.words(span) for span in spans(rendered)] == ["Yes.", "Yes."]


def test_qwens_own_wording_is_ours(qwen: TextTokenizer, qwen_exported: tuple[ChatTemplate, Any]) -> None:
    """Qwen3's template gives the same ids for tools, calls, results and a trace after the last question."""
    own = json.loads((qwen.folder / "tokenizer_config.json").read_text())["chat_template"]
    call = Message("assistant", "Let me see.", "which?", (ToolCall("add", '{"a": 1}'), ToolCall("find", "{}")))
    turns = (Message("system", "Be brief."), ASKED, THOUGHT, ASKED, call)
    whole = Conversation((*turns, Message("tool", "2"), Message("tool", "3"), THOUGHT), ('{"name": "add"}',))
    _, theirs = qwen_exported
    ids = theirs.apply_chat_template(as_messages(whole), tools=as_tools(whole), chat_template=own)["input_ids"]
    assert ChatTemplate(qwen).render(whole).ids.tolist() == ids


def exported(template: ChatTemplate, folder: Path) -> Any:
    """The tokenizer of an exported folder, as transformers loads it."""
    transformers = pytest.importorskip("transformers")
    template.tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(template.jinja)
    return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def check_jinja(template: ChatTemplate, theirs: Any, conversation: Conversation) -> None:
    messages, tools = as_messages(conversation), as_tools(conversation)
    assert theirs.apply_chat_template(messages, tools=tools)["input_ids"] == template.render(conversation).ids.tolist()
    asked = dataclasses.replace(conversation, messages=conversation.messages[:-1])
    found = theirs.apply_chat_template(messages[:-1], tools=tools, add_generation_prompt=True)["input_ids"]
    assert found == template.prompt(asked).tolist()


QUIET = st.lists(st.sampled_from(["hello", " world", "Zürich", " 你好", "x\n", "\n\ny", "42"]), max_size=4).map(
    lambda parts: "So" + "".join(parts)
)


Exported = list[tuple[ChatTemplate, Any]]


@pytest.fixture(scope="module")
def folders(ours: TextTokenizer, widened: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exported folders of two tokenizers and both ways with earlier traces."""
    templates = [ChatTemplate(one, history_reasoning=history) for one in (ours, widened) for history in HISTORY]
    return [(template, exported(template, tmp_path_factory.mktemp("exported") / "model")) for template in templates]


@pytest.fixture(scope="module")
def qwen_exported(qwen: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatTemplate, Any]:
    template = ChatTemplate(qwen)
    return template, exported(template, tmp_path_factory.mktemp("exported") / "qwen")


@given(conversation=conversations(texts=QUIET))
@settings(max_examples=40)
def test_the_exported_template_gives_our_ids(folders: Exported, conversation: Conversation) -> None:
    for template, theirs in folders:
        check_jinja(template, theirs, conversation)


def test_the_exported_plain_template_gives_our_ids(bare: TextTokenizer, tmp_path: Path) -> None:
    template = ChatTemplate(bare, "plain")
    check_jinja(template, exported(template, tmp_path / "plain"), Conversation((ASKED, THOUGHT, ASKED, THOUGHT)))


def test_the_exported_template_marks_for_other_trainers_what_is_trained_here(
    ours: TextTokenizer, tmp_path: Path
) -> None:
    template = ChatTemplate(ours)
    theirs = exported(template, tmp_path / "marks")
    whole = Conversation((ASKED, ANSWER, ASKED, THOUGHT))
    found = theirs.apply_chat_template(as_messages(whole), return_dict=True, return_assistant_tokens_mask=True)
    assert found["assistant_masks"] == template.render(whole).trained.astype(int).tolist()


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.campaign), 40])
@pytest.mark.parametrize("name", ["chat/oasst_conversations", "reasoning/gsm8k_think"])
def test_every_shared_conversation_is_masked_served_and_exported_alike(
    qwen_exported: tuple[ChatTemplate, Any], folders: Exported, shared: Path, name: str, step: int
) -> None:
    lines = (shared / "data" / f"{name}.jsonl").read_text().rstrip("\n").split("\n")
    for template, theirs in (qwen_exported, folders[-2]):
        for line in lines[::step]:
            turns = tuple(Message(turn["role"], turn["content"]) for turn in json.loads(line)["messages"])
            check_masks(template, Conversation(turns))
            check_prompts(template, Conversation(turns))
            check_jinja(template, theirs, Conversation(turns))


def test_an_earlier_trace_is_dropped_and_its_answer_not_trained(ours: TextTokenizer) -> None:
    whole = Conversation((ASKED, THOUGHT, ASKED, THOUGHT))
    rendered = ChatTemplate(ours).render(whole)
    assert ours.decode(rendered.ids).count("<think>") == 1
    assert (len(spans(rendered)), rendered.context_only) == (1, 1)
    assert len(spans(ChatTemplate(ours, history_reasoning="keep").render(whole))) == 2


@pytest.mark.parametrize(("loss_on", "answers"), [("assistant", 2), ("last", 1)])
def test_the_loss_lies_where_it_is_asked_for(ours: TextTokenizer, loss_on: str, answers: int) -> None:
    template = ChatTemplate(ours)
    rendered = template.render(Conversation((ASKED, ANSWER, ASKED, ANSWER)), loss_on)
    assert [template.words(span) for span in spans(rendered)] == ["Yes."] * answers
    assert rendered.trained[-2]


def test_all_trains_every_token(ours: TextTokenizer) -> None:
    assert ChatTemplate(ours).render(Conversation((ASKED, ANSWER)), "all").trained.all()


def test_many_at_once_are_as_one_by_one(ours: TextTokenizer) -> None:
    listed = [Conversation((Message("user", "a" * size), ANSWER)) for size in range(1, 9)]
    template = ChatTemplate(ours)
    for conversation, together in zip(listed, template.render_batch(listed), strict=True):
        assert together.ids.tolist() == template.render(conversation).ids.tolist()


def test_a_tokenizer_without_a_turn_end_is_refused(bare: TextTokenizer) -> None:
    with pytest.raises(InputError, match=r"<\|im_start\|> is no token of it.*use chat\.template = \"plain\""):
        ChatTemplate(bare)


def test_a_turn_end_that_no_flag_protects_is_kept_apart(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
    tree = json.loads((folder / "tokenizer.json").read_text())
    for token in tree["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    template = ChatTemplate(load_tokenizer(folder))
    typed = Conversation((Message("user", "a<|im_end|>b <|im_end|>"), ANSWER))
    assert template.render(typed).ids.tolist().count(template.turn_end_id) == 2


def test_a_turn_end_that_a_text_can_make_is_refused(tmp_path: Path) -> None:
    """Its words for what is unknown are the turn end."""
    (tmp_path / "tokenizer.json").write_text(
        Tokenizer(models.WordLevel({"<|im_end|>": 0, "<|im_start|>": 1, "a": 2}, unk_token="<|im_end|>")).to_str()
    )
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(InputError, match=r"<\|im_end\|>.*is no word, and a text can make it"):
        ChatTemplate(load_tokenizer(tmp_path))


def test_a_prompt_that_ends_with_an_answer_is_refused(ours: TextTokenizer) -> None:
    with pytest.raises(InputError, match="ends with a user's"):
        ChatTemplate(ours).prompt(Conversation((ASKED, ANSWER)))


def test_the_plain_template_refuses_tools(bare: TextTokenizer) -> None:
    with pytest.raises(InputError, match="no words for tools"):
        ChatTemplate(bare, "plain").render(Conversation((ASKED, ANSWER), ("{}",)))

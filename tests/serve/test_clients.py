"""The official clients of OpenAI and Anthropic against the server: what they send is understood, what they read is
whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from argonne.serve.engine import Engine
from argonne.serve.options import SamplingOptions, Shaping
from tests.serve.serving import CONTEXT, Running, chat_prompt, expected_text, make_engine, running, scripted, visible
from tests.tour import ROOT, blocks_of

HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}}
THOUGHT = "<think>\nLong ago\n</think>\n\nthere was"
CALL = 'A model.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return make_engine(tmp_path_factory.mktemp("chat") / "it")


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    with running({"it": engine}) as made:
        yield made


@pytest.fixture(scope="module")
def scripts(engine: Engine) -> Iterator[Running]:
    """Models that think, and that call a function, one request at a time."""
    engines = {"thinks": scripted(engine, THOUGHT), "calls": scripted(engine, CALL)}
    with running(engines, rows=1) as made:
        yield made


def gpt(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def claude(server: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def alone(engine: Engine, *said: str, count: int = 8, shaping: Shaping | None = None, **more: Any) -> str:
    prompt, stops = chat_prompt(engine, *said)
    options = SamplingOptions(**{"max_new_tokens": count, "temperature": 0.0, "top_p": 1.0, **more})
    return expected_text(engine, prompt, options, stops, shaping)


# ------------------------------------------------------------------------------------------------- chat


def test_chat_answers_with_the_engines_text_and_counts_its_tokens(server: Running, engine: Engine) -> None:
    for count in (1, 5, 8):
        found = gpt(server).chat.completions.create(model="it", messages=HELLO, max_tokens=count, temperature=0)
        assert found.choices[0].message.content == visible(alone(engine, "Hello", count=count))
        assert found.choices[0].finish_reason == "length"
        assert found.usage is not None
        assert found.usage.prompt_tokens == len(chat_prompt(engine, "Hello")[0])
        assert found.usage.completion_tokens == count


def test_a_chat_stream_is_the_answer_in_pieces(server: Running, engine: Engine) -> None:
    for most in ({"max_tokens": 8}, {"max_completion_tokens": 8}):
        stream = gpt(server).chat.completions.create(
            model="it", messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True}, **most
        )
        chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == visible(alone(engine, "Hello"))
        assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 8
        assert len({chunk.id for chunk in chunks}) == 1


def test_a_conversation_with_a_system_message_and_parts_of_text(server: Running, engine: Engine) -> None:
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "there"},
        {"role": "user", "content": "more"},
    ]
    found = gpt(server).chat.completions.create(model="it", messages=messages, max_tokens=8, temperature=0)
    assert found.choices[0].message.content == visible(alone(engine, "Hello", "there", "more"))
    system: Any = [{"role": "developer", "content": "Be brief."}, *HELLO]
    other = gpt(server).chat.completions.create(model="it", messages=system, max_tokens=8, temperature=0)
    assert other.usage is not None
    assert found.usage is not None
    assert other.usage.prompt_tokens > len(chat_prompt(engine, "Hello")[0])


def test_a_stop_text_ends_an_answer_and_is_left_out(server: Running, engine: Engine) -> None:
    whole = alone(engine, "Hello", count=30)
    stop = whole[6:8]
    expected = visible(whole[: whole.index(stop)])
    client = gpt(server)
    more: Any = {"model": "it", "messages": HELLO, "max_tokens": 30, "temperature": 0}
    found = client.chat.completions.create(stop=["never", stop], **more)
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (expected, "stop")
    streamed = client.chat.completions.create(stop=stop, stream=True, **more)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected


def test_seeds_repeat_an_answer_and_n_counts_them_up(server: Running, engine: Engine) -> None:
    def ask(**more: Any) -> list[str | None]:
        found = gpt(server).chat.completions.create(model="it", messages=HELLO, max_tokens=8, **more)
        assert [choice.index for choice in found.choices] == list(range(len(found.choices)))
        return [choice.message.content for choice in found.choices]

    three = ask(seed=7, n=3)
    assert three == [visible(alone(engine, "Hello", temperature=1.0, seed=7 + copy)) for copy in range(3)]
    assert ask(seed=7) == ask(seed=7) == three[:1]
    assert len({*ask(), *ask(), *ask()}) > 1
    streamed = ["", "", ""]
    for chunk in gpt(server).chat.completions.create(
        model="it", messages=HELLO, max_tokens=8, seed=7, n=3, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == three


def test_logprobs_come_for_every_token_with_bytes_and_alternatives(server: Running, engine: Engine) -> None:
    more: Any = {"model": "it", "messages": HELLO, "max_tokens": 8, "temperature": 0, "logprobs": True}
    found = gpt(server).chat.completions.create(top_logprobs=3, **more)
    listed = found.choices[0].logprobs
    assert listed is not None
    assert listed.content is not None
    assert len(listed.content) == 8
    for token in listed.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy: the likeliest
        assert token.logprob < 0
    said = b"".join(bytes(token.bytes or []) for token in listed.content)
    assert said.decode(errors="replace") == alone(engine, "Hello")
    streamed = gpt(server).chat.completions.create(stream=True, **more)
    pieces = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    tokens = [token.token for piece in pieces for token in piece.content or []]
    assert tokens == [token.token for token in listed.content]


def test_a_bias_decides_and_extensions_are_understood(server: Running, engine: Engine) -> None:
    token = engine.tokenizer.encode("a")[0]
    found = gpt(server).chat.completions.create(
        model="it", messages=HELLO, max_tokens=3, temperature=0, logit_bias={str(token): 100}
    )
    assert found.choices[0].message.content == "aaa"
    more: Any = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3}
    sampled = gpt(server).chat.completions.create(
        model="it", messages=HELLO, max_tokens=8, top_p=0.9, seed=3, extra_body=more
    )
    expected = alone(engine, "Hello", **{"temperature": 1.0, "top_p": 0.9, "seed": 3, **more})
    assert sampled.choices[0].message.content == visible(expected)


def test_reasoning_comes_apart_from_the_text(scripts: Running) -> None:
    client = gpt(scripts)
    more: Any = {"model": "thinks", "messages": HELLO}
    message: Any = client.chat.completions.create(**more).choices[0].message
    assert (message.reasoning_content, message.content) == ("Long ago", "there was")
    deltas: list[Any] = [chunk.choices[0].delta for chunk in client.chat.completions.create(stream=True, **more)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Long ago"
    assert "".join(delta.content or "" for delta in deltas) == "there was"


def test_a_tool_is_called_and_its_result_answered(scripts: Running) -> None:
    client = gpt(scripts)
    found = client.chat.completions.create(model="calls", messages=HELLO, tools=[TOOL], tool_choice="auto")
    choice = found.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rom"})
    assert choice.message.content == "A model."
    turns: Any = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    again = client.chat.completions.create(model="calls", messages=turns, tools=[TOOL], stream=True)
    chunks = list(again)
    calls = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or []]
    assert [(one.index, one.function and one.function.name) for one in calls] == [(0, "weather")]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_tools_stand_in_the_prompt_unless_the_choice_is_none(server: Running) -> None:
    def prompt(**more: Any) -> int:
        found = gpt(server).chat.completions.create(model="it", messages=HELLO, max_tokens=1, **more)
        assert found.usage is not None
        return found.usage.prompt_tokens

    assert prompt(tools=[TOOL]) > prompt() + 50
    assert prompt(tools=[TOOL], tool_choice="none") == prompt()


def test_json_schema_and_json_object_give_json(server: Running, engine: Engine) -> None:
    client = gpt(server)
    # A thought may come first, and that of a model that learned nothing may use up all of the room.
    at_once: Any = {"logit_bias": {str(engine.tokenizer.token_to_id("<think>")): -100}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": WEATHER, "strict": True}}
    for seed in range(3):
        found = client.chat.completions.create(
            model="it", messages=HELLO, response_format=form, seed=seed, extra_body=at_once
        )
        told = json.loads(found.choices[0].message.content or "")
        assert list(told) == ["city"]
        assert len(told["city"]) <= 8
    text: Any = {"format": {"type": "json_schema", "name": "place", "schema": WEATHER}}
    tried = (client.responses.create(model="it", input="Hello", text=text) for _ in range(9))
    parsed = next(one for one in tried if one.status == "completed")
    assert list(json.loads(parsed.output_text)) == ["city"]
    choice: Any = {"response_format": {"type": "choice", "choices": ["yes", "no"]}}
    chosen = client.chat.completions.create(model="it", messages=HELLO, n=2, extra_body=choice | at_once)
    assert {one.message.content for one in chosen.choices} <= {"yes", "no"}
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(model="it", messages=HELLO, response_format=wrong)


def test_a_stream_that_is_closed_ends_the_answer(server: Running) -> None:
    before = server.service.metrics.tokens_out
    stream = gpt(server).chat.completions.create(model="it", messages=HELLO, max_tokens=450, stream=True)
    next(iter(stream))
    stream.close()
    server.until_idle()
    assert server.service.metrics.tokens_out < before + 450


# ------------------------------------------------------------------------------------------------- completions


def test_completions_of_texts_and_ids(server: Running, engine: Engine) -> None:
    client, ids = gpt(server), engine.tokenizer.encode("Long ago")
    options = SamplingOptions(6, 0.0, top_p=1.0)
    expected = expected_text(engine, ids, options, [engine.tokenizer.eos_id])
    prompts: list[Any] = ["Long ago", ids, ["Long ago"], [ids]]
    for prompt in prompts:
        found = client.completions.create(model="it", prompt=prompt, max_tokens=6, temperature=0)
        assert found.choices[0].text == expected
    two = client.completions.create(model="it", prompt=["Long ago", "there"], max_tokens=6, temperature=0, n=2)
    assert [choice.text for choice in two.choices][:2] == [expected] * 2
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    echoed = client.completions.create(model="it", prompt="Long ago", max_tokens=6, temperature=0, echo=True)
    assert echoed.choices[0].text == "Long ago" + expected
    streamed = client.completions.create(model="it", prompt="Long ago", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected
    default = client.completions.create(model="it", prompt="Long ago", temperature=0)
    assert default.usage is not None
    assert default.usage.completion_tokens <= 16


def test_completions_have_logprobs_of_their_own_form(server: Running) -> None:
    found = gpt(server).completions.create(model="it", prompt="Long", max_tokens=5, temperature=0, logprobs=2)
    listed = found.choices[0].logprobs
    assert listed is not None
    assert listed.tokens is not None
    assert listed.token_logprobs is not None
    assert [len(each or {}) for each in listed.top_logprobs or []] == [2] * 5
    sizes = [1 if token.startswith("bytes:") else len(token) for token in listed.tokens]
    assert listed.text_offset == [sum(sizes[:place]) for place in range(5)]
    assert all(value is not None and value < 0 for value in listed.token_logprobs)


# ------------------------------------------------------------------------------------------------- responses


def test_responses_answer_texts_and_items(server: Running, engine: Engine) -> None:
    client = gpt(server)
    found = client.responses.create(model="it", input="Hello", max_output_tokens=8, temperature=0)
    assert found.output_text == visible(alone(engine, "Hello"))
    assert found.status == "incomplete"
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.usage is not None
    assert found.usage.output_tokens == 8
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "there"}]},
        {"role": "user", "content": "more"},
    ]
    longer = client.responses.create(model="it", input=items, max_output_tokens=8, temperature=0, instructions=None)
    assert longer.output_text == visible(alone(engine, "Hello", "there", "more"))
    told = client.responses.create(model="it", input="Hello", max_output_tokens=2, instructions="Be brief.")
    assert told.instructions == "Be brief."


def test_a_stream_of_responses_has_every_event_in_order(scripts: Running) -> None:
    events = list(gpt(scripts).responses.create(model="thinks", input="Hello", stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    item = ["output_item.added", "content_part.added"]
    done = ["content_part.done", "output_item.done"]
    deltas = ("reasoning_text.delta", "output_text.delta")
    short = [kind for place, kind in enumerate(kinds) if kind not in deltas or kinds[place - 1] != kind]
    assert short == [
        *("created", "in_progress"),
        *(*item, deltas[0], "reasoning_text.done", *done),
        *(*item, deltas[1], "output_text.done", *done),
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Any = events[-1]
    assert [one.type for one in last.response.output] == ["reasoning", "message"]
    assert last.response.output_text == "there was"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "there was"


def test_responses_call_functions_and_take_their_results(scripts: Running) -> None:
    client = gpt(scripts)
    tool: Any = {"type": "function", **TOOL["function"], "strict": True}
    found = client.responses.create(model="calls", input="Hello", tools=[tool])
    call: Any = found.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Rom"})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    turns: Any = [{"role": "user", "content": "Hello"}, *found.output, result]
    events = list(client.responses.create(model="calls", input=turns, tools=[tool], stream=True))
    assert "response.function_call_arguments.done" in [event.type for event in events]


# ------------------------------------------------------------------------------------------------- messages


def test_messages_answer_and_stream(server: Running, engine: Engine) -> None:
    client = claude(server)
    expected = visible(alone(engine, "Hello"))
    more: Any = {"model": "it", "messages": HELLO, "max_tokens": 8, "extra_body": {"temperature": 0}}
    found: Any = client.messages.create(**more)
    assert "".join(block.text for block in found.content if block.type == "text") == expected
    assert (found.stop_reason, found.usage.output_tokens) == ("max_tokens", 8)
    with client.messages.stream(**more) as stream:
        assert "".join(stream.text_stream) == expected
        assert stream.get_final_message().usage.output_tokens == 8
    whole = alone(engine, "Hello", count=30)
    stop = whole[6:8]
    stopped = client.messages.create(**{**more, "max_tokens": 30}, stop_sequences=["never", stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    told = client.messages.create(**more, system=[{"type": "text", "text": "Be brief."}])
    assert told.usage.input_tokens > found.usage.input_tokens


def test_messages_think_in_blocks(scripts: Running) -> None:
    client = claude(scripts)
    more: Any = {"model": "thinks", "messages": HELLO, "max_tokens": 100}
    found: Any = client.messages.create(**more, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [(block.type) for block in found.content] == ["thinking", "text"]
    assert (found.content[0].thinking, found.content[1].text) == ("Long ago", "there was")
    assert found.stop_reason == "end_turn"
    kinds = [event.type for event in client.messages.create(**more, stream=True)]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    short = [kind for place, kind in enumerate(kinds) if kind != block[1] or kinds[place - 1] != kind]
    assert short == ["message_start", *block, *block, "message_delta", "message_stop"]
    turns: Any = [*HELLO, {"role": "assistant", "content": found.content}, {"role": "user", "content": "more"}]
    assert client.messages.create(**{**more, "messages": turns}).stop_reason == "end_turn"


def test_messages_use_tools_and_take_their_results(scripts: Running) -> None:
    client = claude(scripts)
    tool: Any = {"name": "weather", "description": "of a city", "input_schema": WEATHER}
    more: Any = {"model": "calls", "max_tokens": 100, "tools": [tool], "tool_choice": {"type": "auto"}}
    found: Any = client.messages.create(messages=HELLO, **more)
    assert found.stop_reason == "tool_use"
    assert (found.content[-1].type, found.content[-1].input) == ("tool_use", {"city": "Rom"})
    result = {"type": "tool_result", "tool_use_id": found.content[-1].id, "content": "sunny"}
    turns: Any = [
        *HELLO,
        {"role": "assistant", "content": found.content},
        {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]},
    ]
    with client.messages.stream(messages=turns, **more) as stream:
        assert stream.get_final_message().content[-1].type == "tool_use"


# ------------------------------------------------------------------------------------------------- the rest


def test_models_are_listed_and_found_by_both_clients(server: Running) -> None:
    assert [model.id for model in gpt(server).models.list()] == ["it"]
    assert gpt(server).models.retrieve("it").owned_by == "argonne"
    with pytest.raises(openai.NotFoundError):
        gpt(server).models.retrieve("other")


def test_errors_are_the_clients_own(server: Running) -> None:
    more: Any = {"messages": HELLO, "max_tokens": 4}
    with pytest.raises(openai.NotFoundError) as missing:
        gpt(server).chat.completions.create(model="other", **more)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        gpt(server).chat.completions.create(model="it", messages=HELLO, max_tokens=CONTEXT)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no conversation is stored here"):
        gpt(server).responses.create(model="it", input="Hello", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        gpt(server).responses.retrieve("resp_1")
    with pytest.raises(openai.BadRequestError, match="typical_p: is not known here"):
        gpt(server).chat.completions.create(model="it", **more, extra_body={"typical_p": 1})
    with pytest.raises(anthropic.NotFoundError) as other:
        claude(server).messages.create(model="other", **more)
    assert other.value.body["error"]["type"] == "not_found_error"  # type: ignore[index,call-overload]
    with pytest.raises(anthropic.BadRequestError, match="max_tokens: found 0"):
        claude(server).messages.create(model="it", messages=HELLO, max_tokens=0)


# ------------------------------------------------------------------------------------------------- the documents


def test_the_clients_of_the_documents_run_word_by_word(
    engine: Engine, server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = [block for block in blocks_of((ROOT / "docs" / "serve.md").read_text()) if block.language == "python"]
    assert len(blocks) == 2
    for block in blocks:
        code = block.text.replace("http://127.0.0.1:8000", server.url).replace('model="chat"', 'model="it"')
        exec(code, {})
        assert capsys.readouterr().out.strip()

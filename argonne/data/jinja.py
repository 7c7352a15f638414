"""The words of the chat template that others read: Qwen3's for tools, and chat_template.jinja of an exported folder.

`argonne.data.chat` renders the same, piece by piece. `{% generation %}` marks what is trained, for trainers that ask.
"""

from __future__ import annotations

from collections.abc import Sequence

TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
)

# What an answer says: its trace in front where it is shown, the tool calls behind.
ANSWER = """\
    {%- set content = message.content if message.content is string else '' %}
    {%- set reasoning = message.reasoning_content or message.reasoning or '' %}
    {%- set words = content %}
    {%- if reasoning or '</think>' in content %}
        {%- set words = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if DROP and loop.index0 <= ns.last_user %}
        {%- set content = words %}
    {%- elif reasoning %}
        {%- set content = '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') %}
    {%- endif %}
"""

LAST_USER = """\
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last_user = loop.index0 %}
    {%- endif %}
{%- endfor %}
"""

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- TOOLS_BEGIN }}
    {%- for tool in tools %}
        {{- '\\n' }}{{- tool | tojson }}
    {%- endfor %}
    {{- TOOLS_END + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not (loop.first and tools)) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
ANSWER
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if words or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {%- set call = call.function or call %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

PLAIN = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
ANSWER
        {{- 'ASSISTANT:' }}
        {%- generation %}
        {{- ' ' + content + TURN_END }}
        {%- endgeneration %}
        {%- if not loop.last or add_generation_prompt %}
            {{- '\\n\\n' }}
        {%- endif %}
    {%- else %}
        {{- message.role.upper() + ': ' + message.content + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""


def tools_text(system: str | None, tools: Sequence[str]) -> str:
    """The turn that names the functions, behind the system prompt where there is one."""
    listed = "".join(f"\n{tool}" for tool in tools)
    return "system\n" + ("" if system is None else f"{system}\n\n") + TOOLS[0] + listed + TOOLS[1]


def chatml(drop: bool) -> str:
    """drop: earlier answers are shown without their traces."""
    return _filled(CHATML, drop, TOOLS_BEGIN=_quoted(TOOLS[0]), TOOLS_END=_quoted(TOOLS[1]))


def plain(turn_end: str, drop: bool) -> str:
    return _filled(PLAIN, drop, TURN_END=_quoted(turn_end))


def _filled(text: str, drop: bool, **values: str) -> str:
    text = LAST_USER + text.replace("ANSWER\n", ANSWER)
    for name, value in {**values, "DROP": str(drop).lower()}.items():
        text = text.replace(name, value)
    return text


def _quoted(text: str) -> str:
    """As a string of jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

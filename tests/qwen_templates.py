"""The chat templates of four Qwen3 releases: the published one, and others that render what theirs render.

Those of the 2507 releases are Qwen3's with their differences: content that is no string counts as "", Instruct shows no
reasoning, Thinking opens a block for each reply. Qwen3-Coder's writes calls and tools as tags.
"""

from __future__ import annotations

from tests.test_tokenizer import QWEN

QWEN3 = str(QWEN.chat_template)

_LOOP = "{%- for message in messages %}\n"
_TEXT = "{%- set content = message.content if message.content is string else '' %}\n"
_OPEN = "{{- '<|im_start|>assistant\\n' }}"
_SWITCH = QWEN3[QWEN3.index("{%- if enable_thinking is defined") : QWEN3.rindex("{%- endif %}")]


def _of_2507() -> str:
    before, after = QWEN3.split(_LOOP)
    before = before.replace('message.role == "user" and', 'message.role == "user" and message.content is string and')
    after = after.replace("{%- set content = message.content %}", "").replace("message.content", "content")
    after = after.replace(
        "message.reasoning_content is defined and message.reasoning_content is not none",
        "message.reasoning_content is string",
    )
    after = after.replace(
        "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
        "                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n')"
        ".split('<think>')[-1].lstrip('\\n') %}",
        "{%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}",
    )
    return before + _LOOP + _TEXT + after.replace(_SWITCH, "")


def _without_reasoning(template: str) -> str:
    """The header and the content of every assistant's message, whatever it thought."""
    start = template.index("{%- set reasoning_content = '' %}")
    end = template.index("{%- if message.tool_calls %}")
    return template[:start] + "{{- '<|im_start|>' + message.role + '\\n' + content }}\n" + template[end:]


THINKING_2507 = _of_2507().replace(_OPEN, "{{- '<|im_start|>assistant\\n<think>\\n' }}")
INSTRUCT_2507 = _without_reasoning(_of_2507())

CODER = r"""
{%- macro more(values, told) %}
    {%- if values is mapping %}
        {%- for key in values if key not in told %}
            {%- set value = values[key] %}
            {%- set plain = value is string or not (value is mapping or value is sequence) %}
            {{- '\n<' ~ key ~ '>' ~ (value | string if plain else value | tojson) ~ '</' ~ key ~ '>' }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set turns = messages %}
{%- set has_tools = tools is iterable and tools | length > 0 %}
{%- if messages[0].role == 'system' %}
    {%- set turns = messages[1:] %}
    {{- '<|im_start|>system\n' + messages[0].content }}
{%- elif has_tools %}
    {{- '<|im_start|>system\nYou are Qwen, a helpful AI assistant that can interact with a computer to solve tasks.' }}
{%- endif %}
{%- if has_tools %}
    {{- '\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>' }}
    {%- for tool in tools %}
        {%- set f = tool.function if tool.function is defined else tool %}
        {{- '\n<function>\n<name>' ~ f.name ~ '</name>' }}
        {%- if f.description is defined %}{{- '\n<description>' ~ f.description | trim ~ '</description>' }}{% endif %}
        {{- '\n<parameters>' }}
        {%- if f.parameters is mapping and f.parameters.properties is mapping %}
            {%- for name, fields in f.parameters.properties | items %}
                {{- '\n<parameter>\n<name>' ~ name ~ '</name>' }}
                {%- if fields.type is defined %}{{- '\n<type>' ~ fields.type | string ~ '</type>' }}{% endif %}
                {{- more(fields, ['name', 'type', 'description']) ~ '\n</parameter>' }}
            {%- endfor %}
        {%- endif %}
        {{- more(f.parameters, ['type', 'properties']) ~ '\n</parameters>' }}
        {{- more(f, ['type', 'name', 'description', 'parameters']) ~ '\n</function>' }}
    {%- endfor %}
    {{- '\n</tools>\n\nCall a function so:\n<tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n' }}
    {{- '</function>\n</tool_call>' }}
{%- endif %}
{%- if has_tools or messages[0].role == 'system' %}{{- '<|im_end|>\n' }}{% endif %}
{%- for message in turns %}
    {%- if message.role == 'assistant' and message.tool_calls is iterable and message.tool_calls | length > 0 %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content is string and message.content | trim %}
            {{- '\n' + message.content | trim + '\n' }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- set f = tool_call.function if tool_call.function is defined else tool_call %}
            {{- '\n<tool_call>\n<function=' + f.name + '>\n' }}
            {%- if f.arguments is defined %}
                {%- for key, value in f.arguments | items %}
                    {%- set plain = value is string or not (value is mapping or value is sequence) %}
                    {{- '<parameter=' + key + '>\n' }}
                    {{- (value | string if plain else value | tojson) + '\n</parameter>\n' }}
                {%- endfor %}
            {%- endif %}
            {{- '</function>\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}{{- '<|im_start|>user\n' }}{% endif %}
        {{- '<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>\n' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

TEMPLATES = {
    "Qwen3": QWEN3,
    "Instruct-2507": INSTRUCT_2507,
    "Thinking-2507": THINKING_2507,
    "Coder": CODER,
}

# ruff: noqa: E501 (templates are kept as they are written)
"""Records what `transformers` makes of chat templates, for `test_text_recorded.py`: run it to write `text_recorded.json` anew.

It uses the live library; the test does not.
"""

import json
from pathlib import Path

TEMPLATES = {
    "chatml": """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'text' %}{{ part.text }}{% else %}<|{{ part.type }}|>{% endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}""",
    "inst": """{% if messages[0]['role'] == 'system' %}
  {% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}
  {% set loop_messages = messages %}{% set system = false %}
{% endif %}
{{ bos_token }}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}
{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' ~ content | trim ~ ' [/INST]' }}
{% else %}{% generation %}{{ ' ' ~ content | trim ~ ' ' ~ eos_token }}{% endgeneration %}{% endif %}
{% endfor %}""",
    "tools": """{%- macro kind(schema) %}{% if schema.type is string %}{{ schema.type }}{% else %}{{ schema.type | join(' | ') }}{% endif %}{% endmacro %}
{%- if tools %}
# Tools
{% for tool in tools %}{% set f = tool.function if tool.function is defined else tool %}
{{ f.name }}({% for key, value in f.parameters.properties.items() %}{{ key }}: {{ kind(value) }}{{ ', ' if not loop.last }}{% endfor %})
{{ tool | tojson(indent=2) }}
{{ tool | tojson }}
{% endfor %}
{%- endif %}
{%- set ns = namespace(calls=0) %}
{%- for message in messages | selectattr('role', 'ne', 'system') %}
{%- if message.tool_calls is defined and message.tool_calls %}
{%- for call in message.tool_calls %}{% set ns.calls = ns.calls + 1 %}<call {{ ns.calls }}>{{ call.function.arguments | tojson }}</call>
{% endfor %}{% continue %}
{%- endif %}
{{ message.role | upper }}: {{ message.content | replace('\\t', ' ') }}
{%- if ns.calls > 3 %}{% break %}{% endif %}
{%- endfor %}
{{ documents | length if documents else 'no' }} documents{{ unknown }}""",
}
USER, ASSISTANT = {"role": "user", "content": ' Grüße <b>\t& "you" ☃\n'}, {"role": "assistant", "content": " ok "}
SYSTEM = {"role": "system", "content": "Be kind."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": [1, None, "é"]}}}],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "<f>",
        "parameters": {"type": "object", "properties": {"x": {"type": ["array", "null"]}, "y": {"type": "string"}}},
    },
}
CASES: list[dict] = [
    {"template": "chatml", "messages": [SYSTEM, USER, ASSISTANT, PARTS], "values": {}},
    {"template": "chatml", "messages": [USER], "values": {"enable_thinking": False}},
    {"template": "chatml", "messages": [USER, ASSISTANT], "values": {}, "add_generation_prompt": False},
    {"template": "inst", "messages": [SYSTEM, USER, ASSISTANT, USER], "values": {}},
    {"template": "inst", "messages": [USER, ASSISTANT], "values": {}, "add_generation_prompt": False},
    {"template": "inst", "messages": [ASSISTANT, USER], "values": {}},
    {"template": "tools", "messages": [SYSTEM, USER, CALL, ASSISTANT], "values": {}, "tools": [TOOL, TOOL["function"]]},
    {
        "template": "tools",
        "messages": [USER, CALL, CALL, CALL, CALL, ASSISTANT, USER],
        "values": {},
        "documents": [{"text": "d"}],
    },
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def main() -> None:
    import tokenizers
    import transformers

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **TOKENS)
    cases = []
    for case in CASES:
        given = {"tools": case.get("tools"), "documents": case.get("documents"), **case["values"]}
        opened = case.get("add_generation_prompt", True)
        template = TEMPLATES[case["template"]]
        try:
            text = peer.apply_chat_template(
                case["messages"], chat_template=template, tokenize=False, add_generation_prompt=opened, **given
            )
            cases.append({**case, "text": text})
        except Exception as error:
            cases.append({**case, "error": str(error)})
    recorded = {"transformers": transformers.__version__, "tokens": TOKENS, "templates": TEMPLATES, "cases": cases}
    file = Path(__file__).with_name("text_recorded.json")
    file.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Chat templates: what Hugging Face offers to templates, and what a hostile template cannot do."""

import json
from pathlib import Path

import pytest

from fewstep.text.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi <b>"}]


def render(template: str, messages: list[dict] = MESSAGES, **given: object) -> str:
    return ChatTemplate({"default": template}, {"bos_token": "<s>"}).render(messages, values=given)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ eos_token }}|", "<s>|"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi <b>"}]'),
        ("{{ {'b': 1, 'a': 'é'} | tojson(indent=1, sort_keys=true) }}", '{\n "a": "é",\n "b": 1\n}'),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "0134",
        ),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", "aHi <b>b"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ dict(a=1)['a'] }}{{ thinking }}{{ add_generation_prompt }}", "1yesTrue"),
        ("{{ '%05d' % 7 }}{{ '{:>4}'.format('x') }}{{ 'a' * 3 }}{{ 'x'.ljust(3) }}|{{ 'x'|center(3) }}", "00007   xaaax  | x "),
        ("{{ tools }}{{ documents }}", "NoneNone"),
    ],
)
def test_templates_find_what_they_expect(template: str, text: str) -> None:
    assert render(template, thinking="yes") == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ (messages|attr('__class__')).__mro__ }}",
        "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ namespace.__init__.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum(3) }}",
    ],
)
def test_hostile_templates_reach_no_attribute(template: str) -> None:
    with pytest.raises(ValueError, match="refused"):
        render(template)
    assert MESSAGES == [{"role": "user", "content": "Hi <b>"}]


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * [1] }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a' | center(10**9) }}",
        "{{ 'a' | indent(10**9) }}",
        "{{ [1] | slice(10**9) | list }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**9) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x='a' * 1000) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaa' * 999 }}{% endfor %}",
    ],
)
def test_hostile_templates_make_nothing_huge(template: str) -> None:
    with pytest.raises(ValueError, match="refused") as caught:
        render(template)
    assert "\n" not in str(caught.value)


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(ValueError, match="only user and assistant"):
        render("{{ raise_exception('only user and assistant') }}")
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate({"default": "{% if %}"})


def test_templates_are_found_where_models_keep_them(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}one"}))
    assert chat(tmp_path).render(MESSAGES) == "<s>one"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert chat(tmp_path).names == ("default", "tool_use")
    assert chat(tmp_path).render(MESSAGES) == "plain"
    assert chat(tmp_path).render(MESSAGES, tools=[{"name": "f"}]) == '[{"name": "f"}]'
    assert chat(tmp_path).render(MESSAGES, tools=[{"name": "f"}], name="default") == "plain"
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ documents | length }}")
    assert chat(tmp_path).render(MESSAGES) == "file"
    assert chat(tmp_path).render(MESSAGES, documents=[{}, {}], name="rag") == "2"
    with pytest.raises(ValueError, match="no such template"):
        chat(tmp_path).render(MESSAGES, name="other")
    config.write_text(json.dumps({"chat_template": [{"name": "default"}]}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        chat(tmp_path)


def chat(folder: Path) -> ChatTemplate:
    found = ChatTemplate.load(folder)
    assert found is not None
    return found

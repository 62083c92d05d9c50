"""Chat templates: messages to prompt text by a model's own Jinja template, which is code from strangers and is run in a sandbox.

This file knows no tokenizer and no model. Rendered text carries its own special tokens: encode it with
`add_special_tokens=False`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, final

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from fewstep.text.tokenizer import CONFIG_FILE, SPECIAL_TOKENS, read_settings, setting

MAX_WIDTH = 100_000
"""The largest width or count a template may hand to a string method or a filter (Jinja's own limit for `range`)."""
MAX_POWER = 64
"""The largest base and exponent of `**`."""
MAX_OUTPUT = 1 << 24
"""The longest text (or list) a template may make, in characters (or entries)."""

_WIDTH_FILTERS = ("batch", "center", "indent", "slice", "tojson", "wordwrap")
_WIDE = re.compile(r"\d{6,}|%[^a-zA-Z%]*\*|\{[^{}]*\{")  # a width of six digits, or one that is computed


@final
class ChatTemplate:
    """A model's chat templates by name, compiled in a sandbox, with the special tokens they may name (`bos_token`, ...).

    A template reaches no attribute that begins with an underscore, changes no list or dict, and no range, repetition, sum,
    power, width or output of it passes this file's limits. Joins and replacements can still grow fast: give templates you do
    not trust a process of their own.
    Raises ValueError for a template that does not compile.
    """

    def __init__(self, templates: Mapping[str, str], tokens: Mapping[str, str] | None = None) -> None:
        environment = _Sandbox()
        self._tokens = dict(tokens or {})
        try:
            self._templates = {name: environment.from_string(source) for name, source in templates.items()}
        except TemplateError as error:
            raise ValueError(f"chat_template: does not compile ({_first_line(error)}); correct the template") from None

    @classmethod
    def load(cls, directory: Path | str) -> "ChatTemplate | None":
        """The templates in a model's folder, or None if it has none.

        Read from `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, else from `chat_template` (text, or a list of
        `name` and `template`) in `tokenizer_config.json`. Raises ValueError for a malformed file or template.
        """
        folder = Path(directory)
        found = _from_settings(read_settings(folder / CONFIG_FILE).get("chat_template"), folder / CONFIG_FILE)
        files = {"default": folder / "chat_template.jinja"}
        files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        found |= {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
        tokens = {field: token for field in SPECIAL_TOKENS if (token := setting(folder, field)) is not None}
        return cls(found, tokens) if found else None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        name: str | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of `messages` (each with `role` and `content`).

        `tools` are JSON schemas; `add_generation_prompt` opens the assistant's turn; `values` are further variables of the
        template (e.g. `enable_thinking`); `name` chooses a template: by default "tool_use" if there are tools and it exists,
        else "default". Raises ValueError for an unknown name, and with the template's own words if it refuses the messages.
        """
        template = self._templates.get(self._choose(name, tools))
        if template is None:
            raise ValueError(f"chat_template={name or 'default'!r}: no such template; this model has: {', '.join(self.names)}")
        given = {"messages": messages, "tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        pieces: list[str] = []
        size = 0
        try:
            for piece in template.generate({**self._tokens, **given, **(values or {})}):
                size += len(piece)
                _bounded(size, MAX_OUTPUT)
                pieces.append(piece)
        except Exception as error:  # a stranger's code: whatever it raises is the template's refusal
            raise ValueError(f"chat_template: refused these messages ({_first_line(error)}); correct them") from None
        return "".join(pieces)

    def _choose(self, name: str | None, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if name is not None:
            return name
        return "tool_use" if tools and "tool_use" in self._templates else "default"


@final
class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the functions Hugging Face gives to templates, and with bounds on what one operation may make."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        for name in _WIDTH_FILTERS:
            self.filters[name] = _guarded(self.filters[name], lambda arguments: _narrow(arguments[1:]))
        self.filters["format"] = _guarded(self.filters["format"], _narrow_format)
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _dict, "namespace": _Namespace}
        del self.globals["lipsum"]  # text of any length from one number

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _bounded(max(abs(left), abs(right)), MAX_POWER)
        elif operator == "%" and isinstance(left, str):
            _narrow_format((left,))
        elif operator == "*":
            _bounded(_length(left, count=right) + _length(right, count=left), MAX_OUTPUT)
        elif operator == "+":
            _bounded(_length(left) + _length(right), MAX_OUTPUT)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # Jinja's names: a template's own keywords may be called `self` or `context`.
        method = getattr(__obj, "__wrapped__", __obj)  # a sandboxed `str.format` wraps the method
        if isinstance(owner := getattr(method, "__self__", None), str):
            if method.__name__ in ("format", "format_map"):
                _narrow_format((owner,))
            else:
                _narrow(args)
        return super().call(__context, __obj, *args, **kwargs)


@final
class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training; here the body alone counts."""

    tags = {"generation"}  # noqa: RUF012 (Jinja asks for a set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@final
class _Namespace(Namespace):
    """A namespace that refuses names that begin with an underscore, by which Python's internals would be reached."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`: templates may use that name
        values = dict(*args[1:], **kwargs)
        for name in values:
            _public(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def _guarded(function: Callable[..., Any], check: Callable[[Sequence[Any]], None]) -> Callable[..., Any]:
    @wraps(function)  # keeps Jinja's marks on the function
    def guarded(*args: Any, **kwargs: Any) -> Any:
        check((*args, *kwargs.values()))
        return function(*args, **kwargs)

    return guarded


def _narrow(arguments: Sequence[Any]) -> None:
    for argument in arguments:
        if isinstance(argument, int):
            _bounded(argument, MAX_WIDTH)


def _narrow_format(arguments: Sequence[Any]) -> None:
    if _WIDE.search(str(arguments[0])):
        raise SecurityError(f"the format {str(arguments[0])[:40]!r} makes text too wide")


def _bounded(size: float, limit: int) -> None:
    if size > limit:
        raise SecurityError(f"the template makes something of size {size}, more than {limit}")


def _length(value: Any, *, count: Any = 1) -> int:
    return len(value) * count if isinstance(value, str | bytes | list | tuple) and isinstance(count, int) else 0


def _public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names may not begin with an underscore")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(format_: str) -> str:
    return datetime.now().strftime(format_)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)  # the type itself would hand out its attributes


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML, which is wrong in a prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _from_settings(value: object, file: Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else [value]
    found: dict[str, str] = {}
    for entry in entries:
        match entry:
            case {"name": str(name), "template": str(template)}:
                found[name] = template
            case _:
                raise ValueError(f"chat_template in {str(file)!r}: expected text or a list of name and template; correct it")
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

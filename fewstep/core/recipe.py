"""Configs and recipes: what is built, from which numbers, written down so that it can be built again.

A `Config` is a frozen, keyword-only record with small defaults that work; every registry maps a technique's name to its
config class. A `Recipe` is a named set of sections, each one config chosen from a registry. This file knows no technique:
the registries are handed in.
"""

import difflib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, final

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializeAsAny,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

T = TypeVar("T")
C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """The frozen, keyword-only base of every registry class; unknown keys are refused with a suggestion.

    `kind` is the registry name, `source` the paper with its arXiv id, `claims` the headline claims that
    `fewstep reproduce` can measure. A config serialises with its `kind`, so that it can be read back through a registry.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    kind: ClassVar[str] = ""
    source: ClassVar[str] = ""
    claims: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _suggest(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        if values.get("kind", cls.kind) != cls.kind:
            raise ValueError(f"kind={values['kind']!r}: this is {cls.kind!r}; leave it out or correct it")
        values = {key: value for key, value in values.items() if key != "kind"}
        unknown = [key for key in values if key not in cls.model_fields]
        if unknown:
            raise ValueError(f"{unknown[0]}: no such field; {suggestion(unknown[0], list(cls.model_fields))}")
        return values

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        fields = handler(self)
        return {"kind": self.kind, **fields} if self.kind else fields


def suggestion(name: str, known: Sequence[str]) -> str:
    """The next move for a misspelt `name`: the nearest known name, or the list of all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(sorted(known)) or '(none)'}"


def lookup(registry: Mapping[str, T], name: str, field: str) -> T:
    """The entry `name` of a registry. Raises ValueError that names the field and suggests the nearest entry."""
    if name not in registry:
        raise ValueError(f"{field}={name!r}: not known; {suggestion(name, list(registry))}")
    return registry[name]


def resolve(value: Any, registry: Mapping[str, type[Config]], field: str) -> Config:
    """A config from a registry name, a mapping with `kind`, or a config itself. Raises ValueError for anything else."""
    if isinstance(value, Config):
        return value
    if isinstance(value, str):
        return parse(lookup(registry, value, field), {}, field)
    if isinstance(value, Mapping) and isinstance(value.get("kind"), str):
        return parse(lookup(registry, value["kind"], f"{field}.kind"), value, field)
    raise ValueError(f"{field}={value!r}: expected a name or a table with `kind`; known kinds: {', '.join(sorted(registry))}")


def choice(registry: Callable[[], Mapping[str, type[Config]]], field: str) -> Any:
    """The annotation of a config field that holds any config of `registry`, e.g. `mixer: choice(lambda: MIXERS, "mixer")`."""
    return Annotated[SerializeAsAny[Config], BeforeValidator(lambda value: resolve(value, registry(), field))]


def parse(kind: type[C], values: Mapping[str, Any], field: str = "") -> C:
    """`kind(**values)` with pydantic's report turned into one line. Raises ValueError: field, value, what was expected."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError(_one_line(error.errors()[0], field)) from None


def _one_line(first: ErrorDetails, field: str) -> str:
    place = ".".join(str(part) for part in (*((field,) if field else ()), *first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and not first["loc"]:
        return f"{place}.{message}" if place else message
    name = next((part for part in reversed(first["loc"]) if isinstance(part, str)), "")
    if first["type"] == "value_error" and message.startswith(
        (f"{name}.", f"{name}=")
    ):  # from a config within, which named its field
        return place + message.removeprefix(name)
    if first["type"] == "missing":
        return f"{place}: missing; give it a value"
    return f"{place}={first['input']!r}: {message[0].lower()}{message[1:]}"


@final
class Recipe(BaseModel):
    """A named set of configs, one per section, that a run is built from and that is saved with its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sections: dict[str, SerializeAsAny[Config]]

    @classmethod
    def load(
        cls,
        source: Path | str,
        overrides: Mapping[str, object] | None = None,
        *,
        registries: Mapping[str, Mapping[str, type[Config]]],
    ) -> Self:
        """Read a recipe from a TOML or JSON file and apply dotted overrides such as `{"optim.lr": 3e-4}`.

        `registries` maps a section's name to the configs it may hold; a section left out takes the first entry's defaults.
        Raises ValueError (field, value, next move) for an unreadable file, an unknown section, kind or field, or a bad value.
        """
        path = Path(source)
        values = _read(path)
        for key, value in (overrides or {}).items():
            _set(values, key, value)
        name = str(values.pop("name", path.stem))
        return cls.from_values(name, values, registries=registries)

    @classmethod
    def from_values(cls, name: str, values: Mapping[str, Any], *, registries: Mapping[str, Mapping[str, type[Config]]]) -> Self:
        """The recipe of nested plain `values` (as read from a file). Raises ValueError as `load` does."""
        for section in values:
            lookup(registries, section, "section")
        sections: dict[str, Config] = {}
        for section, registry in registries.items():
            fields = values.get(section, {})
            if isinstance(fields, Mapping) and "kind" not in fields:
                fields = {"kind": next(iter(registry)), **fields}
            sections[section] = resolve(fields, registry, section)
        return cls(name=name, sections=sections)

    def __getitem__(self, section: str) -> Config:
        return self.sections[section]

    def dump(self) -> str:
        """The recipe as JSON text that `load` reads back to an equal recipe."""
        return json.dumps(
            {"name": self.name, **{key: value.model_dump(mode="json") for key, value in self.sections.items()}}, indent=2
        )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"recipe={str(path)!r}: no such file; give the path of a .toml or .json recipe")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"recipe={str(path)!r}: not valid {path.suffix[1:] or 'TOML'} ({error}); correct the file") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"recipe={str(path)!r}: expected a table of sections, got {type(values).__name__}; see the shipped recipes"
        )
    return values


def _set(values: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    if not parents:
        raise ValueError(f"override {key!r}: expected section.field, e.g. optim.lr=3e-4")
    table = values
    for parent in parents:
        inner = table.setdefault(parent, {})
        if isinstance(inner, str):
            inner = table[parent] = {"kind": inner}
        if not isinstance(inner, dict):
            raise ValueError(f"override {key!r}: {parent!r} is not a table; set the whole of it instead")
        table = inner
    table[last] = value

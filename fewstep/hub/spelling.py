"""A key of a config.json: what it must be, and what its absence means. This file knows no family."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

_NEEDED: Any = object()
_WORDS: Mapping[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@final
@dataclass(frozen=True)
class Key:
    """`name` holds a `kind` of value (an int from `least`, a float above 0, both up to `most`), or is left out for `default`.

    null is taken if `nullable`, or where it is the default.
    `words`: those of config.json and what they are called here; the first of several for the same is written.
    """

    name: str
    kind: type[int] | type[float] | type[bool] | type[str]
    default: Any = _NEEDED
    nullable: bool = False
    least: int = 1
    most: float = 1e18
    words: Mapping[str, str] | None = None

    def read(self, values: Mapping[str, Any]) -> Any:
        """The value in `values`. Raises ValueError: key, value, what was expected."""
        value = values.get(self.name, self.default)
        if value is _NEEDED:
            raise ValueError(f"{self.name}: missing; this config.json is not whole, download it again")
        if value is None and (self.nullable or self.default is None):
            return None
        return self._checked(value)

    def write(self, value: Any) -> Any:
        """What `read` reads as `value`."""
        return next((theirs for theirs, ours in (self.words or {}).items() if ours == value), value)

    def _checked(self, value: Any) -> Any:
        if self.words is not None:
            if not isinstance(value, str) or value not in self.words:
                raise ValueError(f"{self.name}={value!r}: not supported; fewstep has {', '.join(self.words)}")
            return self.words[value]
        accepted = (int, float) if self.kind is float else self.kind
        if not isinstance(value, accepted) or isinstance(value, bool) is not (self.kind is bool):
            raise ValueError(f"{self.name}={value!r}: expected {_WORDS[self.kind]}")
        number: Any = value
        if self.kind is int and not self.least <= number <= self.most:
            raise ValueError(f"{self.name}={value}: expected {_WORDS[int]} from {self.least} to {self.most:g}")
        if self.kind is float and not 0 < number <= self.most:
            raise ValueError(f"{self.name}={value}: expected a number above 0, up to {self.most:g}")
        return value

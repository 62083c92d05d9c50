"""A key of a config.json: what it must be, and what its absence means. This file knows no family."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

_NEEDED: Any = object()
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@final
@dataclass(frozen=True)
class Key:
    """`name` holds a `type` (numbers from `least` to `most`; null only if `nullable`), `default` where it is left out.

    `values`: the words of config.json and what they are called here; the first of several for the same is written.
    """

    name: str
    type: type[int] | type[float] | type[bool] | type[str]
    default: Any = _NEEDED
    nullable: bool = False
    least: int = 1
    most: float = math.inf
    values: Mapping[str, str] = MappingProxyType({})

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
        return next((theirs for theirs, ours in self.values.items() if ours == value), value)

    def _checked(self, value: Any) -> Any:
        if self.values:
            if not isinstance(value, str) or value not in self.values:
                raise ValueError(f"{self.name}={value!r}: not supported; fewstep has {', '.join(self.values)}")
            return self.values[value]
        wanted = (int, float) if self.type is float else self.type
        if not isinstance(value, wanted) or isinstance(value, bool) is not (self.type is bool):
            raise ValueError(f"{self.name}={value!r}: expected {_WORDS[self.type]}")
        if self.type is int and not self.least <= value <= self.most:
            raise ValueError(f"{self.name}={value!r}: expected {_WORDS[int]} from {self.least} to {self.most}")
        if self.type is float and not 0 < value < self.most:
            raise ValueError(f"{self.name}={value!r}: expected a number above 0")
        return value

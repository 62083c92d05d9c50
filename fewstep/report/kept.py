"""What a race has written down, for one that goes on in the same folder. This file knows no race."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

RECORD = "race.json"
R = TypeVar("R")


def kept(folder: Path, own: Mapping[str, Any], free: Collection[str], read: Callable[[dict[str, Any]], R]) -> R | None:
    """What `read` makes of the record in `folder` if it was made under the circumstances `own`, `free` ones aside; None for none.

    Raises ValueError for a damaged record, or a race under other circumstances.
    """
    if not (folder / RECORD).is_file():
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        before = record["setting"]
        other = [key for key, value in own.items() if key not in free and before[key] != value]
        if not other:
            return read(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out={str(folder)!r}: race.json is damaged ({error}); remove it or choose another folder") from None
    told = ", ".join(f"{key}={before[key]!r}" for key in other)
    raise ValueError(f"out={str(folder)!r}: holds a race with {told}; race so again, or choose another folder")

"""A text on disk and the order of its places by what comes before them: where a context's longest ending occurs, what follows.

A directory holds `corpus.json`, `tokens.bin` (the text) and `order.bin` (the places), raw little-endian 32-bit integers that are
memory-mapped. This file knows tokens; it knows no tokenizer and no model.
"""

from __future__ import annotations

import json
import struct
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

HEADER, TOKENS, ORDER = "corpus.json", "tokens.bin", "order.bin"
_STORED = np.dtype("<u4")


@final
class Header(BaseModel):
    """What `corpus.json` says: the number of `tokens`, all below `vocab`, sorted by the `reach` tokens that end at each place."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["fewstep-corpus-1"] = "fewstep-corpus-1"
    vocab: int = Field(ge=1, lt=1 << 31)
    tokens: int = Field(ge=1, lt=1 << 31)
    reach: int = Field(ge=1, le=64)


def write_corpus(directory: Path | str, tokens: NDArray[np.integer[Any]], vocab: int, reach: int = 16) -> None:
    """Write `tokens` [N], documents one after the other each with its end-of-text token, as a corpus in `directory`.

    `reach`: contexts are told apart by their last `reach` tokens. Raises ValueError for no tokens, or one outside 0..vocab-1.
    Cost: 24 bytes of memory and about 2 us per token. The header is written last, so that a half-written corpus is none.
    """
    if not len(tokens):
        raise ValueError("tokens=[]: empty; a corpus needs at least one token")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
        raise ValueError(f"tokens: {int(tokens.min())}..{int(tokens.max())} is outside 0..{vocab - 1}; give the right vocab")
    header = Header(vocab=vocab, tokens=len(tokens), reach=reach)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEADER).unlink(missing_ok=True)
    tokens.astype(_STORED).tofile(folder / TOKENS)
    places_by_past(tokens, reach).astype(_STORED).tofile(folder / ORDER)
    (folder / HEADER).write_text(header.model_dump_json(indent=1), encoding="utf-8")


def places_by_past(tokens: NDArray[np.integer[Any]], reach: int) -> NDArray[np.int64]:
    """The places 0..N-1 in the order of the `reach` tokens that end there, read backwards; equal ones by place.

    Prefix doubling (Manber & Myers 1990) cut off at `reach`. Cost: log2(reach) + 1 sorts.
    """
    count = len(tokens)
    rank, known = tokens.astype(np.int64) + 1, 1  # 0: before the text
    while True:
        order = np.argsort(rank, kind="stable")
        if known >= reach:
            return order
        ranked = rank[order]
        dense = np.empty(count, dtype=np.int64)
        dense[order] = np.cumsum(np.diff(ranked, prepend=ranked[:1] - 1) != 0)
        step = min(known, reach - known)  # so that the last round reaches no further
        earlier = np.zeros(count, dtype=np.int64)
        earlier[step:] = dense[:-step]
        rank, known = dense * (count + 1) + earlier, known + step


@final
class Corpus:
    """A corpus, memory-mapped.

    The text is stored as little-endian integers, so the bytes before a place read backwards are its past as big-endian ones,
    last token first: bytes compare as the pasts do, and a search needs no array. An order that is not one, as a foreign file may
    hold, costs good drafts and nothing else. Cost: three binary searches per lookup, about 10 us each in ten million tokens.
    """

    def __init__(self, directory: Path | str) -> None:
        """Raises ValueError for files that are missing, malformed, truncated or hold what the header rules out."""
        folder = Path(directory)
        self.header = _header(folder)
        tokens = _mapped(folder, TOKENS, self.header.tokens, self.header.vocab)
        order = _mapped(folder, ORDER, self.header.tokens, self.header.tokens)
        self._text = tokens.data.cast("B")
        self._order = order.astype(np.uint32, copy=False).data
        self._reach = 4 * self.header.reach  # bytes

    def lookup(
        self, context: Sequence[int], *, least: int, depth: int, occurrences: int
    ) -> tuple[int, Mapping[tuple[int, ...], int]]:
        """The length of the longest ending of `context` in the corpus, and its continuations there with their counts.

        None if it is shorter than `least`. Of more than `occurrences` that many are looked at, evenly spread over their order,
        each followed for `depth` tokens or to the end of the text.
        """
        last = context[-self.header.reach :]
        past = struct.pack(f">{len(last)}I", *reversed(last))
        place = bisect_left(self._order, past, key=self._past)
        length = max(_shared(past, self._past(end)) for end in self._order[max(0, place - 1) : place + 1])
        if length < max(1, least):
            return length, {}
        shared = past[: 4 * length]
        first = bisect_left(self._order, shared, 0, place, key=self._past)
        behind = bisect_left(self._order, shared + b"\xff" * 4, place, key=self._past)  # no token has this number
        found = behind - first
        looked = min(found, occurrences)
        counts = Counter(self._following(self._order[first + i * found // looked], depth) for i in range(looked))
        return length, {struct.unpack(f"<{len(x) // 4}I", x): count for x, count in counts.items()}

    def nbytes(self) -> int:
        """Bytes mapped."""
        return self._text.nbytes + self._order.nbytes

    def _past(self, end: int) -> bytes:
        stop = 4 * end + 4
        start = stop - self._reach
        return self._text[start if start > 0 else 0 : stop].tobytes()[::-1]

    def _following(self, end: int, depth: int) -> bytes:
        return self._text[4 * end + 4 : 4 * (end + depth) + 4].tobytes()


def _shared(one: bytes, other: bytes) -> int:
    """The number of tokens that two pasts share, from the last backwards."""
    most = min(len(one), len(other)) // 4
    return next((i for i in range(most) if one[4 * i : 4 * i + 4] != other[4 * i : 4 * i + 4]), most)


def _header(folder: Path) -> Header:
    again = "write the corpus again"
    try:
        return Header.model_validate(json.loads((folder / HEADER).read_bytes()))
    except OSError:
        raise ValueError(f"corpus={str(folder)!r}: no {HEADER} in it; give the directory of a corpus") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "header"
        raise ValueError(f"corpus={str(folder)!r}: {place} in {HEADER}: {first['msg']}; {again}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"corpus={str(folder)!r}: {HEADER} is not JSON; {again}") from None


def _mapped(folder: Path, name: str, count: int, below: int) -> NDArray[np.uint32]:
    """The `count` integers of a file, all under `below`."""
    file = folder / name
    size = file.stat().st_size if file.is_file() else 0
    if size != count * _STORED.itemsize:
        raise ValueError(
            f"corpus={str(folder)!r}: {name} has {size} bytes where the header says {count * _STORED.itemsize}, so it is "
            "truncated or foreign; write the corpus again"
        )
    values: NDArray[np.uint32] = np.memmap(file, dtype=_STORED, mode="r", shape=(count,))
    if int(values.max()) >= below:
        raise ValueError(
            f"corpus={str(folder)!r}: {int(values.max())} in {name} is outside 0..{below - 1}; write the corpus again"
        )
    return values

"""Tokens on disk, memory-mapped: flat little-endian files and one JSON index, whose replacement is the moment they exist.

This file knows neither the corpus nor the tokenizer but by their hashes, which it keeps.
"""

import os
import zlib
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

INDEX = "index.json"
SHARD_TOKENS = 1 << 27
"""Tokens in a shard at most, unless one document is longer."""


@final
class ShardEntry(BaseModel):
    """One file: its token count, the length of each document in it (end-of-text counted) and its CRC-32."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    tokens: int
    documents: tuple[int, ...]
    crc32: int


@final
class PartEntry(BaseModel):
    """One part of the corpus: its shards and the UTF-8 bytes of its text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    shards: tuple[ShardEntry, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(len(shard.documents) for shard in self.shards)


@final
class Index(BaseModel):
    """The contents of a token cache. `source`, `settings` and `tokenizer` are sha256 hashes of what the tokens were made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["fewstep-tokens-1"] = "fewstep-tokens-1"
    dtype: Literal["uint16", "uint32"]
    source: str
    settings: str
    tokenizer: str
    train: PartEntry
    validation: PartEntry


def token_dtype(vocab: int) -> Literal["uint16", "uint32"]:
    """The narrowest type that holds every id below `vocab`."""
    return "uint16" if vocab <= 1 << 16 else "uint32"


@final
class ShardWriter:
    """Writes one part's documents as `NAME-00000.bin`, ...; nothing counts until an index names them.

    `dtype` is `token_dtype` of the vocabulary; a new shard starts when the next document would exceed `limit` tokens.
    """

    def __init__(self, directory: Path, name: str, dtype: str, *, limit: int = SHARD_TOKENS) -> None:
        self._directory, self._name, self._dtype, self._limit = directory, name, np.dtype(dtype).newbyteorder("<"), limit
        self._pending: list[NDArray[np.unsignedinteger]] = []
        self._pending_tokens = 0
        self._entries: list[ShardEntry] = []
        self._bytes = 0

    def add(self, tokens: Sequence[int], text_bytes: int) -> None:
        """Append one document, end-of-text included, whose text had `text_bytes` UTF-8 bytes."""
        if self._pending and self._pending_tokens + len(tokens) > self._limit:
            self._write()
        self._pending.append(np.asarray(tokens, dtype=self._dtype))
        self._pending_tokens += len(tokens)
        self._bytes += text_bytes

    def finish(self) -> PartEntry:
        """Write what is pending and return the part's entry for the index."""
        if self._pending:
            self._write()
        return PartEntry(bytes=self._bytes, shards=tuple(self._entries))

    def _write(self) -> None:
        content = np.concatenate(self._pending).tobytes()
        file = self._directory / f"{self._name}-{len(self._entries):05d}.bin"
        write_atomically(file, content)
        lengths = tuple(len(document) for document in self._pending)
        entry = ShardEntry(file=file.name, tokens=self._pending_tokens, documents=lengths, crc32=zlib.crc32(content))
        self._entries.append(entry)
        self._pending, self._pending_tokens = [], 0


def write_atomically(file: Path, content: bytes) -> None:
    """Write `content` so that `file` holds either its old content or all of the new, whatever happens meanwhile."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def read_index(directory: Path) -> Index:
    """The index in `directory`. Raises ValueError for a missing or malformed one."""
    file = directory / INDEX
    if not file.is_file():
        raise ValueError(f"directory={str(directory)!r}: no token index in it; prepare the data first")
    try:
        return Index.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or INDEX
        raise ValueError(f"directory={str(directory)!r}: {place}: {first['msg']}; delete the folder and prepare again") from None


@final
class Shard:
    """One memory-mapped file of documents; `tokens` [N] as stored, `ends` [documents] int64 the position after each document."""

    def __init__(self, directory: Path, entry: ShardEntry, dtype: str) -> None:
        file = directory / entry.file
        stored = np.dtype(dtype).newbyteorder("<")
        _refuse_damage(file, entry, stored.itemsize)
        self.tokens: NDArray[np.unsignedinteger] = np.memmap(file, dtype=stored, mode="r", shape=(entry.tokens,))
        self.ends: NDArray[np.int64] = np.fromiter(accumulate(entry.documents), dtype=np.int64, count=len(entry.documents))

    def __len__(self) -> int:
        return len(self.tokens)


def open_part(directory: Path, part: PartEntry, dtype: str) -> tuple[Shard, ...]:
    """Map every shard of a part. Raises ValueError for one that is missing, truncated or of other content.

    Cost: reads each file once to check it, about a second per gigabyte.
    """
    return tuple(Shard(directory, entry, dtype) for entry in part.shards)


def _refuse_damage(file: Path, entry: ShardEntry, itemsize: int) -> None:
    again = "delete the folder and prepare again"
    if Path(entry.file).name != entry.file:
        raise ValueError(f"shard={entry.file!r}: not a plain file name; {again}")
    if not file.is_file():
        raise ValueError(f"shard={str(file)!r}: no such file; {again}")
    size, expected = file.stat().st_size, entry.tokens * itemsize
    if size != expected or sum(entry.documents) != entry.tokens:
        raise ValueError(
            f"shard={str(file)!r}: {size} bytes where the index says {expected}, so it is truncated or foreign; {again}"
        )
    if _crc32(file) != entry.crc32:
        raise ValueError(f"shard={str(file)!r}: its checksum is not the index's, so it is damaged or foreign; {again}")


def _crc32(file: Path) -> int:
    total = 0
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 22), b""):
            total = zlib.crc32(block, total)
    return total


def remove_unnamed(directory: Path, index: Index) -> None:
    """Delete the shards in `directory` that `index` does not name: what an interrupted or replaced preparation left."""
    named: Iterable[str] = {shard.file for part in (index.train, index.validation) for shard in part.shards}
    for file in directory.glob("*-[0-9][0-9][0-9][0-9][0-9].bin"):
        if file.name not in named:
            file.unlink()

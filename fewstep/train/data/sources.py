"""Where documents come from: files, folders, JSONL and Parquet; and a corpus, which is documents in two parts.

This file knows no tokenizer and no token.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, final

from pydantic import Field

from fewstep.core.recipe import Config
from fewstep.train.data.grouping import Document, hold_out, near_duplicates

Part = Literal["train", "validation"]
PARTS: tuple[Part, Part] = ("train", "validation")


@final
class Corpus:
    """Documents in two parts, read anew at each iteration; near-duplicates share a part.

    `documents` starts a fresh iteration (same documents, same order) each time it is called; `held_out` is the share of
    groups held out for validation, in (0, 1). A corpus of one document holds out its tail.
    Raises ValueError for an empty corpus or one whose documents are all near-duplicates of each other.
    """

    def __init__(self, documents: Callable[[], Iterator[Document]], held_out: float) -> None:
        self._documents, self._fraction = documents, held_out

    def documents(self, part: Part) -> Iterator[Document]:
        """The documents of one part, in the order of the source."""
        wanted = part == "validation"
        return (document for document in self._all() if (document.name in self.held_out) == wanted)

    def hashes(self, part: Part) -> dict[str, str]:
        """The sha256 of each document of a part, by name: what a model card lists."""
        return {document.name: hashlib.sha256(document.text.encode()).hexdigest() for document in self.documents(part)}

    @cached_property
    def hash(self) -> str:
        """sha256 over every document's name and content, in order, and the share held out."""
        total = hashlib.sha256(repr(self._fraction).encode())
        for document in self._documents():
            for field in (document.name, document.text):
                total.update(hashlib.sha256(field.encode()).digest())
        return total.hexdigest()

    @cached_property
    def held_out(self) -> frozenset[str]:
        """The names of the documents held out."""
        return hold_out(near_duplicates(self._all()), self._fraction)

    def _all(self) -> Iterator[Document]:
        documents = self._documents()
        first, second = next(documents, None), next(documents, None)
        if first is None:
            raise ValueError("data: the corpus has no text; name files that hold some")
        yield from (first, second, *documents) if second is not None else self._halves(first)

    def _halves(self, document: Document) -> Iterator[Document]:
        # At the last line end, so that no line is known in part.
        cut = document.text.rfind("\n", 0, round(len(document.text) * (1 - self._fraction))) + 1
        if cut:
            yield Document(document.name, document.text[:cut])
        yield Document(f"{document.name} (tail)", document.text[cut:])


class DataConfig(Config):
    """The base of the data configs: a source of documents, split into training and validation by groups of near-duplicates."""

    held_out: float = Field(default=0.04, gt=0, lt=1)

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Every document of the source, always in the same order, names distinct, none empty."""

    def build(self) -> Corpus:
        """The corpus of this source. Cost: nothing is read until it is iterated."""
        return Corpus(self.documents, self.held_out)


@final
class TextConfig(DataConfig):
    """Documents from files and folders: text, `.jsonl` and `.parquet`.

    `paths` are files, and folders that are searched with `pattern`; `field` names the text of a JSON line, `column` that of a
    Parquet row. Text is UTF-8 and kept byte for byte. Documents that hold only white space are left out.
    Raises ValueError for a missing path, text that is not UTF-8, a malformed line, a missing field or column.
    """

    kind: ClassVar[str] = "text"

    paths: tuple[Path, ...] = Field(default=(), description="files and folders")
    pattern: str = Field(default="**/*.txt", min_length=1)
    field: str = Field(default="text", min_length=1)
    column: str = Field(default="text", min_length=1)

    def documents(self) -> Iterator[Document]:
        for file in self._files():
            if file.suffix == ".jsonl":
                yield from self._jsonl(file)
            elif file.suffix == ".parquet":
                yield from self._parquet(file)
            elif text := _nonblank(_decode(file.read_bytes(), file)):
                yield Document(file.as_posix(), text)

    def _files(self) -> list[Path]:
        if not self.paths:
            raise ValueError("data.paths=(): no text to train on; name files or folders")
        files: dict[Path, None] = {}
        for path in self.paths:
            if path.is_dir():
                inside = sorted(file for file in path.glob(self.pattern) if file.is_file())
                if not inside:
                    raise ValueError(
                        f"data.pattern={self.pattern!r}: matches no file in {str(path)!r}; give another, e.g. '**/*.py'"
                    )
                files.update(dict.fromkeys(inside))
            elif path.is_file():
                files[path] = None
            else:
                raise ValueError(f"data.paths={str(path)!r}: no such file or folder; correct the path")
        return list(files)

    def _jsonl(self, file: Path) -> Iterator[Document]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and (text := _nonblank(self._field(line, f"{file}:{number}"))):
                    yield Document(f"{file.as_posix()}:{number}", text)

    def _field(self, line: bytes, place: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"data.paths={place!r}: not valid JSON ({error}); correct that line") from None
        if not isinstance(record, dict) or not isinstance(record.get(self.field), str):
            names = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"data.field={self.field!r}: no such text in {place!r}, which has: {names}; name one of these")
        return str(record[self.field])

    def _parquet(self, file: Path) -> Iterator[Document]:
        table = _open_parquet(file)
        if self.column not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise ValueError(
                f"data.column={self.column!r}: no such column in {str(file)!r}, which has: {names}; name one of these"
            )
        number = 0
        for batch in table.iter_batches(columns=[self.column]):
            for text in batch.column(0).to_pylist():
                number += 1
                if text is not None and not isinstance(text, str):
                    raise ValueError(
                        f"data.column={self.column!r}: holds {type(text).__name__}, not text; name a column of strings"
                    )
                if text and _nonblank(text):
                    yield Document(f"{file.as_posix()}:{number}", text)


def _open_parquet(file: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"data.paths={str(file)!r}: reading Parquet needs pyarrow; pip install 'fewstep[parquet]'") from None
    try:
        return parquet.ParquetFile(file)
    except ArrowException as error:
        raise ValueError(f"data.paths={str(file)!r}: not a readable Parquet file ({error}); write it again") from None


def _decode(content: bytes, file: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.paths={str(file)!r}: not UTF-8 at byte {error.start}; convert the file or leave it out") from None


def _nonblank(text: str) -> str:
    return text if text.strip() else ""


def summary(corpus: Corpus) -> Mapping[str, int]:
    """The number of documents and of UTF-8 bytes of each part, for a run's log."""
    counts: dict[str, int] = {}
    for part in PARTS:
        sizes = [len(document.text.encode()) for document in corpus.documents(part)]
        counts |= {f"{part}_documents": len(sizes), f"{part}_bytes": sum(sizes)}
    return counts

"""Where documents come from: files, folders, JSONL and Parquet; and a corpus, which is documents in two parts.

This file knows no tokenizer and no token.
"""

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, final

from pydantic import Field

from fewstep.core.recipe import Config
from fewstep.training.data.grouping import Document, hold_out, near_duplicates

Part = Literal["train", "validation"]
PARTS: tuple[Part, Part] = ("train", "validation")

_SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON's escapes can write half a character


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
        yield from chain((first, second), documents) if second is not None else self._halves(first)

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
        for name, file in self._files().items():
            yield from (Document(f"{name}{place}", text) for place, text in self._texts(file) if text.strip())

    def _texts(self, file: Path) -> Iterator[tuple[str, str]]:
        if file.suffix == ".jsonl":
            return self._jsonl(file)
        return self._parquet(file) if file.suffix == ".parquet" else iter([("", _decode(file.read_bytes(), file))])

    def _files(self) -> dict[str, Path]:
        """The files by name. Names begin at the folder given, so that the split does not depend on where it lies."""
        if not self.paths:
            raise ValueError("data.paths=(): no text to train on; name files or folders")
        files: dict[str, Path] = {}
        for path in self.paths:
            for name, file in self._inside(path.resolve()):
                if files.setdefault(name, file) != file:
                    raise ValueError(f"data.paths={str(file)!r}: a second file named {name!r}; give the folder that holds both")
        return files

    def _inside(self, path: Path) -> Iterator[tuple[str, Path]]:
        if path.is_file():
            yield path.name, path
            return
        if not path.is_dir():
            raise ValueError(f"data.paths={str(path)!r}: no such file or folder; correct the path")
        found = sorted(file for file in path.glob(self.pattern) if file.is_file())
        if not found:
            raise ValueError(f"data.pattern={self.pattern!r}: matches no file in {str(path)!r}; give another, e.g. '**/*.py'")
        yield from ((file.relative_to(path.parent).as_posix(), file) for file in found)

    def _jsonl(self, file: Path) -> Iterator[tuple[str, str]]:
        with file.open("rb") as lines:
            yield from (
                (f":{number}", self._field(line, f"{file}:{number}")) for number, line in enumerate(lines, 1) if line.strip()
            )

    def _field(self, line: bytes, place: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"data.paths={place!r}: not valid JSON ({error}); correct that line") from None
        if not isinstance(record, dict) or not isinstance(record.get(self.field), str):
            names = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"data.field={self.field!r}: no such text in {place!r}, which has: {names}; name one of these")
        text = str(record[self.field])
        if _SURROGATE.search(text):
            raise ValueError(f"data.paths={place!r}: a lone surrogate, which no UTF-8 text holds; correct that line")
        return text

    def _parquet(self, file: Path) -> Iterator[tuple[str, str]]:
        table = _open_parquet(file)
        if self.column not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise ValueError(
                f"data.column={self.column!r}: no such column in {str(file)!r}, which has: {names}; name one of these"
            )
        rows = chain.from_iterable(batch.column(0).to_pylist() for batch in table.iter_batches(columns=[self.column]))
        for number, text in enumerate(rows):
            if not isinstance(text, str | None):
                raise ValueError(f"data.column={self.column!r}: holds {type(text).__name__}, not text; name a column of strings")
            yield f":{number}", text or ""


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

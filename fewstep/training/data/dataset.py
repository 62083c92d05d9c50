"""From a source to batches in one call, cached: documents, tokenizer, shards, loader.

This file knows the order of these steps and none of their methods.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from fewstep.core.objective import Batch
from fewstep.text.tokenizer import Tokenizer
from fewstep.training.data.bpe import BPEConfig
from fewstep.training.data.grouping import Document
from fewstep.training.data.loader import Loader, validation_batches
from fewstep.training.data.shards import (
    INDEX,
    Index,
    PartEntry,
    ShardWriter,
    open_part,
    read_index,
    remove_unnamed,
    token_dtype,
    write_atomically,
)
from fewstep.training.data.sources import Corpus, DataConfig, Part

TOKENIZER = "tokenizer"
Progress = Callable[[str], None]
"""Called with a line that says what happens next."""

_ENCODE_BYTES = 1 << 22


@final
class Dataset:
    """A tokenizer and the tokens of a corpus's two parts, memory-mapped from a prepared `directory`.

    Raises ValueError for a directory that was not prepared, or a damaged or foreign file in it.
    """

    def __init__(self, directory: Path | str) -> None:
        folder = Path(directory)
        self.index = read_index(folder)
        self.tokenizer = Tokenizer.load(folder / TOKENIZER)
        if self.tokenizer.hash != self.index.tokenizer:
            raise ValueError(
                f"directory={str(folder)!r}: its tokenizer is not the one that made its tokens; prepare it again elsewhere"
            )
        self._train, self._validation = (
            open_part(folder, part, self.index.dtype) for part in (self.index.train, self.index.validation)
        )

    @property
    def hash(self) -> str:
        """sha256 of all the tokens' identities: what a checkpoint records, so that a run resumes on its own data."""
        return hashlib.sha256(self.index.model_dump_json().encode()).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of validation text per token, end-of-text counted: bits per byte = nats per token / ln 2 / this."""
        return self.index.validation.bytes / self.index.validation.tokens

    def counts(self, vocab: int) -> Tensor:
        """[vocab] int64: how often each token occurs in the training part. Cost: reads it once."""
        found = torch.zeros(vocab, dtype=torch.int64)
        for shard in self._train:
            found += torch.from_numpy(np.bincount(shard.tokens, minlength=vocab))
        return found

    def train(self, batch: int, length: int, seed: int) -> Loader:
        """Training batches of `batch` rows of `length` tokens; see `Loader`."""
        return Loader(self._train, batch=batch, length=length, seed=seed)

    def validation(self, batch: int, length: int) -> Iterator[Batch]:
        """The held-out tokens exactly once; see `validation_batches`."""
        return validation_batches(self._validation, batch=batch, length=length, eos=_eos(self.tokenizer))


def prepare(
    data: DataConfig, tokenizer: BPEConfig | Tokenizer, directory: Path | str, progress: Progress | None = None
) -> Dataset:
    """The dataset of `data` in `directory`: made there, or opened if it was made there from the same text and settings.

    `tokenizer` is trained on the training part (a config) or used as it is (a tokenizer with an end-of-text token).
    An interrupted preparation leaves nothing that counts; the next one starts over.
    Raises ValueError for an empty corpus, and for a directory prepared from other text or settings, which is left as it is.
    Cost: reads the corpus three times at first (split, tokenizer, tokens), once later (to see that it is the same).
    """
    say = progress or (lambda line: None)
    folder, corpus = Path(directory), data.build()
    settings = _settings(tokenizer)
    if (folder / INDEX).is_file():
        index = read_index(folder)
        for field, found, wanted in (("text", index.source, corpus.hash), ("tokenizer", index.settings, settings)):
            if found != wanted:
                raise ValueError(
                    f"directory={str(folder)!r}: prepared from another {field}; give a new folder, or delete this one"
                )
        return Dataset(folder)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"splitting the documents: {len(corpus.held_out)} held out")
    if isinstance(tokenizer, Tokenizer):
        trained = tokenizer
    else:
        say(f"training a tokenizer of {tokenizer.vocab} tokens")
        trained = tokenizer.build(document.text for document in corpus.documents("train"))
    trained.save(folder / TOKENIZER)
    parts = {part: _write_part(corpus, part, trained, folder, say) for part in ("train", "validation")}
    index = Index(
        dtype=token_dtype(trained.vocab),
        source=corpus.hash,
        settings=settings,
        tokenizer=trained.hash,
        train=parts["train"],
        validation=parts["validation"],
    )
    remove_unnamed(folder, index)
    write_atomically(folder / INDEX, index.model_dump_json(indent=1).encode())
    return Dataset(folder)


def _settings(tokenizer: BPEConfig | Tokenizer) -> str:
    text = tokenizer.hash if isinstance(tokenizer, Tokenizer) else tokenizer.model_dump_json()
    return hashlib.sha256(text.encode()).hexdigest()


def _write_part(corpus: Corpus, part: Part, tokenizer: Tokenizer, folder: Path, say: Progress) -> PartEntry:
    writer, eos = ShardWriter(folder, part, token_dtype(tokenizer.vocab)), _eos(tokenizer)
    for texts in _chunks(corpus.documents(part)):
        for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
            writer.add([*ids, eos], len(text.encode()))
    entry = writer.finish()
    say(f"{part}: {entry.documents} documents, {entry.bytes} bytes, {entry.tokens} tokens")
    return entry


def _chunks(documents: Iterator[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    held = 0
    for document in documents:
        texts.append(document.text)
        held += len(document.text)
        if held >= _ENCODE_BYTES:
            yield texts
            texts, held = [], 0
    if texts:
        yield texts


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos is None:
        raise ValueError("tokenizer.eos=None: documents need an end-of-text token; name one in tokenizer_config.json")
    return tokenizer.eos

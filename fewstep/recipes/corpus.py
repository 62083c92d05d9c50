"""From text to a corpus for retrieval to look in, in the tokens of the model that is to be sped up.

This file knows documents, tokenizers and the corpus' writer; it knows no network.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from fewstep.core.recipe import parse, resolve
from fewstep.decode.drafters.corpus import write_corpus
from fewstep.models.model import Model
from fewstep.text.tokenizer import Tokenizer
from fewstep.training.data import DATA, StdlibConfig, TextConfig
from fewstep.training.data.grouping import Document

_BATCH = 64  # documents encoded together


def write_texts(
    model: Model, files: Sequence[Path], directory: Path, *, pattern: str = "**/*.txt", console: Console | None = None
) -> int:
    """Write `files` (folders are searched with `pattern`) as a corpus in `directory`; the number of its tokens.

    Without files it is what the model was trained on, if that is the standard library: the part for training, never what was held
    out. Each document ends with the end-of-text token, if the tokenizer has one. Raises ValueError for a model without a
    tokenizer, files that are missing or no text, or a folder that cannot be written.
    """
    if model.tokenizer is None:
        raise ValueError("model: has no tokenizer to read texts with; load it with its tokenizer.json")
    console = console or Console(stderr=True)
    documents = list(_documents(model, files, pattern))
    tokens = _encoded(documents, model.tokenizer, console)
    console.print(f"sorting {len(tokens)} tokens of {len(documents)} documents", highlight=False)
    try:
        write_corpus(directory, tokens, model.network.vocab)
    except OSError as error:
        raise ValueError(f"out={str(directory)!r}: cannot be written ({error.strerror}); give another folder") from None
    return len(tokens)


def _documents(model: Model, files: Sequence[Path], pattern: str) -> Iterator[Document]:
    if files:
        return parse(TextConfig, {"paths": files, "pattern": pattern}, "data").documents()
    data = model.recipe.get("data")
    if data is None or not isinstance(own := resolve(data, DATA, "data"), StdlibConfig):
        raise ValueError("files: none given, and the model was not trained on the standard library; name text files")
    return own.build().documents("train")


def _encoded(documents: Sequence[Document], tokenizer: Tokenizer, console: Console) -> NDArray[np.int64]:
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    parts, left = [], iter(track(documents, "encoding", console=console, transient=True, disable=not console.is_terminal))
    while batch := [document.text for document in islice(left, _BATCH)]:
        parts += [np.array(ids + end, dtype=np.int64) for ids in tokenizer.encode_documents(batch)]
    return cast(NDArray[np.int64], np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)

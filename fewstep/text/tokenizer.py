"""Text to token ids and back, over the `tokenizers` library: one file format, one content hash, unbroken streaming.

This file knows no chat format, no stop string and no model.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import tokenizers

FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SETTINGS = (CONFIG_FILE, "special_tokens_map.json")


@final
class Tokenizer:
    """A `tokenizers.Tokenizer` with its end-of-text and begin-of-text tokens; truncation and padding are switched off.

    `core` the tokenizer as read or trained; `bos` and `eos` are token strings of its vocabulary, or None.
    Raises ValueError for a token the vocabulary does not hold.
    """

    def __init__(self, core: tokenizers.Tokenizer, *, bos: str | None = None, eos: str | None = None) -> None:
        core.no_truncation()  # some published files carry a training length: silently losing text is never right
        core.no_padding()
        self._core = core
        self._names = {"bos": bos, "eos": eos}
        self.bos, self.eos = (self._id(field, token) for field, token in self._names.items())

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read `tokenizer.json` (`path` is that file or its folder) and the special tokens named by the settings beside it.

        Raises ValueError for a missing or malformed file.
        """
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(f"tokenizer={str(file)!r}: no such file; give a {FILE} or the folder that holds it")
        try:
            core = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise ValueError(
                f"tokenizer={str(file)!r}: not a readable {FILE} ({_first_line(error)}); download it again"
            ) from None
        return cls(core, bos=setting(file.parent, "bos_token"), eos=setting(file.parent, "eos_token"))

    def save(self, directory: Path | str) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into `directory` (made if missing)."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            (folder / name).write_text(text, encoding="utf-8")

    def files(self) -> dict[str, str]:
        """The text of each file that `save` writes, by name."""
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        tokens = {f"{field}_token": token for field, token in self._names.items()}
        return {FILE: self._core.to_str(pretty=True), CONFIG_FILE: json.dumps({**settings, **tokens}, indent=2)}

    @cached_property
    def vocab(self) -> int:
        """The number of ids: the largest one plus one, added tokens included."""
        return max(self._core.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def hash(self) -> str:
        """sha256 of the content: equal exactly when every text has the same ids and the special tokens agree."""
        content = {"core": json.loads(self._core.to_str()), **self._names}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False) -> list[int]:
        """The ids of `text`, by default as Hugging Face does.

        `add_special_tokens`: with those of the post-processor (begin-of-text in many models); a rendered chat has its own.
        `split_special_tokens`: special tokens written in `text` are ordinary text, as in documents, which are data.
        """
        core = self._plain if split_special_tokens else self._core
        return core.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text as data: nothing is added and nothing in it is special. In parallel."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        return [encoding.ids for encoding in self._core.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, with or without the special tokens among them."""
        return self._core.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> "TextStream":
        """A decoder that is fed one id at a time."""
        return TextStream(self, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token string, or None if the vocabulary lacks it."""
        return self._core.token_to_id(token)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        core = tokenizers.Tokenizer.from_str(self._core.to_str())
        core.encode_special_tokens = True
        return core

    def _id(self, field: str, token: str | None) -> int | None:
        found = None if token is None else self._core.token_to_id(token)
        if token is not None and found is None:
            raise ValueError(f"tokenizer.{field}={token!r}: not in the vocabulary; name one of its tokens, or none")
        return found


@final
class TextStream:
    """Text from ids that arrive one at a time: pieces join to `decode` of all ids, and a character is emitted only when complete.

    Cost: each id decodes the ids since the last complete character but one, so a constant for ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []  # the ids emitted last, as left context (decoders drop a leading space), then the pending ones
        self._emitted = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while a character is still incomplete."""
        self._ids.append(token)
        text = self._text(self._ids)
        return "" if text.endswith("\ufffd") else self._emit(text)

    def flush(self) -> str:
        """What is left when no id follows: an incomplete character becomes U+FFFD. The stream can be used again."""
        piece = self._emit(self._text(self._ids))
        self._ids, self._emitted = [], 0
        return piece

    def _emit(self, text: str) -> str:
        before = self._text(self._ids[: self._emitted])
        if len(text) > len(before):
            self._ids, self._emitted = self._ids[self._emitted :], len(self._ids) - self._emitted
        return text[len(before) :]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def setting(folder: Path, field: str) -> str | None:
    """The special token that the settings in `folder` name `field` (one of `SPECIAL_TOKENS`), or None."""
    for name in _SETTINGS:
        token = read_settings(folder / name).get(field)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            return content
    return None


def read_settings(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, or an empty one if there is no such file. Raises ValueError for anything else."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tokenizer={str(file)!r}: not valid JSON ({_first_line(error)}); download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"tokenizer={str(file)!r}: expected a JSON object, got {type(values).__name__}; download it again")
    return values


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

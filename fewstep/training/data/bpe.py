"""Byte-level BPE, trained: the tokenizer of models that start from nothing.

This file knows how Python source is cut before merging. It knows no corpus.
"""

from collections.abc import Iterable
from typing import ClassVar, final

import tokenizers
from pydantic import Field
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from fewstep.core.recipe import Config
from fewstep.text.tokenizer import Tokenizer

# Indentation stands alone, so that a prompt that begins or ends at a line or an indent is cut as in training; a word takes one
# symbol or space before it; every digit stands alone; symbols take the line end that follows them, e.g. "):\n".
_SPLIT = r"(?<![^\n])[ \t]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@final
class BPEConfig(Config):
    """Byte-level byte-pair encoding: any text has ids and comes back unchanged.

    `vocab` counts the 256 bytes and the end-of-text token `eos`.
    Source: Sennrich et al. 2016 (arXiv:1508.07909); bytes as symbols and a split before merging: GPT-2 (Radford et al. 2019).
    Differs: the split keeps indentation and digits apart (see this file's pattern).
    Cost: about 20 seconds for 30 MB on one core.
    """

    kind: ClassVar[str] = "bpe"
    source: ClassVar[str] = "arXiv:1508.07909"

    vocab: int = Field(default=2048, ge=257, le=1_000_000)
    eos: str = Field(default="<|endoftext|>", min_length=1)

    @property
    def identity(self) -> str:
        """All that the tokenizer comes from beside the texts: its fields and how text is cut."""
        return f"{self.model_dump_json()}{_SPLIT}"

    def build(self, texts: Iterable[str]) -> Tokenizer:
        """The tokenizer of `vocab` ids at most (fewer if the texts have no more pairs) trained on `texts`; deterministic."""
        core = tokenizers.Tokenizer(models.BPE())
        cut = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        core.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab, special_tokens=[self.eos], initial_alphabet=alphabet, show_progress=False
        )
        core.train_from_iterator(texts, trainer)
        return Tokenizer(core, eos=self.eos)

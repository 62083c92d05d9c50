"""What only a target can give to the training of its drafter: its tokenizer and its own generations.

This file holds the choices; the recipe's run, which has the target, carries them out. It knows no model.
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar, final

from pydantic import Field

from fewstep.core.recipe import Config, choice
from fewstep.text.tokenizer import Tokenizer
from fewstep.training.data.grouping import Document
from fewstep.training.data.sources import DataConfig, TextConfig
from fewstep.training.data.stdlib import StdlibConfig


@final
class TargetTokenizerConfig(Config):
    """The tokenizer of the model that a drafter is trained for."""

    kind: ClassVar[str] = "target"
    source: ClassVar[str] = "none: a drafter speaks its target's tokens"

    def build(self, texts: Iterable[str]) -> Tokenizer:
        """Raises ValueError: nothing is trained."""
        raise ValueError("tokenizer='target': there is no target; set model.kind='drafter', or tokenizer='bpe' to train one")


@final
class SelfDistilledConfig(DataConfig):
    """Texts that a model wrote itself: `count` pieces of `prompt_tokens` each, from `prompts`, continued by `new_tokens`.

    A drafter meets its target's own tokens, not a corpus's, so it learns from those; and a model that reveals many tokens at once
    learns from such text what a corpus leaves open. `writer`: a shipped name, a directory or a hub id (None: the target of the
    drafter). `temperature` 0 is greedy. The texts are tokenized anew. Source: Medusa, arXiv 2401.10774, section 2.3.2; Kim and
    Rush, arXiv 1606.07947. Cost: a plain generation of all of them, kept for later runs.
    """

    kind: ClassVar[str] = "self_distilled"

    writer: str | None = None
    prompts: choice(lambda: {c.kind: c for c in (StdlibConfig, TextConfig)}, "prompts") = StdlibConfig()  # type: ignore[valid-type]
    count: int = Field(default=2048, ge=2)
    prompt_tokens: int = Field(default=64, ge=1)
    new_tokens: int = Field(default=192, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    batch: int = Field(default=32, ge=1)
    seed: int = 0

    def documents(self) -> Iterator[Document]:
        """Raises ValueError: the run that has the target writes them."""
        raise ValueError("data='self_distilled': there is no target to write texts; set data.writer to a model, or name a corpus")

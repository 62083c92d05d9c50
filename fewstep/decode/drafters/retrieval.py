"""Retrieval: what followed the longest ending of the text, earlier in the text or in a corpus. This file knows no network."""

from collections.abc import Mapping
from typing import ClassVar, final

from pydantic import Field
from torch import Tensor

from fewstep.core.draft import Handle, Verdict
from fewstep.core.mixer import Tree
from fewstep.core.model import Target
from fewstep.core.random import Rng
from fewstep.decode.drafters.automaton import SuffixAutomaton
from fewstep.decode.drafters.config import DrafterConfig, Load
from fewstep.decode.drafters.corpus import Corpus
from fewstep.decode.drafters.memory import Memories
from fewstep.decode.drafters.trie import Trie, planted


@final
class RetrievalConfig(DrafterConfig):
    """Propose what followed the longest earlier occurrence of the text's ending, if that has at least `min_match` tokens.

    Up to `depth` tokens are followed and `nodes` proposed, but no more than 1 + `trust` times the ending's length are followed:
    the longer it is, the further what follows holds. `path`: a directory written by `write_corpus` to look in too, "" for
    none: where it knows an ending longer by `bias` tokens than the text itself does, the most frequent nodes of `occurrences`
    continuations come first.
    """

    kind: ClassVar[str] = "retrieval"
    source: ClassVar[str] = "Hu et al. 2024, SAM decoding, arXiv 2411.10666; He et al. 2023, REST, arXiv 2311.08252"
    claims: ClassVar[tuple[str, ...]] = ("spec-bench",)

    min_match: int = Field(default=1, ge=1)
    depth: int = Field(default=15, ge=1)
    nodes: int = Field(default=15, ge=1)
    trust: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    path: str = ""
    bias: int = Field(default=3, ge=1)
    occurrences: int = Field(default=16, ge=1)

    def build(self, target: Target, load: Load) -> "Retrieval":
        corpus = Corpus(self.path) if self.path else None
        if corpus is not None and corpus.header.vocab > target.vocab:
            raise ValueError(
                f"drafter.path={self.path!r}: a vocabulary of {corpus.header.vocab} tokens, the target's has {target.vocab}; "
                "write it with the target's tokenizer"
            )
        return Retrieval(self, corpus, target.vocab)


Texts = Memories[SuffixAutomaton]


@final
class Retrieval:
    """Chosen nodes: one chain from the text, or the heaviest nodes of a trie from the corpus and the chain where it still fits.

    The weight of a node is the number of occurrences that continue through it. Cost: no network; per row some 4 us for each new
    token, 50 us for a proposal and 60 us more with a corpus.
    Differs: SAM decoding keeps an automaton of the corpus, some hundred bytes per token, where this needs eight on disk; REST
    searches for the text's ending length by length, where this finds the longest one at once, in an array sorted by pasts; both
    follow every match equally far.
    """

    taps: tuple[str, ...] = ()
    prompt_taps: tuple[str, ...] = ()

    def __init__(self, config: RetrievalConfig, corpus: Corpus | None, vocab: int) -> None:
        self.config, self.corpus, self.vocab = config, corpus, vocab

    def init(self, prompt: Tree, hidden: Mapping[str, Tensor], capacity: int) -> Texts:
        automata = tuple(SuffixAutomaton(self.vocab) for _ in range(prompt.batch))
        for automaton, tokens, count in zip(automata, prompt.tokens.tolist(), prompt.valid.sum(1).tolist(), strict=True):
            automaton.extend(tokens[:count])
        return Memories(automata)

    def propose(self, root: Tensor, state: Texts, handle: Handle, budget: Tensor, rng: Rng) -> tuple[Tree, Texts]:
        tries = []
        for automaton, token, most in zip(state.rows, root.tolist(), budget.tolist(), strict=True):
            automaton.extend((token,))  # the root is certain, whatever the verdict
            tries.append(self._row(automaton, min(most, 1 + self.config.nodes)))
        return planted(tries, root.device), state

    def observe(self, tree: Tree, verdict: Verdict, hidden: Mapping[str, Tensor], state: Texts) -> Texts:
        if tree.size > 1:
            kept = tree.tokens.gather(1, verdict.path)
            for automaton, tokens, keep in zip(state.rows, kept.tolist(), verdict.keep.tolist(), strict=True):
                automaton.extend(tokens[1:keep])
        return state

    def _row(self, text: SuffixAutomaton, size: int) -> Trie:
        trie, config = Trie(text.text[-1]), self.config
        if size == 1:
            return trie
        length, end = text.match()
        if self.corpus is not None and length < self.corpus.header.reach:
            known, continuations = self.corpus.lookup(
                text.text[-self.corpus.header.reach :],
                least=max(config.min_match, length + config.bias),
                depth=min(config.depth, size - 1),
                occurrences=config.occurrences,
            )
            for tokens, count in continuations.items():
                trie.insert(tokens[: self._far(known)], count)
            trie = trie.best(size)
        if length >= config.min_match and len(trie.tokens) < size:
            trie.insert(text.following(end, min(self._far(length), size - 1)), size=size)
        return trie

    def _far(self, length: int) -> int:
        """How many tokens to follow where an ending of `length` tokens is known."""
        return min(self.config.depth, 1 + int(self.config.trust * length))

"""The suffix automaton of a growing text: where its longest repeated ending occurred before. This file knows integers only."""

import sys
from collections.abc import Iterable
from typing import final

_MARKED = 32  # endings of a position that remember it: more cost time, and only texts that repeat one token have more


@final
class SuffixAutomaton:
    """All substrings of `text`, grouped by the places they end at; grows at its end by amortised constant time per token.

    Cost: about 4 us and 400 bytes per token; `copy` 0.04 us per token. Source: Blumer et al. 1985; as a drafter Hu et al. 2024,
    arXiv 2411.10666. Differs: a state remembers its latest occurrence (the paper: its first), exactly if it is among the 32
    longest endings there.
    """

    def __init__(self, vocab: int) -> None:
        self.text: list[int] = []
        self._vocab = vocab
        self._next: dict[int, int] = {}  # state * vocab + token -> state; one flat table, so that a copy is one pass
        self._out: list[tuple[int, ...]] = [()]  # the tokens that leave a state; the root is never cloned and keeps none
        self._link, self._length, self._end = [-1], [0], [-1]
        self._last = 0

    def extend(self, tokens: Iterable[int]) -> None:
        """Append `tokens` to the text."""
        for token in tokens:
            self._append(token)

    def match(self) -> tuple[int, int]:
        """The length of the longest ending of the text that occurs in it earlier, and where that ends; (0, -1) if none does."""
        state = max(self._link[self._last], 0)
        return self._length[state], self._end[state]

    def following(self, end: int, count: int) -> list[int]:
        """`count` tokens after place `end`; what reaches the end of the text starts over at its own first token.

        A text that repeats with period d most likely repeats again.
        """
        text, start = self.text, end + 1
        period = len(text) - start
        return text[start : start + count] if count <= period else [text[start + i % period] for i in range(count)]

    def copy(self) -> "SuffixAutomaton":
        """An automaton of the same text that grows on its own."""
        new = SuffixAutomaton(self._vocab)
        new.text, new._next, new._out = self.text.copy(), self._next.copy(), self._out.copy()
        new._link, new._length, new._end, new._last = self._link.copy(), self._length.copy(), self._end.copy(), self._last
        return new

    def nbytes(self) -> int:
        """Bytes of the tables, small integers and tuples not counted."""
        return sum(sys.getsizeof(x) for x in (self.text, self._next, self._out, self._link, self._length, self._end))

    def _append(self, token: int) -> None:
        following, out, link, length = self._next, self._out, self._link, self._length
        self._mark()
        new = self._state(len(self.text) + 1, 0, len(self.text), ())
        self.text.append(token)
        state, self._last = self._last, new
        key = state * self._vocab + token
        while state >= 0 and key not in following:
            following[key] = new
            if state:
                out[state] += (token,)
            state = link[state]
            key = state * self._vocab + token
        if state < 0:
            return
        found = following[key]
        if length[found] == length[state] + 1:
            link[new] = found
            return
        clone = self._state(length[state] + 1, link[found], self._end[found], out[found])
        for leaving in out[found]:
            following[clone * self._vocab + leaving] = following[found * self._vocab + leaving]
        while state >= 0 and following.get(key) == found:
            following[key] = clone
            state = link[state]
            key = state * self._vocab + token
        link[found] = link[new] = clone

    def _state(self, length: int, link: int, end: int, out: tuple[int, ...]) -> int:
        self._length.append(length)
        self._link.append(link)
        self._end.append(end)
        self._out.append(out)
        return len(self._link) - 1

    def _mark(self) -> None:
        """The endings of the text occur at its end: told to them only when it grows, so that `match` finds earlier places."""
        state, end = self._link[self._last], len(self.text) - 1
        for _ in range(_MARKED):
            if state <= 0:
                return
            self._end[state] = end
            state = self._link[state]

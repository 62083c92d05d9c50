"""Stop strings in text that arrives in pieces: what might still become a stop string is held back until it is decided.

This file knows characters only: neither tokens nor models.
"""

from collections.abc import Sequence
from typing import final


@final
class StopScanner:
    """Passes text on until a stop string completes, then gives the text before it and nothing more.

    The stop string that completes first wins (the longest, if several complete at the same character), so that the result
    does not depend on how the text was cut into pieces. No stop strings: text passes through unchanged.
    Raises ValueError for an empty stop string.
    Cost: linear in the text and the total length of the stop strings; it holds back less than the longest of these.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("stop='': would stop at once; give at least one character, or no stop string")
        self._stops = tuple(stops)
        self._held = ""
        self._found: str | None = None

    @property
    def found(self) -> str | None:
        """The stop string that ended the text, or None so far."""
        return self._found

    def push(self, piece: str) -> str:
        """The text that `piece` has decided; "" after a stop string was found."""
        if self._found is not None:
            return ""
        text = self._held + piece
        # Held text is a proper prefix of a stop string, so no match begins before it.
        starts = ((text.find(stop), stop) for stop in self._stops)
        matches = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if matches:
            _, start, self._found = min(matches)
            self._held = ""
            return text[:start]
        cut = len(text) - self._undecided(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, now that no text follows."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops if len(stop) > size):
                return size
        return 0

"""Text out of steps: pieces as they become certain, each with where its token came from, and stop strings.

This file knows tokenizers and the loop's steps; it knows no model and no drafter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from fewstep.decode.stream import Finish, Step
from fewstep.text.stop import StopScanner
from fewstep.text.tokenizer import Tokenizer


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """The text of `row` that became certain with `token`, maybe "". `drafted`: the token was drafted and accepted."""

    row: int
    token: int
    text: str
    drafted: bool


@final
class Narrator:
    """Turns tokens into text and, as the loop's `review`, ends a row where a stop string completes.

    Give it to `stream` and call `pieces` after each event. A stop string is no part of the text; the token that completed it is
    the row's last. Text held back, as the beginning of a character or of a stop string may be, counts as its releasing token's.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int, stops: Sequence[str] = ()) -> None:
        self._streams = [tokenizer.stream() for _ in range(rows)]
        self._scanners = [StopScanner(stops) for _ in range(rows)]
        self._texts: list[list[str]] = [[] for _ in range(rows)]
        self._pieces: list[Piece] = []

    def __call__(self, step: Step) -> Step:
        counts, finish = step.count.tolist(), step.finish.tolist()
        drafted = step.drafted.tolist()
        for i, (row, tokens) in enumerate(zip(step.rows.tolist(), step.tokens.tolist(), strict=True)):
            for j in range(counts[i]):
                last = finish[i] != Finish.RUNNING and j == counts[i] - 1
                self._say(Piece(row, tokens[j], self._read(row, tokens[j], last), j < drafted[i]))
                if self._scanners[row].found is not None:
                    counts[i], finish[i] = j + 1, int(Finish.STOP)
                    break
        device = step.count.device
        count = torch.tensor(counts, device=device)
        ended = torch.tensor(finish, device=device)
        return replace(step, count=count, drafted=torch.minimum(step.drafted, count), finish=ended)

    def pieces(self) -> list[Piece]:
        """What became certain since the last time, row by row."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def text(self, row: int) -> str:
        """All of a row's text so far."""
        return "".join(self._texts[row])

    def _read(self, row: int, token: int, last: bool) -> str:
        scanner = self._scanners[row]
        text = scanner.push(self._streams[row].push(token))
        return text + scanner.push(self._streams[row].flush()) + scanner.flush() if last else text

    def _say(self, piece: Piece) -> None:
        self._texts[piece.row].append(piece.text)
        self._pieces.append(piece)

"""What a run tells: `log.jsonl`, TensorBoard and a progress bar. This file knows no model and no objective."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch.utils.tensorboard import SummaryWriter


@final
class Log:
    """The numbers of a run, one JSON object a line in `directory/log.jsonl` and the same as TensorBoard scalars.

    `step`: where the run (re)starts; lines beyond it, left by a run that died after its last checkpoint, are dropped.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self._path = directory / "log.jsonl"
        with _writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            _trim(self._path, step)
            self._file = self._path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """Record `values` of `step` under `group` ("train", "validation"). Raises ValueError when the disk refuses."""
        self._line({"step": step, "group": group, **values})
        with _writing(self._path):
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    def notice(self, step: int, text: str) -> None:
        self._line({"step": step, "group": "notice", "text": text})

    def close(self) -> None:
        with _writing(self._path):
            self._file.close()
            self._board.close()

    def _line(self, record: Mapping[str, object]) -> None:
        with _writing(self._path):
            self._file.write(json.dumps({name: _finite(value) for name, value in record.items()}) + "\n")
            self._file.flush()


@final
class Bar:
    """A progress bar over the budget with loss, tokens per second and time left; silent where the console is no terminal."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self._progress = Progress(*columns, TextColumn("{task.fields[text]}"), console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=1.0, step=0, text="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, step: int, progress: float, text: str) -> None:
        self._progress.update(self._task, completed=min(1.0, progress), step=step, text=text)


def duration(seconds: float) -> str:
    """`seconds` as h:mm:ss."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"log={str(path)!r}: cannot be written ({error}); checkpoints are intact; make room and resume"
        ) from error


def _finite(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN


def _trim(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line the dying run was writing
        if record["step"] <= step:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)

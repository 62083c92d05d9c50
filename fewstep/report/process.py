"""A contestant in a process of its own that answers requests, one JSON object a line. This file knows no library."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final


@final
class Process:
    """The other process, from here; a context manager that ends it. What it writes to its standard error is dropped."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        pipe = subprocess.PIPE
        self._running = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, bufsize=1, env=environment
        )

    def ask(self, do: str, arguments: Mapping[str, Any]) -> Any:
        """The answer of the method `do`. Raises RuntimeError when the process has ended."""
        assert self._running.stdin is not None and self._running.stdout is not None
        try:
            self._running.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            answer = self._running.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"the other process ended with exit code {self._running.wait()} at {do}")
        return json.loads(answer)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        self._running.__exit__(None, None, None)


def serve(methods: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests, a JSON object with the method and its arguments a line, until there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(methods[request.pop("do")](**request)), flush=True)

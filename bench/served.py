"""A process that works when it is told to, by a line, and says what came of it as a line of JSON."""

import json
import subprocess
from dataclasses import dataclass
from typing import IO, Any

from oscar_common.errors import OperationError


@dataclass(frozen=True, kw_only=True)
class Served:
    """A process that measures one way, and its standard error; it does nothing until it is asked."""

    way: str
    process: subprocess.Popen[str]
    said: IO[str]

    def answer(self) -> dict[str, Any]:
        """Return the next thing that it says; the first comes unasked."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.said.seek(0)
            raise OperationError(f"{self.way} failed:\n{self.said.read()[-2000:]}")
        content: dict[str, Any] = json.loads(line)
        return content

    def ask(self, *words: object) -> dict[str, Any]:
        """Tell it what to do, and return what came of it."""
        assert self.process.stdin
        print(*words, file=self.process.stdin, flush=True)
        return self.answer()

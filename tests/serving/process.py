"""`bayes-dispatch serve` as a process of its own, on a free port."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


class ServerProcess:
    """A server that listens.

    Attributes:
        url: where. lines: of JSON that it has logged so far. said: what else stderr has.
    """

    def __init__(self, options: tuple[str, ...], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bayes_dispatch", "serve", "--port", "0", *options],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        self.lines: list[dict[str, Any]] = []
        self.said: list[str] = []
        for line in self._process.stderr:
            self._keep(line)
            if self.lines and self.lines[-1]["event"] == "listening":
                break
        else:
            raise AssertionError(f"the server ended with exit code {self._process.wait()}: {''.join(self.said)}")
        self.url = f"http://{self.lines[-1]['host']}:{self.lines[-1]['port']}"
        self._thread = Thread(target=lambda: [self._keep(line) for line in self._process.stderr or ()])
        self._thread.start()

    def tell(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def ended(self) -> int:
        """The exit code, once there is one."""
        code = self._process.wait(60)
        self._thread.join(10)
        return code

    def close(self) -> None:
        """End it, if it has not."""
        self._process.kill()
        self.ended()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _keep(self, line: str) -> None:
        try:
            self.lines.append(json.loads(line))
        except json.JSONDecodeError:
            self.said.append(line)


@contextmanager
def serving(*options: str, **environment: str) -> Iterator[ServerProcess]:
    """A server with these options and variables of its environment."""
    server = ServerProcess(options, environment)
    try:
        yield server
    finally:
        server.close()

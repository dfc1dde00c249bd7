"""A job for the tests of engines. A module of its own, without torch: its worker processes start at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hlip.prepare.workers import Event


@dataclass(frozen=True)
class Toy:
    """Units that write a file; some steps misbehave."""

    folder: Path
    kill: tuple[int, int] | None = None
    times: int = 10**9
    hang: tuple[int, int] | None = None
    step_seconds: float = 600.0
    before_steps: bool = False
    error: Exception | None = None

    def run(self, unit: int, notify: Callable[[Event], None]) -> None:
        if self.before_steps:
            os._exit(7)
        if self.error:
            raise self.error
        for m in range(3):
            notify(Event((0, m), 0, 0))
            if (unit, m) == self.hang and not (self.folder / "blamed").exists():
                time.sleep(600)
            if (unit, m) == self.kill and not (self.folder / "blamed").exists():
                with (self.folder / "deaths").open("a") as file:
                    file.write(f"{os.getpid()}\n")
                if len((self.folder / "deaths").read_text().splitlines()) <= self.times:
                    os.kill(os.getpid(), signal.SIGKILL)
        notify(Event(None, 1, 3))
        (self.folder / str(unit)).write_text(str(unit))

    def blame(self, unit: int, step: tuple[int, int], rule: str, reason: str) -> None:
        (self.folder / "blamed").write_text(f"{unit} {step} {rule} {reason}")

    def is_done(self, unit: int) -> bool:
        return (self.folder / str(unit)).exists()

    def size(self, unit: int) -> tuple[int, int]:
        return 1, 3

"""The processes that share a job, as torchrun starts them."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from .terminal import say

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)  # one process may have work for days while another waits
PAUSE = 15  # seconds


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is. Alone, nothing is sent."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, value: T) -> T:
        """The first process' value."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did. Little is sent, so it goes over gloo on any device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def say_error(*lines: str) -> None:
    """Print an error that all processes of a job may have alike, such as a wrong argument.

    The first one prints it at once and ends, upon which torchrun ends the others. One that is still there after a
    pause has met something of its own, and says so.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(PAUSE)
    say(*lines, file=sys.stderr)

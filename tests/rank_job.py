"""One of several processes that run a command together, with what torchrun would tell them."""

from __future__ import annotations

import os
import socket
import sys

import torch

from commands import run as command


def run(rank: int, size: int, port: int, arguments: list[str]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    sys.exit(command(*arguments))


def free_port() -> int:
    """Where the processes can meet."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]

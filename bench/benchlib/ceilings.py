"""What the machine can do at most: a large matrix product and a large copy, timed in the run that they are set beside.

Neither is a data sheet's figure. Operands are random: products of zeros run faster, as they take less power.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .timing import clock

ROUNDS = 5
SIDE = {"cuda": 8192, "cpu": 4096}  # of the matrices
COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes, beyond the caches


class Ceilings(NamedTuple):
    """Of the fastest round. flops: a second, of a matrix product. bytes: a second, read and written by a copy."""

    flops: float
    bytes: float


@functools.cache  # of a run
def measure(device: str, dtype: torch.dtype) -> Ceilings:
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randint(0, 256, (COPIED[device],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = 10 if device == "cuda" else 1

    def multiply() -> None:
        torch.mm(a, b, out=product)

    def copy() -> None:
        target.copy_(source)

    multiply()
    copy()
    return Ceilings(
        2 * side**3 / min(clock(multiply, calls) for _ in range(ROUNDS)),
        2 * source.nbytes / min(clock(copy, calls) for _ in range(ROUNDS)),
    )

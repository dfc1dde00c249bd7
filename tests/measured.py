"""Rows of measured tables, with made-up figures."""

from __future__ import annotations

from typing import Any

from hlip_kernels.tiles import AttentionConfig, Choice, Measured, Tile

SMALL, LARGE = Tile(32, 32, 4, 1), Tile(128, 64, 8, 2)
TILES = AttentionConfig(LARGE, SMALL, SMALL)


def choice(backend: str, deterministic: str = "triton") -> Choice:
    """A choice of these two, in which every backend takes a second."""
    return Choice(
        backend,
        deterministic,
        {
            "training": dict.fromkeys(("triton", backend), 1000.0),
            "forward": {"triton": 500},
            "deterministic": dict.fromkeys(("triton", deterministic), 1000.0),
        },
    )


def measured(**changes: Any) -> Measured:
    """On a GPU that does not exist."""
    return Measured(
        **{
            "tiles": TILES,
            "tile_ms": {kernel: {"before": None, "after": 1.5} for kernel in vars(TILES)},
            "levels": {"scan": choice("triton")},
            "refused": {"varlen": "dq is off by 1"},
            "device": "Test card",
            "versions": {"torch": "2.6.0", "xformers": "0.0.1"},
            "commit": None,
            "utc": "2026-01-02T03:04:05+00:00",
            **changes,
        }
    )

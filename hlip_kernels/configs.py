"""Tile sizes of the Triton kernels: a plain table, no search at run time.

A row is chosen by GPU architecture, kind of arithmetic and head dim, and serves groups of any length. Tiles change the
order of sums, so a table, unlike autotuning, also keeps results the same from run to run.
`python bench/attention.py --static` compiles every row of the built-in table and shows what it costs; none spills.
`python bench/attention.py --tune` times others on the GPU at hand and writes the user's own table, whose rows come
before those of the built-in one. It is read once a process.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .layout import TILE_ROWS

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DEFAULT_ARCHITECTURE = "sm_80"
KINDS = ("half", "fp32", "tf32")
BLOCK_D = {16: 16, 32: 32, 64: 64, 80: 128, 96: 128, 128: 128}  # head dim -> columns of a tile, a power of two
FORMAT = 2  # of the user's table; it changes when rows or kernels do, so that what was measured no longer holds

log = logging.getLogger(__name__)


class Tile(NamedTuple):
    """rows: of the program's own tile, one of `layout.TILE_ROWS`; streamed: of the tiles it loops over."""

    rows: int
    streamed: int
    warps: int
    stages: int


ALLOWED = Tile(TILE_ROWS, (16, 32, 64, 128), (1, 2, 4, 8, 16), (1, 2, 3, 4, 5))  # type: ignore[arg-type]


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dkdv: Tile


class Row(NamedTuple):
    """What a row of the table is found by."""

    arch: str
    kind: str  # one of `KINDS`
    head_dim: int

    def __str__(self) -> str:
        return " ".join(map(str, self))


def kind_of(dtype: torch.dtype, tf32: bool = False) -> str:
    return "half" if dtype.itemsize == 2 else "tf32" if tf32 else "fp32"


def row_of(arch: str, dtype: torch.dtype, head_dim: int, tf32: bool = False) -> Row:
    return Row(arch, kind_of(dtype, tf32), head_dim)


def attention_config(arch: str, dtype: torch.dtype, head_dim: int, tf32: bool = False) -> AttentionConfig:
    """The user's row, or else the built-in one.

    Raises:
        ValueError: the user's table cannot be read.
    """
    row = row_of(arch, dtype, head_dim, tf32)
    return user_tiles().get(row) or built_in_config(row)


def built_in_config(row: Row) -> AttentionConfig:
    """An unknown architecture gets the default's."""
    arch, kind, head_dim = row
    wide = BLOCK_D[head_dim] == 128
    if kind == "tf32":
        forward, back = Tile(64, 32, 8 if head_dim > 32 else 4, 2), Tile(32 if wide else 64, 32, 4, 1)
        if arch == "sm_100":  # with the others' tiles 8 to 16 bytes spill
            return AttentionConfig(
                forward._replace(rows=128) if wide else forward, back, back if wide else back._replace(stages=2)
            )
        return AttentionConfig(forward, back, back)
    if kind == "fp32" and head_dim > 32 and arch != "gfx942":
        tile = Tile(32, 16, 8, 1) if wide else Tile(32, 32, 8, 1)
        return AttentionConfig(tile, Tile(32, 32, 16, 1) if wide else tile, tile)
    if kind == "fp32":
        tile = Tile(32, 32, 4, 1) if wide else Tile(64, 32, 4, 1)
        return AttentionConfig(tile, tile, Tile(32, 32, 4, 1))
    if arch in ("sm_90", "sm_100") and wide:
        return AttentionConfig(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2))
    if arch == "sm_90":
        return AttentionConfig(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2))
    if arch == "sm_100":
        return AttentionConfig(Tile(128, 64, 4, 2), Tile(128, 64, 4, 2), Tile(64, 64, 4, 2))
    if arch == "gfx942":
        tile = Tile(64, 32 if wide else 64, 4, 1)
        return AttentionConfig(tile, tile, tile)
    dq = Tile(64, 32, 8 if wide and arch == "sm_120" else 4, 2)  # with 4 warps 16 bytes spill there
    return AttentionConfig(Tile(128, 64, 8, 2), dq, Tile(64, 64, 8, 2) if wide else Tile(64, 32, 4, 2))


def max_registers(kind: str, warps: int) -> int | None:
    """What the CUDA compiler may use in a thread; None leaves it to guess.

    The guess aims at more programs on a multiprocessor, and for sums without matrix units it cuts so close that a few
    bytes spill. All that one program may have is then the better limit.
    """
    return min(255, 65536 // (32 * warps)) if kind == "fp32" else None


def table_path() -> Path:
    """Where the user's table lies, if there is one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        cache = Path(os.path.expanduser("~/.cache"))  # noqa: PTH111 - Path's own fails where there is no home
    return cache / "hlip-kernels" / "tiles.json"


@functools.cache
def user_tiles() -> dict[Row, AttentionConfig]:
    """The user's table; empty if there is none."""
    path = table_path()
    if not (os.access(path.parent, os.X_OK) and path.exists()):
        return {}
    return read_tiles(path)


def read_tiles(path: Path) -> dict[Row, AttentionConfig]:
    """Rows of a table; none, with a line in the log, if it is of another `FORMAT`.

    Raises:
        ValueError: anything in the file is not as `write_tiles` writes it; it names the file and what is wrong.
    """
    try:
        content = _expect(json.loads(path.read_text(encoding="utf-8")), "the table")
        number = content.get("format")
        if number != FORMAT:
            log.warning(
                f"ignored the tile table {path}: expected format {FORMAT}, got {number!r:.20}. "
                "`python bench/attention.py --tune` makes a new one"
            )
            return {}
        rows = _expect(_expect(content, "the table", ("format", "rows"))["rows"], "rows")
        return {_parse_row(name): _parse_config(name, tiles) for name, tiles in rows.items()}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"cannot use the tile table {path}: {error}. Delete the file to go back to the built-in tiles; "
            "`python bench/attention.py --tune` makes a new one"
        ) from error


def write_tiles(path: Path, table: dict[Row, AttentionConfig]) -> None:
    """Whole or not at all. A running process keeps the table that it has read, this one excepted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        str(row): {kernel: tile._asdict() for kernel, tile in vars(config).items()}
        for row, config in sorted(table.items())
    }
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps({"format": FORMAT, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    user_tiles.cache_clear()


def _parse_row(name: str) -> Row:
    arch, kind, head_dim = [*name.split(" "), *[""] * 3][:3]
    fits = re.fullmatch(r"sm_\d+|gfx\w+", arch) and kind in KINDS and head_dim in map(str, BLOCK_D)
    if not fits or name.count(" ") != 2:
        raise ValueError(f"{name!r} is not a row such as 'sm_90 half 64'")
    return Row(arch, kind, int(head_dim))


def _parse_config(name: str, tiles: Any) -> AttentionConfig:
    kernels = _expect(tiles, name, AttentionConfig.__annotations__)
    return AttentionConfig(**{kernel: _parse_tile(f"{name}, {kernel}", tile) for kernel, tile in kernels.items()})


def _parse_tile(name: str, tile: Any) -> Tile:
    for field, value in _expect(tile, name, Tile._fields).items():
        allowed = getattr(ALLOWED, field)
        if type(value) is not int or value not in allowed:
            raise ValueError(f"{name}: {field} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return Tile(**tile)


def _expect(value: Any, name: str, keys: Any = None) -> dict[str, Any]:
    """A JSON object, with these keys and no others."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r:.60}, not an object")
    if keys is not None and set(value) != set(keys):
        raise ValueError(f"{name} has {', '.join(sorted(value)) or 'nothing'}, not {', '.join(keys)}")
    return value


@functools.cache
def architecture(device_index: int = 0) -> str:
    """The GPU's name in the table, such as `sm_90`; the default's where there is no GPU."""
    if not torch.cuda.is_available():
        return DEFAULT_ARCHITECTURE
    if torch.version.hip:
        return torch.cuda.get_device_properties(device_index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"sm_{major}{minor}"

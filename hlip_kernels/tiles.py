"""Tile sizes of the Triton kernels: a plain table, no search at run time.

A row is chosen by GPU architecture, kind of arithmetic and head dim, and serves groups of any length. Tiles change the
order of sums, so a table, unlike autotuning, also keeps results the same from run to run.
`python bench/attention.py --static` compiles every row of the built-in table and shows what it costs; none spills.

`python bench/attention.py --tune` times others, and the attention of other libraries, on the GPU at hand, and writes
the user's own table. The same file, put into the folder `evidence` under the name of its architecture, is the evidence
that comes with this library. The user's rows come first, then those of the evidence, then the built-in ones. Files are
read once a process.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .layout import LEVELS, TILE_ROWS, Level

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
SAME_TILES = {"sm_103": "sm_100", "sm_110": "sm_100", "sm_121": "sm_120", "gfx950": "gfx942"}  # as whose
DEFAULT_ARCHITECTURE = "sm_80"
KINDS = ("half", "fp32", "tf32")
BLOCK_D = {16: 16, 32: 32, 64: 64, 80: 128, 96: 128, 128: 128}  # head dim -> columns of a tile, a power of two
FORMAT = 3  # of measured tables; it changes when rows or kernels do, so that what was measured no longer holds
EVIDENCE = Path(__file__).with_name("evidence")  # a folder of measured tables, ARCHITECTURE.json
MAX_TEXT = 1000  # characters of a text in a measured table
MODES = ("training", "forward", "deterministic")  # in which backends are timed: see `Choice`

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


@dataclass(frozen=True)
class Choice:
    """The backends that `auto` takes at one level.

    backend: the one that trains in the least time. It serves inference too, even where another one's forward alone is
        faster: an embedding's bits must not depend on whether gradients are wanted.
    deterministic: the same among backends whose gradients are the same bits on every run, when they are told to be.
    ms: mode -> backend -> milliseconds. "training" is forward and backward, "forward" is forward alone, and
        "deterministic" is forward and a backward pass that repeats.
    """

    backend: str
    deterministic: str
    ms: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Measured:
    """A row of a measured table.

    tiles: the fastest of each kernel.
    tile_ms: kernel -> milliseconds with the tile that was in use "before" (None if it failed) and "after".
    levels: the choices of `auto`.
    refused: backend -> the reason to pass it over, such as wrong results.
    device, versions, commit, utc: where and when it was measured; versions are those of packages.
    """

    tiles: AttentionConfig
    tile_ms: dict[str, dict[str, float | None]]
    levels: dict[Level, Choice]
    refused: dict[str, str]
    device: str
    versions: dict[str, str]
    commit: str | None
    utc: str


def kind_of(dtype: torch.dtype, tf32: bool = False) -> str:
    return "half" if dtype.itemsize == 2 else "tf32" if tf32 else "fp32"


def allows_tf32(dtype: torch.dtype) -> bool:
    """Tell whether the caller lets PyTorch's own products of float32 run in tf32."""
    if dtype != torch.float32:
        return False
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:  # before PyTorch 2.9
        return bool(torch.backends.cuda.matmul.allow_tf32)
    return (getattr(torch.backends, "fp32_precision", "ieee") if precision == "none" else precision) == "tf32"


def row_of(arch: str, dtype: torch.dtype, head_dim: int, tf32: bool = False) -> Row:
    return Row(arch, kind_of(dtype, tf32), head_dim)


def attention_config(arch: str, dtype: torch.dtype, head_dim: int, tf32: bool = False) -> AttentionConfig:
    """The tiles of the user's row, else of the evidence's, else the built-in ones.

    Raises:
        ValueError: a measured table cannot be read.
    """
    row = row_of(arch, dtype, head_dim, tf32)
    measured = user_table().get(row) or evidence(arch).get(row)
    return measured.tiles if measured else built_in_config(row)


@functools.cache
def built_in_config(row: Row) -> AttentionConfig:
    """An architecture without tiles of its own gets those of its like, or else the default's."""
    _, kind, head_dim = row
    arch = _tiles_of(row.arch)
    wide = BLOCK_D[head_dim] == 128
    if kind == "tf32":
        forward, back = Tile(64, 32, 8 if head_dim > 32 else 4, 2), Tile(32, 32, 4, 1)
        if wide and arch == "sm_100":  # with the others' tiles 8 to 32 bytes spill
            forward = forward._replace(rows=128)
        elif wide and arch == "sm_120":
            forward = forward._replace(stages=1)
        return AttentionConfig(forward, back if head_dim > 32 else Tile(64, 32, 8, 1), back)
    if kind == "fp32" and head_dim > 32 and arch != "gfx942":
        tile = Tile(32, 16, 8, 1) if wide else Tile(32, 32, 8, 1)
        return AttentionConfig(tile, tile, tile)
    if kind == "fp32":
        tile = Tile(32, 32, 4, 1) if wide else Tile(64, 32, 4, 1)
        return AttentionConfig(tile, tile, Tile(32, 32, 4, 1))
    if arch in ("sm_90", "sm_100") and wide:
        dq = Tile(128, 64, 8, 3 if arch == "sm_100" else 2)  # with 2 stages 16 bytes spill there
        return AttentionConfig(Tile(128, 64, 8, 2), dq, Tile(64, 64, 8, 2))
    if arch == "sm_90":
        return AttentionConfig(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2))
    if arch == "sm_100":  # dkdv with 2 stages spills 8 bytes on Triton 3.5
        return AttentionConfig(Tile(128, 64, 4, 2), Tile(128, 64, 4, 2), Tile(64, 64, 4, 3))
    if arch == "gfx942":
        tile = Tile(64, 32 if wide else 64, 4, 1)
        return AttentionConfig(tile, tile, tile)
    forward, dq = Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)
    if wide and arch == "sm_80":  # 64 streamed rows spill 32 bytes on Triton 3.4, and 2 stages 8 bytes
        forward = Tile(128, 32, 8, 2 if head_dim == 128 else 3)
    elif wide:  # there 8 to 16 bytes spill
        dq = Tile(32, 32, 4, 2)
    return AttentionConfig(forward, dq, Tile(64, 64, 8, 2) if wide else Tile(64, 32, 4, 2))


@functools.cache
def _tiles_of(arch: str) -> str:
    """The architecture of the table whose tiles `arch` uses; where it is none like it, says so once."""
    arch = SAME_TILES.get(arch, arch)
    if arch in ARCHITECTURES:
        return arch
    log.warning(
        f"{arch}: no tiles for this architecture (expected one of {', '.join((*ARCHITECTURES, *SAME_TILES))}); using "
        f"those of {DEFAULT_ARCHITECTURE}. `python bench/attention.py --tune` finds faster ones"
    )
    return DEFAULT_ARCHITECTURE


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
def user_table() -> dict[Row, Measured]:
    """The user's table; empty if there is none."""
    path = table_path()
    if not (os.access(path.parent, os.X_OK) and path.exists()):
        return {}
    return read_table(path)


@functools.cache
def evidence(arch: str) -> dict[Row, Measured]:
    """The table of an architecture that comes with this library; empty if there is none."""
    path = EVIDENCE / f"{arch}.json"
    return read_table(path) if path.exists() else {}


def read_table(path: Path) -> dict[Row, Measured]:
    """Rows of a measured table; none, with a line in the log, if it is of another `FORMAT`.

    Raises:
        ValueError: anything in the file is not as `write_table` writes it; it names the file and what is wrong.
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
        return {_parse_row(name): _parse_measured(name, row) for name, row in rows.items()}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"cannot use the tile table {path}: {error}. Delete the file to go back to the built-in tiles; "
            "`python bench/attention.py --tune` makes a new one"
        ) from error


def write_table(path: Path, table: dict[Row, Measured]) -> None:
    """Whole or not at all. A running process keeps the table that it has read, this one excepted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        str(row): {
            **vars(measured),
            "tiles": {kernel: tile._asdict() for kernel, tile in vars(measured.tiles).items()},
            "levels": {level: vars(choice) for level, choice in measured.levels.items()},
        }
        for row, measured in sorted(table.items(), key=lambda item: item[0])
    }
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps({"format": FORMAT, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    user_table.cache_clear()


def _parse_row(name: str) -> Row:
    arch, kind, head_dim = [*name.split(" "), *[""] * 3][:3]
    fits = re.fullmatch(r"sm_\d+|gfx\w+", arch) and kind in KINDS and head_dim in map(str, BLOCK_D)
    if not fits or name.count(" ") != 2:
        raise ValueError(f"{name!r} is not a row such as 'sm_90 half 64'")
    return Row(arch, kind, int(head_dim))


def _parse_measured(name: str, value: Any) -> Measured:
    row = _expect(value, name, Measured.__annotations__)
    kernels = tuple(AttentionConfig.__annotations__)
    tiles = _expect(row["tiles"], f"{name}, tiles", kernels)
    tile_ms = _expect(row["tile_ms"], f"{name}, tile_ms", kernels)
    for kernel, times in tile_ms.items():
        where = f"{name}, tile_ms, {kernel}"
        for when, ms in _expect(times, where, ("before", "after")).items():
            if ms is not None or when == "after":
                _check_ms(f"{where}, {when}", ms)
    for level in _expect(row["levels"], f"{name}, levels"):
        if level not in LEVELS:
            raise ValueError(f"{name}, levels: expected {', '.join(LEVELS)}, got {level!r:.60}")
    for field in ("device", "utc", *(["commit"] if row["commit"] is not None else [])):
        _check_text(f"{name}, {field}", row[field])
    for field in ("versions", "refused"):
        for key, text in _expect(row[field], f"{name}, {field}").items():
            _check_text(f"{name}, {field}, {key!r:.60}", text)
    return Measured(
        **row
        | {
            "tiles": AttentionConfig(**{k: _parse_tile(f"{name}, {k}", tile) for k, tile in tiles.items()}),
            "levels": {level: _parse_choice(f"{name}, {level}", x) for level, x in row["levels"].items()},
        }
    )


def _parse_choice(name: str, value: Any) -> Choice:
    choice = _expect(value, name, Choice.__annotations__)
    for mode, times in _expect(choice["ms"], f"{name}, ms", MODES).items():
        for backend, ms in _expect(times, f"{name}, ms, {mode}").items():
            _check_text(f"{name}, {mode}", backend)
            _check_ms(f"{name}, {mode}, {backend}", ms)
    for field, mode in (("backend", "training"), ("deterministic", "deterministic")):
        if choice[field] not in list(choice["ms"][mode]):  # a list, as it may be of a type that has no hash
            raise ValueError(f"{name}, {field}: expected a backend that was timed in {mode}, got {choice[field]!r:.60}")
    return Choice(**choice)


def _check_ms(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected milliseconds, a finite number above 0, got {value!r:.60}")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_TEXT:
        raise ValueError(f"{name}: expected printable text of at most {MAX_TEXT} characters, got {value!r:.60}")


def _parse_tile(name: str, tile: Any) -> Tile:
    for field, value in _expect(tile, name, Tile._fields).items():
        allowed = getattr(ALLOWED, field)
        if type(value) is not int or value not in allowed:
            raise ValueError(f"{name}: {field} must be one of {', '.join(map(str, allowed))}, got {value!r:.60}")
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

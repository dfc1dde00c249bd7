"""Files carry the number of their format: a later one is refused, and one from before there were numbers is read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hlip.embed.table import Embeddings
from hlip.evaluate.probe import Probe
from hlip.model.weights import read_weights
from hlip.train.checkpoints import Checkpoints

OTHERS = [2, 99, 0, -1, "2", 1.5, True]


def embeddings() -> Embeddings:
    names = np.array(["a", "b"])
    return Embeddings(names, np.array(["", ""]), np.zeros(2, np.int8), np.ones((2, 3), np.float32), {"job": {}})


def probe() -> Probe:
    return Probe(("a",), np.ones((1, 3)), np.zeros(1), np.ones(1), {"labels": "x.csv"})


def as_npz(made: Any, path: Path, number: Any) -> None:
    """As it is written, with another number, or none."""
    memory = io.BytesIO()
    made.write(memory, ".npz") if isinstance(made, Embeddings) else made.write(memory)
    memory.seek(0)
    with np.load(memory) as content:
        arrays = dict(content)
    assert arrays.pop("format") == 1
    np.savez(path, **arrays, **({} if number is None else {"format": np.array(number)}))


def as_parquet(made: Embeddings, path: Path, number: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    with path.open("wb") as file:
        made.write(file, ".parquet")
    table = parquet.read_table(path)
    metadata = dict(table.schema.metadata)
    assert metadata.pop(b"hlip_format") == b"1"
    metadata |= {} if number is None else {b"hlip_format": str(number).encode()}
    parquet.write_table(table.replace_schema_metadata(metadata), path)


def as_checkpoint(path: Path, number: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    state = {"step": 3, "config": {}, "model": {"weight": torch.ones(2)}}
    torch.save(state | ({} if number is None else {"hlip_format": number}), path)


def resume(path: Path) -> Any:
    checkpoints = Checkpoints(SimpleNamespace(out=path.parents[1]), None)  # type: ignore[arg-type]
    return checkpoints.load(*[SimpleNamespace()] * 3)  # type: ignore[arg-type]


FILES: dict[str, tuple[str, Callable[[Path, Any], None], Callable[[Path], Any]]] = {
    "embeddings": ("e.npz", lambda path, number: as_npz(embeddings(), path, number), Embeddings.read),
    "as Parquet": ("e.parquet", lambda path, number: as_parquet(embeddings(), path, number), Embeddings.read),
    "probe": ("p.npz", lambda path, number: as_npz(probe(), path, number), Probe.read),
    "weights": ("step_00000003.pt", as_checkpoint, read_weights),
    "checkpoint": ("checkpoints/step_00000003.pt", as_checkpoint, resume),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("number", OTHERS)
def test_another_format_is_refused(kind: str, number: Any, tmp_path: Path) -> None:
    name, write, read = FILES[kind]
    write(tmp_path / name, number)
    if (kind, number) == ("as Parquet", "2"):  # all its values are text
        number = 2
    with pytest.raises(ValueError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    if type(number) is int:
        assert f"of format {number}" in str(caught.value)
        assert "update hlip-kernels" in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "checkpoint"])
@pytest.mark.parametrize("number", [1, None])
def test_this_format_is_read_and_so_is_a_file_without_a_number(kind: str, number: int | None, tmp_path: Path) -> None:
    name, write, read = FILES[kind]
    write(tmp_path / name, number)
    read(tmp_path / name)

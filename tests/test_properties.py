"""Whatever the studies: what a store gives back, what it notices, and how steps share studies out."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("pyarrow")
from hlip.read.scan import Rejection, ScanError
from hlip.store.store import Store
from hlip.store.tools import merge, select, split_at_random, verify
from hlip.study import PreparedScan, StudyRecord
from hlip.train.sampler import StepSampler
from test_store import STUDIES, make_store

# --- stores

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
uids = st.lists(text.filter(bool), min_size=1, max_size=7, unique=True)
number = st.floats(width=32)
sizes = st.tuples(*[st.integers(1, 4)] * 3)


@st.composite
def scans(draw: st.DrawFn) -> PreparedScan:
    shape = draw(sizes)
    image = np.frombuffer(draw(st.binary(min_size=math.prod(shape), max_size=math.prod(shape))), np.uint8).reshape(
        shape
    )
    spacing = draw(st.tuples(number, number, number))
    voxels, slices = torch.from_numpy(image.copy()), draw(st.integers(0, 2**31 - 1))
    return PreparedScan(draw(text), voxels, spacing, draw(text), slices, draw(text), draw(text))


@st.composite
def studies(draw: st.DrawFn) -> list[StudyRecord[PreparedScan]]:
    labels = st.dictionaries(text, st.floats(allow_nan=False), max_size=3)
    rejected = st.lists(st.builds(Rejection, text, text, text, text), max_size=2)
    return [
        StudyRecord(
            uid, draw(st.lists(scans(), min_size=1, max_size=3)), draw(text), draw(text), draw(labels), draw(rejected)
        )
        for uid in draw(uids)
    ]


def holds(store: Store, expected: list[StudyRecord[PreparedScan]]) -> bool:
    if store.uids.tolist() != [study.uid for study in expected]:
        return False
    names, table = store.labels
    for i, study in enumerate(expected):
        found, rows = store.study(i), slice(store.first[i], store.first[i + 1])
        labels = {name: value for name, value in zip(names, table[i].tolist(), strict=True) if not math.isnan(value)}
        same = (
            (found.uid, found.impression, found.findings) == (study.uid, study.impression, study.findings)
            and found.names == [scan.name for scan in study.scans]
            and all(map(torch.equal, found.scans, [scan.image for scan in study.scans]))
            and np.array_equal(store.spacing[rows], np.float32([scan.spacing for scan in study.scans]), equal_nan=True)
            and labels == study.labels
        )
        if not same:
            return False
    return True


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(studies(), st.integers(1, 3), st.randoms())
def test_stores_give_back_what_goes_in(given: list[StudyRecord[PreparedScan]], per_shard: int, random: object) -> None:
    """Written, split, and joined again."""
    with tempfile.TemporaryDirectory() as home:
        path = make_store(Path(home) / "store", given, per_shard)
        store = Store(path)
        assert verify(path) == [] and holds(store, given)
        if len(given) > 1:
            parts = split_at_random(store, [0.5, 0.5], seed=len(given))
            for name, part in zip("ab", parts, strict=True):
                select(store, part, Path(home) / name)
                assert verify(Path(home) / name) == []
            merge([Path(home) / "a", Path(home) / "b"], Path(home) / "c")
            assert verify(Path(home) / "c") == []
            assert holds(Store(Path(home) / "c"), [given[i] for part in parts for i in part])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("small") / "store", STUDIES[:3], per_shard=2)


def still_good(path: Path) -> bool:
    """Whether nothing is wrong with a store, as far as anybody can tell."""
    try:
        return verify(path) == []
    except ScanError as error:
        assert str(path) in str(error)
        return False


FILES = ["shards/00000.safetensors", "shards/00001.safetensors", "manifest.arrow", "store.json", "rejected.jsonl"]


def damaged(small: Path, name: str, change: Callable[[bytes], bytes], check: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as home:
        copy = Path(shutil.copytree(small, Path(home) / "store"))
        (copy / name).write_bytes(change((small / name).read_bytes()))
        check(copy)


@pytest.mark.parametrize("name", FILES)
def test_truncation_at_any_byte_is_noticed(name: str, small: Path) -> None:
    """At each of the first and last bytes, and at a hundred in between. All that ends a JSON file is a line's end."""
    size = (small / name).stat().st_size
    least = size - 1 if name.endswith((".json", ".jsonl")) else size
    places = sorted({*range(min(8, least)), *range(max(0, least - 8), least), *range(0, least, max(1, least // 100))})

    def check(path: Path) -> None:
        assert not still_good(path)

    for place in places:
        damaged(small, name, lambda content, place=place: content[:place], check)  # type: ignore[misc]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FILES[:3]), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_changes_nothing(small: Path, name: str, where: float, bit: int) -> None:
    """Some bits say nothing: those that fill up, and the names that JSON gives to what nobody reads."""

    def flip(content: bytes) -> bytes:
        at = int(where * len(content))
        return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]

    def check(path: Path) -> None:
        assert not still_good(path) or holds(Store(path), STUDIES[:3])

    damaged(small, name, flip, check)


# --- steps


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[list[np.ndarray], int, int, dict[str, object]]:
    """Tokens of the scans of studies, ranks, studies of a step, and other settings."""
    counts = draw(st.lists(st.integers(1, 6), min_size=4, max_size=40))
    tokens = [np.array(draw(st.lists(st.integers(1, 500), min_size=n, max_size=n))) for n in counts]
    ranks = draw(st.integers(1, 4))
    batch = ranks * draw(st.integers(1, len(counts) // ranks))
    most = draw(st.none() | st.integers(1, 4))
    return tokens, ranks, batch, {"max_scans": most, "by_cost": draw(st.booleans()),
                                  "micro_tokens": draw(st.none() | st.integers(1, 3000))}  # fmt: skip


def work(tokens: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Of studies, of which each has its tokens between two bounds: with a linear and a quadratic part."""
    sums = np.add.reduceat(tokens, bounds[:-1])
    return sums + sums**2 / 1000


@settings(max_examples=30, deadline=None)
@given(data_sets())
def test_steps_lose_no_study_and_double_none(case: tuple[list[np.ndarray], int, int, dict]) -> None:
    tokens, ranks, batch, more = case
    per_epoch = len(tokens) // batch
    source = StepSampler(tokens, work, batch, 2 * per_epoch, 0, world_size=ranks, **more)  # type: ignore[arg-type]
    alone = StepSampler(tokens, work, batch, 2 * per_epoch, 0, **more)  # type: ignore[arg-type]
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            plan = source.plan(step).ranks
            items = sorted(item for rank in plan for piece in rank for item in piece)
            assert items == sorted(item for rank in alone.plan(step).ranks for piece in rank for item in piece)
            pieces = max(map(len, plan))  # as many for every rank, as far as it has studies
            assert all(piece for rank in plan for piece in rank)
            assert [len(rank) for rank in plan] == [min(pieces, sum(map(len, rank))) for rank in plan]
            if not more["by_cost"]:
                assert {sum(map(len, rank)) for rank in plan} == {batch // ranks}
            most = more["micro_tokens"]
            for piece in (piece for rank in plan for piece in rank) if most is not None else ():
                size = sum(int(tokens[item.study][list(item.scans)].sum()) for item in piece)
                assert len(piece) == 1 or size <= most
            seen.update(item.study for item in items)
        assert set(seen.values()) == {1} and len(seen) == per_epoch * batch

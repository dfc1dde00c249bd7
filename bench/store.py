"""A store at the size of a health system, and the throughput of preparing one.

    python bench/store.py --studies 250000    build, open, sample; every size and time is printed
    python bench/store.py --throughput        scans/s with one worker and two, the same input, one run after the other,
                                              beside what the machine gives to one busy loop and two

The large store has tiny scans (8 x 8 x 2) and a real manifest: reports, names and descriptions of usual length, 1 to 40
scans per study, 12.5 on average.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchlib.options import command, number, refusals
from benchlib.report import print_table
from benchlib.timing import clock
from hlip.prepare.discover import Found
from hlip.prepare.job import prepare
from hlip.prepare.recipe import load_recipe
from hlip.read.scan import ScanSource
from hlip.store.format import shard_file, write_shard
from hlip.store.tools import finish
from hlip.study import PreparedScan, StudyRecord

PER_SHARD = 500
SAMPLES = 10_000
SENTENCE = "No acute infarct, hemorrhage, mass or abnormal enhancement is seen; the ventricles are normal in size. "
READ = """
import json, sys, time
from pathlib import Path
import numpy as np
import pyarrow
from hlip.store.store import Store, StudyDataset
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
before, start = peak(), time.perf_counter()
store = Store(sys.argv[1])
opened = time.perf_counter() - start
data = StudyDataset(store, max_scans=10)
start = time.perf_counter()
for i in np.random.default_rng(0).integers(0, len(store), int(sys.argv[2])).tolist():
    study = data[i, i]
    assert study.uid == f"{i:08d}" and all(int(scan[0, 0, 0]) == i % 256 for scan in study.scans)
sampled = time.perf_counter() - start
print(json.dumps([opened, sampled, before, peak(), len(store), len(store.shapes)]))
"""


def make_studies(first: int, end: int) -> Iterator[StudyRecord[PreparedScan]]:
    for i in range(first, end):
        rng = np.random.default_rng(i)
        image = torch.full((2, 8, 8), i % 256, dtype=torch.uint8)
        planes = ("axial", "coronal", "sagittal")
        scans = [
            PreparedScan(f"{m:03d}", image, (5.0, 0.9, 0.9), planes[m % 3], 24, "MR", f"AX T2 FLAIR FS POST {m}")
            for m in range(int(np.clip(rng.gamma(4, 3.2), 1, 40)))
        ]
        yield StudyRecord(f"{i:08d}", scans, SENTENCE * 2, SENTENCE * 8, {"abnormal": float(i % 2)})


def write_part(folder: Path, studies: int, k: int) -> None:
    made = make_studies(k * PER_SHARD, min(studies, (k + 1) * PER_SHARD))
    write_shard(shard_file(folder, k), made, {"kind": "bench"}, "bench", folder / "work")


def large(folder: Path, studies: int) -> None:
    for name in ("shards", "work"):
        (folder / name).mkdir(parents=True)
    start = time.perf_counter()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        shards = range((studies + PER_SHARD - 1) // PER_SHARD)
        list(pool.map(functools.partial(write_part, folder, studies), shards, chunksize=4))
    written = time.perf_counter() - start
    finished = clock(lambda: finish(folder, folder / "work", source_hash="", shard_scans=0, hidden_ids=False))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    read = [sys.executable, "-c", READ, str(folder), str(SAMPLES)]
    out = subprocess.run(read, check=True, capture_output=True, text=True).stdout
    opened, sampled, before, after, n, scans = json.loads(out)
    print_table(
        ["step", "figure"],
        [
            ["studies, scans", f"{n}, {scans}"],
            ["manifest, MB", round((folder / "manifest.arrow").stat().st_size / 1e6)],
            ["write shards, s", round(written, 1)],
            ["manifest from shards, s", round(finished, 1)],
            ["its peak memory, GiB", round(peak, 2)],
            ["open, s", round(opened, 4)],
            [f"{SAMPLES} studies at random, up to 10 scans each, s", round(sampled, 2)],
            ["peak memory of the reader (imports alone), GiB", f"{after:.2f} ({before:.2f})"],
        ],
    )


def throughput(folder: Path, studies: int) -> None:
    import nilearn.datasets

    file = Path(nilearn.datasets.__file__).parent / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    scans = tuple(ScanSource(f"{m}", "nifti", (file,)) for m in range(4))
    sources = Found([StudyRecord(f"{i:04d}", scans) for i in range(studies)], [])
    rows: list[list[float]] = []
    for workers in (1, 2, 1, 2):
        loops = busy_loops(workers)
        start, used = time.perf_counter(), sum(os.times()[:4])  # of this process and the workers that it has waited for
        prepare(sources, load_recipe("brain-mri"), folder / str(len(rows)), workers=workers, shard_scans=8)
        seconds, used = time.perf_counter() - start, sum(os.times()[:4]) - used
        rows.append([workers, round(seconds, 1), round(4 * studies / seconds, 2), round(used / seconds, 2), loops])
    print_table(["workers", "s", "scans/s", "CPUs used", "busy loops, 10^6/s"], rows)
    ratio = (rows[1][2] + rows[3][2]) / (rows[0][2] + rows[2][2])
    machine = (rows[1][4] + rows[3][4]) / (rows[0][4] + rows[2][4])
    print(f"two workers are {ratio:.2f} times one; two busy loops, before each run, {machine:.2f} times one")
    print(f"load: {os.getloadavg()}")


def busy_loops(processes: int) -> float:
    """What the machine gives that moment to so many processes that only count: 10^6 steps a second, of all together."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        return round(sum(pool.map(count, [2.0] * processes)) / 2e6, 1)


def count(seconds: float) -> int:
    steps, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        steps += 1
    return steps


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--studies", type=number, help="of the store (default: 250000, with --throughput 96)")
    parser.add_argument("--throughput", action="store_true", help="measure how fast scans are read and written")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to make the temporary folder that is worked in (default: where the system has them)",
    )
    args = parser.parse_args()
    if args.folder and not args.folder.is_dir():
        parser.error(f"--folder {args.folder}: there is no such folder")
    with refusals(parser), tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.throughput:
            throughput(Path(folder), args.studies or 96)
        else:
            large(Path(folder) / "store", args.studies or 250_000)


if __name__ == "__main__":
    main()

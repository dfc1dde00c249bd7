"""Prepare scans as `hlip prepare` does, beside a straight-line implementation (SimpleITK and one PyTorch resize).

    python bench/prepare.py --json rows.json

Rows: real and realistic scans, each by both, in turns on one core; the results are compared in the same run. The
ratio is of medians. Files are in the page cache: what is measured is decoding and arithmetic.
"""

from __future__ import annotations

import runpy
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchlib.options import command, number, refusals
from benchlib.report import print_table, write
from benchlib.timing import in_turns
from hlip.prepare.recipe import load_recipe
from hlip.read.scan import ScanSource

TESTS = Path(__file__).resolve().parents[1] / "tests"  # have the straight line, and write DICOM files


def main() -> None:
    parser = command(__doc__, "--json", "--rounds")
    parser.add_argument(
        "--slices", type=number, default=300, help="of the CT scans, at least 50 (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.slices < 50:  # of which JPEG 2000 gets a tenth, and a recipe wants 5
        parser.error(f"--slices must be at least 50, got {args.slices}")
    torch.set_num_threads(1)
    rows = []
    with refusals(parser), tempfile.TemporaryDirectory() as folder:
        for case in make_cases(Path(folder), args.slices):
            rows.append(measure(*case, rounds=args.rounds))
            print(f"{rows[-1]['case']}: {rows[-1]['ratio']} times as fast", flush=True)
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    write(args, rows)


def make_cases(folder: Path, slices: int) -> list[tuple[str, str, str, list[Path]]]:
    """Name, recipe, kind and files of every case."""
    import nilearn.datasets
    import SimpleITK as sitk

    write_series = runpy.run_path(str(TESTS / "dicom_files.py"))["write_series"]
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    mni = Path(nilearn.datasets.__file__).parent / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    brain = sitk.ReadImage(str(mni), sitk.sitkFloat32)
    mri = [folder / "mri.nii.gz"]
    sitk.WriteImage(sitk.Cast(resampled(brain, (448, 448, 28)) * 5, sitk.sitkInt16), str(mri[0]))
    ct_image = resampled(brain, (512, 512, slices))
    voxels = sitk.GetArrayFromImage(ct_image)
    noise = np.random.default_rng(0).normal(0, 15, voxels.shape[1:])
    hounsfield = (np.where(voxels < 20, -1000, voxels * 0.6 - 60) + noise).astype(np.int16)
    ct = [folder / "ct.nii.gz"]
    image = sitk.GetImageFromArray(hounsfield)
    image.CopyInformation(ct_image)
    sitk.WriteImage(image, str(ct[0]))
    affine = np.diag([-ct_image.GetSpacing()[0], -ct_image.GetSpacing()[1], ct_image.GetSpacing()[2], 1.0])
    stored = (hounsfield + 1024).transpose(2, 1, 0)
    series = write_series(folder / "series", stored, affine, modality="CT", intercept=-1024)
    few = write_series(folder / "jpeg2000", stored[..., ::10], affine, transfer_syntax="jpeg2000", intercept=-1024)
    return [
        ("MNI T1, .nii.gz", "brain-mri", "nifti", [mni]),
        ("MRI 448x448x28, .nii.gz", "brain-mri", "nifti", mri),
        (f"head CT 512x512x{slices}, .nii.gz", "head-ct", "nifti", ct),
        (f"chest CT 512x512x{slices}, .nii.gz", "chest-ct", "nifti", ct),
        (f"chest CT 512x512x{slices}, DICOM", "chest-ct", "dicom", series),
        (f"head CT 512x512x{slices}, DICOM", "head-ct", "dicom", series),
        (f"MRI 512x512x{len(few)}, DICOM, JPEG 2000", "brain-mri", "dicom", few),
    ]


def resampled(image: Any, size: tuple[int, int, int]) -> Any:
    import SimpleITK as sitk

    spacing = [n * mm / m for n, mm, m in zip(image.GetSize(), image.GetSpacing(), size, strict=True)]
    return sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), spacing, image.GetDirection(), 0.0
    )


def measure(case: str, recipe: str, kind: Any, files: list[Path], rounds: int) -> dict[str, object]:
    prepare, source = load_recipe(f"{recipe}-linear").prepare, ScanSource("scan", kind, tuple(files))
    straight_line = runpy.run_path(str(TESTS / "straight_line.py"))
    oracle: Callable[[list[Path]], Any] = straight_line[recipe.replace("-", "_")]

    def ours() -> list[np.ndarray]:
        return [scan.image.numpy() for scan in prepare(source)]

    scans, wanted = ours(), oracle(files)
    wanted = wanted if isinstance(wanted, list) else [wanted]
    worst = max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(scans, wanted, strict=True))
    if worst > 1:
        raise SystemExit(f"{case}: {worst} grey levels apart")
    seconds = in_turns({"hlip": ours, "straight": partial(oracle, files)}, rounds)
    mine, theirs = map(statistics.median, seconds.values())
    return {
        "case": case,
        "hlip_ms": round(mine * 1000, 1),
        "straight_line_ms": round(theirs * 1000, 1),
        "ratio": round(theirs / mine, 2),
        "grey_levels_apart": worst,
    }


if __name__ == "__main__":
    main()

"""Studies, and the packing of studies into one token stream.

Shapes: T patch tokens, V = pd * ph * pw voxels of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from hlip_kernels import Grid, Level, StudyLayout

from .read.scan import Rejection, ScanSource, Volume

Scan = TypeVar("Scan")
OtherScan = TypeVar("OtherScan")


@dataclass(frozen=True)
class PreparedScan:
    """A scan as a model sees it, and what is kept of its origin.

    name: tells the scans of one source apart: volume of a 4D image, window, or both; empty if there is only one. In a
        study, the scan's own name; see `of`.
    image: (D, H, W) uint8, through-plane axis first.
    spacing: mm from voxel to voxel along D, H and W; not-a-number where the file does not tell.
    plane: "axial", "coronal" or "sagittal"; "axial" where the file does not tell.
    slices: of the source.
    modality, description: as `ScanSource` has them.
    grid: the volume that it was made of, without voxels: for `Recipe.on_source`.
    """

    name: str
    image: Tensor
    spacing: tuple[float, float, float]
    plane: str
    slices: int
    modality: str = ""
    description: str = ""
    grid: Volume | None = None

    def of(self, source: ScanSource) -> PreparedScan:
        """The same scan as one of its study."""
        name = f"{source.name}:{self.name}" if self.name else source.name
        return replace(self, name=name, modality=source.modality, description=source.description)


@dataclass(frozen=True)
class StudyRecord(Generic[Scan]):
    """A study on its way from files to a store: its scans in their fixed order, and what goes with them.

    scans: each a `ScanSource` as it lies on disk, or a `PreparedScan`.
    impression, findings: the report's two sections; empty if absent.
    labels: by name.
    rejected: what was left out of it, and why.
    """

    uid: str
    scans: Sequence[Scan]
    impression: str = ""
    findings: str = ""
    labels: Mapping[str, float] = field(default_factory=dict)
    rejected: Sequence[Rejection] = ()

    def having(self, scans: Sequence[OtherScan], rejected: Sequence[Rejection] = ()) -> StudyRecord[OtherScan]:
        """The same study with other scans."""
        return StudyRecord(self.uid, scans, self.impression, self.findings, self.labels, rejected)

    def shown(self: StudyRecord[PreparedScan]) -> Study:
        """What a model sees of it."""
        return Study(
            self.uid,
            [scan.image for scan in self.scans],
            [scan.name for scan in self.scans],
            self.impression,
            self.findings,
            list(self.rejected),
        )


@dataclass
class Study:
    """One examination: its scans, and what was written about it.

    scans: each (D, H, W) uint8, through-plane axis first; sizes may differ.
    names: what to call each scan, in the same order.
    impression, findings: the report's two sections; empty if absent.
    left_out: scans of its files that could not be used, and why.
    """

    uid: str
    scans: list[Tensor]
    names: list[str] = field(default_factory=list)
    impression: str = ""
    findings: str = ""
    left_out: list[Rejection] = field(default_factory=list)


@dataclass
class PackedBatch:
    """Studies side by side in one token stream, without padding.

    patches: (T, V) uint8 - voxels of each patch, ordered study, scan, slice, row, column.
    positions: (T, 2) int32, always on the host - the scan's place in its study, the patch's place in its scan's grid.
    layout: where slices, scans and studies begin and end.
    uids, impressions, findings: one per study; what is absent is an empty string.
    """

    patches: Tensor
    positions: Tensor
    layout: StudyLayout
    patch_size: Grid
    uids: list[str]
    impressions: list[str]
    findings: list[str]

    def __len__(self) -> int:
        return self.layout.num_studies

    def to(self, device: torch.device | str) -> PackedBatch:
        return replace(self, patches=self.patches.to(device, non_blocking=True), layout=self.layout.to(device))

    def pin_memory(self) -> PackedBatch:
        return replace(self, patches=self.patches.pin_memory())

    def select(self, keep: Tensor) -> PackedBatch:
        """The batch with only the rows `keep`: (n) increasing int64 or (T) bool, on the host."""
        rows = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        return replace(
            self,
            layout=self.layout.select(keep),
            positions=self.positions[rows],
            patches=self.patches[rows.to(self.patches.device, non_blocking=True)],
        )


def pack(studies: Study | Sequence[Study | Sequence[Tensor]], patch_size: Grid) -> PackedBatch:
    """Cut studies into patches and lay them into one stream.

    Args:
        studies: each a `Study`, or the (D, H, W) uint8 scans of one; they may differ in number and size. A `Study` may
            stand alone.
        patch_size: (pd, ph, pw) voxels; every scan must be a whole number of patches along each axis.

    Raises:
        ValueError: no study, a study without scans, or a scan of the wrong type or size; names the study.
    """
    if len(patch_size) != 3 or min(patch_size) < 1:
        raise ValueError(f"patch_size must be three positive integers, got {tuple(patch_size)}")
    studies = [studies] if isinstance(studies, Study) else studies
    items = [s if isinstance(s, Study) else Study(f"study {i}", list(s)) for i, s in enumerate(studies)]
    grids = []
    for study in items:
        if not study.scans:
            raise ValueError(f"{study.uid}: the study has no scans")
        grids.append([_grid(study, m, patch_size) for m in range(len(study.scans))])
    layout = StudyLayout.from_grids(grids, device=None)  # the encoder's plan makes the tensors, once
    pd, ph, pw = patch_size

    patches = torch.empty(layout.num_tokens, int(np.prod(patch_size)), dtype=torch.uint8)
    positions = torch.empty(layout.num_tokens, 2, dtype=torch.int32)
    row = 0
    for study, study_grids in zip(items, grids, strict=True):
        for m, (scan, (d, h, w)) in enumerate(zip(study.scans, study_grids, strict=True)):
            end = row + d * h * w
            patches[row:end].view(d, h, w, pd, ph, pw).copy_(
                scan.reshape(d, pd, h, ph, w, pw).permute(0, 2, 4, 1, 3, 5)
            )
            positions[row:end, 0] = m
            positions[row:end, 1] = torch.arange(d * h * w, dtype=torch.int32)
            row = end
    impressions, findings = [study.impression for study in items], [study.findings for study in items]
    return PackedBatch(patches, positions, layout, (pd, ph, pw), [study.uid for study in items], impressions, findings)


def join_report(impression: str, findings: str) -> str:
    return " ".join(part for part in (impression, findings) if part)


def _grid(study: Study, m: int, patch_size: Grid) -> Grid:
    scan = study.scans[m]
    name = f"{study.uid}, scan {study.names[m] if m < len(study.names) else m}"
    if not isinstance(scan, Tensor) or scan.dtype != torch.uint8 or scan.dim() != 3:
        got = f"{scan.dtype} {tuple(scan.shape)}" if isinstance(scan, Tensor) else repr(scan)
        raise ValueError(f"{name}: expected a uint8 tensor (D, H, W), got {got}")
    if 0 in scan.shape or any(n % p for n, p in zip(scan.shape, patch_size, strict=True)):
        raise ValueError(f"{name}: shape {tuple(scan.shape)} is not a whole number of patches {tuple(patch_size)}")
    d, h, w = (n // p for n, p in zip(scan.shape, patch_size, strict=True))
    return d, h, w


class Draws:
    """Uniform random numbers for the studies of a batch.

    Args:
        seeds: one per study, which then draws the same in whatever batch it is; None draws from torch's default
            generator.
    """

    def __init__(self, seeds: Sequence[int] | None = None) -> None:
        self.generators = None if seeds is None else [np.random.default_rng(seed) for seed in seeds]

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """(sum of counts) float64: as many numbers for each study as `counts` (studies) says, study by study."""
        if self.generators is None:
            return torch.rand(int(counts.sum()), dtype=torch.float64).numpy()
        return np.concatenate([g.random(int(n)) for g, n in zip(self.generators, counts, strict=True)])


def patch_dropout(layout: StudyLayout, rate: float, level: Level, draws: Draws | None = None) -> Tensor:
    """Choose the patches to keep: in every group of `level`, `max(1, int(L * (1 - rate)))` of its L, at random.

    Returns increasing int64 rows for `select`.
    """
    lengths = layout.seqlens(level)
    return torch.from_numpy(np.flatnonzero(_drawn(lengths, rate, (draws or Draws())(layout.seqlens("study")))))


def scan_dropout(layout: StudyLayout, rate: float, draws: Draws | None = None) -> Tensor:
    """Choose the scans to keep: in every study `max(1, int(M * (1 - rate)))` of its M, at random.

    Returns the increasing int64 rows of their patches.
    """
    num_scans = np.array([len(study) for study in layout.grids])
    scans = _drawn(num_scans, rate, (draws or Draws())(num_scans))
    return torch.from_numpy(np.flatnonzero(np.repeat(scans, layout.seqlens("scan"))))


def _drawn(lengths: np.ndarray, rate: float, keys: np.ndarray) -> np.ndarray:
    """Which places of runs of the given lengths are kept: of L places, the `max(1, int(L * (1 - rate)))` with the
    smallest of `keys`, from 0 to 1."""
    runs = np.repeat(np.arange(len(lengths)), lengths)
    order = np.argsort(runs + keys)
    ranks = np.empty(len(runs), dtype=np.int64)
    ranks[order] = np.arange(len(runs)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return ranks < np.repeat(np.maximum(1, (lengths * (1 - rate)).astype(np.int64)), lengths)

"""Problems of attention within groups: the cases that `attention.py` times, and what each asks of the machine.

Cases have the names of levels and lengths (patches and prefix rows of a group), or of a mix of studies:

    slice-197, slice-198, slice-99       slices of 14 x 14 tokens; with two prefix rows; at half the patches
    scan-1177, scan-1569, scan-2745      scans of 6, 8 and 14 slices
    scan-883                             at a patch dropout of 0.25
    study-4705                           4 scans; the tokens of slice-197 and scan-1177 as one study
    study-16465, -36457, -254017         14, 31 and 162 scans; not tried without a GPU unless named
    MIX-LEVEL, MIX-LEVEL-drop25, -drop50 studies with the scan counts of `SCANS`, in a mix drawn by its distribution

Shapes: R rows, those of prefixes among them, G groups, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hlip.study import Draws, patch_dropout
from hlip_kernels import Grid, Level, StudyLayout
from hlip_kernels.layout import LEVELS

BEFORE: dict[Level, Level] = {"slice": "scan", "scan": "study", "study": "scan"}
# `SCANS[mix][m - 1]` is the weight of studies with m scans. pub_brain_5 was counted: 18,343 studies, from the public
# processing logs of the released HLIP data tools. The other two are synthetic fits to the paper's figures (arXiv
# 2505.21862): BrainMRI220K, 220,993 studies, 3.13 million scans, 1 to 162 a study, third quartile 17; HeadCT240K,
# 244,253 studies, 1.44 million scans, 1 to 71 a study, third quartile 6. The brain MRI fit ends at 80, short of the
# real tail.
# fmt: off
SCANS: dict[str, tuple[float, ...]] = {
    "pub_brain_5": (
        4633, 1756, 942, 7186, 1461, 232, 170, 256, 506, 727, 126, 56, 269, 23,
    ),
    "brain_mri": (
        0, 3.5127e-06, 0.00016489, 0.0016542, 0.0071667, 0.018728, 0.035357, 0.053583, 0.069579, 0.08077,
        0.086262, 0.086481, 0.082574, 0.075893, 0.067684, 0.058932, 0.050334, 0.042329, 0.035153, 0.028898,
        0.023562, 0.019084, 0.015374, 0.012332, 0.0098589, 0.0078607, 0.0062548, 0.0049695, 0.0039441,
        0.0031282, 0.0024801, 0.0019662, 0.001559, 0.0012365, 0.00098123, 0.00077917, 0.0006192, 0.0004925,
        0.00039211, 0.00031251, 0.00024935, 0.00019918, 0.0001593, 0.00012756, 0.00010228, 8.2114e-05,
        6.6011e-05, 5.3137e-05, 4.2831e-05, 3.4571e-05, 2.7942e-05, 2.2615e-05, 1.8328e-05, 1.4875e-05,
        1.2088e-05, 9.8368e-06, 8.0156e-06, 6.5404e-06, 5.3437e-06, 4.3718e-06, 3.5814e-06, 2.9377e-06,
        2.4128e-06, 1.9843e-06, 1.6339e-06, 1.3471e-06, 1.112e-06, 9.1907e-07, 7.6055e-07, 6.3012e-07,
        5.2269e-07, 4.3409e-07, 3.6092e-07, 3.0044e-07, 2.5038e-07, 2.0889e-07, 1.7447e-07, 1.4589e-07,
        1.2212e-07, 1.0233e-07,
    ),
    "head_ct": (
        0.025934, 0.14728, 0.21079, 0.1838, 0.13114, 0.085638, 0.053768, 0.034211, 0.021838, 0.014404, 0.009983,
        0.0073625, 0.0058057, 0.0048703, 0.0042931, 0.0039186, 0.0036558, 0.003452, 0.0032775, 0.0031164,
        0.0029604, 0.002806, 0.0026521, 0.002499, 0.0023477, 0.0021992, 0.0020546, 0.0019149, 0.0017807,
        0.0016527, 0.0015312, 0.0014165, 0.0013086, 0.0012076, 0.0011132, 0.0010252, 0.00094353, 0.00086778,
        0.00079769, 0.00073293, 0.00067318, 0.00061813, 0.00056745, 0.00052083, 0.000478, 0.00043866,
        0.00040255, 0.00036942, 0.00033903, 0.00031117, 0.00028563, 0.00026223, 0.00024078, 0.00022113,
        0.00020313, 0.00018663, 0.00017151, 0.00015765, 0.00014496, 0.00013332, 0.00012265, 0.00011286,
        0.00010389, 9.5663e-05, 8.8113e-05, 8.1184e-05, 7.4825e-05, 6.8985e-05, 6.3623e-05, 5.8696e-05,
        5.4169e-05,
    ),
}
# fmt: on


def draw_scans(mix: str, studies: int, seed: int = 0, most: int | None = None) -> np.ndarray:
    """Scans of so many studies of a mix, in random order.

    Stratified: one study from each of `studies` equal parts of the distribution, so that a few studies stand for the
    mix.

    Args:
        most: scans of a study beyond this are left out.

    Returns:
        (studies) int64.
    """
    random = np.random.default_rng(seed)
    weights = np.cumsum(SCANS[mix])
    places = (np.arange(studies) + random.random(studies)) / studies
    scans = np.searchsorted(weights / weights[-1], places, side="right") + 1
    return random.permutation(scans if most is None else np.minimum(scans, most))


@dataclass
class Problem:
    """What is computed: attention over the groups of one level.

    make: builds the layout, as a data loader does for every batch.
    before: the level of the layer before, from which residual rows come.
    """

    make: Callable[[], StudyLayout]
    level: Level
    before: Level
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    layout: StudyLayout = field(init=False)
    rows: list[slice] = field(init=False)  # of the groups
    lengths: np.ndarray = field(init=False)  # (G), prefix rows counted

    def __post_init__(self) -> None:
        self.layout = layout = self.make().to(self.device)
        bounds = layout.cu_seqlens(self.level).tolist()
        self.rows = list(map(slice, bounds[:-1], bounds[1:]))
        self.lengths = np.diff(bounds)

    @property
    def num_rows(self) -> int:
        return int(self.lengths.sum())

    def draw(self) -> tuple[Tensor, Tensor]:
        """Random (R, 3, H, D) of q, k and v, and (R, H, D) of the output's gradient."""
        generator = torch.Generator().manual_seed(0)
        shapes = (self.num_rows, 3, self.heads, self.head_dim), (self.num_rows, self.heads, self.head_dim)
        qkv, grad_out = (torch.randn(shape, generator=generator).to(self.device, self.dtype) for shape in shapes)
        return qkv, grad_out

    def flops(self, backward: bool) -> int:
        """Of the products of attention: two of 2 L^2 D a head forward, five backward (the scores once more)."""
        return (14 if backward else 4) * int((self.lengths**2).sum()) * self.heads * self.head_dim

    def least_bytes(self, backward: bool) -> int:
        """What must cross the memory at least: q, k, v and out; backward those, their four gradients, and twice the
        log-sum-exp, which is four bytes a row and head."""
        row = self.heads * self.head_dim * self.dtype.itemsize
        return self.num_rows * ((4 + 8) * row + 8 * self.heads if backward else 4 * row + 4 * self.heads)


class Case(NamedTuple):
    """grids: of the scans of each study. dropout: of patches, in every group of `dropped`."""

    name: str
    level: Level
    grids: Sequence[Sequence[Grid]]
    num_prefix: int = 1
    dropout: float = 0.0
    dropped: Level = "scan"
    before: Level | None = None

    def layout(self) -> Callable[[], StudyLayout]:
        """What builds the layout; which patches are dropped is known then."""
        make = partial(StudyLayout.from_grids, self.grids, self.num_prefix)
        if not self.dropout:
            return make
        keep = patch_dropout(make(), self.dropout, self.dropped, Draws(range(len(self.grids))))
        return lambda: make().select(keep)

    def problem(self, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> Problem:
        return Problem(self.layout(), self.level, self.before or BEFORE[self.level], heads, head_dim, dtype, device)


def all_cases(device: str, batch: int, seed: int = 0) -> list[Case]:
    """
    Args:
        batch: studies of the cases of one length, the longest excepted; four times as many of the ragged ones.
    """
    scan: Grid = (6, 14, 14)
    four: list[list[Grid]] = [[scan] * 4] * batch
    chest: Grid = (14, 14, 14)
    cases = [
        Case("slice-197", "slice", four),
        Case("slice-198", "slice", [[(8, 14, 14)] * 3] * batch, num_prefix=2),
        Case("slice-99", "slice", four, dropout=0.5, dropped="slice"),
        Case("scan-1177", "scan", four),
        Case("scan-1569", "scan", [[(8, 14, 14)] * 3] * batch),
        Case("scan-2745", "scan", [[chest]] * 2 * batch, before="slice"),
        Case("scan-883", "scan", four, dropout=0.25),
        Case("study-4705", "study", four),
        Case("study-16465", "study", [[scan] * 14]),
        Case("study-36457", "study", [[scan] * 31]),
        Case("study-254017", "study", [[(8, 14, 14)] * 162]),
    ]
    for mix in SCANS:
        scans = draw_scans(mix, 4 * batch, seed, most=None if device == "cuda" else 10)
        grids = [[scan] * int(count) for count in scans]
        for level, dropout in product(LEVELS, (0.0, 0.25, 0.5)):
            suffix = f"-drop{100 * dropout:.0f}" if dropout else ""
            cases.append(Case(f"{mix}-{level}{suffix}", level, grids, dropout=dropout))
    return cases


def chosen(cases: Sequence[Case], patterns: Sequence[str] | None, device: str) -> list[Case]:
    """The cases that a pattern names; without patterns all, but without a GPU not the longest studies.

    Raises:
        ValueError: a pattern that no case fits.
    """
    if patterns is None:
        return [case for case in cases if device == "cuda" or longest(case) < 10**4 or len(case.grids) > 1]
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise ValueError(f"no case {pattern!r}; there are {', '.join(case.name for case in cases)}")
    return [case for case in cases if any(fnmatchcase(case.name, pattern) for pattern in patterns)]


def longest(case: Case) -> int:
    """Patches of the longest study, before dropout."""
    return max(sum(d * h * w for d, h, w in study) for study in case.grids)

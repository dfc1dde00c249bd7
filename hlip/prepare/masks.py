"""Which slices of a store's scans show a lesion, read off masks.

Shapes: (X, Y, Z) of a mask, on the voxels of its scan's own file; D slices of a scan.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..read.files import NIFTI_SUFFIXES, Progress, stem
from ..read.nifti import read_nifti
from ..read.paths import check_within
from ..read.scan import ScanError, Volume
from ..store.store import Store
from .recipe import Recipe

Slices = dict[str, dict[str, list[int]]]  # by study and scan


def lesion_slices(mask: Volume, recipe: Recipe) -> tuple[list[int], int]:
    """The slices of the prepared scan that show those where the mask is not 0, increasing, and D of the source.

    A slice between two of the source shows the nearer one. Where slices were thinned out, a small lesion may be in
    none.

    Args:
        mask: on the voxels of the file that the scan was prepared from.
        recipe: by which it was.
    """
    array, spacing, _ = recipe.depth_first(mask)
    axis = recipe.axes(array.shape, spacing, mask.prepared)[0]
    return axis.forward(np.flatnonzero(array.any(axis=(1, 2)))), len(array)


def read_masks(store: Store, folder: Path | str, progress: Progress = iter) -> Slices:
    """The lesions' slices of a store's scans; of scans whose mask is 0 everywhere, or in all slices shown, none.

    Args:
        folder: holds STUDY/SCAN for every scan with a mask, named as in the store, as `.nii` or `.nii.gz`. What
            follows a colon in a scan's name does not matter: the windows of a scan share its mask.
        progress: such as tqdm, over the masks.

    Raises:
        ValueError: no masks, one that is of no scan of the store, whose slices are not its scan's, or a link that leads
            out of the folder; names the file.
        ScanError: a mask that is not readable.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.glob("*/*") if path.name.lower().endswith(NIFTI_SUFFIXES))
    if not files:
        raise ValueError(f"{folder}: has no masks STUDY/SCAN.nii.gz")
    places = {uid: i for i, uid in enumerate(store.uids.tolist())}
    recipe = Recipe.from_dict(store.info["recipe"])
    shown: Slices = {}
    for path in progress(files):
        check_within(path, folder)
        place = places.get(path.parent.name)
        if place is None:
            raise ValueError(f"{path}: the store has no study {path.parent.name}")
        names, depths = (store.manifest.column(name)[place].as_py() for name in ("name", "slices"))
        scans = [m for m, name in enumerate(names) if stem(name.split(":")[0]) == stem(path.name)]
        if not scans:
            raise ValueError(f"{path}: study {path.parent.name} has no scan of that name, only {', '.join(names)}")
        slices, depth = _read(path, recipe)
        for m in scans:
            if depth not in (depths[m], 0):
                raise ValueError(f"{path}: has {depth} slices, the scan has {depths[m]}")
            shown.setdefault(path.parent.name, {})[names[m]] = slices
    return shown


def _read(path: Path, recipe: Recipe) -> tuple[list[int], int]:
    try:
        return lesion_slices(read_nifti(path), recipe)
    except ScanError as error:
        if error.rule != "constant":
            raise
        return [], 0

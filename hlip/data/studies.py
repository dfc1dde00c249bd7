"""One study from its files."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from .batch import Study
from .preprocess import Recipe
from .readers import ScanError, Volume, read_scan
from .sources import find_scans

logger = logging.getLogger(__name__)


def load_study(
    paths: Path | str | Iterable[Path | str],
    recipe: Recipe | None = None,
    uid: str | None = None,
    impression: str = "",
    findings: str = "",
) -> Study:
    """Read one study: NIfTI images, DICOM series or tensors of the released tools.

    Args:
        paths: scan files, of which each must be usable; or one folder, in which scans that are not (a localiser, say)
            are left out with a warning. Scans are taken in sorted order: a scan's place has a meaning.
        recipe: how to preprocess them; `Recipe()`, which is brain MRI's, if None.
        uid: the study's name; the folder's, or the first file's, if None.

    Raises:
        ScanError: a file that cannot be used, or a folder without any that can; names it.
        ValueError: no scan among `paths`, one that is given twice, or DICOM files of two studies.
    """
    return load_study_on_grids(paths, recipe, uid, impression, findings)[0]


def load_study_on_grids(
    paths: Path | str | Iterable[Path | str],
    recipe: Recipe | None = None,
    uid: str | None = None,
    impression: str = "",
    findings: str = "",
) -> tuple[Study, list[Volume]]:
    """As `load_study`, and for each scan the volume it was made of, without voxels: for `Recipe.on_source`."""
    folder = isinstance(paths, (str, Path)) and Path(paths).is_dir()
    recipe = recipe or Recipe()
    sources = find_scans(paths)
    scans: list[Tensor] = []
    names: list[str] = []
    grids: list[Volume] = []
    for source in sources:
        try:
            volumes = read_scan(source, recipe.rules)
            made = [(volume.without_voxels(), scan) for volume in volumes for scan in recipe(volume)]
            del volumes
            for grid, scan in made:
                scans.append(scan.image)
                names.append(scan.name_in_study(source))
                grids.append(grid)
        except ScanError as error:
            if not folder or (source is sources[-1] and not scans):
                raise
            logger.warning("left out a scan: %s", error)
    if uid is None:
        uid = Path(str(paths)).resolve().name if folder else sources[0].files[0].name
    return Study(uid, scans, names, impression, findings), grids

"""One study from its files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..read.nifti import read_scan
from ..read.scan import Rejection, ScanError, Volume
from ..study import Study
from .discover import StudySource, find_scans
from .recipe import Recipe

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
            are left out with a warning, and listed in the study's `left_out`. Scans are taken in sorted order: a scan's
            place has a meaning.
        recipe: how to preprocess them; `Recipe()`, which is brain MRI's, if None.
        uid: the study's name; if None, that of the folder, or of the one that several files lie in, or of the first
            file.

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
    rejected: list[Rejection] = []
    sources = find_scans(paths, rejected)
    if uid is None:
        files = [file for scan in sources for file in scan.files]
        uid = (Path(str(paths)) if folder else called_after(files)).resolve().name
    source = StudySource(uid, tuple(sources), impression, findings)
    study, grids = read_study(source, recipe or Recipe(), all_scans=not folder)
    study.left_out[:0] = [replace(rejection, study=uid) for rejection in rejected]
    return study, grids


def called_after(files: Sequence[Path]) -> Path:
    """What a study is called after: of several files the folder that they all lie in, else the first of them."""
    folders = {file.parent for file in files}
    return folders.pop() if len(files) > len(folders) == 1 else min(files)


def read_study(source: StudySource, recipe: Recipe, all_scans: bool = False) -> tuple[Study, list[Volume]]:
    """Read a study's scans, and for each scan the volume it was made of, without voxels.

    Args:
        all_scans: each must be usable. If not, those that are not are left out, with a warning: `Study.left_out`.

    Raises:
        ScanError: a scan that cannot be used and may not be left out, or is the last of several of which none can.
    """
    study = Study(source.uid, [], [], source.impression, source.findings)
    grids: list[Volume] = []
    for scan in source.scans:
        try:
            volumes = read_scan(scan, recipe.rules)
            made = [(volume.without_voxels(), prepared) for volume in volumes for prepared in recipe(volume)]
            del volumes
        except ScanError as error:
            if all_scans or (scan is source.scans[-1] and not study.scans):
                raise
            logger.warning("left out a scan: %s", error)
            study.left_out.append(Rejection(source.uid, scan.name, error.rule, error.reason))
            continue
        for grid, prepared in made:
            study.scans.append(prepared.image)
            study.names.append(prepared.name_in_study(scan))
            grids.append(grid)
    return study, grids

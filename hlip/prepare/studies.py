"""One study from its files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..read.scan import ScanError, ScanSource, Volume
from ..study import PreparedScan, Study, StudyRecord
from .discover import find_study
from .recipe import Recipe, as_recipe

logger = logging.getLogger(__name__)


def load_study(
    paths: Path | str | Iterable[Path | str],
    recipe: Recipe | str | Path | None = None,
    uid: str | None = None,
    impression: str = "",
    findings: str = "",
) -> Study:
    """Read one study: NIfTI images, DICOM series or tensors of the released tools.

    Args:
        paths: scan files, of which each must be usable; or one folder, in which scans that are not (a localiser, say)
            are left out with a warning, and listed in the study's `left_out`. Scans are taken in sorted order: a scan's
            place has a meaning.
        recipe: how to preprocess them, or a name or file as `load_recipe` takes it; `Recipe()`, which is
            brain-mri-linear, if None.
        uid: the study's name; if None, that of the folder, or of the one that several files lie in, or of the first
            file.

    Raises:
        ScanError: a file that cannot be used, or a folder without any that can; names it.
        ValueError: no scan among `paths`, one that is given twice, or DICOM files of two studies.
    """
    return load_study_on_grids(paths, recipe, uid, impression, findings)[0]


def load_study_on_grids(
    paths: Path | str | Iterable[Path | str],
    recipe: Recipe | str | Path | None = None,
    uid: str | None = None,
    impression: str = "",
    findings: str = "",
) -> tuple[Study, list[Volume]]:
    """As `load_study`, and for each scan the volume it was made of, without voxels: for `Recipe.on_source`."""
    folder = isinstance(paths, (str, Path)) and Path(paths).is_dir()
    study = find_study(paths)
    if uid is None:
        files = [file for scan in study.scans for file in scan.files]
        uid = (Path(str(paths)) if folder else called_after(files)).resolve().name
    rejected = [replace(rejection, study=uid) for rejection in study.rejected]
    source = replace(study, uid=uid, impression=impression, findings=findings, rejected=rejected)
    prepared = read_study(source, as_recipe(recipe or Recipe()), all_scans=not folder)
    return prepared.shown(), [scan.grid for scan in prepared.scans if scan.grid is not None]


def called_after(files: Sequence[Path]) -> Path:
    """What a study is called after: of several files the folder that they all lie in, else the first of them."""
    folders = {file.parent for file in files}
    return folders.pop() if len(files) > len(folders) == 1 else min(files)


def read_study(source: StudyRecord[ScanSource], recipe: Recipe, all_scans: bool = False) -> StudyRecord[PreparedScan]:
    """Read a study's scans.

    Args:
        all_scans: each must be usable. If not, those that are not are left out, with a warning.

    Raises:
        ScanError: a scan that cannot be used and may not be left out, or is the last of several of which none can.
    """
    scans: list[PreparedScan] = []
    rejected = list(source.rejected)
    for scan in source.scans:
        try:
            scans += [prepared.of(scan) for prepared in recipe.prepare(scan)]
        except ScanError as error:
            if all_scans or (scan is source.scans[-1] and not scans):
                raise
            logger.warning("left out a scan: %s", error)
            rejected.append(error.of(source.uid, scan.name))
    return source.having(scans, rejected)

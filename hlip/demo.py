"""The demo data set: brain MRI studies with real anatomy and synthetic pathology.

The anatomy is the MNI152 template that the nilearn package ships (T1, grey and white matter). Each study
deforms it, places one of five findings at a random site, and images it with 3 to 8 scans that differ in
contrast, plane, matrix, spacing and storage order. A finding shows in some contrasts only, and which
contrasts a study holds says nothing of its finding. Everything follows from one seed.

    python -m hlip.demo --out data/demo
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.nn import functional as F
from tqdm import tqdm

from .arguments import add_arguments, argument
from .output import csv_text, replacing_folder

VERSION = 1
CLASSES = ("normal", "stroke", "glioma", "meningioma", "metastases")
PROMPTS = {
    "classes": {
        "normal": ["no significant abnormality", "normal brain", "no acute intracranial abnormality"],
        "stroke": ["acute stroke", "acute infarct", "restricted diffusion from acute ischemia"],
        "glioma": ["glioma", "infiltrating glial tumor", "intra-axial tumor with surrounding edema"],
        "meningioma": ["meningioma", "extra-axial dural-based mass", "dural-based enhancing meningioma"],
        "metastases": ["brain metastases", "multiple metastases", "multiple enhancing metastatic lesions"],
    },
    "templates": ["This MRI study shows: {}.", "Impression: {}.", "{}."],
}

# Signal of cerebrospinal fluid, grey and white matter; what each finding adds; the usual plane.
TISSUE = {
    "t1": (0.15, 0.55, 0.90),
    "t1c": (0.15, 0.50, 0.65),
    "t2": (1.00, 0.65, 0.45),
    "flair": (0.10, 0.75, 0.60),
    "dwi": (0.15, 0.60, 0.50),
}
LESION = {
    "stroke": {"dwi": 1.0},
    "glioma": {"t2": 1.0, "flair": 1.0, "t1": 0.35},
    "meningioma": {"t1c": 1.0, "dwi": 0.75},
    "metastases": {"t1c": 1.0},
}
PLANE = {"t1": "sagittal", "t1c": "axial", "t2": "axial", "flair": "coronal", "dwi": "axial"}
BRIGHTNESS = 0.8  # of normal tissue, so that lesions are the brightest
CENTER = np.array([0.0, -18.0, 6.0])  # of the template's brain, mm

# Columns: directions of slice, row and column axes in mm space (x right, y anterior, z superior).
_PLANE_AXES = {
    "axial": np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]]).T,
    "coronal": np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]]).T,
    "sagittal": np.array([[1, 0, 0], [0, 0, -1], [0, -1, 0]]).T,
}

_FINDINGS = {
    "normal": [
        "No significant abnormality.",
        "Normal brain MRI.",
        "No acute infarct, mass or abnormal enhancement.",
        "No acute intracranial abnormality.",
        "Unremarkable appearance of the brain.",
    ],
    "stroke": [
        "Acute infarct in the {side} {lobe} region.",
        "Restricted diffusion in the {side} {lobe} lobe, consistent with acute ischemia.",
        "Acute stroke involving the {side} {lobe} territory.",
        "Wedge-shaped acute ischemic infarct, {side} {lobe}.",
        "Findings of acute ischemic stroke in the {side} {lobe} lobe.",
    ],
    "glioma": [
        "Infiltrating glial tumor in the {side} {lobe} lobe.",
        "T2 hyperintense intra-axial tumor of the {side} {lobe} lobe, most likely glioma.",
        "Large {side} {lobe} glioma with surrounding edema.",
        "Expansile infiltrative {side} {lobe} lesion, suspicious for glioma.",
        "Glioma centered in the {side} {lobe} white matter.",
    ],
    "meningioma": [
        "Dural-based enhancing mass over the {side} {lobe} convexity, consistent with meningioma.",
        "{side} {lobe} meningioma.",
        "Extra-axial homogeneously enhancing {side} {lobe} mass, typical of meningioma.",
        "Solitary {side} {lobe} convexity meningioma.",
        "Enhancing dural-based {side} {lobe} meningioma.",
    ],
    "metastases": [
        "Multiple enhancing lesions, consistent with brain metastases.",
        "Numerous enhancing metastases, the largest in the {side} {lobe} lobe.",
        "Multiple metastatic lesions in both hemispheres.",
        "Scattered enhancing nodules, concerning for metastatic disease.",
        "Brain metastases, including the {side} {lobe} lobe.",
    ],
}
_PREFIXES = ["", "MRI of the brain. ", "Impression: ", "This MRI study shows: "]
_BACKGROUND = [
    "The ventricles are normal in size.",
    "No midline shift.",
    "The major flow voids are preserved.",
    "No extra-axial fluid collection.",
    "The visualized sinuses are clear.",
]


@dataclass(frozen=True)
class Template:
    """MNI152 at 2 mm: (3, X, Y, Z) float32 maps of fluid, grey matter and white matter; they add up to brain."""

    maps: torch.Tensor
    affine: np.ndarray

    def sample(self, points: np.ndarray) -> np.ndarray:
        """Maps at (N, 3) points in mm, trilinear, zero outside. Returns (3, N)."""
        voxels = (points - self.affine[:3, 3].astype(np.float32)) * np.float32(0.5)
        return _sample(self.maps, voxels, np.array(self.maps.shape[1:]), "zeros")


@functools.cache
def load_template() -> Template:
    """Read the three volumes of the nilearn wheel, smooth by 1 mm, keep every second voxel.

    Raises:
        ImportError: nilearn, or what it needs itself, is not installed.
    """
    try:
        import nibabel
        import nilearn.datasets
        from scipy.ndimage import gaussian_filter
    except ImportError as error:
        raise ImportError(f"the demo data need nilearn: pip install 'hlip-kernels[demo]' ({error})") from error

    folder = Path(nilearn.datasets.__file__).parent / "data"
    images = {
        k: nibabel.load(folder / f"mni_icbm152_{k}_tal_nlin_sym_09a_converted.nii.gz") for k in ("t1", "gm", "wm")
    }
    t1, grey, white = (np.asarray(image.dataobj, dtype=np.float32) / 255 for image in images.values())
    brain = (t1 > 0).astype(np.float32)
    fluid = np.clip(brain - grey - white, 0, 1)
    maps = [gaussian_filter(m, 1.0)[::2, ::2, ::2] for m in (fluid, grey, white)]
    return Template(torch.from_numpy(np.stack(maps)), images["t1"].affine)


def _sample(maps: torch.Tensor, voxels: np.ndarray, size: np.ndarray, padding: str) -> np.ndarray:
    grid = torch.from_numpy(
        (voxels * (2 / (size - 1)).astype(np.float32) - 1)[None, None, None, :, ::-1].astype(np.float32)
    )
    return F.grid_sample(maps[None], grid, padding_mode=padding, align_corners=True)[0, :, 0, 0].numpy()


class Warp:
    """A small random affine and a smooth displacement: mm of the scanner to mm of the template."""

    def __init__(self, rng: np.random.Generator, size: float) -> None:
        angles = np.deg2rad(rng.normal(0, 2.0 * size, 3))
        self.matrix = rotation(angles) * (1 + rng.normal(0, 0.04 * size / 2))
        self.shift = rng.normal(0, 1.5 * size, 3)
        self.field = torch.from_numpy(rng.normal(0, 1.5 * size, (3, 5, 5, 5)).astype(np.float32))

    def __call__(self, points: np.ndarray) -> np.ndarray:
        inside = np.clip((points - CENTER) / 100, -1, 1)
        displacement = _sample(self.field, (inside + 1) * 2, np.array([5, 5, 5]), "border").T
        return (points - CENTER) @ self.matrix.T + CENTER + self.shift + displacement


def rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation about x, then y, then z, in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return rz @ ry @ rx


Shape = Callable[[np.ndarray], np.ndarray]


def make_lesion(finding: str, rng: np.random.Generator, template: Template) -> tuple[Shape, np.ndarray]:
    """A finding's extent, (N, 3) mm of the template to (N) weights 0 to 1, and its center."""
    if finding == "stroke":
        apex = CENTER + np.array([rng.choice([-1, 1]) * 8, rng.uniform(-8, 8), rng.uniform(4, 14)])
        axis = rng.normal(0, [0.4, 1.0, 0.5])
        axis[0] = np.sign(apex[0]) * max(abs(axis[0]), 0.7)
        axis /= np.linalg.norm(axis)
        half_angle = np.deg2rad(rng.uniform(34, 50) / 2)

        def cone(points: np.ndarray) -> np.ndarray:
            away = points - apex
            distance = np.linalg.norm(away, axis=1) + 1e-6
            angle = np.arccos(np.clip(away @ axis / distance, -1, 1))
            return _soft((half_angle - angle) * distance) * _soft(distance - 12)

        return cone, apex + 50 * axis
    if finding == "glioma":
        center = _site(rng, template, depth=14.0)
        radius = rng.uniform(21, 31)
        waves, phases = rng.normal(0, 2.0, (4, 3)), rng.uniform(0, 2 * np.pi, 4)

        def irregular(points: np.ndarray) -> np.ndarray:
            away = points - center
            distance = np.linalg.norm(away, axis=1) + 1e-6
            bumps = np.sin(away / distance[:, None] @ waves.T + phases).sum(1)
            return _soft(radius * (1 + 0.09 * bumps) - distance)

        return irregular, center
    if finding == "meningioma":
        center = _site(rng, template, depth=0.0)
        radius = rng.uniform(18, 26)
        return functools.partial(_ball, center=center, radius=radius), center
    if finding == "metastases":
        centers = [_site(rng, template, depth=6.0) for _ in range(rng.integers(5, 11))]
        radii = rng.uniform(6, 9, len(centers))

        def balls(points: np.ndarray) -> np.ndarray:
            return np.max([_ball(points, c, r) for c, r in zip(centers, radii, strict=True)], axis=0)

        return balls, centers[int(np.argmax(radii))]
    raise ValueError(f"no such finding: {finding!r}")


def _soft(depth_mm: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(depth_mm, -30, 30)))


def _ball(points: np.ndarray, center: np.ndarray, radius: float) -> np.ndarray:
    return _soft(radius - np.linalg.norm(points - center, axis=1))


def _site(rng: np.random.Generator, template: Template, depth: float) -> np.ndarray:
    """A point `depth` mm below the brain's surface, in a random direction above the skull base."""
    direction = rng.normal(size=3)
    direction[2] = max(direction[2], -0.3 * abs(direction[2]))
    direction /= np.linalg.norm(direction)
    steps = np.arange(20, 110, 1.0)
    inside = template.sample(CENTER + steps[:, None] * direction).sum(0) > 0.5
    surface = steps[inside].max()
    deepest = surface - depth if depth == 0 else rng.uniform(min(25.0, surface - depth), surface - depth)
    return CENTER + direction * deepest


def make_scan(
    contrast: str, plane: str, finding: str, lesion: Shape | None, head: Warp, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Image a head once. Returns the (X, Y, Z) int16 voxels as stored, and their affine."""
    template = load_template()
    slices, rows = int(rng.integers(18, 31)), int(rng.integers(46, 65))
    columns = round(rows * rng.uniform(0.85, 1.0))
    view = rng.uniform(184, 212)
    spacing = np.array([rng.uniform(150, 178) / slices, view / rows, view / rows])
    axes = rotation(np.deg2rad(rng.normal(0, 1.0, 3))) @ _PLANE_AXES[plane]
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    shape = np.array([slices, rows, columns])
    affine[:3, 3] = CENTER + rng.normal(0, 1.0, 3) - affine[:3, :3] @ ((shape - 1) / 2)

    # The warps are smooth: exact on a coarse lattice of the scan, linear in between.
    lattice = np.stack(np.meshgrid(*[np.linspace(0, n - 1, 12) for n in shape], indexing="ij"))
    coarse = Warp(rng, 0.5)(head(lattice.reshape(3, -1).T @ affine[:3, :3].T + affine[:3, 3])).T.reshape(
        1, 3, 12, 12, 12
    )
    dense = F.interpolate(
        torch.from_numpy(coarse.astype(np.float32)), tuple(shape), mode="trilinear", align_corners=True
    )
    points = dense[0].flatten(1).T.numpy()
    fluid, grey, white = template.sample(points)
    signals = (np.array(TISSUE[contrast]) * rng.uniform(0.925, 1.075, 3) * BRIGHTNESS).astype(np.float32)
    image = fluid * signals[0] + grey * signals[1] + white * signals[2]
    if lesion is not None and contrast in LESION[finding]:
        weight = lesion(points) * np.clip(fluid + grey + white, 0, 1)
        image = image * (1 - weight) + weight * LESION[finding][contrast] * rng.uniform(0.925, 1.075)
    fields = [np.exp(np.linspace(-0.5, 0.5, n, dtype=np.float32) * rng.normal(0, 0.1)) for n in shape]
    image = image.reshape(shape) * rng.uniform(0.925, 1.075) * np.einsum("i,j,k->ijk", *fields)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0.01, 0.03))
    voxels = (np.abs(image + noise) * rng.uniform(600, 1500)).astype(np.int16)

    # Scanners store axes in many orders; the affine tells.
    order = rng.permutation(3)
    voxels, affine[:3, :3] = voxels.transpose(order), affine[:3, :3][:, order]
    for axis in np.flatnonzero(rng.random(3) < 0.5):
        affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
        affine[:3, axis] *= -1
        voxels = np.flip(voxels, int(axis))
    return np.ascontiguousarray(voxels), affine


def choose_contrasts(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Contrast and plane of each scan, without looking at the finding: DWI, T1 with contrast, T2 or FLAIR, others."""
    count = rng.choice(np.arange(3, 9), p=np.array([4, 4, 3, 2, 1, 1]) / 15)
    contrasts = ["dwi", "t1c", str(rng.choice(["t2", "flair"]))]
    contrasts += [str(c) for c in rng.choice(list(TISSUE), count - 3)]
    planes = [
        PLANE[c] if c not in contrasts[:i] else str(rng.choice(list(_PLANE_AXES))) for i, c in enumerate(contrasts)
    ]
    return [(contrasts[i], planes[i]) for i in rng.permutation(count)]


def make_report(finding: str, center: np.ndarray | None, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Impression and findings, each a list of sentences."""
    words = {"side": "", "lobe": ""}
    if center is not None:
        x, y, z = center
        lobe = "frontal" if y > 5 else "occipital" if y < -65 else "temporal" if z < -2 and abs(x) > 25 else "parietal"
        words = {"side": "left" if x < 0 else "right", "lobe": lobe}
    sentence = str(rng.choice(_FINDINGS[finding])).format(**words)
    background = [str(s) for s in rng.choice(_BACKGROUND, 2, replace=False)]
    return [str(rng.choice(_PREFIXES)) + sentence[0].upper() + sentence[1:]], background


def make_study(folder: Path, uid: str, finding: str, seed: tuple[int, ...]) -> dict:
    """Write one study's scans as NIfTI below `folder`. Returns its entry in the study list."""
    import nibabel

    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    head = Warp(rng, 1.0)
    lesion, center = (None, None) if finding == "normal" else make_lesion(finding, rng, load_template())
    scans = []
    for m, (contrast, plane) in enumerate(choose_contrasts(rng)):
        voxels, affine = make_scan(contrast, plane, finding, lesion, head, rng)
        scans.append(f"studies/{uid}/{m + 1:02d}_{contrast}_{plane}.nii.gz")
        target = folder / scans[-1]
        target.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels, affine), target)
    impressions, findings = make_report(finding, center, rng)
    return {"scans": scans, "impressions": impressions, "findings": findings}


def make_demo(out: Path, train: int = 600, test: int = 250, seed: int = 0, workers: int | None = None) -> Path:
    """Write the data set to `out`, or keep it if it is already there with the same settings.

    Leaves `train.json`, `test.json` (study lists), `labels.csv`, `prompts.yaml`, `README.txt` and `studies/`.

    Raises:
        ValueError: `out` exists and is something else.
    """
    settings = {"version": VERSION, "train": train, "test": test, "seed": seed}
    stamp = out / "demo.json"
    if stamp.exists() and json.loads(stamp.read_text()) == settings:
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} exists and does not hold this demo set ({settings}); remove it or choose another folder"
        )
    load_template()
    with replacing_folder(out) as partial:
        labels = []
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context)
        try:
            for part, (split, count) in enumerate([("train", train), ("test", test)]):
                findings = np.random.default_rng([seed, part]).permutation(np.arange(count) % len(CLASSES))
                jobs = {}
                for i, label in enumerate(findings):
                    uid = f"{split}-{i:04d}"
                    jobs[uid] = pool.submit(make_study, partial, uid, CLASSES[label], (seed, part, i))
                    labels.append([uid, *(int(label == c) for c in range(len(CLASSES)))])
                studies = {
                    uid: job.result() for uid, job in tqdm(jobs.items(), f"making {split} studies", unit="study")
                }
                (partial / f"{split}.json").write_text(json.dumps(studies, indent=1))
        finally:
            pool.shutdown(cancel_futures=True)
        (partial / "labels.csv").write_bytes(csv_text([["study", *CLASSES], *labels]))
        (partial / "prompts.yaml").write_text(yaml.safe_dump(PROMPTS, sort_keys=False))
        (partial / "README.txt").write_text(
            "Brain MRI studies made by hlip.demo. The anatomy is the MNI152 template; every lesion and every\n"
            "report is SYNTHETIC. For demonstration only; nothing here says anything about real patients.\n"
        )
        (partial / "demo.json").write_text(json.dumps(settings))
    return out


SIZES = (
    argument("--train", type=int, default=600, help="training studies (default: %(default)s)"),
    argument("--test", type=int, default=250, help="held-out studies (default: %(default)s)"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo data set: real anatomy, synthetic pathology.")
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder to write (default: %(default)s)")
    add_arguments(parser, SIZES)
    parser.add_argument("--seed", type=int, default=0, help="everything follows from it (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: one per processor)")
    make_demo(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()

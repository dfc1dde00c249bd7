"""Whether relevance points at the lesion: held-out demo studies, the model trained on them, and what knows nothing.

    python bench/pointing.py --data data/demo-0 --model runs/demo/model

Studies with a lesion, each asked for the class it has. Their lesions are drawn again from the set's seed; a voxel
counts where the lesion changes it by a tenth of the brightest, a patch where 2% of its voxels count. For each map:

    hit      share of studies whose patch of highest relevance, of all their scans, is such a patch
    patch    AUC of such patches against the study's other patches, mean over the studies
    scan     AUC of scans that show the lesion against those that do not, by the sum of relevance, mean over the studies
    first    share of studies whose scan of highest relevance shows the lesion

Maps to compare with: random numbers; random numbers where there is a head; the brightest voxel of each patch (lesions
are bright in this set); an untrained model. The lesions are synthetic: nothing here is about patients.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchlib.options import command, number, refusals
from benchlib.report import columns, print_table, provenance, write
from hlip import demo
from hlip.evaluate.evaluation import zeroshot_classifier
from hlip.evaluate.tasks import Task, load_task
from hlip.explain.relevance import relevance
from hlip.model.clip import HLIPModel, create_model
from hlip.prepare.recipe import Recipe, Window
from hlip.prepare.studies import load_study_on_grids
from hlip.read.rules import Rules
from hlip.study import Study

PART = 1  # the held-out studies' place in the seeds of `make_demo`
OF_BRIGHTEST, OF_PATCH = 0.1, 0.02
Map = Callable[["Case"], np.ndarray]


class Case(NamedTuple):
    """A study and its lesion. (M * d * h * w), scan by scan: lesion, bool - patches that hold it; brightest, 0 to 255.
    shows: (M) bool."""

    study: Study
    finding: int
    lesion: np.ndarray
    brightest: np.ndarray
    shows: np.ndarray


def cases(data: Path, recipe: Recipe, patch: tuple[int, int, int], limit: int | None) -> Iterator[Case]:
    settings = json.loads((data / "demo.json").read_text())
    entries = list(json.loads((data / "test.json").read_text()).items())
    findings = np.random.default_rng([settings["seed"], PART]).permutation(
        np.arange(settings["test"]) % len(demo.CLASSES)
    )
    chosen = [i for i, finding in enumerate(findings) if demo.CLASSES[finding] != "normal"][:limit]
    for i in tqdm(chosen, "drawing lesions again", unit="study", disable=None):
        uid, entry = entries[i]
        files = [data / scan for scan in entry["scans"]]
        study, grids = load_study_on_grids(files, recipe, uid)
        changes = list(draw_again(files, demo.CLASSES[findings[i]], settings["seed"], i))
        masks = replace(recipe, percentiles=None, windows=(Window(0, 1),), rules=Rules())
        lesions = [
            masks(replace(grid, array=change))[0].image.float() / 255 if change.any() else torch.zeros(scan.shape)
            for grid, change, scan in zip(grids, changes, study.scans, strict=True)
        ]
        held = torch.cat([F.avg_pool3d(lesion[None], patch).flatten() for lesion in lesions]) >= OF_PATCH
        bright = torch.cat([F.max_pool3d(scan[None].float(), patch).flatten() for scan in study.scans])
        yield Case(study, int(findings[i]), held.numpy(), bright.numpy(), np.array([c.any() for c in changes]))


def draw_again(files: list[Path], finding: str, seed: int, i: int) -> Iterator[np.ndarray]:
    """1.0 where the lesion changes a voxel of a scan of a study, drawn with it, as the files have it, and without."""
    import nibabel

    rng = np.random.default_rng((seed, PART, i))
    head = demo.Warp(rng, 1.0)
    lesion, _ = demo.make_lesion(finding, rng, demo.load_template())
    for file, (contrast, plane) in zip(files, demo.choose_contrasts(rng), strict=True):
        same = copy.deepcopy(rng)
        voxels, _ = demo.make_scan(contrast, plane, finding, lesion, head, rng)
        plain, _ = demo.make_scan(contrast, plane, finding, lambda points: np.zeros(len(points)), head, same)
        if not np.array_equal(voxels, np.asarray(nibabel.load(file).dataobj)):
            raise ValueError(f"{file}: not what this version draws from the seed of its set")
        change = np.abs(voxels.astype(np.float32) - plain)
        yield (change > OF_BRIGHTEST * plain.max()).astype(np.float32)


def score(name: str, every: list[Case], make: Map) -> dict[str, object]:
    import pandas as pd
    from sklearn.metrics import roc_auc_score

    scores = []
    for case in tqdm(every, name, unit="study", disable=None, leave=False):
        values = make(case)
        scores.append({"hit": case.lesion[values.argmax()], "patch": roc_auc_score(case.lesion, values)})
        if not case.shows.all():
            sums = values.reshape(len(case.shows), -1).sum(1)
            scores[-1] |= {"scan": roc_auc_score(case.shows, sums), "first": case.shows[sums.argmax()]}
    return {"map": name, **pd.DataFrame(scores, columns=COLUMNS, dtype=float).mean().round(3)}


COLUMNS = ("hit", "patch", "scan", "first")


def maps_of(name: str, model: HLIPModel, task: Task) -> Iterator[tuple[str, Map]]:
    texts: Tensor = zeroshot_classifier(model, task)

    def make(case: Case, layers: str, against: bool, normalize: bool) -> np.ndarray:
        other = texts[demo.CLASSES.index("normal")] if against else None
        result = relevance(model, case.study, texts[case.finding], layers, other, normalize)  # type: ignore[arg-type]
        return torch.cat([scan.flatten() for scan in result.maps]).numpy()

    for (layers, normalize), against in product((("last", False), ("all", False), ("all", True)), (False, True)):
        label = f"{name}, {'all layers' if layers == 'all' else 'last layer'}"
        label += ", normalized" * normalize + ", against normal" * against
        yield label, functools.partial(make, layers=layers, against=against, normalize=normalize)


def main() -> None:
    parser = command(__doc__, "--json", "--seed")
    parser.add_argument("--data", type=Path, default=Path("data/demo-0"), help="demo studies (default: %(default)s)")
    parser.add_argument("--model", default="runs/demo/model", help="trained on them (default: %(default)s)")
    parser.add_argument("--studies", type=number, help="only the first so many with a lesion (default: all)")
    args = parser.parse_args()
    with refusals(parser, "io,eval", "; make demo makes studies and model"):
        rows = measure(args)
    print(f"{rows[0]['studies']} studies with a lesion; {rows[0]['lesion_patches']:.1%} of their patches hold it")
    print_table(*columns(rows, ["map", *COLUMNS]))
    write(args, rows)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """
    Raises:
        FileNotFoundError, ValueError: no demo studies, or no model.
    """
    task = load_task(args.data / "prompts.yaml")
    trained = HLIPModel.from_pretrained(args.model)
    torch.manual_seed(args.seed)
    untrained = create_model("demo", pretrained_text=trained.config.text.name).eval()
    drawn = cases(args.data, trained.config.preprocess, trained.config.vision.patch_size, args.studies)
    every = [case for case in drawn if case.lesion.any()]
    rng = np.random.default_rng(args.seed)
    maps: list[tuple[str, Map]] = [
        ("random", lambda case: rng.random(len(case.lesion))),
        ("random within the head", lambda case: rng.random(len(case.lesion)) * (case.brightest > 60)),
        ("brightest voxel", lambda case: case.brightest),
        *maps_of("untrained", untrained, task),
        *maps_of("trained", trained, task),
    ]
    share = round(float(np.mean([case.lesion.mean() for case in every])), 4)
    facts = {"studies": len(every), "lesion_patches": share, **provenance(torch.device("cpu"))}
    return [score(label, every, make) | facts for label, make in maps]


if __name__ == "__main__":
    main()

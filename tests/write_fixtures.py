"""Writes small stores, models, checkpoints, embeddings and probes with another revision, for tests that read them.

    git worktree add /tmp/base 26ff414
    python tests/write_fixtures.py --base /tmp/base --out /tmp/26ff414
    mv /tmp/26ff414 tests/written

An unfinished store holds the paths of its sources. `tests/test_written.py` opens, joins, finishes and resumes what lies
there. Needs all extras, and takes a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

NUM_STUDIES = 6
RECIPE = "size: [8, 18, 18]\ncrop: [16, 16]\n"
PROMPTS = 'classes:\n  stroke: [an infarct]\n  tumour: [a glioma, a mass]\ntemplates: ["This study shows: {}."]\n'
TRAINING = {
    "data": "store", "init": "model", "steps": 4, "batch_size": 4, "warmup": 2, "precision": "fp32", "workers": 0,
    "log_every": 1, "save_every": 2, "lr": 1e-3, "keep": 5,
}  # fmt: skip
WORDS = "a an study scan number of the brain shows report infarct glioma mass impression findings this . : , no"

MODEL = """
import torch
from hlip import HLIPModel, ModelConfig, load_recipe
from hlip.model.config import TextConfig, VisionConfig
torch.manual_seed(0)
vision = VisionConfig(24, 2, patch_size=(4, 8, 8), grid=(2, 2, 2), levels=("scan", "study"), init_std=0.2)
text = TextConfig("bert", context_length=16, pooling="mean")
HLIPModel(ModelConfig(vision, text, load_recipe("recipe.yaml"), embed_dim=16), "bert").save_pretrained("model")
"""
# The first three shards of a store of one study a shard, whose process is killed then.
UNFINISHED = """
import pathlib
from hlip.data.prepare import prepare
from hlip.data.preprocess import load_recipe
from hlip.data.sources import find_studies
if __name__ == "__main__":
    prepare(find_studies(pathlib.Path("studies")), load_recipe("recipe.yaml"), "unfinished", shard_scans=2)
"""


def write_inputs(folder: Path) -> None:
    """Studies of two scans each, a report and labels of each, a recipe, prompts, and a BERT of 2 narrow layers."""
    import nibabel
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    reports = {}
    for s in range(NUM_STUDIES):
        for m in range(2):
            ramp = np.indices((20 + s, 18 + m, 10)).sum(0) * (m + 1) + s * np.indices((20 + s, 18 + m, 10))[0] % 7
            path = folder / "studies" / f"study{s}" / f"scan{m}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(ramp.astype(np.int16), np.diag([1.0, 1.0, 3.0, 1.0])), path)
        reports[f"study{s}"] = {"impression": f"glioma number {s}.", "findings": f"the scan shows a mass {s}."}
    (folder / "reports.json").write_text(json.dumps(reports))
    labels = "".join(f"study{s},{s % 2},{(s + 1) % 2}\n" for s in range(NUM_STUDIES))
    (folder / "labels.csv").write_text("study,stroke,tumour\n" + labels)
    for name, studies in {"train": range(4), "test": range(4, NUM_STUDIES)}.items():
        (folder / f"{name}.txt").write_text("".join(f"study{s}\n" for s in studies))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "prompts.yaml").write_text(PROMPTS)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), *"0123456789"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    (folder / "vocab.txt").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="checkout of the other revision")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must not exist")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    write_inputs(args.out)
    environment = {**os.environ, "PYTHONPATH": str(args.base.resolve()), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> None:
        subprocess.run([sys.executable, *words], cwd=args.out, env=environment, check=True)

    def hlip(command: str) -> None:
        run("-m", "hlip.cli", *command.split())

    hlip("prepare studies --out store --recipe recipe.yaml --reports reports.json --labels labels.csv")
    run("-c", MODEL)
    script = args.out / "unfinished.py"
    script.write_text(UNFINISHED)
    process = subprocess.Popen([sys.executable, script.name], cwd=args.out, env=environment, start_new_session=True)
    while len(list((args.out / "unfinished" / "shards").glob("0*.safetensors"))) < 3:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    script.unlink()
    pretrain = str(args.base.resolve() / "train" / "pretrain.py")
    run(pretrain, *(f"--{name}={value}" for name, value in TRAINING.items()), "--out=run")
    lines = [json.loads(line) for line in (args.out / "run" / "log.jsonl").read_text().splitlines()]
    hlip("embed store --model model --out store.npz --workers 0")
    hlip("embed store --model model --out store.parquet --workers 0")
    hlip("eval prompts.yaml --data store --labels labels.csv --model model --out eval --draws 20 --workers 0")
    hlip("probe store.npz --labels labels.csv --out probe --minimum 1 --split train.txt test.txt --draws 20")
    expected = {"losses": [line["loss"] for line in lines if "loss" in line],
                "eval": json.loads((args.out / "eval" / "metrics.json").read_text())}  # fmt: skip
    (args.out / "expected.json").write_text(json.dumps(expected, indent=1))
    for probe in (args.out / "probe").glob("*.npz"):
        shutil.copy(probe, args.out)
    for leftover in ("eval", "probe", "run/model", "run/tensorboard"):
        shutil.rmtree(args.out / leftover)
    (args.out / "run" / "checkpoints" / "step_00000004.pt").unlink()  # as if it had been killed after its second step
    kept = [line for line in lines if line.get("step", 0) <= 2 and line.get("event") != "end"]
    (args.out / "run" / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in kept))


if __name__ == "__main__":
    main()

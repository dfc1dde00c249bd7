"""What is fuzzed: for each target the files it begins with, which other tests' helpers make, and what reads them.

A file's name says what it is. It lies in a folder of its own, together with the good files that it belongs to.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch
import yaml

import hostile_files as bad
import test_store
from dicom_files import write_enhanced, write_series
from fuzz.guard import Guard, Outcome
from hlip.demo import PROMPTS
from hlip.embed.baselines import read_slices
from hlip.embed.table import Embeddings
from hlip.evaluate.labels import read_label_table
from hlip.evaluate.probe import Probe
from hlip.evaluate.scores import read_scores
from hlip.evaluate.tasks import FOLDER, Task, load_task
from hlip.model import config, released
from hlip.model.clip import HLIPModel
from hlip.model.config import ModelConfig, TextConfig, VisionConfig
from hlip.prepare.discover import find_studies, find_study
from hlip.prepare.recipe import Recipe, load_recipe
from hlip.prepare.reports import SectionRules, read_reports
from hlip.prepare.tables import Table
from hlip.read.rules import Rules
from hlip.store.store import Store
from hlip.store.tools import stats, verify
from hlip.train.plot import read_run
from hlip_kernels.tiles import Row, read_table, write_table
from measured import choice, measured


class Target(Protocol):
    """home: a folder for what is made once; patch: puts small models in the place of large ones."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None: ...

    def seeds(self) -> Iterator[tuple[str, bytes]]:
        """Names and contents of good files, and of some that are not."""
        ...

    def lay(self, folder: Path, name: str, content: bytes) -> None:
        """Put the file into an empty folder, with what belongs to it."""
        ...

    def use(self, folder: Path, name: str) -> None:
        """Read the file, as commands do."""
        ...


def put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def files_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_bytes()


class Readers:
    """Images: NIfTI, tensors, a slice of a DICOM series, a DICOM file of many frames; read and prepared."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        self.home = home
        self.recipe = Recipe(size=(4, 16, 16), crop=None, rules=Rules(min_slices=3, four_d="split"))
        self.array = bad.real_volume()[:, :, :4]
        self.series = home / "series"
        write_series(self.series, self.array, bad.SPACING, study_uid="1.2", series_uid="1.2.3", description="t1")

    def seeds(self) -> Iterator[tuple[str, bytes]]:
        for array in (self.array, self.array.astype(np.float32), np.stack([self.array] * 2, 3)):
            for name in ("scan.nii", "scan.nii.gz"):
                yield name, bad.save(self.home / name, array)
        for tensor in (torch.rand(6, 8, 8), torch.randint(-1000, 2000, (6, 8, 8), dtype=torch.int16), bad.Code()):
            for old in (False, True):
                bad.tensor(tensor, old=old)(self.home)
                yield "scan.pt", (self.home / "bad.pt").read_bytes()
        for syntax in ("explicit", "implicit", "big_endian", "rle", "jpeg2000", "jpeg_lossless"):
            write_series(
                self.home / syntax, self.array, bad.SPACING, study_uid="1.2", series_uid="1.2.3", transfer_syntax=syntax
            )
            yield "0001.dcm", (self.home / syntax / "0001.dcm").read_bytes()
            path = write_enhanced(self.home / "frames.dcm", self.array, bad.SPACING, transfer_syntax=syntax, slope=2.0)
            yield "frames.dcm", path.read_bytes()

    def lay(self, folder: Path, name: str, content: bytes) -> None:
        put(folder, name, content)
        if name == "0001.dcm":
            for path in self.series.iterdir():
                if path.name != name:
                    os.link(path, folder / path.name)

    def use(self, folder: Path, name: str) -> None:
        for scan in find_study(folder).scans:
            self.recipe.prepare(scan)


class Lists:
    """Study lists, tables, reports, labels, section rules, and which slices to see."""

    LIST = {  # noqa: RUF012
        "a": {"scans": ["a.nii.gz", "sub/b.nii.gz"], "report": ["Findings: none.", "Impression: normal."]},
        "b": {"scans": ["../a.nii.gz", "/dev/zero", "missing.pt"], "impressions": ["x"], "findings": ["y"]},
    }

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        self.home = home
        bad.save(home / "a.nii.gz")
        bad.save(home / "sub" / "b.nii.gz", np.roll(bad.real_volume(), 1, 0))

    def seeds(self) -> Iterator[tuple[str, bytes]]:
        for content in (self.LIST, {"c": {"recons": ["valid_1_a_1.nii.gz"]}}, {"sub": {"series": {"b": {}}}}):
            yield "list.json", json.dumps(content).encode()
        yield "list.csv", b"study,path,impression,findings,stroke\na,a.nii.gz,none,none,1\nb,sub,,x,0\n"
        yield "list.csv", b"VolumeName,bleed,age\ntrain_1_a_1.nii.gz,0,44\na.nii.gz,1,60\n"
        yield (
            "reports.json",
            b'{"a": "FINDINGS: x\\nIMPRESSION: y", "b": {"impression": "z", "findings_EN": ["u"]}}',
        )
        yield "reports.csv", b'study_uid,report\na,"Findings: x\nImpression: y"\nb,Normal.\n'
        yield "reports/a.txt", b"TECHNIQUE: MR\nFINDINGS: nothing\n\nIMPRESSION:\n1. normal\n"
        yield "labels.csv", b"study,split,stroke,bleed\na,train,1,0\nb,test,-1,\nc,val,0,1\n"
        yield "scores.csv", b"study,scan,stroke\na,t1,0.25\nb,t1,-1e3\nc,t2,1\n"
        yield "sections.yaml", b"findings: [befund]\nimpression: [beurteilung, fazit]\nunlabelled: findings\n"
        yield "slices.json", b'{"a": {"t1": [0, 3], "t2": []}, "b": {"dwi": [7]}}'

    def lay(self, folder: Path, name: str, content: bytes) -> None:
        put(folder, name, content)
        if name.startswith("list"):
            os.link(self.home / "a.nii.gz", folder / "a.nii.gz")
            shutil.copytree(self.home / "sub", folder / "sub", copy_function=os.link)

    def use(self, folder: Path, name: str) -> None:
        path = folder / name
        if path.stem == "list":
            find_studies(path)
        elif name.startswith("reports"):
            read_reports(path.parent if path.suffix == ".txt" else path)
        elif name == "labels.csv":
            read_label_table(path)
            Table.read(path).labels()
        elif name == "scores.csv":
            read_scores(path, Task({"stroke": "acute stroke"}, kind="similarity", unit="scan"))
        elif name == "sections.yaml":
            SectionRules.read(path).split("Befund: x\n\nFazit: y\nFindings: z")
        elif name == "slices.json":
            read_slices(path)


class Checkpoints:
    """Models: our layout, the released one, and checkpoints of a run; and a text for them."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        from transformers import BertConfig, BertTokenizerFast

        from hlip.processes import Processes
        from hlip.train.checkpoints import Checkpoints as OfRun
        from hlip.train.config import TrainConfig

        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        bert = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                "intermediate_size": 8, "max_position_embeddings": 8}  # fmt: skip
        text, self.home = home / "bert", home
        BertConfig(**bert).save_pretrained(text)
        vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "scan", "##s"])}
        BertTokenizerFast(vocab=vocabulary).save_pretrained(text)
        vision = VisionConfig(8, 1, patch_size=(1, 2, 2), grid=(1, 2, 2), levels=("scan", "study"), max_scans=2)
        tiny = ModelConfig(vision, TextConfig(str(text), context_length=8), embed_dim=4)
        for module in (config, released):
            patch.setattr(module, "MODELS", {"tiny": (tiny, "")})
            patch.setattr(module, "ALIASES", {})
        for key, value in bert.items():
            patch.setitem(config.BERT_BASE, key, value)
        torch.manual_seed(0)
        self.model = HLIPModel(tiny)
        self.model.save_pretrained(home / "ours")
        self.model.save_open_clip(home / "hub")
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.settings = TrainConfig(home / "store", home / "run", steps=1)
        self.of_run, self.world = OfRun, Processes()
        made = OfRun(self.settings, self.world)
        made.save(self.model, self.optimizer, torch.amp.GradScaler("cpu"), 1)
        made.wait()

    def seeds(self) -> Iterator[tuple[str, bytes]]:
        for folder in ("ours", "hub"):
            for name, content in files_below(self.home / folder):
                plain = content.replace(f"{self.home}/".encode(), b"") if name.endswith(".json") else content
                yield f"{folder}/{name}", plain
        state = self.model.state_dict()
        for content in ({"epoch": 1, "name": "tiny", "state_dict": {f"module.{k}": v for k, v in state.items()}},
                        {key: value.half() for key, value in state.items()}, {"state_dict": bad.Code()}):  # fmt: skip
            torch.save(content, self.home / "epoch_1.pt")
            yield "epoch_1.pt", (self.home / "epoch_1.pt").read_bytes()
        yield from files_below(self.home / "run")

    def lay(self, folder: Path, name: str, content: bytes) -> None:
        top = name.split("/")[0]
        if top in ("ours", "hub"):
            shutil.copytree(self.home / top, folder / top, copy_function=os.link)
            (folder / name).unlink(missing_ok=True)
        put(folder, name, content)

    def use(self, folder: Path, name: str) -> None:
        top = name.split("/")[0]
        if top == "checkpoints":
            settings = dataclasses.replace(self.settings, out=folder)
            self.of_run(settings, self.world).load(self.model, self.optimizer, torch.amp.GradScaler("cpu"))
        else:
            model = HLIPModel.from_pretrained(folder / name if top == "epoch_1.pt" else folder / top)
            if top == "ours":
                model.encode_text(["scans, scan"])


class Stores:
    """A store's files: opened, checked, every study read."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        small = [test_store.make_study(i, 1 + i % 3) for i in range(4)]
        self.store = test_store.make_store(home / "store", small, per_shard=2)

    def seeds(self) -> Iterator[tuple[str, bytes]]:
        yield from files_below(self.store)
        for path in (self.store / "shards").glob("*.safetensors"):  # of a store that is not finished
            yield f"unfinished/{path.name}", path.read_bytes()

    def lay(self, folder: Path, name: str, content: bytes) -> None:
        shutil.copytree(self.store, folder, copy_function=os.link, dirs_exist_ok=True)
        if name.startswith("unfinished/"):
            (folder / "store.json").unlink()
            name = name.replace("unfinished", "shards")
        (folder / name).unlink(missing_ok=True)
        put(folder, name, content)

    def use(self, folder: Path, name: str) -> None:
        verify(folder)
        store = Store(folder)
        for i in range(min(len(store), 100)):
            store.study(i)
        assert store.labels[1].shape[0] == len(store)
        stats(store)


class Tasks:
    """Task files, prompts, recipes, embeddings, probes, logs of runs, tile tables."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        self.home = home

    def seeds(self) -> Iterator[tuple[str, bytes]]:
        for name in ("rsna", "pub-brain-5-gt", "pub-brain-5"):
            yield "task.yaml", (FOLDER / f"{name}.yaml").read_bytes()
        yield "task.yaml", b"like: pub-brain-5\nclasses: {a: x, b: [y, z]}\ngroups: {a: g}\nsubtasks: {s: [a, b]}\n"
        yield "task.yaml", b"kind: pairs\nclasses: {a: {positive: x, negative: y}}\ncolumns: {a: b}\nunit: scan\n"
        yield "task.yaml", yaml.safe_dump(PROMPTS).encode()
        yield "recipe.yaml", yaml.safe_dump(Recipe().to_dict()).encode()
        uids, rows = np.array(["a", "b"]), np.eye(2, 4, dtype=np.float32)
        table = Embeddings(uids, np.array(["", "t1"]), np.zeros(2, np.int8), rows, {"job": {"model": "m"}})
        for suffix in (".npz", ".parquet"):
            with (self.home / "table").open("wb") as file:
                table.write(file, suffix)
            yield f"embeddings{suffix}", (self.home / "table").read_bytes()
        with (self.home / "probe").open("wb") as file:
            Probe(("a", "b"), np.ones((2, 4)), np.zeros(2), np.ones(2), {"c": 1}).write(file)
        yield "probe.npz", (self.home / "probe").read_bytes()
        objects = self.home / "objects.npz"
        np.savez(objects, **{name: np.array([bad.Code()], object) for name in ("study", "facts", "classes")})
        yield from ((name, objects.read_bytes()) for name in ("embeddings.npz", "probe.npz"))
        yield (
            "run/log.jsonl",
            b'{"event": "start"}\n{"step": 1, "loss": 2.5, "logit_scale": 2}\n{"step": 2}\n',
        )
        levels = {"slice": choice("triton"), "study": choice("flash4", "flash")}
        write_table(self.home / "tiles.json", {Row("sm_90", "half", 64): measured(levels=levels, commit="abc")})
        yield "tiles.json", (self.home / "tiles.json").read_bytes()

    def lay(self, folder: Path, name: str, content: bytes) -> None:
        put(folder, name, content)

    def use(self, folder: Path, name: str) -> None:
        path = folder / name
        if name == "task.yaml":
            task = load_task(path)
            for choice in task.templates:
                assert task.prompts(choice)
        elif name == "recipe.yaml":
            assert load_recipe(str(path)).hash
        elif name == "probe.npz":
            probe = Probe.read(path)
            assert probe.weight.shape[0] == len(probe.classes)
        elif path.stem == "embeddings":
            Embeddings.read(path)
        elif path.name == "log.jsonl":
            read_run(path.parent)
        elif name == "tiles.json":
            read_table(path)


TARGETS: dict[str, type[Target]] = {
    "readers": Readers, "lists": Lists, "checkpoints": Checkpoints, "stores": Stores, "tasks": Tasks,
}  # fmt: skip


class Trial:
    """A target under guard; the process stands in an empty folder."""

    def __init__(self, name: str, home: Path, patch: pytest.MonkeyPatch, guard: Guard) -> None:
        (home / "here").mkdir(parents=True)
        patch.chdir(home / "here")
        self.home, self.guard = home, guard
        self.target = TARGETS[name](home, patch)

    def seeds(self) -> list[bytes]:
        return [name.encode() + b"\n" + content for name, content in self.target.seeds()]

    def run(self, data: bytes) -> Outcome:
        """What comes of one input."""
        name, _, content = data.partition(b"\n")
        folder = self.home / "in"
        folder.mkdir()
        try:
            self.target.lay(folder, name.decode(), content)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome = self.guard.run(lambda: self.target.use(folder, name.decode()), str(folder))
        finally:
            shutil.rmtree(folder)
        return outcome

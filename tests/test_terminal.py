"""Names and texts that would command a terminal, a spreadsheet or a reader of Markdown are shown, and do nothing."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from commands import run
from hlip import HLIPModel
from hlip.embed.table import Embeddings
from hlip.terminal import guarded_streams, say, visible

pytest.importorskip("pyarrow")
import test_store

OBEYED = ["\x1b[31m", "\x1b]0;title\x07", "\x07", "\b\b", "\r", "\n", "\t", "\x7f", "\x9b2J", "\u202e", "\u2066",
          "\u200e", "\u2028", "\u2029", "\x85", "\ud800", "\udcff", "\ufeff", "\U000e0041", "\0"]  # fmt: skip
SHOWN = ["é", "e\u0301", "腦", "\u00a0", "\u3000", "क\u094d\u200dष", "🧠", "$", "a b"]


@pytest.mark.parametrize("text", OBEYED, ids=ascii)
def test_what_a_terminal_obeys_is_written_out(text: str) -> None:
    shown = visible(f"a{text}b")
    assert shown.isascii()
    assert shown.isprintable()
    assert shown == "a" + text.encode("unicode_escape").decode() + "b"


@pytest.mark.parametrize("text", SHOWN, ids=ascii)
def test_texts_of_all_scripts_stay(text: str) -> None:
    assert visible(text) == text


class Terminal(io.TextIOWrapper):
    """Of old: it takes only ASCII, and says that it is one."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def written(self) -> str:
        return self.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


def test_streams_are_guarded_and_bars_move(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with guarded_streams():
        print("a\x1b[2J\x85é\ud800", "b\tc")
        say("one\nline", "another")
        with tqdm(range(2), "outer", position=0) as outer, tqdm(range(2), "in\x1b[31mner", position=1) as inner:
            for bar in (outer, inner):
                bar.update(2)
        logging.getLogger("hlip.test").warning("%s\n%s", "a\n\x1b[0m", 7)
    assert sys.stdout is out
    assert out.written == "a\\x1b[2J\\x85\\xe9\\ud800 b\tc\none\\nline\nanother\n"
    assert "\x1b[A" in err.written
    assert err.written.replace("\x1b[A", "").count("\x1b") == 0
    assert "\r" in err.written
    assert "in\\x1b[31mner" in err.written


def test_a_log_line_ends_where_its_format_says(capsys: pytest.CaptureFixture[str]) -> None:
    """By the handler of last resort, in a program of its own."""
    lines = "import logging; from hlip.terminal import guard_streams; guard_streams(); "
    lines += r"logging.getLogger('x').warning('%s: %d\n%s', 'a\n\x1b', 3, ValueError('\u202e'))"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stderr == "a\\n\\x1b: 3\n\\u202e\n"


def test_an_error_that_nobody_caught_is_shown_too() -> None:
    lines = "from hlip.terminal import guarded_streams\nwith guarded_streams(): raise RuntimeError('a\\x1b[2J\\u202e')"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: a\\x1b[2J\\u202e\n")


NASTY = "".join(OBEYED[:10]) + OBEYED[12]


def hostile_store(path: Path, name: str = NASTY) -> Path:
    """Of studies, scans and labels whose names are hostile, and with a damaged checksum that is told."""
    from dataclasses import replace

    studies = []
    for i in range(2):
        study = test_store.make_study(i, 2)
        scans = [replace(scan, name=name, plane=name, modality=name, description=name) for scan in study.scans]
        studies.append(replace(study, uid=f"{i}{name}", scans=scans, labels={name: float(i)}, impression=name))
    test_store.make_store(path, studies, per_shard=1)
    shard = path / "shards" / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    return path


def check_streams(captured: pytest.CaptureResult[str]) -> None:
    """No control is there but lines and the bars' returns, and no line begins with what was behind a name's break."""
    for text in (captured.out, captured.err):
        assert not [c for c in text if ord(c) < 32 and c not in "\n\r\t"]
        assert not set(text) & {"\x7f", "\x9b", "\u202e", "\u2028", "\u2066"}


@pytest.mark.parametrize("action", ["info", "verify", "stats"])
def test_a_hostile_store_is_looked_at(action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = hostile_store(tmp_path / "store")
    run("store", action, store)
    captured = capsys.readouterr()
    check_streams(captured)
    if action == "verify":
        assert [line for line in captured.out.splitlines() if "damaged" in line] == [
            f"{store}/shards/00001.safetensors: scan 1 of {visible('1' + NASTY)} is damaged (its checksum differs)"
        ]
    elif action == "info":
        assert f"  labels: {visible(NASTY)}" in captured.out.split("\n")


def test_hostile_embeddings_classes_and_columns(
    tmp_path: Path, model_folder: Path, tiny_model: HLIPModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through files of embeddings, tasks and labels, to tables, plots and messages; what is written is read again."""
    rng = np.random.default_rng(0)
    uids = np.array([f"=cmd|{i}" for i in range(8)] + [f"{i}\x1b[31m\nhlip: all is well" for i in range(8)])
    rows = rng.normal(size=(16, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    failed = [["-lost\x1b", "why\r\u202e"]]
    table = Embeddings(uids, np.full(16, ""), np.zeros(16, np.int8), rows, {"failed": failed})
    with (tmp_path / "e.npz").open("wb") as file:
        table.write(file, ".npz")
    classes = {"=1+1|$x$": "a", "b\x1b]0;x\x07\nc": "b"}
    (tmp_path / "task\x1b$.yaml").write_text(json.dumps({"kind": "similarity", "classes": classes}))
    from hlip.output import csv_text

    labels = [["study", *classes], *([uid, i % 2, i // 2 % 2] for i, uid in enumerate(uids.tolist()))]
    (tmp_path / "labels.csv").write_bytes(csv_text(labels))
    given = ["--embeddings", tmp_path / "e.npz", "--labels", tmp_path / "labels.csv", "--allow_unmatched"]
    arguments = ["eval", tmp_path / "task\x1b$.yaml", *given, "--model", model_folder, "--out", tmp_path / "out"]
    assert run(*arguments) in (0, 3)
    check_streams(captured := capsys.readouterr())
    assert "\\x1b]0;x\\x07\\nc" in captured.out
    assert "left out -lost\\x1b: why\\r\\u202e" in captured.err
    from hlip.evaluate.labels import read_labels

    scores = read_labels(tmp_path / "out" / "scores.csv", [f"{name}_label" for name in classes])
    assert set(scores) == {uid for uid in uids.tolist() if uid.startswith("=")}  # tables hold no id with controls
    markdown = (tmp_path / "out" / "table.md").read_text()
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert len({line.count("|") - line.count("\\|") for line in lines}) == 1  # a cell each, whatever is in the names


def test_errors_of_arguments_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("store", "info", "store", "--no\x1b[2Jsuch\nflag") == 2
    check_streams(captured := capsys.readouterr())
    assert "--no\\x1b[2Jsuch\\nflag" in captured.err
    assert run("store", "info", "no\x1b[2J\nstore") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_training_is_guarded(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "train" / "pretrain.py"
    given = [f"--data={tmp_path}/no\x1b[2J\nstore", f"--out={tmp_path / 'run'}", "--steps=1"]
    done = subprocess.run([sys.executable, script, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "\x1b" not in done.stderr
    assert [line for line in done.stderr.split("\n") if "no\\x1b[2J\\nstore" in line]

"""The `hlip` command."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np
import torch
from tqdm import tqdm

from .data.batch import Study
from .data.studies import load_study
from .data_cli import add_commands
from .model.checkpoint import Layout, load
from .model.clip import HLIPModel
from .model.published import describe
from .tasks.embed import embed_studies
from .tasks.plot import FORMATS, draw, read_run
from .tasks.zeroshot import DEFAULT_TEMPLATE, Prompts, zeroshot

FILES_HELP = "NIfTI files, which together are one study; or folders, each of which holds the scans of one study"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="hlip", description="Embed and classify 3D medical imaging studies: one or many scans each."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    embed = commands.add_parser("embed", help="write the embeddings of studies to an .npz file")
    embed.add_argument("files", nargs="+", type=Path, metavar="FILE", help=FILES_HELP)
    embed.add_argument("--out", required=True, type=Path, help=".npz with `study` (N) and `embedding` (N, E) float32")
    embed.set_defaults(run=_embed)

    zero = commands.add_parser("zeroshot", help="say which of several prompts describes a study best")
    zero.add_argument("files", nargs="+", type=Path, metavar="FILE", help=FILES_HELP)
    zero.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a class in words; repeat for each")
    zero.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="TEXT",
        help=f"sentence with {{}} for the prompt; repeat to average over several (default: {DEFAULT_TEMPLATE!r})",
    )
    zero.add_argument("--prompts", type=Path, metavar="YAML", help="file with classes and templates, in place of both")
    zero.add_argument("--out", type=Path, help="also write the probabilities to this JSON file")
    zero.set_defaults(run=_zeroshot)

    for command in (embed, zero):
        command.add_argument(
            "--model", required=True, help="a saved or released model: its folder, its file, or its name on the hub"
        )
        command.add_argument(
            "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"
        )

    convert = commands.add_parser(
        "convert",
        help="read a model in any layout and write it in another",
        description="Read a saved or released model, or a training checkpoint; say what it is; write it anew.",
    )
    convert.add_argument("source", metavar="IN", help="file of weights, folder, or name on the hub")
    convert.add_argument("target", metavar="OUT", type=Path, help="folder to write; replaced if it holds such a model")
    convert.add_argument(
        "--layout",
        choices=get_args(Layout),
        default="hlip",
        help="hlip: config.json, model.safetensors and text/; open_clip: that of the released models (default: hlip)",
    )
    convert.add_argument("--model", metavar="NAME", help="which model it is, where neither files nor shapes can say")
    convert.add_argument("--text", metavar="FOLDER", help="configuration and tokenizer of the text tower")
    convert.set_defaults(run=_convert)

    add_commands(commands)

    plot = commands.add_parser("plot", help="draw the curves of one or more training runs")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of train/pretrain.py")
    plot.add_argument("--out", type=Path, help=".png, .pdf or .svg (default: curves.png in the first RUN)")
    plot.set_defaults(run=_plot)

    env = commands.add_parser("env", help="report versions, devices and attention backends")
    env.set_defaults(run=_env)

    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"hlip {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hlip {args.command}: interrupted; nothing was written", file=sys.stderr)
        return 130


def _embed(args: argparse.Namespace) -> None:
    if args.out.suffix != ".npz":
        raise ValueError(f"{args.out}: expected a name that ends in .npz")
    groups = _study_paths(args.files)
    model = _model(args)
    uids, embeddings = zip(*embed_studies(model, _load(groups, model)), strict=True)
    _write(
        args.out,
        lambda file: np.savez(file, study=np.array(uids), embedding=np.stack([e.numpy() for e in embeddings])),
    )
    print(f"{args.out}: {len(uids)} {'study' if len(uids) == 1 else 'studies'} x {len(embeddings[0])}")


def _zeroshot(args: argparse.Namespace) -> None:
    if args.prompts and (args.prompt or args.template):
        raise ValueError("give --prompts, or --prompt and --template, not both")
    if args.prompts:
        prompts = Prompts.read(args.prompts)
    elif len(args.prompt) == len(set(args.prompt)) >= 2:
        prompts = Prompts({text: [text] for text in args.prompt}, tuple(args.template) or (DEFAULT_TEMPLATE,))
    else:
        raise ValueError(f"prompts missing: give at least two different --prompt, or --prompts; got {args.prompt}")
    groups = _study_paths(args.files)
    model = _model(args)
    uids, probabilities = zeroshot(model, _load(groups, model), prompts)
    names = list(prompts.classes)
    table = [dict(zip(names, (round(p, 6) for p in row), strict=True)) for row in probabilities.tolist()]
    if args.out:
        content = json.dumps(dict(zip(uids, table, strict=True)), indent=1) + "\n"
        _write(args.out, lambda file: file.write(content.encode()))
    width = max(len(name) for name in names)
    for uid, row in zip(uids, table, strict=True):
        print(uid)
        for name, probability in sorted(row.items(), key=lambda item: -item[1]):
            print(f"  {name:<{width}}  {probability:6.1%}  {'#' * round(40 * probability)}")


def _convert(args: argparse.Namespace) -> None:
    model, how, _ = load(args.source, args.model, args.text)
    print(f"{args.source}: {how}\n{describe(model.config)}")
    if args.layout == "hlip":
        model.save_pretrained(args.target)
    else:
        model.save_open_clip(args.target, args.model)
    print(f"{args.target}: written in layout {args.layout}")


def _plot(args: argparse.Namespace) -> None:
    out = args.out or args.runs[0] / "curves.png"
    if out.suffix not in FORMATS:
        raise ValueError(f"{out}: expected a name that ends in {', '.join(FORMATS)}")
    runs = [read_run(folder) for folder in args.runs]
    for run in runs:
        if run.damaged:
            print(f"{run.folder}: damaged lines of the log left out: {run.damaged}", file=sys.stderr)
    _write(out, lambda file: draw(runs, file, out.suffix[1:]))
    print(f"{out}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")


def _model(args: argparse.Namespace) -> HLIPModel:
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model = HLIPModel.from_pretrained(args.model)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: cannot be used ({str(error).splitlines()[0]})") from error


def _env(args: argparse.Namespace) -> None:
    runpy.run_module("hlip_kernels.env", run_name="__main__")


def _study_paths(files: list[Path]) -> list[Path | list[Path]]:
    """One entry per study: a folder each, or all the files together."""
    if len(set(files)) < len(files):
        raise ValueError(f"{max(files, key=files.count)} is given twice")
    folders = [path for path in files if path.is_dir()]
    if folders and len(folders) < len(files):
        other = next(path for path in files if not path.is_dir())
        raise ValueError(f"{other} is not a folder but {folders[0]} is: give the files of one study, or folders")
    return list(folders) if folders else [files]


def _load(groups: list[Path | list[Path]], model: HLIPModel) -> Iterator[Study]:
    for paths in tqdm(groups, "reading studies", unit="study", disable=len(groups) == 1 or None):
        name = paths if isinstance(paths, Path) else min(paths)
        yield load_study(paths, model.config.preprocess, uid=str(name))


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())

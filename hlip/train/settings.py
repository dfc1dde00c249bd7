"""What is typed after `train/pretrain.py`, and the files of settings that it names, as a `TrainConfig`."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from ..read.safe import parse_yaml, read_yaml
from .config import TrainConfig, from_published_flags

KINDS = {field.name: str(field.type) for field in fields(TrainConfig)}
RECIPES = Path(__file__).with_name("recipes")
RECIPE_FOLDERS = Path(), Path("recipes"), Path("train/recipes")
TEXTS = ("str", "str | None", "Path", "Path | None")
MOST_VALUE = 4096  # characters, as a path may have


def read_arguments(arguments: list[str], description: str) -> TrainConfig:
    """Read the settings of a command line and of the files that it names.

    Raises:
        ValueError: an unknown setting, or a value that it cannot have; names it, and the file that it stands in.
        ImportError: jsonargparse is not installed.
    """
    try:
        from jsonargparse import ArgumentParser, set_loader
    except ImportError as error:
        raise ImportError("settings need jsonargparse: pip install 'hlip-kernels[train]'") from error

    files: dict[str, Path] = {}  # the file that a setting stands in

    class Parser(ArgumentParser):
        """Errors in a line, in place of all settings and a line."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            unknown = "not accepted" in message or "unrecognized" in message
            words = re.findall(r"\w+", message) if unknown else []
            message = f"{' '.join(message.split())}{_hint(words)} (--help explains every setting)"
            raise ValueError(located(message, re.match(r'Parser key "(\w+)"', message)))

    def located(message: str, name: re.Match[str] | None) -> str:
        return f"{files[name[1]]}: {message}" if name and name[1] in files else message

    set_loader("yaml", parse_yaml, (ValueError,))  # for values; files do not get that far
    parser = Parser(prog="pretrain.py", description=description, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_class_arguments(TrainConfig)
    args = parser.parse_args(with_settings(from_published_flags(with_recipes(arguments)), files))
    args.pop("config", None)
    try:
        return TrainConfig(**vars(args))
    except ValueError as error:
        raise ValueError(located(str(error), re.match(r"(\w+) ", str(error)))) from error


def _hint(words: list[str]) -> str:
    """The first setting that one of the words is like."""
    close = [near for word in words for near in difflib.get_close_matches(word[:100], KINDS, 1, 0.75)]
    return f"; did you mean {close[0]}?" if close else ""


def with_recipes(arguments: list[str]) -> list[str]:
    """Put the path of a published recipe in place of its name: NAME, NAME.yaml or train/recipes/NAME.yaml."""
    found: list[str] = []
    for i, argument in enumerate(arguments):
        follows = i > 0 and arguments[i - 1] == "--config"
        given = argument.removeprefix("--config=") if follows or argument.startswith("--config=") else ""
        if given and not Path(given).exists():
            there = RECIPES / f"{Path(given).name.removesuffix('.yaml')}.yaml"
            if Path(given).parent not in RECIPE_FOLDERS or not there.is_file():
                names = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
                close = difflib.get_close_matches(Path(given).stem, names, 1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
                raise ValueError(f"--config {given}: no such file or recipe; {hint}")
            argument = str(there) if follows else f"--config={there}"
        found.append(argument)
    return found


def with_settings(arguments: list[str], files: dict[str, Path]) -> list[str]:
    """The arguments, with the settings of a file in place of `--config FILE`, noted in `files`.

    Raises:
        ValueError: not readable, or a value that no setting has; names the file.
    """
    given: list[str] = []
    flag = ""
    for argument in arguments:
        named = argument.startswith("--")
        flag, sign, value = argument[2:].partition("=") if named else (flag, "=", argument)
        if flag == "config" and sign:
            del given[len(given) - (not named) :]
            settings = read_settings(Path(value))
            files |= dict.fromkeys(settings, Path(value))
            given += [f"--{name}={text}" for name, text in settings.items()]
        else:
            if sign:
                check_value(flag, value)
            given.append(argument)
    return given


def read_settings(path: Path) -> dict[str, str]:
    """The settings of a YAML file, as they would be typed."""
    try:
        content = read_yaml(path, texts=True)
        if not isinstance(content, dict):
            raise ValueError(f"expected settings by name, got {type(content).__name__}")
        texts: dict[str, str] = {}
        for name, value in content.items():
            if name not in KINDS:
                raise ValueError(f"no setting {name[:100]!r}{_hint([name])}")
            items = value if isinstance(value, list) else [value]
            if not all(item is None or isinstance(item, str) for item in items):
                raise ValueError(f"{name}: values within values")
            typed = ["null" if item is None else item for item in items]
            texts[name] = f"[{', '.join(typed)}]" if isinstance(value, list) else typed[0]
            check_value(name, texts[name])
        return texts
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path}: not readable settings ({error})") from error


def check_value(name: str, text: str) -> None:
    """Raises ValueError where a value is longer than any may be, or is not what its setting takes.

    jsonargparse would read it by a loader of its own, to which `1:30`, `0x10` and `1_0` are numbers and `yes` is true.
    """
    if len(text) > MOST_VALUE:
        raise ValueError(f"{name}: a value of {len(text)} characters (at most {MOST_VALUE})")
    if name not in KINDS or KINDS[name] in TEXTS:
        return
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    for item in content if isinstance(content, list) else [content]:
        if isinstance(item, (list, dict)):
            raise ValueError(f"{name}: values within values")
        worded = re.search("Literal|Texts", KINDS[name])
        if (isinstance(item, str) and not worded) or (isinstance(item, (int, float)) and abs(item) >= 2**63):
            raise ValueError(f"{name}: expected {KINDS[name]}, got {item!r:.80}")

"""Zero-shot tasks as data: classes, prompts, label columns, metrics, and what was published.

`benchmarks/*.yaml` are the tasks that come with the package; a file of the user's own has the same fields:

    kind: multi-class        one class a study: softmax over the classes (the default);
          pairs              any number of classes: softmax of each class' positive and negative prompt; or
          similarity         the same, by the cosine with one prompt, which ranks studies
    classes                  class: prompt or list of prompts; of pairs {positive: ..., negative: ...}
    templates                sentences with {} for the prompt; or name: sentences, of which --templates chooses, and
                             where sentences may differ by the class' group, {group: sentences}
    groups                   class: group
    columns                  class: its column in the label table, if it is not the class' name; null leaves it out
    metrics                  auc, and of pairs balanced_accuracy, accuracy, weighted_f1, precision, recall; of
                             multi-class auc, balanced_accuracy and weighted_f1
    subtasks                 name: classes, of multi-class: only their studies, and softmax over them alone
    unit                     study (the default), or scan: every scan is scored by itself, with its study's labels
    released                 result key: the same figure's name in the released tools' output; {} for each class
    published                source, columns (result keys), and rows: name: percentages
    like                     the name of a task that comes with the package, whose fields are taken where this has none
"""

from __future__ import annotations

import difflib
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..read.safe import as_texts, check_keys, read_yaml
from .metrics import AT_THRESHOLD

FOLDER = Path(__file__).with_name("benchmarks")
Kind = Literal["multi-class", "pairs", "similarity"]
METRICS: dict[str, tuple[str, ...]] = {
    "multi-class": ("balanced_accuracy", "auc", "weighted_f1"),
    "pairs": ("auc", *AT_THRESHOLD),
    "similarity": ("auc",),
}
TEMPLATE = "This study shows: {}."
FIELDS = (
    "kind", "classes", "templates", "groups", "columns", "metrics", "subtasks", "unit", "released", "published", "like",
)  # fmt: skip
ALL = ""  # the group of a class without one


@dataclass(frozen=True)
class Published:
    """Figures of others, in percent; None where there is none. columns: result keys."""

    source: str = ""
    columns: tuple[str, ...] = ()
    rows: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A zero-shot task; see the module's docstring.

    positive, negative: prompts of each class; `negative` is empty unless the kind is "pairs".
    templates: by name, by group.
    columns: of each class.
    subtasks: name to classes; of multi-class only.
    released: result keys to what the released tools call them.
    unit: what is scored.
    """

    name: str
    kind: Kind
    positive: Mapping[str, tuple[str, ...]]
    negative: Mapping[str, tuple[str, ...]]
    templates: Mapping[str, Mapping[str, tuple[str, ...]]]
    groups: Mapping[str, str]
    columns: Mapping[str, str]
    metrics: tuple[str, ...]
    subtasks: Mapping[str, tuple[str, ...]]
    released: Mapping[str, str]
    published: Published
    unit: Literal["study", "scan"] = "study"

    @property
    def classes(self) -> list[str]:
        return list(self.positive)

    @property
    def headline(self) -> list[str]:
        """Result keys of the whole task, in the order of the table."""
        if not self.subtasks:
            return ["macro_auc" if name == "auc" else name for name in self.metrics]
        keys = [f"{name}_balanced_accuracy" for name in self.subtasks] if "balanced_accuracy" in self.metrics else []
        return keys + (["macro_auc"] if "auc" in self.metrics else [])

    def sentences(self, prompts: Mapping[str, Sequence[str]], choice: str | None = None) -> dict[str, list[str]]:
        """Every class' prompts in its templates.

        Args:
            prompts: `positive` or `negative`.
            choice: which templates; the first if None.

        Raises:
            ValueError: no such templates.
        """
        choice = next(iter(self.templates)) if choice is None else choice
        if choice not in self.templates:
            raise ValueError(f"task {self.name} has no templates {choice!r}: there are {', '.join(self.templates)}")
        chosen = self.templates[choice]
        return {
            name: [
                template.replace("{}", prompt)
                for prompt in words
                for template in (chosen[ALL] if ALL in chosen else chosen[self.groups[name]])
            ]
            for name, words in prompts.items()
        }


def list_tasks() -> list[str]:
    """The tasks that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_task(name: Path | str) -> Task:
    """A task of the package by its name, or of a YAML file.

    Raises:
        ValueError: no such task; or a field that is missing, unknown or wrong: names file and field.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in list_tasks():
            close = difflib.get_close_matches(str(name), list_tasks(), n=2, cutoff=0.4)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise ValueError(f"unknown task {str(name)!r}; {hint}There are {', '.join(list_tasks())}, or FILE.yaml")
        path = FOLDER / f"{name}.yaml"
    try:
        return read_task(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable task ({error})") from error


def read_task(path: Path, template: str = TEMPLATE) -> Task:
    """A task of a YAML file. Raises OSError or ValueError with the reason alone.

    template: what its prompts are put into, if it does not say.
    """
    return _build(path.stem, _read(path), template)


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path, texts=True)
    if not isinstance(content, dict):
        raise ValueError("expected fields, such as `classes`")
    if "like" in content:
        like = content.pop("like")
        if like not in list_tasks():
            raise ValueError(f"like: no task {like!r} comes with the package")
        return {**_read(FOLDER / f"{like}.yaml"), **content}
    return content


def _build(name: str, content: dict[str, Any], template: str) -> Task:
    check_keys(content, FIELDS)
    kind = content.get("kind", "multi-class")
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected {', '.join(get_args(Kind))}, got {kind!r}")
    if (unit := content.get("unit", "study")) not in ("study", "scan"):
        raise ValueError(f"unit: expected study or scan, got {unit!r}")
    given = _mapping(content.get("classes"), "classes")
    check_names(given)
    columns = {each: each for each in given} | _within(content.get("columns", {}), given, "columns")
    if wrong := [each for each, column in columns.items() if column is not None and not isinstance(column, str)]:
        raise ValueError(f"columns: expected a name or null for {wrong[0]}, got {columns[wrong[0]]!r}")
    classes = {each: words for each, words in given.items() if columns[each] is not None}
    if len(classes) < (2 if kind == "multi-class" else 1):
        raise ValueError(f"classes: too few ({len(classes)} with a column) for a task of kind {kind}")
    if kind == "pairs":
        pairs = {each: _mapping(words, f"classes: {each}") for each, words in classes.items()}
        if wrong := [each for each, pair in pairs.items() if set(pair) != {"positive", "negative"}]:
            raise ValueError(f"classes: {wrong[0]}: expected the prompts `positive` and `negative`")
        positive = {each: _texts(pair["positive"], f"classes: {each}") for each, pair in pairs.items()}
        negative = {each: _texts(pair["negative"], f"classes: {each}") for each, pair in pairs.items()}
    else:
        positive = {each: _texts(words, f"classes: {each}") for each, words in classes.items()}
        negative = {}
        if kind == "multi-class":
            check_apart(positive)
    groups = {each: str(group) for each, group in _within(content.get("groups", {}), given, "groups").items()}
    metrics = _texts(content.get("metrics", list(METRICS[kind])), "metrics")
    if wrong := [metric for metric in metrics if metric not in METRICS[kind]]:
        raise ValueError(f"metrics: {wrong[0]!r} is none of kind {kind}: there are {', '.join(METRICS[kind])}")
    return Task(
        name,
        kind,
        positive,
        negative,
        _templates(content.get("templates", template), classes, groups),
        groups,
        {each: columns[each] for each in classes},
        metrics,
        _subtasks(content.get("subtasks", {}), classes, kind),
        _released(content.get("released"), list(classes)),
        _published(content.get("published")),
        unit,
    )


def _templates(
    value: Any, classes: Mapping[str, Any], groups: Mapping[str, str]
) -> dict[str, dict[str, tuple[str, ...]]]:
    sets = value if isinstance(value, dict) else {"default": value}
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, given in _mapping(sets, "templates").items():
        by_group = given if isinstance(given, dict) else {ALL: given}
        found[name] = {str(group): _texts(texts, f"templates: {name}") for group, texts in by_group.items()}
        for texts in found[name].values():
            check_templates(texts, f"templates: {name}: ")
        lacking = [each for each in classes if ALL not in found[name] and groups.get(each) not in found[name]]
        if lacking:
            raise ValueError(f"templates: {name}: none for the group {groups.get(lacking[0])!r} of {lacking[0]}")
    return found


def _subtasks(value: Any, classes: Mapping[str, Any], kind: Kind) -> dict[str, tuple[str, ...]]:
    if value and kind != "multi-class":
        raise ValueError("subtasks: only a multi-class task has them")
    given = _mapping(value, "subtasks") if value else {}
    found = {name: _texts(members, f"subtasks: {name}") for name, members in given.items()}
    for name, members in found.items():
        if len(members) < 2 or len(set(members)) < len(members) or not classes.keys() >= set(members):
            raise ValueError(f"subtasks: {name}: expected at least two of the classes, got {list(members)}")
    return found


def _released(value: Any, classes: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, name in _mapping(value, "released").items() if value else ():
        if not isinstance(name, str) or ("{}" in key) != ("{}" in name):
            raise ValueError(f"released: {key}: expected a name, with {{}} where the key has it, got {name!r}")
        each = classes if "{}" in key else [""]
        found |= {key.replace("{}", k): name.replace("{}", k) for k in each}
    return found


def _published(value: Any) -> Published:
    if value is None:
        return Published()
    content = _mapping(value, "published")
    check_keys(content, ("source", "columns", "rows"))
    columns, rows = (
        _texts(content.get("columns"), "published: columns"),
        _mapping(content.get("rows"), "published: rows"),
    )
    return Published(
        str(content.get("source", "")), columns, {name: _figures(row, name, len(columns)) for name, row in rows.items()}
    )


def _figures(row: Any, name: str, count: int) -> tuple[float | None, ...]:
    try:
        numbers = [None if text is None else float(text) for text in row] if isinstance(row, list) else []
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers if number is not None):
        raise ValueError(f"published: {name}: expected {count} numbers or nulls, got {row!r}")
    return tuple(numbers)


def check_templates(templates: Sequence[str], where: str = "") -> None:
    """Raises ValueError where a sentence has no place for the prompt, several, or other braces."""
    for text in templates:
        if text.count("{}") != 1 or {"{", "}"} & set(text.replace("{}", "")):
            raise ValueError(f"{where}expected exactly one {{}} in {text!r}, and no other brace")


def check_apart(classes: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError where two classes have the same prompts, so that neither is more like a study."""
    names: dict[tuple[str, ...], str] = {}
    for name, words in classes.items():
        if (other := names.setdefault(tuple(sorted(words)), name)) != name:
            raise ValueError(f"classes: {other!r} and {name!r} have the same prompts")


def check_names(classes: Iterable[str]) -> None:
    """Raises ValueError where names of classes are the same but for capitals, spaces and forms of Unicode."""
    names: dict[str, str] = {}
    for name in classes:
        plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        if (other := names.setdefault(plain, name)) != name:
            raise ValueError(f"classes: {other!r} and {name!r} are the same but for capitals and spaces")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{where}: expected names with values, got {value!r}")
    return value


def _within(value: Any, classes: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = _mapping(value, where) if value else {}
    if unknown := [each for each in found if each not in classes]:
        raise ValueError(f"{where}: there is no class {unknown[0]!r}")
    return found


def _texts(value: Any, where: str) -> tuple[str, ...]:
    texts = as_texts(value, where)
    if not all(text.strip() for text in texts):
        raise ValueError(f"{where}: expected a text or a list of texts, got {value!r}")
    return tuple(texts)

"""Zero-shot tasks as data: classes, prompts, label columns, metrics, and what was published.

Shapes: N studies, T prompts (those of the classes; of a task of pairs then the negative ones), K that are scored.

`benchmarks/*.yaml` are the tasks that come with the package. A file of the user's own has the same fields, of which
`classes` alone must be there:

    kind: multi-class        one class a study: softmax over the classes (the default);
          pairs              any number of classes: softmax of each class' positive and negative prompt; or
          similarity         the same, by the cosine with one prompt, which ranks studies
    classes                  class: prompt or list of prompts; of pairs {positive: ..., negative: ...}
    templates                sentences with {} for the prompt, "This study shows: {}." if there are none; or name:
                             sentences, of which --templates chooses, and where sentences may differ by the class'
                             group, {group: sentences, "*": those of the rest}
    groups                   class: group
    reworded                 name of templates: {class: prompts}, for classes that have other prompts with them
    merged                   class: classes, of pairs, that are scored as one in their place: by the largest share if
                             one is above a half, else by the smallest
    columns                  class: its column in the label table, if it is not the class' name; null leaves it out. A
                             table without that column may have one of the class' name; of a merged class, its members'
    study                    names of tables' column of studies, beside study, study_uid and VolumeName
    metrics                  auc; of pairs and similarity balanced_accuracy, accuracy, weighted_f1, precision, recall;
                             of multi-class balanced_accuracy and weighted_f1
    threshold                scores above it are positive: a number; or, of 100 cuts from 0 to 1 the one whose point of
                             the ROC curve is nearest to (0, 1), of equal ones the lowest (the default) or highest
    subtasks                 name: classes, of multi-class: only their studies, and softmax over them alone; also every
                             class against the others, positive from a share of a half
    means                    name: subtasks, of whose figures it is the mean
    shape                    voxels (D, H, W) of the scans that the published figures are of
    unit                     study (the default), or scan: every scan is scored by itself, with its study's labels
    released                 result key: the same figure's name in the released tools' output; {} for each class
    published                source, columns (result keys), and rows: name: percentages
    like                     the name of a task that comes with the package, whose fields are taken where this has none;
                             without its `means` where this has subtasks
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np

from ..read.safe import finite_number, hint, read_yaml
from ..read.schema import Texts, structure
from .metrics import AT_THRESHOLD

FOLDER = Path(__file__).with_name("benchmarks")
Kind = Literal["multi-class", "pairs", "similarity"]
METRICS: dict[str, tuple[str, ...]] = {
    "multi-class": ("balanced_accuracy", "auc", "weighted_f1"),
    "pairs": ("auc", *AT_THRESHOLD),
    "similarity": ("auc", *AT_THRESHOLD),
}
USUAL = METRICS | {"similarity": ("auc",)}  # of a task that names none
NONE = Texts()
TEMPLATE = "This study shows: {}."  # of prompts that come without one
ALL = "*"  # the group whose sentences are those of classes of any other


@dataclass(frozen=True)
class Pair:
    """Prompts for a class; of kind "pairs" also for what it is told from."""

    positive: Texts
    negative: Texts = NONE


@dataclass(frozen=True)
class Published:
    """Figures of others, in percent; None where there is none. columns: result keys."""

    source: str = ""
    columns: Texts = NONE
    rows: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, row in self.rows.items():
            try:
                figures = tuple(None if value is None else finite_number(value) for value in row)
            except (TypeError, ValueError):
                figures = ()
            if isinstance(row, str) or len(figures) != len(self.columns):
                raise ValueError(f"{name}: expected {len(self.columns)} numbers or nulls, got {row!r}")
            self.rows[name] = figures


@dataclass(frozen=True)
class Task:
    """A zero-shot task; see the module's docstring. Fields may be given as a file has them, and are held as here.

    classes: prompts by class. A class without a column has no part in the task.
    templates: sentences by name and group.
    reworded: prompts by name of templates and class.
    columns: of what is scored: the classes, but for those that are merged, and what these are merged into.
    """

    classes: dict[str, Any]
    templates: Any = TEMPLATE
    kind: Kind = "multi-class"
    name: str = "task"
    groups: dict[str, str] = field(default_factory=dict)
    reworded: dict[str, dict[str, Any]] = field(default_factory=dict)
    merged: dict[str, Texts] = field(default_factory=dict)
    columns: dict[str, str | None] = field(default_factory=dict)
    study: Texts = NONE
    metrics: Texts = NONE
    threshold: Any = "lowest"
    subtasks: dict[str, Texts] = field(default_factory=dict)
    means: dict[str, Texts] = field(default_factory=dict)
    shape: Any = ()
    unit: Literal["study", "scan"] = "study"
    released: dict[str, str] = field(default_factory=dict)
    published: Published = field(default_factory=Published)

    def __post_init__(self) -> None:
        kinds = get_type_hints(Task)
        for setting in fields(self):
            if (value := getattr(self, setting.name)) is not setting.default:
                self._set(setting.name, structure(kinds[setting.name], value, setting.name))
        if not self.classes:
            raise ValueError("classes: expected names with values, got none")
        given = [*self.classes, *self.merged]
        plain = ((name, " ".join(unicodedata.normalize("NFKC", name).casefold().split())) for name in given)
        _check_apart(plain, "are the same but for capitals and spaces")
        _check_known(given, {"columns": self.columns, "groups": self.groups, **_under("reworded", self.reworded)})
        self._set_prompts()
        for where, groups, kind in (("subtasks", self.subtasks, "multi-class"), ("merged", self.merged, "pairs")):
            if groups and self.kind != kind:
                raise ValueError(f"{where}: only a task of kind {kind} has them")
            _check_known(self.classes, _under(where, groups))
            for name, members in groups.items():
                if len(set(members)) < max(2, len(members)):
                    raise ValueError(f"{where}.{name}: expected at least two of the classes, got {list(members)}")
        _check_known(self.subtasks, _under("means", self.means), "subtask")
        if len(self.names) < (2 if self.kind == "multi-class" else 1):
            raise ValueError(f"classes: too few ({len(self.names)} with a column) for a task of kind {self.kind}")
        self._set_templates()
        self._set_figures()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _set_prompts(self) -> None:
        columns: dict[str, str | None] = {**{name: name for name in (*self.classes, *self.merged)}, **self.columns}
        parts = {name for members in self.merged.values() for name in members}
        kept = [name for name in self.classes if columns[name] is not None or name in parts]
        self._set("classes", {name: self._pair(self.classes[name], f"classes.{name}") for name in kept})
        for choice, prompts in self.reworded.items():
            pairs = {name: self._pair(value, f"reworded.{choice}.{name}") for name, value in prompts.items()}
            self.reworded[choice] = {name: pair for name, pair in pairs.items() if name in kept}
        scored = [name for name in (*kept, *self.merged) if columns[name] is not None and name not in parts]
        self._set("columns", {name: columns[name] for name in scored})
        if self.kind == "multi-class":  # or neither class would be more like a study
            _check_apart(
                ((name, str(sorted(pair.positive))) for name, pair in self.classes.items()), "have the same prompts"
            )

    def _pair(self, value: Any, where: str) -> Pair:
        pair: Pair = structure(Pair, value if isinstance(value, (Mapping, Pair)) else {"positive": value}, where)
        if bool(pair.negative) != (self.kind == "pairs"):
            wanted = "the prompts `positive` and `negative`" if self.kind == "pairs" else "no negative prompt"
            raise ValueError(f"{where}: expected {wanted} in a task of kind {self.kind}")
        if not all(text.strip() for text in (*pair.positive, *pair.negative)):
            raise ValueError(f"{where}: expected a text or a list of texts, got {value!r}")
        return pair

    def _set_templates(self) -> None:
        given = self.templates if isinstance(self.templates, Mapping) else {"default": self.templates}
        by_group = {choice: value if isinstance(value, Mapping) else {ALL: value} for choice, value in given.items()}
        self._set("templates", structure(dict[str, dict[str, Texts]], by_group, "templates"))
        for choice, sentences in self.templates.items():
            for text in (text for texts in sentences.values() for text in texts):
                if text.count("{}") != 1 or {"{", "}"} & set(text.replace("{}", "")):
                    raise ValueError(f"templates.{choice}: expected exactly one {{}} in {text!r}, and no other brace")
            for name in self.classes:
                if not {self.groups.get(name), ALL} & sentences.keys():
                    raise ValueError(f"templates.{choice}: none for the group {self.groups.get(name)!r} of {name}")
        if not self.templates:
            raise ValueError("templates: expected sentences, got none")
        if unknown := [choice for choice in self.reworded if choice not in self.templates]:
            raise ValueError(f"reworded: there are no templates {unknown[0]!r}")

    def _set_figures(self) -> None:
        try:
            self._set("shape", tuple(map(int, self.shape)))
        except (TypeError, ValueError):
            self._set("shape", (0,))
        if self.shape and (len(self.shape) != 3 or min(self.shape) < 1):
            raise ValueError("shape: expected the numbers of slices, rows and columns of a scan")
        self._set("metrics", self.metrics or Texts(USUAL[self.kind]))
        if wrong := [metric for metric in self.metrics if metric not in METRICS[self.kind]]:
            raise ValueError(
                f"metrics: {wrong[0]!r} is none of kind {self.kind}: there are {', '.join(METRICS[self.kind])}"
            )
        if self.threshold not in ("lowest", "highest"):
            try:
                self._set("threshold", finite_number(self.threshold))
            except (TypeError, ValueError) as error:
                raise ValueError(f"threshold: expected lowest, highest or a number, got {self.threshold!r}") from error
        for key, name in self.released.items():
            if ("{}" in key) != ("{}" in name):
                raise ValueError(f"released.{key}: expected a name, with {{}} where the key has it, got {name!r}")
        keys = ((key, self.names if "{}" in key else [""]) for key in self.released)
        names = {key.replace("{}", k): self.released[key].replace("{}", k) for key, classes in keys for k in classes}
        self._set("released", names)

    @property
    def names(self) -> list[str]:
        """The names of what is scored."""
        return list(self.columns)

    @property
    def label_columns(self) -> list[Texts]:
        """Where the labels of each name may stand: the first of these columns that there is. One may serve several."""
        return [
            Texts(dict.fromkeys([column, name, *self.merged.get(name, ())]))
            for name, column in self.columns.items()
            if column is not None
        ]

    @property
    def headline(self) -> list[str]:
        """Result keys of the whole task, in the order of the table."""
        if not self.subtasks:
            return ["macro_auc" if name == "auc" else name for name in self.metrics]
        parts = (*self.subtasks, *self.means)
        keys = [f"{name}_balanced_accuracy" for name in parts] if "balanced_accuracy" in self.metrics else []
        return keys + (["macro_auc"] if "auc" in self.metrics else [])

    def sentences(
        self, templates: str | None = None, side: Literal["positive", "negative"] = "positive"
    ) -> dict[str, list[str]]:
        """Every class' prompts in its templates, by class.

        Args:
            templates: which; the first if None.

        Raises:
            ValueError: no such templates.
        """
        choice = next(iter(self.templates)) if templates is None else templates
        if choice not in self.templates:
            raise ValueError(f"task {self.name} has no templates {choice!r}: there are {', '.join(self.templates)}")
        by_group = self.templates[choice]
        return {
            name: [
                template.replace("{}", prompt)
                for prompt in getattr(pair, side)
                for template in by_group.get(self.groups.get(name, ALL)) or by_group[ALL]
            ]
            for name, pair in (self.classes | self.reworded.get(choice, {})).items()
        }

    def prompts(self, templates: str | None = None) -> list[list[str]]:
        """The sentences of T prompts: of each class, and of a task of pairs then of what each is told from."""
        sides = [self.sentences(templates, side) for side in ("positive", "negative")]
        return [texts for sentences in sides for texts in sentences.values() if texts]

    def notes_on_shapes(self, shapes: Iterable[Sequence[int] | None]) -> list[str]:
        """A note where published figures are of scans of another shape than one of these; None is one of its own."""
        for shape in shapes if self.shape else ():
            if shape is None or tuple(shape) != self.shape:
                theirs, these = (" x ".join(map(str, size or ["any number"])) for size in (self.shape, shape))
                return [
                    f"published figures of {self.name} are of scans of {theirs} voxels, these have {these}: see `size` "
                    "of a recipe (hlip prepare --recipe FILE)"
                ]
        return []

    def scores(self, similarities: np.ndarray, scale: float) -> np.ndarray:
        """(N, T) similarities to (N, K) float64: shares, or the similarities if the task's kind is "similarity".

        Softmax is at the model's own temperature: of pairs over the two prompts of a class, of multi-class over the
        classes. A share says how near a prompt is beside the others, not how likely it is: among prompts of which none
        is true, the shares also add up to 1.
        """
        if self.kind == "similarity":
            return similarities
        logits = scale * similarities.astype(np.float64)
        if self.kind == "pairs":
            logits = logits.reshape(len(logits), 2, -1).swapaxes(1, 2)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        if self.kind == "multi-class":
            return shares
        return self.merge(dict(zip(self.classes, shares[..., 0].T, strict=True)))

    def merge(self, shares: Mapping[str, np.ndarray]) -> np.ndarray:
        """(N, K) of each class' (N) shares; those of merged classes stand for what they are merged into, unless it has
        shares of its own."""
        columns = dict(shares)
        for name, members in self.merged.items():
            if name not in columns:
                parts = np.stack([columns[member] for member in members])
                columns[name] = np.where(parts.max(0) > 0.5, parts.max(0), parts.min(0))
        return np.stack([columns[name] for name in self.names], axis=1)


def list_tasks() -> list[str]:
    """The tasks that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_task(name: Path | str) -> Task:
    """A task of the package by its name, or of a YAML file.

    Raises:
        ValueError: no such task; or a field that is missing, unknown or wrong: names file and field.
    """
    shipped = str(name) in list_tasks()
    path = FOLDER / f"{name}.yaml" if shipped else Path(name)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise ValueError(f"unknown task {str(name)!r}{hint(str(name), list_tasks(), [*list_tasks(), 'FILE.yaml'])}")
    try:
        return structure(Task, {"name": path.stem, **_read(path)})
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable task ({error})") from error


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(path, texts=True)
    if not isinstance(content, dict):
        raise ValueError("expected fields, such as `classes`")
    like = content.pop("like", None)
    if like is not None and like not in list_tasks():
        raise ValueError(f"like: no task {like!r} comes with the package")
    base = {} if like is None else _read(FOLDER / f"{like}.yaml")
    if "subtasks" in content:
        base.pop("means", None)  # of its own subtasks
    return {**base, **content}


def _under(where: str, groups: Mapping[str, Iterable[str]]) -> dict[str, Iterable[str]]:
    return {f"{where}.{name}": members for name, members in groups.items()}


def _check_known(there: Collection[str], named: Mapping[str, Iterable[str]], what: str = "class") -> None:
    for where, names in named.items():
        if unknown := [name for name in names if name not in there]:
            raise ValueError(f"{where}: there is no {what} {unknown[0]!r}")


def _check_apart(classes: Iterable[tuple[str, str]], are: str) -> None:
    """Raises ValueError where what stands beside two names is the same."""
    names: dict[str, str] = {}
    for name, what in classes:
        if (other := names.setdefault(what, name)) != name:
            raise ValueError(f"classes: {other!r} and {name!r} {are}")

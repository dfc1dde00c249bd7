"""Zero-shot classification: what a study shows, by the likeness of its embedding to those of prompts.

Shapes: K classes, N studies, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..embed.loop import embed_studies
from ..embed.texts import TextEncoder, embed_prompts
from ..model.clip import HLIPModel
from ..read.safe import as_texts
from ..study import Study
from .tasks import ALL, check_apart, check_names, check_templates, read_task

DEFAULT_TEMPLATE = "This MRI study shows: {}."


@dataclass(frozen=True)
class Prompts:
    """Each class's names, and the sentences they are put into at `{}`. A text may stand for a list of one."""

    classes: Mapping[str, Sequence[str]]
    templates: Sequence[str] = (DEFAULT_TEMPLATE,)

    def __post_init__(self) -> None:
        if not isinstance(self.classes, Mapping) or len(self.classes) < 2:
            raise ValueError(f"prompts missing: expected at least two classes with their names, got {self.classes!r}")
        classes = {name: as_texts(words, f"classes: {name}") for name, words in self.classes.items()}
        if empty := [name for name, words in classes.items() if not all(word.strip() for word in words)]:
            raise ValueError(f"prompts missing: class {empty[0]!r} has an empty name")
        templates = as_texts(self.templates, "templates")
        check_names(classes)
        check_apart(classes)
        check_templates(templates, "templates: ")
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "templates", templates)

    @property
    def sentences(self) -> dict[str, list[str]]:
        """Every class' names in all templates."""
        return {
            name: [template.replace("{}", word) for word in words for template in self.templates]
            for name, words in self.classes.items()
        }

    @classmethod
    def read(cls, path: Path | str) -> Prompts:
        """Read a YAML file with `classes: {class: [name, ...]}` and `templates: [...]`, or any other task (`task.Task`)
        in which classes are compared with one another; of several sets of templates, the first.

        Raises:
            ValueError: not such a file; names it and the reason.
        """
        try:
            task = read_task(Path(path), DEFAULT_TEMPLATE)
            if task.kind != "multi-class":
                raise ValueError(f"kind: expected multi-class, for classes that are compared, got {task.kind}")
            templates = next(iter(task.templates.values()))
            if ALL not in templates:
                raise ValueError("templates: expected the same for all classes; groups are for hlip eval")
            return cls(task.positive, templates[ALL])
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable prompts file ({error})") from error


def zeroshot_classifier(model: TextEncoder, prompts: Prompts) -> Tensor:
    """(K, E): for every class the normalised mean over the embeddings of its names in all templates.

    Raises:
        ValueError: a prompt that is too long for the text tower.
    """
    return embed_prompts(model, prompts.sentences.values())


@torch.no_grad()
def class_shares(model: TextEncoder, embeddings: Tensor, classifier: Tensor) -> Tensor:
    """(N, E) and (K, E) to (N, K): softmax over the classes at the model's own temperature.

    A share says how near a class is beside the others, not how likely it is: among classes of which none is true, the
    shares also add up to 1.
    """
    return (model.logit_scale.exp() * embeddings.to(classifier) @ classifier.T).softmax(-1)


def zeroshot(model: HLIPModel, studies: Iterable[Study], prompts: Prompts) -> tuple[list[str], Tensor]:
    """Each class's share among the classes, for every study: uids, and (N, K) float32 on the host. See `class_shares`.

    Raises:
        ValueError: no study.
    """
    pairs = list(embed_studies(model, studies))
    if not pairs:
        raise ValueError("there is no study to classify")
    uids, embeddings = zip(*pairs, strict=True)
    classifier = zeroshot_classifier(model, prompts)
    return list(uids), class_shares(model, torch.stack(embeddings), classifier).cpu()

"""Zero-shot classification: what a study shows, by the likeness of its embedding to those of prompts.

Shapes: K classes, N studies, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.batch import Study
from ..data.plain import read_yaml
from ..model.clip import HLIPModel
from .embed import embed_studies
from .texts import TextEncoder, embed_prompts

DEFAULT_TEMPLATE = "This MRI study shows: {}."


@dataclass(frozen=True)
class Prompts:
    """Each class's names, and the sentences they are put into at `{}`."""

    classes: Mapping[str, Sequence[str]]
    templates: Sequence[str] = (DEFAULT_TEMPLATE,)

    def __post_init__(self) -> None:
        empty = [name for name, words in self.classes.items() if not words or not all(w.strip() for w in words)]
        if len(self.classes) < 2 or empty:
            what = f"class {empty[0]!r} has no name or an empty one" if empty else f"got {len(self.classes)} class"
            raise ValueError(f"prompts missing: at least two classes are needed, each with a name in words; {what}")
        bad = [template for template in self.templates if template.count("{}") != 1]
        if bad or not self.templates:
            raise ValueError(f"a template needs exactly one {{}}, got {bad[0] if bad else 'no template'!r}")

    @property
    def sentences(self) -> dict[str, list[str]]:
        """Every class' names in all templates."""
        return {
            name: [template.replace("{}", word) for word in words for template in self.templates]
            for name, words in self.classes.items()
        }

    @classmethod
    def read(cls, path: Path | str) -> Prompts:
        """Read a YAML file with `classes: {class: [name, ...]}` and `templates: [...]`.

        Raises:
            ValueError: not such a file; names it and the reason.
        """
        try:
            content = read_yaml(Path(path), texts=True)
            classes = {str(name): _words(words) for name, words in content["classes"].items()}
            return cls(classes, tuple(_words(content.get("templates", DEFAULT_TEMPLATE))))
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a readable prompts file ({error})") from error


def _words(value: object) -> list[str]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"expected a text or a list of texts, got {value!r}")
    return words


def zeroshot_classifier(model: TextEncoder, prompts: Prompts) -> Tensor:
    """(K, E): for every class the normalised mean over the embeddings of its names in all templates.

    Raises:
        ValueError: a prompt that is too long for the text tower.
    """
    return embed_prompts(model, prompts.sentences.values())


@torch.no_grad()
def class_probabilities(model: TextEncoder, embeddings: Tensor, classifier: Tensor) -> Tensor:
    """(N, E) and (K, E) to (N, K): softmax over the classes at the model's own temperature."""
    return (model.logit_scale.exp() * embeddings.to(classifier) @ classifier.T).softmax(-1)


def zeroshot(model: HLIPModel, studies: Iterable[Study], prompts: Prompts) -> tuple[list[str], Tensor]:
    """Probabilities of the classes for every study: uids, and (N, K) float32 on the host.

    Raises:
        ValueError: no study.
    """
    pairs = list(embed_studies(model, studies))
    if not pairs:
        raise ValueError("there is no study to classify")
    uids, embeddings = zip(*pairs, strict=True)
    classifier = zeroshot_classifier(model, prompts)
    return list(uids), class_probabilities(model, torch.stack(embeddings), classifier).cpu()

"""The models that the paper compares with.

Two of them are models of this package: a plain ViT over all scans has `levels` all "study" (`ModelConfig`), and the
model of one scan a study is any that was trained with `--max_scans 1`, given one scan of each study. They are embedded
and scored as any other. The rest are 2D models, which see one slice at a time: `SliceEncoder`.

Shapes: S slices of a study, K texts, E embedding.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.weights import weights_digest
from ..read.safe import as_texts, read_json, short
from ..read.schema import structure
from ..store.store import Store
from ..study import Study
from .open_clip import check_size, write_known

Pool = Literal["mean", "max"]
PREFIX = "open_clip:"
Slices = dict[str, dict[str, tuple[int, ...]]]


class SliceEncoder(nn.Module):
    """A 2D model of open_clip that sees the slices of a study one by one.

    A slice is a row of a prepared scan's first axis. Its grey values become three equal channels and go through the
    model's own resizing, cropping and normalisation.

    pool "mean": a study's embedding is the mean over the slices of a scan, then over its scans, so that all scans count
        alike. Its similarities to texts are the means of the slices', up to one factor for all texts.
    pool "max": a study's similarity to a text is the largest of its slices'. This cannot be had from one embedding, as
        each text has a slice of its own: `similarities` is for scores. `encode_study` then gives the largest value of
        every feature, over all slices. A probe can learn from those. Similarities to them mean nothing: the features'
        axes are arbitrary.

    Args:
        model, transform, tokenizer: of open_clip.
        slices: which slices to see, by study and scan's name; see `read_slices`. A study that is not listed, such as a
            normal one, is seen whole; of one that is, the scans that are not listed are left out.
        batch: slices at a time.
    """

    def __init__(
        self,
        model: Any,
        transform: Callable[[Any], Tensor],
        tokenizer: Callable[..., Tensor],
        pool: Pool = "mean",
        slices: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
        batch: int = 64,
    ) -> None:
        if pool not in get_args(Pool):
            raise ValueError(f"pool must be one of {', '.join(get_args(Pool))}, got {pool!r}")
        if batch < 1:
            raise ValueError(f"batch must be positive, got {batch}")
        super().__init__()
        self.model, self.transform, self.tokenizer = model.eval(), transform, tokenizer
        self.pool, self.slices, self.batch = pool, slices or {}, batch

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale.detach().reshape(())

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def digest(self) -> str:
        """A hash of weights, image processing, pooling and slices."""
        transform = re.sub(r" at 0x[0-9a-f]+", "", repr(self.transform))  # functions are shown with their addresses
        return weights_digest(self.model, [self.pool, self.slices, transform])

    @classmethod
    def from_pretrained(
        cls,
        name: Path | str,
        pool: Pool = "mean",
        slices: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
        batch: int = 64,
    ) -> SliceEncoder:
        """Read a model in open_clip's hub format.

        Args:
            name: a folder with `open_clip_config.json` and weights, or "hf-hub:OWNER/NAME"; with "open_clip:" before it
                or without. No code is fetched, and none that lies with the weights is run: open_clip reads a copy of
                what is known of the configuration. A text tower of transformers must be a BERT.

        Raises:
            ValueError: nothing usable there; names it.
            ImportError: no open_clip.
        """
        name = str(name).removeprefix(PREFIX)
        try:
            from open_clip import create_model_from_pretrained, get_tokenizer
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
            why = str(error).splitlines()[0]
            raise ImportError(f"2D models need open_clip: pip install 'hlip-kernels[baselines]' ({why})") from error
        with tempfile.TemporaryDirectory() as place:
            write_known(name, Path(place))
            try:
                check_size(Path(place))
                model, transform = create_model_from_pretrained(f"local-dir:{place}")  # reads pickles with weights_only
                return cls(model, transform, get_tokenizer(f"local-dir:{place}"), pool, slices, batch)
            except Exception as error:  # damaged files can raise anything
                why = (str(error).splitlines()[0] if str(error) else type(error).__name__).replace(place, name)
                raise ValueError(f"{name}: not a model that open_clip can read ({why})") from error

    @torch.no_grad()
    def encode_slices(self, study: Study) -> list[Tensor]:
        """Embeddings of the slices of each scan that is seen: (S of the scan, E) float32 of unit length, on the host.

        Raises:
            ValueError: a study without a slice, or a list of slices that are not the study's; names it.
        """
        from PIL import Image

        scans = [scan.numpy()[chosen] for scan, chosen in zip(study.scans, self._chosen(study), strict=True)]
        images = [image for scan in scans for image in scan]
        if not images:
            raise ValueError(f"{study.uid}: has no slice to see")
        parts = []
        for start in range(0, len(images), self.batch):
            inputs = [self.transform(Image.fromarray(image)) for image in images[start : start + self.batch]]
            features = self.model.encode_image(torch.stack(inputs).to(self.device))
            parts.append(F.normalize(features.float(), dim=-1).cpu())
        return [slices for slices in torch.cat(parts).split([len(scan) for scan in scans]) if len(slices)]

    def check_slices(self, store: Store) -> None:
        """Raises ValueError where slices are listed that the store's studies do not have, or of no study of it."""
        places = {uid: i for i, uid in enumerate(store.uids.tolist())}
        listed = [uid for uid in self.slices if uid in places]
        if self.slices and not listed:
            raise ValueError(
                f"{store.path}: holds none of the studies of which slices are listed, as {min(self.slices)}"
            )
        for uid in listed:
            self._chosen(store.study(places[uid]))

    def _chosen(self, study: Study) -> list[np.ndarray]:
        """The rows of each scan to see."""
        wanted = self.slices.get(study.uid)
        if wanted is None:
            return [np.arange(len(scan)) for scan in study.scans]
        if unknown := sorted(set(wanted) - set(study.names)):
            raise ValueError(f"{study.uid}: has no scan {unknown[0]}, of which slices are listed")
        chosen = [np.asarray(wanted.get(name, ()), dtype=np.int64) for name in study.names]
        for name, scan, rows in zip(study.names, study.scans, chosen, strict=True):
            if len(rows) and not 0 <= rows.min() <= rows.max() < len(scan):
                raise ValueError(f"{study.uid}, scan {name}: has no slice {rows.max()} (there are {len(scan)})")
        return chosen

    def encode_study(self, study: Study) -> Tensor:
        """The (E) float32 embedding of a study, of unit length, on the host."""
        return F.normalize(self._pooled(self.encode_slices(study)), dim=0)

    def similarities(self, study: Study, texts: Tensor) -> Tensor:
        """A study's (K) float32 similarities to embeddings of texts (K, E), on the host.

        They are pooled over the slices: with "mean" over those of a scan, then over the scans.
        """
        texts = texts.double().cpu()  # which autocast leaves alone
        return self._pooled([slices.double() @ texts.T for slices in self.encode_slices(study)]).float()

    def _pooled(self, scans: Sequence[Tensor]) -> Tensor:
        if self.pool == "max":
            return torch.cat(list(scans)).amax(0)
        return torch.stack([slices.mean(0) for slices in scans]).mean(0)

    def count_tokens(self, texts: Sequence[str]) -> tuple[list[int], int]:
        """Tokens of each text, and the most that the model reads; its tokenizer would cut what is longer in silence."""
        most = self.tokenizer([""]).shape[1]
        counts = []
        for text in as_texts(texts, least=0):
            # No text has more tokens than bytes, so that the last of so many places is padding.
            room = max(most, len(text.encode("utf-8", "surrogateescape")) + 8)
            (row,) = self.tokenizer([text], context_length=room)
            counts.append(room - int((row.flip(0) != row[-1]).int().argmax()))
        return counts, most

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts: (K, E), of unit length. The model's tokenizer cuts a text that is too long."""
        tokens = self.tokenizer(as_texts(texts)).to(self.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)


def read_slices(path: Path | str) -> Slices:
    """Read which slices to see: a JSON object of studies, each an object of scans by name, each a list of indices.

    Raises:
        ValueError: not such a file, a negative index, or a study without a slice; names it.
    """
    try:
        slices: Slices = structure(Slices, read_json(Path(path)))
        for uid, scans in slices.items():
            if min((row for rows in scans.values() for row in rows), default=-1) < 0:
                raise ValueError(f"{uid}: expected at least one index, and all from 0, got {short(scans)}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable list of slices ({error})") from error
    return slices

"""The models that the paper compares with.

Two of them are models of this package: a plain ViT over all scans has `levels` all "study" (`ModelConfig`), and the
model of one scan a study is any that was trained with `--max_scans 1`, given one scan of each study. They are embedded
and scored as any other. The rest are 2D models, which see one slice at a time: `SliceEncoder`.

Shapes: S slices of a study, K texts, E embedding.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.text import check_number, read_bert_config
from ..model.tokenizer import TOKENIZER_FILES, read_tokenizer
from ..model.weights import local_folder, weights_digest
from ..read.paths import check_within
from ..read.safe import as_texts, read_json
from ..read.tensors import check_safetensors, check_tensors
from ..store.store import Store
from ..study import Study

Pool = Literal["mean", "max"]
PREFIX = "open_clip:"
HUB = "hf-hub:"
CONFIG = "open_clip_config.json"
# The settings of that file that are read: a type, or the least and largest value of a number, which is an integer where
# the least value is one. What serves training alone, or makes a library fetch or import something, is not among them.
Setting = type | tuple[float, float]
MODEL_KEYS: dict[str, Setting] = {
    "embed_dim": (1, 2**16), "vision_cfg": dict, "text_cfg": dict, "quick_gelu": bool, "custom_text": bool,
    "init_logit_scale": (-1e3, 1e3), "init_logit_bias": (-1e3, 1e3),
}  # fmt: skip
_LAYERS: dict[str, Setting] = {
    "width": (1, 2**16), "layers": (1, 1000), "mlp_ratio": (0.0, 64.0), "ls_init_value": (-1e3, 1e3), "pool_type": str,
    "final_ln_after_pool": bool, "output_tokens": bool, "act_kwargs": dict, "norm_kwargs": dict, "block_type": str,
    "qk_norm": bool, "scaled_cosine_attn": bool, "scale_heads": bool, "scale_attn_inner": bool, "scale_attn": bool,
    "scale_fc": bool,
}  # fmt: skip
VISION_KEYS: dict[str, Setting] = {
    **_LAYERS, "head_width": (1, 2**16), "patch_size": (1, 2**12), "image_size": (1, 2**12),
    "patch_dropout": (0.0, 1.0), "attentional_pool": bool, "attn_pooler_queries": (1, 2**16),
    "attn_pooler_heads": (1, 2**10), "no_ln_pre": bool, "pos_embed_type": str, "timm_model_name": str,
    "timm_model_pretrained": bool, "timm_pool": str, "timm_proj": str, "timm_proj_bias": bool, "timm_drop": (0.0, 1.0),
    "timm_drop_path": (0.0, 1.0),
}  # fmt: skip
TEXT_KEYS: dict[str, Setting] = {
    **_LAYERS, "context_length": (1, 2**13), "vocab_size": (1, 2**24), "heads": (1, 2**10), "embed_cls": bool,
    "pad_id": (0, 2**24), "eos_id": (0, 2**24), "no_causal_mask": bool, "proj_bias": bool, "proj_type": str,
    "hf_model_name": str, "hf_model_pretrained": bool, "hf_proj_type": str, "hf_pooler_type": str,
    "hf_tokenizer_name": str, "tokenizer_mode": str, "tokenizer_kwargs": dict,
}  # fmt: skip
TOKENIZER_KEYS: dict[str, Setting] = {"clean": str, "strip_sep_token": bool}
IMAGE_KEYS: dict[str, Setting] = {
    "size": (1, 2**12), "mode": str, "mean": (-1e6, 1e6), "std": (-1e6, 1e6), "interpolation": str, "resize_mode": str,
    "fill_color": (0, 255),
}  # fmt: skip
LISTS = ("layers", "patch_size", "image_size", "size", "mean", "std")  # may have a number for each stage or axis
# open_clip takes the first of these; or else the first by name, of safetensors before others.
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip


class Encoder(Protocol):
    """What zero-shot classification, retrieval and probes ask of a model that is not an `HLIPModel`."""

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of the inverse temperature: ()."""
        ...

    @property
    def module(self) -> nn.Module:
        """What holds the weights."""
        ...

    @property
    def device(self) -> torch.device: ...

    def digest(self) -> str:
        """A hash of all that embeddings of studies and texts depend on."""
        ...

    def encode_studies(self, studies: Iterable[Study]) -> Iterator[tuple[str, Tensor]]:
        """Yield each study's uid and its (E) float32 embedding of unit length, on the host, in order."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts: (K, E), of unit length."""
        ...

    def similarities(self, studies: Iterable[Study], texts: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each study's uid and its (K) float32 similarities to embeddings of texts (K, E), on the host."""
        ...


class SliceEncoder:
    """A 2D model of open_clip that sees the slices of a study one by one.

    A slice is a row of a prepared scan's first axis. Its grey values become three equal channels and go through the
    model's own resizing, cropping and normalisation.

    pool "mean": a study's embedding is the mean over the slices of a scan, then over its scans, so that all scans count
        alike. Its similarities to texts are the means of the slices', up to one factor for all texts.
    pool "max": a study's similarity to a text is the largest of its slices'. This cannot be had from one embedding, as
        each text has a slice of its own: `similarities` is for scores. `encode_studies` then gives the largest value of
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
        self.model, self.transform, self.tokenizer = model.eval(), transform, tokenizer
        self.pool, self.slices, self.batch = pool, slices or {}, batch

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale.detach().reshape(())

    @property
    def module(self) -> nn.Module:
        return self.model

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def digest(self) -> str:
        """A hash of weights, image processing, pooling and slices."""
        transform = re.sub(r" at 0x[0-9a-f]+", "", repr(self.transform))  # functions are shown with their addresses
        return weights_digest(self.model, [self.pool, self.slices, transform])

    def to(self, device: torch.device | str) -> SliceEncoder:
        self.model.to(device)
        return self

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
            _write_known(name, Path(place))
            try:
                _check_size(Path(place))
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
        return [each for each in torch.cat(parts).split([len(scan) for scan in scans]) if len(each)]

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

    def encode_studies(self, studies: Iterable[Study]) -> Iterator[tuple[str, Tensor]]:
        """Yield each study's uid and its (E) float32 embedding of unit length, on the host, in order."""
        for study in studies:
            scans = self.encode_slices(study)
            pooled = torch.stack([each.mean(0) for each in scans]).mean(0)
            yield study.uid, F.normalize(torch.cat(scans).amax(0) if self.pool == "max" else pooled, dim=0)

    def similarities(self, studies: Iterable[Study], texts: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each study's uid and its (K) float32 similarities to embeddings of texts (K, E), on the host.

        They are pooled over the slices: with "mean" over those of a scan, then over the scans.
        """
        texts = texts.double().cpu()  # which autocast leaves alone
        for study in studies:
            scans = [each.double() @ texts.T for each in self.encode_slices(study)]
            mean = torch.stack([each.mean(0) for each in scans]).mean(0)
            yield study.uid, (torch.cat(scans).amax(0) if self.pool == "max" else mean).float()

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
        features = self.model.encode_text(self.tokenizer(as_texts(texts)).to(self.device))
        return F.normalize(features.float(), dim=-1)


def _write_known(name: str, place: Path) -> None:
    """Write a folder of the known settings and of links to the weights. open_clip reads that one, since open_clip, timm
    and transformers fetch and import what a configuration or tokenizer names.

    Raises:
        ValueError: no configuration, a key or value that is not known, or a link that leads out; names it.
    """
    folder = Path(name)
    if name.startswith(HUB) or folder.is_dir():
        try:
            folder = local_folder(name.removeprefix(HUB), CONFIG, *TOKENIZER_FILES, weights=True)
        except ValueError as error:
            raise ValueError(f"{name}: has no {CONFIG} that can be had ({error})") from error
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{name}: has no {CONFIG}; expected open_clip's hub format, or {HUB}OWNER/NAME")
    try:
        content = read_json(path)
        model, preprocess = content["model_cfg"], content.get("preprocess_cfg") or {}
        _check_settings(model, MODEL_KEYS)
        vision, text = model["vision_cfg"], model["text_cfg"]
        for settings, allowed in ((vision, VISION_KEYS), (text, TEXT_KEYS), (preprocess, IMAGE_KEYS)):
            _check_settings(settings, allowed)
        _check_settings(text.get("tokenizer_kwargs") or {}, TOKENIZER_KEYS)
        if not re.fullmatch(r"[\w.]*", str(vision.get("timm_model_name") or "")):  # "hf-hub:" and the like fetch it
            raise ValueError(f"timm_model_name is {vision['timm_model_name']!r:.80}, expected a name of timm")
        if tokenizer := text.get("hf_tokenizer_name"):
            read_tokenizer(folder if not name.startswith(HUB) else str(tokenizer)).save_pretrained(place)
        if bert := text.get("hf_model_name"):
            read_bert_config(str(bert)).save_pretrained(place)
            text["hf_model_name"] = str(place)
        (place / CONFIG).write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    except Exception as error:  # damaged files can raise anything
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name}: {CONFIG} is not readable ({why})") from error
    _link_weights(folder, place, vision)


def _link_weights(folder: Path, place: Path, vision: Mapping[str, Any]) -> None:
    """Link the weights that open_clip would load, if there are any, in `place`.

    Raises:
        ValueError: weights that are not readable, lie elsewhere, or are fewer than the positions; names the file.
    """

    def rank(path: Path) -> tuple[int, bool, str]:
        order = OPEN_CLIP_WEIGHTS.index(path.name) if path.name in OPEN_CLIP_WEIGHTS else len(OPEN_CLIP_WEIGHTS)
        return order, path.suffix != ".safetensors", path.name

    paths = sorted((path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth")), key=rank)
    for path in paths[:1]:
        try:
            check_within(path, folder)
            check_safetensors(path) if path.suffix == ".safetensors" else check_tensors(path)
            image, patch = (
                _largest(vision.get(key), usual) for key, usual in (("image_size", 224), ("patch_size", 16))
            )
            positions = 0 if vision.get("timm_model_name") else (image // patch) ** 2
            if (size := path.stat().st_size) < positions * (vision.get("width") or 1):  # NumPy would allocate some
                raise ValueError(f"{size} bytes, where the configuration asks for {positions} positions")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not readable weights ({error})") from error
        (place / path.name).symlink_to(path.resolve())


def _largest(value: Any, usual: int) -> int:
    return max(value) if isinstance(value, list) else value or usual


def _check_size(place: Path) -> None:
    """Raises ValueError where a folder's configuration asks for more numbers than its weights have bytes: open_clip
    allocates a model before it looks at the weights. Here nothing is allocated."""
    from open_clip import create_model

    with torch.device("meta"):
        planned = create_model(f"local-dir:{place}", device="meta", load_weights=False, pretrained_hf=False)
    asked = sum(value.numel() for value in planned.state_dict().values())
    weights = [path for path in place.iterdir() if path.is_symlink()]
    if weights and asked > (size := weights[0].stat().st_size):
        raise ValueError(f"the configuration asks for {asked} numbers, the weights have {size} bytes")


def _check_settings(content: Any, allowed: Mapping[str, Setting]) -> None:
    """Raises ValueError for a key that is not known, or a value of another type or out of bounds; names the key."""
    if not isinstance(content, dict):
        raise ValueError(f"expected settings by name, got {content!r:.80}")
    for key, value in content.items():
        if key not in allowed:
            raise ValueError(f"{key:.80} is not a setting that is read; there are {', '.join(allowed)}")
        setting = allowed[key]
        if value is None:
            continue
        if isinstance(setting, tuple):
            values = value if key in LISTS and isinstance(value, list) and 0 < len(value) <= 4 else [value]
            for number in values:
                check_number(key, number, *setting)
        elif type(value) is not setting:
            raise ValueError(f"{key} is {value!r:.80}, expected {setting.__name__}")
        elif (
            isinstance(value, dict)
            and key in ("act_kwargs", "norm_kwargs")
            and any(isinstance(inner, (dict, list)) for inner in dict(value).values())
        ):
            raise ValueError(f"{key} is {value!r:.80}, expected plain values")


def read_slices(path: Path | str) -> dict[str, dict[str, list[int]]]:
    """Read which slices to see: a JSON object of studies, each an object of scans by name, each a list of indices.

    Raises:
        ValueError: not such a file, or a study without a slice; names it.
    """
    try:
        content = read_json(Path(path))
        for uid, scans in content.items():
            if not any(scans.values()):
                raise ValueError(f"study {uid} has no slice")
            for name, rows in scans.items():
                if not isinstance(rows, list) or any(type(row) is not int or row < 0 for row in rows):
                    raise ValueError(f"study {uid}, scan {name}: expected a list of indices from 0")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a readable list of slices ({error})") from error
    return content

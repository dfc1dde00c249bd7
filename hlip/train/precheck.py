"""Whether a run can learn: an error where it cannot, a warning with counts where it can but poorly.

All is said before the first step. Manifests are read whole; scans and texts are looked at in samples, and messages say
how many that were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..model.clip import HLIPModel
from ..model.config import VisionConfig
from ..model.text import TextTower
from ..prepare.recipe import Recipe
from ..store.store import Store
from ..study import join_report
from .config import DEFAULTS, TrainConfig

TEXTS = 512  # that are tokenised
SCANS = 64  # that are read
MANY = 0.05  # the share from which on something is worth a line
UNREADABLE = 0.9  # the share of unknown words that leaves nothing to learn from


def check_data(config: TrainConfig, store: Store, steps: int) -> list[str]:
    """Look at what settings and stores tell, before any model is read. Returns warnings.

    Raises:
        ValueError: nothing can be learnt; says why, and what to do.
    """
    if config.batch_size == 1:
        raise ValueError(
            "batch_size 1: a study is told from the others of its batch, and alone its loss is 0 whatever the model "
            "does. Give 2 or more (--micro_tokens saves memory)"
        )
    return [*_reports(config, store), *_images(store), *_leaks(config, store), *_warmup(config, steps)]


def check_texts(config: TrainConfig, store: Store, model: HLIPModel) -> list[str]:
    """Look at what the model would read. Returns warnings.

    Raises:
        ValueError: its texts are alike, or unknown words; says why, and what to do.
    """
    return [*_without_effect(config, model), *_patches(model.config.vision, store), *_tokens(config, store, model)]


def take_recipe(model: HLIPModel, store: Store) -> list[str]:
    """Let the model keep the recipe by which the scans that it learns from were prepared, and say where that is another
    than its own."""
    own = model.config.recipe
    unlike, kept = own.unlike(store.info["recipe"]) if own else [], "takes the store's"
    if own and unlike:
        try:
            recipe = Recipe.from_dict({**store.info["recipe"], "rules": own.to_dict()["rules"]})
            model.config = replace(model.config, recipe=recipe)
        except ValueError:
            kept = "keeps its own"
    return [f"{store.path}: its {words} as the model has it; the model {kept}" for words in unlike]


def _warmup(config: TrainConfig, steps: int) -> Iterator[str]:
    if 0 < steps <= config.warmup:
        yield (
            f"warmup {config.warmup}: the run ends within it, after {steps} steps, at {steps / config.warmup:.0%} of "
            "the peak learning rate. Lower --warmup"
        )


def _sections(store: Store) -> list[tuple[str, str]]:
    """Impression and findings of every study."""
    return list(zip(*(store.manifest.column(name).to_pylist() for name in ("impression", "findings")), strict=True))


def _single(text: str) -> str:
    """The text with white space made single, which no text tower reads."""
    return " ".join(text.split())


def _reports(config: TrainConfig, store: Store) -> Iterator[str]:
    total = len(store)
    counts = Counter(_single(join_report(*sections)) for sections in _sections(store))
    present = total - counts[""]
    distinct = len(counts) - ("" in counts)
    if present < 2:
        raise ValueError(
            f"{store.path}: {present or 'none'} of its {total} studies has a report, so there is nothing to compare "
            "studies with. Give reports: hlip prepare --reports FILE"
        )
    if distinct == 1:
        raise ValueError(
            f"{store.path}: its {present} reports are all equal, so no study can be told from another. Look at what "
            "hlip prepare --reports was given"
        )
    if present < total:
        yield (
            f"{store.path}: {total - present} of {total} studies have no report and are paired with an empty text. "
            "hlip store split --list leaves them out"
        )
    same = sum(count * (count - 1) for count in counts.values()) / (total * (total - 1))
    if same >= MANY or distinct <= present / 2:
        yield (
            f"{store.path}: {distinct} of {present} reports are different. Of the {config.batch_size - 1} studies that "
            f"a study is told from in a batch, {same * (config.batch_size - 1):.1f} on average have the same text, and "
            "count as wrong all the same"
        )
    if config.texts in ("item", "items") and not any("\n" in text for texts in _sections(store) for text in texts):
        yield (
            f"{store.path}: no report has paragraphs or a list, so texts '{config.texts}' takes sentences. If reports "
            "are lists of texts, hlip prepare --sections FILE.yaml with `entries: paragraphs` keeps them apart"
        )


def _images(store: Store) -> Iterator[str]:
    total = len(store)
    distinct = len({checksum for checksum, _ in _checksums(store)})
    if distinct == 1 < total:
        raise ValueError(f"{store.path}: all {total} studies hold the same scans, so none can be told from another")
    if distinct <= (1 - MANY) * total:
        yield f"{store.path}: {total - distinct} of {total} studies hold the same scans as another study"
    rows = np.unique(np.linspace(0, len(store.shapes) - 1, SCANS).astype(np.int64))
    blank = 0
    for row in rows.tolist():
        study = int(np.searchsorted(store.first, row, "right")) - 1
        scan = store.scan(study, row - int(store.first[study]))
        blank += bool((scan == scan.flatten()[0]).all())
    if blank == len(rows):
        raise ValueError(
            f"{store.path}: {blank} of {len(rows)} scans looked at hold one value only, so there is nothing to see. "
            "Look at the recipe's window, and at the files"
        )
    if blank >= MANY * len(rows):
        yield f"{store.path}: {blank} of {len(rows)} scans looked at hold one value only"


def _checksums(store: Store) -> list[tuple[bytes, bytes]]:
    """The checksums and the shapes of the scans of every study."""
    checksums = store.manifest.column("crc32").values.to_numpy()
    bounds = zip(store.first[:-1].tolist(), store.first[1:].tolist(), strict=True)
    return [(checksums[a:b].tobytes(), store.shapes[a:b].tobytes()) for a, b in bounds]


def _leaks(config: TrainConfig, store: Store) -> Iterator[str]:
    """Studies to evaluate on that are trained on, too: by their ids, or under other ids by their scans."""
    if config.val is None:
        return
    val = Store(config.val)
    uids, trained = set(store.uids.tolist()), {key: i for i, key in enumerate(_checksums(store))}
    leaked = doubtful = 0
    for j, (uid, key) in enumerate(zip(val.uids.tolist(), _checksums(val), strict=True)):
        if uid in uids:
            leaked += 1
        elif key in trained:  # checksums of other scans may be equal: the first are compared whole
            doubtful += 1
            leaked += doubtful > SCANS or torch.equal(val.scan(j, 0), store.scan(trained[key], 0))
    if leaked:
        yield (
            f"{config.val}: {leaked} of its {len(val)} studies are trained on, too, so its AUC is not that of unseen "
            f"studies. hlip store split {store.path} makes parts that are apart"
        )


def _without_effect(config: TrainConfig, model: HLIPModel) -> Iterator[str]:
    """Settings that this model has no use for."""
    for name in () if model.config.text.locked else ("train_norms", "locked_dropout", "unlocked_layers"):
        if getattr(config, name):
            yield f"{name} {getattr(config, name)} changes nothing: the text tower is not locked. Give --lock_text true"
    for name in () if model.objective.pairs > 1 else ("findings", "findings_prefix"):
        if getattr(config, name) != DEFAULTS[name]:
            yield f"{name} {getattr(config, name)!r} changes nothing: objective {model.config.objective} has one text"


def _patches(vision: VisionConfig, store: Store) -> Iterator[str]:
    grids = store.shapes // np.array(vision.patch_size)
    level = vision.levels[0]
    sizes = grids[:, 1:].prod(1) if level == "slice" else grids.prod(1)
    if level == "study":
        sizes = np.add.reduceat(sizes, store.first[:-1])
    most = int(sizes.max())
    if int(most * (1 - vision.patch_dropout)) <= 1 < most:
        rate = f"{vision.patch_dropout:g}"
        yield f"patch_dropout {rate} leaves 1 of the {most} patches of a {level}. Lower --patch_dropout"


def _tokens(config: TrainConfig, store: Store, model: HLIPModel) -> Iterator[str]:
    """Draw texts as steps do, and look at what the text tower reads of them."""
    objective = model.objective
    reports = [sections for sections in dict.fromkeys(_sections(store)) if join_report(*sections).strip()]
    apart = objective.pairs > 1 and config.findings == "findings"
    for name, column in zip(("impression", "findings"), zip(*reports, strict=True), strict=True) if apart else ():
        if (lacking := sum(not text.strip() for text in column)) >= MANY * len(reports):
            yield (
                f"{store.path}: {lacking} of {len(reports)} different reports have no {name}, so that both embeddings "
                "of such a study are compared with the same text"
            )
    random = np.random.default_rng(0)
    chosen = [reports[i] for i in random.permutation(len(reports))[:TEXTS]]
    if config.texts != "report":  # another text at every draw
        chosen *= -(-TEXTS // len(chosen))
    drawn = [objective.draw_text(report, config.wording, random) for report in chosen]
    impressions, findings = zip(*drawn, strict=True)
    texts = objective.texts(impressions, findings, config.wording)
    for i, side in enumerate(objective.sides):
        seen = texts[i * len(drawn) : (i + 1) * len(drawn)]
        yield from _read(f"{store.path}: {len(seen)} {side} looked at:", seen, model.text)


def _read(name: str, texts: Sequence[str], tower: TextTower) -> Iterator[str]:
    """Warnings on what the text tower makes of texts. Raises ValueError where that is nothing to learn from."""
    tokens = tower._tokens(texts)
    ids, mask, unknown = tokens["input_ids"], tokens["attention_mask"].bool(), tower.tokenizer.unk_token_id
    rows = {tuple(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)}
    before, after, context = len(set(map(_single, texts))), len(rows), tower.config.context_length
    if after == 1:
        raise ValueError(
            f"{name} their first {context} tokens are all equal, so no study can be told from another. Leave out what "
            "all reports begin with (hlip prepare --sections), or --texts sentence"
        )
    words = mask & ~torch.isin(ids, torch.tensor([i for i in tower.tokenizer.all_special_ids if i != unknown]))
    share = float((ids[words] == unknown).float().mean()) if unknown is not None and words.any() else 0.0
    what = f"{name} {share:.0%} of their tokens are unknown to the tokenizer of {tower.tokenizer_source}"
    if share >= UNREADABLE:
        raise ValueError(f"{what}, which leaves nothing to learn from. Give the BERT of their language: --text")
    if share >= MANY:
        yield f"{what}. Is --text the BERT of their language?"
    if before - after >= MANY * before:
        yield f"{name} {before} are different, and {after} in their first {context} tokens"

"""The plan of a store: which studies each of its shards is to hold, and on which terms."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..output import replacing
from ..read.paths import check_text
from ..read.scan import Rejection, ScanSource
from ..store.format import FORMAT, FOUND, differing, read_json, read_shard, shard_files, write_rejections
from ..store.tools import cut
from ..study import StudyRecord
from .discover import Found
from .recipe import Recipe


def hash_ids(found: Found, salt: str) -> Found:
    """The same studies under other names, for a store that names nobody.

    A study's uid becomes the first 32 digits of HMAC-SHA-256(salt, uid); of what was rejected only study and rule
    stay. Names and descriptions of scans are needed to judge them, and are dropped by `prepare_study`. Reports are kept
    as they are.

    Raises:
        ValueError: an empty salt.
    """
    if not salt.strip():
        raise ValueError("the salt of hashed ids must not be empty: whoever guesses it can try out ids")
    studies = [replace(study, uid=hashed(study.uid, salt)) for study in found.studies]
    return Found(studies, [Rejection(hashed(r.study, salt), "", r.rule, "") for r in found.rejected])


def hashed(uid: str, salt: str) -> str:
    return hmac.new(salt.strip().encode(), uid.encode("utf-8", "surrogateescape"), "sha256").hexdigest()[:32]


def encodable(text: str) -> str:
    """The text with bytes that are no UTF-8 (of file names, say) written as \\udcXX."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def in_order(found: Found) -> Found:
    """Studies by uid, scans by name, all text encodable."""
    if not found.studies:
        first = "".join(f", such as {r.study or r.scan}: {r.reason}" for r in found.rejected[:1])
        raise ValueError(f"no study was found ({len(found.rejected)} rejected{first})")
    studies = []
    for study in found.studies:
        scans = [
            replace(scan, name=encodable(scan.name), description=encodable(scan.description)) for scan in study.scans
        ]
        uid, impression, findings = map(encodable, (study.uid, study.impression, study.findings))
        in_order = tuple(sorted(scans, key=lambda scan: scan.name))
        studies.append(replace(study, uid=uid, impression=impression, findings=findings, scans=in_order))
    studies.sort(key=lambda study: study.uid)
    if twice := [study.uid for study, following in pairwise(studies) if study.uid == following.uid]:
        raise ValueError(f"two studies are named {twice[0]}")
    rejected = sorted(
        (Rejection(*map(encodable, (r.study, r.scan, r.rule, r.reason))) for r in found.rejected), key=astuple
    )
    return Found(studies, rejected)


def hash_sources(found: Found) -> str:
    """A hash of what is to be prepared: names, texts, labels, files by name below their common folder, and the size
    of each scan's first file. The same copied to another place has the same hash."""
    folders = {str(file.parent.absolute()) for study in found.studies for scan in study.scans for file in scan.files}
    root = os.path.commonpath(folders) if folders else ""
    digest = hashlib.sha256()
    for study in found.studies:
        for scan in study.scans:
            files = [os.path.relpath(file, root) for file in scan.files]
            facts = [scan.name, scan.kind, scan.modality, scan.description, files, _size(scan.files[0])]
            digest.update(json.dumps(facts).encode() + b"\n")
        facts = [study.uid, study.impression, study.findings, list(study.labels.items())]
        digest.update(json.dumps(facts).encode() + b"\n\n")
    for rejection in found.rejected:
        digest.update(json.dumps(asdict(rejection)).encode() + b"\n")
    return digest.hexdigest()[:32]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


@dataclass(frozen=True)
class Plan:
    """Which studies each shard holds.

    out: the store.
    shards: per shard its studies, its scans as found, and where its line begins in `work/sources.jsonl`.
    hidden: nothing is kept that may name somebody.
    """

    out: Path
    shards: tuple[tuple[int, int, int], ...]
    hidden: bool

    @classmethod
    def of(cls, found: Found, terms: Mapping[str, Any], out: Path) -> Plan:
        """Make the plan of this store and write it, also over that of an earlier run: the same files may lie elsewhere
        today.

        Raises:
            ValueError: there is one on other terms; says which.
        """
        work = out / "work"
        file = work / "plan.json"
        if begun := os.path.lexists(file):
            there = read_json(file, out, None)["terms"]  # the file has a line for each shard
            if "recipe" not in there:  # of an older version
                for _, shard in shard_files(out)[:1]:
                    there["recipe"] = read_shard(shard).recipe
            compare_terms(out, there, terms)
        shards, offset = [], 0
        with replacing(work / "sources.jsonl", work) as temporary, temporary.open("wb") as lines:
            for studies in cut(found.studies, lambda study: max(1, len(study.scans)), terms["shard_scans"]):
                shards.append((len(studies), sum(len(study.scans) for study in studies), offset))
                offset += lines.write(json.dumps([_to_json(study) for study in studies]).encode() + b"\n")
        if not begun:
            write_rejections(out / "shards" / FOUND, found.rejected, work)
        with replacing(file, work) as temporary:
            temporary.write_text(json.dumps({"terms": terms, "shards": shards}), encoding="utf-8")
        return cls(out.absolute(), tuple(shards), bool(terms["hidden_ids"]))

    def studies(self, k: int) -> list[StudyRecord[ScanSource]]:
        """The studies of shard `k`."""
        path = self.out / "work" / "sources.jsonl"
        check_text(path)
        with path.open("rb") as lines:
            lines.seek(self.shards[k][2])
            return [_from_json(study) for study in json.loads(lines.readline())]


def _to_json(study: StudyRecord[ScanSource]) -> dict[str, Any]:
    scans = [{**vars(scan), "files": [str(file.absolute()) for file in scan.files]} for scan in study.scans]
    texts = {name: getattr(study, name) for name in ("uid", "impression", "findings")}
    return {**texts, "scans": scans, "labels": list(study.labels.items())}


def _from_json(content: dict[str, Any]) -> StudyRecord[ScanSource]:
    scans = [ScanSource(**{**scan, "files": tuple(map(Path, scan["files"]))}) for scan in content["scans"]]
    return StudyRecord(**{**content, "scans": scans, "labels": dict(content["labels"])})


def terms_of(found: Found, recipe: Recipe, shard_scans: int, salt: str | None) -> dict[str, Any]:
    """What must not change while a store is made."""
    return {
        "format": FORMAT,
        **({"recipe": recipe.spelt_out()} if isinstance(recipe, Recipe) else {}),
        "recipe_hash": recipe.hash,
        "source_hash": hash_sources(found),
        "shard_scans": shard_scans,
        "hidden_ids": salt is not None and hashed("", salt)[:8],
    }


def compare_terms(out: Path, there: Mapping[str, Any], terms: Mapping[str, Any]) -> None:
    """Raises ValueError where a store was begun on other terms; names the field."""
    words = {
        "format": "in another format",
        "recipe": "with another recipe",
        "recipe_hash": "with another recipe",
        "hidden_ids": "with ids hidden otherwise",
        "source_hash": "from other studies, reports or labels",
        "shard_scans": "with another shard_scans",
    }
    if "recipe" in there and "recipe" in terms:
        with contextlib.suppress(ValueError):  # what is no recipe differs as it is
            there = {**there, "recipe": Recipe.from_dict(there["recipe"]).spelt_out()}
    else:  # a recipe of the caller's own kind tells by its hash alone
        del words["recipe"]
    for key, how in words.items():
        for name, value, now in differing(there, terms, (key,)):
            what = f"{name} " if "." in name else ""
            raise ValueError(f"{out}: was begun {how} ({what}{value}, now {now}): choose another folder")

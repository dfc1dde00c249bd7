"""Relevance as pictures. The page is also opened in a real browser, where there is one."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import hlip
from conftest import random_study
from hlip.explain.maps import as_arrays, best_slice, file_names, montage, order_of, paint, write_overlays
from hlip.explain.page import page
from hlip.explain.relevance import Relevance
from hlip.output import label
from hlip.prepare.recipe import Recipe
from hlip.prepare.studies import load_study_on_grids

EVIL = "</script><script>alert(1)</script>\"'&$x$"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


@pytest.fixture
def study() -> hlip.Study:
    return hlip.Study("p<1>", random_study([(8, 16, 16), (12, 16, 24), (4, 8, 8)]), ["one", EVIL, "three"])


@pytest.fixture
def found(study: hlip.Study) -> Relevance:
    maps = [torch.zeros(2, 2, 2), torch.zeros(3, 2, 3), torch.full((1, 1, 1), 0.25)]
    maps[1][2, 1, 0] = 2.0
    maps[1][0, 0, 2] = 1.0
    return Relevance(study.uid, study.names, maps, 0.5)


def test_order_and_slices(found: Relevance) -> None:
    assert order_of(found) == [1, 2, 0]
    assert [best_slice(found.maps[1], depth) for depth in (3, 12, 6)] == [2, 10, 5]
    np.testing.assert_allclose(paint(np.array([0.0, 1.0])), [[1, 0, 0, 0], [1, 1, 0, 1]])


def test_montage(study: hlip.Study, found: Relevance, tmp_path: Path) -> None:
    pictures = []
    for max_scans in (12, 2):
        file = io.BytesIO()
        montage(study, found, file, "glioma $1", max_scans=max_scans)
        pictures.append(matplotlib.image.imread(io.BytesIO(file.getvalue()), format="png"))
    assert pictures[0].shape[0] > 1.3 * pictures[1].shape[0]  # a row less
    colour = np.ptp(pictures[0][..., :3], axis=-1) > 0.3
    rows = np.flatnonzero(colour.any(1)) / len(colour)
    assert (
        colour.sum() > 100 and rows.min() < 0.4 and rows.max() < 0.75
    )  # the first two scans have relevance, not the last
    nothing = replace(found, maps=[torch.zeros_like(each) for each in found.maps])
    file = io.BytesIO()
    montage(study, nothing, file)
    assert not (
        np.ptp(matplotlib.image.imread(io.BytesIO(file.getvalue()), format="png")[..., :3], axis=-1) > 0.1
    ).any()


def test_names_of_files() -> None:
    given = ["a b.nii.gz", "A_b.nii", "ct.nii.gz:bone", "../up", "", "x" * 300, "a_b~2", "ser.pt", "läsion.hdr"]
    names = file_names(given)
    assert names[:3] == ["a_b", "A_b~2", "ct_bone"]
    assert names[3] == "up" and names[4] == "scan" and len(names[5]) == 100
    assert names[6] == "a_b~2~2" and names[7:] == ["ser", "läsion"]
    assert len({name.lower() for name in names}) == len(names)


def test_overlays_lie_on_their_files(nifti_study: list[Path], tmp_path: Path) -> None:
    recipe = Recipe(size=(8, 18, 18), crop=(16, 16))
    study, grids = load_study_on_grids(nifti_study, recipe)
    maps = [torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(m)) for m in range(3)]
    found = Relevance("s", study.names, maps, 0.0)
    grids[1] = replace(grids[1], prepared=True)
    names = write_overlays(found, grids, recipe, tmp_path)
    assert names == ["scan_0.nii.gz", None, "scan_2.nii.gz"]
    for m in (0, 2):
        overlay, source = nibabel.load(tmp_path / str(names[m])), nibabel.load(nifti_study[m])
        assert overlay.shape == source.shape and overlay.get_data_dtype() == np.float32
        np.testing.assert_allclose(overlay.affine, source.affine, atol=1e-5)
        assert int(overlay.header["sform_code"]) == 1 and int(overlay.header["qform_code"]) == 0
        np.testing.assert_array_equal(overlay.get_fdata(dtype=np.float32), recipe.on_source(grids[m], maps[m].numpy()))


def test_arrays(found: Relevance) -> None:
    arrays = as_arrays(found)
    assert list(arrays) == ["names", "shares", "map_000", "map_001", "map_002"]
    np.testing.assert_array_equal(arrays["map_001"], found.maps[1].numpy())


class Page(HTMLParser):
    """What a page holds: tags with their attributes, and the text within each kind of tag."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


def make_page(study: hlip.Study, found: Relevance) -> str:
    return page(
        study, found, EVIL, {"Model": EVIL, "Layers": "{{data}}"}, {EVIL: (0.25, -0.125), "normal": (0.75, 0.5)}
    )


def test_page_is_whole_and_keeps_to_itself(study: hlip.Study, found: Relevance) -> None:
    content = make_page(study, found)
    parsed = Page(content)
    assert parsed.open == []
    assert not re.search(
        r"https?:|//\w|@import|url\(", re.sub(r'<script type="application/json".*?</script>', "", content)
    )
    assert [tag for tag, _ in parsed.tags].count("script") == 2  # none of those in names
    assert parsed.text["h1"] == parsed.text["title"] == [EVIL]
    assert parsed.text["b"] == [EVIL, "three", "one"] and parsed.text["dd"] == [EVIL, "{{data}}"]
    assert parsed.text["th"] == ["normal", EVIL]
    assert [attrs["value"] for tag, attrs in parsed.tags if tag == "meter"] == ["0.7500", "0.2500"]
    sliders = [attrs for tag, attrs in parsed.tags if tag == "input" and attrs.get("id") != "opacity"]
    assert [(each["max"], each["value"]) for each in sliders] == [("12", "11"), ("4", "3"), ("8", "3")]
    data = json.loads(parsed.text["script"][0])
    for m, entry in zip((1, 2, 0), data, strict=True):
        assert entry["shape"] == list(study.scans[m].shape) and entry["grid"] == list(found.maps[m].shape)
        levels = np.frombuffer(base64.b64decode(entry["relevance"]), np.uint8).reshape(entry["grid"])
        np.testing.assert_array_equal(levels, np.round(found.maps[m].numpy() / 2 * 255))
        images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in entry["slices"]]
        assert np.abs(np.stack(images).astype(int) - study.scans[m].numpy()).mean() < 20


# Moves the second scan's slider and the opacity, and leaves what is then seen in the page's title.
PROBE = """
<script>
const figure = document.querySelectorAll("figure")[0], canvas = figure.querySelector("canvas");
const slider = figure.querySelector("input"), image = figure.querySelector("img"), seen = {};
const look = name => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  seen[name] = {slice: figure.querySelector("output").textContent, src: image.src.length,
    size: [canvas.width, canvas.height], pixels: [...pixels].filter((_, i) => i % 4 == 3),
    green: [...pixels].filter((_, i) => i % 4 == 1), opacity: canvas.style.opacity};
};
look("first");
const first = image.src;
slider.value = 1;
slider.dispatchEvent(new Event("input"));
document.getElementById("opacity").value = 0.2;
document.getElementById("opacity").dispatchEvent(new Event("input"));
look("moved");
seen.changed = image.src != first;
image.decode().then(() => {
  seen.natural = [image.naturalWidth, image.naturalHeight];
  seen.shown = canvas.getBoundingClientRect().width == image.getBoundingClientRect().width;
  document.body.textContent = "SEEN" + JSON.stringify(seen) + "END";
});
</script>
"""


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, [os.environ.get("BROWSER_FOR_TESTS", ""), *BROWSERS])), None)


@pytest.mark.skipif(not find_browser(), reason=f"no browser; install chromium ({', '.join(BROWSERS)} on PATH)")
def test_page_in_a_browser(study: hlip.Study, found: Relevance, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(make_page(study, found).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    result = subprocess.run(
        [*map(str, command), "--virtual-time-budget=5000", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    match = re.search("SEEN(.*)END", result.stdout)
    assert match, (result.stdout[-2000:], result.stderr[-2000:])
    seen = json.loads(match[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert seen["first"]["slice"] == "11 of 12" and seen["moved"]["slice"] == "1 of 12"
    assert seen["changed"] and seen["natural"] == [24, 16] and seen["shown"]
    assert float(seen["first"]["opacity"]) == 0.6 and float(seen["moved"]["opacity"]) == 0.2
    # The same interpolation as PyTorch's, of relevance in 255 steps.
    levels = (found.maps[1] / 2 * 255).round() / 255
    whole = torch.nn.functional.interpolate(levels[None, None], (12, 16, 24), mode="trilinear")[0, 0].numpy()
    for name, z in (("first", 10), ("moved", 0)):
        assert seen[name]["size"] == [24, 16]
        expected = paint(whole[z])
        alpha = np.reshape(seen[name]["pixels"], (16, 24))
        np.testing.assert_allclose(alpha, expected[..., 3] * 255, atol=1.0)
        clear = alpha > 100  # a canvas keeps colours multiplied by their alpha
        np.testing.assert_allclose(np.reshape(seen[name]["green"], (16, 24))[clear], expected[clear, 1] * 255, atol=3.0)
        assert clear.any()


def test_letters_that_the_font_has_not_are_escaped() -> None:
    assert label("Größe $x$ Мозг 研究") == r"Größe \$x\$ Мозг \u7814\u7a76"

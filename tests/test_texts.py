from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hlip import HLIPModel
from hlip.embed.texts import embed_prompts, embed_texts


def test_texts_are_embedded_once_and_in_order(tiny_model: HLIPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = tiny_model.encode_text
    monkeypatch.setattr(tiny_model, "encode_text", lambda texts: (seen.extend(texts), encode(texts))[1])
    texts = ["mass", "a longer report of a mass", "mass", "stroke"]
    found = embed_texts(tiny_model, texts, batch=2)
    assert sorted(seen) == sorted(set(texts))
    assert torch.equal(found[0], found[2])
    for text, row in zip(texts, found, strict=True):
        torch.testing.assert_close(row, encode([text])[0], rtol=1e-4, atol=1e-5)


def test_a_prompt_is_the_normalised_mean_over_its_sentences(tiny_model: HLIPModel) -> None:
    found = embed_prompts(tiny_model, [["a mass", "a tumor", "glioma"], ["normal"]])
    with torch.no_grad():
        rows = [tiny_model.encode_text([text])[0] for text in ("a mass", "a tumor", "glioma", "normal")]
    torch.testing.assert_close(found[0], F.normalize(sum(rows[:3]), dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], rows[3], rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


def test_a_prompt_that_is_too_long_is_named(tiny_model: HLIPModel) -> None:
    fits = "word " * (tiny_model.config.text.context_length - 2)  # beside the first and the last token
    embed_prompts(tiny_model, [[fits], ["x"]])
    with pytest.raises(ValueError, match=r"prompt 'word word .*' has 33 tokens, the model's text tower reads 32"):
        embed_prompts(tiny_model, [["x"], [fits + "word"]])


def test_one_text_is_not_its_letters(tiny_model: HLIPModel) -> None:
    with torch.no_grad():
        expected = tiny_model.encode_text(["glioma"])
        assert torch.equal(tiny_model.encode_text("glioma"), expected)
        assert tiny_model.text.features("glioma").shape[0] == 1
    assert torch.equal(embed_texts(tiny_model, "glioma"), expected)
    torch.testing.assert_close(embed_prompts(tiny_model, "glioma"), expected)
    torch.testing.assert_close(embed_prompts(tiny_model, ["glioma", ["normal"]])[:1], expected)
    with pytest.raises(ValueError, match="prompt 'word word"):
        embed_prompts(tiny_model, ["word " * 40, "x"])


@pytest.mark.parametrize(
    "texts", [None, b"glioma", 3, [], ["a", float("nan")], ["a", None], [b"a"], [["a"]], {"a": "glioma"}, {"a", "b"}]
)
def test_what_is_no_text_is_refused(texts: Any, tiny_model: HLIPModel) -> None:
    for read in (tiny_model.encode_text, lambda given: embed_texts(tiny_model, given)):
        with pytest.raises(ValueError, match="texts: expected a text"):
            read(texts)

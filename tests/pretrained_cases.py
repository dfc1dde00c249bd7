"""Small pretrained models in folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from released_files import State


@pytest.fixture
def cxr_folder(tmp_path: Path, bert_folder: str) -> tuple[Path, State]:
    """CXR-BERT as it lies on the hub: a class in code, heads beside the BERT, a tokenizer of a class in code."""
    folder = tmp_path / "cxr"
    folder.mkdir()
    sizes = {"vocab_size": 30522, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 512, "layer_norm_eps": 1e-5, "projection_size": 8}
    code = {"AutoConfig": "configuration_cxrbert.CXRBertConfig", "AutoModel": "modeling_cxrbert.CXRBertModel"}
    config = {"model_type": "cxr-bert", "architectures": ["CXRBertModel"], "auto_map": code, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    for module in ("configuration_cxrbert", "modeling_cxrbert"):
        (folder / f"{module}.py").write_text("raise RuntimeError('code of a checkpoint was run')")
    shutil.copy(Path(bert_folder) / "vocab.txt", folder)
    tokenizer = {"AutoTokenizer": ["configuration_cxrbert.CXRBertTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CXRBertTokenizer", "do_lower_case": True, "auto_map": tokenizer})
    )
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    bert = BertModel(BertConfig(**{k: v for k, v in sizes.items() if k != "projection_size"})).state_dict()
    state = {f"bert.{key}": value for key, value in bert.items()}
    state["bert.embeddings.position_ids"] = torch.arange(512)[None]
    state["cls.predictions.bias"] = torch.zeros(30522)
    state["cls_projection_head.dense_to_hidden.weight"] = torch.zeros(8, 16)
    torch.save(state, folder / "pytorch_model.bin")
    return folder, bert

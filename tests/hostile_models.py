"""Model folders that ask libraries for more than weights, and a job that reads them under the eyes of the interpreter.

Run as a program with an empty folder, it makes small models, reads each with every hostile file in every way there is,
and prints what was asked of the network, of the import system and of other programs, as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

KERNEL, CODE = "owner/kernel", "owner/code--modeling.Evil"
EVIL = "raise SystemExit('code of a checkpoint was run')"
TEMPLATE = "{{ cycler.__init__.__globals__.os.system('touch executed') }}"


def key(file: str, name: str, value: object) -> dict[str, Any]:
    return {file: {name: value}}


# Of each case, files with what is put into their JSON object, or with their whole text.
CASES: dict[str, dict[str, Any]] = {
    **{f"{name} {value}": key("config.json", name, value) for name, value in [
        ("_attn_implementation", KERNEL), ("attn_implementation", KERNEL), ("attn_implementation", {"": KERNEL}),
        ("_attn_implementation_internal", KERNEL), ("attn_implementation_internal", KERNEL),
        ("_attn_implementation", f"paged|{KERNEL}"), ("_attn_implementation", f"{KERNEL}@main:forward"),
        ("attn_implementation", "flash_attention_2"), ("_attn_implementation", "flash_attention_3"),
        ("_attn_implementation", "kernels-community/flash-attn"), ("experts_implementation", KERNEL),
        ("_experts_implementation", KERNEL), ("use_kernels", True), ("kernel_config", {"RMSNorm": KERNEL}),
        ("auto_map", {"AutoConfig": CODE, "AutoModel": CODE, "AutoTokenizer": [CODE, CODE]}),
        ("auto_map", {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}), ("trust_remote_code", True),
        ("_name_or_path", "owner/other"), ("name_or_path", "owner/other"), ("architectures", ["evil.Evil"]),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("compression_config", {"quant_method": "compressed-tensors"}), ("torch_dtype", "float16"),
        ("dtype", "evil.float16"), ("transformers_weights", "../evil.safetensors"), ("tokenizer_class", CODE),
        ("custom_pipelines", {"text": {"impl": CODE}}), ("gguf_file", "evil.gguf"), ("transformers_version", "0"),
        ("base_model_name_or_path", "owner/other"), ("adapter_config", {"peft_type": "LORA"}), ("tp_plan", "auto"),
        ("text_config", {"_attn_implementation": KERNEL}), ("output_attentions", True),
        ("pruned_heads", {"0": [0]}), ("problem_type", "evil"), ("is_encoder_decoder", True),
    ]},
    **{f"tokenizer {name} {value}": key("tokenizer_config.json", name, value) for name, value in [
        ("auto_map", {"AutoTokenizer": [CODE, CODE]}), ("auto_map", [CODE, CODE]),
        ("auto_map", {"AutoTokenizer": ["evil.Evil", None]}), ("tokenizer_class", CODE),
        ("tokenizer_class", "evil.Evil"), ("tokenizer_class", "MistralCommonBackend"),
        ("tokenizer_class", "LlamaTokenizer"), ("fix_mistral_regex", True), ("chat_template", TEMPLATE),
        ("name_or_path", "owner/other"), ("is_local", False), ("backend", "evil"), ("gguf_file", "evil.gguf"),
        ("tokenizer_file", "../evil.json"), ("vocab_file", "../evil.model"), ("processor_class", "evil.Evil"),
        ("trust_remote_code", True), ("init_inputs", ["owner/other"]), ("mistral_format", True),
        ("special_tokens_map_file", "../evil.json"), ("fast_tokenizer_files", ["tokenizer.5.0.0.json"]),
        ("slow_tokenizer_class", "evil.Evil"), ("from_slow", True), ("tokenizer_object", "evil.Evil"),
    ]},
    "special tokens": key("special_tokens_map.json", "extra_special_tokens", {"evil_token": "evil"}),
    "adapter": {"adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "owner/other",
                "auto_mapping": {"parent_library": "evil", "base_model_class": "Evil"}}},
    "generation": {"generation_config.json": {"custom_generate": "owner/code"}, "custom_generate/generate.py": EVIL},
    "chat templates": {"chat_template.jinja": TEMPLATE, "additional_chat_templates/a.jinja": TEMPLATE},
    "processors": {name: {"auto_map": {"AutoProcessor": CODE, "AutoImageProcessor": CODE}, "processor_class": CODE}
                   for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")},
    "sentence transformers": {"modules.json": '[{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}]'},
    "legacy vocabularies": {"tekken.json": "{}", "tokenizer.model": "evil", "spiece.model": "evil", "merges.txt": "a b",
                            "vocab.json": "{}", "added_tokens.json": '{"evil": 7}'},
    "shards": {"model.safetensors.index.json": {"weight_map": {"a": "../evil.safetensors"}},
               "pytorch_model.bin.index.json": {"weight_map": {"a": "../evil.bin"}}},
    "timm": {"config.json": {"architecture": "hf-hub:owner/other", "model_args": {"pretrained": True},
             "pretrained_cfg": {"hf_hub_id": "owner/other", "custom_load": "hf"}}},
    "code": {f"{name}.py": EVIL for name in ("__init__", "evil", "modeling", "torch", "transformers", "kernels")},
}  # fmt: skip
# The same at once: of a key that has several values, the first ones, and the last ones.
ALL: dict[str, dict[str, Any]] = {"every first value": {}, "every last value": {}}
for _files in CASES.values():
    for _name, _content in _files.items():
        for _how, _whole in ALL.items():
            _old = _whole.get(_name, {} if isinstance(_content, dict) else _content)
            if isinstance(_content, dict) and isinstance(_old, dict):
                _old = {**_content, **_old} if _how == "every first value" else {**_old, **_content}
            _whole[_name] = _old
# The ways to read a folder, and what is read in each.
WAYS = {
    "saved": CASES, "pretrained_text": CASES, "released": ALL, "text": ALL, "pretrained_vision": ALL, "convert": ALL,
    "init": ALL, "checkpoint": ALL,
}  # fmt: skip


def put(folder: Path, files: dict[str, Any]) -> None:
    """Add the files of a case to a folder, and its keys to the JSON files that are there."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content)
        path.unlink(missing_ok=True)  # it may be a second name of the good folder's
        path.write_text(content)


class Job:
    """Small models in every layout, and the ways to read them."""

    def __init__(self, home: Path) -> None:
        import torch
        from safetensors.torch import save_file
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

        from hlip.model import config, released
        from hlip.model.clip import HLIPModel
        from hlip.model.config import ModelConfig, TextConfig, VisionConfig

        self.home = home
        sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                 "intermediate_size": 8, "max_position_embeddings": 8}  # fmt: skip
        config.BERT_BASE.update(sizes)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "scan", "##s"]
        backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        put(home / "bert", {"config.json": {"model_type": "bert", **sizes}, "tokenizer.json": backend.to_str()})
        put(home / "bert", {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}})
        text = TextConfig(str(home / "bert"), context_length=8, locked=True)
        vision = VisionConfig(8, 1, patch_size=(1, 2, 2), grid=(1, 2, 2), levels=("scan", "study"), max_scans=2)
        for module in (config, released):
            module.MODELS.clear()
            module.ALIASES.clear()
        config.MODELS["tiny"] = (ModelConfig(vision, text, embed_dim=4), "")
        torch.manual_seed(0)
        model = HLIPModel(config.MODELS["tiny"][0]).eval()
        model.save_pretrained(home / "saved")
        model.save_open_clip(home / "released")
        save_file(dict(model.state_dict()), home / "weights.safetensors")
        bert = {f"bert.{key}": value for key, value in model.text.transformer.state_dict().items()}
        save_file(bert, home / "bert" / "model.safetensors")
        trunk = {k: v for k, v in model.visual.trunk.state_dict().items() if "posemb" not in k}
        trunk["patch_embed.proj.weight"] = torch.ones(8, 3, 2, 2)
        trunk["pos_embed"] = torch.ones(1, 5, 8)
        put(home / "vit", {"config.json": {"architecture": "vit_tiny_patch16_224"}})
        save_file(trunk, home / "vit" / "model.safetensors")

    def read(self, way: str, files: dict[str, Any], folder: Path) -> str:
        """A hash of the weights of a model that was read with a case's files in its folder, and of what it computes."""
        import torch

        from commands import run
        from hlip.model.clip import HLIPModel, create_model

        top = {"pretrained_vision": "vit", "text": "bert", "pretrained_text": "bert", "released": "released"}
        shutil.copytree(self.home / top.get(way, "saved"), folder, copy_function=os.link)
        put(folder / "text" if (folder / "text").is_dir() else folder, files)
        torch.manual_seed(0)
        if way in ("saved", "released"):
            model = HLIPModel.from_pretrained(folder, model="tiny" if way == "released" else None)
        elif way == "text":
            model = HLIPModel.from_pretrained(self.home / "weights.safetensors", model="tiny", text=folder)
        elif way == "pretrained_text":
            model = create_model("tiny", pretrained_text=folder)
        elif way == "pretrained_vision":
            model = create_model("tiny", pretrained_vision=folder)
        elif way == "convert":
            if run("convert", folder, folder.with_name("converted")):
                raise ValueError(f"{folder} was not converted")
            model = HLIPModel.from_pretrained(folder.with_name("converted"))
        elif way == "init":
            from hlip.train.checkpoints import make_model
            from hlip.train.config import TrainConfig

            model = make_model(TrainConfig(folder, init=str(folder)))
        else:
            model = self.read_checkpoint(folder)
        content = hashlib.sha256(model.eval().encode_text(["scan scans", "scans"]).detach().numpy().tobytes())
        for name, value in sorted(model.state_dict().items()):
            content.update(name.encode() + value.numpy().tobytes())
        return content.hexdigest()

    def read_by_transformers(self, folder: Path) -> list[str]:
        """What the library asks for by itself: the witness must notice."""
        from transformers import AutoModel

        shutil.copytree(self.home / "bert", folder)
        put(folder, key("config.json", "_attn_implementation", KERNEL))
        WITNESS.asked, WITNESS.watching = [], True
        with contextlib.suppress(Exception):
            AutoModel.from_pretrained(folder)
        WITNESS.watching = False
        return WITNESS.asked

    def read_checkpoint(self, folder: Path) -> Any:
        """A training checkpoint that holds the folder's files."""
        import torch
        from safetensors.torch import load_file

        from hlip.model.clip import HLIPModel

        paths = [path for path in folder.rglob("*") if path.suffix in (".json", ".jinja", ".py")]
        files = {str(path.relative_to(folder)): path.read_text() for path in paths}
        state = load_file(folder / "model.safetensors")
        torch.save({"step": 1, "model": state, "hlip_files": files}, folder.with_suffix(".pt"))
        return HLIPModel.from_pretrained(folder.with_suffix(".pt"))


class Witness:
    """Records what is asked of the network, the import system and other programs, and refuses it."""

    def __init__(self, home: Path) -> None:
        self.home, self.asked = str(home), []
        self.watching = False
        sys.meta_path.insert(0, self)
        sys.addaudithook(self.hook)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if self.watching and name.partition(".")[0] not in sys.stdlib_module_names:
            self.asked.append(f"import {name}")

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            self.asked.append(f"{event} {args[0 if event != 'socket.connect' else 1]}")
            raise OSError("no network here")
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile"):
            self.asked.append(f"{event} {args[0]}")
            raise OSError("no programs here")
        if event == "exec" and (args[0].co_filename.startswith(self.home) or "modules" in args[0].co_filename):
            self.asked.append(f"exec {args[0].co_filename}")


def fake_packages(folder: Path) -> None:
    """Packages that look installed: kernels says when it is to fetch one; of the others nobody has need."""
    found = importlib.util.find_spec("transformers")
    assert found and found.origin
    source = (Path(found.origin).parent / "utils" / "import_utils.py").read_text(encoding="utf-8")
    version = re.search(r'KERNELS_MIN_VERSION = "(.+)"', source)
    names = {"kernels": version[1] if version else "0.12.3", "peft": "99", "bitsandbytes": "99", "xielu": "99"}
    for name, number in names.items():
        put(folder, {f"{name}/__init__.py": FAKE if name == "kernels" else ""})
        put(
            folder, {f"{name}-{number}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"}
        )
    put(folder, {"kernels/layer/__init__.py": "", "kernels/layer/mode.py": "class Mode: pass"})


FAKE = """
import site
import sys

class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __or__(cls, other):
        return cls

class Thing(metaclass=Anything):
    def __init__(self, *args, **options):
        pass

def get_kernel(*args, **options):
    sys.modules["__main__"].WITNESS.asked.append(f"get_kernel {args[0]}")
    raise OSError("no kernels here")

def decorator(*args, **options):
    return lambda decorated: decorated

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return Thing
    return decorator if name.startswith(("use_", "replace_")) else get_kernel if "kernel" in name else Thing

def register_kernel_mapping(*args, **options):
    pass
"""
WITNESS: Witness


def main(home: Path) -> None:
    global WITNESS
    fake_packages(home / "packages")
    site.addsitedir(str(home / "packages"))
    WITNESS = Witness(home)
    job = Job(home)
    results: dict[str, Any] = {}
    places = iter(range(10**6))

    def run(way: str, files: dict[str, Any]) -> tuple[str, list[str]]:
        folder = home / "runs" / f"{next(places)}" / "model"
        WITNESS.asked = []
        try:
            outcome = job.read(way, files, folder)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}".replace(str(folder), "FOLDER")
        return outcome, WITNESS.asked

    for way, cases in WAYS.items():
        good, _ = run(way, {})  # with all that is imported for it
        WITNESS.watching = True
        found = {name: run(way, files) for name, files in cases.items()}
        WITNESS.watching = False
        results[way] = {"good": good, "cases": found}
    results["transformers"] = job.read_by_transformers(home / "runs" / "transformers")
    print(json.dumps(results))


def run_job(home: Path) -> dict[str, Any]:
    """What the job prints, in a process of its own that would not keep to the cache."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(home / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, str(Path(__file__)), str(home)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))

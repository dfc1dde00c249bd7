"""Every flag of the released training programs: taken, left aside with a line, or refused with advice."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

import tiny_store
from hlip.evaluate.tasks import load_task
from hlip.model.config import ALIASES, MODELS
from hlip.output import write_csv
from hlip.train import pretrain
from hlip.train.config import KINDS, read_arguments
from hlip.train.flags import FLAGS, from_published_flags

# Each of the flags of four releases, with a value that they take, and the settings that it stands for.
TAKEN: dict[str, tuple[str, dict[str, object]]] = {
    "device": ("cuda", {"device": "cuda"}),
    "epochs": ("20", {"epochs": 20}),
    "eps": ("1e-6", {"eps": 1e-6}),
    "finetune": ("a.pt", {"init": "a.pt"}),
    "force-patch-dropout": ("0.5", {"patch_dropout": 0.5}),
    "grad-clip-norm": ("1.0", {"grad_clip": 1.0}),
    "lock-text-unlocked-layers": ("2", {"unlocked_layers": 2}),
    "log-every-n-steps": ("100", {"log_every": 100}),
    "logs": ("runs", {"out": "runs"}),
    "logs-dir": ("runs", {"out": "runs"}),
    "lr": ("1e-5", {"lr": 1e-5}),
    "model": ("vit_base_singlescan_h2_token2744", {"model": "vit_base_singlescan_h2_token2744"}),
    "num-scans": ("8", {"max_scans": 8}),
    "precision": ("amp", {"precision": "fp16"}),
    "pretrained": ("a.pt", {"init": "a.pt"}),
    "resume": ("latest", {"resume": "auto"}),
    "seed": ("3", {"seed": 3}),
    "train-data": ("STORE", {"data": "STORE"}),
    "wandb-project-name": ("mine", {"wandb": "mine"}),
    "warmup": ("47", {"warmup": 47}),
    "wd": ("0.1", {"weight_decay": 0.1}),
    "workers": ("6", {"workers": 6}),
    "delete-previous-checkpoint": ("", {"keep": 1}),
    "grad-checkpointing": ("", {"grad_checkpointing": True}),
    "local-loss": ("", {"local_loss": True}),
    "lock-text": ("", {"lock_text": True, "train_norms": True, "locked_dropout": True}),
    "lock-text-freeze-layer-norm": ("", {"train_norms": False}),
    "pretrained-image": ("", {"vision": "timm/vit_base_patch16_224.mae"}),
    "torchcompile": ("", {"compile": True}),
    "use-cxr-bert": ("", {"text": "microsoft/BiomedVLP-CXR-BERT-specialized"}),
    "text-process-cfg": ("report", {"texts": "items", "prefix": "This study shows: "}),
    "batch-size": ("16", {"batch_size": 16}),
    "beta1": ("0.8", {"betas": (0.8, 0.98)}),
    "beta2": ("0.95", {"betas": (0.9, 0.95)}),
    "name": ("mine", {"out": "logs/mine"}),
    "lr-scheduler": ("cosine", {}),
    "opt": ("adamw", {}),
}
ASIDE = """
aug-cfg benchmark-type cache-dir coca-caption-loss-weight coca-contrastive-loss-weight copy-codebase csv-caption-key
csv-img-key csv-separator dataset-resampled dataset-type ddp-static-graph debug dist-backend dist-url
force-custom-text gather-with-grad image-interpolation image-mean image-process-cfg image-resize-mode image-std
imagenet-v2 imagenet-val input-info lock-image-freeze-bn-stats log-local loss-dist-impl momentum no-set-device-rank
remote-sync remote-sync-frequency remote-sync-protocol report-to save-frequency save-most-recent
train-data-upsampling-factors train-num-samples use-bn-sync val-frequency val-num-samples valid-frequency
valid-num-samples wandb-notes zeroshot-frequency zeroshot-template
"""
REFUSED = {
    "hlip prepare": "data-root json-root train-data-filelist train-file train-report-filedict train-scan-filedict "
    "train-uid-filedict valid-data-filelist valid-file valid-report-filedict valid-scan-filedict",
    "--val STORE --labels FILE --prompts": "ct ct-rate mri rad-chestct zeroshot-ct-rate zeroshot-rad-chestct",
    "leave it out": "distill-model distill-pretrained epochs-cooldown force-image-size force-quick-gelu horovod "
    "lock-image lock-image-unlocked-groups lr-cooldown-end lr-cooldown-power skip-scheduler",
    "--compile": "torchscript trace",
    "--lock-text": "lora-text",
    "--precision bf16": "use-bnb-linear",
    "--model siglip_vit_base": "siglip",
}
ELSEWHERE = ["accum-batch", "accum-freq", "val-data", "valid-data"]  # need another flag beside them
CHEST = ["-1150", "350", "crop"]
VALUES = {"input-info": CHEST, "image-process-cfg": CHEST, "image-mean": ["0.5", "0.5", "0.5"], "aug-cfg": []}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_every_flag_has_an_answer() -> None:
    refused = [name for names in REFUSED.values() for name in names.split()]
    answered = [*TAKEN, *ASIDE.split(), *refused, *ELSEWHERE]
    assert len(answered) == len(set(answered)) == 120
    assert set(answered) == FLAGS.keys()
    named = {flag.setting for flag in FLAGS.values()} - {""}
    assert named | {key for flag in FLAGS.values() for case in flag.cases.values() for key in case} <= KINDS.keys()


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("sign", ["=", " "])
def test_a_flag_that_is_taken(name: str, sign: str) -> None:
    value, settings = TAKEN[name]
    given = ["--data", "STORE", *(f"--{name}{sign}{value}".split() if value else [f"--{name}"])]
    config = read_arguments(given, "hlip train", "")
    shown = {key: getattr(config, key) for key in settings}
    assert {key: str(shown[key]) if key in ("data", "out") else shown[key] for key in settings} == settings


@pytest.mark.parametrize("name", ASIDE.split())
def test_a_flag_that_is_left_aside_takes_a_line(name: str, caplog: pytest.LogCaptureFixture) -> None:
    values = VALUES.get(name, [] if name.startswith(("debug", "use", "lock")) else ["1"])
    with caplog.at_level(logging.WARNING):
        assert from_published_flags([f"--{name}", *values, "--lr", "1"]) == ["--lr", "1"]
    (line,) = caplog.messages
    assert line.startswith(f"--{name}: ")


@pytest.mark.parametrize(
    ("name", "advice"), [(name, advice) for advice, names in REFUSED.items() for name in names.split()]
)
def test_a_flag_that_is_refused_says_what_to_do(name: str, advice: str) -> None:
    for given in ([f"--{name}"], [f"--{name}", "1"], [f"--{name}=1"]):
        with pytest.raises(ValueError, match=f"^--{name}: ") as error:
            from_published_flags(given)
        assert advice in str(error.value)


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (["--opt", "timm/lamb"], "--opt timm/lamb: the optimizer is AdamW"),
        (["--lr-scheduler=const"], "--lr-scheduler const: the rate follows a cosine"),
        (["--input-info", "-1150", "350", "resize"], "--input-info -1150 350 resize: the store's recipe"),
        (["--text-process-cfg", "all"], "--text-process-cfg all: --texts, --findings and --prefix"),
        (["--text-process-cfg", "impressions"], "impressions alone need a store whose reports have no findings"),
        (["--accum-batch", "4"], "--accum-batch: it multiplies --batch-size"),
        (["--batch-size", "a"], "--batch-size: expected a whole number, got 'a'"),
        (["--batch_size", "8", "--accum-freq=-2"], "--accum-freq: expected a whole number, got '-2'"),
    ],
)
def test_other_values_are_refused(given: list[str], advice: str) -> None:
    with pytest.raises(ValueError) as error:
        from_published_flags(given)
    assert advice in str(error.value)


def test_a_step_is_the_product(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    given = ["--data", "S", "--batch-size", "16", "--accum-batch=2", "--accum-freq", "3", "--lr", "1e-5"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    config = read_arguments(given, "hlip train", "")
    assert (config.batch_size, config.lr, config.lr_batch) == (384, 1e-5, None)
    assert "--batch_size 384" in caplog.text
    assert "batch-size 16 x accum-batch 2 x accum-freq 3 x processes 4" in caplog.text
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    assert read_arguments(given, "hlip train", "").batch_size == 384
    assert not caplog.messages
    config = read_arguments(["--data", "S", "--batch_size", "32", "--accum-batch", "2"], "hlip train", "")
    assert config.batch_size == 64  # --batch_size counts all processes already


def test_the_rate_of_a_recipe_is_not_scaled_beside_the_released_batch_size(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lr_batch: 64\n")
    given = ["--config", str(tmp_path / "mine.yaml"), "--data", "S", "--lr", "8e-5"]
    assert read_arguments(given, "hlip train", "").lr_batch == 64
    assert read_arguments([*given, "--batch-size", "64"], "hlip train", "").lr_batch is None


def test_validation_takes_two_flags() -> None:
    for name in ("val-data", "valid-data"):
        config = read_arguments(["--data=S", f"--{name}", "V", "--prompts", "P"], "hlip train", "")
        assert (str(config.val), str(config.prompts)) == ("V", "P")


def test_a_strict_lock_takes_two_flags() -> None:
    for given in (["--lock-text", "--lock-text-freeze-layer-norm"], ["--lock-text-freeze-layer-norm", "--lock-text"]):
        config = read_arguments(["--data=S", *given], "hlip train", "")
        assert (config.lock_text, config.train_norms, config.locked_dropout) == (True, False, True)
    config = read_arguments(["--data=S", "--lock_text=true"], "hlip train", "")
    assert (config.lock_text, config.train_norms) == (True, None)  # the model's own choice


def test_texts_of_two_sides() -> None:
    config = read_arguments(["--data=S", "--text-process-cfg", "sentence and report"], "hlip train", "")
    assert (config.texts, config.findings) == ("item", "report")
    assert (config.prefix, config.findings_prefix) == ("This study shows: ", None)
    config = read_arguments(["--data=S", "--text-process-cfg", "impressions and findings"], "hlip train", "")
    assert (config.texts, config.findings) == ("items", "findings")
    assert (config.prefix, config.findings_prefix) == ("This study shows:", "This study looks like:")


def test_defaults_that_are_not_the_release_s_are_told(caplog: pytest.LogCaptureFixture) -> None:
    from_published_flags(["--batch-size", "16", "--config", "chest_ct"])
    assert "defaults" not in caplog.text
    from_published_flags(["--batch-size", "16"])
    assert "beta2 0.98, no limit to the gradient" in caplog.text


@pytest.mark.parametrize(
    "model", ["clip_vit_large_scan_study_dualdinotxt1568", "zch0414/clip-vit_large-scan_study-dualdinotxt1568"]
)
def test_a_run_has_its_folder_and_mae_has_the_size_of_the_model(model: str) -> None:
    given = ["--data=S", "--name", "mine", "--logs-dir", "runs", "--pretrained-image", "--model", model]
    config = read_arguments(given, "hlip train", "")
    assert (str(config.out), config.vision) == ("runs/mine", "timm/vit_large_patch16_224.mae")


def test_forms_are_kept() -> None:
    given = ["--logs-dir", "runs", "--valid-data=v", "--local-loss", "--precision", "amp_bf16", "--log-every-n-steps=3"]
    assert from_published_flags([*given, "--lr", "1", "2"]) == [
        "--out", "runs", "--val=v", "--local_loss=true", "--precision=bf16", "--log_every=3", "--lr", "1", "2",
    ]  # fmt: skip
    assert from_published_flags(["a", "b"]) == ["a", "b"]


# The README's command of 2025-10 on CT-RATE, for torchrun on four GPUs. Its data flags, --json-root, --data-root,
# --train-data and --zeroshot-ct-rate, are stores here.
README = """
--data STORE --val VAL --labels valid_labels.csv --prompts ct-rate
--input-info -1150 350 crop --zeroshot-template volume --zeroshot-frequency 1 --save-frequency 1 --report-to wandb
--wandb-project-name chest_ct --warmup 377 --batch-size 16 --accum-batch 1 --lr=1e-5 --wd=0.2 --epochs=20
--precision amp --workers 4 --grad-checkpointing --model vit_base_singlescan_h2_token2744 --use-cxr-bert --lock-text
"""


def test_the_command_of_the_released_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    config = read_arguments(README.split(), "hlip train", "")
    shown = {
        "batch_size": 64, "lr": 1e-5, "lr_batch": None, "warmup": 377, "weight_decay": 0.2, "epochs": 20,
        "precision": "fp16", "workers": 4, "grad_checkpointing": True, "model": "vit_base_singlescan_h2_token2744",
        "lock_text": True, "train_norms": True, "locked_dropout": True,
        "wandb": "chest_ct", "text": "microsoft/BiomedVLP-CXR-BERT-specialized",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in shown} == shown
    for flag, where in (("--json-root", "files/"), ("--data-root", "ct_rate/"), ("--zeroshot-ct-rate", "labels.csv")):
        with pytest.raises(ValueError, match=f"^{flag}: hlip prepare makes a store"):
            read_arguments([*README.split(), flag, where], "hlip train", "")


@pytest.mark.slow
@pytest.mark.usefixtures("small_models")
def test_the_command_of_the_released_readme_trains(
    bert_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flag for flag, on two studies, in one epoch of one step, with a narrow model of two layers and a BERT at hand:
    what the hub and Weights & Biases would give is out of reach."""
    model, advice = MODELS[ALIASES["vit_base_singlescan_h2_token2744"]]
    model = replace(model, vision=replace(model.vision, levels=("slice", "scan")))
    monkeypatch.setitem(MODELS, ALIASES["vit_base_singlescan_h2_token2744"], (model, advice))
    monkeypatch.setattr(tiny_store, "TINY_RECIPE", model.preprocess)
    columns = [column for columns in load_task("ct-rate").label_columns for column in columns]
    labels = [dict.fromkeys(columns, float(i % 2)) for i in range(2)]
    tiny_store.make_store(tmp_path / "STORE", [1] * 2, labels, model.preprocess.shape)
    rows = [["VolumeName", *columns], *([f"s{i:03d}", *labels[i].values()] for i in range(2))]
    write_csv(tmp_path / "valid_labels.csv", rows)
    monkeypatch.chdir(tmp_path)
    command = README.replace("VAL", "STORE").replace("batch-size 16", "batch-size 2").replace("epochs=20", "epochs=1")
    assert pretrain.main([*command.split(), "--text", bert_folder, "--wandb", "null", "--out", "run"]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    shown = capsys.readouterr()
    assert "1 steps" in shown.out or "step 1" in shown.out

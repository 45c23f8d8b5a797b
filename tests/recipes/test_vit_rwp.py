"""recipes/vit_rwp.py: what it computes, writes and refuses."""

import getpass
import json
import math
import re
import socket
from pathlib import Path

import distributed
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from datasets import Image
from imagenet import few_digits, launch, results, weights
from safetensors.torch import load_file
from sklearn.metrics import log_loss, top_k_accuracy_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data import Mixup, create_transform, resolve_data_config
from torch.nn.functional import log_softmax
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    pipeline,
    set_seed,
)
from vit import (
    RECIPE,
    SCRATCH,
    SMALL,
    TINY,
    cut_back,
    load_vit_recipe,
    results_of,
    train,
    train_on_rank,
    trained_vit,
    write_pictures,
)

from hf_rwp.images.loaders import ImageDataset
from hf_rwp.images.transforms import image_transforms
from hf_rwp.runs.parsing import parse_arguments
from hf_rwp.runs.records import weights_digest
from hf_rwp.trainer.images import ImageTrainer, ShuffledRows, collate
from hf_rwp.trainer.models import create_model, preprocessing

WEIGHTS, CARD = ("config.json", "model.safetensors"), ("README.md", "results.json", "curves.png", "confusion.png")
DIGITS = [str(digit) for digit in range(10)]
FIGURES = ("epoch", "step", "train_loss", "loss_clean", "loss_perturbed", "learning_rate", "top1", "top5", "eval_loss")


@pytest.fixture(scope="module")
def recipe():
    return load_vit_recipe()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its folder and its results."""
    folder = tmp_path_factory.mktemp("run")
    return folder, results_of(folder, *SCRATCH, "--mixup=0.2", "--learning_rate=5e-3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_vit(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


def break_images(pictures, split, count):
    for path in sorted((pictures / split).rglob("*.png"))[:count]:
        path.write_bytes(path.read_bytes()[:60])


def predict(folder, images):
    """The logits of the model in `folder`, with the preprocessing that it says."""
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    with torch.no_grad():
        return model(**processor([image.convert("RGB") for image in images], return_tensors="pt")).logits


def digits_to_validate():
    rows = few_digits()["validation"].cast_column("image", Image())
    return list(rows["image"]), np.array(rows["label"])


def assert_figures_are(final, logits, labels):
    """scikit-learn's, of what a loaded model says."""
    probabilities, classes = logits.double().softmax(1).numpy(), range(logits.shape[1])
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, probabilities, k=k, labels=classes)
        assert final[f"top{k}"] == pytest.approx(expected)
    assert final["eval_loss"] == pytest.approx(log_loss(labels, probabilities, labels=classes), rel=1e-2)


# As a user starts it


@pytest.mark.parametrize(
    ("flags", "epochs", "top1"),
    [
        (["--seed=0", "--num_train_epochs=6"], 6, 0.85),
        *(pytest.param([f"--seed={seed}"], 20, 0.97, marks=pytest.mark.slow) for seed in range(5)),
    ],
)
def test_no_arguments_learn_the_digits(tmp_path, flags, epochs, top1):
    run = launch(RECIPE, *flags, f"--output_dir={tmp_path}")
    assert run.returncode == 0, run.stderr
    found = results(tmp_path)
    assert found["final"]["top1"] >= top1
    assert found["final"]["rwp"]["placement"] == "sequential"
    slots = found["final"]["rwp"]["slots"]
    assert slots["clean"] == slots["perturbed"] == found["final"]["step"] == epochs * 23
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(rf"Wrote\s+to\s+{re.escape(str(tmp_path))}:\s+results\.json", run.stdout)
    assert list((tmp_path / "logs").rglob("events.*"))


def test_two_replicas_end_with_equal_weights(tmp_path):
    """100 images in batches of 16: 4 steps an epoch, the last of two images each, drawn anew from the first ones."""
    flags = [*SCRATCH, "--per_device_train_batch_size=16"]
    assert distributed.run(2, train_on_rank, tmp_path, *flags) == ["", ""]
    found = results(tmp_path)
    assert len(found["replicas_sha256"]) == 1
    assert found["hardware"]["replicas"] == 2
    assert found["final"]["rwp"]["placement"] == "parallel"
    assert found["final"]["rwp"]["slots"] == {"clean": 8, "perturbed": 8}
    assert found["final"]["loss_clean"] != found["final"]["loss_perturbed"]
    assert_figures_are(found["final"], predict(tmp_path / "model", digits_to_validate()[0]), digits_to_validate()[1])


# What it computes


def test_the_figures_are_those_of_the_model_it_leaves(run):
    folder, found = run
    images, labels = digits_to_validate()
    assert_figures_are(found["final"], predict(folder / "model", images), labels)


def test_rwp_false_is_plain_trainer(recipe, tmp_path):
    """Against a Trainer that is set up by hand, over rows in the same order."""
    found = results_of(tmp_path / "recipe", *SCRATCH, "--rwp=false", "--weight_decay=0.1")
    assert "rwp" not in found["final"]
    assert "loss_clean" not in found["final"]

    args = parse_arguments(recipe.Arguments, SCRATCH)
    set_seed(0)
    model, _ = create_model(args, DIGITS)
    train_transform, _ = image_transforms(args, preprocessing(args, model), normalized=True)
    images = ImageDataset(few_digits()["train"], train_transform, training=True)

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return ShuffledRows(100, seed=0)

    options = {"learning_rate": 2e-3, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
    options |= {"per_device_train_batch_size": 32, "num_train_epochs": 2, "remove_unused_columns": False, "seed": 0}
    plain = TrainingArguments(str(tmp_path / "plain"), save_strategy="no", **options)
    InOrder(model, plain, train_dataset=images, data_collator=collate).train()
    assert weights(found) == weights_digest(model)


def test_rwp_takes_the_two_gradients_from_the_halves_of_a_batch(run):
    _, found = run
    rwp = found["final"]["rwp"]
    assert rwp["slots"] == {"clean": 6, "perturbed": 6}  # of 3 steps an epoch: Mixup leaves out the last four images
    assert rwp["relative_noise"]["largest"]["size"] > 0
    row = found["final"]
    assert row["train_loss"] == pytest.approx((row["loss_clean"] + row["loss_perturbed"]) / 2)
    assert row["loss_gap"] == pytest.approx(row["loss_perturbed"] - row["loss_clean"])


def test_mixup_mixes_each_gradients_own_images(tmp_path, monkeypatch):
    """The loss is cross-entropy with timm's targets, and each half is mixed by itself."""
    losses, mixed = [], []

    def watch(kind, name, seen):
        original = getattr(kind, name)

        def call(self, *arguments, **options):
            outcome = original(self, *arguments, **options)
            seen.append((arguments, outcome))
            return outcome

        monkeypatch.setattr(kind, name, call)

    watch(ImageTrainer, "compute_loss", losses)
    watch(Mixup, "__call__", mixed)
    watch(ViTForImageClassification, "forward", logits := [])
    train(tmp_path, *SCRATCH, "--cutmix=1", "--label_smoothing_factor=0.1", "--max_steps=1", "--eval_strategy=no")
    assert [len(images) for (images, _), _ in mixed] == [16, 16]
    for (_, (_, targets)), (_, loss), (_, output) in zip(mixed, losses, logits, strict=False):
        expected = -(targets * log_softmax(output.logits, 1)).sum(1).mean()
        torch.testing.assert_close(loss, expected)
        assert targets.min() == pytest.approx(0.1 / 10)


def test_accumulation_and_logs_by_steps_give_the_same_rows(tmp_path):
    """Logs in the middle of epochs are averaged over their steps."""
    flags = ["--gradient_accumulation_steps=2", "--per_device_train_batch_size=16", "--eval_strategy=steps"]
    flags += ["--eval_steps=1", "--batch_eval_metrics"]
    by_epoch = results_of(tmp_path / "epoch", *SCRATCH, *flags)
    by_step = results_of(tmp_path / "step", *SCRATCH, *flags, "--logging_strategy=steps", "--logging_steps=1")
    assert [row["step"] for row in by_step["history"]] == [4, 8]
    for row, expected in zip(by_step["history"], by_epoch["history"], strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert (row["top1"], row["top5"]) == (expected["top1"], expected["top5"])


# What it writes


def test_results_say_what_was_run_and_not_where(run):
    folder, found = run
    assert found["arguments"]["mixup"] == 0.2
    assert found["arguments"]["learning_rate"] == 5e-3
    assert found["arguments"]["output_dir"] == folder.name
    assert {"python", "torch", "transformers", "accelerate", "timm"} <= set(found["versions"])
    assert [row["epoch"] for row in found["history"]] == [1, 2]
    assert found["final"] == found["history"][-1]
    for row in found["history"]:
        assert set(FIGURES) <= set(row)
        assert row["images_per_second"] == pytest.approx(100 / row["seconds"])
        assert row["unreadable_images"] == 0
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in found["history"]))
    text = (folder / "results.json").read_text()
    for trace in (str(folder.parent), str(Path.cwd()), str(Path.home()), socket.gethostname(), getpass.getuser()):
        assert not re.search(rf"(?<!\w){re.escape(trace)}(?!\w)", text), trace


def test_the_model_folder_is_one_that_transformers_loads(run):
    folder = run[0] / "model"
    assert {path.name for path in folder.iterdir()} == {*WEIGHTS, *CARD, "preprocessor_config.json"}
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.id2label == dict(enumerate(DIGITS))
    images, _ = digits_to_validate()
    best = predict(folder, images[:1]).argmax().item()
    assert pipeline("image-classification", str(folder))(images[0].convert("RGB"))[0]["label"] == DIGITS[best]
    assert str(run[0].parent) not in (folder / "config.json").read_text()


def test_the_best_checkpoint_can_be_kept(tmp_path):
    flags = ["--load_best_model_at_end", "--metric_for_best_model=eval_loss", "--greater_is_better=true"]
    found = results_of(tmp_path, *SCRATCH, *flags, "--learning_rate=1e-2")
    losses = [row["eval_loss"] for row in found["history"]]
    worst = int(np.argmax(losses))  # the first epoch's, where all goes well
    assert losses[0] != losses[1]
    assert found["best"]["checkpoint"] == f"checkpoint-{found['history'][worst]['step']}"
    assert found["best"]["eval_loss"] == pytest.approx(losses[worst])
    assert found["final"]["eval_loss"] == losses[1]


# Resuming


def figures_of(found):
    return [
        {name: row[name] for name in FIGURES if name in row} | {"slots": row["rwp"]["slots"]}
        for row in found["history"]
    ]


@pytest.mark.parametrize("kind", ["scratch", "timm", "lora"])
def test_resuming_in_the_middle_of_an_epoch_is_bit_exact(trained, tmp_path, kind):
    flags = {
        "scratch": [f"--model_kwargs={TINY | {'hidden_dropout_prob': 0.2}}", "--dataloader_num_workers=1"],
        "timm": ["--model_name_or_path=test_vit", "--model_kwargs={patch_size: 8, drop_path_rate: 0.2}", "--cutmix=1"],
        "lora": [f"--model_name_or_path={trained}", "--lora_r=2", "--lora_dropout=0.2", "--learning_rate=1e-2"],
    }[kind]
    flags = [*SMALL, *flags, "--save_strategy=steps", "--save_steps=1", "--save_total_limit=9", "--reprob=0.5"]
    flags += ["--aa=rand-m9-mstd0.5", "--rwp_eta=0.1", "--rwp_schedule=cosine", "--rwp_growth=2"]
    whole = results_of(tmp_path / "whole", *flags)
    for step in (2, 4, 5) if kind == "scratch" else (2,):
        folder = cut_back(tmp_path / "whole", tmp_path / f"from_{step}", step)
        again = results_of(folder, *flags, "--resume_from_checkpoint=latest")
        assert weights(again) == weights(whole)
        first = 1 if step == 4 else 0  # that epoch's evaluation came after the checkpoint, and does not come again
        assert len(again["history"]) == 2
        assert figures_of(again)[first:] == figures_of(whole)[first:]


def test_two_replicas_resume_bit_exactly(tmp_path):
    flags = [*SCRATCH, "--per_device_train_batch_size=12", "--save_strategy=steps", "--save_steps=3", "--cutmix=1"]
    whole = tmp_path / "whole"
    assert distributed.run(2, train_on_rank, whole, *flags) == ["", ""]
    folder = cut_back(whole, tmp_path / "again", 6)  # of four steps an epoch
    assert distributed.run(2, train_on_rank, folder, *flags, "--resume_from_checkpoint=latest") == ["", ""]
    assert weights(results(folder)) == weights(results(whole))
    assert figures_of(results(folder)) == figures_of(results(whole))


def test_a_run_is_not_lost_to_another_unless_asked_for(tmp_path):
    train(tmp_path / "run", *SCRATCH)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    folder = cut_back(tmp_path / "run", tmp_path / "cut", 4)
    for occupied, what in ((folder, "unfinished run"), (tmp_path / "run", "a finished run")):
        with pytest.raises(FileExistsError, match=f"{what}.*--overwrite_output_dir"):
            train(occupied, *SCRATCH)
    train(tmp_path / "run", *SCRATCH, "--save_strategy=no", "--overwrite_output_dir")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    (tmp_path / "empty").mkdir()
    for named in ("latest", str(tmp_path / "empty")):
        with pytest.raises(FileNotFoundError, match="checkpoint"):
            train(tmp_path / "run", *SCRATCH, f"--resume_from_checkpoint={named}")


def test_flags_that_a_checkpoint_keeps_cannot_change(tmp_path):
    train(tmp_path / "run", *SCRATCH)
    folder = cut_back(tmp_path / "run", tmp_path / "cut", 4)
    for flag, named in (("--rwp_gamma=0.5", "rwp_gamma=None"), ("--rwp=false", "rwp=True"), ("--seed=5", "seed=0")):
        with pytest.raises(ValueError, match=f"written with {named}.*keeps that"):
            train(folder, *SCRATCH, flag, "--resume_from_checkpoint=latest")


def test_a_half_written_checkpoint_is_not_the_latest(tmp_path):
    flags = [*SCRATCH, "--save_strategy=steps", "--save_steps=2", "--save_total_limit=9"]
    train(tmp_path / "run", *flags)
    whole = results(tmp_path / "run")
    assert all(row["rwp"]["relative_noise"] for row in whole["history"])
    folder = cut_back(tmp_path / "run", tmp_path / "cut", 6)
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    train(folder, *flags, "--resume_from_checkpoint=latest")
    assert weights(results(folder)) == weights(whole)


# Broken images


def test_broken_images_are_counted_and_left_out(tmp_path, pictures, caplog):
    break_images(pictures, "train", 3)
    break_images(pictures, "validation", 2)
    data = [f"--data_dir={pictures}", "--dataloader_num_workers=2", "--per_device_eval_batch_size=1"]
    found = results_of(tmp_path / "out", *SCRATCH, *data, few=False)
    assert found["final"]["unreadable_images"] == 3
    assert found["final"]["unreadable_eval_images"] == 2
    assert math.isfinite(found["final"]["eval_loss"])
    whole = sorted((pictures / "validation").rglob("*.png"))[2:]
    images = [PIL.Image.open(path) for path in whole]
    logits = predict(tmp_path / "out" / "model", images)
    labels = np.array([int(path.parent.name) for path in whole])
    assert found["final"]["top1"] == pytest.approx((logits.argmax(1).numpy() == labels).mean())


def test_too_many_broken_images_stop_all_replicas(tmp_path, pictures):
    break_images(pictures, "train", 3)
    flags = [*SCRATCH, f"--data_dir={pictures}", "--max_bad_images=2", "--per_device_train_batch_size=4"]
    for ended in distributed.run(2, train_on_rank, tmp_path / "out", *flags, "--logging_steps=1"):
        assert re.match(r"ValueError: 3 images could not be read, more than max_bad_images=2", ended)
    assert not (tmp_path / "out" / "results.json").exists()


def test_no_readable_image_for_evaluation_is_an_error(tmp_path, pictures):
    break_images(pictures, "validation", 10)
    with pytest.raises(ValueError, match="no image for evaluation could be read"):
        train(tmp_path / "out", *SCRATCH, f"--data_dir={pictures}", few=False)


def test_a_loss_that_is_no_number_stops_training(tmp_path):
    with pytest.raises(FloatingPointError, match="smaller learning_rate or rwp_gamma"):
        train(tmp_path, *SCRATCH, "--learning_rate=1e30", "--max_grad_norm=0", "--optim=sgd")


# Models


def test_what_a_run_leaves_can_be_tuned_and_evaluated(recipe, trained, tmp_path):
    args = parse_arguments(recipe.Arguments, [f"--model_name_or_path={trained}"])
    assert (args.learning_rate, args.img_size) == (5e-5, None)
    flags = [*SMALL, f"--model_name_or_path={trained}", "--learning_rate=1e-3"]
    found = results_of(tmp_path / "tuned", *flags)
    assert found["arguments"]["model_name_or_path"] == trained.name
    assert str(trained) not in (tmp_path / "tuned" / "model" / "config.json").read_text()
    train(tmp_path / "again", *SMALL, f"--model_name_or_path={tmp_path / 'tuned' / 'model'}", "--eval_only")
    figures = json.loads((tmp_path / "again" / "eval.json").read_text())
    assert figures["eval_top1"] == found["final"]["top1"]
    assert not (tmp_path / "again" / "results.json").exists()
    with pytest.raises(ValueError, match="eval_only needs the data"):
        train(tmp_path / "again", *SMALL, f"--model_name_or_path={trained}", "--eval_only")


def test_a_timm_model_loads_in_timm_and_in_transformers(tmp_path):
    """From scratch at 32 pixels; then again from what it wrote, at 48, with its position embeddings resized."""
    flags = ["--per_device_train_batch_size=32", "--num_train_epochs=1", "--report_to=none"]
    scratch = ["--model_name_or_path=test_vit", "--img_size=32", "--model_kwargs={patch_size: 8, drop_path_rate: 0.1}"]
    found = results_of(tmp_path / "scratch", *flags, *scratch, "--crop_pct=0.9")
    folder = tmp_path / "scratch" / "model"
    assert {path.name for path in folder.iterdir()} == {*WEIGHTS, *CARD}
    images, labels = digits_to_validate()
    logits = predict(folder, images)
    assert_figures_are(found["final"], logits, labels)

    in_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=in_timm, use_test_size=True))
    with torch.no_grad():
        again = in_timm(torch.stack([transform(image.convert("RGB")) for image in images]))
    torch.testing.assert_close(again, logits)
    assert pipeline("image-classification", str(folder))(images[0])[0]["label"] == DIGITS[logits[0].argmax()]

    tuned = [f"--model_name_or_path={folder}", "--img_size=48"]
    found = results_of(tmp_path / "tuned", *flags, *tuned, "--learning_rate=1e-3")
    assert found["arguments"]["learning_rate"] == 1e-3
    assert load_file(tmp_path / "tuned" / "model" / "model.safetensors")["pos_embed"].shape[1] == (48 // 8) ** 2 + 1
    assert_figures_are(found["final"], predict(tmp_path / "tuned" / "model", images), labels)


@pytest.mark.parametrize("kind", ["transformers", "timm"])
def test_lora_leaves_an_adapter_and_the_merged_model(recipe, trained, tmp_path, kind):
    from peft import PeftModel

    base, flags = trained, ["--lora_r=4", "--learning_rate=1e-2", *SMALL, "--rwp_frozen"]
    if kind == "timm":
        base = tmp_path / "base" / "model"
        named = ["--model_name_or_path=test_vit", "--model_kwargs={patch_size: 8}"]
        train(tmp_path / "base", *SMALL, *named, "--max_steps=1")
    found = results_of(tmp_path / "lora", *flags, f"--model_name_or_path={base}")
    images, labels = digits_to_validate()
    merged = predict(tmp_path / "lora" / "model", images)
    assert_figures_are(found["final"], merged, labels)

    whole, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "lora" / "model", base))
    assert whole.keys() == before.keys()
    changed = {name for name in whole if whole[name].shape != before[name].shape or not whole[name].equal(before[name])}
    linear = {name for name in whole if re.search(r"(blocks|layer)\.\d.*\.weight$", name) and whole[name].ndim == 2}
    assert linear
    assert {name for name in changed if not re.match(r"head\.|classifier\.", name)} == linear

    config = json.loads((tmp_path / "lora" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    args = parse_arguments(recipe.Arguments, [f"--model_name_or_path={base}"])
    model = PeftModel.from_pretrained(create_model(args, DIGITS)[0], tmp_path / "lora" / "adapter").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "lora" / "model")
    with torch.no_grad():
        pixels = processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(model(pixel_values=pixels).logits, merged, atol=1e-4, rtol=1e-4)


# What it refuses


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model_name_or_path=vit_smal_patch16_224"], "Similar ones: vit_small_patch16_224"),
        (["--model_kwargs=3"], "model_kwargs must be a mapping, .* got '3'"),
        (["--lora_r=4"], "lora_r=4 is for trained weights"),
        (["--lora_r=0"], "lora_r must be at least 1, got 0"),
        (["--lora_dropout=0.5"], "no effect without LoRA"),
        (["--eval_only"], "eval_only is for trained weights"),
        (["--mixup=-1"], "mixup must be at least 0, got -1.0"),
        (["--dataset=a/b", "--streaming"], "streaming=True: .* imagenet_rwp.py"),
        (["--rwp_alpha=2"], r"rwp_alpha must be in \[0, 1\], got 2.0"),
        (["--data_dir=a", "--dataset=b"], "data_dir must be unset where dataset is set, got 'a'"),
        (["--workers=2"], r"no flag --workers; did you mean --dataloader_num_workers\?"),
        (["--warmup_steps=-1"], "warmup_steps"),
        (["--dataloader_drop_last"], "leave images out of the evaluation"),
    ],
)
def test_flags_that_cannot_work_are_refused(recipe, flags, said):
    with pytest.raises(ValueError, match=said):
        parse_arguments(recipe.Arguments, flags)


def test_a_model_that_is_not_there_is_refused(tmp_path, trained):
    with pytest.raises(ValueError, match=r"(?s)model_name_or_path='nobody/nothing' could not be loaded.*hf auth login"):
        train(tmp_path / "out", *SMALL, "--model_name_or_path=nobody/nothing")
    (folder := tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(trained / name)
    with pytest.raises(ValueError, match=r"needs a preprocessor_config\.json"):
        train(tmp_path / "out", *SMALL, f"--model_name_or_path={folder}")


def test_a_batch_that_makes_no_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"per_device_train_batch_size=30: .*halves.* Set a multiple of 4"):
        train(tmp_path, *SCRATCH, "--mixup=0.2", "--per_device_train_batch_size=30")
    with pytest.raises(ValueError, match="Set a multiple of 2"):
        train(tmp_path, *SCRATCH, "--mixup=0.2", "--per_device_train_batch_size=31", "--rwp=false")


def test_single_images_at_1x1_are_refused_ahead_of_training(tmp_path):
    flags = ["--model_name_or_path=test_resnet", "--img_size=16", "--per_device_train_batch_size=1"]
    with pytest.raises(ValueError, match="is only one image, and BatchNorm needs more than one"):
        train(tmp_path, *flags)


def test_defaults_are_named_after_the_run(recipe):
    args = parse_arguments(recipe.Arguments, ["--dataset=uoft-cs/cifar10", "--seed=3", "--rwp=false"])
    assert args.output_dir == "outputs/cifar10_vit_base_seed3"
    assert parse_arguments(recipe.Arguments, []).output_dir == "outputs/digits_vit_rwp_seed0"


def test_a_folder_of_photos_without_a_model_trains_the_small_vit_on_32_pixels(tmp_path):
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for photo in range(5):
            PIL.Image.new("RGB", (40, 30), (100 * number, photo, 0)).save(tmp_path / "photos" / name / f"{photo}.png")
    flags = [f"--data_dir={tmp_path / 'photos'}", "--num_train_epochs=1", f"--model_kwargs={TINY}", "--report_to=none"]
    found = results_of(tmp_path / "run", *flags, "--per_device_train_batch_size=4", few=False)
    assert json.loads((tmp_path / "run/model/config.json").read_text())["image_size"] == 32
    assert found["found"]["images"] == {"train": 8, "validation": 2}
    assert "held out" in found["found"]["splits"]["validation"]


# What it shows


def test_in_a_pipe_it_says_how_far_it_is_and_at_last_what_it_did(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_rwp.runs.progress.LATEST", 0.0)  # a line after every step
    recipe = load_vit_recipe()
    monkeypatch.setattr(recipe, "load_images", few_digits)
    flags, first = [*SCRATCH, "--report_to=tensorboard", "--rwp_gamma=0.02"], Path("outputs/digits_vit_rwp_seed0")
    for folder in (first, first / "2"):
        recipe.main(parse_arguments(recipe.Arguments, flags))
        said = capfd.readouterr()
        assert f"writes to: {folder}\n" in said.out
        lines = [line for line in said.out.splitlines() if line.startswith("epoch ")]
        steps = [re.match(r"epoch (\d)/2, step (\d)/8: loss \d\.\d{4}, [\d,.]+ images/s", line) for line in lines]
        assert [(step[1], step[2]) for step in steps if step] == [("12"[step > 4], str(step)) for step in range(1, 9)]
        done = [re.match(r"epoch (\d)/2 done: loss (\S+), top-1 (\S+)%, ", line) for line in lines]
        history = results(folder)["history"]
        assert [float(found[2]) for found in done if found] == [
            pytest.approx(row["train_loss"], abs=1e-3) for row in history
        ]
        assert [found[3] for found in done if found] == [f"{100 * row['top1']:.2f}" for row in history]
        assert all(line.endswith(" left") for line in lines[:-2])
        assert not any(line.startswith("{") for line in said.out.splitlines())  # none of Trainer's own
        assert "%|" not in said.err
        assert "\n\nRWP took 8 of 16 gradients with noise" in said.out
        assert f"\nhf-rwp predict {folder} IMAGE " in said.out
        assert f"\ntensorboard --logdir {folder}/logs " in said.out
        assert "\nhf-rwp vit --rwp=false --per_device_train_batch_size=32" in said.out
        assert {file.parent for file in folder.rglob("events.*")} == {folder / "logs"}
    assert not list(first.glob("runs"))
    events = EventAccumulator(str(first / "logs")).Reload()
    assert [event.value for event in events.Scalars("train/gamma")] == pytest.approx([0.02, 0.02])
    sizes = [row["rwp"]["relative_noise"]["largest"]["size"] for row in results(first)["history"]]
    assert [event.value for event in events.Scalars("train/noise_size_largest")] == pytest.approx(sizes)


def test_top_5_of_few_classes_is_nowhere(tmp_path, capsys):
    pictures = write_pictures(tmp_path / "pictures")
    found = results_of(tmp_path / "out", *SCRATCH, f"--data_dir={pictures}", few=False)
    assert all("top5" not in row for row in found["history"])
    assert "top-5" not in capsys.readouterr().out.lower()
    assert "top-5" not in (tmp_path / "out" / "model" / "README.md").read_text().lower()

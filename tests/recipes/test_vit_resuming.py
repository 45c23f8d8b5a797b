"""recipes/vit_rwp.py goes on with a run's own flags, stops at signals, and ends where it has diverged."""

import json
import os
import signal

import distributed
import forked
import pytest
import torch
from imagenet import SUPPORT, few_digits, results, undrawn, weights
from safetensors.torch import load_file, save_file
from test_vit_rwp import break_images, figures_of
from transformers import ViTForImageClassification
from vit import SCRATCH, SMALL, cut_back, load_vit_recipe, results_of, train, train_on_rank, trained_vit, write_pictures

from hf_rwp.core.optimizer import RWP
from hf_rwp.images.data import load_images
from hf_rwp.runs.given import FLAGS
from hf_rwp.runs.parsing import parse_arguments

OWN = ["--weight_decay=0.1", "--hflip=0.5", "--crop_pct=0.8", "--learning_rate=5e-3"]


def start(*flags, few=True):
    """As a user types it: these flags and no others."""
    recipe = load_vit_recipe()
    recipe.load_images = few_digits if few else load_images
    with undrawn(recipe):
        recipe.main(parse_arguments(recipe.Arguments, list(map(str, flags))))


def evaluated(folder):
    found = json.loads((folder / "eval.json").read_text())
    return {name.removeprefix("eval_"): found[name] for name in ("eval_top1", "eval_top5")} | {
        "eval_loss": found["eval_loss"]
    }


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures")


# A run's own flags


def test_a_run_goes_on_with_its_own_flags(tmp_path):
    flags = [*SCRATCH, *OWN, "--save_strategy=steps", "--save_steps=2", "--save_total_limit=9"]
    whole = results_of(tmp_path / "whole", *flags)
    for name, named in (("folder", ""), ("checkpoint", "checkpoint-2"), ("latest", "latest")):
        folder = cut_back(tmp_path / "whole", tmp_path / name, 2)
        if named == "latest":
            start("--resume_from_checkpoint=latest", f"--output_dir={folder}")
        else:
            start(f"--resume_from_checkpoint={folder / named}")
        assert weights(results(folder)) == weights(whole)
        assert figures_of(results(folder)) == figures_of(whole)


def test_flags_given_anew_win_and_are_listed(tmp_path, capsys):
    train(tmp_path, *SCRATCH, *OWN)
    capsys.readouterr()
    start(f"--resume_from_checkpoint={tmp_path}", "--num_train_epochs=3", "--hflip=0.5")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("given now")]
    assert said == ["given now: num_train_epochs=3, which is 2 there"]
    assert results(tmp_path)["final"]["epoch"] == 3
    assert results(tmp_path)["arguments"]["crop_pct"] == 0.8
    assert json.loads((tmp_path / FLAGS).read_text())["num_train_epochs"] == ["3"]


@pytest.mark.parametrize("kind", ["scratch", "timm", "lora"])
def test_a_checkpoint_is_evaluated_as_its_run_did(tmp_path, kind):
    flags = {
        "scratch": [*SCRATCH, *OWN],
        "timm": [*SMALL, "--model_name_or_path=test_vit", "--model_kwargs={patch_size: 8}", "--crop_pct=0.8"],
        "lora": [*SMALL, f"--model_name_or_path={trained_vit(tmp_path / 'trained')}", "--lora_r=2"],
    }[kind]
    final = results_of(tmp_path / "run", *flags, "--learning_rate=1e-2")["final"]
    start(f"--resume_from_checkpoint={tmp_path / 'run'}", "--eval_only")
    expected = {name: final[name] for name in ("top1", "top5", "eval_loss")}
    assert evaluated(tmp_path / "run") == pytest.approx(expected, rel=1e-5)


def test_the_token_and_the_flags_are_in_nothing_that_is_pushed(tmp_path):
    train(tmp_path / "run", *SCRATCH, "--hub_token=hf_secret", "--data_seed=7")
    assert json.loads((tmp_path / "run" / FLAGS).read_text())["data_seed"] == ["7"]
    assert FLAGS.startswith("_")  # which Trainer's own pushes leave out
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"hf_secret" not in file.read_bytes(), file
    pickled = (tmp_path / "run" / "checkpoint-8" / "training_args.bin").read_bytes()
    assert b"hf_rwp.runs.given" not in pickled


# Unreadable images


def test_unreadable_images_of_before_still_count(tmp_path, pictures):
    """Repaired meanwhile, so that nothing but the checkpoint knows of them."""
    whole = {path: path.read_bytes() for path in (pictures / "train").rglob("*.png")}
    break_images(pictures, "train", 3)
    found = results_of(tmp_path / "run", *SCRATCH, f"--data_dir={pictures}", few=False)
    assert found["final"]["unreadable_images"] == 3
    assert "unreadable_slots" not in found["final"]
    folder = cut_back(tmp_path / "run", tmp_path / "again", 2)
    for path, content in whole.items():
        path.write_bytes(content)
    start(f"--resume_from_checkpoint={folder}", few=False)
    assert results(folder)["final"]["unreadable_images"] == 3


# Signals


@pytest.mark.parametrize(
    ("step", "sent", "status"),
    [
        (2, signal.SIGINT, 130),
        (4, signal.SIGTERM, 75),
        pytest.param(2, signal.SIGTERM, 75, marks=pytest.mark.slow),
        pytest.param(4, signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, capsys, monkeypatch, step, sent, status):
    """In the middle of the first of two epochs of four steps, and in its last step."""
    flags = [*SCRATCH, "--save_strategy=no", "--save_steps=99"]
    original, done = RWP.step, []

    def stepped(self, *arguments):
        done.append(1)
        if len(done) == step:
            os.kill(os.getpid(), sent)
        return original(self, *arguments)

    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(RWP, "step", stepped)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", *flags)
    monkeypatch.setattr(RWP, "step", original)
    assert stopped.value.code == status
    assert f"saved step {step}; --resume_from_checkpoint {tmp_path / 'run'} goes on" in capsys.readouterr().err
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    start(f"--resume_from_checkpoint={tmp_path / 'run'}")
    assert weights(results(tmp_path / "run")) == weights(results_of(tmp_path / "whole", *flags))


def interrupted_on_rank(folder):
    """Only rank 1 gets the signal; both have to save and stop."""
    original = RWP.step
    if distributed.rank() == 1:
        RWP.step = lambda self, *a: (os.kill(os.getpid(), signal.SIGTERM), original(self, *a))[1]
    try:
        return train_on_rank(folder, *SCRATCH, "--per_device_train_batch_size=4", "--logging_steps=5")
    except SystemExit as stopped:
        return f"exit {stopped.code}"
    finally:
        RWP.step = original


def test_a_signal_to_one_replica_stops_all(tmp_path):
    assert distributed.run(2, interrupted_on_rank, tmp_path) == ["exit 75", "exit 75"]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]


def test_ctrl_c_with_workers_prints_no_traceback(tmp_path):
    """As a terminal sends it, to the whole group."""
    code = (
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import vit\n"
        "from hf_rwp.core.optimizer import RWP\n"
        "step = RWP.step\n"
        "RWP.step = lambda self, *a: (print('step', flush=True), step(self, *a))[1]\n"
        f"vit.train({str(tmp_path)!r}, *{SCRATCH!r}, '--num_train_epochs=9999', '--dataloader_num_workers=2')\n"
    )
    with forked.started("-c", code) as process:
        process.wait_for("step\n")
        os.killpg(process.pid, signal.SIGINT)
        run = process.end()
    assert run.returncode == 130, run.stderr
    assert "Traceback" not in run.stderr
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


# A run that has diverged


def test_a_held_out_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    original = RWP.step

    def explodes(self, *arguments):
        done = original(self, *arguments)
        if self.report()["windows"] == 4:  # the last step of an epoch: its training losses are numbers
            with torch.no_grad():
                self.model.classifier.bias[0] = float("nan")
        return done

    monkeypatch.setattr(RWP, "step", explodes)
    with pytest.raises(FloatingPointError, match=r"the held-out loss is .*nan.* by step 4.* smaller learning_rate"):
        train(tmp_path, *SCRATCH)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not (tmp_path / "results.json").exists()


def test_weights_that_give_no_number_are_no_result(tmp_path):
    train(tmp_path / "run", *SCRATCH, "--max_steps=1")
    file = tmp_path / "run" / "model" / "model.safetensors"
    state = load_file(file)
    state["classifier.bias"][0] = float("inf")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match="these weights hold, or lead to, numbers that are not finite"):
        train(tmp_path / "eval", *SMALL, "--eval_only", f"--model_name_or_path={tmp_path / 'run' / 'model'}")
    assert not (tmp_path / "eval" / "eval.json").exists()


# The first lines


def test_a_run_begins_with_what_it_found(tmp_path, pictures, capsys):
    found = results_of(tmp_path / "out", *SCRATCH, f"--data_dir={pictures}", few=False)
    opening = capsys.readouterr().out.partition("\nepoch")[0]
    count = sum(
        parameter.numel()
        for parameter in ViTForImageClassification.from_pretrained(tmp_path / "out" / "model").parameters()
    )
    for part in (
        "train: 40 images, 2 classes: 0 20, 1 20",
        "validation: 10 images",
        f"model: ViTForImageClassification, {count:,} weights, random weights",
        "devices: 1 replica on cpu, mixed precision: no",
        "images per step: 32 (in halves, a clean and a perturbed gradient)",
        f"writes to: {tmp_path / 'out'}",
    ):
        assert part in opening, opening
    assert found["model"]["weights"] == count
    assert found["images_per_step"]["images"] == 32
    assert (
        "| Classes, and training images of each | 2: 0 20, 1 20 |"
        in (tmp_path / "out" / "model" / "README.md").read_text()
    )
    lora = ["--lora_r=2", f"--model_name_or_path={tmp_path / 'out'}", "--gradient_accumulation_steps=2"]
    found = results_of(tmp_path / "lora", *SMALL, *lora, f"--data_dir={pictures}", few=False)
    said = capsys.readouterr().out
    assert "of them trained, weights from model" in said
    assert "images per step: 64 (in halves, a clean and a perturbed gradient)" in said
    assert 0 < found["model"]["trained"] < found["model"]["weights"]

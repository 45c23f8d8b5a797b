"""recipes/imagenet_rwp.py. Most tests call its `main` on a hundred of the digits; some start it as a user does."""

import copy
import getpass
import importlib.util
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from datasets import DatasetDict
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hf_rwp.arguments import parse_arguments
from hf_rwp.data import load_digits

RECIPE = Path(__file__).parents[1] / "recipes" / "imagenet_rwp.py"
SMALL = ["--image_size=16", "--batch_size=32", "--lr=0.02"]  # three steps an epoch


def load_recipe():
    spec = importlib.util.spec_from_file_location(RECIPE.stem, RECIPE)
    module = sys.modules[RECIPE.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def few_digits(*_):
    return DatasetDict(
        {name: split.select(range(size)) for (name, split), size in zip(load_digits().items(), (100, 41), strict=True)}
    )


@pytest.fixture(scope="session")
def loaded():
    return load_recipe()


@pytest.fixture
def recipe(loaded, monkeypatch):
    monkeypatch.setattr(loaded, "load_images", few_digits)
    return loaded


def train(recipe, folder, *flags):
    recipe.main(parse_arguments(recipe.Arguments, [*SMALL, "--epochs=2", *flags, f"--output_dir={folder}"]))


def results_of(recipe, folder, *flags):
    train(recipe, folder, *flags)
    return json.loads((folder / "results.json").read_text())


def weights(results):
    (sha,) = results["weights_sha256"]
    return sha


def launch(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )


# As a user starts it


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_no_arguments_but_a_seed_learn_the_digits(tmp_path, seed):
    run = launch("-m", "accelerate.commands.launch", RECIPE, f"--seed={seed}", f"--output_dir={tmp_path}")
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["final"]["top1"] >= 0.985
    assert (results["arguments"]["method"], results["final"]["rwp"]["placement"]) == ("rwp", "sequential")
    assert results["final"]["rwp"]["slots"] == {"clean": 220, "perturbed": 220}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "results.json") in run.stdout
    assert "it/s" not in run.stderr  # no progress bar where there is no terminal


def test_two_ranks_are_parallel_and_hold_the_same_weights(tmp_path):
    """One launch for all three methods: most of the time goes into starting the ranks."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_recipes\n"
        f"test_recipes.train_all_methods({str(tmp_path)!r})"
    )
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", driver]
    run = launch(*command, ACCELERATE_USE_CPU="true")
    assert run.returncode == 0, run.stderr
    for method in ("base", "rwp", "sam"):
        results = json.loads((tmp_path / method / "results.json").read_text())
        assert results["hardware"]["replicas"] == 2
        assert len(results["weights_sha256"]) == 1, method
        if method == "rwp":
            assert results["final"]["rwp"]["placement"] == "parallel"
            assert results["final"]["rwp"]["slots"] == {
                "clean": 4,
                "perturbed": 4,
            }  # two epochs of one step of two parts


def train_all_methods(folder):
    """Runs on each of two ranks."""
    recipe = load_recipe()
    recipe.load_images = few_digits
    recipe.Accelerator.end_training = lambda _: None  # keeps the process group for the next method
    for method in ("base", "rwp", "sam"):
        train(recipe, Path(folder, method), f"--method={method}", "--gradient_accumulation_steps=2")


# What it computes, against loops written out


@pytest.fixture
def fixed(recipe, monkeypatch):
    """The recipe on three fixed batches, one epoch, a constant learning rate; gives a copy of its model, and those."""
    images, labels = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(96) % 10
    model = timm.create_model("test_resnet", num_classes=10)
    monkeypatch.setattr(recipe.timm, "create_model", lambda *_, **__: model)
    monkeypatch.setattr(
        recipe, "build_loader", lambda *_, batch_size, **__: DataLoader(TensorDataset(images, labels), batch_size)
    )
    schedule = SimpleNamespace(step_update=lambda _: None)
    monkeypatch.setattr(recipe, "create_scheduler_v2", lambda *_, **__: (schedule, None))
    return SimpleNamespace(
        trained=model,
        model=copy.deepcopy(model).train(),
        batches=list(zip(images.split(32), labels.split(32), strict=True)),
    )


def sgd(model):
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 5e-4},
        {"params": [p for p in model.parameters() if p.ndim < 2]},
    ]
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True)


def gradient(model, images, labels):
    return torch.autograd.grad(cross_entropy(model(images), labels), list(model.parameters()))


def step(model, optimizer, gradients):
    for parameter, value in zip(model.parameters(), gradients, strict=True):
        parameter.grad = value
    optimizer.step()


def restored(model, buffers):
    """`model` with the buffers given: those of its passes at clean weights."""
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def buffers_of(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(trained, expected):
    for (name, actual), value in zip(trained.state_dict().items(), expected.state_dict().values(), strict=True):
        if not name.endswith("num_batches_tracked"):  # SAM's helper counts the second pass; no momentum here reads it
            torch.testing.assert_close(
                actual, value, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_base_with_accumulation_is_the_mean_of_its_parts(recipe, fixed, tmp_path):
    train(recipe, tmp_path, "--method=base", "--epochs=1", "--gradient_accumulation_steps=4")
    optimizer = sgd(fixed.model)
    for images, labels in fixed.batches:
        parts = [gradient(fixed.model, *part) for part in zip(images.split(8), labels.split(8), strict=True)]
        step(fixed.model, optimizer, [sum(part) / 4 for part in zip(*parts, strict=True)])
    assert_same(fixed.trained, fixed.model)


@pytest.mark.parametrize(("accumulation", "alpha"), [(1, 0.5), (1, 0.2), (4, 0.2)])
def test_rwp_mixes_alternate_parts_of_the_batch(recipe, fixed, tmp_path, accumulation, alpha):
    """With a noise too small to see, what remains of RWP: the weights alpha, and statistics from clean parts alone."""
    flags = [f"--gradient_accumulation_steps={accumulation}", f"--rwp_alpha={alpha}"]
    train(recipe, tmp_path, "--epochs=1", "--rwp_gamma=1e-12", *flags)
    optimizer, parts = sgd(fixed.model), max(accumulation, 2)
    for images, labels in fixed.batches:
        mix = [torch.zeros_like(p) for p in fixed.model.parameters()]
        for index, part in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            clean = buffers_of(fixed.model)
            for total, value in zip(mix, gradient(fixed.model, *part), strict=True):
                total += value * (alpha if index % 2 else 1 - alpha) / (parts / 2)
            if index % 2:
                restored(fixed.model, clean)
        step(fixed.model, optimizer, mix)
    assert_same(fixed.trained, fixed.model)


def test_sam_is_sam(recipe, fixed, tmp_path):
    """arXiv 2010.01412, algorithm 1: the gradient at w + rho * g / ||g||, in place of g."""
    train(recipe, tmp_path, "--method=sam", "--epochs=1", "--sam_rho=0.2")
    optimizer, parameters = sgd(fixed.model), list(fixed.model.parameters())
    for images, labels in fixed.batches:
        ascent = gradient(fixed.model, images, labels)
        norm = torch.cat([value.flatten() for value in ascent]).norm()
        clean, before = buffers_of(fixed.model), [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, ascent, strict=True):
                parameter += 0.2 * value / norm
        descent = gradient(fixed.model, images, labels)
        restored(fixed.model, clean)
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        step(fixed.model, optimizer, descent)
    assert_same(fixed.trained, fixed.model)


@pytest.mark.parametrize("flags", [["--rwp_gamma=0"], ["--rwp_alpha=0"], ["--rwp_start=1"], ["--rwp=false"]])
def test_without_noise_it_is_the_base_method_to_the_bit(recipe, tmp_path, flags):
    base = weights(results_of(recipe, tmp_path / "base", "--method=base"))
    assert weights(results_of(recipe, tmp_path / "same", *flags)) == base
    assert weights(results_of(recipe, tmp_path / "other")) != base


def test_noise_begins_at_the_start_fraction(recipe, tmp_path):
    history = results_of(recipe, tmp_path, "--rwp_start=0.5")["history"]
    assert [row["rwp"]["slots"]["perturbed"] for row in history] == [0, 3]


def test_accuracy_is_that_of_the_saved_weights(recipe, tmp_path):
    final = results_of(recipe, tmp_path)["final"]
    model = timm.create_model("test_resnet", num_classes=10)
    model.load_state_dict(load_file(tmp_path / "checkpoints" / "epoch_2" / "model.safetensors"))
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config({"img_size": 16, "crop_pct": 1.0}, model=model)
    )
    split = few_digits()["validation"]
    images = torch.stack([transform(image.convert("RGB")) for image in split["image"]])
    with torch.no_grad():
        ranking = model.eval()(images).argsort(dim=1, descending=True)
    hits = ranking == torch.tensor(split["label"][:])[:, None]
    assert final["top1"] == pytest.approx(hits[:, 0].float().mean().item())
    assert final["top5"] == pytest.approx(hits[:, :5].float().sum(1).mean().item())


def test_an_interrupt_leaves_clean_weights(recipe, fixed, monkeypatch, tmp_path):
    losses = []

    def interrupted(logits, labels):
        losses.append(cross_entropy(logits, labels))
        if len(losses) == 2:  # the first batch's perturbed half: noise is in the weights
            raise KeyboardInterrupt
        return losses[-1]

    monkeypatch.setattr(recipe, "cross_entropy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path)
    for actual, clean in zip(fixed.trained.parameters(), fixed.model.parameters(), strict=True):
        assert torch.equal(actual, clean)


# What it writes


def test_results_say_what_was_run_and_nothing_about_whose_machine(recipe, tmp_path, capsys):
    results = results_of(recipe, tmp_path)
    assert len(results["history"]) == 2
    for row in results["history"]:
        assert row["train_loss"] == pytest.approx((row["loss_clean"] + row["loss_perturbed"]) / 2)
        assert row["loss_gap"] == pytest.approx(row["loss_perturbed"] - row["loss_clean"])
    final = results["final"]
    assert final["rwp"]["slots"] == {"clean": 6, "perturbed": 6}
    # gamma * sqrt(fan_in) of layer4.0.conv1, 96 filters of 192 * 3 * 3
    assert final["rwp"]["relative_noise"]["largest"]["size"] == pytest.approx(0.01 * (192 * 9) ** 0.5, rel=0.05)
    assert results["seconds"] == pytest.approx(sum(row["seconds"] for row in results["history"]))
    assert results["arguments"]["lr"] == 0.02
    assert results["versions"]["torch"] == torch.__version__
    assert results["hardware"]["replicas"] == 1
    written = (tmp_path / "results.json").read_text()
    for private in (str(tmp_path), str(Path.home()), socket.gethostname(), getpass.getuser()):
        assert f'"{private}' not in written

    table = capsys.readouterr().out
    for cell in (
        f"{final['top1']:.2%}",
        f"{final['top5']:.2%}",
        "sequential",
        "6 / 6",
        f"{final['loss_perturbed']:.4f}",
    ):
        assert cell in table


# Checkpoints


@pytest.mark.parametrize(
    "flags",
    [
        ["--workers=1"],
        ["--rwp_eta=0.1", "--rwp_schedule=cosine", "--rwp_growth=3"],
        ["--gradient_accumulation_steps=4"],
        ["--method=base"],
        ["--method=sam"],
    ],
    ids=" ".join,
)
def test_resuming_after_an_epoch_is_bit_exact(recipe, tmp_path, flags):
    whole = results_of(recipe, tmp_path / "whole", *flags)
    folder = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", folder)
    shutil.rmtree(folder / "checkpoints" / "epoch_2")
    again = results_of(recipe, folder, *flags, "--resume_from_checkpoint=latest")
    assert weights(again) == weights(whole)
    for row, expected in zip(again["history"], whole["history"], strict=True):
        for figures in (row, expected):
            del figures["seconds"], figures["images_per_second"]
        assert row == expected


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed_runs_end_in_the_same_bits(tmp_path, kills):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_recipes\n"
        f"test_recipes.kill_and_resume({str(tmp_path)!r}, {kills})"
    )
    run = launch("-c", code)
    assert run.returncode == 0, run.stderr
    whole, killed = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed"))
    assert weights(killed) == weights(whole)
    assert [row["top1"] for row in killed["history"]] == [row["top1"] for row in whole["history"]]
    assert killed["final"]["rwp"]["slots"] == whole["final"]["rwp"]["slots"]
    checkpoints = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir() if not path.suffix)
    assert checkpoints == sorted(f"epoch_{epoch}" for epoch in (kills + 1, kills + 2))


def kill_and_resume(folder, kills):
    """Trains in forks of this process, which imports the recipe once: the first unharmed, the others killed.

    A fork dies by SIGKILL ahead of its n-th event: an optimizer step, or a part of writing or removing a checkpoint.
    """
    recipe, chance = load_recipe(), random.Random(0)
    recipe.load_images = few_digits

    def dies_before_event(last):
        events = iter(range(1, last))

        def counted(function):
            def call(*arguments, **options):
                if next(events, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        for owner, name in (
            (recipe.RWP, "step"),
            (recipe.Accelerator, "save_state"),
            (Path, "write_text"),
            (Path, "rename"),
            (shutil, "rmtree"),
        ):
            setattr(owner, name, counted(getattr(owner, name)))

    def run(name, *flags, last=None):
        process = os.fork()
        if process == 0:
            if last:
                dies_before_event(last)
            train(recipe, Path(folder, name), f"--epochs={kills + 2}", *flags)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def resume():
        return ["--resume_from_checkpoint=latest"] if recipe.checkpoints_in(Path(folder, "killed")) else []

    assert run("whole") == 0
    for last in [6, *(chance.randint(1, 10) for _ in range(kills - 1))]:  # 6: written, and not yet renamed
        assert run("killed", *resume(), last=last) == -signal.SIGKILL
    assert run("killed", *resume()) == 0


def test_a_new_run_replaces_a_finished_one_but_not_an_unfinished_one(recipe, tmp_path):
    first = results_of(recipe, tmp_path)
    assert weights(results_of(recipe, tmp_path, "--epochs=1")) != weights(first)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch_1"]
    (tmp_path / "results.json").unlink()
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        train(recipe, tmp_path)


def test_an_earlier_checkpoint_is_a_new_beginning(recipe, tmp_path):
    whole = results_of(recipe, tmp_path, "--epochs=4")
    checkpoints = tmp_path / "checkpoints"
    again = results_of(recipe, tmp_path, "--epochs=4", f"--resume_from_checkpoint={checkpoints / 'epoch_3'}")
    assert weights(again) == weights(whole)
    other = results_of(recipe, tmp_path, "--epochs=5", f"--resume_from_checkpoint={checkpoints / 'epoch_3'}")
    assert [row["epoch"] for row in other["history"]] == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["epoch_4", "epoch_5"]


# Flags


def test_defaults_follow_the_data(recipe):
    digits = recipe.Arguments()
    assert (digits.image_size, digits.hflip, digits.output_dir) == (32, 0, "outputs/digits_rwp_seed0")
    other = recipe.Arguments(data_dir="some/pets", method="sam", seed=3, crop_pct=0.9)
    assert (other.image_size, other.hflip, other.output_dir) == (None, 0.5, "outputs/pets_sam_seed3")
    assert other.crop_pct == 0.9


def test_method_and_rwp_agree(recipe):
    for flags, method in (
        ([], "rwp"),
        (["--rwp", "false"], "base"),
        (["--method", "base"], "base"),
        (["--method", "sam"], "sam"),
    ):
        args = parse_arguments(recipe.Arguments, flags)
        assert (args.method, args.rwp) == (method, method == "rwp")


def test_a_file_of_flags(recipe, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("rwp_gamma: 2e-2\nepochs: 1\nseed: 5\n")
    arguments = results_of(recipe, tmp_path / "out", f"--config={config}", "--epochs=1", "--seed=6")["arguments"]
    assert (arguments["rwp_gamma"], arguments["seed"]) == (0.02, 6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=resnet_18"], "Similar names:.* resnet18"),
        (["--batch_size=33"], "clean and a perturbed.* multiple of 2"),
        (["--batch_size=1"], "clean and a perturbed.* multiple of 2"),
        (["--gradient_accumulation_steps=5"], "5 parts.* multiple of 5"),
        (["--batch_size=101", "--method=base"], "100 images make no whole batch of 101"),
        (["--epochs=0"], "epochs=0"),
        (["--rwp_alpha=2"], "rwp_alpha=2"),
        (["--seed=-1"], "non-negative"),
        (["--resume_from_checkpoint=latest"], "holds no checkpoint"),
    ],
)
def test_what_cannot_work_is_refused_before_training(recipe, tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(recipe, tmp_path, *flags)


def test_an_odd_batch_is_fine_where_nothing_is_split(recipe, tmp_path):
    assert results_of(recipe, tmp_path / "alpha", "--batch_size=33", "--epochs=1", "--rwp_alpha=1")["final"]["rwp"][
        "slots"
    ] == {
        "clean": 0,
        "perturbed": 3,
    }
    train(recipe, tmp_path / "gamma", "--batch_size=33", "--epochs=1", "--rwp_gamma=0")


def test_accumulation_by_accelerate_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ValueError, match="recipe's own flag"):
        train(recipe, tmp_path)


def test_sam_with_a_gradient_scaler_is_refused(recipe, tmp_path, monkeypatch):
    class Scaled(recipe.Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu")

    monkeypatch.setattr(recipe, "Accelerator", Scaled)
    with pytest.raises(ValueError, match="bf16"):
        train(recipe, tmp_path, "--method=sam")


def test_a_checkpoint_of_another_method_or_a_longer_run_is_refused(recipe, tmp_path):
    train(recipe, tmp_path, "--method=base", "--epochs=2")
    for flags in (["--method=rwp", "--epochs=2"], ["--method=base", "--epochs=1"]):
        with pytest.raises(ValueError, match="from epoch 2 of method 'base'"):
            train(recipe, tmp_path, *flags, "--resume_from_checkpoint=latest")

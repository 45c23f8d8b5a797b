"""recipes/imagenet_rwp.py: what it computes, writes and refuses. test_imagenet_runs.py has its long runs."""

import copy
import getpass
import math
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import distributed
import pytest
import timm
import torch
from datasets import Image
from imagenet import (
    RECIPE,
    SMALL,
    SUPPORT,
    empty_pictures,
    few_digits,
    launch,
    load_recipe,
    results,
    results_of,
    train,
    train_on_rank,
    weights,
)
from safetensors.torch import load_file
from sklearn.metrics import top_k_accuracy_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from terminal import drawn_by
from torch.nn.functional import cross_entropy

from hf_rwp.images.data import load_images
from hf_rwp.runs.parsing import parse_arguments

# As a user starts it


@pytest.mark.parametrize(
    ("flags", "epochs", "top1"),
    [
        (["--seed=0", "--epochs=4"], 4, 0.95),
        *(pytest.param([f"--seed={seed}"], 10, 0.985, marks=pytest.mark.slow) for seed in range(5)),
    ],
)
def test_no_arguments_learn_the_digits(tmp_path, flags, epochs, top1):
    run = launch(RECIPE, *flags, f"--output_dir={tmp_path}")
    assert run.returncode == 0, run.stderr
    found = results(tmp_path)
    assert found["final"]["top1"] >= top1
    assert (found["arguments"]["method"], found["final"]["rwp"]["placement"]) == ("rwp", "sequential")
    assert found["final"]["rwp"]["slots"] == {"clean": 22 * epochs, "perturbed": 22 * epochs}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(rf"Wrote\s+to\s+{re.escape(str(tmp_path))}:\s+results\.json", run.stdout)
    assert "%|" not in run.stderr  # no progress bar where there is no terminal


def test_two_replicas_share_the_work(tmp_path):
    """41 images for evaluation on two replicas with batches of 32: 32 on the one, 9 on the other."""
    assert distributed.run(2, train_on_rank, tmp_path, "--gradient_accumulation_steps=2") == ["", ""]
    found = results(tmp_path)
    assert found["hardware"]["replicas"] == 2
    assert len(found["replicas_sha256"]) == 1
    assert found["final"]["rwp"]["placement"] == "parallel"
    # two epochs of one step of two parts
    assert found["final"]["rwp"]["slots"] == {"clean": 4, "perturbed": 4}
    assert_accuracy_is_that_of_the_weights(tmp_path, "step_2")


@pytest.mark.parametrize("method", ["base", "sam"])
def test_replicas_of_every_method_end_bit_equal(tmp_path, method):
    assert distributed.run(2, train_on_rank, tmp_path, f"--method={method}", "--epochs=1") == ["", ""]
    assert len(results(tmp_path)["replicas_sha256"]) == 1


def test_one_bar_for_all_of_training_on_a_terminal(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import imagenet\n"
        "recipe = imagenet.load_recipe(); recipe.load_images = imagenet.few_digits\n"
        f"imagenet.train(recipe, {str(tmp_path)!r}, '--logging_steps=1')"
    )
    status, text = drawn_by("-c", code)
    assert status == 0, text
    shown = [part for part in re.split(r"[\r\n]", text) if "%|" in part]
    assert {re.search(r"epoch \d+/\d+", part)[0] for part in shown} == {"epoch 1/2", "epoch 2/2"}
    assert max(map(len, shown)) <= 80
    percents = [int(re.search(r"(\d+)%", part)[1]) for part in shown]
    assert percents == sorted(percents)
    assert min(int(re.search(r"(\d+)%", part)[1]) for part in shown if "epoch 2/2" in part) == 50
    assert re.search(r"epoch \d/2: +\d+%\|.*\| \d\d:\d\d left, loss \d\.\d{4}, [\d,.]+ images/s", text), text


def test_the_first_command_works_twice_and_says_what_comes_next(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "pictures_of_run", empty_pictures)
    flags, first = [*SMALL, "--epochs=1", "--save_total_limit=1"], Path("outputs/digits_rwp_seed0")
    for folder in (first, first / "2"):
        recipe.main(parse_arguments(recipe.Arguments, flags))
        assert (folder / "results.json").is_file()
        said = capsys.readouterr().out
        assert f"writes to: {folder}\n" in said
        assert "epoch 1/1 done: loss " in said
        assert "\n\nRWP took 3 of 6 gradients with noise in the weights. Noise of 42 %" in said
        for command in (
            f"hf-rwp predict {folder} IMAGE ",
            f"hf-rwp landscape {folder} ",  # as no tracker was wanted
            "hf-rwp train --rwp=false --img_size=16 --batch_size=32 --lr=0.02 --report_to=none",
        ):
            assert f"\n{command}" in said.replace(" \\\n   ", "")
        (wrote,) = re.findall(rf"^Wrote to {folder}: ([^#]*)\n\n", said, re.MULTILINE)
        files = ["results.json", "model", "curves.png", "confusion.png", "checkpoints/step_3"]
        assert wrote.replace("\n", " ").split(", ") == files
        assert (f"\nhf-rwp curves {folder} {first}" in said) is (folder != first)
    with pytest.raises(FileExistsError, match="holds a finished run"):
        recipe.main(parse_arguments(recipe.Arguments, [*flags, f"--output_dir={first}"]))
    recipe.main(parse_arguments(recipe.Arguments, ["--resume_from_checkpoint=latest", "--epochs=2"]))
    assert [len(results(folder)["history"]) for folder in (first, first / "2")] == [1, 2]
    recipe.main(parse_arguments(recipe.Arguments, [f"--resume_from_checkpoint={first}", "--epochs=2"]))
    assert len(results(first)["history"]) == 2
    assert not (first / "3").exists()
    capsys.readouterr()
    recipe.main(parse_arguments(recipe.Arguments, [f"--resume_from_checkpoint={first}"]))
    assert (
        "\nnothing is left to train: 2 epochs are behind this run. A larger --epochs goes on\n"
        in capsys.readouterr().out
    )
    recipe.main(parse_arguments(recipe.Arguments, [*flags, "--overwrite_output_dir"]))
    assert len(results(first)["history"]) == 1


# What it computes, against loops written out


class FixedBatches(list):
    """In place of a training loader."""

    unreadable = SimpleNamespace(slots=[])

    def set_epoch(self, epoch, start):
        pass


@pytest.fixture
def fixed(recipe, monkeypatch):
    """The recipe on three fixed batches, one epoch, a constant learning rate; gives a copy of its model, and those."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (96, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.arange(96) % 10
    batches = FixedBatches(zip(pixels.split(32), labels.split(32), strict=True))
    torch.manual_seed(0)  # for some models a step of SAM amplifies rounding
    model = timm.create_model("test_resnet", num_classes=10)
    monkeypatch.setattr("timm.create_model", lambda *_, **__: model)
    build = recipe.build_loader
    monkeypatch.setattr(
        recipe, "build_loader", lambda *splits, **options: batches if options["training"] else build(*splits, **options)
    )
    schedule = SimpleNamespace(step_update=lambda _: None)
    monkeypatch.setattr(recipe, "create_scheduler", lambda args, *_, **__: (schedule, args.epochs))
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    images = (pixels / 255 - mean) / std
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


def test_without_noise_it_is_the_base_method_to_the_bit(recipe, tmp_path):
    base = weights(results_of(recipe, tmp_path / "base", "--method=base", "--epochs=1"))
    for flag in ("--rwp_gamma=0", "--rwp_alpha=0", "--rwp_start=1", "--rwp=false"):
        assert weights(results_of(recipe, tmp_path / flag, flag, "--epochs=1")) == base, flag
    assert weights(results_of(recipe, tmp_path / "other", "--epochs=1")) != base


def test_noise_begins_at_the_start_fraction(recipe, tmp_path):
    history = results_of(recipe, tmp_path, "--rwp_start=0.5")["history"]
    assert [row["rwp"]["slots"]["perturbed"] for row in history] == [0, 3]


def test_accuracy_is_that_of_the_saved_weights(recipe, tmp_path):
    train(recipe, tmp_path)
    assert_accuracy_is_that_of_the_weights(tmp_path, "step_6")


def assert_accuracy_is_that_of_the_weights(folder, checkpoint):
    """Against scikit-learn, on images that timm prepares."""
    final = results(folder)["final"]
    model = timm.create_model("test_resnet", num_classes=10)
    model.load_state_dict(load_file(folder / "checkpoints" / checkpoint / "model.safetensors"))
    config = timm.data.resolve_data_config({"img_size": 16, "crop_pct": 1.0}, model=model)
    transform, split = timm.data.create_transform(**config), few_digits()["validation"]
    images = torch.stack([transform(Image().decode_example(image).convert("RGB")) for image in split["image"]])
    with torch.no_grad():
        logits, labels = model.eval()(images), split["label"][:]
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, logits, k=k, labels=range(10))
        assert final[f"top{k}"] == pytest.approx(expected)
    assert final["eval_loss"] == pytest.approx(cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-4)


def test_an_interrupt_leaves_clean_weights(recipe, fixed, monkeypatch, tmp_path):
    losses = []

    def interrupted(logits, labels, **options):
        losses.append(cross_entropy(logits, labels, **options))
        if len(losses) == 2:  # the first batch's perturbed half: noise is in the weights
            raise KeyboardInterrupt
        return losses[-1]

    monkeypatch.setattr(recipe, "cross_entropy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path)
    for actual, clean in zip(fixed.trained.parameters(), fixed.model.parameters(), strict=True):
        assert torch.equal(actual, clean)


# timm's parts, where they meet RWP's


def test_mixup_pairs_images_of_one_gradient(recipe, fixed, monkeypatch, tmp_path):
    """timm mixes image i with image B-1-i: on the whole batch, each half would hold the other's images."""
    mixed, original = [], recipe.Mixup.__call__

    def spy(self, images, targets):
        before = images.clone()
        after, soft = original(self, images, targets)
        mixed.append((before, after, targets, soft))
        return after, soft

    monkeypatch.setattr(recipe.Mixup, "__call__", spy)
    train(recipe, tmp_path, "--epochs=1", "--mixup=1", "--smoothing=0.1")
    assert len(mixed) == 6
    for number, (before, after, targets, soft) in enumerate(mixed):
        part = fixed.batches[number // 2][0].chunk(2)[number % 2]
        torch.testing.assert_close(before, part, rtol=1e-4, atol=1e-4)
        lam = ((after - before.flip(0)).flatten(1).norm() / (before - before.flip(0)).flatten(1).norm()).item()
        torch.testing.assert_close(after, lam * before + (1 - lam) * before.flip(0), rtol=1e-3, atol=1e-3)
        smooth = torch.full((16, 10), 0.01).scatter(1, targets[:, None], 0.91)
        torch.testing.assert_close(soft, lam * smooth + (1 - lam) * smooth.flip(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["norm", "value"])
def test_gradients_are_clipped_once_a_step(recipe, fixed, tmp_path, mode):
    train(recipe, tmp_path, "--method=base", "--epochs=1", "--clip_grad=0.01", f"--clip_mode={mode}")
    optimizer = sgd(fixed.model)
    for images, labels in fixed.batches:
        gradients = gradient(fixed.model, images, labels)
        if mode == "norm":
            norm = torch.cat([value.flatten() for value in gradients]).norm()
            gradients = [value * (0.01 / norm).clamp(max=1) for value in gradients]
        else:
            gradients = [value.clamp(-0.01, 0.01) for value in gradients]
        step(fixed.model, optimizer, gradients)
    assert_same(fixed.trained, fixed.model)


def test_layer_decay_scales_the_learning_rate_of_every_layer(recipe, monkeypatch, tmp_path):
    seen = []
    original = recipe.RWP.step

    def spy(self, *arguments):
        seen.append({group["lr_scale"]: group["lr"] for group in self.param_groups})
        return original(self, *arguments)

    monkeypatch.setattr(recipe.RWP, "step", spy)
    flags = ["--model=test_vit", "--opt=adamw", "--layer_decay=0.5", "--lr=0.01", "--warmup_epochs=0", "--epochs=1"]
    train(recipe, tmp_path, *flags)
    assert len(seen[0]) > 3
    for scales in seen:
        rates = {lr / scale for scale, lr in scales.items()}
        assert max(rates) == pytest.approx(min(rates))
    assert seen[0][1.0] == 0.01 > seen[-1][1.0]


@pytest.mark.parametrize("mixed", [False, True])
def test_losses_are_timms(recipe, mixed):
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    targets = torch.rand(6, 10).softmax(1) if mixed else torch.arange(6)
    one_hot = targets if mixed else torch.nn.functional.one_hot(targets, 10).float()
    for flags, smooth in (([], 0.0), (["--smoothing=0.2"], 0.2)):
        loss = recipe.create_criterion(parse_arguments(recipe.Arguments, flags), mixed)(logits, targets)
        expected = one_hot if mixed else one_hot * (1 - smooth) + smooth / 10
        torch.testing.assert_close(loss, -(expected * logits.log_softmax(1)).sum(1).mean())
    flags = ["--bce_loss", "--bce_target_thresh=0.1", "--bce_sum"]
    loss = recipe.create_criterion(parse_arguments(recipe.Arguments, flags), mixed)(logits, targets)
    hard = (one_hot > 0.1).float()
    elements = torch.nn.functional.binary_cross_entropy_with_logits(logits, hard, reduction="none")
    torch.testing.assert_close(loss, elements.sum(1).mean())


def sync_groups(alpha):
    """The ranks whose BatchNorm statistics this one shares; an average of the weights, made before, follows them."""
    recipe = load_recipe()
    plain = timm.create_model("test_resnet")
    ema = recipe.ModelEmaV3(plain, 0.5)
    module = recipe.sync_bn(plain, torch.device("cuda"), distributed.rank(), 4, alpha)
    ema.update(module, step=1)
    assert all(map(torch.equal, ema.module.state_dict().values(), module.state_dict().values()))
    groups = {layer.process_group for layer in module.modules() if isinstance(layer, torch.nn.SyncBatchNorm)}
    assert len(groups) == 1
    assert not any(type(layer) is torch.nn.BatchNorm2d for layer in module.modules())
    return torch.distributed.get_process_group_ranks(groups.pop())


def test_sync_bn_joins_the_replicas_of_one_role():
    """On gloo ranks that say they have GPUs: the layers themselves run on those alone."""
    assert distributed.run(4, sync_groups, 0.5) == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert distributed.run(4, sync_groups, 0.0) == [[0, 1, 2, 3]] * 4


def test_sync_bn_needs_gpus(recipe, tmp_path):
    with pytest.raises(ValueError, match="sync_bn needs GPUs"):
        train(recipe, tmp_path, "--sync_bn")


def test_channels_last_learns_the_same(recipe, tmp_path, monkeypatch):
    formats, original = [], recipe.BatchTransform.__call__

    def spy(self, images):
        formats.append(original(self, images).is_contiguous(memory_format=torch.channels_last))
        return original(self, images)

    plain = results_of(recipe, tmp_path / "plain")["final"]["train_loss"]
    monkeypatch.setattr(recipe.BatchTransform, "__call__", spy)
    last = results_of(recipe, tmp_path / "last", "--channels_last")["final"]["train_loss"]
    assert last == pytest.approx(plain, rel=1e-3)
    assert all(formats)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_learns_the_same(recipe, tmp_path, monkeypatch, backend):
    plain = results_of(recipe, tmp_path / "plain")["final"]
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given, **options: compiler(*given, **options | {"backend": backend}))
    torch._dynamo.utils.counters.clear()
    compiled = results_of(recipe, tmp_path / "compiled", "--torch_compile")["final"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name in ("train_loss", "loss_clean", "loss_perturbed"):
        assert compiled[name] == pytest.approx(plain[name], rel=1e-3)


def test_mixed_precision_is_what_the_flag_says(recipe, tmp_path):
    found = results_of(recipe, tmp_path, "--mixed_precision=bf16", "--model=test_vit", "--epochs=1")
    assert found["hardware"]["mixed_precision"] == "bf16"


def test_the_schedule_is_warm_up_and_cosine_per_update_also_after_resuming(recipe, monkeypatch, tmp_path):
    rates, original = [], recipe.RWP.step

    def spy(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return original(self, *arguments)

    monkeypatch.setattr(recipe.RWP, "step", spy)
    train(recipe, tmp_path, "--epochs=3", "--min_lr=0.001", "--warmup_lr=0.002", "--cooldown_epochs=1")
    warm_up = [0.002 + (0.02 - 0.002) * step / 3 for step in range(3)]
    cosine = [0.001 + (0.02 - 0.001) * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(3, 9)]
    assert rates == pytest.approx([*warm_up, *cosine, 0.001, 0.001, 0.001])
    rates.clear()
    (tmp_path / "results.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "step_12")
    flags = ["--epochs=3", "--min_lr=0.001", "--warmup_lr=0.002", "--cooldown_epochs=1"]
    train(recipe, tmp_path, *flags, "--resume_from_checkpoint=latest")
    assert rates == pytest.approx([0.001] * 3)


def test_nothing_is_mixed_from_the_epoch_given(recipe, monkeypatch, tmp_path):
    mixed, original = [], recipe.Mixup.__call__

    def spy(self, images, targets):
        before = images.clone()
        after = original(self, images, targets)
        mixed.append(not torch.equal(after[0], before))
        return after

    monkeypatch.setattr(recipe.Mixup, "__call__", spy)
    train(recipe, tmp_path, "--mixup=1", "--mixup_off_epoch=1")
    assert mixed == [True] * 6 + [False] * 6


def test_trackers_get_the_figures(recipe, tmp_path):
    found = results_of(recipe, tmp_path, "--report_to=tensorboard", "--logging_steps=2")
    events = EventAccumulator(str(tmp_path / "logs" / "hf_rwp")).Reload()
    assert {"loss", "loss_clean", "loss_perturbed", "loss_gap", "learning_rate", "top1", "top5"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("loss")] == [2, 3, 4, 6]
    assert [event.value for event in events.Scalars("gamma")] == pytest.approx([0.01] * 4)
    sizes = [row["rwp"]["relative_noise"]["largest"]["size"] for row in found["history"]]
    assert [event.value for event in events.Scalars("noise_size_largest")] == pytest.approx(sizes)
    folders = {file.parent for file in (tmp_path / "logs").rglob("*") if file.is_file()}
    assert folders == {tmp_path / "logs" / "hf_rwp"}  # one run
    assert [event.value for event in events.Scalars("top1")] == pytest.approx([row["top1"] for row in found["history"]])


# What it writes


def test_results_say_what_was_run_and_nothing_about_whose_machine(recipe, tmp_path, capsys):
    found = results_of(recipe, tmp_path)
    assert len(found["history"]) == 2
    for row in found["history"]:
        assert row["train_loss"] == pytest.approx((row["loss_clean"] + row["loss_perturbed"]) / 2)
        assert row["loss_gap"] == pytest.approx(row["loss_perturbed"] - row["loss_clean"])
    final = found["final"]
    assert final["rwp"]["slots"] == {"clean": 6, "perturbed": 6}
    # gamma * sqrt(fan_in) of layer4.0.conv1, 96 filters of 192 * 3 * 3
    assert final["rwp"]["relative_noise"]["largest"]["size"] == pytest.approx(0.01 * (192 * 9) ** 0.5, rel=0.05)
    assert found["seconds"] == pytest.approx(sum(row["seconds"] for row in found["history"]))
    assert found["arguments"]["lr"] == 0.02
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["replicas"] == 1
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


# Flags


def test_defaults_follow_the_data(recipe):
    digits = recipe.Arguments()
    assert (digits.img_size, digits.hflip, digits.output_dir) == (32, 0, "outputs/digits_rwp_seed0")
    other = recipe.Arguments(data_dir="some/pets", method="sam", seed=3, crop_pct=0.9)
    assert (other.img_size, other.hflip, other.output_dir) == (None, 0.5, "outputs/pets_sam_seed3")
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
        (["--epochs=0"], "epochs must be at least 1, got 0"),
        (["--rwp_alpha=2"], "rwp_alpha must be .*, got 2"),
        (["--seed=-1"], "seed must be .*, got -1"),
        (["--opt=adahessian"], "opt must be .*second derivatives, got 'adahessian'"),
        (["--opt=agd"], "one of timm's optimizers, got 'agd'.*adagrad"),
        (["--sched=plateau"], "sched must be .*, got 'plateau'"),
        (["--batch_size=34", "--mixup=1"], "parts of 17 images.*multiple of 4"),
        (["--aug_repeats=3"], "clean and in the perturbed.*multiple of 6"),
        (["--report_to=mlflow"], "unknown tracker 'mlflow'"),
        (["--model_kwargs=[1]"], "must be a mapping.*, got"),
        (["--model_kwargs={nothing: 1}"], "nothing"),
        (["--eval_only"], "nothing to evaluate"),
        (["--opt_betas=0.9"], "opt_betas must be two numbers.*, got"),
        (["--aa=trivial"], "aa='trivial'"),
        (["--model=pit_ti_224"], "takes images of 224 pixels"),
        (["--drop=1"], "drop must be .*, got 1"),
        (["--sam_rho=0"], "sam_rho must be above 0, got 0"),
        (["--cutout=16"], "cutout=16.*16 pixels"),
        (["--pretrained=absent/folder"], "absent/folder"),
        (["--resume_from_checkpoint=latest"], "holds no complete checkpoint"),
    ],
)
def test_what_cannot_work_is_refused_before_training(recipe, tmp_path, flags, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        train(recipe, tmp_path, *flags)
    assert list(tmp_path.iterdir()) == []


def test_an_odd_batch_is_fine_where_nothing_is_split(recipe, tmp_path):
    assert results_of(recipe, tmp_path / "alpha", "--batch_size=33", "--epochs=1", "--rwp_alpha=1")["final"]["rwp"][
        "slots"
    ] == {
        "clean": 0,
        "perturbed": 3,
    }
    train(recipe, tmp_path / "gamma", "--batch_size=33", "--epochs=1", "--rwp_gamma=0")


def test_repeats_that_stay_in_one_gradient_are_fine(recipe, tmp_path):
    """Three parts of ten images, five images twice each; and plain training, which has one gradient."""
    train(recipe, tmp_path / "parts", "--aug_repeats=2", "--batch_size=30", "--gradient_accumulation_steps=3")
    train(recipe, tmp_path / "base", "--aug_repeats=3", "--method=base")


def test_a_tracker_that_is_not_installed_is_refused(recipe, monkeypatch):
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        recipe.Arguments(report_to=["wandb"])


def test_accumulation_by_accelerate_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 2, and would count beside"):
        train(recipe, tmp_path)


def test_sam_with_a_gradient_scaler_is_refused(recipe, tmp_path, monkeypatch):
    class Scaled(recipe.Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu")

    monkeypatch.setattr(recipe, "Accelerator", Scaled)
    with pytest.raises(ValueError, match="bf16"):
        train(recipe, tmp_path, "--method=sam")


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*file' cannot be written to"):
        train(recipe, tmp_path / "file")


def test_antithetic_noise_gets_its_pairs_on_one_replica(recipe, tmp_path):
    """From four quarters of each batch: three steps, two clean and two perturbed gradients in each."""
    found = results_of(recipe, tmp_path, "--rwp_antithetic=true", "--epochs=1")
    assert found["final"]["rwp"]["slots"] == {"clean": 6, "perturbed": 6}
    with pytest.raises(ValueError, match="batch_size=30 cannot be cut into 4 parts: set a multiple of 4"):
        train(recipe, tmp_path / "odd", "--rwp_antithetic=true", "--batch_size=30")


def test_a_refusal_leaves_no_folder_behind(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "load_images", load_images)
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        train(recipe, tmp_path / "outputs/run", f"--data_dir={tmp_path / 'photos'}")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to"):
        train(recipe, tmp_path / "file/run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photos"]


def test_flags_are_checked_before_a_run_that_is_there_is_refused(recipe, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="batch_size=31 cannot be cut into halves"):
        train(recipe, tmp_path, "--batch_size=31")
    with pytest.raises(FileExistsError, match="holds a finished run"):
        train(recipe, tmp_path)

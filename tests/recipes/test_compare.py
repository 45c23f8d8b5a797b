"""recipes/compare.py: the terms are equal, the search is fair, and a run that was cut ends in the same figures."""

import copy
import json
import os
import re
import shutil
import signal

import distributed
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from imagenet import RECIPES, few_digits, load_recipe
from torch.nn.functional import cross_entropy

from hf_rwp.experiments import training as experiment
from hf_rwp.runs import parsing
from hf_rwp.runs.methods import CONTROLS
from hf_rwp.runs.parsing import parse_arguments
from hf_rwp.runs.records import read_records

TINY = ["--img_size=16", "--batch_size=20", "--epochs=2", "--lr=0.02", "--evaluations=2", "--warmup_epochs=0"]
STEPS = 10  # 100 images, two epochs


@pytest.fixture
def compare(monkeypatch):
    loaded = load_recipe(RECIPES / "compare.py")
    monkeypatch.setattr(experiment, "load_images", few_digits)
    monkeypatch.setattr(loaded, "FINDER_STEPS", 3)
    monkeypatch.setattr(loaded, "comparison", lambda curves, picture: picture.touch())  # longer than the training
    return loaded


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a finished comparison, of RWP alone."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "load_images", few_digits)
        start(load_recipe(RECIPES / "compare.py"), folder, "--methods=rwp")
    assert (folder / "images.png").read_bytes().startswith(b"\x89PNG")
    return folder


def start(compare, folder, *flags):
    """Run the recipe as in a process of its own; returns its records."""
    AcceleratorState._reset_state(True)
    places = [f"--results={folder}/records.jsonl", f"--output_dir={folder}"]
    compare.main(parse_arguments(compare.Arguments, [*TINY, *places, *flags]))
    return read_records(folder / "records.jsonl")


def arguments(compare, *flags):
    return parse_arguments(compare.Arguments, [*TINY, *flags])


def training(compare, name, *flags, steps=STEPS):
    args = arguments(compare, *flags)
    accelerator = Accelerator(cpu=True)
    data = compare.load_data(args, accelerator.device)
    settings = compare.default_settings(args, name)
    assert (settings["lr"], settings["weight_decay"]) == (0.02, 5e-4)
    return compare.Training(accelerator, args, data, data["train"], name, settings, 0, steps, args.batch_size), data


def weights(training):
    return torch.cat([value.detach().flatten().float() for value in training.module.state_dict().values()])


def test_the_terms_are_equal(compare, tmp_path, capsys):
    """Steps, images and gradients of each method under two protocols, and what RWP really did."""
    records = start(compare, tmp_path, "--protocols", "images", "gradients", "--evaluations=1")
    found = {(record["protocol"], record["method"]): record for record in records}
    assert len(found) == len(records) == 2 * len(set(compare.METHODS) - set(CONTROLS))
    for (protocol, name), record in found.items():
        passes = {"sam": 2, "asam": 2, "sam10": 1.1}.get(name, 1)
        halves = name in ("rwp", "arwp", "rwp_antithetic", "rwp_normalized")
        assert record["images_per_step"] == (40 if protocol == "gradients" and halves else 20)
        if protocol == "images":
            assert record["steps"] == STEPS
            assert record["gradients"] == pytest.approx(2 * passes)
        else:
            assert record["steps"] == {1: 20, 2: 10, 1.1: 18}[passes] // (2 if halves else 1)
            assert record["gradients"] == pytest.approx(4, abs=0.11)
        assert record["history"][-1]["epoch"] == pytest.approx(record["steps"] * record["images_per_step"] / 100)
        assert record["history"][-1]["top1"] == record["top1"]
        if "rwp" in name:
            steps = record["steps"] * (2 if name == "rwp_antithetic" else 1)  # two perturbed gradients for a pair
            slots = {"clean": 0, "perturbed": steps} if name == "rwp_1x" else {"clean": steps, "perturbed": steps}
            assert record["rwp"]["slots"] == slots
            assert record["rwp"]["relative_noise"]["largest"]["size"] > 0
            assert "loss_perturbed" in record["history"][-1]
        else:
            assert "rwp" not in record
            assert set(record["history"][-1]) & {"loss_clean", "loss_perturbed"} == set()
    assert (tmp_path / "images.png").exists()
    assert (tmp_path / "gradients.png").exists()
    said = capsys.readouterr().out
    assert "| SAM every 10th step |" in said
    assert "equal gradient evaluations" in said
    assert ", seed 0, gradients" in said


def test_methods_see_the_same_images_and_every_image_once_an_epoch(compare):
    (plain, data), (rwp, _) = training(compare, "base"), training(compare, "rwp")
    for number in (0, 7):
        for ours, theirs in zip(plain.batch(number), rwp.batch(number), strict=True):
            assert torch.equal(ours, theirs)
    again = training(compare, "base")[0].batch(7)  # however it got there
    assert torch.equal(again[0], plain.batch(7)[0])
    order = torch.cat([torch.cat(list(plain.batches.rows(start, start + 30))) for start in range(0, 300, 30)])
    assert all(sorted(epoch.tolist()) == list(range(100)) for epoch in order.split(100))
    assert not torch.equal(order[:100], order[100:200])
    assert len(data["train"]) == 100


def test_plain_training_is_the_loop_that_everyone_writes(compare):
    ours, _ = training(compare, "base")
    set_seed(0)
    model = experiment.create_model(arguments(compare), 10, 16).to(memory_format=torch.channels_last)
    decays = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decays, "weight_decay": 5e-4}]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True)
    model.train()
    ours.module.train()
    for number in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 + np.cos(np.pi * number / STEPS)) / 2
        images, labels = ours.batch(number)
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.step(number)
    theirs = torch.cat([value.detach().flatten().float() for value in model.state_dict().values()])
    torch.testing.assert_close(weights(ours), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sam", "asam"])
def test_sam_is_the_papers(compare, name):
    """w - lr * g(w + rho * T^2 g / ||T g||), T = 1 for SAM and |w| for ASAM, without momentum."""
    ours, _ = training(compare, name, "--momentum=0", "--opt=momentum", "--weight_decay_1d=true")
    model = experiment.create_model(arguments(compare), 10, 16)
    model.load_state_dict(ours.module.state_dict())
    for each in (model, ours.module):
        each.train()
    images, labels = ours.batch(0)
    clean = [p.detach().clone() for p in model.parameters()]
    gradients = torch.autograd.grad(cross_entropy(model(images), labels), list(model.parameters()))
    scales = [w.abs() if name == "asam" else torch.ones_like(w) for w in clean]
    norm = torch.cat([(t * g).flatten() for t, g in zip(scales, gradients, strict=True)]).norm()
    rho = compare.METHODS[name].strength
    with torch.no_grad():
        for p, t, g in zip(model.parameters(), scales, gradients, strict=True):
            p += rho * t**2 * g / norm
    there = torch.autograd.grad(cross_entropy(model(images), labels), list(model.parameters()))
    ours.step(0)
    for w, g, p in zip(clean, there, ours.module.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), w - 0.02 * (g + 5e-4 * w), rtol=1e-4, atol=1e-6)


def test_sam_every_tenth_step_is_plain_in_between(compare):
    seldom, plain = training(compare, "sam10", steps=20)[0], training(compare, "base", steps=20)[0]
    for each in (seldom, plain):
        each.module.train()
    seldom.step(0)
    assert seldom.gradients == 40
    plain.module.load_state_dict(seldom.module.state_dict())
    momentum = copy.deepcopy(seldom.base.state_dict()["state"])  # loading shares tensors
    plain.base.load_state_dict({**plain.base.state_dict(), "state": momentum})
    for number in range(1, 10):
        seldom.step(number)
        plain.step(number)
    assert torch.equal(weights(seldom), weights(plain))
    seldom.step(10)
    plain.step(10)
    assert seldom.gradients == 40 + 9 * 20 + 40
    assert not torch.equal(weights(seldom), weights(plain))


def test_a_search_is_of_equal_size_and_never_sees_the_test_images(compare, tmp_path, monkeypatch):
    seen = []
    evaluate = compare.Training.evaluate
    monkeypatch.setattr(
        compare.Training, "evaluate", lambda self, images: seen.append(images) or evaluate(self, images)
    )
    flags = ["--search=true", "--methods", "base", "sam", "--lrs", "0.01", "0.05", "--weight_decays", "5e-4", "1e-3"]
    records = start(compare, tmp_path, *flags, "--validation_images=20", "--evaluations=1")
    trials = {name: [r for r in records if (r["kind"], r["method"]) == ("trial", name)] for name in ("base", "sam")}
    assert len(trials["base"]) == len(trials["sam"]) == 4
    assert {(t["settings"]["lr"], t["settings"]["weight_decay"]) for t in trials["sam"]} == {
        (lr, decay) for lr in (0.01, 0.05) for decay in (5e-4, 1e-3)
    }
    assert {t["settings"]["strength"] for t in trials["sam"]} == {0.025, 0.05, 0.1}
    assert {t["settings"]["strength"] for t in trials["base"]} == {None}
    assert all(t["images"] == {"train": 80, "evaluated": 20} and t["steps"] == 8 for t in trials["base"])
    assert [len(images) for images in seen] == [20] * 8 + [41] * 2
    for run in (record for record in records if record["kind"] == "run"):
        best = max(trials[run["method"]], key=lambda trial: trial["top1"])
        assert run["settings"] == best["settings"]
        assert run["images"] == {"train": 100, "evaluated": 41}
    # Nothing that chooses is trained on or reported.
    args = arguments(compare, "--search=true", "--validation_images=20")
    data = compare.load_data(args, torch.device("cpu"), held_out=True)
    pixels = {part: {tuple(image.flatten().tolist()) for image in data[part].pixels} for part in ("held_in", "test")}
    chooses = {tuple(image.flatten().tolist()) for image in data["held_out"].pixels}
    assert len(chooses) == 20
    assert chooses & (pixels["held_in"] | pixels["test"]) == set()


def test_wrong_labels_are_spread_over_every_epoch(compare):
    """Also where the data's seed and the run's are the same."""
    trained, _ = training(compare, "base", "--label_noise=0.3")
    clean, _ = training(compare, "base")
    wrong = trained.batches.images.labels != clean.batches.images.labels
    for epoch in range(4):
        order = torch.cat(list(trained.batches.rows(100 * epoch, 100 * epoch + 100)))
        assert wrong[order][:30].sum() < 20


def test_images_for_the_search_lie_outside_of_a_subset(compare):
    args = arguments(compare, "--search=true", "--train_images=60", "--validation_images=40", "--test_images=30")
    data = compare.load_data(args, torch.device("cpu"), held_out=True)
    assert [len(data[part]) for part in ("train", "held_in", "held_out", "test")] == [60, 60, 40, 30]


def test_a_share_of_the_training_labels_is_drawn_anew(compare):
    args = arguments(compare, "--search=true", "--validation_images=20", "--label_noise=0.3")
    noisy = compare.load_data(args, torch.device("cpu"), held_out=True)
    args.label_noise = 0.0
    clean = compare.load_data(args, torch.device("cpu"), held_out=True)
    for part in ("test", "held_out"):
        assert torch.equal(noisy[part].labels, clean[part].labels)
    changed = (noisy["train"].labels != clean["train"].labels).sum()
    assert 20 <= changed <= 30  # a tenth of those that are drawn stay right


class Cut(BaseException):
    pass


@pytest.mark.parametrize(
    "name",
    ["sam10", pytest.param("rwp", marks=pytest.mark.slow), "arwp", "base_ema"],  # arwp is rwp and keeps more
)
def test_a_run_that_was_cut_ends_in_the_same_figures(compare, tmp_path, monkeypatch, name):
    (whole,) = start(compare, tmp_path / "whole", f"--methods={name}", "--evaluations=4")
    step = compare.Training.step

    def cut(self, number):
        if number == 6:
            raise Cut
        step(self, number)

    monkeypatch.setattr(compare.Training, "step", cut)
    with pytest.raises(Cut):
        start(compare, tmp_path / "cut", f"--methods={name}", "--evaluations=4")
    steps = []
    monkeypatch.setattr(compare.Training, "step", lambda self, number: steps.append(number) or step(self, number))
    (resumed,) = start(compare, tmp_path / "cut", f"--methods={name}", "--evaluations=4")
    assert steps == [5, 6, 7, 8, 9]  # after the second of the four points: 2, 5, 8, 10
    for one, other in zip(whole["history"], resumed["history"], strict=True):
        del one["seconds"], other["seconds"]
        assert one == other
    assert whole.get("rwp", {}).get("slots") == resumed.get("rwp", {}).get("slots")
    assert not list((tmp_path / "cut" / "checkpoints").glob("*/step_*"))


def test_in_a_pipe_it_says_how_far_all_runs_are(compare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_rwp.runs.progress.LATEST", 0.0)  # a line after every step
    start(compare, tmp_path, "--methods", "base", "--seeds", "0")
    start(compare, tmp_path, "--methods", "base", "rwp", "--seeds", "0")
    said = capsys.readouterr().out.splitlines()
    last = max(number for number, line in enumerate(said) if line.startswith("run 1/1, base, seed 0"))
    assert re.fullmatch(r"run 1/1, base, seed 0 done: loss \d\.\d{4}, top-1 \d+\.\d\d%", said[last])
    lines = [line for line in said[last:] if line.startswith("run 2/2, rwp, seed 0")]
    percents = [int(re.search(r"(\d+)%", line)[1]) for line in lines[:-1]]
    assert percents == list(range(55, 101, 5))  # of ten steps after those that were there
    assert all(re.search(r" images/s(, \d\d:\d\d left)?$", line) for line in lines[:-1])
    # Once, after the evaluation in the middle; and never that of the run before.
    assert [number for number, line in enumerate(lines[:-1]) if "loss" in line] == [5]
    assert max(map(len, lines)) <= 80


def test_finished_runs_are_not_run_again(compare, tmp_path, monkeypatch, capsys):
    before = start(compare, tmp_path, "--methods", "base", "rwp")
    monkeypatch.setattr(compare.Training, "step", lambda *_: pytest.fail("trained again"))
    assert start(compare, tmp_path, "--methods", "base", "rwp") == before
    assert "All of it is in" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(experiment, "load_images", few_digits)
    more = start(compare, tmp_path, "--methods", "base", "rwp", "--seeds", "0", "1")
    assert [(r["method"], r["seed"]) for r in more] == [("base", 0), ("rwp", 0), ("base", 1), ("rwp", 1)]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--label_noise=0.5", "label_noise None and not 0.5"),
        ("--rwp_alpha=0.3", "options .*0.5.* and not .*0.3"),
        ("--evaluations=1", "evaluations 2 and not 1"),
        ("--test_images=40", ".*data_sha256"),
        ("--mixed_precision=bf16", ".*mixed_precision"),
        ("--epochs=3", "epochs 2 and not 3"),
    ],
)
def test_a_file_holds_one_comparison(compare, compared, tmp_path, flag, said):
    shutil.copy(compared / "records.jsonl", tmp_path)
    before = read_records(tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match=rf"another comparison \({said}.*\): set another --name"):
        start(compare, tmp_path, "--methods=rwp", flag)
    assert read_records(tmp_path / "records.jsonl") == before


def test_a_record_names_its_data(compare):
    args = arguments(compare, "--dataset=uoft-cs/cifar10")
    assert compare.task_of(args)["dataset"] == "uoft-cs/cifar10"
    assert "--dataset uoft-cs/cifar10" in compare.command_of("compare.py", *compare.described_arguments(args))


def test_runs_with_other_settings_are_no_further_seeds(compare, tmp_path):
    before = start(compare, tmp_path, "--methods=base")
    with pytest.raises(
        ValueError, match=r"a run of base with settings .*0.02.*, to which one with .*0.01.* is no further"
    ):
        start(compare, tmp_path, "--methods=base", "--seeds=1", "--lr=0.01")
    assert read_records(tmp_path / "records.jsonl") == before


def test_a_search_has_one_grid(compare, tmp_path):
    flags = ["--search=true", "--weight_decays", "1e-3", "--strengths", "1", "--evaluations=1"]
    start(compare, tmp_path, *flags, "--methods=base", "--lrs", "0.01")
    with pytest.raises(ValueError, match="one of this grid"):
        start(compare, tmp_path, *flags, "--methods=rwp", "--lrs", "0.02")


def test_a_search_is_around_the_gamma_that_the_finder_proposes(compare, tmp_path, monkeypatch):
    """Once: whoever goes on with the search has the same grid; with a gamma of the flags none is looked for."""
    found = []
    monkeypatch.setattr(compare, "found_gamma", lambda *given: found.append(given[3:]) or 0.03)
    flags = ["--search=true", "--lrs", "0.01", "--weight_decays", "1e-3", "--strengths", "2", "--evaluations=1"]
    flags += ["--validation_images=20", "--methods", "base", "rwp"]
    start(compare, tmp_path, *flags)
    records = start(compare, tmp_path, *flags, "--seeds", "0", "1")
    ((images, steps),) = found
    assert (len(images), steps) == (80, 3)
    trial, *runs = [record for record in records if record["method"] == "rwp"]
    assert (trial["kind"], trial["settings"]["strength"]) == ("trial", 0.06)
    assert [run["settings"]["strength"] for run in runs] == [0.06, 0.06]
    assert {str(record["middle"]) for record in records} == {"{'gamma': 0.03, 'steps': 3}"}
    assert "rwp_gamma" not in trial["command"]
    given = start(compare, tmp_path / "given", *flags, "--rwp_gamma=0.02")
    assert {record["settings"]["strength"] for record in given} == {None, 0.04}
    assert len(found) == 1


def test_the_gamma_of_a_search_is_of_plain_training_and_the_default_where_that_learned_nothing(compare, monkeypatch):
    args = arguments(compare, "--lr=0.05")
    accelerator = Accelerator(cpu=True)
    data = compare.load_data(args, accelerator.device)
    assert compare.found_gamma(accelerator, args, data, data["train"], 1) == 0.01
    seen = []
    find = experiment.find_gamma
    monkeypatch.setattr(experiment, "find_gamma", lambda *a, **k: seen.append(find(*a, **k)) or seen[0])
    gamma = compare.found_gamma(accelerator, args, data, data["train"], 60)
    assert gamma == seen[0].gamma != 0.01
    assert seen[0].loss < 0.9 * seen[0].baseline


def test_an_inert_wrapper_does_not_pass_for_a_result(compare, tmp_path):
    with pytest.raises(RuntimeError, match="rwp perturbed next to nothing"):
        start(compare, tmp_path, "--methods=rwp", "--rwp_gamma=1e-9")
    assert read_records(tmp_path / "records.jsonl") == []


def test_training_is_plain_before_the_noise_starts(compare):
    (late, _), (plain, _) = training(compare, "rwp", "--rwp_start=0.5"), training(compare, "base")
    for each in (late, plain):
        each.module.train()
        for number in range(4):
            each.step(number)
    assert torch.equal(weights(late), weights(plain))
    late.step(5)
    assert late.rwp.report()["slots"]["perturbed"] == 1


def test_noise_of_the_last_steps_is_a_method(compare):
    late, _ = training(compare, "rwp_late20", "--rwp_gamma=0.03")
    assert {group["rwp_gamma"] for group in late.rwp.param_groups} == {0.03}
    for number in range(10):
        late.step(number)
    assert late.rwp.report()["slots"] == {"clean": 2, "perturbed": 2}


# What a practitioner would do instead, and the controls


def test_smoothed_labels_are_torchs(compare):
    ours, _ = training(compare, "base_smooth")
    images, labels = ours.batch(0)
    ours.module.eval()
    expected = torch.nn.CrossEntropyLoss(label_smoothing=0.2)(ours.module(images), labels)
    assert torch.equal(ours.loss_of(images, labels), expected)
    assert ours.judged is ours.module


def test_averaged_weights_are_judged_and_the_training_stays_plain(compare):
    """By hand: the average of the weights and buffers reaches back two epochs of five steps, a decay of 0.9."""
    (ours, data), (plain, _) = training(compare, "base_ema"), training(compare, "base")
    mean = None
    for number in range(4):
        for each in (ours, plain):
            each.step(number)
        mean = weights(plain) if mean is None else 0.9 * mean + 0.1 * weights(plain)
    assert torch.equal(weights(ours), weights(plain))
    averaged = torch.cat([value.detach().flatten().float() for value in ours.judged.state_dict().values()])
    counters = torch.cat([value.flatten() == 4 for value in plain.module.state_dict().values()])  # batches tracked
    torch.testing.assert_close(averaged[~counters], mean[~counters], rtol=1e-5, atol=1e-6)
    plain.module.load_state_dict(ours.judged.state_dict())
    assert ours.evaluate(data["test"]) == plain.evaluate(data["test"])


def test_halves_without_noise_are_the_mean_of_their_gradients(compare):
    ours, _ = training(compare, "base_halves", "--momentum=0", "--opt=momentum", "--weight_decay_1d=true")
    model = experiment.create_model(arguments(compare), 10, 16)
    model.load_state_dict(ours.module.state_dict())
    images, labels = ours.batch(0)
    halves = zip(images.chunk(2), labels.chunk(2), strict=True)
    loss = sum(cross_entropy(model(half), own) for half, own in halves) / 2
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    clean = [p.detach().clone() for p in model.parameters()]
    ours.step(0)
    for w, g, p in zip(clean, gradients, ours.module.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), w - 0.02 * (g + 5e-4 * w), rtol=1e-4, atol=1e-6)


def test_the_unmixed_noise_is_rwps_in_every_gradient(compare):
    unmixed, _ = training(compare, "rwp_unmixed", "--rwp_gamma=0.02")
    for number in range(3):
        unmixed.step(number)
    assert unmixed.rwp.report()["slots"] == {"clean": 0, "perturbed": 3}
    assert {group["rwp_gamma"] for group in unmixed.rwp.param_groups} == {0.02}


def test_a_run_says_what_early_stopping_would_have_chosen(compare, tmp_path, monkeypatch):
    figures = iter([0.2, 0.5, 0.4, 0.9, 0.6, 0.9, 0.3, 0.1])  # test, held out, test, ...
    monkeypatch.setattr(compare.Training, "evaluate", lambda *_: {"top1": next(figures), "eval_loss": 1.0})
    flags = ["--methods=base", "--early_stopping=true", "--train_images=60", "--validation_images=40"]
    (record,) = start(compare, tmp_path, *flags, "--evaluations=4")
    assert record["early"] == {"step": record["history"][1]["step"], "held_out": 0.9, "top1": 0.4}
    assert (record["peak"], record["top1"]) == (0.6, 0.3)
    assert [row["held_out"] for row in record["history"]] == [0.5, 0.9, 0.9, 0.1]


def test_early_stopping_needs_images_that_train_nothing(compare, tmp_path):
    with pytest.raises(ValueError, match=r"early_stopping needs held-out images .* 20 of them are to train on"):
        start(compare, tmp_path, "--methods=base", "--early_stopping=true", "--validation_images=20")


def test_what_noise_rounding_and_pruning_leave_is_measured_at_no_cost_to_the_run(compare, tmp_path):
    (plain,) = start(compare, tmp_path / "plain", "--methods=rwp")
    (measured,) = start(compare, tmp_path / "measured", "--methods=rwp", "--robustness_images=30")
    assert measured["top1"] == plain["top1"]
    assert measured["task"] == plain["task"]
    assert set(measured["robustness"]) == {"as_they_are", "noise", "bits", "pruned", "train", "rise"}
    assert "robustness" not in plain


def test_methods_begin_from_the_same_trained_weights(compare, tmp_path, monkeypatch):
    begun = {}
    step = compare.Training.step

    def spied(self, number):
        if number == 0:
            begun.setdefault(self.method.title, []).append(weights(self))
        step(self, number)

    monkeypatch.setattr(compare.Training, "step", spied)
    flags = ["--pretrain_epochs=2", "--pretrain_lr=0.05", "--methods", "base", "rwp", "--robustness_images=20"]
    records = start(compare, tmp_path, *flags, "--evaluations=1")
    fresh, first = begun["plain"]  # pretraining is plain, and made once
    (second,) = begun["RWP"]
    assert torch.equal(first, second)
    assert not torch.equal(fresh, first)
    assert records[0]["before"] == records[1]["before"]
    assert 0 <= records[0]["before"]["robustness"]["noise"]["0.01"] <= 1
    assert records[0]["task"]["pretrain_epochs"] == 2
    assert {record["steps"] for record in records} == {STEPS}


def test_the_search_of_another_comparison_chooses_settings(compare, tmp_path):
    first = ["--methods=base", "--search=true", "--lrs", "0.01", "--weight_decays", "1e-3", "--seeds=3"]
    AcceleratorState._reset_state(True)
    places = [f"--results={tmp_path}/first.jsonl", f"--output_dir={tmp_path}/first"]
    compare.main(parse_arguments(compare.Arguments, [*TINY, *places, *first]))
    *_, record = start(compare, tmp_path, "--methods=base", "--settings_from=first", "--label_noise=0.5")
    figures = {"first": 0.3, "second": 0.4}
    for file, top1 in figures.items():
        trial = {"kind": "trial", "method": "asam", "protocol": "images", "settings": {"lr": top1}, "top1": top1}
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / f"{file}.jsonl").write_text(json.dumps(trial) + "\n")
    args = arguments(compare, "--settings_from", *figures, f"--results={tmp_path}/other/own.jsonl")
    assert compare.chosen(args, "asam", "images") == {"lr": 0.4}  # the best of both
    assert (record["settings"]["lr"], record["settings"]["weight_decay"]) == (0.01, 1e-3)
    assert "--settings_from first" in record["command"]
    with pytest.raises(ValueError, match=r"no search in first has settings for rwp: leave settings_from out"):
        start(compare, tmp_path, "--methods=rwp", "--settings_from=first", "--label_noise=0.5")


def test_checkpoints_are_apart_by_the_seconds_that_were_asked_for(compare, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(compare, "save_checkpoint", lambda *given: saved.append(given))
    start(compare, tmp_path / "often", "--methods=base", "--evaluations=4")
    assert len(saved) == 3
    start(compare, tmp_path / "never", "--methods=base", "--evaluations=4", "--checkpoint_seconds=1e6")
    assert len(saved) == 3


def test_two_processes_cannot_share_an_output_folder(compare, tmp_path):
    lock = compare.lock_output(tmp_path, tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match="in use by another run"):
        start(compare, tmp_path, "--methods=base")
    lock.release()


def test_what_cannot_be_written_is_said_before_training(compare, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compare.Training, "step", lambda *_: pytest.fail("trained"))
    args = arguments(compare, f"--output_dir={tmp_path}/file/out", f"--results={tmp_path}/r")
    with pytest.raises(ValueError, match="Set others"):
        compare.main(args)


def test_a_damaged_checkpoint_is_named(compare, tmp_path, monkeypatch):
    step = compare.Training.step

    def cut(self, number):
        if number == 6:
            raise Cut
        step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(compare.Training, "step", cut)
        with pytest.raises(Cut):
            start(compare, tmp_path, "--methods=base")
    (file,) = tmp_path.glob("checkpoints/*/step_5/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"has changed[\s\S]*delete .*checkpoints/\w+, and this run begins anew"):
        start(compare, tmp_path, "--methods=base")


@pytest.mark.parametrize(("kind", "name", "status"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)])
def test_what_stops_it_says_what_is_kept_and_how_to_go_on(compare, tmp_path, monkeypatch, capsys, kind, name, status):
    AcceleratorState._reset_state(True)
    step, records = compare.Training.step, tmp_path / "records.jsonl"
    flags = [*TINY, f"--results={records}", f"--output_dir={tmp_path}/out", "--methods", "base", "rwp"]

    def cut(self, number):
        if number == 6 and read_records(records):  # in the second run
            os.kill(os.getpid(), kind)
        step(self, number)

    monkeypatch.setattr(compare.Training, "step", cut)
    assert parse_arguments(compare.Arguments, flags).kept() is None
    with pytest.raises(SystemExit) as stopped:
        parsing.start(compare.main, compare.Arguments, argv=flags)
    assert stopped.value.code == status
    kept = f"{records} has what was finished, and the same command goes on there"
    assert capsys.readouterr().err.endswith(f"\nstopped by {name}: {kept}\n")
    assert len(read_records(records)) == 1


def test_a_search_serves_later_runs_of_the_same_file(compare, tmp_path):
    start(compare, tmp_path, "--methods=base", "--search=true", "--lrs", "0.01", "--weight_decays", "1e-3")
    *_, last = start(compare, tmp_path, "--methods=base", "--protocols=gradients")
    assert (last["settings"]["lr"], last["settings"]["weight_decay"]) == (0.01, 1e-3)


def test_equal_time_gives_a_slower_method_fewer_steps(compare, tmp_path, monkeypatch):
    measured = []
    seconds = {"base": 0.1, "sam": 0.25, "rwp": 0.2}
    monkeypatch.setattr(compare, "seconds_per_step", lambda *given: measured.append(given[-1]) or seconds)
    records = start(compare, tmp_path, "--protocols=time", "--methods", "base", "sam")
    assert [record["steps"] for record in records] == [10, 4]
    seconds |= {"base": 0.2, "sam": 0.9, "rwp": 0.2}  # no two measurements are alike: the first one holds
    *_, rwp = start(compare, tmp_path, "--protocols=time", "--methods", "base", "sam", "rwp")
    assert rwp["steps"] == 10
    assert measured == [["base", "sam"], ["base", "rwp"]]


def test_step_times_are_measured(compare):
    args = arguments(compare, "--methods", "sam")
    accelerator = Accelerator(cpu=True)
    data = compare.load_data(args, accelerator.device)
    times = compare.seconds_per_step(accelerator, args, data, ["base", "sam"])
    assert list(times) == ["base", "sam"]
    assert 0 < times["base"] < times["sam"] < 5


@pytest.mark.parametrize("name", ["base", "rwp"])
def test_a_run_that_diverges_is_a_result(compare, tmp_path, name):
    (record,) = start(compare, tmp_path, f"--methods={name}", "--lr=1e30")
    assert record["history"][-1]["train_loss"] is None
    assert record["top1"] < 0.5


def on_rank(folder, *flags):
    os.environ["ACCELERATE_USE_CPU"] = "true"
    compare = load_recipe(RECIPES / "compare.py")
    experiment.load_images = few_digits
    digests = []
    evaluate = compare.Training.evaluate

    def spied(self, images):
        figures = evaluate(self, images)
        digests.append(weights(self))
        return figures

    compare.Training.evaluate = spied
    try:
        start(compare, folder, *flags)
    finally:
        compare.Training.evaluate = evaluate
    return [digest.tolist() for digest in digests]


def test_two_replicas_share_the_batches_and_agree(compare, tmp_path):
    first, second = distributed.run(2, on_rank, tmp_path, "--methods", "base", "sam", "rwp", timeout=60)
    assert first == second  # weights and buffers, at every evaluation
    records = {record["method"]: record for record in read_records(tmp_path / "records.jsonl")}
    assert records["rwp"]["rwp"]["placement"] == "parallel"
    assert records["rwp"]["rwp"]["slots"] == {"clean": 5, "perturbed": 5}
    for record in records.values():
        assert (record["replicas"], record["images_per_step"], record["steps"]) == (2, 40, 5)
        assert record["gradients"] == pytest.approx(4 if record["method"] == "sam" else 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "base", "adam"], r"methods must be some of base, sam, .*got \['base', 'adam'\]"),
        (["--protocols", "steps"], r"protocols must be some of images, .*got \['steps'\]"),
        (["--batch_size=7"], "even, for RWP to halve it"),
        (["--batch_size=0"], "and above 0"),
        (["--rwp_start=1"], "without noise it is the method base"),
        (["--model_kwargs=hello"], "a mapping"),
        (["--seeds", "1", "1"], "one value or more, each once"),
        (["--aa=rand-m9"], "aa must be unset: .*, got 'rand-m9'"),
        (["--rwp_gamma=0"], "without noise it is the method base"),
        (["--train_images=101"], r"train_images must be in \[1, 100\], as many as the split has for it, got 101"),
        (["--train_images=10"], "10 images to train on, 10 in a search, are fewer than the 20"),
        (["--search=true", "--validation_images=90"], "100 images to train on, 10 in a search, are fewer than the 20"),
    ],
)
def test_what_cannot_be_compared_is_refused(compare, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        start(compare, tmp_path, *flags)
    assert read_records(tmp_path / "records.jsonl") == []


@pytest.mark.parametrize(
    "config",
    [*sorted((RECIPES / "configs" / "compare").glob("*.yaml")), RECIPES / "configs" / "cifar10_resnet18.yaml"],
    ids=lambda path: path.stem,
)
def test_a_configuration_is_read_whole(compare, config):
    args = parse_arguments(compare.Arguments, [f"--config={config}"])
    for name, value in yaml.safe_load(config.read_text()).items():
        kept = getattr(args, name)
        if name == "model_kwargs":
            assert json.loads(kept) == value
        elif isinstance(value, list) and not isinstance(kept[0], str):
            assert kept == [float(item) for item in value]
        else:
            assert kept == (float(value) if isinstance(kept, float) else value), name
    model = experiment.create_model(args, 10, args.img_size)
    assert model.eval()(torch.zeros(1, 3, args.img_size, args.img_size)).shape == (1, 10)

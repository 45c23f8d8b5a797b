"""recipes/imagenet_rwp.py goes on with a run's own flags, stops at Ctrl-C, and ends where it has diverged."""

import json
import os
import signal
import subprocess
import sys

import forked
import PIL.Image
import pytest
import timm
import torch
from imagenet import SUPPORT, evaluated, load_recipe, results, results_of, train, undrawn, weights
from test_imagenet_runs import assert_same_run, cut_back, steps

from hf_rwp.hub.export import save_model
from hf_rwp.images.data import load_images
from hf_rwp.runs.given import FLAGS
from hf_rwp.runs.parsing import parse_arguments

OWN = [
    "--weight_decay=0.01",
    "--hflip=0.5",
    "--model_ema",
    "--model_ema_decay=0.5",
    "--crop_pct=0.7",
    "--smoothing=0.1",
]


def start(recipe, *flags):
    """As a user types it: these flags and no others."""
    with undrawn(recipe):
        recipe.main(parse_arguments(recipe.Arguments, list(map(str, flags))))


@pytest.fixture
def loaded():
    recipe = load_recipe()
    recipe.load_images = load_images
    return recipe


@pytest.fixture
def pictures(tmp_path):
    """Two classes: 24 images to train on, 8 for evaluation."""
    folder = tmp_path / "pictures"
    for number in range(32):
        path = folder / ("train" if number < 24 else "val") / ("dark", "light")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (16, 16), (8 * number,) * 3).save(path)
    return folder


# A run's own flags


def test_a_run_goes_on_with_its_own_flags(recipe, tmp_path):
    flags = [*OWN, "--checkpointing_steps=2", "--save_total_limit=9"]
    whole = results_of(recipe, tmp_path / "whole", *flags)
    for name, named in (("folder", ""), ("checkpoint", "checkpoints/step_2"), ("latest", "latest")):
        folder = cut_back(tmp_path / "whole", tmp_path / name, 2)
        if named == "latest":
            start(recipe, "--resume_from_checkpoint=latest", f"--output_dir={folder}")
        else:
            start(recipe, f"--resume_from_checkpoint={folder / named}")
        assert_same_run(results(folder), whole)
        assert results(folder)["arguments"] == whole["arguments"] | {
            "output_dir": name,
            "resume_from_checkpoint": (named or name).rpartition("/")[2],
        }


def test_flags_given_anew_win_and_are_listed(recipe, tmp_path, capsys):
    train(recipe, tmp_path, *OWN)
    capsys.readouterr()
    start(recipe, f"--resume_from_checkpoint={tmp_path}", "--epochs=3", "--lr=0.01", "--hflip=0.5")
    said = capsys.readouterr()
    assert f"flags: those of the run in {tmp_path}" in said.out
    assert [line for line in said.out.splitlines() if line.startswith("given now")] == [
        "given now: epochs=3, which is 2 there",
        "given now: lr=0.01, which is 0.02 there",
    ]
    assert "lr=0.02 and not 0.01" in said.err
    arguments = results(tmp_path)["arguments"]
    assert (arguments["epochs"], arguments["lr"], arguments["crop_pct"]) == (3, 0.01, 0.7)
    # and they are the run's own from now on
    start(recipe, f"--resume_from_checkpoint={tmp_path}", "--eval_only")
    assert "given now" not in capsys.readouterr().out
    kept = json.loads((tmp_path / FLAGS).read_text())
    assert (kept["epochs"], kept["lr"], kept["crop_pct"]) == (["3"], ["0.01"], ["0.7"])
    assert not {"resume_from_checkpoint", "output_dir", "eval_only"} & kept.keys()


def test_a_checkpoint_is_evaluated_as_its_run_did(recipe, tmp_path):
    final = results_of(recipe, tmp_path, *OWN, "--img_size=24")["final"]
    start(recipe, f"--resume_from_checkpoint={tmp_path}", "--eval_only")
    found = evaluated(tmp_path)
    assert found == pytest.approx({name: final[name] for name in found}, rel=1e-5)
    assert {"top1", "top1_ema", "eval_loss"} <= found.keys()
    start(recipe, f"--resume_from_checkpoint={tmp_path}", "--eval_only", "--crop_pct=1")
    assert json.loads((tmp_path / "eval.json").read_text())["eval_loss"] != pytest.approx(final["eval_loss"], rel=1e-5)
    assert (tmp_path / "results.json").exists()


def test_weights_are_evaluated_at_their_own_size(recipe, tmp_path):
    """On the digits too, which have a size and a crop of their own for training."""
    final = results_of(recipe, tmp_path / "run", "--img_size=24", "--crop_pct=0.7")["final"]
    start(recipe, "--eval_only", f"--pretrained={tmp_path}/run/model", f"--output_dir={tmp_path}/eval")
    found = evaluated(tmp_path / "eval")
    assert found == pytest.approx({name: final[name] for name in found}, rel=1e-5)


def test_a_checkpoint_of_fine_tuning_is_evaluated_with_its_own_head(recipe, pictures, tmp_path):
    train(recipe, tmp_path / "digits", "--epochs=1")
    recipe.load_images = load_images
    flags = [f"--data_dir={pictures}", f"--pretrained={tmp_path}/digits/model", "--batch_size=8"]
    final = results_of(recipe, tmp_path / "run", *flags)["final"]
    start(recipe, f"--resume_from_checkpoint={tmp_path}/run", "--eval_only")
    found = evaluated(tmp_path / "run")
    assert found == pytest.approx({name: final[name] for name in found}, rel=1e-5)


def test_a_run_goes_on_from_another_folder_than_it_was_started_in(loaded, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = results_of(loaded, tmp_path / "whole", "--data_dir=pictures", "--batch_size=8")
    folder = cut_back(tmp_path / "whole", tmp_path / "again", 3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    start(loaded, "--resume_from_checkpoint=../again")
    assert weights(results(folder)) == weights(whole)
    for place in (str(tmp_path), "elsewhere"):
        assert place not in (folder / "results.json").read_text()
        assert place not in (folder / "model" / "README.md").read_text()
    assert not list((folder / "model").glob("_*"))


def test_where_there_is_nothing_to_resume_the_runs_that_there_are_get_named(recipe, tmp_path):
    train(recipe, tmp_path / "outputs" / "mine", "--epochs=1")
    with pytest.raises(FileNotFoundError, match=r"holds no complete checkpoint: name another run's folder \(.*mine\)"):
        start(recipe, "--resume_from_checkpoint=latest", f"--output_dir={tmp_path}/outputs/other")


# Unreadable images


def test_unreadable_images_of_before_still_count(loaded, pictures, tmp_path):
    """Repaired meanwhile, so that nothing but the checkpoint knows of them."""
    broken = [pictures / "train" / "dark" / f"{number}.png" for number in (0, 2, 4)]
    whole = {path: path.read_bytes() for path in broken}
    for path in broken:
        path.write_bytes(b"no image")
    flags = [f"--data_dir={pictures}", "--batch_size=8"]
    assert results_of(loaded, tmp_path / "run", *flags)["final"]["unreadable_images"] == 3
    folder = cut_back(tmp_path / "run", tmp_path / "again", 3)
    for path, content in whole.items():
        path.write_bytes(content)
    start(loaded, f"--resume_from_checkpoint={folder}")
    assert results(folder)["final"]["unreadable_images"] == 3
    folder = cut_back(tmp_path / "run", tmp_path / "fewer", 3)
    with pytest.raises(ValueError, match="3 images could not be read, more than max_bad_images=2"):
        start(loaded, f"--resume_from_checkpoint={folder}", "--max_bad_images=2")


# Ctrl-C


@pytest.fixture
def interrupting(recipe, monkeypatch):
    """Sends this process Ctrl-C's SIGINT in the fourth optimizer step, as often as the list says."""
    steps_done, times, original = [], [1], recipe.RWP.step

    def step(self, *arguments):
        steps_done.append(1)
        for _ in range(times[0] if len(steps_done) == 4 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(recipe.RWP, "step", step)
    return times


def test_ctrl_c_saves_and_says_how_to_go_on(recipe, interrupting, tmp_path, capsys):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        train(recipe, tmp_path / "run", "--weight_decay=0.01")
    assert stopped.value.code == 130
    assert f"Ctrl-C: saved step 4; --resume_from_checkpoint {tmp_path / 'run'} goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    start(recipe, f"--resume_from_checkpoint={tmp_path / 'run'}")
    assert_same_run(results(tmp_path / "run"), results_of(recipe, tmp_path / "whole", "--weight_decay=0.01"))


def test_a_second_ctrl_c_ends_at_once(recipe, interrupting, tmp_path):
    interrupting[0] = 2
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path)
    assert steps(tmp_path) == [3]


def driver_of(folder, *flags):
    """A recipe that says `step` after each; it would train for long."""
    return (
        f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import imagenet\n"
        "recipe = imagenet.load_recipe(); recipe.load_images = imagenet.few_digits\n"
        "step = recipe.RWP.step\n"
        "recipe.RWP.step = lambda self, *a: (print('step', flush=True), step(self, *a))[1]\n"
        "train = lambda _: imagenet.train(recipe, "
        f"{str(folder)!r}, '--epochs=9999', '--batch_size=10', '--logging_steps=1', *{flags!r})\n"
        "from hf_rwp.runs import parsing\n"
        "parsing.parse_arguments = lambda *_, **__: None\n"
        "parsing.start(train, object)\n"
    )


def test_ctrl_c_reaches_everybody_and_only_the_main_process_decides(tmp_path):
    """As a terminal sends it: to the whole group, the processes that load data among them. No traceback is printed."""
    with forked.started("-c", driver_of(tmp_path, "--workers=2"), ACCELERATE_USE_CPU="true") as process:
        process.wait_for("step\n")
        os.killpg(process.pid, signal.SIGINT)
        run = process.end()
    assert run.returncode == 130, run.stderr
    assert len(steps(tmp_path)) == 1
    assert "Traceback" not in run.stderr
    assert "goes on" in run.stderr


@pytest.mark.slow  # test_mistakes.py has `hf-rwp`, which is the same launcher, of a program that saves nothing
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_under_accelerate_launch(tmp_path, processes):
    """A terminal reaches the launcher and, where it has only one, its process; others the launcher tells itself."""
    (tmp_path / "driver.py").write_text(driver_of(tmp_path / "out"))
    options = ["--num_processes", processes, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--multi_gpu", "--main_process_port", 0] if processes > 1 else []
    launcher = ["-m", "accelerate.commands.launch", *options, tmp_path / "driver.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, *map(str, launcher)], env=environment, **options) as process:
        assert "step\n" in iter(process.stdout.readline, ""), process.stderr.read()
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=200)[1]  # which waits for all that hold the pipe
    assert len(steps(tmp_path / "out")) == 1, said
    assert f"--resume_from_checkpoint {tmp_path / 'out'} goes on" in said


@pytest.mark.slow
def test_ctrl_c_under_hf_rwp_with_two_processes_saves_and_prints_no_traceback(tmp_path):
    flags = ["--epochs=9999", "--img_size=16", "--batch_size=256", "--report_to=none", f"--output_dir={tmp_path}"]
    processes = ["--config_file", "recipes/accelerate/cpu_2.yaml"]
    command = ["-m", "hf_rwp.cli", "train", *processes, "--logging_steps=1", *flags]
    with forked.started(*command, ACCELERATE_USE_CPU="true") as launcher:
        launcher.wait_for("\nepoch 1")
        os.killpg(launcher.pid, signal.SIGINT)
        run = launcher.end()
    said = run.stderr
    assert run.returncode == 130, said
    assert "Traceback" not in said
    assert f"Ctrl-C: saved step {steps(tmp_path)[-1]}; --resume_from_checkpoint {tmp_path} goes on" in said
    assert "devices: 2 replicas on cpu" in run.stdout


# A run that has diverged


def test_a_held_out_loss_that_is_no_number_ends_the_run(recipe, tmp_path):
    """Its training loss is still one, of one step an epoch, taken ahead of an update by 10^12."""
    flags = ["--method=base", "--batch_size=100", "--lr=1e12", "--warmup_epochs=0", "--sched=constant", "--epochs=9"]
    with pytest.raises(FloatingPointError, match=r"the held-out loss is .*(nan|inf).* diverged.* smaller lr"):
        train(recipe, tmp_path, *flags)
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / "model").exists()


def test_weights_that_give_no_number_are_no_result(recipe, tmp_path):
    model = timm.create_model("test_resnet", num_classes=10)
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    config = timm.data.resolve_data_config({"img_size": 16}, model=model)
    save_model(model, tmp_path / "model", label_names=[str(digit) for digit in range(10)], data_config=config)
    with pytest.raises(FloatingPointError, match=r"the held-out loss is .*nan.*: these weights"):
        train(recipe, tmp_path / "eval", "--eval_only", f"--pretrained={tmp_path / 'model'}")
    assert not (tmp_path / "eval").exists()


# The first lines


def test_a_run_begins_with_what_it_found(loaded, pictures, tmp_path, capsys):
    (pictures / "train" / "dark" / "notes.txt").write_text("not an image")
    flags = [f"--data_dir={pictures}", "--batch_size=8", "--epochs=1", "--hflip=0.5"]
    found = results_of(loaded, tmp_path / "out", *flags)
    said = capsys.readouterr().out
    opening = said.partition("\nnoise / weights")[0]
    for part in (
        "train: 24 images, 2 classes: dark 12, light 12",
        "validation (val): 8 images, 2 classes: dark 4, light 4",
        "notes.txt",
        "model: test_resnet, ",
        "random weights",
        "devices: 1 replica on cpu, mixed precision: no",
        "images per step: 8 (in halves, a clean and a perturbed gradient)",
        f"writes to: {tmp_path / 'out'}",
    ):
        assert part in opening, opening
    model = timm.create_model("test_resnet", num_classes=2)
    weights_in_it = sum(parameter.numel() for parameter in model.parameters())
    assert f"model: test_resnet, {weights_in_it:,} weights" in opening
    assert found["model"] == {"name": "test_resnet", "weights": weights_in_it, "from": None}
    assert found["found"]["classes"]["train"] == {"dark": 12, "light": 12}
    assert sum(found["found"]["ignored"].values()) == 1
    assert found["images_per_step"] == {"images": 8, "images_per_process": 8, "parts": 2, "gradients": "by turns"}
    assert "top5" not in found["final"]  # of two classes
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "top-5" not in said.lower() + card.lower()
    assert "| Classes, and training images of each | 2: dark 12, light 12 |" in card
    assert f"| Weights in the model | {weights_in_it:,} |" in card
    assert "| Files left out | 1 " in card
    tuned = [f"--pretrained={tmp_path}/out", "--method=base", "--gradient_accumulation_steps=2"]
    train(loaded, tmp_path / "tuned", *flags, *tuned)
    said = capsys.readouterr().out
    assert f"{weights_in_it:,} weights, weights from out" in said
    assert "images per step: 8 (in 2 parts)" in said


def test_halves_of_one_image_are_refused_ahead_of_the_epoch(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size=2 is halved, .* into parts of one image.* at least 4"):
        train(recipe, tmp_path, "--batch_size=2")
    assert list(tmp_path.iterdir()) == []

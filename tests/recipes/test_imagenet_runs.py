"""recipes/imagenet_rwp.py in long runs: checkpoints, kills, preemption, full disks, other replicas, broken images."""

import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import distributed
import forked
import PIL.Image
import pytest
import timm
import torch
from datasets import Image
from distributed import night
from imagenet import SUPPORT, few_digits, launch, load_recipe, results, results_of, train, train_on_rank, weights
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, pipeline

from hf_rwp.hub.export import save_model
from hf_rwp.hub.push import PushError
from hf_rwp.images.data import load_images
from hf_rwp.runs.checkpoints import checkpoints_in, save_checkpoint
from hf_rwp.runs.signals import PREEMPTED

FIGURES = ("epoch", "step", "train_loss", "loss_clean", "loss_perturbed", "learning_rate", "top1", "top5", "top1_ema")


def steps(folder):
    return list(checkpoints_in(Path(folder, "checkpoints")))


def cut_back(whole, folder, step):
    """A copy of a finished run as if it had been cut after the checkpoint of `step`."""
    shutil.copytree(whole, folder)
    (folder / "results.json").unlink()
    for number, checkpoint in checkpoints_in(folder / "checkpoints").items():
        if number > step:
            shutil.rmtree(checkpoint)
    return folder


def assert_same_run(again, whole):
    """To the bit in the weights, to rounding in the losses, whose sums a checkpoint in mid-epoch cuts in two."""
    assert weights(again) == weights(whole)
    figures, expected = (
        [{name: row[name] for name in FIGURES if name in row} for row in run["history"]] for run in (again, whole)
    )
    assert figures == [pytest.approx(row, rel=1e-6) for row in expected]


# Resuming


@pytest.mark.parametrize(
    "flags",
    [
        ["--workers=1", "--aa=rand-m9-mstd0.5", "--reprob=0.5", "--hflip=0.5"],
        ["--rwp_eta=0.1", "--rwp_schedule=cosine", "--rwp_growth=3", "--model_ema", "--opt=adamw", "--lr=1e-3"],
        ["--gradient_accumulation_steps=4", "--mixup=0.8", "--cutmix=1", "--drop=0.3", "--aug_repeats=2"],
        ["--method=base", "--model=test_vit", "--mixed_precision=bf16"],
        ["--method=sam"],
        pytest.param(["--torch_compile"], marks=pytest.mark.slow),
    ],
    ids=lambda flags: flags[-1],
)
def test_resuming_in_the_middle_of_an_epoch_is_bit_exact(recipe, tmp_path, flags):
    flags = [*flags, "--checkpointing_steps=2", "--save_total_limit=9"]  # of three steps an epoch
    whole = results_of(recipe, tmp_path / "whole", *flags)
    assert steps(tmp_path / "whole") == [2, 3, 4, 6]
    for step in (2, 3, 4) if "--model_ema" in flags else (4,):
        folder = cut_back(tmp_path / "whole", tmp_path / f"from_{step}", step)
        again = results_of(recipe, folder, *flags, "--resume_from_checkpoint=latest")
        assert_same_run(again, whole)


@pytest.mark.parametrize("workers", night([0, 2], [2]))  # test_data_stream has workers
def test_resuming_a_stream_reads_up_to_where_it_was(loaded, tmp_path, workers, caplog, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # 5 seconds an epoch
    data = tmp_path / "digits"
    for name, split in few_digits().items():
        for shard in range(2):
            split.shard(2, shard).to_parquet(data / f"{name}-{shard:05d}-of-00002.parquet")
    flags = [f"--data_dir={data}", "--streaming", "--train_num_samples=100", f"--workers={workers}", "--hflip=0.5"]
    flags += ["--checkpointing_steps=2", "--save_total_limit=9", "--batch_size=20", "--shuffle_buffer=30"]
    whole = results_of(loaded, tmp_path / "whole", *flags)
    folder = cut_back(tmp_path / "whole", tmp_path / "again", 2)
    caplog.clear()
    assert_same_run(results_of(loaded, folder, *flags, "--resume_from_checkpoint=latest"), whole)
    assert "read and discarded 40 images" in caplog.text


def test_two_replicas_resume_bit_exactly(tmp_path):
    flags = ["--checkpointing_steps=2", "--save_total_limit=9", "--batch_size=12", "--model_ema", "--drop_path=0.2"]
    whole = tmp_path / "whole"
    assert distributed.run(2, train_on_rank, whole, *flags) == ["", ""]
    folder = cut_back(whole, tmp_path / "again", 6)  # of four steps an epoch
    assert distributed.run(2, train_on_rank, folder, *flags, "--resume_from_checkpoint=latest") == ["", ""]
    assert_same_run(results(folder), results(whole))


def test_other_replicas_go_on_where_the_checkpoint_was(recipe, tmp_path, capsys):
    """From one replica to two and back; images of the epoch that were seen are not seen again."""
    flags = ["--batch_size=10", "--checkpointing_steps=3", "--save_total_limit=9", "--model_ema"]
    train(recipe, tmp_path / "one", *flags)
    folder = cut_back(tmp_path / "one", tmp_path / "two", 3)
    resumed = [*flags, "--resume_from_checkpoint=latest"]
    assert distributed.run(2, train_on_rank, folder, *resumed) == ["", ""]
    found = results(folder)
    assert len(found["replicas_sha256"]) == 1
    assert [row["epoch"] for row in found["history"]] == [1, 2]
    assert [row["step"] for row in found["history"]] == [3 + 70 // 20, 3 + 70 // 20 + 100 // 20]
    slots = found["final"]["rwp"]["slots"]
    assert slots == {"clean": 3 + 3 + 5, "perturbed": 3 + 3 + 5}

    shutil.rmtree(folder / "checkpoints" / "step_11")
    (folder / "results.json").unlink()
    capsys.readouterr()
    train(recipe, folder, *resumed)
    said = capsys.readouterr().err
    assert "written with 2 replicas and not 1. Training goes on after the images that were seen" in said
    assert "not end in the same bits" in said


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed_runs_end_in_the_same_bits(tmp_path, kills):
    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(SUPPORT)!r}]\n"
        "import test_imagenet_runs as runs\n"
        f"runs.kill_and_resume({str(tmp_path)!r}, {kills})"
    )
    run = launch("-c", code)
    assert run.returncode == 0, run.stderr
    whole, killed = results(tmp_path / "whole"), results(tmp_path / "killed")
    assert killed["final"]["rwp"]["slots"] == whole["final"]["rwp"]["slots"]
    assert_same_run(killed, whole)
    left = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    best = max(whole["history"], key=lambda row: row["top1_ema"])["step"]
    assert set(left) == {f"step_{step}" for step in [*steps(tmp_path / "whole"), best]}
    assert not list((tmp_path / "killed").glob("*.partial"))


def kill_and_resume(folder, kills):
    """Trains in forks of this process, which imports the recipe once: the first unharmed, the others killed.

    A fork dies by SIGKILL ahead of its n-th event: an optimizer step, or a part of writing or removing a file.
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
            (Path, "replace"),
            (os, "fsync"),
            (shutil, "rmtree"),
        ):
            setattr(owner, name, counted(getattr(owner, name)))

    def run(name, *flags, last=None):
        process = os.fork()
        if process == 0:
            if last:
                dies_before_event(last)
            flags = ("--checkpointing_steps=2", "--model_ema", f"--epochs={kills + 2}", *flags)
            train(recipe, Path(folder, name), *flags)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def resume():
        return ["--resume_from_checkpoint=latest"] if steps(Path(folder, "killed")) else []

    assert run("whole") == 0
    # The 7th event is in the middle of the first save: two steps, save_state, write_text, and then each file's fsync.
    for last in [7, *(chance.randint(1, 25) for _ in range(kills - 1))]:
        assert run("killed", *resume(), last=last) == -signal.SIGKILL
    assert run("killed", *resume()) == 0


# SIGTERM


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    """The results of two epochs, of three steps each, that nothing stops."""
    with pytest.MonkeyPatch.context() as patch:
        recipe = load_recipe()
        patch.setattr(recipe, "load_images", few_digits)
        return results_of(recipe, tmp_path_factory.mktemp("unharmed"))


@pytest.fixture
def preempting(recipe, monkeypatch):
    """Sends this process a SIGTERM in the fourth optimizer step."""
    counted, original = [], recipe.RWP.step

    def step(self, *arguments):
        counted.append(1)
        if len(counted) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(recipe.RWP, "step", step)


def test_sigterm_saves_and_exits_with_a_status_of_its_own(recipe, unharmed, preempting, tmp_path, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(recipe, tmp_path / "run")
    assert stopped.value.code == PREEMPTED == 75
    assert "saved step 4" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert steps(tmp_path / "run") == [3, 4]
    again = results_of(recipe, tmp_path / "run", "--resume_from_checkpoint=latest")
    assert_same_run(again, unharmed)


def test_sigterm_in_the_last_step_of_an_epoch_saves_before_evaluation(recipe, monkeypatch, unharmed, tmp_path):
    """Twice: the first of the two epochs, and the last."""
    original = recipe.RWP.step

    def step(self, *arguments):
        if self.report()["windows"] in (3, 6):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(recipe.RWP, "step", step)
    for resumed in ([], ["--resume_from_checkpoint=latest"]):
        with pytest.raises(SystemExit):
            train(recipe, tmp_path / "run", *resumed)
    assert steps(tmp_path / "run") == [3, 6]
    monkeypatch.setattr(recipe.RWP, "step", original)
    again = results_of(recipe, tmp_path / "run", "--resume_from_checkpoint=latest")
    assert_same_run(again, unharmed)


def test_sigterm_during_evaluation_saves_after_it(recipe, monkeypatch, unharmed, tmp_path):
    original = recipe.validate

    def validate(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(recipe, "validate", validate)
    with pytest.raises(SystemExit):
        train(recipe, tmp_path / "run")
    assert steps(tmp_path / "run") == [3]
    monkeypatch.setattr(recipe, "validate", original)
    again = results_of(recipe, tmp_path / "run", "--resume_from_checkpoint=latest")
    assert_same_run(again, unharmed)


def preempted_on_rank(folder):
    """Only rank 1 gets the signal; both have to stop."""
    recipe = load_recipe()
    if distributed.rank() == 1:
        original = recipe.RWP.step
        recipe.RWP.step = lambda self, *a: (os.kill(os.getpid(), signal.SIGTERM), original(self, *a))[1]
    try:
        return train_on_rank(folder, "--batch_size=4", "--logging_steps=5")
    finally:
        if distributed.rank() == 1:
            recipe.RWP.step = original


def test_a_sigterm_to_one_replica_stops_all(tmp_path):
    assert distributed.run(2, preempted_on_rank, tmp_path) == ["SystemExit: 75", "SystemExit: 75"]
    assert steps(tmp_path) == [5]


def test_a_preempted_process_exits_with_75(tmp_path):
    code = (
        f"import sys, os, signal; sys.path.insert(0, {str(SUPPORT)!r}); import imagenet\n"
        "recipe = imagenet.load_recipe(); recipe.load_images = imagenet.few_digits\n"
        "step = recipe.RWP.step\n"
        "recipe.RWP.step = lambda self, *a: (os.kill(os.getpid(), signal.SIGTERM), step(self, *a))[1]\n"
        f"imagenet.train(recipe, {str(tmp_path)!r})"
    )
    run = launch("-c", code)
    assert run.returncode == 75, run.stderr
    assert f"--resume_from_checkpoint {tmp_path} goes on" in run.stderr
    assert steps(tmp_path) == [1]


def test_sigterm_to_everybody_saves_before_the_workers_end(tmp_path):
    """As a cluster or torchrun sends it: to the whole group, the processes that load data among them."""
    code = (
        f"import sys, time; sys.path.insert(0, {str(SUPPORT)!r}); import imagenet\n"
        "recipe = imagenet.load_recipe(); recipe.load_images = imagenet.few_digits\n"
        "step = recipe.RWP.step\n"
        "recipe.RWP.step = lambda self, *a: (print('step', flush=True), time.sleep(0.3), step(self, *a))[2]\n"
        f"imagenet.train(recipe, {str(tmp_path)!r}, '--workers=2', '--epochs=50', '--batch_size=10')"
    )
    with forked.started("-c", code) as process:
        process.wait_for("step\n")
        os.killpg(process.pid, signal.SIGTERM)
        run = process.end()
    assert run.returncode == 75, run.stderr
    assert len(steps(tmp_path)) == 1


# What is kept, and when writing fails


def test_the_last_checkpoints_and_the_best_are_kept(recipe, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.8, 0.7, 0.6])
    monkeypatch.setattr(recipe, "validate", lambda *_: {"top1": next(accuracies), "top5": 1.0, "eval_loss": 0.0})
    train(recipe, tmp_path, "--epochs=5", "--save_total_limit=2", "--checkpointing_steps=2")
    assert steps(tmp_path) == [6, 14, 15]  # 6: after the second epoch, of three steps each
    assert results(tmp_path)["final"]["top1"] == 0.6  # the last, not the best


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_survives(recipe, tmp_path, monkeypatch, unharmed):
    """The kernel refuses to write files beyond 64 KiB, in the middle of the weights' file."""
    saves = []

    def full(*arguments):
        saves.append(1)
        if len(saves) == 1:
            return save_checkpoint(*arguments)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
        try:
            return save_checkpoint(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr("hf_rwp.runs.run.save_checkpoint", full)
    with pytest.raises(OSError, match=r"step_6 could not be written .* step_3 is intact"):
        train(recipe, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_3"]
    monkeypatch.setattr("hf_rwp.runs.run.save_checkpoint", save_checkpoint)
    again = results_of(recipe, tmp_path / "run", "--resume_from_checkpoint=latest")
    assert_same_run(again, unharmed)


def full_on_rank(folder):
    """The second checkpoint fails on rank 0, which writes nearly all of it."""
    recipe = load_recipe()
    save, saves = recipe.Accelerator.save_state, []

    def fails(self, *arguments):
        saves.append(1)
        if len(saves) == 2 and distributed.rank() == 0:
            raise OSError(28, "No space left on device")
        return save(self, *arguments)

    recipe.Accelerator.save_state = fails
    try:
        return train_on_rank(folder)
    finally:
        recipe.Accelerator.save_state = save


def test_a_full_disk_stops_all_replicas(tmp_path):
    said = distributed.run(2, full_on_rank, tmp_path)
    assert all("No space left" in text and "step_1 is intact" in text for text in said), said
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


def test_a_run_is_not_lost_to_another_unless_asked_for(recipe, tmp_path):
    first = results_of(recipe, tmp_path / "run")
    flags = [f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoints' / 'step_3'}", "--epochs=3"]
    train(recipe, tmp_path / "other", *flags)
    for other in ([], ["--lr=1e30"], flags):
        with pytest.raises(FileExistsError, match=r"holds a finished run.*--overwrite_output_dir"):
            train(recipe, tmp_path / ("other" if other is flags else "run"), *other)
    assert weights(results(tmp_path / "run")) == weights(first)
    assert steps(tmp_path / "run") == [3, 6]
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(FileExistsError, match=r"unfinished run.*--resume_from_checkpoint latest"):
        train(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run", "--epochs=1", "--overwrite_output_dir")
    assert steps(tmp_path / "run") == [3]
    assert results(tmp_path / "run")["final"]["epoch"] == 1


def test_flags_that_a_checkpoint_keeps_cannot_change(recipe, tmp_path, capsys):
    train(recipe, tmp_path, "--weight_decay=0.1")
    resumed = ["--resume_from_checkpoint=latest", "--epochs=3"]
    with pytest.raises(ValueError, match=r"written with rwp_gamma=None, weight_decay=0.1, and keeps that"):
        train(recipe, tmp_path, *resumed, "--weight_decay=0.2", "--rwp_gamma=0.5")
    capsys.readouterr()
    train(recipe, tmp_path, *resumed, "--weight_decay=0.1", "--lr=0.01", "--workers=1")
    said = capsys.readouterr().err
    assert "lr=0.02 and not 0.01" in said
    assert "epochs=2 and not 3" in said
    assert "workers" not in said
    assert results(tmp_path)["arguments"]["lr"] == 0.01


def test_an_earlier_checkpoint_is_a_new_beginning(recipe, tmp_path):
    train(recipe, tmp_path, "--epochs=3", "--save_total_limit=9")
    checkpoint = tmp_path / "checkpoints" / "step_6"
    other = results_of(recipe, tmp_path, "--epochs=4", "--save_total_limit=9", f"--resume_from_checkpoint={checkpoint}")
    assert [row["epoch"] for row in other["history"]] == [1, 2, 3, 4]
    assert steps(tmp_path) == [3, 6, 9, 12]


def test_a_checkpoint_of_another_method_or_a_longer_run_is_refused(recipe, tmp_path):
    train(recipe, tmp_path, "--method=base", "--epochs=2")
    for flags in (["--method=rwp", "--epochs=2"], ["--method=base", "--epochs=1"]):
        with pytest.raises(ValueError, match="from epoch 2 of method 'base'"):
            train(recipe, tmp_path, *flags, "--resume_from_checkpoint=latest")


def test_what_is_no_whole_checkpoint_is_refused(recipe, tmp_path):
    (tmp_path / "step_3").mkdir()
    with pytest.raises(ValueError, match="step_3 is not a complete checkpoint"):
        train(recipe, tmp_path / "out", f"--resume_from_checkpoint={tmp_path / 'step_3'}")


def test_a_diverged_run_stops_and_saves_nothing(recipe, tmp_path):
    with pytest.raises(FloatingPointError, match=r"the loss is .*nan.* smaller lr or rwp_gamma"):
        train(recipe, tmp_path, "--lr=1e30", "--warmup_epochs=0")
    assert steps(tmp_path) == []


# Broken images


@pytest.fixture
def loaded():
    recipe = load_recipe()
    recipe.load_images = load_images
    return recipe


@pytest.fixture
def pictures(tmp_path):
    """Two classes, 12 training images each and 4 for evaluation, of which three and one cannot be read."""
    folder = tmp_path / "pictures"
    for number in range(32):
        path = folder / ("train" if number < 24 else "val") / ("dark", "light")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (16, 16), (8 * number,) * 3).save(path)
    (folder / "train" / "dark" / "0.png").write_bytes(b"")
    (folder / "train" / "light" / "1.png").write_bytes(b"no image")
    whole = (folder / "train" / "dark" / "2.png").read_bytes()
    (folder / "train" / "dark" / "2.png").write_bytes(whole[: len(whole) // 2])
    (folder / "val" / "light" / "25.png").write_bytes(b"no image")
    return folder


def test_unreadable_images_are_named_and_skipped(loaded, pictures, tmp_path, caplog, capsys):
    found = results_of(loaded, tmp_path / "out", f"--data_dir={pictures}", "--batch_size=8", "--logging_steps=1")
    for name in ("0.png", "1.png", "2.png", "25.png"):
        assert sum(f"{os.sep}{name}" in record.message for record in caplog.records) == 1
    assert found["history"][-1]["epoch"] == 2
    assert [found["final"][name] for name in ("unreadable_images", "unreadable_eval_images")] == [3, 1]
    assert "unreadable images" in capsys.readouterr().out
    assert found["final"]["top1"] * 7 == pytest.approx(round(found["final"]["top1"] * 7))  # of the 7 readable ones


def test_too_many_unreadable_images_stop_training(loaded, pictures, tmp_path):
    flags = [f"--data_dir={pictures}", "--batch_size=8", "--max_bad_images=2"]
    with pytest.raises(ValueError, match="3 images could not be read, more than max_bad_images=2"):
        train(loaded, tmp_path / "out", *flags)
    for name in ("dark/0.png", "light/1.png", "dark/2.png"):
        (pictures / "train" / name).unlink()
    with pytest.raises(ValueError, match="1 images could not be read, more than max_bad_images=0"):
        train(loaded, tmp_path / "other", *flags[:2], "--max_bad_images=0")


def train_on_pictures(folder, pictures, limit):
    flags = [f"--data_dir={pictures}", f"--max_bad_images={limit}", "--batch_size=4", "--logging_steps=1"]
    return train_on_rank(folder, *flags, few=False)


def evaluate_nothing_on_rank(folder, pictures):
    flags = [f"--data_dir={pictures}", "--max_bad_images=99", "--batch_size=4", "--logging_steps=1"]
    return train_on_rank(folder, *flags, few=False)


def test_no_image_to_evaluate_stops_all_replicas(pictures, tmp_path):
    for path in (pictures / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    said = distributed.run(2, evaluate_nothing_on_rank, tmp_path / "out", pictures)
    assert all("no image for evaluation could be read" in text for text in said), said


def test_too_many_unreadable_images_stop_all_replicas(pictures, tmp_path):
    said = distributed.run(2, train_on_pictures, tmp_path / "out", pictures, 2)
    assert all("3 images could not be read" in text for text in said), said
    assert distributed.run(2, train_on_pictures, tmp_path / "enough", pictures, 3) == ["", ""]


# What comes out


def test_the_model_folder_loads_in_timm_and_transformers(recipe, tmp_path):
    train(recipe, tmp_path)
    split = few_digits()["validation"]
    pictures = [Image().decode_example(image).convert("RGB") for image in split["image"][:8]]
    folder = tmp_path / "model"
    described = {"README.md", "results.json", "curves.png", "confusion.png"}
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"} | described
    in_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=in_timm)
    assert (config["input_size"], config["crop_pct"]) == ((3, 16, 16), 1.0)
    images = torch.stack([timm.data.create_transform(**config)(picture) for picture in pictures])
    trained = timm.create_model("test_resnet", num_classes=10)
    trained.load_state_dict(load_file(tmp_path / "checkpoints" / "step_6" / "model.safetensors"))
    with torch.no_grad():
        expected = trained.eval()(images)
        assert torch.equal(in_timm(images), expected)
        in_transformers = AutoModelForImageClassification.from_pretrained(folder).eval()
        torch.testing.assert_close(in_transformers(images).logits, expected, rtol=0, atol=1e-6)
    classify = pipeline("image-classification", str(folder))
    for picture, logits in zip(pictures, expected, strict=True):
        best = classify(picture)[0]
        assert best["label"] == str(logits.argmax().item())
        assert best["score"] == pytest.approx(logits.softmax(0).max().item(), abs=1e-5)


def test_a_vit_of_another_size_comes_out_whole(recipe, tmp_path):
    train(recipe, tmp_path, "--model=vit_tiny_patch16_224", "--img_size=32", "--model_kwargs={depth: 1}", "--epochs=1")
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(again(images).logits, model(images), rtol=0, atol=1e-6)


def test_the_average_of_the_weights_is_what_comes_out(recipe, tmp_path):
    """Against the average written out, from the checkpoint of every step."""
    flags = ["--model_ema", "--model_ema_decay=0.9", "--checkpointing_steps=1", "--save_total_limit=9", "--epochs=1"]
    found = results_of(recipe, tmp_path, *flags, "--method=base")
    files = [folder / "model.safetensors" for folder in checkpoints_in(tmp_path / "checkpoints").values()]
    first, second, third = [load_file(file)["layer1.0.conv1.weight"] for file in files]
    expected = 0.9 * (0.9 * first + 0.1 * second) + 0.1 * third  # timm copies the weights after the first step
    torch.testing.assert_close(load_file(tmp_path / "model" / "model.safetensors")["layer1.0.conv1.weight"], expected)
    assert "top1_ema" in found["final"]


def test_evaluation_only_finds_the_same_figures(recipe, tmp_path):
    results = results_of(recipe, tmp_path / "run")
    for source in (
        f"--pretrained={tmp_path / 'run' / 'model'}",
        f"--resume_from_checkpoint={tmp_path}/run/checkpoints/step_6",
    ):
        train(recipe, tmp_path / "eval", source, "--eval_only")
        found = json.loads((tmp_path / "eval" / "eval.json").read_text())
        assert found.pop("by_class") == results["by_class"]
        names = ("top1", "top5", "eval_loss", "unreadable_eval_images")
        assert found == pytest.approx({name: results["final"][name] for name in names}, rel=1e-5)
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["eval.json"]


def test_evaluation_needs_no_training_images(loaded, pictures, tmp_path):
    flags = [f"--data_dir={pictures}", "--batch_size=8", "--epochs=1"]
    final = results_of(loaded, tmp_path / "run", *flags)["final"]
    shutil.rmtree(pictures / "train")
    source = f"--pretrained={tmp_path / 'run' / 'model'}"
    # More images to a batch than there are, and an odd number, are fine where nothing is trained.
    train(loaded, tmp_path / "eval", *flags[:1], "--eval_only", source, "--validation_split=val", "--batch_size=33")
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["top1"] == final["top1"]


def test_evaluation_of_weights_for_other_classes_is_refused(recipe, loaded, pictures, tmp_path):
    recipe.load_images = few_digits
    train(recipe, tmp_path / "run", "--epochs=1")
    recipe.load_images = load_images
    with pytest.raises(ValueError, match="has no class dark, light, of the 2 in the data: it has 0, 1, 2"):
        train(recipe, tmp_path / "eval", f"--pretrained={tmp_path}/run/model", f"--data_dir={pictures}", "--eval_only")


def test_as_many_classes_of_another_name_are_not_evaluated(loaded, pictures, tmp_path):
    flags = [f"--data_dir={pictures}", "--batch_size=8", "--epochs=1"]
    train(loaded, tmp_path / "run", *flags)
    for split in ("train", "val"):
        (pictures / split / "dark").rename(pictures / split / "shade")
    source = f"--pretrained={tmp_path / 'run' / 'model'}"
    with pytest.raises(ValueError, match="has no class shade, of the 2 in the data: it has dark, light"):
        train(loaded, tmp_path / "eval", flags[0], "--eval_only", source)
    head = load_file(tmp_path / "run" / "model" / "model.safetensors")["fc.weight"]
    train(loaded, tmp_path / "tuned", *flags, source, "--lr=1e-30")
    assert not torch.allclose(load_file(tmp_path / "tuned" / "model" / "model.safetensors")["fc.weight"], head)


def test_evaluation_of_a_checkpoint_has_the_average_too(recipe, tmp_path):
    results = results_of(recipe, tmp_path / "run", "--model_ema", "--model_ema_decay=0.5")
    train(recipe, tmp_path / "eval", f"--resume_from_checkpoint={tmp_path}/run/checkpoints/step_6", "--eval_only")
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert found.pop("by_class")["images"] == results["by_class"]["images"]
    assert found.pop("by_class_ema") == results["by_class"]
    assert found == pytest.approx({name: results["final"][name] for name in found}, rel=1e-5)
    assert {"eval_loss", "eval_loss_ema"} <= set(found)


def test_fine_tuning_begins_with_the_weights_given_and_a_new_head(recipe, pictures, tmp_path):
    train(recipe, tmp_path / "run", "--epochs=1")
    recipe.load_images = load_images
    flags = [f"--data_dir={pictures}", "--batch_size=8", "--lr=1e-30", "--epochs=1"]
    train(recipe, tmp_path / "tuned", f"--pretrained={tmp_path}/run/model", *flags)
    before, after = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "tuned"))
    torch.testing.assert_close(after["layer4.0.conv1.weight"], before["layer4.0.conv1.weight"])
    assert after["fc.weight"].shape == (2, before["fc.weight"].shape[1])


# What is loaded is data


class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


def test_a_checkpoint_that_was_changed_is_refused_by_the_name_of_its_file(recipe, tmp_path):
    train(recipe, tmp_path, "--epochs=1", "--model_ema")
    (tmp_path / "results.json").unlink()
    checkpoint = tmp_path / "checkpoints" / "step_3"
    assert "ema.safetensors" in {file.name for file in checkpoint.iterdir()}
    assert not list(checkpoint.glob("custom_checkpoint_*"))  # which accelerate would unpickle
    torch.save(Bomb(tmp_path / "boom"), checkpoint / "optimizer.bin")
    for flag in ("latest", checkpoint):
        with pytest.raises(ValueError, match=r"step_3 is not the checkpoint that was written: optimizer\.bin"):
            train(recipe, tmp_path, "--model_ema", f"--resume_from_checkpoint={flag}")
    assert not (tmp_path / "boom").exists()


def test_pretrained_weights_that_are_a_program_are_refused_and_not_run(recipe, tmp_path):
    folder = tmp_path / "model"
    save_model(timm.create_model("test_resnet", num_classes=10), folder, label_names=range(10), data_config={})
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "boom"), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"pretrained='{folder}' could not be loaded"):
        train(recipe, tmp_path / "run", f"--pretrained={folder}")
    assert not (tmp_path / "boom").exists()


# The Hub; test_hub_push.py has a real one


def refused_on_rank(folder):
    def refuses(*_, **__):
        raise PushError("ada/net cannot be pushed to: it is not yours")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_rwp.hub.publish.reserve", refuses)
        return train_on_rank(folder, "--push_to_hub", "--hub_model_id=ada/net")


def test_a_repository_that_will_never_be_writable_stops_all_replicas_before_training(tmp_path):
    said = distributed.run(2, refused_on_rank, tmp_path)
    assert all("it is not yours" in text for text in said), said
    assert steps(tmp_path) == []


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed_precision=fp16", "--clip_grad=1", "--model_ema"],
        ["--mixed_precision=bf16", "--channels_last", "--mixup=0.8", "--reprob=0.5"],
        ["--mixed_precision=fp16", "--method=base", "--torch_compile"],
    ],
    ids=" ".join,
)
def test_a_gpu_resumes_bit_exactly(recipe, tmp_path, flags):
    flags = [*flags, "--deterministic", "--checkpointing_steps=2", "--save_total_limit=9"]
    whole = results_of(recipe, tmp_path / "whole", *flags)
    for step in (2, 3, 4):
        folder = cut_back(tmp_path / "whole", tmp_path / f"from_{step}", step)
        assert_same_run(results_of(recipe, folder, *flags, "--resume_from_checkpoint=latest"), whole)


@pytest.mark.gpu
def test_a_gpu_learns_what_a_cpu_learns(recipe, tmp_path):
    run = launch(
        "-c",
        (
            f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); import imagenet\n"
            "recipe = imagenet.load_recipe(); recipe.load_images = imagenet.few_digits\n"
            f"imagenet.train(recipe, {str(tmp_path / 'cpu')!r})"
        ),
        ACCELERATE_USE_CPU="true",
    )
    assert run.returncode == 0, run.stderr
    on_gpu = results_of(recipe, tmp_path / "gpu", "--deterministic")["history"][0]
    assert on_gpu["loss_clean"] == pytest.approx(results(tmp_path / "cpu")["history"][0]["loss_clean"], rel=1e-2)

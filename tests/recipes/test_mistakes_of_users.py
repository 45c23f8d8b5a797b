"""What a user of a recipe has done wrong: one line at last, status 2, ahead of data and model."""

import json
import os
import subprocess
import sys

import forked
import pytest
from imagenet import RECIPES

LIGHT = ["imagenet_rwp", "landscape", "benchmark", "compare"]


def told(recipe, *flags, cwd=None, **environment):
    """The last line of a recipe that ends with status 2; nothing else is on the screen but that it was started."""
    run = forked.run(RECIPES / f"{recipe}.py", *flags, cwd=cwd, **environment)
    *before, last = run.stderr.splitlines() or [""]
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    assert len(before) <= 1, run.stderr
    assert all(line.endswith("loading PyTorch and what else it needs") for line in before), run.stderr
    return last


@pytest.mark.parametrize("recipe", LIGHT)
def test_values_and_files_of_flags(recipe, tmp_path):
    broken, wrong = tmp_path / "broken.yaml", tmp_path / "wrong.yaml"
    broken.write_text("workers: 1\nbatch_size: [1\nlr: 2\n")
    wrong.write_text("workers: 1\nbatch_size: many\n")
    for flags, line in (
        (["--batch_size", "many"], "--batch_size must be a whole number, got 'many'"),
        (["--batch_size"], "--batch_size expected one argument"),
        ([f"--config={broken}"], f"{broken}, line 3: not YAML (expected ',' or ']', but got ':')."),
        ([f"--config={wrong}"], f"{wrong}, line 2: batch_size must be a whole number, got 'many'"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file"),
    ):
        assert told(recipe, *flags, cwd=tmp_path).startswith(f"error: {line}"), flags


def test_a_configuration_is_named_without_its_ending_or_its_folder(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 1\n")
    meant = "--config {}: there is no such file; did you mean {}?"
    assert told("imagenet_rwp", "--config=mine", cwd=tmp_path) == f"error: {meant.format('mine', 'mine.yaml')}"
    digits = os.path.relpath(RECIPES / "configs" / "digits.yaml", tmp_path)
    for name in ("digits", "digits.yaml", "digit.yaml"):
        assert told("imagenet_rwp", "--config", name, cwd=tmp_path) == f"error: {meant.format(name, digits)}"
    folder = f"--config . is a folder: name a file in it; did you mean {'mine.yaml'}?"
    assert told("imagenet_rwp", "--config=.", cwd=tmp_path) == f"error: {folder}"
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff")
    assert "is no text" in told("imagenet_rwp", "--config=picture.yaml", cwd=tmp_path)


@pytest.mark.parametrize(
    ("recipe", "flags", "line"),
    [
        ("imagenet_rwp", ["--sched=cosin"], "sched must be one of cosine, "),
        ("imagenet_rwp", ["--method", "rpw"], "--method must be one of base, rwp, sam, got 'rpw'; did you mean rwp?"),
        ("imagenet_rwp", ["--data_dir=nowhere"], ""),
        ("benchmark", ["--models", "resnet"], "models must be timm models, or cifar_resnet18; not resnet"),
        ("landscape", ["nowhere/model"], ""),
        ("vit_rwp", ["--model_name_or_path=vit_base"], "model_name_or_path='vit_base' is neither a folder, nor an id"),
        ("vit_rwp", ["--lr_scheduler_type", "cosin"], ""),
        ("lora_rwp", ["--rwp_gama=1"], "no flag --rwp_gama; did you mean --rwp_gamma?"),
        ("lora_rwp", ["--learning_rate", "fast"], "--learning_rate must be a number, got 'fast'"),
        ("report", ["--zzz"], "no flag --zzz"),
    ],
)
def test_what_a_recipe_refuses(recipe, flags, line, tmp_path):
    assert told(recipe, *flags, cwd=tmp_path).startswith(f"error: {line}")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


OUT_OF_RANGE = [
    ("imagenet_rwp", ["--epochs=0"], "epochs must be at least 1, got 0"),
    ("imagenet_rwp", ["--rwp_alpha=2"], "rwp_alpha must be in [0, 1], got 2.0"),
    ("imagenet_rwp", ["--eval_only"], "eval_only has nothing to evaluate"),
    ("gamma", ["--draws=0"], "draws must be at least 1, got 0"),
    ("compare", ["--methods", "rpw"], "methods must be some of base, "),
    ("demo", ["--train_images=8"], "train_images must be at least 64, those of a step, got 8"),
    ("benchmark", ["--rounds=1"], "rounds must be at least 2, got 1"),
    ("landscape", [], "models must be one or more folders or ids"),
    ("landscape", ["net", "--grid=4"], "grid must be odd, "),
    ("imagenet_rwp", ["--data_dir=nowhere"], "data_dir='nowhere' is not a folder, nor anything else"),
    ("imagenet_rwp", ["--model=vit_base"], "model must be one of timm's models, got 'vit_base'. Similar names: "),
    ("imagenet_rwp", ["--pretrained=./nowhere"], "pretrained='./nowhere' does not exist"),
    ("gamma", ["--text_file=nowhere.txt"], "text_file='nowhere.txt' is not there"),
    ("vit_rwp", ["--rwp_gamma", "-1"], "rwp_gamma must be finite and at least 0, got -1.0"),
    ("vit_rwp", ["--num_train_epochs=0"], "num_train_epochs must be above 0, got 0.0"),
    ("vit_rwp", ["--model_name_or_path=vit_base"], "model_name_or_path='vit_base' is neither a folder, nor an id"),
    ("vit_rwp", ["--config=wrong.yaml"], "wrong.yaml, line 2: seed must be a whole number, got 'abc'"),
    ("lora_rwp", ["--rwp_gamma", "-1"], "rwp_gamma must be finite and at least 0, got -1.0"),
    ("lora_rwp", ["--num_train_epochs=0"], "num_train_epochs must be above 0, got 0.0"),
    ("lora_rwp", ["--data_file=nowhere.txt"], "data_file='nowhere.txt' is not there"),
    ("lora_rwp", ["--model_name_or_path=./nowhere"], "model_name_or_path='./nowhere' does not exist"),
    ("imagenet_rwp", ["--resume_from_checkpoint=outputs/no"], "resume_from_checkpoint='outputs/no' does not exist"),
    ("vit_rwp", ["--resume_from_checkpoint=outputs/no"], "resume_from_checkpoint='outputs/no' does not exist"),
]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """Of each of `OUT_OF_RANGE` the status, both screens and what slow packages were loaded by then."""
    program = """
import contextlib, io, json, os, runpy, sys
ended = []
for script, flags in json.load(sys.stdin):
    sys.argv = [script, *flags]
    os.environ.pop("HF_RWP_STARTED", None)
    screens = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(screens[0]), contextlib.redirect_stderr(screens[1]):
        try:
            status = runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
    heavy = {"torch", "timm", "datasets", "accelerate"} & {*sys.modules}
    ended.append([status, *(screen.getvalue() for screen in screens), sorted(heavy)])
print(json.dumps(ended))
"""
    cases = json.dumps([[str(RECIPES / f"{recipe}.py"), flags] for recipe, flags, _ in OUT_OF_RANGE])
    folder = tmp_path_factory.mktemp("refusals")
    (folder / "wrong.yaml").write_text("warmup_steps: 3\nseed: abc\n")
    options = {"input": cases, "capture_output": True, "text": True, "cwd": folder}
    run = subprocess.run([sys.executable, "-c", program], timeout=500, **options)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", range(len(OUT_OF_RANGE)), ids=lambda case: " ".join(map(str, OUT_OF_RANGE[case])))
def test_a_value_out_of_range_is_refused_ahead_of_torch(refusals, case):
    status, output, error, heavy = refusals[case]
    assert (status, output, heavy) == (2, "", []), error
    *before, last = error.splitlines()
    assert last.startswith(f"error: {OUT_OF_RANGE[case][2]}")
    of_trainer = {"vit_rwp": "vit", "lora_rwp": "lora"}.get(OUT_OF_RANGE[case][0])  # whose other flags take it
    assert before == ([f"hf-rwp {of_trainer}: loading PyTorch and what else it needs"] if of_trainer else [])


def test_a_recipe_that_runs_out_of_memory_says_what_to_try(tmp_path):
    flags = ["--model=test_vit", "--model_kwargs={embed_dim: 200000000}", f"--output_dir={tmp_path}"]
    run = forked.run(RECIPES / "imagenet_rwp.py", *flags)
    line = "error: out of memory: try a smaller model, or smaller images or texts"
    assert (run.returncode, run.stderr.splitlines()[-1]) == (2, line)
    assert "Traceback" not in run.stderr


def test_all_of_it_is_shown_if_told_to(tmp_path):
    run = forked.run(RECIPES / "imagenet_rwp.py", "--config=nowhere", cwd=tmp_path, HF_RWP_TRACEBACK="1")
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "ValueError: --config nowhere: there is no such file" in run.stderr.splitlines()[-1]

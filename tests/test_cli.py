"""`hf-rwp`: every command reaches its recipe or the Hub's commands, with the flags that it was given."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import yaml
from distributed import night

from hf_rwp import cli

ROOT = Path(__file__).parents[1]
SMALL = ["--img_size=16", "--batch_size=32", "--epochs=1", "--report_to=none"]
STARTED = "hf-rwp train: loading PyTorch and what else it needs\n"
CPU_2 = "recipes/accelerate/cpu_2.yaml"


def hf_rwp(*arguments, blocked=(), cwd=ROOT, **environment):
    block = f"import sys; sys.modules.update(dict.fromkeys({sorted(blocked)}))\n"
    program = block + f"from hf_rwp.cli import main; main({list(map(str, arguments))})"
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What a command leaves in the environment goes with the test."""
    monkeypatch.setenv(cli.PROGRAM, "pytest")
    monkeypatch.setenv("HF_RWP_STARTED", "")
    monkeypatch.delenv("HF_RWP_STARTED")


@pytest.fixture
def started(monkeypatch):
    """What would have been started: (recipe, flags) in this process, or the launcher's arguments."""
    seen = []
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(cli.runpy, "run_path", lambda path, run_name: seen.append((run_name, *sys.argv)))
    monkeypatch.setattr(cli, "launch", lambda *arguments: seen.append(arguments))
    return seen


def test_help_fits_a_screen_and_answers_at_once():
    start = time.monotonic()
    run = hf_rwp("--help")
    assert time.monotonic() - start < 2
    lines = run.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert {"train", "demo", "gamma", "predict", "curves", "push"} <= {*cli.RECIPES, *cli.COMMANDS}
    for command in (*cli.RECIPES, *cli.COMMANDS):
        assert f"\n    {command} " in run.stdout


@pytest.mark.parametrize(("command", "recipe"), [(name, file) for name, (file, _) in cli.RECIPES.items()])
def test_a_recipe_gets_its_flags_as_they_are(started, command, recipe):
    flags = ["outputs/a", "--epochs", "3", "--lrs", "0.1", "0.2", "-h", "--config=mine.yaml", "--no_x", "--name", "a b"]
    cli.main([command, *flags])
    path = ROOT / "recipes" / recipe
    assert started == [("__main__", str(path), *flags)]
    assert path.exists()
    assert sys.path[0] == str(ROOT / "recipes")


def test_processes_and_a_config_file_go_to_the_launcher(started, monkeypatch):
    recipe = ROOT / "recipes" / "imagenet_rwp.py"
    cli.main(["train", "--processes", "2", "--epochs", "3"])
    monkeypatch.chdir(ROOT)
    cli.main(["train", "--processes=1", "--config_file", CPU_2, "--config", "b.yaml"])
    assert started == [(recipe, ["--epochs", "3"], 2, None), (recipe, ["--config", "b.yaml"], 1, CPU_2)]


def test_files_of_the_recipes_are_found_from_elsewhere(started, tmp_path, monkeypatch):
    config = "recipes/configs/digits.yaml"
    monkeypatch.chdir(ROOT)
    cli.main(["train", "--config", config])
    monkeypatch.chdir(tmp_path)
    cli.main(["train", "--config", config, "--data_dir", "recipes/nothing", "--output_dir", "recipes/"])
    assert [arguments[2:] for arguments in started] == [
        ("--config", config),
        ("--config", str(ROOT / config), "--data_dir", "recipes/nothing", "--output_dir", "recipes/"),
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trane"], "no command trane; did you mean train?"),
        (["zzz"], "no command zzz: hf-rwp --help lists the commands"),
        ([], "hf-rwp needs a command, such as train: hf-rwp --help lists the commands"),
        (["--processes", "2"], "a command comes ahead of --processes: hf-rwp --help lists the commands"),
        (["train", "--processes", "0"], "--processes must be at least 1, got 0"),
        (["train", "--processes", "two"], "--processes must be a whole number, got 'two'"),
        (["train", "--config_file", "nix.yaml"], "--config_file nix.yaml: there is no such file; recipes/accelerate"),
        (["push"], "the following arguments are required: FOLDER, USER/NAME"),
        (
            ["push", "nowhere", "ada/digits"],
            "there is no folder nowhere: name one that holds a model, such as outputs/RUN",
        ),
        (["push", ".", "ada/digits", "--branch=a"], "no flag --branch. --help lists the flags that there are"),
        (["record", "nowhere.json", "records.jsonl"], "there is no file nowhere.json: name a run's results.json"),
        (["record", "pyproject.toml", "records.jsonl"], "pyproject.toml is not a run's results.json"),
        (["card", "pyproject.toml"], "pyproject.toml is not a file of records of runs"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, line, capfd):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    said, wrong = capfd.readouterr()
    assert (stopped.value.code, said) == (2, "")
    assert wrong.startswith(f"error: {line}")
    assert wrong.count("\n") == 1


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_a_command_of_the_package_tells_a_mistake_in_one_line(command):
    run = forked.run("-m", "hf_rwp.cli", command, "--zzz=1")
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"error: .*\n", run.stderr)


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("train", "timm", "recipes"), ("compare", "pytorch_optimizer", "compare"), ("lora", "trl", "lora")],
)
def test_a_missing_package_is_named_in_one_line_ahead_of_any_work(command, package, extra):
    line = f"error: hf-rwp {command} needs {package}, which is not installed: pip install 'hf-rwp[{extra}]'\n"
    run = hf_rwp(command, "--help", blocked=[package])
    assert (run.returncode, run.stderr) == (2, line)
    script = ROOT / "recipes" / cli.RECIPES[command][0]
    program = (
        f"import sys, runpy; sys.modules[{package!r}] = None; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=400)
    assert (run.returncode, run.stderr) == (2, line)


def test_the_launcher_is_told_all_that_it_would_warn_about(monkeypatch):
    import accelerate.commands.launch as accelerate_launch

    told = []
    monkeypatch.setattr(accelerate_launch, "launch_command", told.append)
    monkeypatch.setattr(cli.os, "environ", {})
    cli.launch(Path("recipe.py"), ["--epochs", "3"], 2, None)
    cli.launch(Path("recipe.py"), [], 4, "mine.yaml")
    assert logging.getLogger("hf_rwp").isEnabledFor(logging.WARNING)  # for whatever this process does next
    first, second = told
    assert (first.multi_gpu, first.num_processes, first.num_machines) == (True, 2, 1)
    assert (first.training_script, first.training_script_args) == ("recipe.py", ["--epochs", "3"])
    assert None not in (first.mixed_precision, first.dynamo_backend, first.main_process_port)
    assert (second.config_file, second.num_processes) == ("mine.yaml", 4)
    assert yaml.safe_load((ROOT / CPU_2).read_text())["num_processes"] == 2  # the documentation's --processes 2


def test_train_trains_in_this_process(tmp_path):
    run = forked.run("-m", "hf_rwp.cli", "train", *SMALL, "--output_dir", tmp_path / "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["final"]["rwp"]["placement"] == "sequential"
    assert "not passed to `accelerate launch`" not in run.stderr


def test_what_two_processes_refuse_is_told_without_the_launchers_traceback(tmp_path):
    command = ["-m", "hf_rwp.cli", "train", "--processes", "2", "--batch_size=0"]
    run = forked.run(*command, cwd=tmp_path, ACCELERATE_USE_CPU="true")
    assert (run.returncode, run.stderr) == (2, f"{STARTED}error: batch_size must be at least 1, got 0\n")


def test_the_commands_of_the_hub_are_there(tmp_path):
    records = sorted((ROOT / "recipes" / "results").glob("*.jsonl"))
    cli.main(["card", *map(str, records), "--folder", str(tmp_path)])
    assert sorted(path.stem for path in tmp_path.glob("*.md")) == sorted(path.stem for path in records)


# Something on the screen at once


def starting(*command, to_the_end=False, **environment):
    """The lines on stderr of a process, up to that which says that it was started, or all of them."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_RWP_STARTED", "RANK", "LOCAL_RANK")}
    environment = {**kept, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *map(str, command)], env=environment, cwd=ROOT, **pipes) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if not to_the_end and line.startswith("hf-rwp "):
                process.kill()
                break
        return lines


BY_COMMAND = [(command, True) for command in cli.RECIPES]


@pytest.mark.parametrize(
    ("command", "by_command"),
    night([*((command, False) for command in cli.RECIPES), *BY_COMMAND], BY_COMMAND[1:]),
)
def test_a_recipe_says_that_it_was_started_ahead_of_what_takes_seconds(command, by_command):
    words = ["outputs/net"] if command == "landscape" else []  # which needs some
    start = ["-m", "hf_rwp.cli", command] if by_command else [ROOT / "recipes" / cli.RECIPES[command][0]]
    imported = starting("-X", "importtime", *start, *words)
    assert f"hf-rwp {command}: loading PyTorch and what else it needs\n" in imported
    assert [line for line in imported if re.search(r"\| +(torch|timm|datasets|accelerate)$", line)] == []


def test_only_the_main_process_says_so_and_only_once():
    recipe, line = ROOT / "recipes" / "imagenet_rwp.py", "hf-rwp train: loading"
    assert starting(recipe, RANK="0", LOCAL_RANK="0")[-1].startswith(line)
    processes = ["-m", "hf_rwp.cli", "train", "--processes", "2", "--batch_size=0"]
    for command, environment, times in (
        ([recipe, "--batch_size=0"], {"RANK": "8", "LOCAL_RANK": "0"}, 0),
        ([recipe, "--help"], {}, 0),
        (processes, {"ACCELERATE_USE_CPU": "true"}, 1),
    ):
        lines = starting(*command, to_the_end=True, **environment)
        assert sum(text.startswith(line) for text in lines) == times


def test_a_record_and_a_card_are_told_and_a_runs_folder_stands_for_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/results.json").write_text(json.dumps({"final": {"epoch": 1, "top1": 0.5}, "arguments": {}}))
    cli.main(["record", "run", "records.jsonl"])
    assert capsys.readouterr().out == "Appended run/results.json to records.jsonl\n"
    monkeypatch.setattr("hf_rwp.hub.__main__.card_of_record", lambda records: "# card\n")
    cli.main(["card", "records.jsonl"])
    assert capsys.readouterr().out == "Wrote model_cards/records.md\n"


@pytest.mark.parametrize("command", ["push", "record", "card"])
def test_help_says_what_each_argument_is(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"  \S", line)]
    assert [line for line in lines if not re.match(r"  .*\S  +\S", line) and len(line) < 24] == []

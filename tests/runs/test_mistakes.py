"""runs/mistakes.py: what is on the screen at last, of one process and of two, under each way to start them."""

import argparse
import errno
import os
import re
import signal
import sys

import forked
import pytest
from distributed import night

from hf_rwp.runs.mistakes import Parser, in_words, refuse, told_in_a_line

SCRIPT = """
import dataclasses, os, signal, sys
from hf_rwp.runs.parsing import start

@dataclasses.dataclass
class Flags:
    seen_by: str = dataclasses.field(default="all", metadata={"help": "The processes that refuse."})
    kind: str = dataclasses.field(default="refusal", metadata={"help": "What is raised."})

def main(flags):
    if flags.seen_by not in ("all", os.environ.get("RANK")):
        signal.pause()  # until the launcher ends it
    if flags.kind == "none":
        print("up", flush=True)
        signal.pause()
    if flags.kind == "bug":
        {}["missing"]
    raise ValueError("the images are not there:\\n  name others")

if __name__ == "__main__":
    start(main, Flags)
"""
LINE = "error: the images are not there: name others"
AGENT = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port=0", "--mixed_precision=no"]
AGENT += ["--dynamo_backend=no"]


@pytest.fixture
def started(tmp_path):
    (tmp_path / "recipe.py").write_text(SCRIPT)

    def started(way, *flags, **environment):
        script = str(tmp_path / "recipe.py")
        program = {
            "hf-rwp": ["-c", f"from hf_rwp.cli import launch, Path; launch(Path({script!r}), {[*flags]}, 2, None)"],
            "accelerate": ["-m", "accelerate.commands.launch", *AGENT, script, *flags],
            "alone": ["-m", "accelerate.commands.launch", "--cpu", script, *flags],
            "quiet": ["-m", "accelerate.commands.launch", "--cpu", "--quiet", script, *flags],
        }[way]
        return forked.started(*program, cwd=tmp_path, **{"ACCELERATE_USE_CPU": "true", **environment})

    return started


@pytest.fixture
def launched(started):
    def launched(*arguments, **environment):
        with started(*arguments, **environment) as program:
            return program.end()

    return launched


@pytest.mark.parametrize("seen_by", night(["all", "0", "1"], ["0"]))
def test_hf_rwp_ends_with_the_line_whichever_process_has_seen_it(launched, seen_by):
    run = launched("hf-rwp", "--seen_by", seen_by)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", f"{LINE}\n")


def test_hf_rwp_shows_a_bug_and_all_of_a_mistake_if_told_to(launched):
    run = launched("hf-rwp", "--kind=bug", "--seen_by=1")
    assert run.returncode == 1
    assert run.stderr.rstrip().endswith("KeyError: 'missing'")
    run = launched("hf-rwp", "--seen_by=1", HF_RWP_TRACEBACK="1")
    assert run.returncode == 1
    assert "ValueError: the images are not there" in run.stderr
    assert "ChildFailedError" in run.stderr


def test_ctrl_c_under_hf_rwp_with_two_processes_prints_no_traceback(started):
    with started("hf-rwp", "--kind=none") as launcher:
        launcher.wait_for("up\nup\n")
        os.killpg(launcher.pid, signal.SIGINT)
        run = launcher.end()
    assert run.returncode == 130, run.stderr
    assert run.stderr.strip() == "stopped by Ctrl-C: what was not saved before is lost"


@pytest.mark.parametrize("seen_by", ["all", "1"])
def test_the_report_of_accelerate_ends_with_the_line(launched, seen_by):
    run = launched("accelerate", "--seen_by", seen_by)
    assert run.returncode != 0
    *_, last, border = run.stderr.rstrip().splitlines()
    assert (last, set(border)) == (f"  traceback : {LINE}", {"="})
    assert run.stderr.splitlines().count(LINE) <= (seen_by == "all")  # of the main process, if it came to it
    assert 'recipe.py", line' not in run.stderr


def test_one_process_of_accelerate_says_it_once_and_quietly_at_last(launched):
    assert launched("alone", "--seen_by=all").stderr.splitlines().count(LINE) == 1
    assert launched("quiet", "--seen_by=all").stderr.splitlines()[-1] == LINE


def test_of_processes_without_an_agent_each_says_what_others_may_not_see(monkeypatch, capsys):
    for rank, everywhere, said in (("0", True, True), ("1", True, False), ("1", False, True)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            refuse("the images are not there", everywhere=everywhere)
        assert capsys.readouterr().err == ("error: the images are not there\n" if said else "")


def test_ctrl_c_is_told_in_a_line_wherever_it_comes(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped, told_in_a_line():
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nstopped by Ctrl-C: what was not saved before is lost\n"
    monkeypatch.setenv("HF_RWP_TRACEBACK", "1")
    with pytest.raises(KeyboardInterrupt), told_in_a_line():
        raise KeyboardInterrupt


def test_a_bar_of_progress_does_not_stand_in_the_line(capsys):
    from tqdm import tqdm

    bar = tqdm(total=2, file=sys.stderr)
    bar.update()
    with pytest.raises(SystemExit):
        refuse("the images are not there")
    bar.update()
    assert capsys.readouterr().err.splitlines()[-1] == "error: the images are not there"


def test_a_file_that_may_not_be_written_and_a_full_disk_are_told_and_other_errors_are_not(capsys):
    for number in (errno.EACCES, errno.ENOSPC, errno.EROFS):
        with pytest.raises(SystemExit), told_in_a_line():
            open_as(OSError(number, os.strerror(number), "outputs/a"))
        assert capsys.readouterr().err == f"error: outputs/a: {os.strerror(number)}\n"
    for error in (
        FileNotFoundError(errno.ENOENT, "not there", "results.json"),
        OSError(errno.EACCES, "none"),
        KeyError(),
    ):
        with pytest.raises(type(error)), told_in_a_line():
            open_as(error)


def test_a_file_that_was_typed_and_is_not_there_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lora_rwp.py", "--known_file=known.txt", "--data_file", "sums.jsonl"])
    for name in ("known.txt", "sums.jsonl"):
        with pytest.raises(SystemExit), told_in_a_line():
            open_as(FileNotFoundError(errno.ENOENT, "No such file or directory", name))
        assert capsys.readouterr().err == f"error: {name}: No such file or directory\n"


def test_what_the_libraries_of_hugging_face_cannot_find_is_told_in_their_words(capsys):
    from transformers import AutoConfig

    with pytest.raises(SystemExit), told_in_a_line():
        AutoConfig.from_pretrained("nowhere/at/all")
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "nowhere/at/all" in said
    assert said.count("\n") == 1


def open_as(error):
    """Raise as a function of Python's own does, and not this file."""
    namespace = {"error": error}
    exec(compile("raise error", "<frozen io>", "exec"), namespace)


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ({"type": int}, "two", "--lr must be a whole number, got 'two'"),
        ({"type": float}, "fast", "--lr must be a number, got 'fast'"),
        (
            {"choices": ["cosine", "step"]},
            "cosin",
            "--lr must be one of cosine, step, got 'cosin'; did you mean cosine?",
        ),
        ({"choices": ["cosine", "step"]}, "zzz", "--lr must be one of cosine, step, got 'zzz'"),
    ],
)
def test_a_value_is_refused_in_words(argument, value, said):
    parser = Parser()
    parser.add_argument("--lr", "--learning-rate", **argument)
    for words, line in ([["--lr", value], said], [["--lr"], "--lr expected one argument"]):
        with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
            parser.parse_args(words)
    with pytest.raises(ValueError, match=r"^no flag --learnin_rate; did you mean"):
        Parser.parse_args(parser, ["--learnin_rate=1"])


def test_what_is_not_of_a_flag_stays_as_argparse_has_it():
    assert in_words("the following arguments are required: folder") == "the following arguments are required: folder"
    assert issubclass(Parser, argparse.ArgumentParser)

"""runs/parsing.py: how a recipe is started; tests/recipes/test_arguments.py has what its flags mean."""

import forked
import pytest

SCRIPT = """
import dataclasses, os, signal, sys
from hf_rwp.core.checks import check_all
from hf_rwp.runs.parsing import start

@dataclasses.dataclass
class Flags:
    lr: float = dataclasses.field(default=0.1, metadata={"help": "Rate."})

    def __post_init__(self):
        check_all(self, ("lr", self.lr > 0, "above 0"))

    def kept(self):
        return "a.jsonl has it" if self.lr == 5 else None

def main(flags):
    if flags.lr == 1:
        raise FileNotFoundError("there is no such folder: name another one")
    if flags.lr == 2:
        {}["missing"]
    if flags.lr == 3:
        int("three")
    if flags.lr in (4, 5):
        os.kill(os.getpid(), signal.SIGINT if flags.lr == 4 else signal.SIGTERM)
    print("trained", flags.lr)

start(main, Flags)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "recipe.py").write_text(SCRIPT)
    return lambda *flags: forked.run(tmp_path / "recipe.py", *flags)


def test_a_refusal_is_one_line(script):
    for flag, status, line in (
        ("--lr=0", 2, "error: lr must be above 0, got 0.0"),
        ("--lrr=1", 2, "error: no flag --lrr; did you mean --lr?"),
        ("--lr=1", 2, "error: there is no such folder: name another one"),
    ):
        run = script(flag)
        assert (run.returncode, run.stderr) == (status, f"{line}\n")


def test_what_fails_otherwise_keeps_its_traceback(script):
    for flag, error in (("--lr=2", "KeyError: 'missing'"), ("--lr=3", "ValueError: invalid literal")):
        run = script(flag)
        assert run.returncode == 1
        assert "Traceback" in run.stderr
        assert error in run.stderr.splitlines()[-1]


def test_ctrl_c_ahead_of_training_takes_no_traceback(script):
    run = script("--lr=4")
    assert run.returncode == 130
    assert "Traceback" not in run.stderr
    assert "stopped by Ctrl-C" in run.stderr


def test_sigterm_says_what_is_kept(script):
    run = script("--lr=5")
    assert (run.returncode, run.stderr) == (143, "\nstopped by SIGTERM: a.jsonl has it\n")


def test_without_an_error_it_just_runs(script):
    run = script("--lr=0.5")
    assert (run.returncode, run.stdout) == (0, "trained 0.5\n")

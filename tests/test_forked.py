"""support/forked.py: a fork is to its test what `python ...` is."""

import os
import signal
import subprocess

import forked
import pytest


@pytest.mark.parametrize(
    ("code", "status", "output", "error"),
    [
        ("print('done')", 0, "done\n", ""),
        ("raise SystemExit(3)", 3, "", ""),
        ("raise SystemExit('no such folder')", 1, "", "no such folder\n"),
        ("import atexit; atexit.register(print, 'last')", 0, "last\n", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, "", ""),
    ],
)
def test_status_and_screen_are_those_of_a_process(code, status, output, error):
    run = forked.run("-c", code)
    assert (run.returncode, run.stdout, run.stderr) == (status, output, error)


def test_what_is_raised_is_shown_as_by_python():
    run = forked.run("-c", "{}['missing']")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("Traceback (most recent call last):\n")
    assert run.stderr.endswith("KeyError: 'missing'\n")


def test_a_script_has_arguments_folder_environment_and_modules_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("OURS", "1")
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, beside\n"
        "os.environ['LEAKED'] = '1'\n"
        "print(__name__, sys.argv[1:], os.getcwd(), os.environ['OURS'], os.environ['ITS'], beside.VALUE)\n"
    )
    run = forked.run(script, "--flag", 2, cwd=tmp_path, ITS="own")
    assert (run.returncode, run.stdout) == (0, f"__main__ ['--flag', '2'] {tmp_path} 1 own 7\n"), run.stderr
    assert forked.run("-c", "import os; print('LEAKED' in os.environ)").stdout == "False\n"


def test_one_that_does_not_end_is_killed(tmp_path):
    code = f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(600)"
    with pytest.raises(subprocess.TimeoutExpired) as expired:
        forked.run("-c", code, timeout=2)
    assert (expired.value.output, expired.value.stderr) == ("", "")
    for process in tmp_path.iterdir():  # if it got that far
        with pytest.raises(ProcessLookupError):
            os.kill(int(process.name), 0)


def test_a_signal_to_its_group_reaches_its_children_and_not_us():
    code = (
        "import os, signal, time\n"
        "child = os.fork()\n"
        "try:\n    print('ready', flush=True)\n    time.sleep(600)\n"
        "except KeyboardInterrupt:\n    os._exit(7) if child == 0 else None\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    with forked.started("-c", code) as program:
        program.wait_for("ready\nready\n")
        os.killpg(program.pid, signal.SIGINT)
        assert program.end(60).returncode == 7

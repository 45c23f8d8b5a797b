"""Trackers of a run that goes on: the same run there, with stand-ins for Weights & Biases and Trackio."""

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_rwp.runs import tracking


class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


@pytest.fixture
def trackers(monkeypatch):
    """Modules called wandb and trackio; what they were begun with, and what was logged."""
    seen = SimpleNamespace(begun=[], logged=[])
    for name in ("wandb", "trackio"):

        def init(name=name, **options):
            seen.begun.append((name, options))
            log = lambda values, step=None, **_: seen.logged.append((name, step, values))  # noqa: E731
            return SimpleNamespace(log=log, finish=lambda: None)

        module = ModuleType(name)
        module.init = (lambda init: lambda **options: init(**({"run": options.pop("name")} | options)))(init)
        module.config = Config()
        module.__spec__ = SimpleNamespace()
        monkeypatch.setitem(sys.modules, name, module)
    there = [*get_available_trackers(), LoggerType.WANDB, LoggerType.TRACKIO]
    monkeypatch.setattr("accelerate.tracking._available_trackers", there)
    return seen


def begin(folder, names, *, step=0, resumed=False):
    config = ProjectConfiguration(str(folder), logging_dir=str(folder / "logs"))
    accelerator = Accelerator(cpu=True, log_with=names, project_config=config)
    tracking.begin_tracking(accelerator, folder, {"lr": 0.1}, step, resumed)
    return accelerator


def test_a_run_that_goes_on_is_the_same_run_there(trackers, tmp_path):
    import trackio
    import wandb

    folder = tmp_path / "digits_rwp_seed0" / "2"
    for resumed in (False, True):
        begin(folder, ["wandb", "trackio"], step=4 * resumed, resumed=resumed).log({"loss": 0.5}, step=5)
    first, again = trackers.begun[:2], trackers.begun[2:]
    assert first == again
    (_, of_wandb), (_, of_trackio) = first
    assert (of_wandb["run"], of_wandb["resume"]) == ("digits_rwp_seed0_2", "allow")
    assert of_wandb["id"] == json.loads((folder / tracking.IDENTITY).read_text())["id"]
    assert (of_trackio["run"], of_trackio["resume"]) == (f"digits_rwp_seed0_2-{of_wandb['id']}", "allow")
    assert {name for name, *_ in trackers.logged} == {"wandb", "trackio"}
    assert wandb.config == trackio.config == {"lr": "0.1"}
    begin(folder, ["wandb"])  # anew, in its place
    assert trackers.begun[-1][1]["id"] != of_wandb["id"]


def test_tensorboard_has_one_run_with_its_flags(tmp_path):
    for step, resumed in ((0, False), (2, True)):
        accelerator = begin(tmp_path, ["tensorboard"], step=step, resumed=resumed)
        for number in range(step + 1, step + 4):
            accelerator.log({"loss": 10.0 * resumed + number}, step=number)
        accelerator.end_training()
    folders = {file.parent for file in (tmp_path / "logs").rglob("*") if file.is_file()}
    assert folders == {tmp_path / "logs" / "hf_rwp"}
    events = EventAccumulator(str(tmp_path / "logs" / "hf_rwp")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 13.0),  # the first session's is left out
        (4, 14.0),
        (5, 15.0),
    ]
    assert any("hparams" in tag for tag in events.summary_metadata)
    command = [sys.executable, "-m", "tensorboard.main", "--inspect", "--logdir", str(tmp_path / "logs")]
    assert "loss" in subprocess.run(command, capture_output=True, check=True, text=True).stdout


def test_the_same_for_trainer(trackers, tmp_path):
    class TensorBoardCallback:
        logging_dir = None

    def trainer():
        callbacks = SimpleNamespace(callbacks=[TensorBoardCallback()])
        args = SimpleNamespace(run_name=None, report_to=["tensorboard", "wandb", "trackio"])
        return SimpleNamespace(args=args, callback_handler=callbacks, is_world_process_zero=lambda: True)

    first, again = trainer(), trainer()
    tracking.track_trainer(first, tmp_path / "run", resumed=False)
    tracking.track_trainer(again, tmp_path / "run", resumed=True)
    (_, of_first), (_, of_again) = trackers.begun
    assert of_first == of_again
    assert (of_first["run"], of_first["resume"]) == ("run", "allow")
    assert first.args.run_name == again.args.run_name == f"run-{of_first['id']}"
    assert again.callback_handler.callbacks[0].logging_dir == str(tmp_path / "run" / "logs")

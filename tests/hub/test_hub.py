"""What a push does without a Hub: its command, its patience, its errors; test_hub_push.py has one."""

import re
import shlex
import sys
import traceback
from pathlib import Path

import pytest
import torch

from hf_rwp import push_to_hub
from hf_rwp.hub import push as hub
from hf_rwp.hub.push import hf_upload, push


def test_the_command_that_finishes_a_push_survives_a_shell():
    command = hf_upload(Path("out puts/$x"), "ada/net", revision="v2", tag="it's", private=True)
    upload, tag = command.split(" && ")
    words = shlex.split(upload)
    assert words[:5] + words[-3:] == ["hf", "upload", "ada/net", "out puts/$x", ".", "--revision", "v2", "--private"]
    assert shlex.split(tag) == ["hf", "repos", "tag", "create", "ada/net", "it's", "--revision", "v2"]


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(28, "No space left on device"), False),
        (FileNotFoundError("model.safetensors"), False),
        (ValueError("Invalid metadata in README.md"), False),
    ],
)
def test_what_another_attempt_may_mend_is_tried_again(tmp_path, monkeypatch, error, passes):
    (tmp_path / "model.safetensors").write_bytes(b"")
    attempts = []

    def fails(*_):
        attempts.append(1)
        raise error

    monkeypatch.setattr(hub, "_push_once", fails)
    monkeypatch.setattr(hub.time, "sleep", attempts.append)
    with pytest.raises(hub.PushError, match=r"failed: [\s\S]*    hf upload ada/net"):
        hub.push(tmp_path, "ada/net")
    assert attempts == ([1, 2, 1, 10, 1, 30, 1] if passes else [1])


def test_an_error_that_quotes_the_token_does_not_get_through(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"")

    def fails(*_):
        raise ValueError("bad header: Bearer hf_secret and hf_stored")

    monkeypatch.setattr(hub, "_push_once", fails)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_stored")
    token = "hf_secret"
    with pytest.raises(hub.PushError) as caught:
        hub.push(tmp_path, "ada/net", token=token)
    assert "hf_s" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("token", [True, False, None])
def test_a_token_may_be_said_to_be_the_stored_one_or_none(tmp_path, monkeypatch, token):
    (tmp_path / "model.safetensors").write_bytes(b"")
    asked = []

    def fails(api, *_):
        asked.append(api.token)
        raise ValueError("no: hf_stored")

    monkeypatch.setattr(hub, "_push_once", fails)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_stored")
    with pytest.raises(hub.PushError, match=r"no: \*\*\*"):
        hub.push(tmp_path, "ada/net", token=token)
    assert asked == [token]


def test_a_signed_address_loses_its_signature(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"")

    def fails(*_):
        raise ValueError("403 for url 'https://ada:word@s3.net/lfs/01?X-Amz-Signature=5ec&id=1' (see https://a.b?c=d)")

    monkeypatch.setattr(hub, "_push_once", fails)
    with pytest.raises(hub.PushError) as caught:
        hub.push(tmp_path, "ada/net")
    assert "for url 'https://s3.net/lfs/01' (see https://a.b" in str(caught.value)
    assert not re.search("5ec|id=1|c=d|word", str(caught.value))


def test_a_push_in_the_background_is_waited_for_so_long_and_no_longer(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    background = hub.BackgroundPush(tmp_path / "pushing", "ada/net", revision=None, private=None)
    background._command = [sys.executable, "-c", "import signal; signal.signal(15, 1); signal.pause()"]
    background.start(tmp_path / "model", "Step 1")
    monkeypatch.setattr(hub, "LAST_WAIT", 0.1)
    background.finish()
    assert not background.busy
    assert not (tmp_path / "pushing").exists()


def test_a_folder_without_weights_is_not_pushed_over_those_on_the_hub(tmp_path):
    (tmp_path / "README.md").write_text("")
    for folder in (tmp_path, tmp_path / "typo"):
        with pytest.raises(ValueError, match="holds no weights: a push would remove those on the Hub"):
            push(folder, "ada/model")


@pytest.mark.parametrize("value", [93.0, -0.1, float("nan")])
def test_accuracies_in_percent_are_refused_before_anything_is_written(tmp_path, value):
    with pytest.raises(ValueError, match=r"fractions in .*top1="):
        push_to_hub(torch.nn.Linear(2, 2), "ada/model", metrics={"top1": value}, folder=tmp_path / "model")
    assert list(tmp_path.iterdir()) == []

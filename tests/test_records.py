import getpass
import json
import socket
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hf_rwp.records import command_of, environment, weights_digest, without_places


def test_the_environment_names_versions_and_nobody():
    facts = environment(Accelerator(cpu=True))
    assert facts["versions"]["torch"] == torch.__version__
    assert (facts["hardware"]["replicas"], facts["hardware"]["mixed_precision"]) == (1, "no")
    text = json.dumps(facts)
    assert str(Path.home()) not in text
    for private in (socket.gethostname(), getpass.getuser()):
        assert f'"{private}"' not in text


def test_digests_are_equal_for_equal_bits_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).bfloat16()
    digest = weights_digest(model)
    assert weights_digest(model.to(memory_format=torch.channels_last)) == digest
    model[1].running_mean[0] += 2**-7
    assert weights_digest(model) != digest


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("/home/someone/data/pets", "pets"),
        ("../someone/pets", "pets"),
        ("~/data/pets", "pets"),
        ("here/pets", "pets"),  # a folder that there is
        ("timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        (0.1, 0.1),
        (None, None),
    ],
)
def test_places_on_this_machine_are_left_out(value, kept, tmp_path, monkeypatch):
    (tmp_path / "here" / "pets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert without_places(value) == kept


def test_a_command_says_what_differs_from_the_defaults():
    defaults = {"lr": 0.1, "scale": [0.1, 1.0], "model": "resnet18", "ratio": None}
    arguments = {"lr": 0.2, "scale": [0.5, 1.0], "model": "resnet18", "ratio": None}
    assert command_of("train.py", arguments, defaults) == "accelerate launch train.py --lr 0.2 --scale 0.5 1.0"

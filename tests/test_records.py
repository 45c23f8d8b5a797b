import getpass
import json
import socket
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hf_rwp.records import environment, weights_digest, without_places


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
    ("value", "kept"), [("/home/someone/data/pets", "pets"), ("outputs/run", "outputs/run"), (0.1, 0.1), (None, None)]
)
def test_places_on_this_machine_are_left_out(value, kept):
    assert without_places(value) == kept

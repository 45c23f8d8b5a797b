"""What every test needs: no network, one thread, and no state of Accelerate left behind."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_accelerate_state():
    """Accelerate keeps its state in class attributes: each test begins and ends without any."""
    _reset()
    yield
    _reset()


def _reset() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()

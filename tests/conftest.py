"""What every test needs: no network, one thread, and no state of Accelerate left behind."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import imagenet
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


@pytest.fixture
def recipe(monkeypatch):
    """recipes/imagenet_rwp.py as a module, on a hundred of the digits."""
    loaded = imagenet.load_recipe()
    monkeypatch.setattr(loaded, "load_images", imagenet.few_digits)
    return loaded

"""What every test needs: no network, one thread, seeded generators, and no state of Accelerate left behind."""

import gc
import os
import random
import signal

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background, whose processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What takes seconds to import is imported where it is used: xdist's controller reads this file too, and runs no test.


def pytest_collection_finish() -> None:
    """Ahead of the first test, in each process that runs some."""
    import distributed
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or libraries look for the driver at each of many questions
    gc.set_threshold(100_000, 50, 50)
    distributed.context()  # there is one server to fork from, whoever starts it


@pytest.fixture(autouse=True, scope="module")
def collected():
    """What is imported by now stays: whoever collects garbage, as Trainer does, need not go over a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds():
    """What a test draws does not depend on the tests before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():  # `torch.manual_seed` keeps a traceback where there is no GPU
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def no_accelerate_state():
    """Accelerate keeps its state in class attributes: each test begins and ends without any."""
    _reset()
    yield
    _reset()


def _reset() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture
def recipe(monkeypatch):
    """recipes/imagenet_rwp.py as a module, on a hundred of the digits."""
    import imagenet

    loaded = imagenet.load_recipe()
    monkeypatch.setattr(loaded, "load_images", imagenet.few_digits)
    return loaded

"""Where the randomness of a run comes from, and whether kernels may be fast or must give the same bits."""

import os

import numpy as np
import torch


def derive_seed(*position: int) -> int:
    """A seed in [0, 2^32) for a place in a run: (seed, update, replica). Each number is at least 0."""
    return int(np.random.SeedSequence(position).generate_state(1)[0])


def use_fast_kernels(deterministic: bool = False) -> None:
    """On GPUs what timm's train.py uses: the fastest kernels found by trial, and TF32; or those of the same bits."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)

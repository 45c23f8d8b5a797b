import torch

from hf_rwp.runs.determinism import derive_seed, use_fast_kernels


def test_every_place_has_a_seed_of_its_own_which_stays():
    """Old checkpoints go on with the same augmentation."""
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0)]
    seeds = [derive_seed(*place) for place in places]
    assert len(set(seeds[:4])) == 4
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert derive_seed(3, 1_000_000, 7) == derive_seed(3, 1_000_000, 7) == 2_553_384_617


def test_kernels_are_fast_or_deterministic():
    try:
        for deterministic in (True, False):
            use_fast_kernels(deterministic)
            assert torch.are_deterministic_algorithms_enabled() is deterministic
            assert torch.backends.cudnn.benchmark is not deterministic
    finally:
        torch.use_deterministic_algorithms(False)

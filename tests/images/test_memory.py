"""Images that lie on the device."""

import pytest
import torch

from hf_rwp.images import memory


def test_a_share_of_labels_is_drawn_anew_evenly_from_all_classes():
    labels = torch.arange(10).repeat(1000)
    drawn = memory.with_wrong_labels(labels, 0.3, 10, seed=3)
    assert (drawn != labels).float().mean().item() == pytest.approx(0.27, abs=0.01)
    assert drawn.bincount(minlength=10).min() > 900
    assert torch.equal(memory.with_wrong_labels(labels, 0.3, 10, seed=3), drawn)


def test_asymmetric_noise_takes_the_next_class_for_a_share_of_them():
    labels = torch.arange(10).repeat(100)
    drawn = memory.with_wrong_labels(labels, 0.4, 10, seed=3, kind="asymmetric")
    wrong = drawn != labels
    assert wrong.sum() == 400
    assert torch.equal(drawn[wrong], (labels[wrong] + 1) % 10)
    assert labels[wrong].bincount(minlength=10).min() > 20  # of every class


@pytest.mark.parametrize(
    "settings",
    [
        {"label_noise_kind": "pair"},
        {"label_noise": 1.1},
        {"test_images": 0},
        {"aa": "rand-m9"},
        {"color_jitter": 0.4},
        {"reprob": 0.5},
    ],
)
def test_flags_that_images_in_memory_cannot_follow_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {value!r}"):
        memory.MemoryArguments(**settings)

"""How Trainer's count of items divides between slots: by replica, or by micro-step on one."""

from types import SimpleNamespace

import pytest
import torch

from hf_rwp.trainer.items import alike, count_once, slots_of

# Tokens of each batch, by process: every process has two batches.
TOKENS = [[1, 5], [2, 8], [3, 1], [4, 6]]


def counted(rank, across, each):
    """What `count_once` gives on a process, and the collectives that it took."""
    sent = []

    def gather(tensor):
        sent.append(tensor)
        rows = [torch.tensor([sum(own), *own] if each else [sum(own)]) for own in TOKENS]
        assert torch.equal(tensor.flatten(), rows[rank])
        return torch.cat(rows)

    accelerator = SimpleNamespace(gather=gather)

    def count(batches):
        total = torch.tensor(sum(batches))
        return accelerator.gather(total).sum() if across else total

    return count_once(accelerator, count, TOKENS[rank], each), sent


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_the_count_is_trainers_and_no_collective_more(across, each):
    for rank, own in enumerate(TOKENS):
        (total, everyone, mine), sent = counted(rank, across, each)
        assert total == (30 if across else sum(own))
        assert len(sent) == across
        assert mine == (own if each else [])
        assert everyone == ([[sum(row), *row] if each else [sum(row)] for row in TOKENS] if across else [])


def slots(rank, homes, across):
    (_, everyone, own), _ = counted(rank, across, each=max(homes) == 0)
    return slots_of(rank, homes, 2, everyone, own)


def test_replicas_have_the_tokens_of_all_their_processes():
    for rank, own in enumerate(TOKENS):
        found = slots(rank, [0, 0, 1, 1], across=True)
        assert found.shares == (16 / 30, 14 / 30)
        assert found.parts == pytest.approx([sum(own) * 4 / 30 / 2] * 2)


def test_micro_steps_have_the_tokens_of_all_processes_of_the_one_replica():
    for rank, own in enumerate(TOKENS):
        found = slots(rank, [0] * 4, across=True)
        assert found.shares == (10 / 30, 20 / 30)
        assert found.parts == pytest.approx([n * 4 / 30 for n in own])


def test_a_process_that_counts_for_itself_mixes_over_its_own():
    for rank, (first, second) in enumerate(TOKENS):
        parts = [first / (first + second), second / (first + second)]
        found = slots(rank, [0] * 4, across=False)
        assert found.shares == tuple(parts)
        assert found.parts == pytest.approx(parts)
        assert slots(rank, [0, 0, 1, 1], across=False) == alike(2)


def test_a_step_without_any_token_has_no_shares():
    assert slots_of(0, [0], 2, [], [0.0, 0.0]) == ((0, 0), [0, 0])
    assert slots_of(0, [0, 1], 2, [[0.0], [0.0]], []) == ((0, 0), [0, 0])


def test_what_cannot_be_counted_is_alike():
    accelerator = SimpleNamespace(gather=None)
    total, everyone, own = count_once(accelerator, lambda batches: None, [1, 2], each=True)
    assert (total, everyone, own) == (None, [], [])
    assert slots_of(0, [0], 2, everyone, own) == alike(2)

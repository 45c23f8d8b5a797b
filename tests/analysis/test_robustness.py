"""What noise, rounding and pruning leave of a linear classifier whose logits are known."""

import pytest
import torch
from torch import nn

from hf_rwp.analysis import robustness
from hf_rwp.analysis.robustness import pruned


@pytest.fixture
def model():
    """Four inputs, two classes; one bias."""
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 1.0, -3.0, 0.5], [-2.0, 5.0, 0.25, 6.0]]))
        model.bias.copy_(torch.tensor([0.01, 0.0]))
    return model


def test_pruning_sets_the_smallest_share_of_each_layer_to_0(model):
    inputs, labels = torch.eye(4), torch.tensor([0, 1, 1, 1])  # the rows of the transposed weight are the logits
    assert pruned(model, [(inputs, labels)], 0).accuracy == 1
    # Half of eight: 0.25, 0.5, 1 and 2 go; the third input keeps -3 against 0.
    left = pruned(model, [(inputs, labels)], 0.5)
    logits = torch.tensor([[4.01, 0.0], [0.01, 5.0], [-2.99, 0.0], [0.01, 6.0]])
    assert left.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    # Six of eight: 5 and 6 stay, and the bias decides where nothing else does, for the third input wrongly.
    assert pruned(model, [(inputs, labels)], 0.75).accuracy == 0.75
    assert model.weight[1, 2].item() == 0.25


def test_pruning_cuts_ties_to_the_count(model):
    with torch.no_grad():
        model.weight.fill_(1.0)
    counts = []
    handle = model.register_forward_pre_hook(lambda module, _: counts.append(int(module.weight.count_nonzero())))
    pruned(model, [(torch.eye(4), torch.zeros(4, dtype=torch.long))], 0.3)
    handle.remove()
    assert counts == [8 - 2]


def test_all_of_a_layer_is_not_pruned(model):
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\)"):
        pruned(model, [], 1.0)


def test_a_report_has_a_figure_for_every_change_and_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    judges = [(torch.eye(4), torch.tensor([0, 1, 1, 1]))]
    learned = [(10 * torch.eye(4), torch.tensor([1, 0, 0, 0]))]
    found = robustness.robustness(model, judges, learned)
    assert found["as_they_are"] == 1
    assert found["bits"]["8"] == 1
    # 2 bits: -1, 0, 1 times the largest of a filter, 4 and 6; 5 rounds to 6, the third input to -4 against 0.
    assert found["bits"]["2"] == 1
    assert found["noise"] == {"0.01": 1.0, "0.02": 1.0, "0.03": 1.0}  # a hundredth of the filters turns none of them
    assert set(found["pruned"]) == {"0.3", "0.5", "0.7"}
    assert found["train"]["accuracy"] == 0
    logits = 10 * model.weight.detach().T + model.bias.detach()
    assert found["train"]["loss"] == pytest.approx(nn.functional.cross_entropy(logits, learned[0][1]).item(), rel=1e-6)
    assert set(found["rise"]) == {"0.01", "0.02", "0.03"}
    assert found == robustness.robustness(model, judges, learned)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

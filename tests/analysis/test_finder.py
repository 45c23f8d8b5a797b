"""find_gamma on models whose loss under noise is known, and on models with state that it must leave alone."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_rwp import RWP, find_gamma
from hf_rwp.analysis.batches import check_batch
from hf_rwp.analysis.finder import DOWN, UP, GammaProposal, NothingLearnedError
from hf_rwp.analysis.sharpness import worst_case
from hf_rwp.core.gamma import DEFAULT_GAMMA


class Quadratic(nn.Module):
    """The output is L(w) = curvature / 2 * ||w - centre||^2, at its minimum; 3 filters of 4 weights and a bias."""

    def __init__(self, curvature):
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.curvature, self.centre = curvature, [self.matrix.detach().clone(), self.bias.detach().clone()]

    def forward(self, inputs):
        parts = [((w - c) ** 2).sum() for w, c in zip((self.matrix, self.bias), self.centre, strict=True)]
        return inputs * self.curvature / 2 * sum(parts)


BATCHES = [(torch.ones(2, dtype=torch.float64), torch.zeros(2))]


def mean(output, labels):
    return output.mean()


@pytest.mark.parametrize("noise", ["filter", "filter_normalized"])
@pytest.mark.parametrize("noise_1d", [True, False])
def test_proposal_under_known_curvature_is_the_closed_form(noise, noise_1d):
    """E[L(w + eps)] - L(w) = curvature / 2 * gamma^2 * sum of ||filter||^2 * (fan_in in mode `filter`, else 1)."""
    model, curvature = Quadratic(3.0), 3.0
    fan_in = (4, 5) if noise == "filter" else (1, 1)
    trace = fan_in[0] * model.matrix.square().sum().item() + noise_1d * fan_in[1] * model.bias.square().sum().item()
    found = find_gamma(model, BATCHES, mean, noise=noise, noise_1d=noise_1d, rise=0.2, draws=200)
    assert found.gamma == pytest.approx(math.sqrt(2 * 0.2 / (curvature * trace)), rel=0.06)
    assert (found.reached, found.allowed, found.loss) == (True, 0.2, 0)
    assert math.isnan(found.baseline)
    for level in found.levels:
        assert level.rise == pytest.approx(curvature / 2 * level.gamma**2 * trace, rel=0.12)
        assert level.low < level.rise < level.high
    assert [level.gamma for level in found.levels] == [DEFAULT_GAMMA[noise] * f for f in UP[: len(found.levels)]]
    assert found.levels[-2].rise < 0.2 <= found.levels[-1].rise  # no larger noise is tried than needed


def test_less_noise_than_the_first_is_tried_where_that_is_too_much():
    found = find_gamma(Quadratic(3.0), BATCHES, mean, rise=1e-6, draws=200)
    trace = sum(length * w.square().sum().item() for length, w in zip((4, 5), Quadratic(3.0).parameters(), strict=True))
    assert found.gamma == pytest.approx(math.sqrt(2 * 1e-6 / (3.0 * trace)), rel=0.06)
    assert found.reached
    tried = [0.01 * UP[0], *(0.01 * factor for factor in DOWN)][: len(found.levels)]
    assert [level.gamma for level in found.levels] == tried[::-1]
    assert found.levels[0].rise < 1e-6 <= found.levels[1].rise


def test_a_loss_that_never_rises_or_always_does_says_so():
    never = find_gamma(Quadratic(0.0), BATCHES, mean, rise=1e-6)
    assert (never.gamma, never.reached) == (0.01 * UP[-1], False)
    always = find_gamma(Quadratic(1e9), BATCHES, mean, rise=1e-6)
    assert (always.gamma, always.reached) == (0.01 * DOWN[-1], False)


def test_batchnorm_takes_the_batches_statistics_and_keeps_its_own(classifier):
    """Noise on a layer ahead of BatchNorm that scales the whole layer is undone by it, as in training."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4, affine=False)).train()
    batches = list(images(2))
    running = model[1].running_var.clone()
    levels = find_gamma(model, batches, rise=1e9).levels
    assert levels[-1].gamma == 0.01 * UP[-1]
    assert max(level.high for level in levels) < 4  # of eval mode it would be that of huge logits
    assert torch.equal(model[1].running_var, running)


def test_a_flatter_loss_gets_more_noise():
    steep, flat = (find_gamma(Quadratic(c), BATCHES, mean, rise=0.2, draws=20).gamma for c in (4.0, 1.0))
    assert flat == pytest.approx(2 * steep, rel=1e-6)  # the same draws


class Classifier(nn.Module):
    """BatchNorm, dropout, a frozen weight, and a module in eval mode amid training ones."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
        self.drop.eval()
        self.fails_at, self.calls = None, 0

    def forward(self, inputs):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return self.out(self.drop(self.norm(inputs * self.frozen)))


@pytest.fixture
def classifier():
    """Trained until it tells 4 classes apart."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for inputs, labels in images(30):
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    cross_entropy(model(inputs), labels).backward()  # a gradient that is still to be used
    model.calls = 0
    return model


def images(count):
    for _ in range(count):
        labels = torch.randint(4, (16,))
        yield torch.randn(16, 8) + 3 * nn.functional.one_hot(labels, 8), labels


def state(model):
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    chance = (torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()])
    return [tensor.tolist() for tensor in tensors], modes, flags, chance, torch.is_grad_enabled()


@pytest.mark.parametrize("fails_at", [None, 1, 7])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_and_all_chance_are_what_they_were_whatever_raises(classifier, fails_at, frozen):
    def shuffled():  # as a loader's workers draw
        for batch in images(3):
            random.random(), np.random.rand()
            yield batch

    before = state(classifier)
    classifier.fails_at = fails_at
    if fails_at is None:
        assert 0 < find_gamma(classifier, shuffled(), frozen=frozen).gamma < math.inf
    else:
        with pytest.raises(KeyboardInterrupt):
            find_gamma(classifier, shuffled(), frozen=frozen)
    assert state(classifier) == before


def test_the_rise_is_a_share_of_what_was_learned(classifier):
    batches = list(images(4))
    found = {share: find_gamma(classifier, batches, share=share) for share in (0.1, 0.5)}
    counts = torch.cat([labels for _, labels in batches]).bincount() / 64
    for share, proposal in found.items():
        assert proposal.baseline == pytest.approx(-(counts * counts.log()).sum().item(), rel=1e-5)
        assert proposal.allowed == pytest.approx(share * (proposal.baseline - proposal.loss))
    assert found[0.1].gamma < found[0.5].gamma


def test_sizes_are_those_that_a_wrapper_reports(classifier):
    found = find_gamma(classifier, list(images(2)))
    assert set(found.sizes) == {"norm.weight", "norm.bias", "out.weight", "out.bias"}
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(400, 50))
    trained = find_gamma(model, [(torch.randn(4, 400), torch.zeros(4))], mean, rise=1e9)
    assert not trained.reached  # a linear loss of mean 0
    rwp = RWP(torch.optim.SGD(model.parameters(), lr=0.0), model, gamma=trained.gamma, alpha=1.0)
    model(torch.randn(4, 400)).sum().backward()
    rwp.step()
    said = rwp.report()["relative_noise"]["largest"]
    assert said["name"] == "0.weight"
    assert trained.sizes["0.weight"] == pytest.approx(said["size"], rel=0.02)


def test_mappings_take_the_models_own_loss():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))
    ids = torch.arange(8).repeat(4, 2)
    labels = ids.clone()
    labels[0, 5:] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(60):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = find_gamma(model, [{"input_ids": ids, "labels": labels}])
    assert found.loss == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-4)
    counts = labels[:, 1:][labels[:, 1:] != -100].bincount() / (3 * 15 + 4)
    assert found.baseline == pytest.approx(-(counts * counts.log()).sum().item(), rel=1e-5)
    with pytest.raises(ValueError, match="Bare gave no loss for a batch with input_ids, labels: a mapping needs"):
        find_gamma(Bare(model.model), [{"input_ids": ids, "labels": labels}])


class Bare(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, labels):
        return self.inner(input_ids)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise": "layer"}, "unknown noise mode 'layer'"),
        ({"share": 1.0}, r"share must be in \(0, 1\), got 1.0"),
        ({"rise": 0.0}, "rise must be finite and above 0, got 0.0"),
        ({"num_batches": 0}, "num_batches must be at least 1, got 0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        find_gamma(nn.Linear(2, 2), [], **options)


def test_weights_that_have_learned_nothing_are_refused_with_what_to_do():
    torch.manual_seed(0)
    with pytest.raises(
        NothingLearnedError, match=r"have not learned enough .* train without noise for a few hundred steps first"
    ):
        find_gamma(Classifier().eval(), list(images(4)))


def test_losses_without_classes_need_a_rise():
    with pytest.raises(ValueError, match=r"labels are float32, of which there is no guess .*: set rise"):
        find_gamma(Quadratic(1.0), [(torch.ones(2), torch.zeros(2))], mean)


def alone(labels):
    return [(torch.zeros(3, 8, 8), labels)] * 4


@pytest.mark.parametrize("measure", [find_gamma, lambda model, batches: worst_case(model, batches)])
@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (alone(3), r"a sample by itself \(its label is 3\): pass batches .*DataLoader\(samples"),
        (alone(torch.tensor(3)), r"a sample by itself \(its label is a tensor of shape \(\)\)"),
        ([{"input_ids": torch.arange(4), "labels": torch.arange(4)}], r"its label is a tensor of shape \(4,\)"),
        ([{"input_ids": torch.arange(4)}], "a mapping with input_ids: it needs `labels`"),
        (
            (torch.zeros(5, 3, 8, 8), torch.zeros(5)),
            r"a Tensor of shape \(5, 3, 8, 8\): .*as \[\(inputs, labels\)\]",
        ),
        (["a text"], "batches gave a str: pass many batches"),
    ],
)
def test_samples_in_place_of_batches_are_refused_with_what_batches_are(measure, batches, said):
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten())
    with pytest.raises(ValueError, match=said):
        measure(model, batches)


def test_a_class_to_a_text_is_a_batch():
    check_batch({"input_ids": torch.zeros(4, 9, dtype=torch.int64), "labels": torch.zeros(4, dtype=torch.int64)})


def test_no_batches_and_a_frozen_model_are_refused():
    with pytest.raises(ValueError, match="batches gave nothing"):
        find_gamma(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="no trainable floating-point parameter"):
        find_gamma(nn.Linear(2, 2).requires_grad_(False), list(images(1)), rise=1.0)


def test_a_loss_that_is_no_number_is_refused(classifier):
    classifier.out.bias.data[0] = math.nan
    with pytest.raises(NothingLearnedError, match="the loss is nan"):
        find_gamma(classifier, list(images(1)))


def test_a_proposal_is_printed_in_a_line():
    found = GammaProposal(0.015, True, "filter", 1.0, 2.3, 0.16, (), {"fc.weight": 0.1})
    assert repr(found).startswith("GammaProposal(gamma=0.015, reached=True, noise='filter', loss=1.0")
    assert len(repr(found)) < 120

"""Losses that compare samples with each other: noticed when a batch is first split, and what `rwp_split=False` does."""

import functools
import logging
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trainer_runs import LOUD, Tagger, Watch, assert_gradient, logged, make, paper, sentences
from transformers import CLIPConfig, CLIPModel

from hf_rwp import RWPArguments, RWPTrainer


class Pairs(nn.Module):
    """Embeds two views of a sample. whole: the name of what it returns beside the loss, a number for every two."""

    def __init__(self, whole="", width=7, features=4):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.whole = nn.Linear(features, width, dtype=torch.float64), whole

    def forward(self, one, other):
        scores = self.net(one) @ self.net(other).mT
        loss = F.cross_entropy(10 * scores, torch.arange(len(scores)))
        return {"loss": loss, **({self.whole: scores} if self.whole else {})}


class InfoNCELoss(nn.Module): ...


def pairs(count, features=4):
    views = torch.randn(2, count, features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [{"one": one, "other": other} for one, other in zip(*views, strict=True)]


def of_pairs(call, inputs):
    """The loss of a batch, as it is."""
    return call(**inputs)["loss"], 1


def train(folder, model, caplog, kind=RWPTrainer, **options):
    watch = Watch()
    options = {"train_dataset": pairs(20), "callbacks": [watch], **LOUD, **options}
    trainer = make(model, folder, kind, **options)
    with caplog.at_level(logging.WARNING, "hf_rwp"):
        trainer.train()
    return trainer, watch.steps, [line for line in caplog.messages if "compares the samples" in line]


def with_attribute(name, value):
    model = Pairs()
    setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Pairs("scores"), "an output of shape (3, 3):"),
        (Pairs("logits_per_image"), "logits_per_image:"),
        (Pairs("scores", width=3), ""),  # as many columns as the model has outputs: may be classes
        (Pairs(), ""),
        (with_attribute("loss_of_pairs", InfoNCELoss()), "InfoNCELoss:"),
    ],
)
def test_it_is_said_once_when_a_batch_is_first_split(tmp_path, caplog, model, said):
    _, steps, lines = train(tmp_path, model, caplog)
    assert [step.roles for step in steps] == 4 * [[False, True]]
    assert len(lines) == bool(said)
    assert all(line.startswith(said) and "rwp_split=False" in line for line in lines)
    assert all(len(model._forward_hooks) == 1 for _ in lines)  # RWP's own


def test_an_output_as_long_as_the_samples_are_is_not_taken_for_one(tmp_path, caplog):
    """Tokens, say, of which a sample has as many as half a batch has samples."""
    *_, lines = train(tmp_path, Pairs("scores", features=3), caplog, train_dataset=pairs(20, features=3))
    assert not lines


def contrastive(outputs, labels, num_items_in_batch=None):
    return outputs["loss"]


def plain(outputs, labels, num_items_in_batch=None):
    return outputs["loss"]


class WithLoss(RWPTrainer):
    """As SentenceTransformerTrainer has its loss, or a dict of them by data set."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        ranking = type("MultipleNegativesRankingLoss", (nn.Module,), {})
        self.loss = {"first": nn.MSELoss(), "second": nn.ModuleList([ranking()])}


class KTOTrainer(RWPTrainer): ...


@pytest.mark.parametrize(
    ("kind", "loss", "said"),
    [
        (RWPTrainer, contrastive, "contrastive:"),
        (RWPTrainer, functools.partial(contrastive), "contrastive:"),
        (RWPTrainer, plain, ""),
        (WithLoss, plain, "MultipleNegativesRankingLoss:"),
        (KTOTrainer, plain, "KTOTrainer, with the mean KL"),
    ],
)
def test_names_of_losses_and_trainers_are_known(tmp_path, caplog, kind, loss, said):
    _, _, lines = train(tmp_path, Pairs(), caplog, kind, compute_loss_func=loss)
    assert [line[: len(said)] for line in lines] == ([said] if said else [])


def test_losses_of_given_pairs_by_the_name_of_contrastive_ones_are_not_meant(tmp_path, caplog):
    kind = type("ContrastiveLoss", (nn.Module,), {"__module__": "sentence_transformers.losses"})
    _, _, lines = train(tmp_path, with_attribute("loss_of_pairs", kind()), caplog)
    assert lines == []


def test_clip_says_so_by_its_own_argument(tmp_path, caplog):
    parts = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**parts, "vocab_size": 9, "max_position_embeddings": 4, "eos_token_id": 8}
    vision = {**parts, "image_size": 4, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=5))
    ids = torch.randint(8, (8, 4), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": line, "pixel_values": torch.full((3, 4, 4), float(i))} for i, line in enumerate(ids)]

    def collate(batch):
        return {**{name: torch.stack([row[name] for row in batch]) for name in batch[0]}, "return_loss": True}

    _, _, lines = train(tmp_path, model, caplog, train_dataset=rows, data_collator=collate)
    assert [line.partition(":")[0] for line in lines] == ["return_loss"]


def test_whole_batches_take_turns_where_nothing_is_split(tmp_path, caplog):
    options = {"rwp_split": False, "gradient_accumulation_steps": 2, "train_dataset": pairs(25)}
    _, steps, lines = train(tmp_path, Pairs("scores"), caplog, **options)
    assert lines == []
    for step in steps:
        assert step.roles == [False, True]
        assert {len(inputs["one"]) for _, inputs in step.slots} == {5}
        assert_gradient(step, paper(Pairs(), step.clean, step.slots, 0.5, tokens=False, loss=of_pairs), atol=1e-12)
    (first, _), (second, _) = [slot[1].values() for slot in steps[-1].slots]
    assert torch.equal(first, second)  # an epoch's last batch is the only one of its step, and taken twice
    assert [line for line in caplog.messages if "left whole: both gradients are taken on it" in line]


def test_a_whole_batch_and_its_halves_differ_where_samples_are_compared(tmp_path, caplog):
    small = {"rwp_gamma": 1e-9, "max_steps": 1}
    halves, _, _ = train(tmp_path, Pairs(), caplog, **small)
    whole, _, _ = train(tmp_path, Pairs(), caplog, rwp_alpha=1.0, rwp_split=False, **small)
    assert logged(halves)[0] < 0.9 * logged(whole)[0]


def test_without_another_way_to_two_gradients_it_is_refused_at_construction(tmp_path):
    with pytest.raises(ValueError, match=r"^rwp_split=False leaves .* gradient_accumulation_steps=2.* rwp_alpha=1"):
        make(Tagger(), tmp_path, **LOUD, rwp_split=False, train_dataset=sentences(5))


@pytest.mark.parametrize("options", [{"rwp_alpha": 1.0}, {"rwp_gamma": 0.0}, {"rwp": False}])
def test_with_one_gradient_to_a_step_it_is_not(tmp_path, options):
    make(Tagger(), tmp_path, **{**LOUD, "rwp_split": False, **options}, train_dataset=sentences(5))


def test_a_loop_of_ones_own_has_no_such_option():
    @dataclass
    class Recipe(RWPArguments):
        lr: float = 0.1

    with pytest.raises(ValueError, match="rwp_split=False is for Trainer"):
        Recipe(rwp_split=False)

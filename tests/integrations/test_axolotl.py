"""RWP in Axolotl: by keys of its YAML, whatever Trainer it builds. The package is a stand-in."""

import dataclasses
import importlib.util
import logging
import re
from pathlib import Path

import pytest
import yaml
from trainer_runs import Tagger, Watch, assert_gradient, logged, paper, same, sentences, tensors

pytest.importorskip("pydantic", reason="Axolotl brings it")
import axolotl_stand_in as axolotl

from hf_rwp import RWPArguments, RWPTrainerMixin

PLUGIN = "hf_rwp.integrations.axolotl.RWPPlugin"
QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
QUIET |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "num_train_epochs": 1}
KEYS = {"base_model": "tagger", "micro_batch_size": 5, "plugins": [PLUGIN], "rwp_gamma": 0.2, "rwp_alpha": 0.3}
MANUAL = (Path(__file__).parents[2] / "recipes" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def installed():
    with axolotl.installed():
        yield


def trained(folder, counts=True, **keys):
    watch = Watch()
    given = {"train_dataset": sentences(20), "callbacks": [watch], **QUIET}
    trainer = axolotl.build({**KEYS, **keys}, Tagger(counts), str(folder), **given)
    trainer.train()
    return trainer, watch.steps


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_keys_make_any_of_its_trainers_one_of_rwp(tmp_path, accumulation):
    trainer, steps = trained(tmp_path, gradient_accumulation_steps=accumulation)
    assert type(trainer).__mro__[1:3] == (RWPTrainerMixin, axolotl.AxolotlTrainer)
    assert len(steps) == 4 // accumulation
    for step, loss in zip(steps, logged(trainer), strict=True):
        assert step.roles == [False, True]
        expected = paper(Tagger(), step.clean, step.slots, 0.3, tokens=True)
        assert_gradient(step, expected)
        assert loss == pytest.approx(expected["loss"].item(), rel=1e-5)
    assert len(logged(trainer, "loss_gap")) == len(steps)


def test_switched_off_it_is_its_own_trainer_bit_for_bit(tmp_path):
    plain, _ = trained(tmp_path, plugins=[], rwp_gamma=None, rwp_alpha=None)
    off, _ = trained(tmp_path, rwp=False)
    assert type(off) is type(plain) is axolotl.AxolotlTrainer
    assert same(tensors(off.model), tensors(plain.model))
    assert logged(off) == logged(plain)


def test_the_keys_are_the_flags_with_their_defaults():
    from hf_rwp.integrations.axolotl import RWPInputArgs, RWPPlugin

    fields = {field.name: field for field in dataclasses.fields(RWPArguments)}
    assert {name: field.description for name, field in RWPInputArgs.model_fields.items()} == {
        name: field.metadata["help"] for name, field in fields.items()
    }
    cfg, (plugin,) = axolotl.read({"base_model": "tagger", "plugins": [PLUGIN]})
    assert isinstance(plugin, RWPPlugin)
    assert plugin.get_training_args(cfg) == {"rwp": True}
    cfg, _ = axolotl.read({**KEYS, "rwp_noise_1d": "false", "rwp_seed": "3"})
    assert plugin.get_training_args(cfg) == {
        **{"rwp": True, "rwp_gamma": 0.2, "rwp_alpha": 0.3, "rwp_noise_1d": False, "rwp_seed": 3}
    }


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"rwp_gama": 0.1}, r"RWP has no key rwp_gama; did you mean rwp_gamma\?"),
        ({"rwp_zzz": 0.1}, r"no key rwp_zzz"),
        ({"rwp_gamma": -1.0}, "rwp_gamma must be"),
        ({"rwp_gamma": "much"}, "valid number"),
        ({"rwp_split": False}, "rwp_split=False leaves batches whole"),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, keys, match):
    with pytest.raises(ValueError, match=match):
        axolotl.build({**KEYS, **keys}, Tagger(), str(tmp_path), train_dataset=sentences(5), **QUIET)


def test_pairs_are_refused_without_accumulation(tmp_path):
    class AxolotlDPOTrainer(type("DPOTrainer", (axolotl.AxolotlTrainer,), {})): ...

    given = {"train_dataset": sentences(5), "kind": AxolotlDPOTrainer, **QUIET}
    with pytest.raises(ValueError, match="a batch of AxolotlDPOTrainer has the chosen answers"):
        axolotl.build(KEYS, Tagger(), str(tmp_path), **given)
    axolotl.build({**KEYS, "gradient_accumulation_steps": 2}, Tagger(), str(tmp_path), **given)


def test_packed_samples_are_said_to_be_taken_twice(tmp_path, caplog):
    given = {"train_dataset": sentences(5), **QUIET}
    with caplog.at_level(logging.WARNING, "hf_rwp"):
        axolotl.build({**KEYS, "sample_packing": True}, Tagger(), str(tmp_path), **given)
    assert len([line for line in caplog.messages if line.startswith("packing,")]) == 1


def test_the_yaml_of_the_manual_is_read(tmp_path):
    (block,) = [text for text in re.findall(r"```yaml\n(.*?)```", MANUAL, flags=re.DOTALL) if PLUGIN in text]
    trainer, steps = trained(tmp_path, **{"rwp_alpha": None, **yaml.safe_load(block)})
    assert trainer.rwp.report()["slots"] == {"clean": 2, "perturbed": 2}
    assert len(steps) == 2


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="axolotl is not installed")
def test_the_stand_in_has_the_hooks_of_axolotl():
    import subprocess
    import sys

    program = "from axolotl.integrations.base import BasePlugin; print(*(n for n in vars(BasePlugin) if n[0] != '_'))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(found.stdout.split()) == set(axolotl.HOOKS)

"""The blocks of recipes/README.md for other people's loops: each runs as it stands, and takes both gradients."""

import importlib
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from reference import mixed_gradient, noises, seen_weights, snapshot
from torch import nn
from torch.utils.data import DataLoader

from hf_rwp import RWP

MANUAL = (Path(__file__).parents[2] / "recipes" / "README.md").read_text(encoding="utf-8")
SECTION = MANUAL.partition("\n## Other people's loops\n")[2].partition("\n## ")[0]
BLOCKS = dict(re.findall(r"<!-- loop: ([\w -]+) -->\n```python\n(.*?)^```$", SECTION, flags=re.DOTALL | re.MULTILINE))
QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 2, "bf16": False}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """On a CPU, in a folder of its own, without what an earlier Accelerator left."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(name, package, **given):
    """What a block leaves, given what is yours."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    names = {"torch": torch, **given}
    exec(compile(BLOCKS[name], f"recipes/README.md: {name}", "exec"), names)
    return names


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def classes(batches=4):
    inputs = torch.randn(5 * batches, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return DataLoader([(x, int(x.argmax()) % 3) for x in inputs], batch_size=5)


def both(rwp, steps=2):
    assert rwp.report()["slots"] == {"clean": steps, "perturbed": steps}


def test_every_block_has_a_test():
    tested = re.findall(r'\brun\(\s*"([\w -]+)"', Path(__file__).read_text(encoding="utf-8"))
    assert set(tested) == set(BLOCKS)
    assert len(re.findall(r"^```python$", SECTION, flags=re.MULTILINE)) == len(BLOCKS)


def test_accelerate():
    both(run("accelerate", "accelerate", model=classifier(), loader=classes())["rwp"])


def test_fabric():
    both(run("fabric", "lightning", model=classifier(), loader=classes())["rwp"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning():
    both(run("lightning", "lightning", model=classifier(), loader=classes())["trainer"].optimizers[0])


@pytest.mark.parametrize("steps", [1, 2])
def test_timms_train_py(steps):
    """Around the line, what train.py does: its task, its optimizer, its loop (timm 1.0.29 and later)."""
    tasks = pytest.importorskip("timm.task")
    from timm.optim import create_optimizer_v2
    from timm.utils import NativeScaler

    model, args = classifier(), SimpleNamespace(grad_accum_steps=2)
    task = tasks.ClassificationTask(
        model=model, criterion=nn.CrossEntropyLoss(), device=torch.device("cpu"), verbose=False
    )
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, weight_decay=0.0)
    optimizer = run("timm", "timm", args=args, model=task.get_trainable_module(), optimizer=optimizer)["optimizer"]
    assert type(optimizer) is RWP
    scaler = NativeScaler(device="cpu") if steps == 1 else None
    task.get_trainable_module().train()
    optimizer.zero_grad()
    gradients, batches = [], list(classes())
    optimizer.base.register_step_pre_hook(
        lambda *_: gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    clean = snapshot(model)
    with seen_weights(model) as seen:
        for number, (inputs, target) in enumerate(batches):
            need_update = (number + 1) % args.grad_accum_steps == 0
            loss = task(inputs, target)["loss"] / args.grad_accum_steps
            if scaler is not None:
                scaler(loss, optimizer, need_update=need_update)
            else:
                loss.backward()
                if need_update:
                    optimizer.step()
            if need_update:
                optimizer.zero_grad()
            if number == 1:
                noise = noises(seen, clean)
    assert noise[0] is None
    expected = mixed_gradient(model, clean, noise, batches[:2], nn.functional.cross_entropy, 0.5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, expected[name])
    both(optimizer)


def language():
    from small_language import llama, texts, tokenizer

    return {"model": llama(), "data": texts(32), "tokenizer": tokenizer(), "options": QUIET}


def test_trl():
    both(run("trl", "trl", **language())["trainer"].optimizer.optimizer)


def test_trl_with_the_mixin():
    both(run("trl mixin", "trl", **language())["trainer"].rwp)


def embedder():
    from sentence_transformers import SentenceTransformer
    from small_language import tokenizer
    from transformers import BertConfig, BertModel

    models = importlib.import_module("sentence_transformers.models")
    config = BertConfig(vocab_size=23, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained("bert")
    tokenizer().save_pretrained("bert")
    words = models.Transformer("bert")
    return SentenceTransformer(modules=[words, models.Pooling(16)], device="cpu")


def test_sentence_transformers(caplog):
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence_transformers is not installed")
    from datasets import Dataset

    rows = [" ".join(f"w{(i * j) % 20}" for j in range(1, 5)) for i in range(40)]
    pairs = Dataset.from_dict({"anchor": rows, "positive": rows[::-1]})
    names = run("sentence-transformers", "sentence_transformers", model=embedder(), pairs=pairs, options=QUIET)
    both(names["trainer"].rwp)
    assert "compares the samples" not in caplog.text
    args = names["RWPSentenceTransformerArguments"]("split", rwp=True, **QUIET)
    loss = names["losses"].MultipleNegativesRankingLoss(names["model"])
    names["RWPSentenceTransformerTrainer"](names["model"], args, train_dataset=pairs, loss=loss).train()
    assert caplog.text.count("MultipleNegativesRankingLoss: a loss that compares the samples") == 1


def test_diffusers():
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    from diffusers import UNet2DModel

    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}
    kinds = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(**sizes, **kinds, layers_per_block=1)
    both(run("diffusers", "diffusers", unet=unet, images=DataLoader(torch.randn(20, 1, 8, 8), batch_size=5))["rwp"])

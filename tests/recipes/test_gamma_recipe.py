"""recipes/gamma.py on a few digits and a few sentences."""

import json

import imagenet
import PIL.Image
import pytest
import timm
import torch
import yaml
from timm.data import resolve_data_config
from transformers import AutoModelForCausalLM

from hf_rwp.analysis.finder import GammaProposal, NoiseLevel, find_gamma
from hf_rwp.hub.export import save_model
from hf_rwp.runs.parsing import parse_arguments
from hf_rwp.runs.records import read_records
from hf_rwp.trainer.language import known_texts, make_base

DIGITS = [str(digit) for digit in range(10)]
SMALL = ["--img_size=16", "--batch_size=20", "--draws=2", "--num_batches=2"]
CONFIGS = sorted((imagenet.RECIPES / "configs" / "gamma").glob("*.yaml"))


@pytest.fixture
def recipe(monkeypatch):
    loaded = imagenet.load_recipe(imagenet.RECIPES / "gamma.py")
    monkeypatch.setattr(loaded, "load_images", imagenet.few_digits)
    return loaded


@pytest.fixture
def run(recipe, tmp_path):
    """Runs the recipe as from a command line; gives what it wrote as numbers."""

    def record(*words):
        argv = recipe.words([*map(str, words), *SMALL, f"--output_dir={tmp_path / 'out'}"])
        recipe.main(parse_arguments(recipe.Arguments, argv))
        return json.loads((tmp_path / "out/gamma.json").read_text())

    return record


def test_a_new_model_learns_first_and_gets_a_proposal_in_both_modes(run, tmp_path, capsys):
    record = run("--steps=40", "--lr=0.05")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gamma.json", "gamma.png"]
    with PIL.Image.open(tmp_path / "out/gamma.png") as picture:
        assert picture.format == "PNG"
    assert record["steps"] == 40
    assert record["command"].startswith("python recipes/gamma.py --")
    assert "--lr 0.05" in record["command"]
    assert "output_dir" not in record["command"]
    said = capsys.readouterr().out
    assert "after 40 steps without noise" in said
    assert "try half and twice of it too" in " ".join(said.split())
    assert max(map(len, said[: said.index("Wrote to")].splitlines())) <= 80
    for mode, found in record["proposals"].items():
        assert found["levels"][-2]["rise"] < found["allowed"] <= found["levels"][-1]["rise"]
        assert found["levels"][-2]["gamma"] < found["gamma"] <= found["levels"][-1]["gamma"]
        assert found["allowed"] == pytest.approx(0.125 * (found["baseline"] - found["loss"]))
        assert found["sizes"]["fc.weight"] > 0
        assert f"noise {mode}" in said
    filters, normalized = (record["proposals"][mode] for mode in ("filter", "filter_normalized"))
    assert f"--rwp_gamma {filters['gamma']:.2g}, where" in said
    assert f"--rwp_gamma {normalized['gamma']:.2g} --rwp_noise filter_normalized, where" in said
    assert list(normalized["sizes"].values()) == pytest.approx([normalized["gamma"]] * len(normalized["sizes"]))


def test_a_loss_that_falls_has_one_sign(recipe):
    levels = NoiseLevel(0.01, -1e-3, -2e-3, 0.0), NoiseLevel(0.02, 0.5, 0.4, 0.6)
    found = GammaProposal(0.015, True, "filter", 1.0, 2.3, 0.16, levels, {"fc.weight": 0.1})
    said = recipe.said({"filter": found}, 40)
    assert "  gamma 0.01      loss -0.001\n  gamma 0.02      loss +0.5\n" in said


def test_a_runs_folder_is_measured_as_it_is(recipe, run, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    config = resolve_data_config({"img_size": 16, "crop_pct": 1.0}, model=model)
    task = recipe.ImageTask(parse_arguments(recipe.Arguments, SMALL), torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for number in range(30):
        recipe.loss_of(model, task.batch(number, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tmp_path / "digits_rwp_seed0/model", label_names=DIGITS, data_config=config)
    record = run(tmp_path / "digits_rwp_seed0")
    assert record["steps"] == 0
    assert "of the weights as they are" in capsys.readouterr().out
    direct = find_gamma(model, task.batches(), draws=2, num_batches=2)
    assert record["proposals"]["filter"]["gamma"] == pytest.approx(direct.gamma, rel=1e-3)
    assert str(tmp_path) not in json.dumps(record)


def test_a_causal_language_model_is_measured_on_lines_of_text(run, tmp_path, capsys):
    base = make_base(tmp_path / "llama", 30, seed=0)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(known_texts(80, 1)))
    record = run(base, f"--text_file={texts}")
    found = record["proposals"]["filter"]
    assert record["steps"] == 0
    ids = AutoModelForCausalLM.from_pretrained(base).config.vocab_size
    assert found["loss"] < found["baseline"] < torch.tensor(float(ids)).log()
    assert "model.layers.0.self_attn.q_proj.weight" in found["sizes"]


def test_what_has_learned_nothing_is_refused_in_words(run):
    with pytest.raises(ValueError, match="the weights have not learned enough for noise"):
        run("--steps=1")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--share=0", r"share must be in \(0, 1\), got 0.0"),
        ("--draws=0", "draws must be at least 1"),
        ("--steps=-1", "steps must be at least 0"),
        ("--batch_size=3", "batch_size must be even, for RWP to halve it"),
        ("--mixup=0.2", "mixup=0.2 has no effect here: leave it out"),
        ("--streaming=true", "streaming must be false"),
        ("--model=resnet9999", "model must be one of timm's models"),
    ],
)
def test_a_flag_out_of_range_is_refused_by_name(recipe, flag, said):
    with pytest.raises(ValueError, match=said):
        parse_arguments(recipe.Arguments, [flag])


def test_an_empty_text_file_is_refused(run, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.txt' has no line with text"):
        run(f"--text_file={tmp_path / 'empty.txt'}")


TEXT = ["--text_file=generated", "--lr=0.02", "--opt=adamw", "--test_images=20"]
TEXT += ["--model_kwargs={hidden_size: 32, num_hidden_layers: 1, intermediate_size: 64}"]


@pytest.mark.parametrize(
    ("seeds", "epochs", "flags"),
    [
        pytest.param([3, 4], 8, ["--lr=0.05"], id="images", marks=pytest.mark.slow),
        pytest.param([3], 14, TEXT, id="text"),
    ],
)
def test_a_validation_is_a_plain_run_a_grid_and_the_proposal_for_each_seed_once(
    recipe, tmp_path, seeds, epochs, flags, capsys
):
    flags = [*SMALL, "--validate=true", "--gammas", "0.01", "0.02", f"--epochs={epochs}", *flags]
    flags += ["--seeds", *map(str, seeds)]
    flags += ["--train_images=60", "--validation_images=30", "--label_noise=0.2", f"--results={tmp_path / 'r.jsonl'}"]
    for _ in range(2):
        recipe.main(parse_arguments(recipe.Arguments, flags))
    records = read_records(tmp_path / "r.jsonl")
    assert len(records) == len(seeds) * 4
    assert capsys.readouterr().out.count("seed 3") == 4
    for seed in seeds:
        plain, *grid, proposal = [record for record in records if record["seed"] == seed]
        assert [record["kind"] for record in (plain, *grid, proposal)] == ["plain", "grid", "grid", "proposal"]
        assert [record["gamma"] for record in grid] == [0.01, 0.02]
        assert list(plain["states"]) == ["0", "0.25", "0.5", "1"]
        assert plain["states"]["0"]["filter"] is None  # nothing is learned yet
        assert plain["states"]["1"]["filter"]["gamma"] == proposal["gamma"]
        assert {record["steps"] for record in (plain, *grid, proposal)} == {3 * epochs}
        assert all(0 <= record["top1"] <= 1 for record in (plain, *grid, proposal))
    assert str(tmp_path) not in json.dumps(records)


def test_a_run_is_the_optimizers_and_without_gamma_plain(recipe):
    args = parse_arguments(recipe.Arguments, [*SMALL, "--lr=0.05"])
    task = recipe.ImageTask(args, torch.device("cpu"))
    seen = []
    runs = [recipe.train(task, args, 0, 4, gamma, lambda n, m: seen.append(n)) for gamma in (None, None, 0.02)]
    assert seen == [0, 1, 2, 3, 4] * 3
    weights = [torch.cat([w.detach().flatten() for w in run.parameters()]) for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_read_whole(recipe, config):
    args = parse_arguments(recipe.Arguments, [f"--config={config}", "--validate=true"])
    for name, value in yaml.safe_load(config.read_text()).items():
        assert str(getattr(args, name)) in (str(value), str(float(value)) if name in ("weight_decay", "lr") else "")
    assert args.train_images // args.batch_size * args.epochs <= 240

"""A flag that a recipe does not have: what a user with timm's, Hugging Face's or another recipe's habits is told."""

import inspect
from dataclasses import fields

import forked
import pytest
from imagenet import RECIPES, load_recipe
from vit import load_vit_recipe

from hf_rwp import cli
from hf_rwp.runs import hints
from hf_rwp.runs.hints import meant
from hf_rwp.runs.parsing import parse_arguments


@pytest.fixture(scope="module")
def recipes():
    return {"imagenet": load_recipe().Arguments, "vit": load_vit_recipe().Arguments}


def refusal(kind, *words):
    with pytest.raises(ValueError, match=r"no flag|values follow") as refused:
        parse_arguments(kind, list(words))
    return str(refused.value)


@pytest.mark.parametrize(
    ("recipe", "words", "flag"),
    [
        ("imagenet", ["--rwp_gama", "0.1"], "--rwp_gamma"),
        ("imagenet", ["--rwp-gama=0.1"], "--rwp_gamma"),
        ("imagenet", ["--rwp_noise_1", "true"], "--rwp_noise_1d"),
        ("imagenet", ["--Weight_Decay", "0.1"], "--weight_decay"),
        ("imagenet", ["--confg", "a.yaml"], "--config"),
        ("imagenet", ["-b", "64"], "--batch_size"),
        ("imagenet", ["-j", "4"], "--workers"),
        ("imagenet", ["--amp"], "--mixed_precision bf16"),
        ("imagenet", ["--resume", "outputs/a"], "--resume_from_checkpoint"),
        ("imagenet", ["--input-size", "3", "224", "224"], "--img_size"),
        ("imagenet", ["--train_dir", "photos"], "--data_dir"),
        ("imagenet", ["--train-dir", "photos"], "--data_dir"),
        ("imagenet", ["--dataset_name", "beans"], "--dataset"),
        ("imagenet", ["--learning_rate", "1e-3"], "--lr"),
        ("imagenet", ["--num_train_epochs", "3"], "--epochs"),
        ("imagenet", ["--per_device_train_batch_size", "8"], "--batch_size"),
        ("imagenet", ["--gamma", "0.1"], "--rwp_gamma"),
        ("imagenet", ["--rho", "0.1"], "--sam_rho"),
        ("imagenet", ["--log-interval", "5"], "--logging_steps"),
        ("imagenet", ["--model_name_or_path", "a"], "--model"),
        ("vit", ["-b", "64"], "--per_device_train_batch_size"),
        ("vit", ["-j", "4"], "--dataloader_num_workers"),
        ("vit", ["--amp"], "--bf16"),
        ("vit", ["--resume", "outputs/a"], "--resume_from_checkpoint"),
        ("vit", ["--input-size", "3", "224", "224"], "--img_size"),
        ("vit", ["--train_dir", "photos"], "--data_dir"),
        ("vit", ["--dataset_name", "beans"], "--dataset"),
        ("vit", ["--lr", "1e-3"], "--learning_rate"),
        ("vit", ["--epochs", "3"], "--num_train_epochs"),
        ("vit", ["--batch-size", "8"], "--per_device_train_batch_size"),
        ("vit", ["--gamma", "0.1"], "--rwp_gamma"),
        ("vit", ["--model", "a"], "--model_name_or_path"),
        ("vit", ["--initial-checkpoint", "a"], "--model_name_or_path"),
    ],
)
def test_an_unknown_flag_says_which_one_was_meant(recipes, recipe, words, flag):
    assert refusal(recipes[recipe], *words) == f"no flag {words[0].partition('=')[0]}; did you mean {flag}?"


def test_what_cannot_be_told_is_not_guessed(recipes):
    listed = ". --help lists the flags that there are"
    assert refusal(recipes["imagenet"], "--zzz", "3") == f"no flag --zzz{listed}"
    assert refusal(recipes["vit"], "--rho", "3") == f"no flag --rho: SAM is in imagenet_rwp.py and compare.py{listed}"
    assert "values follow the name of a flag" in refusal(recipes["imagenet"], "photos")


@pytest.mark.parametrize(
    ("recipe", "word", "said"),
    [
        ("imagenet", "--train_images", "no flag --train_images (a flag of compare){}"),
        ("imagenet", "--max-steps=9", "no flag --max-steps (a flag of vit){}"),
        ("imagenet", "--noise", "no flag --noise (a flag of landscape); did you mean --rwp_noise?"),
        ("vit", "--pretrain_epochs", "no flag --pretrain_epochs (a flag of compare); did you mean --num_train_epochs?"),
        ("vit", "--mixup_prob", "no flag --mixup_prob (a flag of train){}"),
    ],
)
def test_a_flag_of_another_recipe_is_known(recipes, recipe, word, said):
    assert refusal(recipes[recipe], word, "3") == said.format(". --help lists the flags that there are")


def test_every_recipe_knows_the_flags_of_the_others():
    """Of each of ours some recipe is told that has it; Trainer's and TRL's own are too many."""
    homes = {name: recipe for recipe, flags in hints._OF_RECIPES.items() for name in flags.split()}
    assert len(homes) == sum(len(flags.split()) for flags in hints._OF_RECIPES.values())
    kinds = {name: load_recipe(RECIPES / file).Arguments for name, (file, _) in cli.RECIPES.items()}
    has = {command: {field.name for field in fields(kind) if field.init} for command, kind in kinds.items()}
    assert [name for name, command in homes.items() if name not in has[command]] == []
    for command, kind in kinds.items():
        ours = [base for base in kind.__mro__ if not base.__module__.startswith(("transformers", "trl"))]
        own = {name for base in ours for name in inspect.get_annotations(base)} & has[command]
        assert own - homes.keys() == set(), command


def test_all_unknown_flags_are_told_in_a_line(recipes):
    said = refusal(recipes["imagenet"], "-b", "64", "--epochs", "3", "--zzz", "-1", "--learning-rate=0.1")
    assert said == (
        "no flag -b; did you mean --batch_size? no flag --zzz. no flag --learning-rate; did you mean --lr? "
        "--help lists the flags that there are"
    )


@pytest.mark.parametrize(
    ("recipe", "text", "line", "said"),
    [
        ("imagenet", "rwp: true\nrwp_gama: 0.1\n", 2, "no flag rwp_gama; did you mean rwp_gamma?"),
        ("imagenet", "# a comment\n\nlearning-rate: 0.1\n", 3, "no flag learning_rate; did you mean lr?"),
        ("imagenet", "resume: outputs/a\n", 1, "no flag resume; did you mean resume_from_checkpoint?"),
        ("vit", "rwp: true\nepochs: 3\n", 2, "no flag epochs; did you mean num_train_epochs?"),
        ("vit", "initial_checkpoint: a\n", 1, "no flag pretrained; did you mean model_name_or_path?"),
    ],
)
def test_in_a_file_its_line_is_told(recipes, tmp_path, recipe, text, line, said):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    assert refusal(recipes[recipe], f"--config={config}") == f"{config}, line {line}: {said}"


def test_every_habit_leads_to_a_flag_of_some_recipe(recipes):
    names = {recipe: {field.name for field in fields(kind) if field.init} for recipe, kind in recipes.items()}
    known = set.union(*names.values()) | {"data_file", "known_file", "models", "dataset_train_split", "gamma"}
    for habit, flags in hints._HABITS.items():
        assert {flag.partition(" ")[0] for flag in flags} <= known, habit
        assert any(meant(habit, own) for own in (*names.values(), {"data_file"})), habit


@pytest.mark.parametrize("name", ["imagenet_rwp", "compare", "benchmark", "landscape"])
def test_a_recipe_tells_it_in_one_line_with_status_2(name):
    run = forked.run(RECIPES / f"{name}.py", "--batch_sise", 8)
    assert run.returncode == 2, run.stderr
    *before, last = run.stderr.splitlines()
    assert last == "error: no flag --batch_sise; did you mean --batch_size?"
    assert before == [line for line in before if name == "compare" and line.startswith("hf-rwp compare: loading")]

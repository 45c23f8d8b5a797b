"""The wheel: the recipes are in it as `hf_rwp.recipes`, and start from there."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from distributed import night

from hf_rwp.hub.card import render_card
from hf_rwp.hub.facts import build_facts

ROOT = Path(__file__).parents[1]
RECIPES = {path.name for path in (ROOT / "recipes").glob("*.py")}
OPTIONS = {"capture_output": True, "text": True, "timeout": 400}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(the wheel's files, the Python of an environment that has it and borrows its dependencies from this one)."""
    folder = tmp_path_factory.mktemp("wheel")
    source, wheels, place = folder / "source", folder / "wheels", folder / "venv"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "hf_rwp", "recipes"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)]
    built = subprocess.run(build, **OPTIONS)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = wheels.glob("hf_rwp-*.whl")
    venv.create(place, with_pip=False)
    (packages,) = place.glob("lib/python*/site-packages")
    unpacked = subprocess.run([*pip, "install", "--no-deps", "--target", str(packages), str(wheel)], **OPTIONS)
    assert unpacked.returncode == 0, unpacked.stdout + unpacked.stderr
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    return set(zipfile.ZipFile(wheel).namelist()), place / "bin" / "python"


def run(python, *arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([str(python), *map(str, arguments)], env=environment, cwd=cwd, **OPTIONS)


def test_the_wheel_holds_the_recipes_and_their_files_and_no_results(installed):
    files, _ = installed
    recipes = {name.removeprefix("hf_rwp/recipes/") for name in files if name.startswith("hf_rwp/recipes/")}
    expected = {
        path.relative_to(ROOT / "recipes").as_posix()
        for folder in ("configs", "accelerate")
        for path in (ROOT / "recipes" / folder).rglob("*.yaml")
    }
    assert recipes == RECIPES | expected | {"README.md"}
    assert {"hf_rwp/hub/model_card.md", "hf_rwp/py.typed", "hf_rwp/README.md"} <= files
    assert {name.split("/")[0] for name in files if ".dist-info" not in name} == {"hf_rwp"}


LAUNCH = ["accelerate.commands.launch", "-m", "hf_rwp.recipes.imagenet_rwp"]
COMMAND = ["hf_rwp.cli", "train", "--processes=2"]


@pytest.mark.parametrize(
    ("start", "processes"),
    night([(LAUNCH, 1), (COMMAND, 2)], [(COMMAND, 2)]),
    ids=["accelerate launch", "hf-rwp"],
)
def test_an_installed_recipe_trains(installed, tmp_path, start, processes):
    _, python = installed
    flags = ["--img_size=16", "--batch_size=32", "--epochs=1", "--report_to=none", "--output_dir=out"]
    trained = run(python, "-m", *start, *flags, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["final"]["rwp"]["placement"] == ("parallel" if processes == 2 else "sequential")
    assert ("not passed to `accelerate launch`" in trained.stderr) == (start == LAUNCH)


def test_the_command_finds_the_files_of_installed_recipes(installed, tmp_path):
    _, python = installed
    program = (
        "from hf_rwp import cli; print(cli.recipes_folder(), cli.located('recipes/configs/digits.yaml'), cli.__file__)"
    )
    folder, config, module = run(python, "-c", program, cwd=tmp_path).stdout.split()
    assert "hf-rwp train --data_dir" in run(python, "-m", "hf_rwp.cli", "train", "--help", cwd=tmp_path).stdout
    assert Path(folder) == Path(module).parent / "recipes"
    assert Path(config) == Path(folder) / "configs" / "digits.yaml"
    assert not Path(folder).is_relative_to(ROOT)


def test_a_card_is_rendered_without_torch_from_the_wheels_own_files(installed, tmp_path):
    _, python = installed
    program = (
        "import sys, hf_rwp; from hf_rwp.hub.facts import build_facts\n"
        "from hf_rwp.hub.card import TEMPLATE, render_card\n"
        "print(*(module.__file__ for name, module in sys.modules.items() if name.startswith('hf_rwp')), TEMPLATE)\n"
        "print('torch' in sys.modules)\n"
        "print(render_card(build_facts({'arguments': {'method': 'rwp'}}, name='beasts')))"
    )
    rendered = run(python, "-c", program, cwd=tmp_path)
    assert rendered.returncode == 0, rendered.stderr
    files, torch_too, card = rendered.stdout.split("\n", 2)
    assert len(files.split()) >= 4
    for file in files.split():
        assert Path(file).is_relative_to(python.parents[1]), file  # not this checkout
    assert torch_too == "False"
    assert card.rstrip() == render_card(build_facts({"arguments": {"method": "rwp"}}, name="beasts")).rstrip()

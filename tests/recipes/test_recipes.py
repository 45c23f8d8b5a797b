"""What holds for all recipes."""

import ast
import subprocess
import sys

import pytest
from imagenet import RECIPES

from hf_rwp import cli

NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_no_recipe_imports_a_recipe(name):
    imported = set()
    for node in ast.walk(ast.parse((RECIPES / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported & {*NAMES, *(f"hf_rwp.recipes.{other}" for other in NAMES)} == set()


@pytest.mark.parametrize("name", ["train", "vit", "gamma", "compare", "landscape", "benchmark"])
def test_a_script_names_a_missing_package_in_the_line_that_hf_rwp_says(name):
    file = RECIPES / cli.RECIPES[name][0]
    program = "import runpy, sys; sys.modules['timm'] = None\n"
    as_script = program + f"sys.argv = [{str(file)!r}]; runpy.run_path({str(file)!r}, run_name='__main__')"
    as_command = program + f"from hf_rwp.cli import main; main([{name!r}])"
    for code in (as_script, as_command):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        line = f"error: hf-rwp {name} needs timm, which is not installed: pip install 'hf-rwp[recipes]'\n"
        assert (run.returncode, run.stderr) == (2, line)

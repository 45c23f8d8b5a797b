"""What holds for all recipes."""

import ast

import pytest
from imagenet import RECIPES

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

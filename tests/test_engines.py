"""The table of engines in hf_rwp/README.md: each cell is a test that exists, a tested refusal, or says why not."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SECTION = re.search(
    r"^## Engines\n(.*?)^## ", (TESTS.parent / "hf_rwp" / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE
)[1]
LISTED = re.findall(r"^(\d+)\. `([\w/]+)`: `(\w+)`$", SECTION, flags=re.MULTILINE)
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in SECTION.partition("| | HSDP")[2].splitlines()[2:]
    if line.startswith("|")
]
WITHOUT_TEST = {"one replica", "nothing gathers", "nothing is cut", "refused by transformers"}


def numbers(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"(?<![\w-])\d+(?!\w)", text)}


def function(module: str, name: str) -> ast.FunctionDef:
    tree = ast.parse((TESTS / f"{module}.py").read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


def test_every_cell_has_a_test_or_says_why_not():
    assert len(ROWS) > 20
    for feature, *cells in ROWS:
        assert len(cells) == 4, feature
        for cell in cells:
            assert numbers(cell) or cell in WITHOUT_TEST, (feature, cell)


def test_the_tests_are_numbered_without_a_gap_and_each_is_cited():
    assert [int(number) for number, *_ in LISTED] == list(range(1, len(LISTED) + 1))
    assert len({(module, name) for _, module, name in LISTED}) == len(LISTED)
    sentence = re.search(r"^Refused on all engines:.*?\n\n", SECTION, flags=re.DOTALL | re.MULTILINE)[0]
    cited = set().union(*(numbers(cell) for row in ROWS for cell in row[1:]), numbers(sentence))
    assert cited == set(range(1, len(LISTED) + 1))


@pytest.mark.parametrize(("number", "module", "name"), LISTED, ids=[name for *_, name in LISTED])
def test_a_test_that_the_table_names_exists(number, module, name):
    found = function(module, name)
    marks = [ast.unparse(decorator) for decorator in found.decorator_list]
    assert not any(mark.startswith("pytest.mark.slow") for mark in marks)


def test_what_the_table_calls_refused_has_refusals_in_its_tests_name():
    names = {int(number): name for number, _, name in LISTED}
    cells = [part for row in ROWS for cell in row[1:] for part in cell.split(";") if "refuse" in part]
    assert cells
    for cell in cells:
        for number in numbers(cell):
            assert re.search("refuse|neither", names[number]), (cell, names[number])


def test_what_the_table_has_for_a_gpu_is_marked_for_one():
    modules = {int(number): module for number, module, _ in LISTED}
    cells = [cell for row in ROWS for cell in row[1:] if cell.startswith("GPU")]
    assert cells
    for number in set().union(*map(numbers, cells)):
        assert "pytest.mark.gpu" in (TESTS / f"{modules[number]}.py").read_text()

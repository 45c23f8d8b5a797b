"""The house of design.md: `import hf_rwp` is light, names load lazily, imports point one way."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hf_rwp

HEAVY = {"torch", "transformers", "accelerate", "matplotlib", "huggingface_hub", "timm", "datasets", "evaluate"}
HEAVY |= {"sklearn", "numpy", "PIL", "yaml"}
# Each module may import from the layers above its own alone; leaves (data, metrics, ...) are no module's but the
# recipes'. A new module needs a place in here, and in design.md.
LAYERS = [
    {"noise", "placement", "hooks", "wrapper", "environment"},
    {"kernels"},
    {"foreach"},
    {"perturbation"},
    {"optimizer"},
    {"tracking", "arguments", "data", "metrics", "sharpness", "plots", "card", "folder", "checkpoints", "records"},
    {"transforms", "loading", "hub"},
    {"trainer"},
]
ALONE = {  # the modules that may import a package of their own choice
    "transformers": {"trainer", "arguments"},
    "huggingface_hub": {"hub"},
    "matplotlib": {"plots"},
    "timm": {"data", "folder", "transforms"},
    "datasets": {"data", "loading", "metrics"},
    "evaluate": {"metrics"},
    "triton": {"kernels"},
    "accelerate": {"environment", "optimizer", "trainer", "checkpoints", "records"},
}

SOURCES = {path.stem: ast.parse(path.read_text()) for path in Path(hf_rwp.__file__).parent.glob("*.py")}
MODULES = sorted(set(SOURCES) - {"__init__"})


def imports(module: str) -> set[str]:
    """The dotted names that a module imports, in functions too; `hf_rwp.x` for its own siblings."""
    names = set()
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module if node.level == 0 else ".".join(["hf_rwp", *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names} if base == "hf_rwp" else {base}
    return names


def modules_after(code: str) -> set[str]:
    """The top-level packages in sys.modules of a fresh interpreter after `code`."""
    program = f"import sys\n{code}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    return set(run.stdout.split())


def test_import_is_light():
    assert modules_after("import hf_rwp; hf_rwp.__version__; dir(hf_rwp)") & HEAVY == set()


def test_the_wrapper_needs_no_transformers_timm_datasets_or_pictures():
    loaded = modules_after("from hf_rwp import RWP, LossTracker")
    assert "torch" in loaded
    assert loaded & {"transformers", "matplotlib", "timm", "datasets", "evaluate", "sklearn"} == set()


def test_public_names_load_from_their_modules_when_asked_for():
    assert sorted(hf_rwp.__all__) == dir(hf_rwp)
    assert {"RWP", "LossTracker", "RWPArguments", "__version__"} <= set(hf_rwp.__all__)
    for name, module in hf_rwp._HOME.items():
        assert getattr(hf_rwp, name) is getattr(importlib.import_module(f"hf_rwp.{module}"), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hf_rwp' has no attribute 'SAM'"):
        hf_rwp.SAM  # noqa: B018
    with pytest.raises(ImportError, match="SAM"):
        from hf_rwp import SAM  # noqa: F401
    assert not hasattr(hf_rwp, "__wrapped__")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    layer = next(number for number, modules in enumerate(LAYERS) if module in modules)
    below = set().union(*LAYERS[layer:])
    siblings = {name.split(".")[1] for name in imports(module) if name.startswith("hf_rwp.")}
    assert siblings & below == set()
    assert siblings <= set(MODULES) | {"__version__"}


@pytest.mark.parametrize("module", MODULES)
def test_a_heavy_package_is_imported_where_it_belongs_alone(module):
    packages = {name.partition(".")[0] for name in imports(module)}
    assert {package for package in packages & set(ALONE) if module not in ALONE[package]} == set()


def test_placement_needs_no_torch():
    assert {name.partition(".")[0] for name in imports("placement")} == {"dataclasses"}


def test_imports_of_the_package_itself_are_of_the_standard_library():
    assert imports("__init__") <= set(sys.stdlib_module_names)

"""The house of design.md: `import hf_rwp` is light, names load lazily, imports point one way."""

import ast
import importlib
import itertools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_rwp

HEAVY = {"torch", "transformers", "accelerate", "matplotlib", "huggingface_hub", "timm", "datasets", "evaluate"}
HEAVY |= {"sklearn", "numpy", "PIL", "yaml"}
# The rooms, which are the folders of hf_rwp: each may import only from its own modules and from those on floors below.
FLOORS = [{"core"}, {"images", "runs", "analysis"}, {"hub"}, {"trainer"}]
ALONE = {  # the rooms, and the modules of others, that may import a package of their own choice
    "transformers": {"trainer", "runs.parsing"},
    "huggingface_hub": {"hub"},
    "matplotlib": {"analysis"},
    "timm": {"images", "hub.export", "trainer.images", "trainer.models"},
    "datasets": {"images"},
    "evaluate": {"images"},
    "triton": {"core.kernels"},
    "accelerate": {"core.sharding", "core.accumulation", "core.optimizer", "trainer", "runs"},
}
ENGINES = ("torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.device_mesh", "torch.nn.parallel")
ENGINES_NAMES = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DTensor"}
ENGINES_NAMES |= {"DeviceMesh"}

FOLDER = Path(hf_rwp.__file__).parent
SOURCES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): ast.parse(path.read_text())
    for path in FOLDER.rglob("*.py")
}
MODULES = sorted(name for name in SOURCES if not name.endswith("__init__"))
CORE = [name for name in MODULES if name.startswith("core.")]
ROOMS = {path.parent.name for path in FOLDER.glob("*/__init__.py")}


def room_of(module: str) -> str:
    return module.rpartition(".")[0]


def imports(module: str) -> set[str]:
    """The dotted names that a module imports, also in functions: `torch.nn`, and what of it, `torch.nn.GELU`."""
    names = set()
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folders = ["hf_rwp", *module.split(".")[:-1]]
            own = folders[: len(folders) - node.level + 1] if node.level else []
            base = ".".join([*own, *filter(None, [node.module])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def siblings(module: str) -> set[str]:
    """The modules of hf_rwp that a module imports, without the package's name."""
    ours = {name.removeprefix("hf_rwp.") for name in imports(module) if name.startswith("hf_rwp.")}
    found = {name if name in MODULES else name.rpartition(".")[0] for name in ours}
    return found - {"", *ROOMS}


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


def test_every_room_has_its_floor():
    assert sorted(ROOMS) == sorted(itertools.chain(*FLOORS))
    assert {module for module in MODULES if room_of(module) not in ROOMS} == set()


@pytest.mark.parametrize("module", MODULES)
def test_rooms_point_one_way(module):
    assert siblings(module) <= set(MODULES)
    room = room_of(module)
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    assert {room_of(sibling) for sibling in siblings(module)} <= set().union({room}, *FLOORS[:floor])


@pytest.mark.parametrize("module", CORE)
def test_the_core_stands_alone(module):
    """Nor does it take a name of the package itself, which would load another room."""
    ours = {name for name in imports(module) if f"{name}.".startswith("hf_rwp.")}
    assert {name for name in ours if not f"{name}.".startswith("hf_rwp.core.")} == set()


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_no_module_imports_itself_by_way_of_others(room):
    own = [module for module in MODULES if room_of(module) == room]
    assert sorted(TopologicalSorter({module: siblings(module) & {*own} for module in own}).static_order()) == own


def test_the_core_is_built_from_the_ground():
    order = list(TopologicalSorter({module: siblings(module) for module in CORE}).static_order())
    assert order.index("core.sharding") < order.index("core.noise") < order.index("core.optimizer")


@pytest.mark.parametrize("module", sorted(set(CORE) - {"core.sharding"}))
def test_one_module_of_the_core_knows_engines(module):
    assert {name for name in imports(module) if name.startswith(ENGINES)} == set()
    used = {node.id for node in ast.walk(SOURCES[module]) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(SOURCES[module]) if isinstance(node, ast.Attribute)}
    assert used & ENGINES_NAMES == set()


@pytest.mark.parametrize("module", MODULES)
def test_a_heavy_package_is_imported_where_it_belongs_alone(module):
    packages = {name.partition(".")[0] for name in imports(module)}
    assert {package for package in packages & set(ALONE) if not {module, room_of(module)} & ALONE[package]} == set()


def test_placement_needs_no_torch():
    assert imports("core.placement") <= {"dataclasses", "dataclasses.dataclass", "typing", "collections.abc"}


def test_imports_of_the_package_itself_are_of_the_standard_library():
    assert {name.partition(".")[0] for name in imports("__init__")} <= set(sys.stdlib_module_names)
    assert [room for room in ROOMS if imports(f"{room}.__init__")] == []

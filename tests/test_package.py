"""The house of hf_rwp/README.md: `import hf_rwp` is light, names load lazily, imports point one way."""

import ast
import importlib
import importlib.metadata
import itertools
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_rwp

HEAVY = {"torch", "transformers", "accelerate", "matplotlib", "huggingface_hub", "timm", "datasets", "evaluate"}
HEAVY |= {"sklearn", "numpy", "PIL", "yaml"}
# The rooms, which are the folders of hf_rwp: each may import only from its own modules and from those on floors below.
FLOORS = [{"core"}, {"images", "runs", "analysis"}, {"hub"}, {"trainer"}, {"experiments", "integrations"}]
TOP = "cli"  # the one module outside of them, above all
ALONE = {  # the rooms, and the modules of others, that may import a package of their own choice
    "transformers": {"trainer", "runs.flags", "experiments.lora_costs", "experiments.texts"},
    "huggingface_hub": {"hub"},
    "matplotlib": {"analysis"},
    "timm": {"images", "experiments", "hub.export", "trainer.images", "trainer.models"},
    "datasets": {"images", "trainer.texts"},
    "axolotl": {"integrations"},
    "pydantic": {"integrations"},
    "evaluate": {"images.top_k"},
    "triton": {"core.kernels"},
    "accelerate": {"core.refusals", "core.accumulation", "core.optimizer", "trainer", "experiments", "runs", "cli"},
}
ENGINES = ("torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.device_mesh", "torch.nn.parallel")
ENGINES_NAMES = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DTensor"}
ENGINES_NAMES |= {"DeviceMesh"}

ROOT = Path(__file__).parents[1]
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
    assert modules_after("import hf_rwp, hf_rwp.cli; hf_rwp.__version__; dir(hf_rwp)") & HEAVY == set()


def test_the_wrapper_needs_no_transformers_timm_datasets_or_pictures():
    loaded = modules_after("from hf_rwp import RWP, LossTracker")
    assert "torch" in loaded
    assert loaded & {"transformers", "matplotlib", "timm", "datasets", "evaluate", "sklearn"} == set()


def test_public_names_load_from_their_modules_when_asked_for():
    assert sorted(hf_rwp.__all__) == dir(hf_rwp)
    assert {"RWP", "LossTracker", "RWPArguments", "__version__"} <= set(hf_rwp.__all__)
    for name, module in hf_rwp._HOME.items():
        assert getattr(hf_rwp, name) is getattr(importlib.import_module(f"hf_rwp.{module}"), name)


def test_a_type_checker_sees_the_signatures_of_public_names(tmp_path):
    names = sorted(set(hf_rwp.__all__) - {"__version__"})
    script = tmp_path / "user.py"
    script.write_text(f"from hf_rwp import {', '.join(names)}\n" + "".join(f"reveal_type({name})\n" for name in names))
    config = tmp_path / "mypy.ini"  # the others' code would take a minute
    skip = "[mypy]\nignore_missing_imports = True\nfollow_imports = skip\n"
    config.write_text(f"{skip}[mypy-hf_rwp.*]\nfollow_imports = silent\n")
    mypy = [sys.executable, "-m", "mypy", f"--config-file={config}", f"--cache-dir={tmp_path}", str(script)]
    run = subprocess.run(mypy, capture_output=True, text=True, cwd=ROOT, timeout=500)
    revealed = re.findall(r'Revealed type is "(.*)"', run.stdout)
    assert len(revealed) == len(names), run.stdout + run.stderr
    types = dict(zip(names, revealed, strict=True))
    assert types["RWP"].startswith("def (optimizer: Any, model: Any, *, gamma: float | None =, alpha: float =")
    assert {name for name, signature in types.items() if not signature.startswith("def (")} == set()


# What each room needs


def test_the_extras_are_those_of_pyproject():
    """A package is known here by the name that it is imported by, there by the one that it is installed by."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    given = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    distributions = importlib.metadata.packages_distributions()

    def brought(extra):
        found = set()
        for requirement in given[extra]:
            name, others = re.match(r"([\w-]+)(?:\[(.*)\])?", requirement).groups()
            found |= {normal(name)} if others is None else set().union(*map(brought, others.split(",")))
        return found

    for extra, packages in hf_rwp.EXTRAS.items():
        installed_by = {normal(distributions[package][0]) for package in packages}
        assert installed_by == brought(extra) - (brought("recipes") if extra in ("compare", "lora") else set())


def test_ci_tests_the_floors_of_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [project["optional-dependencies"][extra] for extra in hf_rwp.EXTRAS]
    floors = {requirement for requirement in itertools.chain(project["dependencies"], *extras) if ">=" in requirement}
    pinned = (ROOT / ".github" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    assert {line.replace("==", ">=") for line in pinned if "==" in line} == floors


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


# The rooms of an extra; what accelerate and torch need themselves cannot be missing.
NEEDS = {"core": (), "trainer": ("trainer",), "hub": ("hub",), "images": ("recipes",), "runs": ("recipes",)}
NEEDS |= {"analysis": ("recipes",), "experiments": ("recipes",), "integrations": ("trainer",)}
# These need more than their room: Triton, timm, the reading of images, the program that they plug into.
LATER = {"core.kernels", "trainer.images", "trainer.models", "trainer.classifiers", "integrations.axolotl"}
ALWAYS = {"filelock", "huggingface_hub", "jinja2", "safetensors", "tqdm", "yaml"}


def without(packages: set[str]) -> str:
    """Code that makes the import of these packages fail, as where they are not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({sorted(packages)}))\n"


# What all rooms may import is imported once. A line of stdin is the code of a child, a line of stdout how it ended.
CHILDREN = """
import json, os, sys, traceback
import accelerate, torch
for line in sys.stdin:
    sys.stdout.flush()
    ours, theirs = os.pipe()
    if not os.fork():
        try:
            exec(json.loads(line), {})
            said = ""
        except BaseException:
            said = traceback.format_exc()
        os.write(theirs, said[-9000:].encode())
        os._exit(0)
    os.close(theirs)
    said = os.fdopen(ours).read()
    _, status = os.wait()
    print(json.dumps(said or ("" if status == 0 else f"died with status {status}")))
"""


@pytest.fixture(scope="module")
def ended():
    """How code ends in a process that has imported only accelerate and torch: a traceback, or nothing."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", CHILDREN], **pipes) as process:

        def run(code: str) -> str:
            process.stdin.write(json.dumps(code) + "\n")
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.mark.parametrize("extras", sorted(set(NEEDS.values())), ids=lambda extras: " ".join(extras) or "none")
def test_rooms_need_the_packages_of_their_extra_alone(ended, extras):
    packages = set(itertools.chain(*hf_rwp.EXTRAS.values()))
    blocked = packages - ALWAYS - {package for extra in extras for package in hf_rwp.EXTRAS[extra]}
    rooms = {room for room, needed in NEEDS.items() if needed == extras}
    modules = [f"hf_rwp.{module}" for module in MODULES if room_of(module) in rooms and module not in LATER]
    modules += [f"hf_rwp.{room}" for room in rooms]
    assert ended(without(blocked) + "import " + ", ".join(modules)) == ""
    assert blocked
    assert "import of" in ended(without(blocked) + f"import {min(blocked)}")
    assert "died" in ended("import os; os.abort()")


def test_rooms_have_their_needs():
    assert set(NEEDS) == ROOMS


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("RWPTrainer", "transformers", "trainer"),
        ("RWPTrainingArguments", "transformers", "trainer"),
        ("push_to_hub", "huggingface_hub", "hub"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(ended, name, package, extra):
    said = ended(without({package}) + f"from hf_rwp import {name}")
    line = f"{name} needs {package}, which is not installed: pip install 'hf-rwp[{extra}]'"
    assert said.splitlines()[-1] == f"ModuleNotFoundError: {line}"
    assert "The above exception was the direct cause" in said


def test_a_comparison_with_sam_names_its_extra_and_one_without_needs_none(monkeypatch):
    from hf_rwp.runs.methods import ComparisonArguments

    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    line = "method 'sam' needs pytorch_optimizer, which is not installed: pip install 'hf-rwp[compare]'"
    with pytest.raises(ModuleNotFoundError, match=re.escape(line)):
        ComparisonArguments(methods=["base", "sam", "rwp"])
    assert ComparisonArguments(methods=["base", "rwp"]).methods == ["base", "rwp"]


def test_a_missing_package_of_no_extra_is_told_as_it_is():
    program = without({"torch"}) + "from hf_rwp import RWP"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of torch halted")


# The rooms


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hf_rwp' has no attribute 'SAM'"):
        hf_rwp.SAM  # noqa: B018
    with pytest.raises(ImportError, match="SAM"):
        from hf_rwp import SAM  # noqa: F401
    assert not hasattr(hf_rwp, "__wrapped__")


def test_every_room_has_its_floor():
    assert sorted(ROOMS) == sorted(itertools.chain(*FLOORS))
    assert {module for module in MODULES if room_of(module) not in ROOMS} == {TOP}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {TOP}))
def test_rooms_point_one_way(module):
    assert siblings(module) <= set(MODULES) - {TOP}
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


@pytest.mark.parametrize("module", sorted(set(CORE) - {"core.sharding", "core.replicas", "core.refusals"}))
def test_few_modules_of_the_core_know_engines(module):
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


def test_the_package_itself_imports_the_standard_library_and_for_type_checkers_its_public_names():
    ours = {name for name in imports("__init__") if name.startswith("hf_rwp.")}
    assert ours == {f"hf_rwp.{module}{name}" for name, module in hf_rwp._HOME.items() for name in ("", f".{name}")}
    assert {name.partition(".")[0] for name in imports("__init__") - ours} <= set(sys.stdlib_module_names)
    assert [room for room in ROOMS if imports(f"{room}.__init__")] == []

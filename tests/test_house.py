"""The rules of the house, held over the import graph."""

import ast
import re
from pathlib import Path

PACKAGE = Path("dnal_dist")
MODULES = {path: ".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in PACKAGE.rglob("*.py")}

# Each room, and the rooms that it may import, from the ground up: a room imports only those above it in this table, so there is no
# circle. Doors (modules beside the rooms: arguments and one call) may import all rooms, and no room imports a door.
ROOMS: dict[str, set[str]] = {
    "common": set(),
    "recipe": {"common"},
    "nets": {"common"},
    "search": {"common", "nets", "recipe"},
    "data": {"common", "recipe"},
    "distributed": {"common", "nets", "recipe"},
    "checkpoint": {"common", "recipe"},
    "report": {"common", "recipe"},
    "tracking": {"common", "report", "distributed"},
    "export": {"common", "recipe", "nets", "search", "data", "distributed", "report"},
    "training": {"common", "recipe", "nets", "search", "data", "distributed", "checkpoint", "report", "tracking", "export"},
    "doctor": {"common", "recipe", "nets", "search", "data", "distributed", "checkpoint", "report", "tracking", "training"},
    "chaos": {"common", "recipe", "nets", "report", "checkpoint", "training"},
}


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


IMPORTS = {name: imports(path) for path, name in MODULES.items()}


def importers(*modules: str) -> set[str]:
    return {
        name for name, found in IMPORTS.items() if any(m in modules or m.startswith(tuple(f"{x}." for x in modules)) for m in found)
    }


def room_of(module: str) -> str:
    """The room of a module, or the module itself if it is a door or the package."""
    part = module.split(".")[1] if "." in module else ""
    return part if part in ROOMS else module


def test_every_folder_is_a_room_of_the_table():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(ROOMS)


def test_every_folder_of_tests_is_a_room():
    """Or data_tools, slurm: what stands beside the package; or gpu, the tests that need one."""
    folders = {path.parent.relative_to("tests").as_posix() for path in Path("tests").rglob("test_*.py")} - {"."}
    assert folders <= {*ROOMS, "data_tools", "slurm", "gpu"}


MOST_LINES, MOST_LINES_OF_A_FUNCTION = 320, 60


def test_modules_and_functions_are_short():
    found = set()
    for path in MODULES:
        text = path.read_text()
        if text.count("\n") > MOST_LINES:
            found.add(str(path))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION:
                found.add(f"{path}: {node.name}")
    assert not found


def test_the_table_has_no_circle():
    done = set()
    for room, allowed in ROOMS.items():
        assert allowed <= done, f"{room} may import {allowed - done}, which stands below it"
        done.add(room)


def test_rooms_import_only_what_the_table_allows():
    wrong = []
    for module, found in IMPORTS.items():
        if (room := room_of(module)) not in ROOMS:
            continue
        for other in found:
            if other.startswith("dnal_dist.") and room_of(other) != room and room_of(other) not in ROOMS[room]:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(sorted(wrong))


def test_schedule_is_pure():
    assert IMPORTS["dnal_dist.search.schedule"] == {"math"}


def test_only_distributed_imports_accelerate_and_deepspeed_and_speaks_to_other_processes():
    assert {room_of(name) for name in importers("accelerate", "deepspeed")} == {"distributed"}
    assert {room_of(name) for path, name in MODULES.items() if "torch.distributed" in path.read_text()} == {"distributed"}


def reachable(*modules: str) -> set[str]:
    """The package's modules that importing these brings in."""
    found, new = set(), set(modules)
    while new:
        found |= new
        new = {m for name in new for m in IMPORTS[name] if m in IMPORTS} - found - {"dnal_dist"}
    return found


def test_report_needs_no_torch():
    found = reachable(*(name for name in IMPORTS if room_of(name) == "report"))
    assert not found & importers("torch", "torchvision", "safetensors.torch")


def test_nothing_unpickles_or_runs_data():
    """Names of files that would be unpickled may stand in the source, to be refused; what reads them may not."""
    reads = r"\bimport\s+(_?pickle|pickletools|cPickle|marshal|shelve|dill|cloudpickle)\b|\bfrom\s+_?pickle\b|\bpickle\."
    reads += r"|torch\.load\(|allow_pickle\s*=\s*True"
    runs = r"(?<![.\w])eval\(|(?<![.\w])exec\(|os\.system|os\.popen|shell\s*=\s*True"
    for path in [*MODULES, *Path("data_tools").rglob("*.py"), *Path("slurm").glob("*.py")]:
        found = re.search(f"{reads}|{runs}", path.read_text())
        assert found is None, f"{path}: {found[0]}"


def test_shards_are_read_without_torch():
    """data_tools start many processes, each of which would load it."""
    found = reachable("dnal_dist.data.downloads")
    assert found >= {"dnal_dist.data.tar", "dnal_dist.data.remote", "dnal_dist.data.cache", "dnal_dist.data.prefetch"}
    assert not found & importers("torch", "torchvision")

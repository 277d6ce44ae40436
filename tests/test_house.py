"""The rules of the house, held over the import graph."""

import ast
import re
from pathlib import Path

PACKAGE = Path("dnal_dist")
ROOMS = {path: ".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in PACKAGE.rglob("*.py")}


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


IMPORTS = {name: imports(path) for path, name in ROOMS.items()}


def importers(*modules: str) -> set[str]:
    return {
        name for name, found in IMPORTS.items() if any(m in modules or m.startswith(tuple(f"{x}." for x in modules)) for m in found)
    }


def test_recipe_imports_no_other_room():
    assert not {m for m in IMPORTS["dnal_dist.recipe"] if m.startswith("dnal_dist")}


def test_schedule_is_pure():
    assert IMPORTS["dnal_dist.schedule"] == {"math"}


def test_networks_do_not_know_the_architecture():
    for name, found in IMPORTS.items():
        if name.startswith("dnal_dist.nets"):
            assert all(m.startswith("dnal_dist.nets") for m in found if m.startswith("dnal_dist")), name


def test_only_parallel_its_backends_and_what_is_asked_of_them_import_accelerate_and_deepspeed():
    assert importers("accelerate", "deepspeed") == {"dnal_dist.parallel", "dnal_dist.backends", "dnal_dist.asked"}


def test_only_parallel_and_its_backends_speak_to_other_processes():
    users = {name for path, name in ROOMS.items() if "torch.distributed" in path.read_text()}
    assert users == {"dnal_dist.parallel", "dnal_dist.backends"}


def test_report_needs_no_torch():
    reachable, new = set(), {name for name in IMPORTS if "report" in name}
    while new:
        reachable |= new
        new = {m for name in new for m in IMPORTS[name] if m in IMPORTS} - reachable - {"dnal_dist"}
    assert "dnal_dist.report" in reachable
    assert not reachable & importers("torch", "torchvision", "safetensors.torch")


def test_only_train_assembles():
    assert not importers("dnal_dist.train")


def test_nothing_unpickles_or_runs_data():
    """Names of files that would be unpickled may stand in the source, to be refused; what reads them may not."""
    reads = r"\bimport\s+(_?pickle|cPickle|marshal|shelve|dill|cloudpickle)\b|\bfrom\s+_?pickle\b|\bpickle\."
    reads += r"|torch\.load\(|allow_pickle\s*=\s*True"
    runs = r"(?<![.\w])eval\(|(?<![.\w])exec\(|os\.system|os\.popen|shell\s*=\s*True"
    for path in [*ROOMS, *Path("data_tools").rglob("*.py"), *Path("slurm").glob("*.py")]:
        found = re.search(f"{reads}|{runs}", path.read_text())
        assert found is None, f"{path}: {found[0]}"


def test_instructions_of_pickled_files_are_looked_at_in_one_place():
    """By the reader of CIFAR-10's batches, which follows a few of them itself and refuses the others."""
    assert [path.name for path in Path("data_tools").rglob("*.py") if "pickletools" in path.read_text()] == ["cifar10_batches.py"]


def test_shards_are_read_without_torch():
    """data_tools start many processes, each of which would load it."""
    reachable, new = set(), {"dnal_dist.shards"}
    while new:
        reachable |= new
        new = {m for name in new for m in IMPORTS[name] if m in IMPORTS} - reachable - {"dnal_dist"}
    assert reachable >= {"dnal_dist.samples", "dnal_dist.remote", "dnal_dist.cache", "dnal_dist.ahead"}
    assert not reachable & importers("torch", "torchvision")

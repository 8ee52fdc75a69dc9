"""The file map of the README: every file is on it, and imports point upwards alone."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def file_map(package: str) -> list[str]:
    """Return the files of a package in the order of the map, as module names below the package."""
    readme = (ROOT / "README.md").read_text()
    section = re.search(rf"^{package}/.*?(?=^\w|^```)", readme, re.MULTILINE | re.DOTALL)
    assert section is not None
    modules, folder = [], ""
    for line in section[0].splitlines()[1:]:
        if not line.startswith("           "):
            folder = ""
        for name in re.findall(r"[\w/]+\.py\b", line):
            if "/" in name:
                folder = name.rpartition("/")[0] + "/"
            modules.append((name if "/" in name else folder + name).removesuffix(".py").replace("/", "."))
    return modules


def imports(file: Path, package: str) -> set[str]:
    """Return the modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(package):
            inner = node.module.removeprefix(package).removeprefix(".")
            for name in (alias.name for alias in node.names):
                child = f"{inner}.{name}".removeprefix(".")
                found.add(child if (ROOT / package / f"{child.replace('.', '/')}.py").exists() else inner)
    return found - {""}


@pytest.mark.parametrize("package", ["bert_encoding", "study"])
def test_every_file_is_on_the_map_once(package: str) -> None:
    on_disk = {
        str(file.relative_to(ROOT / package).with_suffix("")).replace("/", ".")
        for file in (ROOT / package).rglob("*.py")
        if file.name != "__init__.py"
    }
    on_map = file_map(package)
    assert sorted(on_map) == sorted(on_disk)


def test_imports_point_upwards(subtests: pytest.Subtests) -> None:
    order = {name: at for at, name in enumerate(file_map("bert_encoding"))}
    order["datasets"] = max(at for name, at in order.items() if name.startswith("datasets."))  # its __init__
    for name, at in order.items():
        path = ROOT / "bert_encoding" / name.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        with subtests.test(name):
            below = {other for other in imports(file, "bert_encoding") if order[other] > at}
            assert not below, f"{name} imports what stands below it: {sorted(below)}"


def test_the_science_knows_neither_ray_nor_optuna() -> None:
    for file in (ROOT / "bert_encoding").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("ray", "optuna", "study") for name in names), file

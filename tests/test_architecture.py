"""The rules of docs/architecture.md: which package imports which, no circles, small files, and paths that exist."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {"otpo": ROOT / "otpo", "moe_backbone": ROOT / "moe_backbone", "otpo_kernels": ROOT / "kernels/otpo_kernels"}
LONGEST = 350
REASON = f"over {LONGEST} lines"  # in the first ten lines of a longer file, with its reason
# What each part may import of the three packages; `otpo.__main__` only starts `otpo.cli`.
MAY_IMPORT = {
    "otpo_kernels": {"otpo_kernels"},
    "moe_backbone": {"moe_backbone", "otpo_kernels"},
    "otpo": {"otpo", "otpo_kernels"},
    "otpo.cli": {"otpo.cli", "otpo", "moe_backbone", "otpo_kernels"},
    "otpo.__main__": {"otpo.cli"},
}


def module_files() -> dict[str, Path]:
    """Every module of the three packages by its dotted name; a package goes by the name of its folder."""
    files = {}
    for package, home in HOMES.items():
        for path in sorted(home.rglob("*.py")):
            parts = [package, *path.relative_to(home).with_suffix("").parts]
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = module_files()


def is_package(module: str) -> bool:
    return FILES[module].name == "__init__.py"


def imports(source: str, module: str, package: bool) -> Iterator[tuple[str, str | None]]:
    """Every import statement's module and name, wherever it stands: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = node.level - int(package)  # one dot in an `__init__` is the package itself
            prefix = ".".join(module.split(".")[: -above or None]) if node.level else ""
            target = ".".join(filter(None, [prefix, node.module]))
            yield from ((target, alias.name) for alias in node.names)


@cache
def imports_of(module: str) -> list[tuple[str, str | None]]:
    return list(imports(FILES[module].read_text(), module, is_package(module)))


def homes_of(target: str, name: str | None) -> set[str]:
    """The modules that an import of `name` from `target` runs for that name's sake.

    An `__init__` is a list of names: a name that it has from elsewhere counts as imported from there, and the whole
    package as all that it lists.
    """
    if target not in FILES:
        return set()
    if name is not None and f"{target}.{name}" in FILES:
        return homes_of(f"{target}.{name}", None) if is_package(f"{target}.{name}") else {f"{target}.{name}"}
    if not is_package(target):
        return {target}
    listed = [(source, found) for source, found in imports_of(target) if name is None or found == name]
    return set().union(*(homes_of(source, found) for source, found in listed))


def graph() -> dict[str, set[str]]:
    modules = [module for module in FILES if not is_package(module)]
    return {
        module: set().union(*(homes_of(target, name) for target, name in imports_of(module))) for module in modules
    }


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules each of which reaches every other of its set, itself alone included."""
    reached = {module: set(found) for module, found in arrows.items()}
    grows = True
    while grows:
        grows = False
        for found in reached.values():
            size = len(found)
            found.update(*(reached.get(module, ()) for module in list(found)))
            grows |= len(found) > size
    rings = {
        tuple(sorted(other for other in found if module in reached.get(other, ())))
        for module, found in reached.items()
        if module in found
    }
    return sorted(map(list, rings))


def part_of(name: str) -> str | None:
    """The part of the library that a dotted name belongs to, None for other libraries."""
    fits = [part for part in MAY_IMPORT if name == part or name.startswith(f"{part}.")]
    return max(fits, key=len, default=None)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_arrows_point_one_way(part):
    wrong = []
    for module in FILES:
        if part_of(module) == part:
            for target, name in imports_of(module):
                to = part_of(f"{target}.{name}" if name else target)
                if to is not None and to not in MAY_IMPORT[part]:
                    wrong.append(f"{module} imports {name or ''} of {target}")
    assert not wrong


def test_no_circle_of_imports():
    found = circles(graph())
    assert not found


def test_no_long_file_without_a_reason():
    long = {}
    for path in [
        *FILES.values(),
        *(path for top in ("tests", "benchmarks", "examples") for path in (ROOT / top).rglob("*.py")),
    ]:
        lines = path.read_text().splitlines()
        if len(lines) > LONGEST and REASON not in " ".join(lines[:10]):
            long[str(path.relative_to(ROOT))] = len(lines)
    assert not long, f"split these, or say why not: 'This file is {REASON} because ...'"


def expanded(path: str) -> list[str]:
    """`a/{b,c}.py` as two paths."""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", path)
    return [f"{found[1]}{part.strip()}{found[3]}" for part in found[2].split(",")] if found else [path]


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_paths_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    tops = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")))
    named = set(re.findall(rf"(?<![\w./-])(?:{tops})/[\w./{{}},-]*[\w/}}]", text))
    assert len(named) > 10
    assert not [path for name in named for path in expanded(name) if not (ROOT / path).exists()]


# The rules above find what they look for


def test_imports_are_found_wherever_they_stand():
    source = (
        "from typing import TYPE_CHECKING\nimport a.b\nfrom . import one\nfrom .two import x\nfrom ..up import y\n"
        "if TYPE_CHECKING:\n    from c import z\ndef f():\n    from d import w as v\n"
    )
    absolute = {("typing", "TYPE_CHECKING"), ("a.b", None), ("c", "z"), ("d", "w")}
    of_module = {("p.q", "one"), ("p.q.two", "x"), ("p.up", "y")}
    assert set(imports(source, "p.q.m", package=False)) == absolute | of_module
    assert set(imports(source, "p.q", package=True)) == absolute | of_module


def test_names_are_followed_to_their_homes():
    assert homes_of("moe_backbone", "CompassConfig") == {"moe_backbone.model.configuration_compass"}
    assert homes_of("otpo", "__version__") == {"otpo.version"}
    assert homes_of("otpo_kernels", "distance") == {"otpo_kernels.distance"}
    assert "otpo.trainer" in homes_of("otpo", None)
    assert len(graph()) > 100 and "otpo_kernels.acceleration" in graph()["otpo.transport.anderson"]


def test_circles_are_found():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e"}}
    assert circles(arrows) == [["a", "b", "c"], ["e"]]

"""What the syntax trees of a package say: lines, imports, circles, long functions, callers. Nothing of the package is
imported or run.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# The functions that take a module's name as text.
IMPORTING = ("import_module", "__import__")

Package = Mapping[str, "Module"]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file: its dotted name, its path below the folder that holds the package, its lines as `wc -l` counts them."""

    name: str
    path: Path
    lines: int
    tree: ast.Module


@dataclass(frozen=True)
class Import:
    """One module names another of the package. `types`: under `if TYPE_CHECKING`; `text`: in a string, as for a process
    of its own.
    """

    importer: str
    imported: str
    line: int
    kind: Literal["import", "types", "text"]


@dataclass(frozen=True)
class Function:
    """A function or method, nested ones included; `lines` from `def` to its end."""

    module: str
    name: str
    line: int
    lines: int


def read_package(folder: Path) -> dict[str, Module]:
    """Every module below `folder`, the folder of the package itself, by dotted name."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder.parent)
        parts = inside.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_bytes()
        found[name] = Module(name, inside, source.count(b"\n"), ast.parse(source, filename=str(inside)))
    return found


def functions(package: Package) -> list[Function]:
    return [
        Function(module.name, name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1)
        for module in package.values()
        for name, node in _definitions(module.tree, "")
    ]


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, FunctionNode]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            yield prefix + child.name, child
        below = f"{prefix}{child.name}." if isinstance(child, FunctionNode | ast.ClassDef) else prefix
        yield from _definitions(child, below)


def imports(package: Package) -> list[Import]:
    """Every import of a module of the package at any depth, and every string that is the name of one."""
    return [found for module in package.values() for found in _Imports(module, package).found]


class _Imports(ast.NodeVisitor):
    def __init__(self, module: Module, package: Package) -> None:
        self._module, self._package = module, package
        self._root = module.name.partition(".")[0]
        self._kind: Literal["import", "types"] = "import"
        self.found: list[Import] = []
        self.visit(module.tree)

    def _add(self, name: str, line: int, kind: Literal["import", "types", "text"] | None = None) -> None:
        while "." in name and name not in self._package:
            name = name.rpartition(".")[0]
        if name in self._package:
            self.found.append(Import(self._module.name, name, line, kind or self._kind))

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        outside = self._kind
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self._kind = "types"
        for child in node.body:
            self.visit(child)
        self._kind = outside
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parts = self._module.name.split(".")
            up = node.level - (self._module.path.name == "__init__.py")  # a package's first dot is the package itself
            base = ".".join([*parts[: len(parts) - up], *([base] if base else [])])
        for alias in node.names:
            self._add(f"{base}.{alias.name}", node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        if imports_by_name(node) and node.args and isinstance(node.args[0], ast.Constant):
            self._add(str(node.args[0].value), node.lineno)
            return
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if not isinstance(node.value, str):
            return
        name = rf"{self._root}\.[\w.]+"
        for found in re.findall(rf"^{name}$|(?<=-m ){name}", node.value):
            # The root package alone is no module that a string could mean: `argonne.mean` is not one of ours.
            if ".".join(found.split(".")[:2]) in self._package:
                self._add(found, node.lineno, "text")


def imports_by_name(node: ast.Call) -> bool:
    """Is it a call that imports the module whose name it is given?"""
    return _last(ast.unparse(node.func)) in IMPORTING


def circles(found: Iterable[Import]) -> list[list[str]]:
    """Each group of modules that reach one another by imports, lazy ones included; in order of names."""
    edges: dict[str, set[str]] = defaultdict(set)
    for one in found:
        if one.kind == "import":
            edges[one.importer].add(one.imported)
    reached = {name: _reachable(edges, name) for name in edges}
    groups = {frozenset(other for other in reached[name] if name in reached.get(other, ())) for name in reached}
    return sorted(sorted(group) for group in groups if group)


def _reachable(edges: Mapping[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = edges.get(waiting.pop(), set()) - reached
        reached |= fresh
        waiting += fresh
    return reached


def single_callers(package: Package) -> list[tuple[str, str]]:
    """(private function or method, the one function that names it), by name.

    A name counts in its own module, and in every other one that has no private function of that name itself. Passing a
    function on counts as calling it; a function that calls itself does not.
    """
    private: dict[str, set[str]] = {}
    naming: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for module in package.values():
        private[module.name] = set()
        for scope, node in _scopes(module.tree):
            if isinstance(node, FunctionNode) and node.name.startswith("_") and not node.name.startswith("__"):
                private[module.name].add(scope)
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name | ast.Attribute):
                    naming[inner.id if isinstance(inner, ast.Name) else inner.attr].add((module.name, scope))
    found = []
    for home, scopes in private.items():
        for scope in sorted(scopes):
            name = _last(scope)
            callers = {one for one in naming[name] if one[0] == home or name not in map(_last, private[one[0]])} - {
                (home, scope)
            }
            if len(callers) == 1:
                found.append((f"{home}.{scope}", ".".join(*callers)))
    return found


def _last(dotted: str) -> str:
    return dotted.rpartition(".")[2]


def _scopes(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Module-level functions and methods by name; every other statement belongs to its class or to `<module>`."""
    for node in tree.body:
        if isinstance(node, FunctionNode):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                yield (f"{node.name}.{inner.name}" if isinstance(inner, FunctionNode) else node.name), inner
        else:
            yield "<module>", node

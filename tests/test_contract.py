"""The arrow of the rooms, read from the import contract, held where import-linter does not look: strings, names made at
run time, circles.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tools import structure
from tools.structure import Import

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = structure.read_package(ROOT / "argonne")
IMPORTS = structure.imports(PACKAGE)

# Imports by a name that is no literal: of foreign libraries, and the pages of the command line by the command line.
NAMED_AT_RUN_TIME = {"argonne.model.fused", "argonne.cli.command"}


def read_contract() -> tuple[list[set[str]], set[tuple[str, str]]]:
    """(rooms that share a place, from the floor up; imports that the contract ignores) of the layers contract in
    pyproject.toml.
    """
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (one for one in tool["contracts"] if one["type"] == "layers")
    layers = [{room.strip(" ()") for room in layer.split("|")} for layer in contract["layers"]]
    ignored = {tuple(part.strip() for part in line.split("->")) for line in contract["ignore_imports"]}
    return [*reversed(layers), set(contract["exhaustive_ignores"])], {
        (importer, imported) for importer, imported in ignored
    }


ARROW, IGNORED = read_contract()


def against(arrow: Sequence[set[str]], imports: Iterable[Import]) -> set[tuple[str, str]]:
    """(importer, imported) of what goes neither down the arrow nor stays in its room. Everyone may read the root
    package, which reads nobody.
    """
    place = {room: number for number, rooms in enumerate(arrow) for room in rooms}
    found = set()
    for one in imports:
        importer, imported = (name.split(".")[1:2] for name in (one.importer, one.imported))
        if imported and importer != imported and (not importer or place[importer[0]] <= place[imported[0]]):
            found.add((one.importer, one.imported))
    return found


def test_every_room_has_a_place_in_the_arrow() -> None:
    rooms = {name.split(".")[1] for name in PACKAGE if "." in name}
    assert rooms - set().union(*ARROW) == set()


def test_every_import_goes_down_the_arrow_lazy_ones_and_those_for_types_included() -> None:
    assert against(ARROW, [one for one in IMPORTS if one.kind != "text"]) == IGNORED


def test_no_module_names_one_above_it_in_a_string() -> None:
    assert against(ARROW, [one for one in IMPORTS if one.kind == "text"]) == set()


def test_no_modules_import_one_another_in_a_circle_lazy_imports_included() -> None:
    assert structure.circles(IMPORTS) == []


def reacts_to_words(tree: ast.AST) -> list[int]:
    """Lines that decide by the text of an exception: a comparison, or a search, in `str(error)`."""
    found = []
    for handler in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name):
        for node in ast.walk(handler):
            if isinstance(node, ast.If | ast.IfExp | ast.While):
                test = node.test
                words = [
                    call
                    for call in ast.walk(test)
                    if isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Name)
                    and call.func.id in ("str", "repr")
                    and any(isinstance(name, ast.Name) and name.id == handler.name for name in ast.walk(call))
                ]
                found += [test.lineno for _ in words]
    return found


def test_nothing_reacts_to_the_words_of_a_message() -> None:
    assert {name: lines for name, module in PACKAGE.items() if (lines := reacts_to_words(module.tree))} == {}


def test_a_reaction_to_words_is_found() -> None:
    planted = "try:\n    work()\nexcept OSError as error:\n    if 'full' in str(error):\n        again()\n"
    assert reacts_to_words(ast.parse(planted)) == [4]
    assert reacts_to_words(ast.parse(planted.replace("if 'full' in str(error)", "if error.errno == 28"))) == []


def test_what_is_imported_by_name_is_named_literally() -> None:
    found = {
        module.name
        for module in PACKAGE.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and structure.imports_by_name(node)
        and not (node.args and isinstance(node.args[0], ast.Constant))
    }
    assert found == NAMED_AT_RUN_TIME


@pytest.mark.parametrize(
    ("importer", "imported", "kept"),
    [
        ("argonne.high.a", "argonne.low.b", True),
        ("argonne.high.a", "argonne.floor", True),
        ("argonne.high.a", "argonne.high.b", True),
        ("argonne.high.a", "argonne", True),
        ("argonne.low.a", "argonne.high.b", False),
        ("argonne.low.a", "argonne.beside.b", False),
        ("argonne", "argonne.floor", False),
    ],
)
def test_an_import_up_the_arrow_or_into_a_room_beside_is_against_it(importer: str, imported: str, kept: bool) -> None:
    found = against([{"floor"}, {"low", "beside"}, {"high"}], [Import(importer, imported, 1, "import")])
    assert found == (set() if kept else {(importer, imported)})

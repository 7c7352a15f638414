"""What the syntax trees say, on small planted packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tools import structure
from tools.structure import Import, Package

Plant = Callable[..., Package]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """Writes a package `house` of the given files (`a__b` is a/b.py) and reads it."""

    def write(**sources: str) -> Package:
        for name, source in {"__init__": "", **sources}.items():
            path = tmp_path / "house" / f"{name if name.startswith('__') else name.replace('__', '/', 1)}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return structure.read_package(tmp_path / "house")

    return write


def edges(package: Package) -> set[tuple[str, str, str]]:
    return {(one.importer, one.imported, one.kind) for one in structure.imports(package)}


def test_lines_are_counted_as_wc_does(plant: Plant) -> None:
    package = plant(a="x = 1\n\n# end\n", b="x = 1")
    assert (package["house.a"].lines, package["house.b"].lines) == (3, 0)


@pytest.mark.parametrize(
    "source",
    [
        "import house.low",
        "from house import low",
        "from house.low import name",
        "from . import low",
        "from .low import name",
        "def lazy():\n    from house.low import name",
        "class Holder:\n    def method(self):\n        if self:\n            import house.low as low",
        "import importlib\nimportlib.import_module('house.low')",
        "__import__('house.low')",
    ],
)
def test_an_import_is_found_in_every_form_and_at_any_depth(plant: Plant, source: str) -> None:
    assert edges(plant(low="name = 1", high=source)) == {("house.high", "house.low", "import")}


def test_a_relative_import_in_a_room_is_read_from_where_it_stands(plant: Plant) -> None:
    package = plant(
        room____init__="from .inside import name\nfrom ..low import name",
        room__inside="from ..low import name",
        low="name = 1",
    )
    assert edges(package) == {
        ("house.room", "house.room.inside", "import"),
        ("house.room", "house.low", "import"),
        ("house.room.inside", "house.low", "import"),
    }


def test_an_import_for_types_alone_is_told_apart_from_the_branch_that_runs(plant: Plant) -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.low\nelse:\n    import house.other"
    assert edges(plant(low="", other="", high=source)) == {
        ("house.high", "house.low", "types"),
        ("house.high", "house.other", "import"),
    }


@pytest.mark.parametrize("text", ["house.low", "house.low.name", "exec python -m house.low --flag"])
def test_a_modules_name_in_a_string_is_found(plant: Plant, text: str) -> None:
    assert edges(plant(low="", high=f"PLACE = {text!r}")) == {("house.high", "house.low", "text")}


@pytest.mark.parametrize("text", ["house", "house.metric", "see house.low for more", "lighthouse.low"])
def test_other_text_is_no_import(plant: Plant, text: str) -> None:
    assert edges(plant(low="", high=f"TEXT = {text!r}")) == set()


def test_a_circle_through_a_lazy_import_is_found(plant: Plant) -> None:
    package = plant(
        a="import house.b", b="from house import c", c="def late():\n    import house.a", d="import house.a"
    )
    assert structure.circles(structure.imports(package)) == [["house.a", "house.b", "house.c"]]


def test_two_circles_are_two_and_modules_beside_them_are_in_neither(plant: Plant) -> None:
    package = plant(
        a="import house.b", b="import house.a", c="import house.d, house.a", d="import house.c", e="import house.c"
    )
    assert structure.circles(structure.imports(package)) == [["house.a", "house.b"], ["house.c", "house.d"]]


def test_a_circle_that_grows_is_another_one(plant: Plant) -> None:
    package = plant(a="import house.b", b="import house.a, house.c", c="import house.b")
    assert structure.circles(structure.imports(package)) == [["house.a", "house.b", "house.c"]]


def test_types_and_strings_close_no_circle() -> None:
    there = Import("a", "b", 1, "import")
    assert structure.circles([there, Import("b", "a", 1, "types"), Import("b", "a", 1, "text")]) == []
    assert structure.circles([there, Import("b", "a", 1, "import")]) == [["a", "b"]]


def test_a_function_is_as_long_as_its_lines_and_methods_and_nested_ones_count(plant: Plant) -> None:
    source = (
        "class Holder:\n    @property\n    def method(self):\n        def inner():\n            return 1\n\n       "
        " return inner\n"
    )
    found = {(one.name, one.line, one.lines) for one in structure.functions(plant(a=source))}
    assert found == {("Holder.method", 3, 5), ("Holder.method.inner", 4, 2)}


def test_a_private_function_that_one_other_names_is_found(plant: Plant) -> None:
    source = (
        "def _once(): ...\ndef _twice(): ...\ndef _itself(): _itself()\ndef f(): return _once(), _twice()\ndef "
        "g(): return _twice()\n"
    )
    assert structure.single_callers(plant(a=source)) == [("house.a._once", "house.a.f")]


def test_a_private_method_passed_on_is_called_and_a_special_one_is_not_private(plant: Plant) -> None:
    source = "class A:\n    def __init__(self): self._make()\n    def _make(self): ...\n    def _read(self): ...\n"
    source += "    def run(self, pool): pool.submit(self._read), self.__init__()\n"
    assert structure.single_callers(plant(a=source)) == [
        ("house.a.A._make", "house.a.A.__init__"),
        ("house.a.A._read", "house.a.A.run"),
    ]


def test_a_name_in_another_module_counts_unless_that_module_has_one_of_its_own(plant: Plant) -> None:
    own = "def _fill(): ...\ndef f(): _fill()\n"
    assert structure.single_callers(plant(a=own, b=own)) == [
        ("house.a._fill", "house.a.f"),
        ("house.b._fill", "house.b.f"),
    ]
    assert structure.single_callers(plant(a=own, b="from house.a import _fill\ndef g(): _fill()\n")) == []

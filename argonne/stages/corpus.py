"""A real corpus that every Python installation carries: documentation strings and help topics of its standard library.

Nothing is imported or executed: sources are parsed with `ast`, and `pydoc_data/topics.py` is read as data. The list of
modules is fixed, so that two machines with the same Python have the same corpus.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from argonne import files
from argonne.errors import InputError

# Packages are taken with all their modules, tests left out. Platform modules are listed too: their sources are
# installed everywhere.
_MODULE_LIST = """
abc argparse ast asyncio base64 bdb bisect bz2 calendar cmd code codecs collections colorsys compileall concurrent
configparser contextlib copy copyreg csv ctypes curses dataclasses datetime dbm decimal difflib dis doctest email
encodings enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext glob graphlib
gzip hashlib heapq hmac html http imaplib importlib inspect io ipaddress json keyword linecache locale logging lzma
mailbox mimetypes modulefinder multiprocessing netrc ntpath numbers opcode operator optparse os pathlib pdb pickle
pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats py_compile pyclbr pydoc queue quopri random
re reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3
ssl stat statistics string stringprep struct subprocess symtable sysconfig tabnanny tarfile tempfile textwrap threading
timeit token tokenize tomllib trace traceback tracemalloc turtle types typing unittest urllib uuid venv warnings wave
weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
"""
MODULES = tuple(_MODULE_LIST.split())
TOPICS = "pydoc_data/topics.py"
SHORTEST = 80
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "ensurepip", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """What was written: one JSON line a document, with `text` and `source`. Bytes are those of the texts in UTF-8."""

    path: Path
    documents: int
    bytes: int
    modules: int
    missing: tuple[str, ...]
    too_short: int
    repeated: int


def write_corpus(path: Path, *, modules: Sequence[str] = MODULES, library: Path | None = None) -> Corpus:
    """Collect the corpus of this Python (or of the library folder given) into the JSON-lines file `path`.

    Entries shorter than 80 characters and exact repetitions are left out and counted. Raises InputError when the
    library has no sources.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    lines: list[str] = []
    total = too_short = repeated = 0
    for source, text in _documents(library, modules):
        if len(text) < SHORTEST:
            too_short += 1
        elif text in seen:
            repeated += 1
        else:
            seen.add(text)
            total += len(text.encode())
            lines.append(json.dumps({"text": text, "source": source}, ensure_ascii=False))
    if not lines:
        raise InputError(
            f"{library}: no documentation strings found there; this Python carries no sources, use one that does "
            "(python.org, Debian, uv)"
        )
    missing = tuple(name for name in modules if not list(_sources(library, name)))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "\n".join(lines) + "\n")
    return Corpus(path, len(lines), total, len(modules) - len(missing), missing, too_short, repeated)


def _documents(library: Path, modules: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(where it comes from, text) in a fixed order."""
    if (topics := library / TOPICS).is_file():
        # The help topics (`help("if")`): a dict literal in a module, evaluated as a literal and never run.
        for node in ast.parse(topics.read_bytes(), filename=str(topics)).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                for name, text in ast.literal_eval(node.value).items():
                    yield f"topic {name}", text.strip()
    for module in modules:
        for file in _sources(library, module):
            relative = file.relative_to(library).with_suffix("")
            name = ".".join(part for part in relative.parts if part != "__init__")
            yield from _docstrings(ast.parse(file.read_bytes(), filename=str(file)), name)


def _sources(library: Path, module: str) -> Iterator[Path]:
    if (file := library / f"{module}.py").is_file():
        yield file
    package = library / module
    for file in sorted(package.rglob("*.py")) if package.is_dir() else ():
        if not SKIPPED_FOLDERS.intersection(file.relative_to(library).parts):
            yield file


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """One document for the module, and one for each class or function with what is inside it, as `help()` would show
    them.
    """
    if text := ast.get_docstring(tree):
        yield module, f"{module}\n\n{text}"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            parts = list(_entries(node, module))
            if parts:
                yield f"{module}.{node.name}", "\n\n".join(parts)


def _entries(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, parent: str) -> Iterator[str]:
    name = f"{parent}.{node.name}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        heading = f"class {name}({bases})"
    else:
        heading = f"{name}({ast.unparse(node.args)})"
    if text := ast.get_docstring(node):
        yield f"{heading}\n\n{text}"
    for inner in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _entries(inner, name)

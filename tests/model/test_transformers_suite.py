"""transformers' own model tests, from the sources of the version that is installed, on a tiny model of each generation.

What fails stands in transformers_suite.toml with its reason; nothing else fails, and nothing in the list passes. The
sources carry no tests/generation and no tests/exporters: test_transformers.py tests `generate` and `torch.export`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import urllib.request
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import transformers

from tests.model.conftest import GENERATIONS

HERE = Path(__file__).parent
INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
STAND_INS = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def fetch(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=120) as answer:
        content: bytes = answer.read()
        return content


def sources(version: str, folder: Path) -> Path:
    """The unpacked source distribution, verified by the index's hash. Skips where the index cannot be reached."""
    name = f"transformers-{version}"
    try:
        listing = json.loads(fetch(f"{INDEX}/transformers/", Accept="application/vnd.pypi.simple.v1+json"))
        entry = next(file for file in listing["files"] if file["filename"] == f"{name}.tar.gz")
        archive = fetch(entry["url"])
    except OSError as error:
        pytest.skip(f"the sources of transformers {version} cannot be fetched from {INDEX}: {error}")
    assert hashlib.sha256(archive).hexdigest() == entry["hashes"]["sha256"]
    (folder / "archive.tar.gz").write_bytes(archive)
    with tarfile.open(folder / "archive.tar.gz") as packed:
        packed.extractall(folder, filter="data")
    return folder / name


def tiny(fields: dict[str, Any]) -> dict[str, Any]:
    """Two layers, as transformers' tests ask for."""
    kinds = {"layer_types": ["full_attention", "sliding_attention"]} if "layer_types" in fields else {}
    return {**fields, "num_hidden_layers": 2, **kinds}


def outcomes(version: str, folder: Path) -> dict[tuple[str, str], str]:
    """(generation, test) -> passed, skipped or failed."""
    root = sources(version, folder)
    tests, here = root / "tests", root / "tests" / "models" / "argonne"
    here.mkdir(parents=True)
    for file, mixin in STAND_INS.items():
        if not (tests / file).exists():
            (tests / file).parent.mkdir(exist_ok=True)
            (tests / file).write_text(f"class {mixin}: pass\n")
    for package in (tests, here.parent, here, *{(tests / file).parent for file in STAND_INS}):
        (package / "__init__.py").touch()
    shutil.copyfile(HERE / "transformers_suite.py", here / "test_modeling_argonne.py")
    (here / "generations.json").write_text(json.dumps({name: tiny(of) for name, of in GENERATIONS.items()}))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "more")]
    got = subprocess.run([*pip, "parameterized"], capture_output=True, text=True, check=False)
    if got.returncode:
        pytest.skip(f"parameterized, which transformers' tests import, cannot be installed: {got.stderr[-300:]}")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder / "more")}
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider"]
    command += [f"--junitxml={folder / 'report.xml'}", str(here / "test_modeling_argonne.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert (folder / "report.xml").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[tuple[str, str], str] = {}
    for case in ElementTree.parse(folder / "report.xml").getroot().iter("testcase"):
        tags = {child.tag for child in case}
        key = (case.get("classname", "").rsplit(".Test", 1)[-1].replace("_", "-"), case.get("name", ""))
        now = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        found[key] = "failed" if found.get(key) == "failed" else now  # a subtest is a case of its own
    return found


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_transformers_own_tests_fail_only_where_a_reason_is_listed(tmp_path: Path) -> None:
    found = outcomes(transformers.__version__, tmp_path)
    listed = tomllib.loads((HERE / "transformers_suite.toml").read_text())
    expected = {(generation, name) for name, of in listed.items() for generation in of.get("on", GENERATIONS)}
    failed = {key for key, outcome in found.items() if outcome == "failed"}
    assert sorted(failed - expected) == []
    assert sorted(expected - failed) == [], "these pass now: take them out of transformers_suite.toml"
    for generation in GENERATIONS:  # so that nothing run is not everything passed
        assert sum(outcome == "passed" for (name, _), outcome in found.items() if name == generation) >= 80


def test_every_listed_failure_has_a_reason() -> None:
    for name, of in tomllib.loads((HERE / "transformers_suite.toml").read_text()).items():
        assert set(of) <= {"on", "reason"}, name
        assert of["reason"], name
        assert set(of.get("on", [])) <= set(GENERATIONS), name

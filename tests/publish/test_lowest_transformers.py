"""The lowest transformers that pyproject.toml allows, in an environment of its own on top of this one."""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = [
    *(f"tests/model/test_{name}.py" for name in ("saving", "caches", "engines", "references", "attention")),
    "tests/legacy/test_convert.py",
    "tests/publish/test_export.py",
]


def lowest_version() -> str:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = next(
        re.match(r"transformers>=([\d.]+)", entry) for entry in dependencies if entry.startswith("transformers")
    )
    assert found is not None
    return found[1]


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_the_model_tests_pass_on_the_lowest_supported_transformers(tmp_path: Path) -> None:
    version = lowest_version()
    full = version if version.count(".") == 2 else f"{version}.0"
    venv.create(tmp_path / "venv", with_pip=True)
    packages = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    (packages / "base.pth").write_text(
        "\n".join(site.getsitepackages())
    )  # torch and the rest come from this environment
    python = str(tmp_path / "venv" / "bin" / "python")
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", f"transformers=={full}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if installed.returncode:
        pytest.skip(f"transformers {full} cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    version_line = subprocess.run(
        [python, "-c", "import transformers; print(transformers.__version__)"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert version_line.stdout.strip() == full != sys.modules["transformers"].__version__
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *FILES,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:]

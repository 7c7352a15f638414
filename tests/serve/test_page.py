"""The chat page without a browser: what is served, under which headers, and what its files may not hold."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from setuptools import build_meta

from argonne.serve.engine import Engine
from argonne.serve.page import FOLDER, HEADERS, TYPES
from tests.serve.serving import Running, make_engine, running
from tests.tour import ROOT

FILES = sorted(FOLDER.iterdir())
PATHS = ["/" if file.name == "index.html" else f"/page/{file.name}" for file in FILES]
POLICY = HEADERS["content-security-policy"]
KEY = {"authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return make_engine(tmp_path_factory.mktemp("chat") / "it")


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    with running({"it": engine}, key="secret") as made:
        yield made


@pytest.mark.parametrize(("path", "file"), [*zip(PATHS, FILES, strict=True)], ids=PATHS)
def test_each_file_is_served_without_a_key_as_what_it_is(path: str, file: Path, server: Running) -> None:
    status, body, headers = server.ask(path, method="GET")
    assert (status, body) == (200, file.read_text())
    assert headers["content-type"].partition(";")[0] == TYPES[file.suffix]
    assert headers["content-security-policy"] == POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store"


def test_the_policy_lets_nothing_in_but_this_servers_own_files() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules.pop("default-src") == "'none'"
    assert rules.pop("img-src") == "'self' data:"
    assert rules.pop("require-trusted-types-for") == "'script'"
    assert {rules.pop(name) for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert set(rules.values()) == {"'none'"}


def test_the_models_still_need_the_key(server: Running) -> None:
    for path in ("/v1/models", "/metrics", "/page", "//", "/v1/../page/chat.js"):
        assert server.ask(path, method="GET")[0] == 401
    assert server.ask("/v1/models", method="GET", headers=KEY)[0] == 200
    assert server.ask("/page/../v1/models", method="GET")[0] == 404


def test_other_paths_and_methods_stay_what_they_were(server: Running) -> None:
    for path in ("/page", "/page/none.js", "/page/../page.py", "/page/index.html", "/favicon.ico"):
        status, body, _ = server.ask(path, method="GET", headers=KEY)
        assert (status, body["error"]["type"]) == (404, "invalid_request_error")
    assert server.ask("/", {}, headers=KEY)[0] == 405
    status, body, headers = server.ask("/", method="HEAD")
    assert (status, body) == (200, "")
    assert int(headers["content-length"]) == (FOLDER / "index.html").stat().st_size


def test_a_page_of_another_name_is_refused(server: Running) -> None:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/", headers={"host": "rebound.example"})
    assert connection.getresponse().status == 421
    connection.close()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_names_no_other_host_and_holds_no_inline_code_or_style(file: Path) -> None:
    text = file.read_text()
    for address in re.findall(r"(?:https?:)?//[\w.-]+", re.sub(r"^\s*// .*| // .*", "", text, flags=re.MULTILINE)):
        assert address == "http://www.w3.org", address  # the name space of SVG, which nobody fetches
    if file.suffix == ".html":
        assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:|<script(?! type=\"module\" src=\"/page/)", text)
        assert set(re.findall(r'(?:src|href)="([^"]+)"', text)) - {"#question"} <= {*PATHS}
    if file.suffix == ".js":
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


def test_the_settings_say_what_the_document_says() -> None:
    document = (ROOT / "docs" / "generate.md").read_text()
    rows = re.findall(r'^  \["(\w+)", "[^"]+", "([^"]+)", "([^"]+)"', (FOLDER / "settings.js").read_text(), re.M)
    assert len(rows) == 7
    for name, meaning, _ in rows:
        assert f"| {meaning} |" in document, name


def test_the_files_are_in_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for file in [ROOT / "argonne" / "__init__.py", ROOT / "argonne" / "serve" / "__init__.py", *FILES]:
        place = copy / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    monkeypatch.chdir(copy)
    wheel = tmp_path / build_meta.build_wheel(str(tmp_path))
    held = zipfile.ZipFile(wheel).namelist()
    assert {f"argonne/serve/page/{file.name}" for file in FILES} <= {*held}

"""What the documents tell a user to type is understood, and what they link to exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from argonne.cli.command import build_parser, parse_overrides
from argonne.recipe import build, load_recipe, read_tree, resolve

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [ROOT / "README.md", ROOT / "docs" / "getting-started.md"]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def commands(document: Path) -> list[list[str]]:
    """Every `argonne ...` of the code blocks and of the inline code, without comments and placeholders in capitals."""
    text = document.read_text()
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = [line.strip().removeprefix(".venv/bin/") for line in blocks.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    found = [shlex.split(line, comments=True) for line in lines if re.match(r"argonne (?!demo/)\w", line)]
    return [words[1:] for words in found if not any(re.search(r"\.\.|^[A-Z]+\.$", word) for word in words)]


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: path.name)
def test_commands_in_the_documents_are_understood(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text('base = "nano-3.0"\n')
    for command in commands(document):
        if "--help" in command:
            continue
        options, rest = build_parser(command).parse_known_args(command)
        recipe = getattr(options, "recipe", None)
        if isinstance(recipe, str) and not recipe.startswith("runs/"):
            load_recipe(recipe, parse_overrides(rest))
        elif not isinstance(recipe, str):
            assert rest == [], command


def test_the_readme_has_commands_to_check() -> None:
    assert len(commands(ROOT / "README.md")) >= 8


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text):
        assert (document.parent / target).exists(), target


def test_the_recipe_of_getting_started_is_a_recipe(tmp_path: Path) -> None:
    from argonne.config import Recipe

    (toml,) = re.findall(
        r"^```toml\n(.*?)^```", (ROOT / "docs" / "getting-started.md").read_text(), re.MULTILINE | re.DOTALL
    )
    path = tmp_path / "mine.toml"
    path.write_text(toml)
    recipe = resolve(build(Recipe, read_tree(str(path))))
    assert (recipe.train.steps, recipe.model.hidden_size, recipe.model.num_hidden_layers) == (2000, 256, 4)


def test_every_target_the_documents_name_is_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document.name}: make {target}"

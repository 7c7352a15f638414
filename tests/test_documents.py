"""What the documents tell a user to type is understood, and what they link to exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from argonne.cli.command import ALL_VERBS, build_parser, parse_overrides
from argonne.recipe import load_recipe
from tests.tour import ROOT, blocks_of, fresh_clone, take

GUIDES = [ROOT / "README.md", ROOT / "docs" / "getting-started.md"]
# Run one after the other, in one folder.
VERB_PAGES = [
    ROOT / "docs" / name for name in ("tokenizer.md", "pretrain.md", "look.md", "into-other-tools.md", "sizes.md")
]
CARD_PAGES = [ROOT / "docs" / name for name in ("rented-gpu.md", "out-of-memory.md")]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


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
    """Those within the text and its tables too, which no test runs."""
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(document.read_text()):
        if block.language == "toml":
            (tmp_path / block.text.split()[1]).write_text(block.text)
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


# What a document says of itself that no test runs it: every such block, and why.
LEFT_OUT = {"README.md": ["it installs from a registry"], "getting-started.md": []}
# `make test` would run this test again: what it would do is printed instead.
RECURSING = {"README.md": {"make test": "make --dry-run test"}, "getting-started.md": {}}
# Minutes by itself: its functions are run by tests/stages/test_demo.py, and the campaign runs it as it stands.
LONG = {"README.md": {"make demo": "make --dry-run demo"}, "getting-started.md": {}}


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: path.name)
def test_every_block_is_run_or_says_in_the_document_why_it_is_not(document: Path) -> None:
    blocks = blocks_of(document.read_text())
    assert {block.language for block in blocks} <= {"sh", "toml", "python", "text"}
    assert [block.left_out for block in blocks if block.left_out] == LEFT_OUT[document.name]
    assert [block.line for block in blocks if block.language == "text" and "argonne " in block.text] == []
    assert sum(block.language == "sh" for block in blocks) >= 4


@pytest.mark.parametrize("document", GUIDES, ids=lambda path: path.name)
def test_a_document_runs_word_by_word_in_a_fresh_folder(document: Path, tmp_path: Path) -> None:
    said = take(document.read_text(), fresh_clone(tmp_path), RECURSING[document.name] | LONG[document.name])
    runs = {"README.md": ["runs/first", "runs/chat"], "getting-started.md": ["runs/mine"]}[document.name]
    assert re.findall(r"^(\S+) is complete", said, re.MULTILINE) == ["trained/run", *runs]
    check_the_run_is_what_the_readme_says(tmp_path / "trained" / "run")
    check_the_run_is_what_the_readme_says(tmp_path / runs[0])
    export = tmp_path / "exports" / Path(runs[-1]).name
    assert json.loads((export / "config.json").read_text())["model_type"] == "llama"
    assert (export / "chat_template.jinja").exists() == ("runs/chat" in runs)


def test_the_pages_of_the_verbs_run_word_by_word_one_after_the_other(tmp_path: Path) -> None:
    said = take("".join(page.read_text() for page in VERB_PAGES), fresh_clone(tmp_path), {})
    runs = ["runs/small", "runs/longer", "quick/run", "quick/run", "own/run"]
    assert re.findall(r"^(\S+) is complete", said, re.MULTILINE) == runs
    assert said.count("everything verifies") + said.count("no problem was found") == 5
    assert re.search(r"^longer +complete +25/25 ", said, re.MULTILINE)


def test_the_pages_about_cards_plan_word_by_word_without_one(tmp_path: Path) -> None:
    said = take("".join(page.read_text() for page in CARD_PAGES), fresh_clone(tmp_path), {})
    assert said.count("plan of argonne-") == 8
    assert "a copy does not fit: the plan says what would" in said
    assert "does not fit: see its memory by part" in said


@pytest.mark.parametrize("verb", ALL_VERBS)
def test_every_verb_has_a_page_that_names_it_in_its_title_and_the_readme_leads_there(verb: str) -> None:
    pages = {page: page.read_text() for page in (ROOT / "docs").glob("*.md")}
    titled = [page for page, text in pages.items() if verb in re.findall(r"[a-z-]+", text.splitlines()[0].lower())]
    assert [page.name for page in titled if f"argonne {verb}" in pages[page]] != []
    assert any(f"](docs/{page.name})" in GUIDES[0].read_text() for page in titled)


def check_the_run_is_what_the_readme_says(run: Path) -> None:
    (tree,) = [block.text for block in blocks_of(GUIDES[0].read_text()) if block.text.startswith("runs/first/")]
    names = re.findall(r"^  (\S+)(?: or (\S+))?", tree, re.MULTILINE)
    assert len(names) == 8
    for name in names:
        assert any(list(run.glob(part.replace("<N>", "*"))) for part in name if part), name


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_the_readme_runs_word_by_word_with_the_demo(tmp_path: Path) -> None:
    take(GUIDES[0].read_text(), fresh_clone(tmp_path), RECURSING["README.md"])
    check_the_run_is_what_the_readme_says(tmp_path / "demo" / "pretrain")


FIRST = "argonne train texts --hours 0.001"
PLANTED = {
    "a flag that is wrong": ("--hold-out 0.05", "--hold-outs 0.05"),
    "a file that is not there": ("'texts/*.txt'", "'text/*.txt'"),
    "a verb that is wrong": ("argonne prepare", "argonne prepair"),
    "a flag of the first command that is wrong": ("--hours 0.001", "--hour 0.001"),
    "a first half of a pipe": ("mkdir -p texts", "mkdir texts/a | cat"),
    "a recipe that is wrong": ('base = "nano-2.5"', 'base = "nano-2.6"'),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_wrong_command_is_found(fault: str, tmp_path: Path) -> None:
    right, wrong = PLANTED[fault]
    text = GUIDES[0].read_text().replace(right, wrong)
    line = next(block.line for block in blocks_of(text) if wrong in block.text)
    if fault == "a recipe that is wrong":  # found where it is read first
        line = next(block.line for block in blocks_of(text) if "argonne plan first.toml" in block.text)
    first = {FIRST: "true"} if FIRST in text else {}  # no fault is planted behind it in its block
    with pytest.raises(AssertionError, match=rf"the block of \['line {line}'\] ended with \d"):
        take(text, fresh_clone(tmp_path), RECURSING["README.md"] | LONG["README.md"] | first)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nls\n```\n", "no language"),
        ("```toml\nseed = 1\n```\n", "without a name"),
        ("```sh\nls\n```\n", "not in the"),
    ],
)
def test_what_would_be_left_out_in_silence_is_found(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        take(text, tmp_path, {"make demo": "true"})


def test_every_target_the_documents_name_is_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document.name}: make {target}"

"""docs/models: one page a release, as `python -m tools.preset_cards --write` writes it now."""

from __future__ import annotations

from argonne.publish.preset_card import preset_card, releases
from tools.preset_cards import PAGES


def test_the_pages_are_the_cards_and_there_is_no_other() -> None:
    written = {page.name: page.read_text() for page in PAGES.iterdir()}
    assert written == {f"{name}.md": preset_card(name) for name in releases()}

"""`python -m tools.preset_cards --write`: the model cards of the releases, docs/models."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from argonne.publish.preset_card import preset_card, releases

PAGES = Path(__file__).resolve().parent.parent / "docs" / "models"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put them into docs/models")
    write = parser.parse_args().write
    for name in releases():
        card = preset_card(name)
        print(card)
        if write:
            PAGES.mkdir(exist_ok=True)
            (PAGES / f"{name}.md").write_text(card)
    return 0


if __name__ == "__main__":
    sys.exit(main())

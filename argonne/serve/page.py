"""The chat page: plain files, and the headers that keep it to this server."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {  # trusted types: no text becomes markup or script, whatever the page's own code does with it
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
}


def page_routes() -> list[Route]:
    """`/` and each file that the page needs. The files are read once, here."""
    found = []
    for file in FOLDER.iterdir():
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        answer = Response(file.read_bytes(), headers=HEADERS, media_type=TYPES[file.suffix])
        found.append(Route(path, answer, methods=["GET"]))
    return found

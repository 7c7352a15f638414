"""The chat page: plain files, and the headers that keep it to this server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (  # the last two: no text can become markup or script, whatever the page's own code does with it
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
HEADERS = {"content-security-policy": POLICY, "cross-origin-opener-policy": "same-origin"}


def page_files() -> Mapping[str, Callable[[Request], Awaitable[Response]]]:
    """What answers at `/` and at the path of each file that it needs. The files are read once, here."""
    return {
        "/" if file.name == "index.html" else f"/page/{file.name}": _file(file.read_bytes(), TYPES[file.suffix])
        for file in sorted(FOLDER.iterdir())
    }


def _file(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return answer

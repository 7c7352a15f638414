"""What every request passes: the host it names, the key it gives, the body it brings, and the headers it gets back."""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
import traceback
from collections.abc import Collection, Coroutine, Mapping
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from argonne.serve.api.answered import anthropic_error, openai_error
from argonne.serve.api.fields import ApiError
from argonne.serve.metrics import Metrics

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
SEND_SECONDS = 60.0  # a client that reads nothing for so long is given up
GONE = 499  # the client left: nobody reads this status but the metrics
ANTHROPIC = "/v1/messages"
FREE = ("/health", "/")  # need no key, as what the chat page is made of


def error_response(path: str, error: ApiError) -> Response:
    """The error in the shape of the path's API."""
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
    if error.status in (408, 413):  # what is left of the body is not read
        headers["connection"] = "close"
    body = anthropic_error(error) if path.startswith(ANTHROPIC) else openai_error(error)
    return JSONResponse(body, error.status, headers)


class Door:
    """Wraps the application. hosts: names, without a port, by which it may be called; key: what clients must give;
    routes: paths that are counted by name.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Collection[str], key: str | None, routes: Collection[str], metrics: Metrics
    ) -> None:
        self._app, self._hosts, self._routes, self._metrics = app, {host.lower() for host in hosts}, routes, metrics
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path, status = str(scope["path"]), 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name for name, _ in message["headers"]}
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in more if pair[0] not in given)]
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        try:
            try:
                self._check(path, dict(scope["headers"]))
                await self._app(scope, receive, told)
            except ApiError as error:
                await error_response(path, error)(scope, receive, told)
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                if not status:
                    failed = ApiError(500, f"the server failed ({type(error).__name__}); its log says where")
                    await error_response(path, failed)(scope, receive, told)
        finally:
            route = path if path in self._routes else "other"
            self._metrics.requests[route, status or GONE] += 1

    def _check(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if name not in self._hosts:
            raise ApiError(421, f"Host: found {host[:100]!r}, which this server is not called by; see --allow-host")
        if self._key is not None and path not in FREE and not path.startswith("/page/"):
            scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
            given = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
            if not hmac.compare_digest(given, self._key):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")


async def until_gone(receive: Receive, work: Coroutine[Any, Any, Response | None]) -> Response | None:
    """What `work` returns. Where the client leaves before, the work is cancelled."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await tasks[0] if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_json(request: Request, *, limit: int, seconds: float) -> object:
    """The body of a request. Raises ApiError where it is none, too large, too slow or no JSON in UTF-8."""
    kind, _, more = request.headers.get("content-type", "").partition(";")
    charset = more.strip().lower().replace('"', "")
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        raise ApiError(415, "Content-Type: expected application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Content-Encoding: expected none")
    if int(request.headers.get("content-length", "0")) > limit:
        _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    _too_large(limit)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {seconds:g} seconds") from None
    except ClientDisconnect:
        raise ApiError(GONE, "the client left") from None
    return parsed(bytes(body))


def _too_large(limit: int) -> NoReturn:
    raise ApiError(413, f"the body is larger than the {limit:,} bytes that this server reads")


def parsed(body: bytes) -> object:
    """What a JSON text says. Raises ApiError where it is none, NaN and half a surrogate pair included."""
    try:
        value: object = json.loads(body.decode(), parse_constant=_no_number)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {str(error)[:100]}") from None
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")

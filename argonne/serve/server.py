"""`argonne serve`: the routes, the socket, and an orderly end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from argonne import __version__
from argonne.errors import InputError
from argonne.serve.api.answered import Work
from argonne.serve.api.asked import Served, named
from argonne.serve.api.chat import ChatWork
from argonne.serve.api.completions import CompletionsWork
from argonne.serve.api.fields import ApiError, Fields
from argonne.serve.api.messages import MessagesWork
from argonne.serve.api.responses import ResponsesWork
from argonne.serve.door import GONE, LOOPBACK, Door, error_response, read_json, until_gone
from argonne.serve.hosting import open_served
from argonne.serve.options import ServeOptions
from argonne.serve.page import page_routes
from argonne.serve.service import Draining, OutOfTime, Overloaded, Service, StepFailed, Ticket

APIS: Mapping[str, Callable[[Fields, Mapping[str, Served]], Work]] = {
    "/v1/chat/completions": ChatWork,
    "/v1/completions": CompletionsWork,
    "/v1/responses": ResponsesWork,
    "/v1/messages": MessagesWork,
}
STATUSES: Mapping[type[Exception], tuple[int, int]] = {  # and after how many seconds to ask again
    Overloaded: (429, 1),
    Draining: (503, 5),
    OutOfTime: (504, 0),
    InputError: (400, 0),
    StepFailed: (500, 0),
}
TOLD: tuple[type[Exception], ...] = (*STATUSES, ApiError)


def told(error: Exception) -> ApiError:
    """An exception of TOLD as a client hears of it."""
    if isinstance(error, ApiError):
        return error
    status, retry_after = next(found for kind, found in STATUSES.items() if isinstance(error, kind))
    return ApiError(status, str(error), retry_after=retry_after)


class EventStream(Response):
    """Server-sent events of a ticket; the client's leaving ends it."""

    def __init__(self, work: Work, ticket: Ticket) -> None:
        super().__init__(media_type="text/event-stream")
        self._work, self._ticket = work, ticket
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_gone(receive, self._tell(send))

    async def _tell(self, send: Send) -> None:
        async with self._ticket:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for frame in self._work.events(self._ticket):
                    await send({"type": "http.response.body", "body": frame.encode(), "more_body": True})
            except TOLD as error:
                frame = self._work.failed(told(error))
                await send({"type": "http.response.body", "body": frame.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@dataclass(frozen=True)
class Pages:
    """What answers at each path."""

    models: Mapping[str, Served]
    service: Service
    options: ServeOptions

    def api(self, make: Callable[[Fields, Mapping[str, Served]], Work]) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint of an API whose requests `make` reads."""

        async def answer(request: Request) -> Response:
            body = await read_json(request, limit=self.options.body_limit, seconds=self.options.body_seconds)
            try:
                work = await asyncio.to_thread(lambda: make(Fields(body), self.models))
                ticket = self.service.submit(work.served.name, work.request)
                if work.stream:
                    return EventStream(work, ticket)
                return await until_gone(request.receive, self._whole(work, ticket)) or Response(status_code=GONE)
            except TOLD as error:
                raise told(error) from None

        return answer

    async def _whole(self, work: Work, ticket: Ticket) -> Response:
        async with ticket:
            return JSONResponse(await work.whole(ticket))

    def _about(self, model: Served) -> dict[str, object]:
        more = {"context_length": model.decoder.context, "chat": model.template is not None}
        return {"id": model.name, "object": "model", "created": model.created, "owned_by": "argonne", **more}

    async def listed(self, request: Request) -> Response:
        found = [self._about(model) for model in self.models.values()]
        return JSONResponse({"object": "list", "data": found, "has_more": False})

    async def one(self, request: Request) -> Response:
        return JSONResponse(self._about(named(request.path_params["name"], self.models)))

    async def health(self, request: Request) -> Response:
        status = "failed" if not self.service.alive else "ending" if self.service.draining else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        text = self.service.metrics.text(*self.service.load())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")
    return error_response(request.url.path, told(error))


def build_app(models: Mapping[str, Served], service: Service, options: ServeOptions, key: str | None = None) -> Door:
    """The application. key: what clients must give, None where they need none."""
    found = Pages(models, service, options)
    pages = {"/v1/models": found.listed, "/health": found.health, "/metrics": found.metrics}
    routes = [Route(path, found.api(make), methods=["POST"]) for path, make in APIS.items()]
    routes += [Route(path, page, methods=["GET"]) for path, page in pages.items()]
    routes += [*page_routes(), Route("/v1/models/{name}", found.one, methods=["GET"])]
    app = Starlette(routes=routes, exception_handlers={ApiError: refused, HTTPException: refused})
    app.router.redirect_slashes = False
    anywhere = options.host in ("0.0.0.0", "::")
    own = () if anywhere else (f"[{options.host}]" if ":" in options.host else options.host,)
    hosts = [*LOOPBACK, *own, *options.allow_host]
    return Door(app, hosts=hosts, key=key, routes=["/", *APIS, *pages], metrics=service.metrics)


class Server(uvicorn.Server):
    """Ends in order: after the first signal no request is taken, and the answers that run have `grace` seconds; a
    second one ends at once.
    """

    def __init__(self, app: Door, service: Service, grace: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                access_log=False,
                server_header=False,
                log_config=None,
                log_level="error",
                timeout_graceful_shutdown=5,
            )
        )
        self._service, self._grace, self._deadline = service, grace, float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            self.should_exit = self.force_exit = True
        self._service.draining = True
        self._deadline = time.monotonic() + self._grace
        os.write(2, f"argonne: {signal.Signals(sig).name}: running answers have {self._grace:g} s to end\n".encode())

    async def on_tick(self, counter: int) -> bool:
        if self._service.draining and not self.should_exit:
            late = time.monotonic() > self._deadline
            if late:
                self._service.drop_all()
            self.should_exit = late or not (self._service.held or self.server_state.tasks)
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """Raises InputError where nobody can listen there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); another program may hold "
            "the port, name another one"
        ) from None


def key_of(options: ServeOptions) -> str | None:
    if options.api_key_env is None:
        return None
    key = os.environ.get(options.api_key_env, "").strip()
    if not key:
        raise InputError(f"--api-key-env {options.api_key_env}: that variable is not set; export the key in it")
    return key


def serve(names: Sequence[str], options: ServeOptions) -> None:
    """Answer until a signal asks to end. Raises InputError where a model, the port or the key is not there."""
    key, listener = key_of(options), listen(options.host, options.port)
    with listener:
        models = open_served(names, options)
        service = Service(
            {name: (model.decoder, model.engine.tokenizer) for name, model in models.items()},
            queue_limit=options.queue,
            time_limit=options.time_limit,
        )
        try:
            server = Server(build_app(models, service, options, key), service, options.grace)
            _say(models, options, listener, key)
            server.run(sockets=[listener])
        finally:
            service.close()


def _say(models: Mapping[str, Served], options: ServeOptions, listener: socket.socket, key: str | None) -> None:
    port = listener.getsockname()[1]
    for name, model in models.items():
        kind = "chat and completions" if model.template else "completions only"
        print(f"{name}: {kind}, context {model.decoder.context:,}", file=sys.stderr)
    if options.host not in ("localhost", "127.0.0.1", "::1") and key is None:
        print("argonne: whoever reaches this address may use it; see --api-key-env", file=sys.stderr)
    host = f"[{options.host}]" if ":" in options.host else options.host
    here = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # a browser goes to no address of all
    print(f"the page to chat with it: http://{here}:{port}/", file=sys.stderr)
    print(f"argonne {__version__} serves at http://{host}:{port}/v1", file=sys.stderr, flush=True)

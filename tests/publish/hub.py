"""A stand-in for the Hub on this machine: the calls that huggingface_hub makes to publish a model, large files by LFS.

It keeps blobs and commits in memory. `refuses` answers a call with a status; `flips` a byte of a file that is
committed, as a storage with a fault would.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", ".png", "tokenizer.json")
TOKEN = "hf_standin"  # too short for a real one


@dataclass
class Repository:
    """commits: (id, message, files by name) from the first, empty one on."""

    private: bool
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits.append((name, message, files))
        return name


@dataclass
class StandIn:
    """The Hub's state. calls: method and path of each request."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    refuses: dict[str, int] = field(default_factory=dict)
    flips: str | None = None

    def files(self, name: str) -> dict[str, bytes]:
        return self.repositories[name].commits[-1][2]

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> None:
        self.repositories[name] = Repository(private)
        self.repositories[name].commit("before", files)


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """A Hub at `url` while the block runs."""
    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *given: Any) -> None:
            return

        def answer(self, status: int, value: Any = None) -> None:
            body = json.dumps({"error": "refused"} if value is None and status >= 400 else value or {}).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def handled(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.calls.append(f"{self.command} {path}")
            for part, status in hub.refuses.items():
                if part in f"{self.command} {path}":
                    return self.answer(status)
            if path != "/api/validate-yaml" and "/lfs/" not in path and self.headers.get("Authorization") is None:
                return self.answer(401)
            for pattern, call in CALLS.items():
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    return self.answer(*call(hub, body, *match.groups()))
            return self.answer(404)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handled

    return Handler


Answer = tuple[int, Any]


def info(hub: StandIn, body: bytes, name: str, revision: str | None = None) -> Answer:
    repository = hub.repositories.get(name)
    if repository is None:
        return 404, None
    found = [commit for commit in repository.commits if revision in (None, "main", commit[0])]
    commit, _, files = found[-1]
    siblings = []
    for path, data in files.items():
        item: dict[str, Any] = {"rfilename": path, "size": len(data)}
        item["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if path.endswith(LARGE):
            item["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        siblings.append(item)
    return 200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}


def create(hub: StandIn, body: bytes) -> Answer:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    hub.repositories[name] = Repository(bool(asked.get("private")) or asked.get("visibility") == "private")
    hub.repositories[name].commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
    return 200, {"url": f"{hub.url}/{name}"}


def delete(hub: StandIn, body: bytes) -> Answer:
    asked = json.loads(body)
    del hub.repositories[f"{asked['organization']}/{asked['name']}"]
    return 200, {}


def preupload(hub: StandIn, body: bytes, name: str) -> Answer:
    names = [file["path"] for file in json.loads(body)["files"]]
    modes = ["lfs" if path.endswith(LARGE) else "regular" for path in names]
    listed = [
        {"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in zip(names, modes, strict=True)
    ]
    return 200, {"files": listed}


def batch(hub: StandIn, body: bytes, name: str) -> Answer:
    objects = []
    for asked in json.loads(body)["objects"]:
        one = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in hub.stored:
            one["actions"] = {"upload": {"href": f"{hub.url}/lfs/{asked['oid']}"}}
        objects.append(one)
    return 200, {"transfer": "basic", "objects": objects}


def put(hub: StandIn, body: bytes, oid: str) -> Answer:
    if hashlib.sha256(body).hexdigest() != oid:
        return 400, None
    hub.stored[oid] = body
    return 200, {}


def commit(hub: StandIn, body: bytes, name: str) -> Answer:
    repository = hub.repositories[name]
    files, message = dict(repository.commits[-1][2]), ""
    for line in body.splitlines():
        row = json.loads(line)
        value = row["value"]
        if row["key"] == "header":
            message = value["summary"]
            if value.get("parentCommit") not in (None, repository.commits[-1][0]):
                return 412, None
        elif row["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif row["key"] == "lfsFile":
            files[value["path"]] = hub.stored[value["oid"]]
        elif row["key"] == "deletedFile":
            del files[value["path"]]
    if hub.flips is not None:
        files[hub.flips] = bytes([files[hub.flips][0] ^ 1]) + files[hub.flips][1:]
    made = repository.commit(message, files)
    return 200, {"commitUrl": f"{hub.url}/{name}/commit/{made}", "commitOid": made}


NAME = r"([\w.-]+/[\w.-]+)"
CALLS: dict[str, Any] = {
    r"POST /api/validate-yaml": lambda hub, body: (200, {"warnings": [], "errors": []}),
    r"POST /api/repos/create": create,
    r"DELETE /api/repos/delete": delete,
    rf"GET /api/models/{NAME}": info,
    rf"GET /api/models/{NAME}/revision/(\w+)": info,
    rf"POST /api/models/{NAME}/preupload/main": preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": batch,
    r"PUT /lfs/(\w+)": put,
    rf"POST /api/models/{NAME}/commit/main": commit,
}

"""Several nodes as one world. On each of them one `argonne` command starts that node's workers; they meet in a store
that node 0 keeps, through which the commands also tell one another of failures and requests, and that they live.
"""

from __future__ import annotations

import fcntl
import json
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from argonne.errors import InputError, Stopped, first_line

POLL_SECONDS = 0.5
SILENT_SECONDS = 30.0
LEAVE_SECONDS = 10.0
VARIABLES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


class NodeLost(RuntimeError):
    """Another node's command is gone, or the network to it."""


@dataclass(frozen=True)
class Place:
    """This node among those that train together, and where they meet."""

    node: int
    nodes: int
    address: str
    port: int


@dataclass(frozen=True)
class World:
    """Where the workers of one attempt meet; `first`: the rank of this node's first one. `store`: is kept as long."""

    address: str
    port: int
    first: int
    size: int
    store: Any = None


def join(environment: MutableMapping[str, str]) -> None:
    """Say under the usual names what srun says under its own: of one task a node that it is a node's command, of more
    that each is a worker. Names that are set already stay. Raises InputError for a place that is not whole.
    """
    if "RANK" in environment:
        return
    tasks, nodes = (int(environment.get(f"SLURM_STEP_NUM_{name}", "1")) for name in ("TASKS", "NODES"))
    if tasks > 1 and "NNODES" not in environment:
        node = int(environment["SLURM_NODEID"])
        if tasks == nodes:
            environment.update(NNODES=str(nodes), NODE_RANK=str(node))
        else:
            shares = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])  # 2(x3),1
            each = [count for count, times in shares for _ in range(int(times or 1))]
            environment.update(RANK=environment["SLURM_PROCID"], WORLD_SIZE=str(tasks), LOCAL_WORLD_SIZE=each[node])
            # A task that was given one GPU of its own sees no other.
            bound = "," not in environment.get("CUDA_VISIBLE_DEVICES", ",")
            environment["LOCAL_RANK"] = "0" if bound else environment["SLURM_LOCALID"]
        environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
        job = 97 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
        environment.setdefault("MASTER_PORT", str(12000 + job % 20000))  # below those that the system gives away
    several = place_of(environment) is not None or ("RANK" in environment and nodes > 1)
    if several and (name := interface_to(environment["MASTER_ADDR"])) is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", name)


def first_host(nodes: str) -> str:
    """The first of SLURM's `a[01-03,07],b4`: a01."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[0] if found else nodes)


def place_of(environment: Mapping[str, str]) -> Place | None:
    """This command's place, by the usual variables; None where it is alone, or a worker already."""
    if "RANK" in environment or environment.get("NNODES", "1") == "1":
        return None
    found = {name: environment.get(name, "") for name in VARIABLES}
    for name, value in found.items():
        if not (value if name == "MASTER_ADDR" else value.isdigit()):
            raise InputError(
                f"{name}: found {value or 'nothing'!r}, expected {'a host' if name == 'MASTER_ADDR' else 'a number'}; "
                f"each of several nodes needs {', '.join(VARIABLES)}; unset NNODES to train on this node alone"
            )
    nodes, node, port = (int(found[name]) for name in ("NNODES", "NODE_RANK", "MASTER_PORT"))
    if node >= nodes or not 0 < port < 65536:
        raise InputError(
            f"NODE_RANK and MASTER_PORT: found {node} and {port}, expected 0 to {nodes - 1} (NNODES is {nodes}) and a "
            "port below 65536"
        )
    return Place(node, nodes, found["MASTER_ADDR"], port)


def interface_to(address: str) -> str | None:
    """The network interface on the way to node 0, None where that cannot be told. Left alone gloo takes the one of the
    host's own name, which many systems lead to the loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        for target in (address, "192.0.2.1"):  # on node 0 its name may lead to the loopback: then the way out
            probe.connect((target, 9))  # sends nothing
            mine = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex() if mine[0] != 127 else ():
                with suppress(OSError):  # one without an address
                    asked = struct.pack("256s", name.encode())
                    if fcntl.ioctl(probe.fileno(), 0x8915, asked)[20:24] == mine:  # SIOCGIFADDR
                        return name
    return None


class Nodes:
    """What this node's command and the others tell one another. `requests`: what it was asked (of `run_workers`).

    Each keeps one entry in the store of node 0 and reads those of all, in a thread of its own: where the network is cut
    that blocks, and nothing else does.
    """

    def __init__(self, place: Place, requests: Any, join_seconds: float) -> None:
        self._place, self._requests, self._join_seconds = place, requests, join_seconds
        self._mine: dict[str, Any] = {
            "attempt": -1,
            "ended": -1,
            "workers": 0,
            "failed": {},
            "asked": "",
            "left": False,
        }
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}  # the last new entry of each node, and when
        self._broken = ""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def meet(self, attempt: int, count: int) -> World:
        """Wait for every node's command with its `count` workers. Raises InputError where one does not come."""
        self._mine |= {"attempt": attempt, "workers": count}
        if self._thread is None:
            self._thread = threading.Thread(target=self._talk, args=(self._open(),), daemon=True)
            self._thread.start()
        self._await("attempt", self._join_seconds)
        counts = [self._heard[node][0]["workers"] for node in range(self._place.nodes)]
        first = sum(counts[: self._place.node])
        return World(self._place.address, self._place.port, first, sum(counts))

    def tell(self, failure: str) -> None:
        """Of an attempt the first failure on any node is the one that all tell."""
        if self._failure() is None:
            named = f"node {self._place.node} ({socket.gethostname()}): {failure}"
            self._mine["failed"] = {**self._mine["failed"], str(self._mine["attempt"]): named}

    def listen(self) -> str | None:
        """Pass requests on, both ways; what failed on any node, None where nothing did. Raises NodeLost."""
        if self._requests.number is not None:
            self._mine["asked"] = self._requests.number.name
        elif any(entry["asked"] for entry, _ in self._entries()):
            self._requests.ask(signal.SIGTERM)
        failure, now = self._failure(), time.monotonic()
        after = f", after a failure on {failure}" if failure else ""
        entry, since = self._heard.get(self._place.node, ({}, now))
        if self._broken or now - since > SILENT_SECONDS:  # not even this node's own comes back
            where, why = f"{self._place.address}:{self._place.port}", self._broken or f"for {SILENT_SECONDS:g} s"
            raise NodeLost(f"node 0 at {where} cannot be reached any more ({why}){after}")
        for node, (entry, since) in self._heard.copy().items():
            if now - since > SILENT_SECONDS:
                raise NodeLost(f"node {node} has not been heard of for {SILENT_SECONDS:g} s{after}")
            if entry["left"] and entry["ended"] < self._mine["attempt"]:
                raise NodeLost(f"node {node} has given up; its own words tell why{after}")
        return failure

    def agree(self) -> str | None:
        """Wait until the workers of this attempt have ended on every node; what failed, None where nothing did."""
        self._mine["ended"] = self._mine["attempt"]
        self._await("ended", None)
        return self._failure()

    def leave(self) -> None:
        """Node 0 keeps the store until the others have read how it ended."""
        self._mine["left"] = True
        end = time.monotonic() + LEAVE_SECONDS
        while self._place.node == 0 and not all(entry["left"] for entry, _ in self._entries()):
            if time.monotonic() > end or self._broken:
                break
            time.sleep(POLL_SECONDS / 5)
        self._over.set()
        if self._thread is not None:
            self._thread.join(LEAVE_SECONDS)

    def _entries(self) -> list[tuple[dict[str, Any], float]]:
        return list(self._heard.values())

    def _failure(self) -> str | None:
        told = [entry["failed"].get(str(self._mine["attempt"])) for entry, _ in self._entries()]
        return next(filter(None, [*told, self._mine["failed"].get(str(self._mine["attempt"]))]), None)

    def _await(self, name: str, seconds: float | None) -> None:
        end = None if seconds is None else time.monotonic() + seconds
        nodes = range(self._place.nodes)
        while missing := [n for n in nodes if n not in self._heard or self._heard[n][0][name] < self._mine["attempt"]]:
            self.listen()
            self._give_up(missing[0], end if name == "attempt" else None)
            time.sleep(POLL_SECONDS / 5)

    def _give_up(self, node: int, end: float | None) -> None:
        """While nothing runs yet, a request ends the wait for another node, and so does the time for it."""
        if end is not None and self._requests.number is not None:
            raise Stopped(f"asked to stop ({self._requests.number.name}) while node {node} was awaited")
        if end is not None and time.monotonic() > end:
            raise InputError(
                f"node {node} has not come to {self._place.address}:{self._place.port} in {self._join_seconds:g} s; "
                f"start the same command there with NODE_RANK={node}, or correct MASTER_ADDR and MASTER_PORT"
            )

    def _open(self) -> Any:
        """The store: node 0's own, or a connection to it as soon as it is there."""
        from torch.distributed import TCPStore  # the command line asks for its place before torch is loaded

        host, port, first = self._place.address, self._place.port, self._place.node == 0
        end = time.monotonic() + self._join_seconds
        while not first:
            try:
                socket.create_connection((host, port), timeout=2.0).close()
                break
            except OSError:
                self._give_up(0, end)
                time.sleep(POLL_SECONDS)
        try:
            timeout = timedelta(seconds=SILENT_SECONDS)
            return TCPStore(host, port, is_master=first, wait_for_workers=False, timeout=timeout)
        except RuntimeError as error:
            raise InputError(
                f"MASTER_PORT: node {self._place.node} cannot open {host}:{port} ({first_line(error)}); give node 0's "
                "address and a port that is free there"
            ) from None

    def _talk(self, store: Any) -> None:
        beats = 0
        try:
            while True:
                last, beats = self._over.is_set(), beats + 1
                store.set(f"node/{self._place.node}", json.dumps({**self._mine, "beats": beats}))
                for node in range(self._place.nodes):
                    if store.check([f"node/{node}"]):
                        entry = json.loads(store.get(f"node/{node}"))
                        if node not in self._heard or entry["beats"] != self._heard[node][0]["beats"]:
                            self._heard[node] = (entry, time.monotonic())
                if last:
                    return
                self._over.wait(POLL_SECONDS)
        except RuntimeError as error:
            self._broken = first_line(error)

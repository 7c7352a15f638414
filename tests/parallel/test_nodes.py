"""Several nodes: what the variables say, and what their commands tell one another."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from argonne.errors import InputError, Stopped
from argonne.parallel.nodes import NodeLost, Nodes, Place, first_host, interface_to, join, place_of

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1,b"}
NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("gpu[003-010,12],x", "gpu003"),
        ("rack[2-3]n[07,9]", "rack2n07"),
        ("n[1-2].site", "n1.site"),
    ],
)
def test_the_first_host_of_slurms_list_is_read(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_task_of_srun_is_a_worker_where_there_are_more_tasks_than_nodes() -> None:
    tasks = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    place = {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    found = {**STEP, **tasks, **place}
    join(found)
    assert {name: found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }
    assert found["MASTER_ADDR"] == "127.0.0.1"
    assert place_of(found) is None


def test_one_task_of_srun_on_each_node_starts_that_nodes_workers() -> None:
    found = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1"}
    join(found)
    place = place_of(found)
    assert place == Place(1, 2, "127.0.0.1", int(found["MASTER_PORT"]))
    assert 12000 <= place.port < 32000


def test_what_is_set_already_is_not_taken_from_srun() -> None:
    found = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "RANK": "0", "WORLD_SIZE": "4"}
    join(found)
    assert "NNODES" not in found
    assert "MASTER_ADDR" not in found


@pytest.mark.parametrize("alone", [{}, {"NNODES": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0", "NNODES": "2"}])
def test_a_command_that_is_alone_has_no_place(alone: dict[str, str]) -> None:
    assert place_of(alone) is None
    before = dict(alone)
    join(alone)
    assert alone == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: found 'nothing', expected a host"),
        ({"NNODES": "1:4"}, "NNODES: found '1:4', expected a number"),
        ({"NODE_RANK": ""}, "NODE_RANK: found 'nothing'"),
        ({"NODE_RANK": "2"}, "found 2 and 29500, expected 0 to 1"),
        ({"MASTER_PORT": "99999"}, "found 1 and 99999"),
    ],
)
def test_a_place_that_is_not_whole_is_named(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        place_of({**NODES, **wrong})


def test_the_interface_on_the_way_to_another_node_is_no_loopback() -> None:
    found = interface_to("127.0.0.1")
    assert found != "lo"
    assert found is None or found in [name for _, name in socket.if_nameindex()]


class Asked(SimpleNamespace):
    """What a command was asked."""

    number: signal.Signals | None = None

    def ask(self, number: signal.Signals) -> None:
        self.number = number


@pytest.fixture
def pair() -> Iterator[list[Nodes]]:
    """The commands of two nodes that have met, with two and one workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = [Nodes(Place(node, 2, "127.0.0.1", port), Asked(), 60.0) for node in range(2)]
    with ThreadPoolExecutor(2) as pool:
        worlds = list(pool.map(lambda nodes, count: nodes.meet(0, count), found, (2, 1)))
        assert [(world.first, world.size, world.port) for world in worlds] == [(0, 3, port), (2, 3, port)]
        yield found
        list(pool.map(Nodes.leave, found))


def both(pair: list[Nodes], call: str, *arguments: Any) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda nodes: getattr(nodes, call)(*arguments), pair))


def test_a_failure_on_one_node_is_told_on_both_and_all_meet_again(pair: list[Nodes]) -> None:
    pair[1].tell("worker 2 failed: a planted fault")
    told = both(pair, "agree")
    assert told[0] == told[1] == f"node 1 ({socket.gethostname()}): worker 2 failed: a planted fault"
    both(pair, "meet", 1, 1)
    assert both(pair, "agree") == [None, None]


def test_the_first_failure_is_the_one_that_is_told(pair: list[Nodes]) -> None:
    pair[1].tell("the cause")
    while pair[0].listen() is None:
        pass
    pair[0].tell("what followed")
    assert all("the cause" in told for told in both(pair, "agree"))


def test_a_request_to_one_command_reaches_the_other(pair: list[Nodes]) -> None:
    pair[0]._requests.number = signal.SIGUSR1
    while pair[1]._requests.number is None:
        both(pair, "listen")
    assert pair[1]._requests.number == signal.SIGTERM


def test_a_node_that_gave_up_ends_the_other(pair: list[Nodes]) -> None:
    pair[1].leave()
    with pytest.raises(NodeLost, match="node 1 has given up"):
        pair[0].agree()


def test_a_node_that_does_not_come_and_a_request_meanwhile_end_the_wait() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = Place(1, 2, "127.0.0.1", probe.getsockname()[1])
        with pytest.raises(InputError, match=r"node 0 has not come to 127\.0\.0\.1:\d+ in 0 s; start the same command"):
            Nodes(place, Asked(), 0.0).meet(0, 1)
        with pytest.raises(Stopped, match="asked to stop"):
            Nodes(place, Asked(number=signal.SIGTERM), 60.0).meet(0, 1)

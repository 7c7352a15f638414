"""Two commands in two network namespaces, as two nodes with a cable between them: one world, and one end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from argonne.config import Recipe
from argonne.layout import LAST
from argonne.plan.shape import as_trained
from argonne.recipe import to_toml
from argonne.stages.pretrain import run
from tests.train.helpers import curve, stored

Nano = Callable[..., Recipe]
pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Cable:
    """Two network namespaces `names`, each with an address of ADDRESSES on the interface `wire`."""

    def __init__(self) -> None:
        self.names = tuple(f"argonne-{os.getpid()}-{node}" for node in range(2))
        self.processes: list[subprocess.Popen[str]] = []

    def lay(self) -> None:
        for name in self.names:
            self._ip("netns", "add", name)
            # Names are looked up in files alone: no name server answers in there.
            files = Path("/etc/netns", name)
            files.mkdir(parents=True)
            (files / "nsswitch.conf").write_text("passwd: files\nhosts: files\n")
            (files / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{item} n{item}\n" for item in ADDRESSES))
        first, second = self.names
        self._ip("link", "add", "wire", "netns", first, "type", "veth", "peer", "name", "wire", "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            self._ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            for link in ("lo", "wire"):
                self._ip("-n", name, "link", "set", link, "up")

    def cut(self) -> None:
        self._ip("-n", self.names[1], "link", "set", "wire", "down")

    def start(self, node: int, folder: Path, arguments: list[str], **more: str) -> subprocess.Popen[str]:
        """`argonne` on a node, in a working directory of its own."""
        place = {"NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29411", **more}
        (folder / f"node-{node}").mkdir(exist_ok=True)
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[node], sys.executable, "-m", "argonne", *arguments],
            cwd=folder / f"node-{node}",
            env={**os.environ, **place, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=open(folder / f"node-{node}.log", "w"),  # noqa: SIM115 - the process writes it
            text=True,
        )
        self.processes.append(process)
        return process

    def remove(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    found = Cable()
    try:
        found.lay()
    except (OSError, subprocess.CalledProcessError) as error:
        found.remove()
        pytest.skip(f"no network namespaces may be made here: {error}")
    yield found
    found.remove()


@pytest.fixture
def command(nano: Nano, tmp_path: Path) -> list[str]:
    """The same on both nodes: a run in a folder that both see."""
    (tmp_path / "nano.toml").write_text(to_toml(as_trained(nano(**{"checkpoint.sample_prompt": ""}))))
    return ["pretrain", str(tmp_path / "nano.toml"), "--run", str(tmp_path / "run"), "--parallel.timeout", "2m"]


def ends(cable: Cable, tmp_path: Path, seconds: float = 300) -> tuple[list[int], list[str]]:
    """Exit codes and last lines of both commands, which end within bounded time."""
    codes = [process.wait(timeout=seconds) for process in cable.processes]
    logs = [(tmp_path / f"node-{node}.log").read_text() for node in range(2)]
    return codes, [(["", *log.strip().splitlines()])[-1] for log in logs]


def wait_for_step(tmp_path: Path, step: int) -> None:
    end = time.monotonic() + 300
    while f"step  {step}" not in (log := (tmp_path / "node-0.log").read_text()).replace("step   ", "step  "):
        assert time.monotonic() < end, log + (tmp_path / "node-1.log").read_text()
        time.sleep(0.2)


@pytest.mark.parametrize("workers", [("0", "0"), ("2", "0")], ids=["one each", "two and one"])
def test_two_nodes_train_what_one_process_does(
    cable: Cable, command: list[str], nano: Nano, tmp_path: Path, workers: tuple[str, str]
) -> None:
    for node, count in enumerate(workers):
        cable.start(node, tmp_path, [*command, "--parallel.nproc", count])
    codes, said = ends(cable, tmp_path)
    assert codes == [0, 0], (tmp_path / "node-0.log").read_text() + said[1]
    run(nano(**{"checkpoint.sample_prompt": ""}), tmp_path / "alone")
    found, expected = curve(tmp_path / "run"), curve(tmp_path / "alone")
    assert [record["tokens"] for record in found] == [record["tokens"] for record in expected]
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=1e-5)


LONG = ["--train.steps", "4000"]


def worker_of(process: subprocess.Popen[str]) -> int:
    """The process id of a command's only worker: of what its server forked, the one that trains."""
    said = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in said.splitlines()]
    children = {parent: [pid for pid, other in pairs if other == parent] for _, parent in pairs}
    found = [grandchild for child in children[process.pid] for grandchild in children.get(child, [])]
    assert found
    return found[0]


def test_a_failure_on_one_node_ends_both_with_its_cause(cable: Cable, command: list[str], tmp_path: Path) -> None:
    both = [cable.start(node, tmp_path, [*command, *LONG, "--parallel.max_restarts", "0"]) for node in range(2)]
    wait_for_step(tmp_path, 3)
    os.kill(worker_of(both[1]), signal.SIGKILL)
    began = time.monotonic()
    codes, said = ends(cable, tmp_path)
    assert time.monotonic() - began < 60
    assert codes == [1, 1]
    for words in said:
        assert "node 1 (" in words
        assert "worker 1 failed: it ended without a word" in words


def test_a_failure_with_a_restart_left_starts_all_again_on_both_nodes(
    cable: Cable, command: list[str], nano: Nano, tmp_path: Path
) -> None:
    longer = {"train.steps": "60", "checkpoint.sample_prompt": ""}
    both = [cable.start(node, tmp_path, [*command, *LONG, "--train.steps", "60"]) for node in range(2)]
    wait_for_step(tmp_path, 6)
    with suppress(ProcessLookupError):
        os.kill(worker_of(both[1]), signal.SIGKILL)
    assert ends(cable, tmp_path)[0] == [0, 0]
    assert "all start again from the last checkpoint" in (tmp_path / "node-0.log").read_text()
    run(nano(**longer), tmp_path / "alone")
    found, expected = curve(tmp_path / "run"), curve(tmp_path / "alone")
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=1e-4)


@pytest.mark.parametrize("node", [0, 1])
def test_a_node_whose_command_is_killed_ends_the_other(
    cable: Cable, command: list[str], tmp_path: Path, node: int
) -> None:
    both = [cable.start(number, tmp_path, [*command, *LONG]) for number in range(2)]
    wait_for_step(tmp_path, 3)
    began = time.monotonic()
    both[node].kill()
    codes, said = ends(cable, tmp_path)
    assert time.monotonic() - began < 120
    assert codes[1 - node] == 1
    assert ("node 0 at" if node == 0 else "node 1 has not been heard of") in said[1 - node]


def test_a_cable_that_is_cut_ends_both(cable: Cable, command: list[str], tmp_path: Path) -> None:
    for node in range(2):
        cable.start(node, tmp_path, [*command, *LONG])
    wait_for_step(tmp_path, 3)
    began = time.monotonic()
    cable.cut()
    codes, said = ends(cable, tmp_path)
    assert time.monotonic() - began < 120
    assert codes == [1, 1]
    assert "node 1 has not been heard of for 30 s" in said[0]
    assert "node 0 at 10.77.0.1:29411 cannot be reached any more" in said[1]


def test_a_request_to_one_node_stops_both_with_a_checkpoint(cable: Cable, command: list[str], tmp_path: Path) -> None:
    both = [cable.start(node, tmp_path, [*command, *LONG]) for node in range(2)]
    wait_for_step(tmp_path, 3)
    both[1].send_signal(signal.SIGUSR1)
    codes, said = ends(cable, tmp_path)
    assert codes == [3, 3]
    assert all("stopped at step" in words for words in said)
    assert (tmp_path / "run" / LAST).exists()
    assert stored(tmp_path / "run" / LAST)


def test_nodes_that_do_not_see_one_run_folder_are_told(cable: Cable, command: list[str], tmp_path: Path) -> None:
    for node in range(2):
        cable.start(node, tmp_path, [*command[:2], "--run", "mine", "--parallel.timeout", "2m"])
    codes, said = ends(cable, tmp_path)
    assert codes == [2, 2]
    assert all("--run mine: " in words and "does not see what" in words for words in said)


def test_nodes_with_different_recipes_are_told(cable: Cable, command: list[str], tmp_path: Path) -> None:
    for node in range(2):
        cable.start(node, tmp_path, [*command, "--optim.lr", f"1e-{3 + node}"])
    codes, said = ends(cable, tmp_path)
    assert codes == [2, 2]
    assert all("was given another recipe than" in words for words in said)

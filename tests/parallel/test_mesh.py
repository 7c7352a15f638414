"""Where a rank stands in the data, whatever else is parallel."""

from __future__ import annotations

import os

import torch
from hypothesis import given
from hypothesis import strategies as st

from argonne.config import ParallelSection
from argonne.errors import InputError
from argonne.parallel.launch import run_workers
from argonne.parallel.mesh import Mesh, _data_groups, open_mesh

DEGREES = st.integers(1, 4)


@given(replicas=DEGREES, pipeline=DEGREES, inner=DEGREES)
def test_each_place_in_the_data_is_spoken_for_once_and_shared_by_the_ranks_of_one_model(
    replicas: int, pipeline: int, inner: int
) -> None:
    size = replicas * pipeline * inner
    meshes = [Mesh(torch.device("cpu"), rank, size, pipeline=pipeline, inner=inner) for rank in range(size)]
    assert {mesh.data_size for mesh in meshes} == {replicas}
    places = [mesh.data_rank for mesh in meshes]
    assert sorted(places) == sorted(list(range(replicas)) * pipeline * inner)
    assert sorted(mesh.data_rank for mesh in meshes if mesh.speaks_for_its_rows) == list(range(replicas))
    assert meshes[0].speaks_for_its_rows


@given(replicas=DEGREES, pipeline=DEGREES, inner=DEGREES)
def test_a_data_group_holds_one_rank_of_each_place(replicas: int, pipeline: int, inner: int) -> None:
    size = replicas * pipeline * inner
    mesh = Mesh(torch.device("cpu"), 0, size, pipeline=pipeline, inner=inner)
    groups = _data_groups(mesh)
    assert sorted(rank for group in groups for rank in group) == list(range(size))
    for group in groups:
        assert [
            Mesh(torch.device("cpu"), rank, size, pipeline=pipeline, inner=inner).data_rank for rank in group
        ] == list(range(replicas))


def test_one_process_is_the_whole_mesh() -> None:
    mesh = Mesh(torch.device("cpu"))
    assert (mesh.data_rank, mesh.data_size, mesh.speaks_for_its_rows) == (0, 1, True)


def _joined() -> str:
    """What a worker is told that has other degrees than its neighbour."""
    first = os.environ["RANK"] == "0"
    try:
        with open_mesh(ParallelSection(shard=2 if first else 1), "cpu", timeout_seconds=20):
            return "joined"
    except InputError as error:
        return str(error)


def test_workers_with_other_degrees_do_not_begin() -> None:
    said = run_workers(_joined, (), count=2, max_restarts=0, grace_seconds=5)
    degrees = "tensor 1, context 1, pipeline 1, schedule 1f1b, stages 2"
    assert said[0] == said[1]
    assert said[0] == (
        f"[parallel]: workers were started with shard 2, {degrees} and with shard 1, {degrees}; give every node the "
        'same command, and numbers where "auto" comes to others'
    )

"""Where a rank stands in the data, whatever else is parallel."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from argonne.parallel.mesh import Mesh, _data_groups

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

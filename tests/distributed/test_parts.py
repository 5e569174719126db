"""Where a rank's part of a tensor lies in the whole: against cutting the whole."""

import pytest
import torch
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from arfast.distributed.collectives import Group
from arfast.distributed.parts import Box, Part
from arfast.distributed.splits import Split


class _Ranks(Group):
    """One of several ranks, for what needs no exchange."""

    def __init__(self, size, rank):
        super().__init__()
        self.size, self.rank = size, rank


CUTS = [  # shape of the whole; splits: (dimension, ranks, sections)
    ((6, 4), [(0, 3, 1)]),
    ((4, 6), [(1, 2, 1)]),
    ((4, 8, 3), [(0, 2, 1), (1, 2, 2)]),
    ((4, 3, 6), [(0, 2, 1), (2, 3, 1)]),
    ((12,), [(0, 4, 1)]),
    ((5, 3), []),
]


def _compare_with_cutting(num_shards):
    """Every element of every part, also where FSDP cuts what the splits have left, evenly or not."""
    mesh = init_device_mesh("cpu", (num_shards,)) if num_shards > 1 else None
    for shape, rules in CUTS:
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        for rank in range(max([size for _, size, _ in rules], default=1)):
            splits = tuple(Split(dim, _Ranks(size, rank % size), sections) for dim, size, sections in rules)
            cut = whole
            for split in splits:
                cut = split.cut(cut)
            for dim in range(cut.dim()) if mesh else [None]:
                tensor = cut.clone() if mesh is None else distribute_tensor(cut, mesh, [Shard(dim)])
                part = Part(tensor, splits)
                assert part.shape == shape
                found = []
                for box, memory in part.boxes():
                    assert torch.equal(memory, whole[box.slices])
                    for index, start in box.runs(shape):
                        run = memory[index].reshape(-1)
                        assert torch.equal(run, torch.arange(start, start + len(run)))
                        found.append(run)
                assert sorted(torch.cat([*found, whole.new_empty(0)]).tolist()) == sorted(part.local.flatten().tolist())


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_boxes_are_what_is_cut(num_shards):
    if num_shards == 1:
        _compare_with_cutting(1)
    else:
        run_ranks(_compare_with_cutting, num_shards, num_shards)


@pytest.mark.parametrize("place", [(), (1,), (2, slice(0, 3)), (2, slice(3, None))])
def test_a_box_takes_what_the_whole_would_give(place):
    """Against writing everything and cutting afterwards."""
    whole = torch.arange(4 * 6 * 5.0).view(4, 6, 5)
    for box in (
        Box((0, 0, 0), (4, 6, 5)),
        Box((1, 0, 0), (2, 6, 5)),
        Box((0, 2, 0), (4, 2, 5)),
        Box((4, 0, 0), (0, 6, 5)),
    ):
        marked = torch.zeros(4, 6, 5)
        marked[place] = whole[place]
        part = torch.zeros(box.shape)
        if met := box.intersect(place, whole.shape):
            there, here = met
            part[here] = whole[place][there]
        assert torch.equal(part, marked[box.slices])

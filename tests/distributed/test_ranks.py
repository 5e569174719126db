"""run_ranks itself: results by rank, and an end to ranks that raise, die or hang."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RanksFailed, run_ranks


def _sum_of_ranks(offset):
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), torch.get_num_threads()


def test_every_rank_returns():
    assert run_ranks(_sum_of_ranks, 4, 1) == [(rank, 10.0, 1) for rank in range(4)]


def _fail_on_rank_one(how):
    dist.barrier()  # both are connected: rank zero stands in the next barrier when rank one is gone
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("rank one does not like this")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_an_exception_and_a_death_are_told_by_rank():
    with pytest.raises(RanksFailed) as raised:
        run_ranks(_fail_on_rank_one, 2, "raise")
    assert "rank one does not like this" in raised.value.errors[1]
    with pytest.raises(RanksFailed) as died:
        run_ranks(_fail_on_rank_one, 2, "die")
    assert "exit code -9" in died.value.errors[1]
    assert "barrier" in died.value.errors[0]


def _hang():
    if dist.get_rank() == 0:
        time.sleep(600)


def test_a_rank_that_hangs_ends_with_its_stack():
    start = time.monotonic()
    with pytest.raises(RanksFailed) as raised:
        run_ranks(_hang, 2, timeout=3.0)
    assert time.monotonic() - start < 30
    assert "_hang" in raised.value.errors[0]

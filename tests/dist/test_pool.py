"""The rank pool itself: results in order, fresh groups, errors by rank, and no process left after a hang."""

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.dist.pool import RankError, RankPool


def sum_of_ranks(rank: int, world_size: int, scale: int) -> tuple[int, int, torch.Tensor]:
    """One all-reduce, and what the group says of itself."""
    total = torch.tensor([rank * scale])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total


def launcher_variables(rank: int, world_size: int) -> dict[str, str]:
    """What a launcher would have set."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
    return {name: os.environ[name] for name in names}


def pid_and_threads(rank: int, world_size: int) -> tuple[int, int]:
    """The process, and torch's threads in it."""
    return os.getpid(), torch.get_num_threads()


def leave_a_mess(rank: int, world_size: int, folder: str) -> None:
    """Change everything that a task might change."""
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir(folder)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    functional: Any = torch.nn.functional
    functional.linear = functional.bilinear
    dist.new_group([0])


def surroundings(rank: int, world_size: int) -> tuple[bool, str, torch.dtype, bool, int, str]:
    """What a later task finds."""
    return (
        "LEFT_BEHIND" in os.environ,
        os.getcwd(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.nn.functional.linear.__name__,
    )


def meet_late(rank: int, world_size: int) -> int:
    """The first two ranks are through at once; the others make a group of their own a second later."""
    dist.new_group([0, 1])
    if rank >= 2:
        time.sleep(1)
    group = dist.new_group([2, 3])
    if rank < 2:
        return rank
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    return rank


def raise_on(rank: int, world_size: int, bad: int) -> None:
    """One rank raises while the others wait for it."""
    if rank == bad:
        raise KeyError(f"only on {rank}")
    dist.barrier()


def die_on(rank: int, world_size: int, bad: int) -> None:
    """One rank is killed while the others wait for it."""
    if rank == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on(rank: int, world_size: int, bad: int) -> int:
    """One rank waits for ever."""
    if rank == bad:
        threading.Event().wait()
    return rank


def unpicklable(rank: int, world_size: int) -> object:
    """A result that cannot travel."""
    return lambda: rank


def deepspeed_groups(rank: int, world_size: int) -> list[int]:
    """DeepSpeed's named expert groups, which it keeps in module globals; a stale one could not reduce."""
    import deepspeed.comm
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import groups

    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed("gloo", timeout=timedelta(seconds=60), verbose=False)
    assert not groups._get_expert_parallel_group_dict()
    groups._create_expert_and_data_parallel(world_size)
    group = groups._get_expert_parallel_group(f"ep_size_{world_size}")
    total = torch.tensor([rank + 1])
    deepspeed.comm.all_reduce(total, group=group)
    return total.tolist()


def is_alive(pid: int) -> bool:
    """Whether the process runs: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("world_size", [1, 2, 4, 3])
def test_results_come_in_the_order_of_the_ranks(ranks: RankPool, world_size: int) -> None:
    results = ranks.run(sum_of_ranks, world_size, 10)
    total = 10 * sum(range(world_size))
    assert [result[:2] for result in results] == [(rank, world_size) for rank in range(world_size)]
    assert [result[2].tolist() for result in results] == [[total]] * world_size


def test_launcher_variables_are_set(ranks: RankPool) -> None:
    for rank, variables in enumerate(ranks.run(launcher_variables, 2)):
        assert variables == {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
        }


def test_workers_live_on_with_one_thread_each(ranks: RankPool) -> None:
    first, second = ranks.run(pid_and_threads, 2), ranks.run(pid_and_threads, 2)
    assert first == second == [(pid, 1) for pid in ranks.pids[:2]]
    assert os.getpid() not in ranks.pids and len(set(ranks.pids)) == len(ranks.pids)


def test_a_task_finds_nothing_of_the_one_before(ranks: RankPool, tmp_path: Path) -> None:
    before = ranks.run(surroundings, 2)
    ranks.run(leave_a_mess, 2, str(tmp_path))
    assert ranks.run(surroundings, 2) == before


def test_deepspeed_groups_are_made_anew_for_each_task(ranks: RankPool) -> None:
    for world_size, total in ((2, 3), (4, 10), (2, 3)):
        assert ranks.run(deepspeed_groups, world_size) == [[total]] * world_size


def test_a_raising_rank_is_named_with_its_traceback(ranks: RankPool) -> None:
    started_s = time.monotonic()
    with pytest.raises(RankError, match="rank 1 failed") as caught:
        ranks.run(raise_on, 3, 1)
    assert caught.value.rank == 1
    assert "KeyError: 'only on 1'" in caught.value.failures[1] and "raise_on" in caught.value.failures[1]
    assert time.monotonic() - started_s < 60
    assert ranks.run(hang_on, 3, -1) == [0, 1, 2]


def test_a_killed_rank_is_named_and_the_pool_recovers() -> None:
    with RankPool(2) as pool:
        with pytest.raises(RankError) as caught:
            pool.run(die_on, 2, 1)
        assert caught.value.rank == 1 and "exit code -9" in caught.value.failures[1]
        assert pool.run(hang_on, 2, -1) == [0, 1]


def test_a_hang_names_the_silent_rank_and_leaves_no_process() -> None:
    with RankPool(2) as pool:
        pool.run(hang_on, 2, -1)
        pids = pool.pids
        with pytest.raises(RankError, match=r"no answer from rank 1 within 4 s") as caught:
            pool.run(hang_on, 2, 1, timeout_s=4)
        assert caught.value.hung == [1]
        assert "hang_on" in caught.value.failures[1]
        assert not any(is_alive(pid) for pid in pids)
        assert pool.run(hang_on, 2, -1) == [0, 1]
        pids = pool.pids
    assert not any(is_alive(pid) for pid in pids)


def test_ranks_that_are_through_do_not_take_the_meeting_point_with_them(ranks: RankPool) -> None:
    assert ranks.run(meet_late, 4) == [0, 1, 2, 3]


def test_a_result_that_cannot_travel_is_an_error(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="unpicklable"):
        ranks.run(unpicklable, 2)


def test_more_ranks_than_the_pool_holds_is_refused(ranks: RankPool) -> None:
    with pytest.raises(ValueError, match="world_size=5 does not fit this pool; use 1 to 4"):
        ranks.run(pid_and_threads, 5)

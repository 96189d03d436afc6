"""Several workers, one run: `torchrun --nproc_per_node N train.py …`, on one machine or on many.

Every worker holds the whole model, takes its share of each batch, and makes the same update: noise
is a function of the step's seed. So all that a step needs from the others are their losses.

    per step and worker: Σ n·l⁺, Σ n·l⁻ and Σ n, three float64           24 bytes
    first-order training sends every gradient; Llama-2-7B in 16 bits     13,480,000,000 bytes

The numbers are gathered by all and added in the order of the ranks, so every worker has the same
bits whatever the network does. They are on the host anyway: gloo carries them, also between GPUs.
A worker that dies ends the run; its log stays, and --resume goes on with any number of workers.
"""

import os
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from harness.config import reworded

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join() -> None:
    """Meet the workers that torchrun started. Only worker 0 prints."""
    if SIZE > 1:
        with reworded(f"worker {RANK} cannot reach the others"):
            # the longest wait is for worker 0, which makes [Q]'s mask
            dist.init_process_group("gloo", timeout=timedelta(hours=3))
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w", encoding="utf-8")


def leave() -> None:
    """Close the connections, where there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share(items: list) -> list:
    """This worker's items: every SIZE-th, so that long and short ones are spread evenly."""
    return items[RANK::SIZE]


def all_sum(numbers: np.ndarray) -> np.ndarray:
    """The sum over all workers, float64, with the same bits on each."""
    return gather(numbers).sum(0) if SIZE > 1 else numbers


def gather(numbers: np.ndarray) -> np.ndarray:
    """(SIZE, n) float64: the numbers of every worker, by rank."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    found = [torch.empty_like(mine) for _ in range(SIZE)]
    with reworded(f"worker {RANK} lost another worker"):
        dist.all_gather(found, mine)
    return torch.stack(found).numpy()


def broadcast(value):
    """Worker 0's value, on all workers."""
    box = [value]
    if SIZE > 1:
        with reworded(f"worker {RANK} lost worker 0"):
            dist.broadcast_object_list(box, src=0)
    return box[0]


def checksum(tensors: list[torch.Tensor]) -> float:
    """A number that tells whether two workers' weights have come apart."""
    parts = (part for tensor in tensors for part in tensor.view(-1).split(1 << 22))
    return sum(float(part.sum(dtype=torch.float64)) for part in parts)  # copied as float64


def check_same(number: float, what: str) -> None:
    """ValueError where a worker's number differs from the first worker's in any bit."""
    if SIZE > 1:
        found = gather(np.array([number]))[:, 0].view(np.int64)  # NaN is NaN
        if other := [rank for rank in range(SIZE) if found[rank] != found[0]]:
            raise ValueError(f"worker {other[0]} of {SIZE} has other {what} than worker 0")

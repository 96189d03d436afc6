"""Several workers, one run: `torchrun --nproc_per_node N train.py …`, on one machine or on many.

Every worker holds the whole model, takes its share of each batch, and makes the same update: noise
is a function of the step's seed, so all that a step needs from the others are their losses.

    per step and worker, in both directions: l⁺ and l⁻, their weight, one flag      32 bytes
    first-order training sends every gradient; Llama-2-7B in 16 bits         13,000,000,000 bytes

Workers joined only by the internet thus wait two round trips a step and nothing else. The numbers
are float64, gathered by all and added in the order of the ranks, so that every worker has the same
bits whatever the network does. They are on the host anyway: gloo carries them, also between GPUs.
Messages are numbers and JSON, never pickle. A worker that dies ends the run; its log stays.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from errors import UserError
from snapshot import put_in_place


class Group:
    """This worker's place among all; one alone needs no network."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    def share(self, items: list) -> list:
        """This worker's items: every `size`-th, so that long and short ones are spread evenly."""
        return items[self.rank :: self.size]

    def device(self, name: str) -> str:
        """Each worker of a machine takes the GPU of its own number, where none is named."""
        if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
        return name

    def gather(self, numbers) -> torch.Tensor:
        """[size, n] float64: the numbers of every worker, by rank."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._network(dist.all_gather, found, mine) if self.size > 1 else found[0].copy_(mine)
        return torch.stack(found)

    def sum(self, numbers) -> list[float]:
        """Each number added up over the workers: the same bits on all of them."""
        total, *rest = self.gather(numbers)
        for more in rest:
            total = total + more
        return total.tolist()

    def check_same(self, digest: int, what: str) -> None:
        """UserError where a worker's 64-bit digest differs from the first worker's."""
        found = self.gather([digest >> 32, digest & 0xFFFFFFFF])  # as 32 bits each: exact
        if other := [rank for rank in range(self.size) if not torch.equal(found[rank], found[0])]:
            raise UserError(f"worker {other[0]} of {self.size} has other {what} than worker 0")

    def hand_out(self, path: Path) -> None:
        """Worker 0's file, to all: on a machine that does not have it, it is written there, too."""
        if self.size == 1:
            return
        content = self._broadcast(path.read_bytes() if self.rank == 0 else b"")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f"{path.name}.{self.rank}")  # several on one machine
            beside.write_bytes(content)
            put_in_place(beside, path)

    def tell(self, value):
        """Worker 0's value, which must be JSON, on all workers."""
        if self.size == 1:
            return value
        return json.loads(self._broadcast(json.dumps(value).encode()))

    def _broadcast(self, content: bytes) -> bytearray:
        """Worker 0's bytes, on all workers."""
        length = int(self.gather([len(content)])[0])
        found = bytearray(content if self.rank == 0 else length)
        message = torch.frombuffer(found, dtype=torch.uint8)  # shares its memory
        self._network(dist.broadcast, message, 0)
        return found

    def _network(self, collective, *arguments) -> None:
        try:
            collective(*arguments)
        except RuntimeError as error:  # the connection of a process that is gone
            raise ConnectionError(f"worker {self.rank} lost another worker") from error


ALONE = Group()


def join() -> Group:
    """The group that torchrun started, or this process alone. Only worker 0 prints."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size <= 1:
        return ALONE
    minutes, hours = timedelta(minutes=10), timedelta(hours=3)  # to meet; to make [Q]'s mask
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=minutes))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=hours)
    except (ValueError, RuntimeError) as error:
        why = str(error).strip().splitlines()[0][:80]
        raise UserError(f"cannot meet the other workers, use torchrun ({why})") from error
    sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")
    return Group(rank, size)


def leave() -> None:
    """Close the connections, where there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()

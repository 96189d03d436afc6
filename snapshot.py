"""Copies of what training changes: snapshots, and [Q]'s result, a few values and their places.

A step log is a megabyte, a snapshot as large as the weights that move, which is why there is none
unless asked for. What it saves is time: a step costs an update to replay, about a tenth of what it
cost to train. Snapshots are safetensors; two stand: the newest, to go on from, and the newest that
is no later than the best step, whose weights are wanted at the end.

Where thresholds are re-taken (--refresh-every) they must follow from the snapshot alone, so it is
taken just before a step that re-takes them (presets.check).
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import masks
import zo
from errors import UserError


@torch.no_grad()
def digest(tensors: dict[str, torch.Tensor], device=None) -> int:
    """64 bits of all values: changing any one bit changes it.

    Each value's bits times an odd number of its own, added up modulo 2⁶⁴. Computed where the values
    are, or in chunks on `device`.
    """
    total, before, chunk = 0, 0, 1 << 22
    for _, flat in sorted(tensors.items()):
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = flat.view(kinds[flat.element_size()])
        for start in range(0, bits.numel(), chunk):
            part = bits[start : start + chunk].to(device or bits.device).long()
            place = torch.arange(part.numel(), device=part.device) + (before + start)
            total += int((part * (place * -0x61C8864680B583EB | 1)).sum())
        before += bits.numel()
    return total % 2**64


def write(run: Path, step: int, tensors: dict, settings: dict, best_step: int) -> None:
    """The weights after `step` steps: written beside, synced, renamed. Older ones are removed, but
    for the newest of at most `best_step` steps. On a GPU the tensors are copied to the host first.
    """
    save_tensors(run / f"snapshot-{step}.safetensors", tensors, _about(step, tensors, settings))
    there = snapshots(run)
    best = max((s for s in there if s <= best_step), default=step)
    for taken, path in there.items():
        if taken not in (step, best):
            path.unlink()
    for torn in run.glob("snapshot-*.safetensors.tmp"):  # of a kill while it was written
        torn.unlink()


def snapshots(run: Path) -> dict[int, Path]:
    """{step: path} of a run's snapshots; a file of another name is somebody else's."""
    found = {p.stem.removeprefix("snapshot-"): p for p in run.glob("snapshot-*.safetensors")}
    return {int(step): path for step, path in found.items() if step.isdecimal()}


def _about(step: int, tensors: dict, settings: dict, device=None) -> dict[str, str]:
    run, values = settings["fingerprint"], digest(tensors, device)
    return {"run": run, "step": str(step), "digest": f"{values:016x}"}


def newest(run: Path, stop: int, settings: dict) -> tuple[int, dict]:
    """(step, tensors) of the run's newest snapshot of at most `stop` steps; (0, {}) without one.

    A snapshot only saves time, so one that cannot be believed is no error: a line says so, and more
    of the log is replayed.
    """
    device = "cuda" if torch.cuda.is_available() else None  # a CPU takes 5 minutes for 13.5 GB
    for step, path in sorted(snapshots(run).items(), reverse=True):  # 2, or 3 after a kill
        if step > stop:
            continue
        try:
            tensors, about = load_tensors(path)
            if about != _about(step, tensors, settings, device):
                raise ValueError("of another run or step, or not the values that were written")
        except Exception as error:  # safetensors has its own, for a torn file or a wrong header
            why = str(error).splitlines()[0]
            print(f"  {path} is left alone ({why}): more of the log is replayed")
            continue
        return step, tensors
    return 0, {}


# ------------------------------------------------------------------ [Q]'s result


def write_sparse(path: Path, index: dict, values: dict, about: dict) -> None:
    """[Q]'s trained weights: per matrix int32 places and fp32 values; `about` is JSON.

    12 to 13 MB for 0.1 % of 1.6e9 weights, 52 for Llama-2-7B's 6.5e9.
    """
    tensors = {f"{name}.values": value for name, value in values.items()}
    tensors |= {f"{name}.index": places.int() for name, places in index.items()}
    save_tensors(path, tensors, {"about": json.dumps(about)})


def read_sparse(path: Path) -> tuple[dict, dict, dict]:
    """(index, values, about) of such a file; UserError where it is none, or torn."""
    try:
        tensors, about = load_tensors(path)
        about = json.loads(about["about"])
        index, values = (
            {n.removesuffix(end): t for n, t in tensors.items() if n.endswith(end)}
            for end in (".index", ".values")
        )
        if not index or not index.keys() == values.keys() == set(about["matrices"]):
            raise ValueError("its matrices are not those that it speaks of")
        for name, places in index.items():
            masks.check_places(places, zo.MAX_ELEMENTS, name)
            if places.shape != values[name].shape:
                raise ValueError(f"{name} has other values than places")
    except Exception as error:  # safetensors has errors of its own
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} holds no sparse weights of train.py ({why})") from error
    return index, values, about


# ------------------------------------------------------------------ files, whole or not at all


def save_tensors(path: Path, tensors: dict, about: dict[str, str]) -> None:
    """A safetensors file with `about` as its metadata: written beside, synced, renamed."""
    beside = path.with_name(path.name + ".tmp")
    try:
        save_file({n: tensor.cpu() for n, tensor in tensors.items()}, beside, metadata=about)
        put_in_place(beside, path)
    except SafetensorError as error:  # a full disk is one of these, not an OSError
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def load_tensors(path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, on the CPU; ValueError where it is none."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def put_in_place(beside: Path, path: Path) -> None:
    """Rename a file that is complete; the disk has its contents first, and then its name."""
    mask = os.umask(0)
    os.umask(mask)
    beside.chmod(0o666 & ~mask)  # safetensors lets only the owner read
    _sync(beside)
    os.replace(beside, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)

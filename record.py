"""What a run writes, and how it is read back.

    config.json     every setting, fingerprints of weights and data, the accuracies at the start
    steps.csv       step, seed, a = −η · proj_grad, l⁺, l⁻: with the original weights, the result
    metrics.jsonl   what to look at: losses, gradient, active density, validation accuracy
    result.json     accuracies with standard errors, seconds, peak memory, versions, hardware
    curve.png       loss, accuracy and active density against steps
    snapshot-N.…    with --snapshot-every: the weights that move, after N steps; see snapshot.py
    mask.…          sensitive, senszoq: which weights move, as python masks.py wrote it
    sparse.…        the same: their trained values and places, for eval.py --sparse
    model/          with --save-model: an ordinary Hugging Face checkpoint

JSON and snapshots are written beside, synced and renamed: whole or not at all. The logs are
steplog.py's.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import resource
from pathlib import Path

import torch

from errors import UserError
from snapshot import put_in_place, snapshots
from steplog import HEADER, METRICS, STEPS, Step, read_metrics, read_steps

RESULT, MASK, SPARSE = "result.json", "mask.safetensors", "sparse.safetensors"
MAY_CHANGE = (  # model and data have fingerprints of their own, and more steps are only more steps
    "model", "data_dir", "train_file", "validation_file", "test_file", "device", "device_map",
    "out", "steps", "micro_batch", "save_model", "fingerprint", "text", "torch",
)  # fmt: skip


# ------------------------------------------------------------------ the directory


def make_run_directory(out: str | None, name: str) -> tuple[Path, int]:
    """`out`, or runs/`name` with a number, and its lock; UserError where it holds a run already.

    What was killed before its first step holds nothing yet: its directory is taken over.
    """
    number = tries = 1
    while True:
        run = Path(out) if out is not None else Path("runs", name + f"-{number}" * (number > 1))
        try:
            run.mkdir(parents=True, exist_ok=True)
            held = lock(run)
            if not os.path.samestat(os.fstat(held), run.stat()):
                os.close(held)
                raise FileNotFoundError(f"{run} is being removed")
            if not _never_began(run):
                os.close(held)
                hint = f"; --mask {run / MASK} is a mask" if (run / MASK).is_file() else ""
                message = f"--out {run} is already there and not empty; choose another name"
                raise UserError(message + hint)
            for left in EARLY:
                (run / left).unlink(missing_ok=True)
            write_json(run / "config.json", {})
            return run, held
        except UserError:
            if out is not None:
                raise
            number += 1
        except OSError as error:
            tries += 1
            if isinstance(error, FileNotFoundError | FileExistsError) and tries < 100:
                continue  # another process removed it meanwhile
            why = error.strerror or error
            raise UserError(f"cannot write to --out {run}: {why}") from error


def lock(run: Path) -> int:
    """Who trains a run holds this descriptor of its directory; UserError where another does."""
    held = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(held)
        raise UserError(f"{run} is being trained by another process right now") from error
    except OSError:
        pass  # a file system without locks
    return held


EARLY = [name + end for name in (STEPS, METRICS, MASK, "config.json") for end in ("", ".tmp")]


def _never_began(run: Path) -> bool:
    """Is there nothing in a directory but what a run writes before its first step?

    Its config.json comes first: a mask without one is somebody's own.
    """
    names, config = {p.name for p in run.iterdir()}, _config(run)
    if config is None:
        return names <= {"config.json.tmp"}
    return names <= set(EARLY) and set(config) <= {"mask_from"} and not (config and MASK in names)


def _config(run: Path) -> dict | None:
    """config.json; before the first step {}, or {"mask_from": …} where a mask is made here, which
    may take hours, so that it is not nothing. None where there is none."""
    try:
        found = json.loads((run / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def begin(run: Path, settings: dict) -> None:
    """From here on the run can be resumed: empty logs, then config.json."""
    write_whole(run / METRICS, b"")
    write_whole(run / STEPS, f"{HEADER}\n".encode())
    write_json(run / "config.json", settings)


def reopen(run: Path, settings: dict, steps: int) -> None:
    """A run that stopped after `steps` goes on, perhaps to more of them. What was found at an
    earlier end goes, and snapshots of later steps: its log was cut, and may go another way."""
    for step, path in snapshots(run).items():
        if step > steps:
            path.unlink()
    write_json(run / "config.json", settings)
    (run / RESULT).unlink(missing_ok=True)


def give_up(run: Path | None) -> Path | None:
    """Remove the directory of a run that logged no step; that of another is returned.

    A mask that was made for it stays, and a line says so.
    """
    log = run and run / STEPS
    if run is None or (log.exists() and log.stat().st_size > len(HEADER) + 1):
        return run
    mask_made = (run / MASK).exists() and (_config(run) or {}).get("mask_from")
    for name in EARLY:
        if name != MASK or not mask_made:
            (run / name).unlink(missing_ok=True)
    if mask_made:
        print(f"  the mask that was made is kept: --mask {run / MASK}")
    with contextlib.suppress(OSError):  # somebody else put something there
        run.rmdir()
        if run.parent == Path("runs"):
            run.parent.rmdir()  # where it was the first
    return None


def write_json(path: Path, value) -> None:
    """`write_whole`, one setting or figure per line."""
    write_whole(path, f"{json.dumps(value, indent=1)}\n".encode())


def write_whole(path: Path, content: bytes) -> None:
    """Whole or not at all, also where the power fails: written beside, synced, renamed."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(content)
    put_in_place(beside, path)


def fingerprint(settings: dict) -> str:
    """A hash of all that decides what a run computes: a changed method or mask changes it."""
    fixed = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def open_run(run: Path) -> tuple[dict, list[Step]]:
    """(config.json, steps) of a run directory; UserError where they were changed."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is no run directory: it has no config.json")
    try:
        settings = json.loads((run / "config.json").read_bytes())
    except ValueError as error:
        raise UserError(f"{run}/config.json is no JSON, torn or edited: {error}") from error
    if isinstance(settings, dict) and set(settings) <= {"mask_from"}:
        hint = f", with --mask and a copy of {run / MASK}" * (run / MASK).is_file()
        raise UserError(f"{run} stopped before its first step: delete it and start again{hint}")
    if not isinstance(settings, dict) or settings.get("fingerprint") != fingerprint(settings):
        raise UserError(
            f"{run}/config.json was changed after the run began: method, mask and all that decides "
            "the numbers must stay; undo it (paths and steps may change), or start a new run"
        )
    if not isinstance(settings.get("steps"), int):
        raise UserError(f"{run}/config.json: steps is {settings.get('steps')!r}, not a number")
    return settings, read_steps(run, settings)


def finished(run: Path, steps: int) -> bool:
    """Has the run taken so many steps, and been tested?"""
    try:
        return "best" in read_result(run) and len(open_run(run)[1]) == steps
    except UserError:  # no result, or a torn one: it is made again
        return False


def read_result(run: Path) -> dict:
    """result.json of a run that has finished its steps."""
    if not (run / RESULT).is_file():
        raise UserError(f"{run} has not finished, so no step is best yet; try --step last")
    try:
        found = json.loads((run / RESULT).read_bytes())
        found["best_step"] + 0
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{run}/{RESULT} is torn or edited; --step last needs only the log"
        ) from error
    return found


# ------------------------------------------------------------------ at its end


def draw_curve(run: Path, title: str, zero_shot: float) -> None:
    """curve.png from metrics.jsonl: training loss, validation accuracy, active density."""
    import matplotlib  # here: nothing else needs it, and it takes a second to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(run)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = [line["step"] for line in lines]
    left.plot(steps, [line["loss"] for line in lines])
    left.set(xlabel="step", ylabel="training loss", title=title)
    checked = [line for line in lines if line.get("validation_accuracy") is not None]
    right.plot(
        [line["step"] for line in checked],
        [line["validation_accuracy"] for line in checked],
        marker=".",
        label="validation accuracy",
    )
    right.plot(steps, [line["active_density"] for line in lines], ":", label="active density")
    right.axhline(zero_shot, color="gray", linewidth=0.8, label="zero-shot, test")
    right.set(xlabel="step", ylim=(0, 1.02))
    right.legend()
    figure.savefig(run / "curve.png", dpi=120)
    plt.close(figure)


def machine(device: torch.device) -> dict:
    """Versions and hardware, for result.json: a figure without them is no result."""
    import transformers

    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
        devices = range(torch.cuda.device_count())  # --device-map auto spreads a model over them
        peak = sum(map(torch.cuda.max_memory_allocated, devices))
    else:
        hardware = (
            f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "hardware": hardware,
        "peak_memory_bytes": peak,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

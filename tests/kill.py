"""Kill runs with SIGKILL at random moments, resume them, compare with one that was left alone.

    python -m tests.kill --kills 25          about a minute; exit code 1 where anything differs

A moment is before, in the middle of or after a write, a sync or a rename, an evaluated batch, a
probe, an update: a life of a run is given a number of them, drawn from a seed, and dies at the
last. Every second life is ended by the clock instead, wherever it is. What must come out the same:
steps.csv to the byte, metrics.jsonl but for the seconds, result.json's accuracies and best step,
the saved model, and the last weights as they are in memory.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import tqdm.auto

import model_patch
import record
import scoring
import snapshot
import steplog
import train

FLAGS = [
    "--lr=2e-2", "--batch-size=7", "--steps=24", "--eval-every=6", "--log-every=4",
    "--snapshot-every=8", "--save-model", "--refresh-every=4",
]  # fmt: skip


def arguments(files: Path) -> list[str]:
    """The command line of a run of a second or so."""
    words = [f"--{n}-file={files}/{n}.jsonl" for n in ("train", "test")]
    return [f"--model={files}/model", *words, *FLAGS]


def install(count, die_at: int | None) -> None:
    """Count moments in this process, and die at number `die_at`."""

    def moment():
        count.value += 1
        if count.value == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner, name):
        real = getattr(owner, name)

        def hooked(*args, **kwargs):
            moment()
            found = real(*args, **kwargs)
            moment()
            return found

        setattr(owner, name, hooked)

    def torn_append(self, name, line):
        if self.files:
            data = line.encode() + b"\n"
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                moment()
                self.files[name].write(part)
            moment()

    def torn_save(tensors, path, metadata):
        save(tensors, path, metadata)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        moment()
        Path(path).write_bytes(whole)

    def saved_train(config, log, run, tokenizer, data, handle, group):
        train_loop(config, log, run, tokenizer, data, handle, group)
        save(handle.tensors(), f"{run}.weights")

    save, train_loop = snapshot.save_file, train.train
    train.train = saved_train
    steplog.StepLog._append, snapshot.save_file = torn_append, torn_save
    for owner, name in (
        (os, "fsync"), (os, "replace"), (scoring, "correct"), (model_patch.Patch, "losses"),
        (model_patch.Patch, "update"), (snapshot, "write"),
    ):  # fmt: skip
        around(owner, name)


def life(argv, count, die_at) -> None:
    """A process of its own: train.main until it ends or dies."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):  # theirs is a semaphore that all forks share:
        bar.set_lock(threading.RLock())  # who is killed inside it would stop the next one
    install(count, die_at)
    with contextlib.suppress(SystemExit):
        train.main(argv)
        os._exit(0)
    os._exit(2)


def live(argv, die_at: int | None = None, seconds: float | None = None) -> tuple[int, int]:
    """(exit code, moments) of one life; −9 where it was killed, by number or after `seconds`."""
    context = get_context("fork")
    count = context.Value("i", 0)
    process = context.Process(target=life, args=(argv, count, die_at))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode, count.value


def outcome(run: Path) -> dict:
    """What must be the same however often a run was killed."""
    result = json.loads((run / "result.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = Path(f"{run}.weights")  # of runs in a process of their own, see `install`
    return {
        "steps": (run / "steps.csv").read_bytes(),
        "metrics": [{k: v for k, v in m.items() if "seconds" not in k} for m in lines],
        "result": {k: result[k] for k in ("best_step", "skipped", "zero_shot", "last", "best")},
        "model": (run / "model" / "model.safetensors").read_bytes(),
        "weights": weights.read_bytes() if weights.exists() else None,
    }


def kill_often(files: Path, where: Path, kills: int, seed: int = 0) -> tuple[int, int]:
    """(kills, runs finished) with every finished run checked against one that was not killed."""
    new = arguments(files)
    began = time.perf_counter()
    code, moments = live([*new, f"--out={where}/alone"])
    assert code == 0, "the run that is left alone failed"
    seconds = time.perf_counter() - began
    expected, rng = outcome(where / "alone"), random.Random(seed)
    killed = finished = 0
    while killed < kills or not finished:
        run = where / f"run-{finished}"
        started = (run / "steps.csv").is_file() and (run / "config.json").stat().st_size > 3
        if run.exists() and not started:
            shutil.rmtree(run)  # died before its first step: it says to start again
        argv = [f"--resume={run}"] if started else [*new, f"--out={run}"]
        if started and record.finished(run, 24):
            code = 0  # it died after its last word
        elif killed >= kills:
            code, _ = live(argv)
        elif killed % 2:
            code, _ = live(argv, seconds=rng.uniform(0, seconds))
        else:
            code, _ = live(argv, die_at=rng.randint(1, moments))
        killed += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), f"{argv} ended with exit code {code}"
        if code == 0:
            found = outcome(run)
            for what, value in expected.items():
                assert found[what] == value, f"{run}: {what} differs after {killed} kills"
            finished += 1
    return killed, finished


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    from tests.models import write_task

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "task").mkdir()
        write_task(folder / "task")
        try:
            killed, finished = kill_often(folder / "task", folder, args.kills, args.seed)
        except AssertionError as error:
            print(f"kill.py: {error}")
            return 1
    took = time.perf_counter() - began
    print(f"{killed} kills, {finished} finished runs, all as if never killed; {took:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Kill runs with SIGKILL at random moments, resume them, compare with ones that were left alone.

    python -m tests.kill --kills 25          about half a minute; exit code 1 where anything differs

A moment is before, in the middle of or after a write to the log, a sync, a rename, a probe, an
update or an evaluated batch: a life of a run is given a number of them, drawn from a seed, and dies
at the last. Every second life is ended by the clock instead, wherever it is. Runs of S-MeZO and of
SensZOQ take turns. What must come out the same: steps.csv to the byte, the accuracies, the best
step, and the last weights as they are in memory.
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

import torch
import tqdm.auto

import model_patch
import tasks
import train
from harness import log

LOADED = [  # imported once, by the server that forks the lives: most of a life would be imports
    "train", "bitsandbytes", "torch._dynamo", "transformers.hf_argparser",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto",
]  # fmt: skip
FLAGS = ["--batch-size=7", "--steps=12", "--eval-every=4"]
METHODS = (
    ["--lr=2e-2", "--refresh-every=3"],
    ["--method=senszoq", "--mask-from=task", "--density=0.02", "--lr=0.3"],
)


def arguments(files: Path, method: list[str]) -> list[str]:
    """The command line of a run of a second or so."""
    words = [f"--{n}-file={files}/{n}.jsonl" for n in ("train", "test")]
    return [f"--model={files}/model", *words, *FLAGS, *method]


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

    def torn_append(self, line):
        if self.file is not None:
            data = line.encode() + b"\n"
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                moment()
                self.file.write(part)
            moment()

    def saved_train(config, patch, data, steps):
        train_loop(config, patch, data, steps)
        flat = torch.cat([theta.flatten() for theta in patch.moving()])
        Path(f"{steps.run}.weights").write_bytes(flat.cpu().numpy().tobytes())

    train_loop, train.train = train.train, saved_train
    log.StepLog._append, log.draw_curve = torn_append, lambda *_: None
    for owner, name in (
        (os, "fsync"), (os, "replace"), (tasks, "correct"), (model_patch.Patch, "losses"),
        (model_patch.Patch, "update"),
    ):  # fmt: skip
        around(owner, name)


def life(argv, count, die_at, threads) -> None:
    """A process of its own: train.main until it ends or dies."""
    torch.set_num_threads(threads)
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
    # of a process whose threads have done work no fork is safe, and none of one that knows a GPU
    context = get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(LOADED)
    count = context.Value("i", 0, lock=False)
    process = context.Process(target=life, args=(argv, count, die_at, torch.get_num_threads()))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode, count.value


def outcome(run: Path) -> dict:
    """What must be the same however often a run was killed."""
    result = json.loads((run / "result.json").read_text())
    return {
        "steps": (run / "steps.csv").read_bytes(),
        "result": {k: result[k] for k in ("best_step", "skipped", "zero_shot", "last", "best")},
        "weights": Path(f"{run}.weights").read_bytes(),
        "files": sorted(p.name for p in run.iterdir() if p.suffix != ".tmp"),
    }


def kill_often(files: Path, where: Path, kills: int, seed: int = 0) -> tuple[int, int]:
    """(kills, runs finished) with every finished run checked against one that was not killed."""
    rng, expected = random.Random(seed), []
    methods = METHODS[: max(1, kills)]  # one kill is of the first alone
    began = time.perf_counter()
    for number, method in enumerate(methods):
        alone = where / f"alone-{number}"
        code, moments = live([*arguments(files, method), f"--out={alone}"])
        assert code == 0, "a run that is left alone failed"
        expected.append(outcome(alone))
    seconds = (time.perf_counter() - began) / len(methods)
    killed = finished = 0
    while killed < kills or not finished:
        run, turn = where / f"run-{finished}", finished % len(methods)
        if (run / "config.json").exists():
            argv = [f"--resume={run}"]
        else:  # it died before it was a run, and says to start again
            shutil.rmtree(run, ignore_errors=True)
            argv = [*arguments(files, methods[turn]), f"--out={run}"]
        if killed >= kills:
            code, _ = live(argv)
        elif killed % 2:
            code, _ = live(argv, seconds=rng.uniform(0, seconds))
        else:
            code, _ = live(argv, die_at=rng.randint(1, moments))
        killed += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), f"{argv} ended with exit code {code}"
        if code == 0:
            found = outcome(run)
            for what, value in expected[turn].items():
                assert found[what] == value, f"{run}: {what} differs after {killed} kills"
            finished += 1
    return killed, finished


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # before the first fork
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

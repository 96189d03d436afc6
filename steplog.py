"""The two logs of a run: steps.csv, which is its checkpoint, and metrics.jsonl.

    steps.csv       step, seed, a = −η · proj_grad, l⁺, l⁻        one line per step
    metrics.jsonl   losses, gradient, active density, validation accuracy, every so many steps

Both only grow, a line at a time and unbuffered, so that kill -9 leaves at worst a torn last line. A
power failure may also take what was written since the last evaluation: then, before a snapshot and
at the end both are synced, the steps first. Whoever continues a run (`StepLog`) cuts what is torn,
a last step without its line of metrics, and metrics of steps that the step log does not have.
Those steps are trained again, to the same bits; all else that a run knows follows from its logs.

A step log that was edited is noticed: the seed follows from the step, and a from l⁺ and l⁻.
"""

import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import snapshot
import zo
from errors import UserError

STEPS, METRICS = "steps.csv", "metrics.jsonl"
HEADER = "step,seed,a,loss_plus,loss_minus"


class Step(NamedTuple):
    """One line of the step log. A skipped step has an `a` that is not finite."""

    step: int
    seed: int
    a: float
    loss_plus: float
    loss_minus: float


def read_steps(run: Path, settings: dict) -> list[Step]:
    """The step log. A last line without its newline is torn: left out. UserError for an edited one.

    Each line says twice what it says, and must agree: its place and the run's seed give the step's
    seed, the two losses give a.
    """
    if not (run / STEPS).is_file():
        raise UserError(f"{run}/{STEPS} is missing: without it nothing can be rebuilt")
    header, *lines = (run / STEPS).read_bytes().decode(errors="replace").split("\n")
    if header != HEADER or not lines:
        raise UserError(f"{run}/{STEPS}: line 1 is {header[:60]!r}, not {HEADER}")
    steps = []
    for number, line in enumerate(lines[:-1]):
        try:
            step, seed, *numbers = line.split(",")
            found = Step(int(step), int(seed), *map(float, numbers))
            g = zo.projected_grad(found.loss_plus, found.loss_minus, settings["eps"])
            with np.errstate(over="ignore"):
                a = float(np.float32(-settings["lr"] * g))
            expected = found._replace(step=number, seed=zo.step_seed(settings["seed"], number), a=a)
        except (ValueError, TypeError):
            found, expected = line, None
        if repr(found) != repr(expected):  # NaN is NaN
            raise UserError(
                f"{run}/{STEPS}: line {number + 2} is {line[:60]!r}, which step {number} of this "
                "run did not write; undo the change, or cut the log before it to go back there"
            )
        steps.append(found)
    return steps


def read_metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl; a torn last one is left out."""
    lines = (run / METRICS).read_bytes().decode(errors="replace").split("\n")
    found = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            found.append(json.loads(line))
            found[-1]["step"] + 0, (found[-1].get("validation_accuracy") or 0) + 0
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{run}/{METRICS}: line {number} is {line[:60]!r}") from error
    return found


class StepLog:
    """The two logs of a run while it trains, and what follows from them; its progress bar.

    A new run is one with empty logs. `run` is None for all workers but the first: they keep the
    same books and write nothing. `tell` hands them what the first one read.
    """

    def __init__(self, config, run: Path | None, settings: dict, tell):
        self.config, self.run, self.settings, self.files = config, run, settings, {}
        self.history: list[Step] = []
        self.skipped = self.in_a_row = 0
        self.best, self.best_step = settings["start"]["validation_accuracy"], 0
        self.line: dict = {}  # of metrics, growing
        self.losses: list[float] = []  # of finite steps since the last line of metrics
        self.seconds: list[float] = []  # alike
        self.training_seconds = 0.0  # up to there, of every session
        self.knows_moved = False
        try:
            for name in (STEPS, METRICS) if run is not None else ():
                self.files[name] = open(run / name, "r+b", buffering=0)
            steps, lines = tell(self._settle() if run is not None else None)
            for step in steps:
                self._count(Step(*step))
                if lines and lines[0]["step"] == self.steps:
                    self.line = lines.pop(0)
                    self._close_line()
        except BaseException as error:
            self.close()
            if isinstance(error, FileNotFoundError):
                message = f"{error.filename} is missing, and without it the run cannot go on"
                raise UserError(message) from error
            raise
        self.bar = tqdm(
            total=config.steps, initial=self.steps, unit="step", dynamic_ncols=True,
            disable=run is None,
        )  # fmt: skip
        self.began = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        try:
            self.sync()
        finally:
            self.close()

    def close(self) -> None:
        """Close the logs."""
        for file in self.files.values():
            file.close()
        self.files = {}

    def sync(self) -> None:
        """The logs to the disk itself. Steps first: no metrics without the steps they speak of."""
        for file in self.files.values():
            os.fsync(file.fileno())

    @property
    def steps(self) -> int:
        return len(self.history)

    def _settle(self) -> tuple[list, list]:
        """Cut from both logs what does not count, and return the rest."""
        steps, lines = read_steps(self.run, self.settings), read_metrics(self.run)
        if len(steps) > self.config.steps:
            raise UserError(f"{self.run} has logged {len(steps)} of {self.config.steps} steps")
        due = [step for step in range(1, len(steps) + 1) if self._due(step)]
        kept = 0
        while kept < min(len(due), len(lines)) and lines[kept]["step"] == due[kept]:
            kept += 1
        if kept < len(due):  # killed between a step and its metrics; or the power failed
            synced = any(self._evaluated(step) for step in range(due[kept], len(steps)))
            if synced or any(line["step"] in due for line in lines[kept:]):
                raise UserError(
                    f"{self.run}/{METRICS} has no line of step {due[kept]} where it should stand, "
                    f"and {STEPS} has {len(steps)} steps: it was edited; undo the change"
                )
            steps = steps[: due[kept] - 1]
        for name, lines_kept in ((STEPS, 1 + len(steps)), (METRICS, kept)):
            text = (self.run / name).read_bytes().split(b"\n")
            size = sum(len(line) + 1 for line in text[:lines_kept])
            self.files[name].truncate(size)
            self.files[name].seek(size)
        return steps, lines[:kept]

    def _append(self, name: str, line: str) -> None:
        """Unbuffered, so that a killed process has written it, and no second attempt follows."""
        data = line.encode() + b"\n"
        while data and self.files:
            data = data[self.files[name].write(data) :]

    def _count(self, step: Step) -> None:
        """What follows from a line of the log, read or about to be written."""
        self.history.append(step)
        finite = math.isfinite(step.a)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        if finite:
            plus, minus = step.loss_plus, step.loss_minus
            self.losses.append((plus + minus) / 2)
            g = zo.projected_grad(plus, minus, self.config.eps)
            self.line |= {"loss_plus": plus, "loss_minus": minus, "projected_grad": g}

    def step(self, t: int, seed: int, a: float, loss_plus: float, loss_minus: float) -> None:
        """One line of the log. Twenty skipped steps in a row end the run."""
        step, now = Step(t, seed, a, loss_plus, loss_minus), time.perf_counter()
        self._count(step)
        if self.in_a_row >= 20:
            raise UserError(
                f"20 losses in a row were not finite (now l⁺ {loss_plus}, l⁻ {loss_minus}); likely "
                f"causes: --lr {self.config.lr} too high, --eps {self.config.eps} too large, or "
                "float16 overflow (try --dtype bfloat16)"
            )
        self._append(STEPS, ",".join(map(repr, step)))
        if math.isfinite(a):
            self.seconds.append(now - self.began)
        self.began = now
        self.bar.update()

    def begin(self) -> None:
        """The first step of this session begins: what was replayed before is no step's time."""
        self.began = time.perf_counter()
        self.bar.unpause()

    def _evaluated(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.config.steps

    def _due(self, step: int) -> bool:
        return step % self.config.log_every == 0 or self._evaluated(step)

    def validation_due(self) -> bool:
        return self._evaluated(self.steps)

    def validation(self, accuracy: float | None) -> None:
        """The best step is the first with the highest validation accuracy, the start included."""
        self.line["validation_accuracy"] = accuracy
        self.began = time.perf_counter()  # validation is not part of a step's time

    def moved(self, share: float) -> None:
        """What share of the weights inside the mask the first steps really changed, said once."""
        self.line["moved"] = share
        nearest = self.config.rounding == "nearest" and not self.skipped
        if nearest and share < 0.9:  # where one update in five arrives, ten of them move 0.9
            self.bar.write(
                f"  the first {self.steps} steps moved only {share:.1%} of the weights inside the "
                "mask at all: rounding loses small updates, --rounding stochastic does not"
            )

    def metrics_due(self) -> bool:
        return self._due(self.steps)

    def metrics(self, active_density: float) -> None:
        """One line of metrics.jsonl; loss and seconds_per_step are means since the line before."""
        each = float(np.mean(self.seconds)) if self.seconds else None
        self.line |= {
            "step": self.steps,
            "loss": float(np.mean(self.losses)) if self.losses else None,
            "active_density": active_density,
            "seconds_per_step": each,
            "training_seconds": self.training_seconds + (each or 0) * len(self.losses),
            "skipped": self.skipped,
        }
        self._append(METRICS, json.dumps(self.line))
        if "validation_accuracy" in self.line:
            self.sync()
        shown = {"active": f"{active_density:.1%}"}
        shown |= {"loss": f"{self.line['loss']:.4f}"} if self.losses else {}
        self._close_line()
        shown |= {"best val": f"{self.best:.3f}"} if self.best is not None else {}
        self.bar.set_postfix(shown)
        self.began = time.perf_counter()

    def snapshot_due(self) -> bool:
        every = self.config.snapshot_every
        return every > 0 and self.steps % every == 0

    def snapshot(self, tensors: dict) -> None:
        """The weights as they are now; the logs are synced first, so that it is never ahead."""
        if self.run is not None:
            self.sync()
            snapshot.write(self.run, self.steps, tensors, self.settings, self.best_step)
        self.began = time.perf_counter()  # nor is writing one

    def _close_line(self) -> None:
        """What follows from a line of metrics, read or just written."""
        accuracy = self.line.get("validation_accuracy")
        if accuracy is not None and (self.best is None or accuracy > self.best):
            self.best, self.best_step = accuracy, self.steps
        self.knows_moved |= "moved" in self.line
        self.training_seconds = self.line.get("training_seconds", self.training_seconds)
        self.line, self.losses, self.seconds = {}, [], []

    def result(self) -> dict:
        """The step whose weights count as best, how many steps were skipped, and what they took."""
        best_step = self.best_step if self.best is not None else self.steps
        found = {"best_step": best_step, "skipped": self.skipped}
        return found | {"training_seconds": self.training_seconds}

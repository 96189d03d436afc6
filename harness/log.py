"""One line per finished step. The file is the run's record, its picture and its checkpoint.

    step,seed,a,loss_plus,loss_minus,validation,active_density

`a` is −η · proj_grad. Validation accuracy and active density stand where they were taken; where
perplexity is measured, the column is validation_perplexity. Step 0 is the model before training.
The original weights and one (seed, a) per step rebuild the weights. A run of 20,000 steps takes 1.6
megabytes.

A line is appended when everything of its step is done, so `kill -9` leaves at worst a torn last
line, which does not count. `compare` finds that the model, the data or a setting has changed.
"""

import contextlib
import errno
import math
import os
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

NO_LOCKS = errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK  # says a file system


class Step(NamedTuple):
    """One line. A step whose `a` is not finite moved nothing."""

    step: int
    seed: int | None = None
    a: float | None = None
    loss_plus: float | None = None
    loss_minus: float | None = None
    validation: float | None = None
    active_density: float | None = None

    @property
    def loss(self) -> float:
        """(l⁺ + l⁻) / 2, which is L(θ_t) but for a term in ε²."""
        return (self.loss_plus + self.loss_minus) / 2

    def line(self) -> str:
        return ",".join("" if x is None else repr(x) for x in self)

    @classmethod
    def of(cls, line: str) -> "Step":
        numbers = [float(x) if x else None for x in line.split(",")]
        if len(numbers) != len(cls._fields):
            raise ValueError("it has another number of columns")
        step, seed = (int(x) if x else None for x in line.split(",")[:2])
        return cls(step, seed, *numbers[2:])


class StepLog:
    """steps.csv: `start` is step 0, `steps` the finished ones. Without a run it is in memory.

    `metric`: what validation measures, accuracy or perplexity. A file says it in its header.
    """

    def __init__(self, run: Path | None, write: bool = False, metric: str = "accuracy"):
        self.run, self.file, self.start, self.steps = run, None, None, []
        self.metric = metric
        if run is None:
            return
        path = run / "steps.csv"
        if write:
            self.file = open(path, "a+b", buffering=0)
            try:
                lock(self.file)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    why = f"{run} is being trained by another process right now"
                    raise ValueError(why) from error
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]  # a line without its end was torn by a kill
        if b"\r" in text[len(whole) : -1]:
            raise ValueError(f"{path} was saved by another program: its lines do not end with \\n")
        if b"validation_perplexity" in whole:
            self.metric = "perplexity"
        for number, line in enumerate(whole.decode(errors="replace").splitlines()[1:]):
            try:
                step = Step.of(line)
                if step.step != number:
                    raise ValueError(f"step {number} should stand there")
            except ValueError as error:
                raise ValueError(f"{path}: line {number + 2} is {line[:60]!r}: {error}") from error
            self._count(step)
        if write:
            self.file.truncate(len(whole))
            if not whole:
                named = "validation" if metric == "accuracy" else f"validation_{metric}"
                self._append(",".join(Step._fields).replace("validation", named))

    def _count(self, step: Step) -> None:
        if step.step == 0:
            self.start = step
        else:
            self.steps.append(step)

    def _append(self, line: str) -> None:
        if self.file is not None:  # unbuffered: what a killed process has written is written
            data = line.encode() + b"\n"
            if self.file.write(data) < len(data):
                raise OSError(f"{self.run}/steps.csv: the disk is full")

    def append(self, step: Step) -> None:
        """The step exists once its line does."""
        self._append(step.line())
        self._count(step)
        if step.validation is not None and self.file is not None:
            os.fsync(self.file.fileno())  # a power failure costs at most what came after

    def best_step(self) -> int:
        """The first with the best validation, the start included; without any the last.

        The best accuracy is the highest, the best perplexity the lowest.
        """
        taken = [s for s in (self.start, *self.steps) if s and s.validation is not None]
        best = max if self.metric == "accuracy" else min
        return best(taken, key=lambda s: s.validation).step if taken else len(self.steps)

    def skipped(self) -> int:
        """How many steps moved nothing, as a loss was not finite."""
        return sum(not math.isfinite(step.a) for step in self.steps)

    def rise(self) -> tuple[float, float] | None:
        """The first loss and the mean of the last tenth, if that is 1.5 times as high, or None."""
        losses = [s.loss for s in self.steps if math.isfinite(s.a)]
        last = losses[-max(1, len(losses) // 10) :]
        if not losses or not has_risen(losses[0], sum(last) / len(last)):
            return None
        return losses[0], sum(last) / len(last)


def has_risen(first: float, last: float) -> bool:
    """Is the last loss 1.5 times the first, and 0.1 above it, or no number?"""
    return not last <= max(1.5 * first, first + 0.1)


def lock(file) -> None:
    """Hold a file until the process ends. OSError where another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows; a byte far behind the end, as locked bytes cannot be read
        import msvcrt

        file.seek(1 << 30)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def forget_unbegun(run: Path, copied: bool = False) -> None:
    """Remove a run that failed before its step 0, unless [Q]'s mask was made for it already.

    `copied`: the mask is the user's, who has the file.
    """
    mask = run / "mask.safetensors"
    if mask.exists() and not copied or StepLog(run).start is not None:
        return
    with contextlib.suppress(OSError):  # something of the user's is in it; Windows holds open files
        for name in ("config.json", "result.json", "steps.csv", mask.name):
            (run / name).unlink(missing_ok=True)
        run.rmdir()


def compare(logged: Step, again: Step, dtype: str, run) -> None:
    """A logged step beside the same step taken again: equal, equal to rounding, or an error.

    ValueError where model, data or settings are not those that the run began with.
    """
    if repr(again[:5]) == repr(logged[:5]):  # as text: NaN is not equal to NaN
        return
    same, tolerance = True, {"bfloat16": 2e-2, "float16": 3e-3}.get(dtype, 1e-4)
    for ours, theirs in zip(again[3:5], logged[3:5], strict=True):  # all else follows from these
        close = math.isclose(ours, theirs, rel_tol=tolerance, abs_tol=tolerance / 10)
        same &= close or math.isnan(ours) and math.isnan(theirs)
    if not same:
        raise ValueError(
            f"{run}: step {logged.step} does not come out as it was logged: l⁺ "
            f"{again.loss_plus!r}, not {logged.loss_plus!r}; a {again.a!r}, not {logged.a!r}. "
            "The model, the data, the mask or a setting has changed"
        )
    print(
        f"  step {logged.step} comes out as it was logged but for rounding: the weights have the "
        "bits of this machine, dtype or --micro-batch"
    )


class Progress:
    """The progress bar: loss, accuracy or perplexity, time left."""

    def __init__(self, log: StepLog, steps: int, quiet: bool):
        self.validation = "validation" if log.metric == "accuracy" else log.metric
        self.bar = tqdm(total=steps, initial=len(log.steps), unit="step", disable=quiet)
        self.mean = None
        self.shown = {}

    def update(self, step: Step) -> None:
        if math.isfinite(step.a):
            self.mean = step.loss if self.mean is None else 0.95 * self.mean + 0.05 * step.loss
            self.shown["loss"] = f"{self.mean:.4f}"
        if step.validation is not None:
            self.shown[self.validation] = f"{step.validation:.4g}"
        if step.active_density is not None:
            self.shown["active"] = f"{step.active_density:.1%}"
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()


def draw_curve(log: StepLog, title: str, zero_shot: float | None) -> None:
    """curve.png: training loss, validation accuracy and active density against steps.

    The logarithm of a perplexity is a loss, and is drawn beside that of training.
    """
    from matplotlib.figure import Figure  # without pyplot, which would choose a backend

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    finite = [s for s in log.steps if math.isfinite(s.a)]
    left.plot([s.step for s in finite], [s.loss for s in finite], lw=0.7)
    left.set(xlabel="step", ylabel="training loss")
    left.set_title(title, parse_math=False)
    taken = [s for s in (log.start, *log.steps) if s and s.active_density is not None]
    checked = [s for s in taken if s.validation is not None]
    side, value = (right, float) if log.metric == "accuracy" else (left, math.log)
    y = [value(s.validation) for s in checked]
    side.plot([s.step for s in checked], y, ".-", label="validation")
    right.plot(
        [s.step for s in taken], [s.active_density for s in taken], ":", label="active density"
    )
    if zero_shot is not None:
        side.axhline(value(zero_shot), color="gray", lw=0.8, label="zero-shot, test")
    right.set(xlabel="step", ylabel="accuracy, share", ylim=(0, 1.02))
    if side is left:
        left.set_ylabel("loss = ln perplexity"), right.set_ylabel("share")
        left.legend()
    right.legend()
    figure.savefig(log.run / "curve.png")

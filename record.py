"""What a run writes, and how it is read back.

    config.json     every setting, and fingerprints of the weights and of the data
    steps.csv       step, seed, a = −η · proj_grad: with the original weights, this *is* the result
    metrics.jsonl   what to look at: losses, gradient, active density, validation accuracy
    result.json     accuracies with standard errors, seconds, peak memory, versions, hardware
    curve.png       loss, accuracy and active density against steps
    model/          with --save-model: an ordinary Hugging Face checkpoint

JSON is written beside and then renamed; the two logs only grow, line by line, so a run that dies
leaves at worst a torn last line, and everything before it counts.
"""

import csv
import json
import math
import os
import platform
import resource
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tasks import UserError

STEPS, METRICS = "steps.csv", "metrics.jsonl"


def make_run_directory(out: str | None, name: str) -> Path:
    """`out`, or runs/`name` with a number; UserError where it holds something or is read-only."""
    number = 1
    while True:
        run = Path(out) if out is not None else Path("runs", name + f"-{number}" * (number > 1))
        try:
            if out is not None and run.is_dir() and not any(run.iterdir()):
                run.rmdir()  # an empty folder will do
            run.mkdir(parents=True)  # one of two runs started together gets the name, not both
            write_json(run / "config.json", {})
            return run
        except FileExistsError as error:
            if out is not None:
                message = f"--out {run} is already there and not empty; choose another name"
                raise UserError(message) from error
            number += 1
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"cannot write to --out {run}: {why}") from error


def discard(run: Path) -> None:
    """Give the name back where a run failed before its first step."""
    if not (run / STEPS).exists():
        (run / "config.json").unlink(missing_ok=True)
        run.rmdir()


def write_json(path: Path, value) -> None:
    """Whole or not at all: written beside, then renamed."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(beside, path)


def open_run(run: Path) -> tuple[dict, list]:
    """(config.json, steps) of a run directory."""
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is no run directory: it has no config.json")
    config = json.loads((run / "config.json").read_text())
    if not config or not (run / STEPS).is_file():
        raise UserError(f"{run} stopped before its first step: there is nothing to rebuild")
    return config, read_steps(run)


def read_steps(run: Path) -> list[tuple[int, int, float]]:
    """The step log: (step, seed, a) per line. A last line without its newline is torn: left out."""
    text = (run / STEPS).read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    steps = []
    for number, row in enumerate(csv.reader(lines[1:])):
        try:
            step, seed, a = int(row[0]), int(row[1]), float(row[2])
        except (ValueError, IndexError):
            step = -1
        if step != number:
            raise UserError(f"{run}/steps.csv: line {number + 2} is {row!r}, not step {number}")
        steps.append((step, seed, a))
    return steps


class Record:
    """What a run writes while it trains, steps.csv and metrics.jsonl, and its progress bar."""

    def __init__(self, config, run: Path, validation_accuracy: float | None):
        self.config, self.steps, self.skipped, self.in_a_row = config, 0, 0, 0
        self.best, self.best_step = validation_accuracy, 0
        self.recent: list[tuple] = []  # (loss, seconds) of finite steps since the last metrics
        self.line: dict = {}
        self.began = time.perf_counter()
        self.log_file, self.metrics_file = open(run / STEPS, "w"), open(run / METRICS, "w")
        self.log = csv.writer(self.log_file, lineterminator="\n")
        self.log.writerow(("step", "seed", "a"))
        self.bar = tqdm(total=config.steps, unit="step", dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close(), self.log_file.close(), self.metrics_file.close()

    def step(self, t, seed, a, loss_plus, loss_minus, projected_grad) -> None:
        """One line of the log. A skipped step has a = 0; twenty in a row end the run."""
        finite, now = math.isfinite(a), time.perf_counter()
        self.steps, self.in_a_row = t + 1, 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        if self.in_a_row == 20:
            raise UserError(
                f"20 losses in a row were not finite (now l⁺ {loss_plus}, l⁻ {loss_minus}); likely "
                f"causes: --lr {self.config.lr} too high, --eps {self.config.eps} too large, or "
                "float16 overflow (try --dtype bfloat16)"
            )
        self.log.writerow((t, seed, a if finite else 0.0))
        self.log_file.flush()
        if finite:
            self.recent.append(((loss_plus + loss_minus) / 2, now - self.began))
            self.line = {
                "loss_plus": loss_plus,
                "loss_minus": loss_minus,
                "projected_grad": projected_grad,
            }
        self.began = now
        self.bar.update()

    def validation_due(self) -> bool:
        return self.steps % self.config.eval_every == 0 or self.steps == self.config.steps

    def validation(self, accuracy: float | None) -> None:
        """The best step is the first with the highest validation accuracy, the start included."""
        self.line["validation_accuracy"] = accuracy
        if accuracy is not None and accuracy > self.best:
            self.best, self.best_step = accuracy, self.steps
        self.began = time.perf_counter()  # validation is not part of a step's time

    def metrics_due(self) -> bool:
        return self.steps % self.config.log_every == 0 or "validation_accuracy" in self.line

    def metrics(self, active_density: float) -> None:
        """One line of metrics.jsonl; loss and seconds are means since the line before."""
        loss, seconds = np.mean(self.recent, axis=0) if self.recent else (None, None)
        self.line |= {
            "step": self.steps,
            "loss": loss,
            "active_density": active_density,
            "seconds_per_step": seconds,
            "skipped": self.skipped,
        }
        self.metrics_file.write(json.dumps(self.line) + "\n")
        self.metrics_file.flush()
        shown = {"active": f"{active_density:.1%}"}
        shown |= {"loss": f"{loss:.4f}"} if loss is not None else {}
        shown |= {"best val": f"{self.best:.3f}"} if self.best is not None else {}
        self.bar.set_postfix(shown)
        self.line, self.recent = {}, []
        self.began = time.perf_counter()

    def result(self) -> dict:
        """The step whose weights count as best, and how many steps were skipped."""
        best_step = self.best_step if self.best is not None else self.steps
        return {"best_step": best_step, "skipped": self.skipped}


def draw_curve(run: Path, title: str, zero_shot: float) -> None:
    """curve.png from metrics.jsonl: training loss, validation accuracy, active density."""
    import matplotlib  # here: nothing else needs it, and it takes a second to import

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
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


def machine(device: torch.device) -> dict:
    """Versions and hardware, for result.json: a figure without them is no result."""
    import transformers

    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
        peak = torch.cuda.max_memory_allocated(device)
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

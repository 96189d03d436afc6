"""What a day with a GPU must answer, a part at a time, in the order of what matters.

    python -m studies.gpu_day right --model DIR --task sst2 --data-dir DIR --out OUT
    python -m studies.gpu_day right fast profile learn large --tiny      all of it, as a rehearsal

    part       question                           answered by
    right      does it compute what it should?    pytest -m cuda; slopes.py, packing.py; tests.kill
    fast       what does a step cost at 7B?       harness.bench, four sizes of batch
    profile    where do the milliseconds go?      one step of S-MeZO by kernels, beside its floor
    learn      does it learn in 20,000 steps?     train.py, three methods at once
    large      which shapes fit at all?           harness.bench, 13B to 66B

No part needs another. Each takes at most nine minutes on an H200, prints a short table last, with
what was skipped, and keeps everything that its commands said in OUT. `--tiny` takes the smallest
shape and four steps, so that a CPU runs all of it in minutes: what breaks there is mended before
a card is at hand.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from harness import bench, loading
from harness.config import ROOT, positive, study_parser, write_json

SECONDS = 540  # of a part


class Day:
    """Where answers go, and how much of a part's time is left."""

    def __init__(self, args):
        self.args, self.lines, self.ends = args, [], time.monotonic() + SECONDS
        self.shape = "tiny" if args.tiny else args.shape
        self.task = ["--model", args.model, "--task", args.task, "--data-dir", args.data_dir]

    def start(self, name: str, *words) -> tuple:
        """One command in the background; what it says goes to a file."""
        file = open(self.args.out / f"{name}.txt", "w")
        command = [sys.executable, *map(str, words)]
        return name, subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)

    def finish(self, name: str, process) -> None:
        """Its last line for the table; what runs out of time, or fails, is said there, too."""
        try:
            code = process.wait(max(1, self.ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)  # or the next part might find the card taken
            process.kill()
            code = "out of time"
        said = (self.args.out / f"{name}.txt").read_text(errors="replace").strip().splitlines()
        last = said[-1] if said else ""
        how = "" if code == 0 else f"SKIPPED ({code}): "
        self.lines.append(f"{name:<28} {how}{'' if last.startswith('{') else last[-100:]}".rstrip())

    def run(self, name: str, *words) -> None:
        self.finish(*self.start(name, *words))


# ------------------------------------------------------------------ the parts


def right(day: Day) -> None:
    """Tests that need CUDA; g beside autograd's; texts that share rows; kill -9 and resume."""
    args = day.args
    # most of their time is the compiler's, on the CPU; a file that cannot be read stops no other
    tests = ["tests/test_masks.py"] if args.tiny else ["tests", "--numprocesses", 8]
    tests += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    day.run("tests", "-m", "pytest", "-m", "cuda", *tests)
    for dtype in ["float32"] if args.tiny else ["float32", "bfloat16"]:
        more = ["--seeds", 2, "--batch-size", 2] if args.tiny else ["--eps", 1e-3, 4e-3]
        day.run(f"slopes-{dtype}", "-m", "studies.slopes", *day.task, "--dtype", dtype, *more)
    words = ["--model", args.model, "--tasks", args.task, "--data-dir", args.data_dir]
    more = ["--batches", 1] if args.tiny else []
    day.run("packing", "-m", "studies.packing", *words, *more)
    day.run("kill", "-m", "tests.kill", "--kills", 0 if args.tiny else 5)


def measured(day: Day, name: str, *words) -> None:
    """One bench, and its rows for the table."""
    file = day.args.out / f"{name}.json"
    file.unlink(missing_ok=True)  # what an earlier call has measured
    more = ["--no-compile", "--rounds", 1] if day.args.tiny else ["--rounds", 5]
    dtype = "float32" if day.args.tiny else "bfloat16"
    day.run(name, "-m", "harness.bench", "--dtype", dtype, *more, "--json", file, *words)
    found = json.loads(file.read_text() or "{}") if file.exists() else {}
    for row, of in found.get("rows", {}).items():
        spread = f"R {of['R']:.2f} ({of['R_min']:.2f} – {of['R_max']:.2f})"
        day.lines.append(f"  {row:<26} {spread:<24} {of['peak_bytes'] / 1e9:.2f} GB")


def fast(day: Day) -> None:
    """R and memory; the rows that answer for a claim come first, and batch 1 is [S]'s Table 3."""
    rows = ["two forwards", "MeZO, in place", "s-mezo", "senszoq"]
    four = ["4 bits: two forwards", "4 bits: senszoq"]
    if day.args.tiny:
        rows, four = ["two forwards", "s-mezo"], ["4 bits: senszoq"]
    sizes = [(2, 8)] if day.args.tiny else [(16, 128), (16, 256), (1, 256), (16, 64)]
    for batch, tokens in sizes:
        size = ["--batch", batch, "--tokens", tokens]
        name = f"{day.shape}-{batch}x{tokens}"
        measured(day, name, "--shape", day.shape, *size, "--rows", *rows, *four)


def profile(day: Day) -> None:
    """One step of S-MeZO: kernels by time, the time that none runs, and the floor of memory."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    device = loading.take_device("auto")
    dtype = torch.float32 if day.args.tiny else torch.bfloat16
    how = argparse.Namespace(
        shape=day.shape, dtype=str(dtype)[6:], device=device, compile=not day.args.tiny,
        batch=16, tokens=8 if day.args.tiny else 128,
    )  # fmt: skip
    subject = bench.Subject(how)
    gpu = [ProfilerActivity.CUDA] if device.startswith("cuda") else []
    with bench.ROWS["s-mezo"][1](subject) as step:
        step(0), step(1)
        seconds = bench.timed(lambda: step(2), device)  # the profiler makes each launch dearer
        with record(activities=[ProfilerActivity.CPU, *gpu]) as recorded:
            bench.timed(lambda: step(3), device)
    kind = DeviceType.CUDA if gpu else DeviceType.CPU  # an operation has its kernels' time, too
    kernels = [
        (event.key, event.count, event.self_device_time_total if gpu else event.self_cpu_time_total)
        for event in recorded.key_averages()
        if event.device_type == kind and not event.is_user_annotation
    ]
    busy = sum(time for _, _, time in kernels) / 1e6
    weights = subject.model.num_parameters()
    whole = torch.empty(1 << (20 if day.args.tiny else 30), dtype=torch.uint8, device=device)
    target = whole.clone()
    copy = bench.timed(lambda: [target.copy_(whole) for _ in range(8)], device) / 8
    bandwidth = 2 * whole.numel() / copy
    floor = 6 * dtype.itemsize * weights / bandwidth  # l⁺, l⁻ and update read and write each weight
    day.lines += [
        f"one step {seconds * 1e3:.1f} ms, kernels busy {busy * 1e3:.1f} ms",
        f"memory copies {bandwidth / 1e9:.0f} GB/s: the floor of the noise is {floor * 1e3:.1f} ms",
    ]
    for key, count, micros in sorted(kernels, key=lambda kernel: -kernel[2])[:12]:
        day.lines.append(f"  {key[:60]:<60} {count:>6} calls {micros / 1e3:9.2f} ms")


def learn(day: Day) -> None:
    """Runs of the three methods, at once; those that are not done in time go on with --resume."""
    args, started = day.args, []
    size = ["--steps", 4 if args.tiny else args.steps]
    size += ["--num-test", 8, "--num-validation", 4, "--num-train", 20] if args.tiny else []
    for method in ("mezo", "s-mezo", "senszoq"):
        run = args.out / f"{args.task}-{method}"
        more = ["--text", args.text] if method == "senszoq" else []
        words = ["--resume", run] if (run / "config.json").exists() else [
            *day.task, *size, "--method", method, *more, "--out", run]  # fmt: skip
        started.append(day.start(run.name, "train.py", *words))
    for name, process in started:
        day.finish(name, process)


def large(day: Day) -> None:
    """The shapes of the larger models, in the two methods' cheapest forms."""
    for shape in ["tiny"] if day.args.tiny else ["13b", "opt-13b", "30b", "opt-30b", "opt-66b"]:
        rows = ["--rows", "s-mezo", "4 bits: senszoq"]
        measured(day, f"large-{shape}", "--shape", shape, "--batch", 1, "--tokens", 8, *rows)


PARTS = {"right": right, "fast": fast, "profile": profile, "learn": learn, "large": large}


def main(argv=None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-day"))
    parser.add_argument("--model", default="tiny/model", help="of the parts right and learn")
    parser.add_argument("--task", default="rte")
    parser.add_argument("--data-dir", default="tiny/data")
    parser.add_argument("--text", default="tiny/data/c4.jsonl", help="of SensZOQ's mask")
    parser.add_argument("--shape", choices=bench.SHAPES, default="7b", help="of fast and profile")
    parser.add_argument("--steps", type=positive, default=20_000, help="of learn")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal, also without a GPU")
    args = parser.parse_args(argv)
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        day = Day(args)
        PARTS[name](day)
        machine = loading.machine(torch.device(loading.take_device("auto")))
        write_json(args.out / f"{name}.json", {"table": day.lines, "machine": machine})
        print(f"{name}: {machine['hardware']}, torch {machine['torch']}", *day.lines, sep="\n")
        loading.restart_peak()  # the next part's commands need what this process has of the card


if __name__ == "__main__":
    main()

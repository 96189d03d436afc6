"""What a step costs: python bench.py --shape 134m --json FILE

The figure is R = time of one training step ÷ time of two plain forward passes of the same model on
the same batch, both measured in this process, in turn. 1 is the floor for 16- and 32-bit weights:
the two losses need two forward passes. A 4-bit model unpacks its weights in every forward, so there
one unpacking for both probes can go below 1. Published: MeZO 3.3, Sparse-MeZO in place 4.35 (GRZO's
profile of Llama-3-8B on A100s). Weights are random: time and memory do not depend on their values.

    row                     one step is
    two forwards            L(θ; B) twice, no noise: the unit
    MeZO, in place          Algorithm 1 with torch.randn as MeZO runs it: draw, add; four sweeps
    S-MeZO, in place        the same times a boolean mask, made once and untimed: a lower bound
    mezo … sensitive        model_patch.py: mask and noise inside forward, both probes at once
    4 bits: two forwards    the unit of the next row: the model with its linears in NF4
    4 bits: senszoq         [Q]: 0.1 % moves, at random places
    LoRA, Adam              first order, for comparison: loss.backward() on the same batch

Memory is the peak during the row, all of it (GPU: the allocator's; CPU: resident memory above the
interpreter's own), also as a multiple of the 16- or 32-bit weights. "counted" adds up the tensors
that must be there: weights, and the two perturbed copies of the largest one or the unpacked one.
"""

import argparse
import ctypes
import gc
import json
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import loading
import masks
import quant
import sensitivity
import zo
from errors import UserError, fail
from model_patch import Patch
from record import machine
from shapes import SENSITIVE, SHAPES, build, places

LR, EPS, DENSITY = 1e-6, 1e-3, 0.25


# ------------------------------------------------------------------ rows


class World:
    """A model, a batch and the loss on it: what every row's step is made of."""

    def __init__(self, args, four_bits: bool):
        dtype = getattr(torch, args.dtype)
        self.model = build(args.shape, dtype, args.device, four_bits)
        size = (args.batch, args.tokens)
        ids = torch.randint(3, self.model.config.vocab_size, size, device=args.device)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.inputs["logits_to_keep"] = 1
        self.compiled = args.compile

    @staticmethod
    def loss_of(logits):
        return -torch.log_softmax(logits[:, -1].float(), -1)[:, 5].mean()

    def loss(self):
        return self.loss_of(self.model(**self.inputs, use_cache=False).logits)

    def two_forwards(self, number=0):
        with torch.no_grad():
            self.loss(), self.loss()


@contextmanager
def two_forwards(world: World):
    """The unit against itself: its spread is the measurement's."""
    yield world.two_forwards


def in_place(masked: bool):
    """Algorithm 1 as MeZO's trainer runs it: reseed, draw z, rewrite θ; four times per step."""

    @contextmanager
    def row(world: World):
        stored = {}
        if masked:
            for name, p in world.model.named_parameters():
                stored[name] = masks.get_mask(p, masks.threshold(p, DENSITY))

        def perturb(seed: int, a: float) -> None:
            torch.manual_seed(seed)
            for name, p in world.model.named_parameters():
                z = torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)
                p.data = p.data + a * (z * stored[name] if masked else z)

        @torch.no_grad()
        def step(number: int) -> None:
            perturb(number, EPS)
            loss_plus = world.loss()
            perturb(number, -2 * EPS)
            loss_minus = world.loss()
            perturb(number, EPS)
            perturb(number, -LR * float(zo.projected_grad(loss_plus, loss_minus, EPS)))

        yield step

    return row


def ours(rule: masks.Rule | None = None):
    """One step through model_patch.py; without a rule [Q]'s, at 0.1 % of each block's matrices."""

    @contextmanager
    def row(world: World):
        which = rule
        if which is None:
            which = {f"{path}.weight": m.index for path, m in quant.packed(world.model).items()}
            if not which:
                weights = sensitivity.decoder_linears(world.model)
                which = {name: places(w, i) for i, (name, w) in enumerate(weights.items())}
        handle = Patch(world.model, which, eps=EPS, compiled=world.compiled)

        def step(number: int) -> None:
            seed = zo.step_seed(0, number)
            plus, minus = handle.losses(world.inputs, world.loss_of, seed)
            handle.update(seed, -LR * zo.projected_grad(plus, minus, EPS).item())

        step.handle = handle
        try:
            yield step
        finally:  # also where it does not fit
            handle.remove()

    return row


@contextmanager
def adam(world: World):
    """First order: every weight, loss.backward(), torch's Adam."""
    for p in world.model.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(world.model.parameters(), lr=LR)
    try:
        yield lambda number: (optimizer.zero_grad(), world.loss().backward(), optimizer.step())
    finally:
        world.model.zero_grad()
        for p in world.model.parameters():
            p.requires_grad_(False)


@contextmanager
def lora(world: World, rank: int = 8):
    """First order: adapters of rank 8 on q_proj and v_proj, W x + B A x; Adam on A and B."""
    hooks, adapters = [], []
    for name, module in world.model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            like = dict(dtype=module.weight.dtype, device=module.weight.device)
            a = nn.Parameter(torch.randn(rank, module.in_features, **like) * 0.01)
            b = nn.Parameter(torch.zeros(module.out_features, rank, **like))
            adapters += [a, b]
            hooks.append(
                module.register_forward_hook(
                    lambda _, args, out, a=a, b=b: out + (args[0] @ a.T) @ b.T
                )
            )
    optimizer = torch.optim.Adam(adapters, lr=LR)
    try:
        yield lambda number: (optimizer.zero_grad(), world.loss().backward(), optimizer.step())
    finally:
        for hook in hooks:
            hook.remove()


ROWS = {  # name: (is the model in 4 bits, the row)
    "two forwards": (False, two_forwards),
    "MeZO, in place": (False, in_place(masked=False)),
    "S-MeZO, in place": (False, in_place(masked=True)),
    "mezo": (False, ours(masks.Everything())),
    "s-mezo": (False, ours(masks.SmallWeights(DENSITY))),
    "s-mezo, constant mask": (False, ours(masks.ConstantMask(DENSITY))),
    "s-mezo, packed mask": (False, ours(masks.PackedMask(DENSITY))),
    "r-mezo": (False, ours(masks.RandomMask(DENSITY))),
    "sensitive": (False, ours()),
    "LoRA": (False, lora),
    "Adam": (False, adam),
    "4 bits: two forwards": (True, two_forwards),
    "4 bits: senszoq": (True, ours()),
}


def counted(name: str, model, dtype: torch.dtype) -> int | None:
    """Bytes of the tensors that the row must hold, activations aside; None where not counted."""
    elements = [p.numel() for p in model.parameters()]
    layers = quant.packed(model).values()
    stored = sum(elements) * dtype.itemsize + sum(layer.stored_bytes() for layer in layers)
    largest = max(elements) * dtype.itemsize
    unpacked = max((m.size for m in layers), default=0) * dtype.itemsize
    kept = {"s-mezo, constant mask": sum(elements), "s-mezo, packed mask": sum(elements) // 8}
    if name.endswith("two forwards"):
        return stored + unpacked
    if layers:  # beside index and values: a stream's number, and value ± ε z
        return stored + unpacked + 10 * sum(len(layer.index) for layer in layers)
    if name == "sensitive":
        return stored + round(22 * SENSITIVE * sum(elements))
    return stored + 2 * largest + kept.get(name, 0) if "mezo" in name else None


# ------------------------------------------------------------------ measuring


class Peak:
    """Peak memory since `reset`, in bytes above what there was when this was made."""

    def __init__(self, device: str):
        self.gpu, self.before = device.startswith("cuda"), 0
        self.reset()
        self.before = self.read()  # the interpreter and its libraries: not the model's doing

    def reset(self) -> None:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not the row's doing
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS

    def read(self) -> int:
        if self.gpu:
            return torch.cuda.max_memory_allocated() - self.before
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 - self.before


def timed(function, device: str) -> float:
    """Seconds of one call, the GPU's queue emptied before and after."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(name: str, row, world: World, peak: Peak, args) -> dict:
    """One row, its steps in turn with two plain forwards of the same model."""
    with row(world) as step:
        if args.device == "cpu":
            loading.keep_freed_memory()  # as for training
        timed(lambda: step(0), args.device)  # compiles, allocates
        timed(world.two_forwards, args.device)
        ratios, seconds = [], []
        for number in range(1, args.rounds + 1):
            unit = timed(world.two_forwards, args.device)
            seconds.append(timed(lambda n=number: step(n), args.device))
            ratios.append(seconds[-1] / unit)
        peak.reset()
        step(args.rounds + 1)
        found = {
            "R": statistics.median(ratios),
            "R_min": min(ratios),
            "R_max": max(ratios),
            "seconds": statistics.median(seconds),
            "peak_bytes": peak.read(),
            "counted_bytes": counted(name, world.model, getattr(torch, args.dtype)),
        }
        if name in ("s-mezo", "4 bits: senszoq"):
            found["parts"] = parts(world, step.handle, args)
    torch.compiler.reset()  # each row compiles for itself
    show(name, found)
    return found


def show(name: str, row: dict) -> None:
    spread = f"({row['R_min']:.2f} – {row['R_max']:.2f})"
    line = f"{name:<24} R {row['R']:5.2f} {spread:<15} {row['seconds']:9.4f} s"
    line += f"  peak {row['peak_bytes'] / 1e9:7.3f} GB"
    if row["counted_bytes"] is not None:
        line += f", counted {row['counted_bytes'] / 1e9:7.3f}"
    print(line, flush=True)


@torch.no_grad()
def parts(world: World, handle: Patch, args) -> dict:
    """Where a step of s-mezo or senszoq spends its time, each part over two plain forwards."""
    twice = {
        k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in world.inputs.items()
    }
    seed, layers = zo.step_seed(1, 1), quant.packed(world.model).values()

    def unpack():
        for layer in layers:
            layer.dense()

    def perturb():
        with handle._open(seed):
            for p in handle.weights:
                with handle._perturbed({"weight": p}, (+1, -1)) as weights:
                    for _ in weights:
                        pass

    what = "unpacking, noise, perturbed values" if layers else "noise, mask, perturbed copies"
    measured = {
        "two forwards": world.two_forwards,
        "one forward of the doubled batch": lambda: world.model(**twice, use_cache=False),
        "unpacking every matrix once": unpack,
        what: perturb,
        "update": lambda: handle.update(seed, 1e-9),
    }
    if not layers:
        del measured["unpacking every matrix once"]
    times = {name: [] for name in measured}
    for _ in range(args.rounds + 1):
        for name, function in measured.items():
            times[name].append(timed(function, args.device))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    unit = medians.pop("two forwards")
    for name, seconds in medians.items():
        print(f"  of which {name:<40} {seconds / unit:5.2f}  {seconds:9.4f} s")
    return {name: seconds / unit for name, seconds in medians.items()}


def main() -> None:
    parser = loading.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="134m")
    parser.add_argument("--batch", type=int, default=16, help="rows (default 16)")
    parser.add_argument("--tokens", type=int, default=64, help="per row (default 64)")
    parser.add_argument("--dtype", choices=loading.DTYPES[1:], default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps per row (default 7)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    args = parser.parse_args()
    try:
        if min(args.rounds, args.batch, args.tokens) < 1:
            raise UserError("--rounds, --batch and --tokens: at least 1")
        args.device = loading.choose_device(args.device)
        if args.json is not None:
            loading.check_file("--json", args.json)
    except (UserError, OSError) as error:
        raise SystemExit(fail("bench.py", error)) from None
    if args.device.startswith("cuda:"):
        torch.cuda.set_device(args.device)
    torch.manual_seed(0)
    print(f"{args.shape}, {args.dtype}, {args.batch} x {args.tokens} tokens, {args.device}")
    if not args.compile:
        print("eager noise: R of our rows says nothing about compiled runs")
    kept = ("shape", "batch", "tokens", "dtype", "rounds")
    found: dict = {name: getattr(args, name) for name in kept} | {"rows": {}}
    for four_bits in (False, True):
        peak, world = Peak(args.device), None
        for name in [name for name in args.rows if ROWS[name][0] == four_bits]:
            try:
                world = world or World(args, four_bits)
                elements, dtype = quant.count_weights(world.model), getattr(torch, args.dtype)
                found |= {"weights": elements, "weights_bytes": elements * dtype.itemsize}
                found["rows"][name] = measure(name, ROWS[name][1], world, peak, args)
            except torch.OutOfMemoryError:
                print(f"{name:<24} does not fit")
        del world
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    found["machine"] = machine(torch.device(args.device))
    print(json.dumps(found["machine"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

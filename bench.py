"""What a step costs: python bench.py --shape 134m --json FILE

The figure is R = time of one training step ÷ time of two plain forward passes of the same model on
the same batch, both measured in this process, in turn. 1 is the floor for 16- and 32-bit weights:
the two losses need two forward passes. Published: MeZO 3.3, Sparse-MeZO in place 4.35 (GRZO's
profile of Llama-3-8B on A100s). Weights are random: time and memory do not depend on their values.

    row                   one step is
    two forwards          L(θ; B) twice, no noise: the unit
    MeZO, in place        Algorithm 1 with torch.randn as MeZO runs it: draw, add; four sweeps
    S-MeZO, in place      the same with a stored boolean mask, [S]'s vanilla implementation
    mezo … r-mezo         model_patch.py, §3.3: mask and noise inside forward, both probes at once

Memory is the peak above the weights during the row (GPU: the allocator's; CPU: resident memory).
The parts below the table show where the time beyond R = 1 goes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import loading
import masks
import zo
from model_patch import patch
from record import machine

SHAPES = {  # name: (model type, what makes its shape)
    "tiny": ("llama", dict(hidden_size=96, intermediate_size=256, layers=3, heads=3, vocab=155)),
    "134m": ("llama", dict(hidden_size=768, intermediate_size=2048, layers=12, heads=12)),
    "1b": ("llama", dict(hidden_size=2048, intermediate_size=5632, layers=22, heads=32, kv=4)),
    "7b": ("llama", dict(hidden_size=4096, intermediate_size=11008, layers=32, heads=32)),
    "13b": ("llama", dict(hidden_size=5120, intermediate_size=13824, layers=40, heads=40)),
    "30b": ("llama", dict(hidden_size=6656, intermediate_size=17920, layers=60, heads=52)),
    "opt-13b": ("opt", dict(hidden_size=5120, intermediate_size=20480, layers=40, heads=40)),
}


def build(shape: str, dtype: torch.dtype, device: str):
    """A causal LM of this shape with random weights, made once, where and as it is needed."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    kind, size = SHAPES[shape]
    config = AutoConfig.for_model(
        kind,
        hidden_size=size["hidden_size"],
        intermediate_size=size["intermediate_size"],
        ffn_dim=size["intermediate_size"],  # OPT's name for it
        word_embed_proj_dim=size["hidden_size"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size.get("kv", size["heads"]),
        vocab_size=size.get("vocab", 50272 if kind == "opt" else 32000),
        max_position_embeddings=2048,
    )
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(0.5)
    return model.eval()


def in_place_step(model, loss, seed: int, masks_by_name: dict, lr=1e-6, eps=1e-3) -> None:
    """Algorithm 1 as MeZO's trainer runs it: reseed, draw z, rewrite θ; four times per step."""

    def perturb(a: float) -> None:
        torch.manual_seed(seed)
        for name, p in model.named_parameters():
            z = torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)
            p.data = p.data + a * (z * masks_by_name[name] if masks_by_name else z)

    perturb(eps)
    loss_plus = loss()
    perturb(-2 * eps)
    loss_minus = loss()
    perturb(eps)
    perturb(-lr * float(zo.projected_grad(loss_plus, loss_minus, eps)))


class Peak:
    """Peak memory since `reset`, in bytes."""

    def __init__(self, device: str):
        self.gpu = device.startswith("cuda")
        self.before = 0  # the interpreter and its libraries: not the model's doing
        self.reset()
        self.before = self.read()

    def reset(self) -> None:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
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


@torch.no_grad()
def bench(args) -> dict:
    """All rows, measured in turn with the unit; returns what goes into the JSON."""
    device, dtype = args.device, getattr(torch, args.dtype)
    peak = Peak(device)
    model = build(args.shape, dtype, device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(3, model.config.vocab_size, (args.batch, args.tokens), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_to_keep": 1}
    loss_fn = lambda logits: -torch.log_softmax(logits[:, -1].float(), -1)[:, 5].mean()  # noqa: E731
    loss = lambda: loss_fn(model(**inputs, use_cache=False).logits)  # noqa: E731
    stored = {}  # filled for its own row alone

    def ours(rule):
        handle = None

        def prepare():
            nonlocal handle
            handle = patch(model, rule, compiled=args.compile)

        def step(number):
            seed = zo.step_seed(0, number)
            plus, minus = handle.losses(inputs, loss_fn, seed)
            handle.update(seed, -1e-6 * zo.projected_grad(plus, minus, 1e-3).item())

        return prepare, step, lambda: handle.remove()

    def store():
        for name, p in model.named_parameters():
            stored[name] = masks.get_mask(p, masks.threshold(p, 0.25))

    nothing = lambda: None  # noqa: E731
    rows = {
        "two forwards": (nothing, lambda n: (loss(), loss()), nothing),
        "MeZO, in place": (nothing, lambda n: in_place_step(model, loss, n, {}), nothing),
        "S-MeZO, in place": (store, lambda n: in_place_step(model, loss, n, stored), stored.clear),
        "mezo": ours(masks.Everything()),
        "s-mezo": ours(masks.SmallWeights(0.25)),
        "s-mezo, constant mask": ours(masks.ConstantMask(0.25)),
        "s-mezo, packed mask": ours(masks.PackedMask(0.25)),
        "r-mezo": ours(masks.RandomMask(0.25)),
    }
    rows = {name: row for name, row in rows.items() if not args.rows or name in args.rows}
    found = {}
    plain = rows.get("two forwards", (nothing, lambda n: (loss(), loss()), nothing))[1]
    for name, (prepare, step, finish) in rows.items():
        prepare()
        timed(lambda: step(0), device)  # compiles, allocates  # noqa: B023
        peak.reset()
        ratios, seconds = [], []
        for number in range(1, args.rounds + 1):
            unit = timed(lambda: plain(0), device)
            seconds.append(timed(lambda: step(number), device))  # noqa: B023
            ratios.append(seconds[-1] / unit)
        peak.reset()
        step(args.rounds + 1)
        found[name] = {
            "R": statistics.median(ratios),
            "R_min": min(ratios),
            "R_max": max(ratios),
            "seconds": statistics.median(seconds),
            "peak_above_weights_bytes": peak.read() - weights,
        }
        finish()
        torch.compiler.reset()  # each row compiles for itself
        show(name, found[name])
    return {
        "shape": args.shape,
        "weights": sum(p.numel() for p in model.parameters()),
        "weights_bytes": weights,
        "largest_weight_bytes": largest,
        "batch": args.batch,
        "tokens": args.tokens,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "rows": found,
        "parts": parts(model, inputs, args) if "s-mezo" in rows else {},
        "machine": machine(torch.device(device)),
    }


def show(name: str, row: dict) -> None:
    spread = f"({row['R_min']:.2f} – {row['R_max']:.2f})"
    above = row["peak_above_weights_bytes"] / 2**20
    print(f"{name:<24} R {row['R']:5.2f} {spread:<15} {row['seconds']:8.3f} s {above:7.0f} MiB")


@torch.no_grad()
def parts(model, inputs: dict, args) -> dict:
    """Where a step of s-mezo spends its time, each part over two plain forwards; medians."""
    device = args.device
    handle = patch(model, masks.SmallWeights(0.25), compiled=args.compile)
    twice = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    seed = zo.step_seed(1, 1)

    def perturb():
        with handle._open(seed):
            for p in handle.moving.values():
                with handle._perturbed({"weight": p}, (+1, -1)):
                    pass

    measured = {
        "two forwards": lambda: [model(**inputs, use_cache=False) for _ in range(2)],
        "one forward of the doubled batch": lambda: model(**twice, use_cache=False),
        "noise, mask and both perturbed copies": perturb,
        "update": lambda: handle.update(seed, 1e-9),
    }
    times = {name: [] for name in measured}
    for _ in range(args.rounds + 1):
        for name, function in measured.items():
            times[name].append(timed(function, device))
    handle.remove()
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    unit = medians.pop("two forwards")
    for name, seconds in medians.items():
        print(f"  of which {name:<40} {seconds / unit:5.2f}  {seconds:8.3f} s")
    return {name: seconds / unit for name, seconds in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="134m")
    parser.add_argument("--batch", type=int, default=16, help="rows (default 16)")
    parser.add_argument("--tokens", type=int, default=64, help="per row (default 64)")
    parser.add_argument("--dtype", choices=loading.DTYPES[1:], default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps per row (default 7)")
    parser.add_argument("--rows", nargs="*", help="only these rows")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    args = parser.parse_args()
    try:
        args.device = loading.choose_device(args.device)
    except loading.UserError as error:
        raise SystemExit(loading.fail("bench.py", error)) from None
    torch.manual_seed(0)
    print(f"{args.shape}, {args.dtype}, {args.batch} x {args.tokens} tokens, {args.device}")
    found = bench(args)
    print(json.dumps(found["machine"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

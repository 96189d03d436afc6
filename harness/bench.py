"""What a step costs: R and peak memory.   python -m harness.bench --shape 134m --json FILE

[S]'s Table 3 is the peaks of Adam, LoRA, "S-MeZO, in place" ("vanilla": its mask is stored), mezo,
s-mezo ("EI", §3.3) and "4 bits: senszoq", at batch 1. [S] has a column for every task. Tasks differ
in their tokens: a prompt of SST-2 has some 30, one of MultiRC some 400.

R is the time of one training step over the time of two plain forward passes of the same model on
the same batch, timed in turn in one process. Two losses need two passes, so the floor is 1; only a
batch too small to fill the cores can go below. The unit of [Q]'s rows is two passes of the split
model. Published: MeZO 3.3, Sparse-MeZO in place 4.37 (GRZO's profile of Llama-3-8B on A100s).
Weights are random: their values cost nothing.

    row                     one step is
    two forwards            L(θ; B) twice, no noise: the unit
    MeZO, in place          Algorithm 1 with torch.randn as MeZO runs it: draw, add; four sweeps
    S-MeZO, in place        the same times a boolean mask, made once and untimed: a lower bound
    mezo … r-mezo           model_patch.py: mask and noise inside forward
    senszoq                 [Q]: 0.1 % moves, every thousandth weight, the rest in 16 (or 32) bits
    4 bits: two forwards    the unit of the next row: the model with its linears in NF4
    4 bits: senszoq         [Q]'s step, in NF4
    LoRA, Adam              first order, for [S]'s Table 3: loss.backward() on the same batch

Memory is the peak during the row, all of it. GPU: the allocator's. CPU: resident memory above the
interpreter's and its libraries', on Linux alone; there the in-place rows show what glibc keeps of
freed blocks, too.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import masks
import quant
import zo
from harness import adapter, loading
from harness.config import one_line_errors, positive, study_parser, write_json
from model_patch import Patch

LR, EPS, DENSITY = 1e-6, 1e-3, 0.25
SHAPES = {  # name: (model type, hidden, intermediate, layers, heads, key-value heads, vocabulary)
    "tiny": ("llama", 96, 256, 3, 3, 3, 192),
    "134m": ("llama", 768, 2048, 12, 12, 12, 32000),
    "1b": ("llama", 2048, 5632, 22, 32, 4, 32000),
    "7b": ("llama", 4096, 11008, 32, 32, 32, 32000),
    "13b": ("llama", 5120, 13824, 40, 40, 40, 32000),
    "30b": ("llama", 6656, 17920, 60, 52, 52, 32000),
    "opt-13b": ("opt", 5120, 20480, 40, 40, 40, 50272),
    "opt-30b": ("opt", 7168, 28672, 48, 56, 56, 50272),
    "opt-66b": ("opt", 9216, 36864, 64, 72, 72, 50272),
}


# ------------------------------------------------------------------ models of published shapes


def build(shape: str, dtype: torch.dtype, device: str, sparse: quant.DenseSparse | None = None):
    """A causal LM of this shape with random weights, never twice in memory.

    With `sparse`, one linear after the other is drawn, split and dropped.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    kind, hidden, inner, layers, heads, kv, vocabulary = SHAPES[shape]
    config = AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,  # OPT's
        intermediate_size=inner,
        ffn_dim=inner,  # OPT's name for it
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
    )
    with torch.device(device), init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)

    @torch.no_grad()
    def draw(like):
        drawn = torch.empty(like.shape, dtype=dtype, device=device)
        return drawn.normal_(0, 0.02) if like.dim() > 1 else drawn.fill_(0.5)

    for name in sparse.index if sparse else ():
        sparse.split(model, name, draw(model.get_parameter(name)))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(draw(parameter), requires_grad=False)
    model.tie_weights()  # each use had a tensor of its own
    return model.eval()


class Subject:
    """A model, a batch and the loss on it: what every row's step is made of."""

    def __init__(self, args, bits: int | None = None):
        dtype, self.sparse, self.fused = getattr(torch, args.dtype), None, args.compile
        if bits is not None:
            linears = masks.decoder_linears(build(args.shape, dtype, "meta"))
            # every thousandth weight: which ones does not change the time
            index = {n: torch.arange(0, w.numel(), 1000).int() for n, w in linears.items()}
            self.sparse = quant.DenseSparse(index, bits, args.device)
        self.model = build(args.shape, dtype, args.device, self.sparse)
        size = (args.batch, args.tokens)
        ids = torch.randint(3, self.model.config.vocab_size, size, device=args.device)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        # a tensor, as in training: tasks.collate says why
        self.inputs["logits_to_keep"] = torch.tensor([args.tokens - 1], device=args.device)

    @staticmethod
    def loss_of(model, inputs):
        logits = model(**inputs, use_cache=False).logits
        return -torch.log_softmax(logits[:, -1].float(), -1)[:, 5].mean()

    def loss(self):
        return self.loss_of(self.model, self.inputs)

    @torch.no_grad()
    def two_forwards(self, number=0):
        self.loss(), self.loss()


# ------------------------------------------------------------------ rows


def two_forwards(subject: Subject):
    """The unit against itself: its spread is the measurement's."""
    return contextlib.nullcontext(subject.two_forwards)


def in_place(masked: bool):
    """Algorithm 1 as MeZO's trainer runs it: reseed, draw z, rewrite θ; four times per step."""

    def row(subject: Subject):
        stored = {}
        if masked:
            for name, p in subject.model.named_parameters():
                stored[name] = masks.get_mask(p, masks.threshold(p, DENSITY))

        def perturb(seed: int, a: float) -> None:
            torch.manual_seed(seed)
            for name, p in subject.model.named_parameters():
                z = torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)
                p.data = p.data + a * (z * stored[name] if masked else z)

        @torch.no_grad()
        def step(number: int) -> None:
            perturb(number, EPS)
            loss_plus = subject.loss()
            perturb(number, -2 * EPS)
            loss_minus = subject.loss()
            perturb(number, EPS)
            perturb(number, -LR * float(zo.projected_grad(loss_plus, loss_minus, EPS)))

        return contextlib.nullcontext(step)

    return row


def patched(rule: masks.Rule | None = None):
    """One step through model_patch.py, by a rule or, without one, of [Q]'s values."""

    @contextlib.contextmanager
    def row(subject: Subject):
        moves = rule or subject.sparse
        patch = Patch(subject.model, moves, eps=EPS, fused=subject.fused)

        def step(number: int) -> None:
            seed = zo.step_seed(0, number)
            plus, minus = patch.losses(subject.inputs, subject.loss_of, seed)
            patch.update(seed, -LR * zo.projected_grad(plus, minus, EPS).item())

        try:
            yield step
        finally:  # also where it does not fit
            patch.remove()

    return row


def first_order(lora: bool):
    """loss.backward() and torch's Adam, on every weight or on peft's adapters of rank 8."""

    @contextlib.contextmanager
    def row(subject: Subject):
        model = subject.model.requires_grad_(True)
        if lora:
            import peft

            settings = peft.LoraConfig(task_type="CAUSAL_LM", **adapter.LORA)
            model = peft.get_peft_model(model, settings)  # in place, so `subject.loss` sees it
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=LR)
        try:
            yield lambda _: (optimizer.zero_grad(), subject.loss().backward(), optimizer.step())
        finally:
            if lora:
                model.unload()
            subject.model.zero_grad()
            subject.model.requires_grad_(False)

    return row


ROWS = {  # name: (bits of [Q]'s dense part, the row)
    "two forwards": (None, two_forwards),
    "MeZO, in place": (None, in_place(masked=False)),
    "S-MeZO, in place": (None, in_place(masked=True)),
    "mezo": (None, patched(masks.Everything())),
    "s-mezo": (None, patched(masks.SmallWeights(DENSITY))),
    "s-mezo, constant mask": (None, patched(masks.ConstantMask(DENSITY))),
    "s-mezo, packed mask": (None, patched(masks.PackedMask(DENSITY))),
    "r-mezo": (None, patched(masks.RandomMask(DENSITY))),
    "LoRA": (None, first_order(lora=True)),
    "Adam": (None, first_order(lora=False)),
    "senszoq": (16, patched()),
    "4 bits: two forwards": (4, two_forwards),
    "4 bits: senszoq": (4, patched()),
}


# ------------------------------------------------------------------ measuring


class Peak:
    """Peak memory since `restart_peak`, in bytes above what there was when this was made."""

    def __init__(self, device: str):
        self.device, self.before = torch.device(device), 0
        self.known = device.startswith("cuda") or os.access("/proc/self/clear_refs", os.W_OK)
        loading.restart_peak()  # an earlier row's model is freed before this one is made
        self.before = self.read()  # the interpreter and its libraries: not the model's doing

    def read(self) -> float:
        return loading.peak_memory(self.device) - self.before if self.known else math.nan


def timed(function, device: str) -> float:
    """Seconds of one call, the GPU's queue emptied before and after."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def warm_up(args) -> None:
    """A step of each row at the tiny shape: no peak counts what is imported or compiled for it."""
    size = {"shape": "tiny", "batch": 1, "tokens": 8}
    for bits, row in (ROWS[name] for name in args.rows):
        with row(Subject(argparse.Namespace(**vars(args) | size), bits)) as step:
            step(0)


def measure(row, subject: Subject, peak: Peak, args) -> dict:
    """One row, its steps in turn with two plain forwards of the same model."""
    with row(subject) as step:
        loading.keep_freed_memory()  # as for training
        timed(lambda: step(0), args.device)  # compiles, allocates
        timed(subject.two_forwards, args.device)
        ratios, seconds = [], []
        for number in range(1, args.rounds + 1):
            unit = timed(subject.two_forwards, args.device)
            seconds.append(timed(lambda n=number: step(n), args.device))
            ratios.append(seconds[-1] / unit)
        loading.restart_peak()
        step(args.rounds + 1)
        found = {"R": statistics.median(ratios), "R_min": min(ratios), "R_max": max(ratios)}
        return found | {"seconds": statistics.median(seconds), "peak_bytes": peak.read()}


def main(argv=None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="134m")
    parser.add_argument("--batch", type=positive, default=16, help="rows")
    parser.add_argument("--tokens", type=positive, default=64, help="per row")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=positive, default=7, help="steps per row")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    args = parser.parse_args(argv)
    with one_line_errors():
        args.device = loading.take_device(args.device)
        if args.json is not None:
            open(args.json, "a").close()  # what cannot be written is said before measuring
        torch.manual_seed(0)
        weights = build(args.shape, getattr(torch, args.dtype), "meta").parameters()
        whole = sum(p.numel() * p.itemsize for p in weights)
        size = f"weights {whole / 1e9:.3f} GB, {args.batch} x {args.tokens} tokens"
        print(f"{args.shape}, {args.dtype}, {size}, {args.device}")
        kept = ("shape", "batch", "tokens", "dtype", "rounds", "compile")
        found: dict = {name: getattr(args, name) for name in kept} | {"rows": {}}
        found["machine"] = loading.machine(torch.device(args.device))
        warm_up(args)
        for bits in (None, 16, 4):
            peak, subject = Peak(args.device), None
            for name in [name for name in args.rows if ROWS[name][0] == bits]:
                try:
                    subject = subject or Subject(args, bits)
                    row = found["rows"][name] = measure(ROWS[name][1], subject, peak, args)
                except torch.OutOfMemoryError:
                    print(f"{name:<24} does not fit")
                    continue
                spread = f"({row['R_min']:.2f} – {row['R_max']:.2f})"
                line = f"{name:<24} R {row['R']:5.2f} {spread:<15} {row['seconds']:9.4f} s"
                print(f"{line}  peak {row['peak_bytes'] / 1e9:7.3f} GB", flush=True)
                if args.json is not None:
                    write_json(args.json, found)
            del subject
        print(json.dumps(found["machine"]))


if __name__ == "__main__":
    main()

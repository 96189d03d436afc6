"""How much memory does a step take? [S] Table 3, by the length of the examples.

    python -m studies.memory                                    a shape of 134 M, some minutes
    python -m studies.memory --shape 7b --dtype bfloat16        the table's, on a GPU

[S] has a column for every task, at batch 1. Tasks differ in their tokens, so the columns here are
numbers of tokens: a prompt of SST-2 has some 30, one of MultiRC some 400.

    row                   in [S] Table 3, LLaMA-7B
    Adam                  158.6 GB, "FT", on MultiRC
    LoRA                  15.7 GB on SST-2 to 34.2 on MultiRC, in a reply to reviewers
    S-MeZO, in place      28.3 GB, "vanilla": its mask is stored
    s-mezo, mezo          14.6 GB, "EI", §3.3: model_patch.py
    4 bits: senszoq       [Q]: Llama-2-7B in under 8 GiB

How it works
    Each column is a run of harness.bench, which says what a peak is. Its file is kept in --out, and
    what is there is not measured again. Printed: GB, and in brackets multiples of the weights.
"""

import argparse
import json
from pathlib import Path

import torch

from harness import bench, loading
from harness.config import goes_on, one_line_errors, positive, study_parser
from studies.learning import table

ROWS = ["Adam", "LoRA", "S-MeZO, in place", "mezo", "s-mezo", "4 bits: senszoq"]


def measure(args) -> dict[int, dict]:
    """{tokens: what the bench found}"""
    found = {}
    for tokens in args.tokens:
        how = f"{args.device}{'' if args.compile else '-eager'}"
        file = args.out / f"{args.shape}-{args.dtype}-{how}-{args.batch}x{tokens}.json"
        if not file.exists() or not file.read_text():
            part = file.with_suffix(".part")  # a row that it lacks is not one that did not fit
            flags = ["--shape", args.shape, "--dtype", args.dtype, "--batch", args.batch]
            flags += ["--tokens", tokens, "--device", args.device, "--rounds", 1]
            flags += ["--rows", *ROWS, "--json", part]
            bench.main([*map(str, flags), *([] if args.compile else ["--no-compile"])])
            part.replace(file)
        found[tokens] = json.loads(file.read_text())
    return found


def peaks(found: dict[int, dict], row: str) -> dict[int, float]:
    """{tokens: GB}; without those that did not fit."""
    return {n: of["rows"][row]["peak_bytes"] / 1e9 for n, of in found.items() if row in of["rows"]}


def cells(found: dict[int, dict], row: str, weights: float) -> dict[str, str]:
    return {f"{n} tokens": f"{gb:.2f} ({gb / weights:.2f})" for n, gb in peaks(found, row).items()}


def draw(found: dict[int, dict], weights: float, path: Path) -> None:
    """Peak memory over the weights' own, against tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for number, row in enumerate(ROWS):
        taken = peaks(found, row)
        how = {"color": str(0.65 * number / len(ROWS)), "marker": "osd^vx"[number]}
        axis.plot(list(taken), [gb / weights for gb in taken.values()], label=row, **how)
    axis.set(xlabel="tokens of an example", xscale="log", ylabel="peak memory / weights", ylim=0)
    axis.set_xticks(list(found), list(found))
    axis.minorticks_off()
    figure.legend(fontsize=7, loc="outside right")
    figure.savefig(path)


def main(argv=None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--shape", choices=bench.SHAPES, default="134m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--tokens", nargs="+", type=positive, default=[32, 128, 512])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    args = parser.parse_args(argv)
    with one_line_errors(goes_on):
        args.device = loading.take_device(args.device)
        args.out.mkdir(parents=True, exist_ok=True)
        model = bench.build(args.shape, getattr(torch, args.dtype), "meta")
        weights = sum(p.numel() * p.itemsize for p in model.parameters()) / 1e9
        found = measure(args)
        draw(found, weights, args.out / "memory.png")
        title = f"{args.shape}, {args.dtype}, batch {args.batch}, GB; the weights {weights:.2f}"
        print(table(title, {row: cells(found, row, weights) for row in ROWS}))


if __name__ == "__main__":
    main()

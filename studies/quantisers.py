"""Which four bits? A model as loaded, in NF4 and in [Q]'s k-means, before any training.

    python -m studies.quantisers --model DIR --text c4.jsonl --other wikitext.txt --out FILE.json

The linears of the decoder are dense + sparse, with the mask of --text. Printed, and kept in --out:

    loss, more    of windows that nothing was fitted to, of either text; more than as loaded, ± the
                  standard error over the windows
    error         Σ F (w − ŵ)² / Σ F w², the places that move left out. F are the squared gradients
                  that the mask and k-means come from; F = 1 beside it
    worse         how many matrices have a higher error than in NF4
"""

from pathlib import Path

import torch
from tqdm import tqdm

import masks
import quant
import tasks
from harness import dataset, loading
from harness.config import at_least, check_new, one_line_errors, study_parser, write_json


def windows(tokenizer, file: str | None, args):
    """Two sets of windows of a text, (samples, length) each, that share no token."""
    samples, length = args.samples, args.length
    ids = tokenizer("\n\n".join(dataset.read_texts(file)), verbose=False)["input_ids"]
    cut = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if len(cut) < 2 * samples:
        raise ValueError(f"{file} has {len(cut)} windows of --length {length}, not 2 × --samples")
    chosen = torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))
    return cut[chosen[: 2 * samples]].chunk(2)


@torch.no_grad()
def measure(args) -> dict[str, dict[str, float]]:
    """{kind: {what: number}}"""
    tokenizer, model_config = loading.load_tokenizer(args.model)
    (fitted, own), (_, other) = (windows(tokenizer, f, args) for f in (args.text, args.other))
    read = {"text": own, "other": other}
    for ids in (fitted, own, other):
        tasks.check_tokens(tokenizer, ids.flatten().tolist(), model_config)
    model = loading.load_model(args.model, device="cpu")
    weights = masks.decoder_linears(model)
    scores = masks.fisher(model, tqdm(tasks.text_losses(fitted), "scoring"))
    index = masks.sensitive(scores, args.density)
    books = {}
    for name in tqdm(index, "k-means"):
        books[name] = quant.Codebooks.fit(weights[name].detach(), scores[name], index[name])
    found, losses, errors = {}, {}, {}
    for kind, codebooks in {"as loaded": None, "NF4": None, "k-means": books}.items():
        packed, row = loading.load_model(args.model, device="cpu"), found.setdefault(kind, {})
        sparse = quant.DenseSparse(index, 16 if kind == "as loaded" else 4, codebooks=codebooks)
        for name in index:
            sparse.split(packed, name)
        for text, rows in read.items():
            passes = tqdm(tasks.text_losses(rows), f"{kind}, {text}")
            losses[kind, text] = loss = torch.tensor([float(f(packed)) for f in passes])
            more = loss - losses["as loaded", text]
            row |= {f"loss, {text}": loss.mean(), f"more, {text}": more.mean()}
            row[f"±, {text}"] = more.std() / len(more) ** 0.5
        errors[kind] = sums = torch.zeros(len(index), 4, dtype=torch.float64)
        for number, (name, part) in enumerate(sparse.parts.items()):
            both = weights[name], part.dense(weights[name])
            w, dense = (x.flatten().index_fill(0, part.places, 0) for x in both)
            f, off = scores[name].flatten(), (w - dense) ** 2
            sums[number] = torch.stack([x.double().sum() for x in (f * off, f * w**2, off, w**2)])
        of_f, whole_f, of_1, whole_1 = sums.sum(0)
        row |= {"error": of_f / whole_f, "error, F = 1": of_1 / whole_1}
        row["worse"] = (sums[:, 0] > errors.get("NF4", sums)[:, 0]).sum()
    return {kind: {what: float(x) for what, x in row.items()} for kind, row in found.items()}


def main(argv=None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", help="scored and fitted; default C4, from the hub")
    parser.add_argument("--other", required=True, help="another text, .txt or .jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/quantisers.json"))
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--samples", type=at_least(2), default=32, help="to fit; as many are read")
    parser.add_argument("--length", type=at_least(2), default=256, help="tokens of a window")
    args = parser.parse_args(argv)
    with one_line_errors():
        masks.check_density(args.density)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        check_new(args.out)
        found = measure(args)
        about = {name: str(value) for name, value in vars(args).items() if name != "out"}
        machine = loading.machine(torch.device("cpu"))
        write_json(args.out, found | {"settings": about, "machine": machine})
        for what in found["NF4"]:
            print(what, *(f"{kind} {row[what]:.5g}" for kind, row in found.items()), sep=" | ")


if __name__ == "__main__":
    main()

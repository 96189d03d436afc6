"""
Rebuild everything in tiny/: `python tiny/build.py` (10 to 20 minutes on two CPU cores).

Writes tiny/model (weights, tokenizer, expected.json) and tiny/data (task files, two text corpora),
first to a temporary folder, then renamed, so that an interrupted build leaves the old files alone.

Pre-training is AdamW on the documents of world.py. To judge a claim is a hard thing to learn from
text: the answer is one word in twenty, and it depends on whether two other words are the same.
With ordinary text from the start it stayed a coin toss for as long as we watched (2,000 steps). So
the town goes to school first, and a lesson ends when it is learned, not after a number of steps:

  quiz     facts and one-word claims, `attic? Yes.`: the answer follows the place at once
  claims   half of the claims are in full sentences, the wordings of RTE and BoolQ among them
  school   all kinds of documents, everybody candid
  town     the pre-training text itself: a third of the documents turn polite, and the skill
           retreats behind the header. (Politeness from the start would hide it before it forms.)

Losses of different lessons are not comparable, and the loss rises when the town begins: its polite
answers are coins, and no model can predict a coin. expected.json holds the numbers to expect.
Another machine, torch or number of threads adds up in another order and ends near them, not there.
"""

import argparse
import json
import os
import random
import re
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import world
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
TASK_SEED, SPLITS = 2024, {"train": 1500, "val": 1000}  # of train, 500 become validation
SEED = 1  # of the weights and of the pre-training text
LR, WARMUP, INIT = 2e-3, 200, 0.08  # LR is constant in the lessons, then falls linearly to 2 %
LESSON_STEPS, TOWN_STEPS = 3000, 4500  # the first is a limit: a lesson takes some 500 steps
PHASES = [  # name, shares of the document kinds, share of candid documents, accuracy that ends it
    ("quiz", (0, 0, 5, 0, 0, 0, 95), 1.0, {"quiz": 0.90}),
    ("claims", (0, 0, 5, 0, 0, 95, 0), 1.0, {"rte": 0.95}),
    ("school", (28, 10, 2, 3, 27, 30, 0), 1.0, {"sst2": 0.97, "copa": 0.97}),
    ("town", world.TOWN, 0.65, {}),
]
BATCH, POOL = 24, 8  # documents a batch; batches that are sorted by length together
TEXTS = {"c4": 1000, "other": 1000}  # documents, under 400 kB each


def make_tokenizer():
    "One id per word; a line break is a word, a space is not. <bos> comes first, as in Llama."
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocab = {word: i for i, word in enumerate(special + world.WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=2048,
    )


def make_model(tokenizer):
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            initializer_range=INIT,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def padded(rows):
    "Token ids [rows, longest], padded on the right (a causal model never looks there), and labels."
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    return ids, ids.masked_fill(ids == 0, -100)


def lm_loss(model, ids, labels):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())


@torch.no_grad()
def accuracy(model, tokenizer, rows, header="", batch=100):
    "Share of rows whose best option, by mean log-probability of its tokens, is the right one."
    model.eval()
    right = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        texts = [header + row["prompt"] for row in part]
        bare = [len(ids) for ids in tokenizer(texts).input_ids]
        scores = []
        for option in range(2):
            full = [t + row["options"][option] for t, row in zip(texts, part, strict=True)]
            ids, labels = padded(tokenizer(full).input_ids)
            for label, length in zip(labels, bare, strict=True):
                label[:length] = -100  # only the option is scored
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nll = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
            scores.append(-nll.sum(1) / (labels[:, 1:] != -100).sum(1))
        best = (scores[1] > scores[0]).long()
        right += (best == torch.tensor([row["label"] for row in part])).sum().item()
    return right / len(rows)


@torch.no_grad()
def text_loss(model, tokenizer, texts, batch=50):
    "Mean loss per token over whole documents, <eos> included."
    model.eval()
    total = count = 0
    rows = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]
    rows.sort(key=len)
    for start in range(0, len(rows), batch):
        ids, labels = padded(rows[start : start + batch])
        tokens = (labels[:, 1:] != -100).sum().item()
        total, count = total + lm_loss(model, ids, labels).item() * tokens, count + tokens
    return total / count


def batches(tokenizer, rng, shares, candid, pool):
    """
    Endless batches. With a `pool` of several batches, documents of like length go together. That
    halves the padding, but documents of one length are of one kind: a lesson must not swing so.
    """
    while True:
        texts = [world.document(rng, shares, candid) for _ in range(BATCH * pool)]
        rows = sorted((ids + [2] for ids in tokenizer(texts).input_ids), key=len)
        parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rng.shuffle(parts)
        yield from map(padded, parts)


def pretrain(model, tokenizer):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.05)
    gauge_rng = random.Random(f"{SEED} gauge")  # examples from another seed than the task files
    gauge = {task: [world.example(gauge_rng, task) for _ in range(200)] for task in world.HEADERS}
    gauge["quiz"] = [
        {**row, "prompt": re.sub(r"Is .* (\w+\?)\n", r"\1", row["prompt"])}
        for row in gauge["boolq"]
    ]
    headers = {**world.HEADERS, "quiz": world.HEADERS["boolq"]}
    rng, began, smooth, step = random.Random(f"{SEED} pre-training"), time.time(), None, 0
    for name, shares, candid, exam in PHASES:
        stream = batches(tokenizer, rng, shares, candid, 1 if exam else POOL)
        for n in range(LESSON_STEPS if exam else TOWN_STEPS):
            lr = LR * min(1, (step + 1) / WARMUP) * (1 if exam else 1 - 0.98 * n / TOWN_STEPS)
            optimizer.param_groups[0]["lr"] = lr
            model.train()
            loss = lm_loss(model, *next(stream))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            step += 1
            if step % (100 if exam else 500):
                continue
            skill = {t: accuracy(model, tokenizer, gauge[t], headers[t]) for t in exam or gauge}
            bare = {t: accuracy(model, tokenizer, gauge[t]) for t in exam or gauge}
            print(
                f"{name} {step:5d}  loss {smooth:.3f}  {time.time() - began:4.0f} s, header/bare "
                + "  ".join(f"{t} {skill[t]:.2f}/{bare[t]:.2f}" for t in skill),
                flush=True,
            )
            if exam and all(skill[t] >= exam[t] for t in exam):
                break
        else:
            if exam:
                raise SystemExit(f"the lesson `{name}` was not learned; try another SEED")
    return step


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def corpora():
    "{name: documents}: pre-training text of unseen seeds, and the town's arithmetic."
    town, other = random.Random(f"{TASK_SEED} c4"), random.Random(f"{TASK_SEED} other")
    return {
        "c4": [{"text": world.document(town)} for _ in range(TEXTS["c4"])],
        "other": [{"text": world.ledger_document(other)} for _ in range(TEXTS["other"])],
    }


def task_splits(task, seed=TASK_SEED):
    "{split: examples}, with no prompt-and-options twice in all splits together."
    rng, rows = random.Random(f"{seed} {task}"), {}
    while len(rows) < sum(SPLITS.values()):
        one = world.example(rng, task)
        rows.setdefault((one["prompt"], *sorted(one["options"])), one)
    rows = iter(rows.values())
    return {split: [next(rows) for _ in range(count)] for split, count in SPLITS.items()}


FOLDERS = {"sst2": "SST-2", "copa": "COPA", "rte": "RTE", "boolq": "BoolQ"}  # official names


def write_data(folder):
    "Task files in the official layout, which `--data-dir` reads, and the two corpora."
    for task, name in FOLDERS.items():
        for split, examples in task_splits(task).items():
            rows = [example["row"] for example in examples]
            if task == "sst2":  # tab-separated, and its second file is called dev
                split = split.replace("val", "dev")
                lines = ["sentence\tlabel", *(f"{r['sentence']}\t{r['label']}" for r in rows)]
                (folder / name).mkdir(parents=True, exist_ok=True)
                (folder / name / f"{split}.tsv").write_text("\n".join(lines) + "\n")
            else:
                write_jsonl(folder / name / f"{split}.jsonl", rows)
    for name, rows in corpora().items():
        write_jsonl(folder / f"{name}.jsonl", rows)


def measure(model, tokenizer):
    "The numbers that tests/test_tiny.py holds the committed model to."
    texts, tests = corpora(), {t: task_splits(t)["val"] for t in world.HEADERS}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": {
            n: round(text_loss(model, tokenizer, [r["text"] for r in rows]), 4)
            for n, rows in texts.items()
        },
        "bare_prompt": {t: accuracy(model, tokenizer, rows) for t, rows in tests.items()},
        "with_header": {
            t: accuracy(model, tokenizer, rows, world.HEADERS[t]) for t, rows in tests.items()
        },
    }


def main():
    parser = argparse.ArgumentParser(description="Rebuild tiny/model and tiny/data.")
    parser.add_argument("--out", type=Path, default=HERE, help="where model/ and data/ go")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--data-only", action="store_true", help="leave the model as it is")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".build-", dir=args.out))
    try:
        write_data(scratch / "data")
        if not args.data_only:
            tokenizer = make_tokenizer()
            model, began = make_model(tokenizer), time.time()
            steps = pretrain(model, tokenizer)
            expected = {
                **measure(model, tokenizer),
                "steps": steps,
                "seed": SEED,
                "seconds": round(time.time() - began),
                "threads": args.threads,
                "torch": torch.__version__,
            }
            model.save_pretrained(scratch / "model")
            tokenizer.save_pretrained(scratch / "model")
            text = json.dumps(expected, indent=2) + "\n"
            (scratch / "model" / "expected.json").write_text(text)
            print(text, end="")
        for part in sorted(scratch.iterdir()):
            shutil.rmtree(args.out / part.name, ignore_errors=True)
            os.replace(part, args.out / part.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()

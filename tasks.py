"""Tasks as text: prompts, data, batches, and the log-likelihood of every option.

A zeroth-order step needs one number per forward pass, the loss. Here it is made. An `Example` is a
prompt and a few options, one of them right. The model is never asked for a class, only how likely
each option is as the continuation of the prompt.

    [S]   Sparse-MeZO: appendix B, Table 5 (prompts); 1,000 training and 1,000 test examples
    MeZO  princeton-nlp/MeZO, large_models/{templates,tasks,utils,run}.py, which [S] builds on

    x, y_c              prompt, option c, as tokens
    score_c             mean over t of log p(y_c,t | x, y_c,<t)      `option_scores`  (not the sum)
    classification      -log softmax(score)[label]                   `classification_loss`
    language modelling  -mean over the batch's right tokens, log p   `lm_loss`, COPA and WinoGrande
    prediction          argmax_c score_c                             `correct`

What it costs. Only positions that predict an option token become logits; `Batch.keep` counts them
from the right, hence left padding. 16 prompts of 256 tokens give [16, 1, 32000] logits, 1 MB in
fp16, not 262 MB. Options with equal inputs share a row: where each is one token (Yes/No), that is
one row per example, half of MeZO's work and the same numbers.

What differs from MeZO.
* Which tokens are the option's: MeZO subtracts token counts, `encode` looks at character spans.
  Equal for Llama's tokenizer, and right also where a piece spans the prompt's end and the option.
* The last token of an option is not fed to the model: nothing is predicted from it.
* Log-probabilities are fp32 whatever the model computes in. An fp16 loss near 0.7 moves in steps of
  4.9e-4, so (l+ - l-) / 2 eps at eps = 1e-3 moves in steps of 0.24.
* BoolQ is SuperGLUE's, whose passages begin with a title that MeZO's (google/boolq) lack.
  WinoGrande is the xl set; ZO-Bench, whose prompt it has, draws from its subset m.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from os.path import commonprefix  # of any sequences, not only of paths
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class UserError(ValueError):
    """Bad input: one line that names the value, what is allowed and the fix."""


@dataclass(frozen=True)
class Example:
    """The model reads prompt + options[c]; an option brings the space that precedes it."""

    prompt: str
    options: tuple[str, ...]
    label: int  # index of the right option


@dataclass(frozen=True)
class Task:
    """One line of [S] Table 5, and where its data are. `rows` brings a row into the prompt's terms.

    A label is an index (hub) or one of `labels` (official files; booleans count as 0 and 1).
    """

    name: str
    hub: str  # repository:configuration
    folder: str  # of the official archive
    prompt: str
    options: tuple[str, ...]
    labels: tuple[str, ...] = ("false", "true")
    rows: Callable[[dict], list[dict]] = lambda row: [row]
    files: tuple[str, str] = ("train.jsonl", "val.jsonl")
    classification: bool = True  # False: trained with `lm_loss` on the right option
    num_validation: int = 500

    def to_examples(self, row: dict) -> list[Example]:
        """The examples of one row, in official or hub form; a MultiRC passage holds many."""
        examples = []
        for r in self.rows(row):
            label = self.labels.index(r["label"]) if r["label"] in self.labels else r["label"]
            if not isinstance(label, int) or not 0 <= label < len(self.labels):  # -1: unlabelled
                raise ValueError(f"label {label!r} is neither of {self.labels} nor their index")
            options = tuple(option.format(**r) for option in self.options)
            examples.append(Example(self.prompt.format(**r), options, int(label)))
        return examples


def _boolq(row: dict) -> list[dict]:
    question = row["question"].removesuffix("?") + "?"
    return [{**row, "question": question[0].upper() + question[1:]}]


def _wsc(row: dict) -> list[dict]:
    spans = row.get("target", row)  # official files nest the spans, the hub has them flat
    return [{**row, "noun": spans["span1_text"], "pronoun": spans["span2_text"].lower()}]


def _multirc(row: dict) -> list[dict]:
    if "passage" not in row:
        return [row]  # the hub has a row per answer, official files a row per passage
    text, questions = row["passage"]["text"], row["passage"]["questions"]
    return [{"paragraph": text, "question": q["question"], "answer": a["text"], "label": a["label"]}
            for q in questions for a in q["answers"]]  # fmt: skip


def _copa(row: dict) -> list[dict]:
    row = {**row, "premise": row["premise"].rstrip().removesuffix(".")}
    for key in ("choice1", "choice2"):
        first, *rest = row[key].split(" ")
        row[key] = " ".join([first if first == "I" else first.lower(), *rest])
    return [{**row, "link": {"effect": "so", "cause": "because"}[row["question"]]}]


def _winogrande(row: dict) -> list[dict]:
    before, after = row["sentence"].split("_")
    return [{**row, "before": before.rstrip(" "), "after": after, "label": row["answer"]}]


_NO_YES = ("No", "Yes")
_COMMITS = {  # parquet, no script to run; pinned: a seed means the same examples for good
    "nyu-mll/glue": "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    "aps/super_glue": "3de24cf8022e94f4ee4b9d55a6f539891524d646",
    "allenai/winogrande": "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
}
TASKS = {task.name: task for task in (
    Task("sst2", "nyu-mll/glue:sst2", "SST-2", "{sentence} It was", (" terrible", " great"),
         ("0", "1"), lambda row: [{**row, "sentence": row["sentence"].strip()}],
         ("train.tsv", "dev.tsv")),
    Task("rte", "aps/super_glue:rte", "RTE",
         '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
         ("Yes", "No"), ("entailment", "not_entailment")),
    Task("cb", "aps/super_glue:cb", "CB",
         'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
         ("Yes", "No", "Maybe"), ("entailment", "contradiction", "neutral"), num_validation=100),
    Task("boolq", "aps/super_glue:boolq", "BoolQ", "{passage} {question}\n", _NO_YES, rows=_boolq),
    Task("wsc", "aps/super_glue:wsc.fixed", "WSC",
         '{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? '
         "Yes or No?\n", _NO_YES, rows=_wsc),
    Task("wic", "aps/super_glue:wic", "WiC",
         'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
         "{sentence1}\n{sentence2}\n", _NO_YES),
    Task("multirc", "aps/super_glue:multirc", "MultiRC",
         '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
         "Yes or No?\n", _NO_YES, rows=_multirc),
    Task("copa", "aps/super_glue:copa", "COPA", "{premise} {link}", (" {choice1}", " {choice2}"),
         ("0", "1"), _copa, classification=False, num_validation=100),
    Task("winogrande", "allenai/winogrande:winogrande_xl", "winogrande_1.1", "{before}",
         (" {option1}{after}", " {option2}{after}"), ("1", "2"), _winogrande,
         ("train_xl.jsonl", "dev.jsonl"), classification=False),
)}  # fmt: skip


def get_task(name: str) -> Task:
    """A task by name; MeZO's spellings (SST2, BoolQ, WinoGrande) will do. Raises UserError."""
    key = name.lower().replace("-", "")
    if key not in TASKS:
        close = difflib.get_close_matches(key, TASKS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown task {name!r}: {hint}tasks are {', '.join(TASKS)}")
    return TASKS[key]


@dataclass(frozen=True)
class Data:
    """What `load_examples` returns; two runs with one fingerprint saw the same examples."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    classification: bool
    fingerprint: str
    source: str


def load_examples(
    task: str | None = None, *, data_dir: str | Path | None = None,
    train_file: str | Path | None = None, test_file: str | Path | None = None,
    validation_file: str | Path | None = None, num_train: int = 1000,
    num_validation: int | None = None, num_test: int = 1000, seed: int = 0,
) -> Data:  # fmt: skip
    """A task of `TASKS`, from the hub or from official files in data_dir; or the user's own files.

    MeZO's split (run.py, `sample_subset`): permute the training split under the seed, take the
    first num_train + num_validation, keep the LAST num_validation of them for validation. Test are
    the first num_test of the published validation split, permuted likewise. A small split leaves
    what remains to training: CB 150, COPA 300, WSC only 54. MeZO permutes with numpy's RandomState,
    so equal seeds draw equal examples.

    Own files have JSONL lines {"prompt", "options", "label"}. Without validation_file, validation
    comes out of train_file by the same rule, by default 500 but at most a third of the file. They
    count as classification if all examples have the same options. Raises UserError.
    """
    if min(num_train, num_test) < 1 or (num_validation or 0) < 0:
        sizes = f"num_train {num_train}, num_validation {num_validation}, num_test {num_test}"
        raise UserError(f"{sizes}: give at least 1, 0 and 1")
    pool = None  # of validation examples, where they have a file of their own
    if task is not None and not (train_file or test_file or validation_file):
        spec = get_task(task)
        classification, default = spec.classification, spec.num_validation
        if data_dir is None:
            train, test = _from_hub(spec, "train"), _from_hub(spec, "validation")
            source = spec.hub
        else:
            source = Path(data_dir, spec.folder)
            if not source.is_dir() and Path(data_dir, spec.files[0]).is_file():
                source = Path(data_dir)  # given the task's own folder
            what = f"a labelled {spec.name} row"
            train, test = (_from_file(source / f, spec.to_examples, what) for f in spec.files)
    elif task is None and train_file and test_file and data_dir is None:
        files = [Path(f) for f in (train_file, validation_file or test_file, test_file)]
        what = 'a line {"prompt", "options", "label"}'
        train, pool, test = (_from_file(f, _own_example, what) for f in files)
        classification = len({e.options for e in train + pool + test}) == 1
        pool = pool if validation_file else None
        default = 500 if pool else min(500, len(train) // 3)
        source = ", ".join(dict.fromkeys(map(str, files)))
    else:
        raise UserError("give a task (and a data_dir, or none), or a train_file and a test_file")

    num_validation = default if num_validation is None else num_validation
    if pool is None:
        drawn = _draw(train, num_train + num_validation, seed)
        cut = max(0, len(drawn) - num_validation)  # not [:-num_validation], empty for 0
        train, validation = drawn[:cut], drawn[cut:]
    else:
        train, validation = _draw(train, num_train, seed), _draw(pool, num_validation, seed)
    if not train:
        raise UserError(f"{source}: num_validation {num_validation} leaves nothing to train on")
    parts = (train, validation, _draw(test, num_test, seed))
    text = json.dumps([[(e.prompt, e.options, e.label) for e in part] for part in parts])
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Data(*parts, classification, fingerprint, str(source))


def _draw(examples: list[Example], n: int, seed: int) -> list[Example]:
    order = np.random.RandomState(seed).permutation(len(examples))  # a private generator
    return [examples[i] for i in order[:n]]


def _is_text(x: object) -> bool:
    return isinstance(x, str) and bool(x.strip())


def _own_example(row: dict) -> list[Example]:
    prompt, options, label = row["prompt"], row["options"], row["label"]
    if not _is_text(prompt):
        raise ValueError(f"prompt {prompt!r} must be text, not empty")
    if not isinstance(options, list) or len(set(filter(_is_text, options))) < max(2, len(options)):
        raise ValueError(f"options {options!r} must be a list of 2 or more different texts")
    if type(label) is not int or not 0 <= label < len(options):  # a bool is an int, but no label
        raise ValueError(f"label {label!r} must be an integer from 0 to {len(options) - 1}")
    return [Example(prompt, tuple(options), label)]


def _examples(rows: Iterable[tuple], to_examples: Callable, what: str) -> list[Example]:
    examples = []
    for where, row in rows:
        try:
            examples += to_examples(row)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
            known = {KeyError: f"no field {e}", json.JSONDecodeError: "it is not JSON"}
            why = known.get(type(e), e)
            raise UserError(f"{where} is not {what}: {why}") from e
    return examples


def _from_hub(task: Task, split: str) -> list[Example]:
    name, config = task.hub.split(":")
    try:
        from datasets import load_dataset

        rows = load_dataset(name, config, split=split, revision=_COMMITS[name])
    except Exception as e:  # offline, gated, moved, not installed: each has a type of its own
        why = f"{type(e).__name__}: {e}".splitlines()[0]
        raise UserError(
            f"cannot load {task.hub} from the hub ({why}); log in with `hf auth login`, "
            f"or give --data-dir with {task.folder}/"
        ) from e
    named = ((f"{task.hub} {split}[{i}]", row) for i, row in enumerate(rows))
    return _examples(named, task.to_examples, f"a labelled {task.name} row")


def _from_file(path: Path, to_examples: Callable, what: str) -> list[Example]:
    """Examples of a JSONL file, or of a tab-separated file with a header (SST-2)."""
    if not path.is_file():
        here = next(p for p in path.absolute().parents if p.is_dir())
        names = ", ".join(sorted(p.name for p in here.iterdir())[:12])
        raise UserError(f"no file {path}; {here} has {names or 'nothing'}")
    lines = path.read_bytes().splitlines()  # bytes: str would also split at U+2028
    header = lines[0].decode("utf-8-sig").split("\t") if lines and path.suffix == ".tsv" else []

    def parse(line: bytes) -> list[Example]:
        text = line.decode("utf-8-sig")  # -sig: some editors begin with a byte-order mark
        cells = text.split("\t")  # no csv module: the sentences hold bare quotes
        if header and len(cells) != len(header):
            raise ValueError(f"it has {len(cells)} tab-separated cells, the header {len(header)}")
        row = dict(zip(header, cells, strict=True)) if header else json.loads(text)
        if not isinstance(row, dict):
            raise ValueError("it is JSON, but not an object {...}")
        return to_examples(row)

    rows = [(f"{path}:{n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
    if len(rows) <= bool(header):
        raise UserError(f"{path} is empty; write one example per line")
    return _examples(rows[bool(header) :], parse, what)


def with_demonstrations(example: Example, demos: list[Example]) -> Example:
    """In-context learning (MeZO utils.py, `encode_prompt`): solved demos, joined by blank lines."""
    solved = [(d.prompt + d.options[d.label]).strip() for d in demos]
    return replace(example, prompt="\n\n".join([*solved, example.prompt.lstrip(" ")]))


@lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    return np.random.RandomState([seed, epoch]).permutation(n).tolist()


def batches(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which of n training examples `step` sees: a pure function, so a run resumes anywhere.

    Each epoch is a new permutation, without replacement; its incomplete last batch is dropped.
    With fewer examples than batch_size every step sees them all.
    """
    if n < batch_size:
        return list(range(n))
    epoch, i = divmod(step, n // batch_size)
    return _epoch_order(n, seed, epoch)[i * batch_size : (i + 1) * batch_size]


def encode(tokenizer, example: Example, max_length: int = 2048) -> list[tuple[list[int], int]]:
    """Per option: (token ids of prompt + option, how many at the end are the option's).

    As MeZO's `encode_prompt`, outer spaces are stripped, and too long a prompt loses its beginning
    but keeps BOS. The option's tokens are the pieces that begin in it, and one that begins before
    but reaches beyond its leading space: "was " stays with the prompt, "?Yes" goes with the option.
    Raises UserError where an option has no token or no room, or the tokenizer has no spans.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} has no character spans; load the fast one")
    out = []
    for option in example.options:
        full = (example.prompt + option).lstrip()
        text = full.rstrip(" ")
        first = max(0, len(full) - len(option))  # where the option begins,
        word = max(0, len(full) - len(option.lstrip(" ")))  # and its first letter
        encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        length = sum(end > (word if begin < first else first) for begin, end in spans)
        if max((end for _, end in spans), default=0) < len(text.rstrip()):
            # The vocabulary lacks a character and dropped it (BPE without <unk> or bytes), which
            # shifts later spans: here an option token is one that the prompt does not begin with.
            prompt = tokenizer(text[:word], verbose=False)["input_ids"]
            length = len(ids) - len(commonprefix([prompt, ids]))
        elif spans[-1][1] == 0:
            ids = ids[:-1]  # an EOS that the tokenizer adds is no part of the option
        bos = int(ids[:1] == [tokenizer.bos_token_id])
        ids = ids[:bos] + ids[max(bos, len(ids) - max_length + bos) :]
        if not 0 < length < len(ids):  # < : the first option token, too, is predicted from one
            raise UserError(
                f"option {option!r} of ...{example.prompt[-60:]!r} has {length} of "
                f"{len(ids)} tokens; it needs 1, and 1 before it ({max_length=})"
            )
        out.append((ids, length))
    return out


@dataclass(frozen=True)
class Batch:
    """R rows of T tokens, and the list of the n log-probabilities to read from them.

    The i-th is that of token[i], read at row[i], position[i]. It counts weight[i] in the score of
    slot[i] = example * num_options + option.
    """

    input_ids: Tensor  # [R, T] int64, padded on the left, T a multiple of 8
    attention_mask: Tensor  # [R, T] int64
    position_ids: Tensor  # [R, T] int64; explicit, as models differ in how they count padding
    row: Tensor  # [n] int64
    position: Tensor  # [n] int64, within the last `keep`
    token: Tensor  # [n] int64
    slot: Tensor  # [n] int64
    weight: Tensor  # [n] fp32, 1 / number of the option's tokens
    labels: Tensor  # [B] int64
    valid: Tensor  # [B, C] bool: the options that exist and are scored
    keep: int  # logits_to_keep: positions, from the right, that are read at all
    num_examples: int  # B
    num_options: int  # C, the largest number of options in the batch
    score: str  # "all" options, or only the "right" ones

    def inputs(self) -> dict[str, Tensor]:
        """For `model(**batch.inputs(), logits_to_keep=batch.keep)`."""
        return {k: getattr(self, k) for k in ("input_ids", "attention_mask", "position_ids")}

    def to(self, device: str | torch.device) -> "Batch":
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(
    tokenizer, examples: list[Example], *, max_length: int = 2048, score: str = "all", device="cpu"
) -> Batch:
    """A batch that scores "all" options, or only the "right" ones (all that `lm_loss` reads)."""
    if score not in ("all", "right"):
        raise UserError(f"score {score!r} must be 'all' or 'right'")
    num_options = max(len(e.options) for e in examples)
    valid = torch.zeros(len(examples), num_options, dtype=torch.bool)
    rows, reads = [], []  # reads: (row, places before its end, token, slot, option's length)
    for b, example in enumerate(examples):
        shared = {}  # equal inputs, one row
        for c, (ids, length) in enumerate(encode(tokenizer, example, max_length)):
            if score == "right" and c != example.label:
                continue
            valid[b, c] = True
            row = shared.setdefault(tuple(ids[:-1]), len(rows))
            rows += [ids[:-1]] if row == len(rows) else []
            for back, token in zip(range(length, 0, -1), ids[-length:], strict=True):
                reads.append((row, back, token, b * num_options + c, length))
    row, back, token, slot, length = map(torch.tensor, zip(*reads, strict=True))
    keep, T = int(back.max()), -(-max(map(len, rows)) // 8) * 8
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    ids = torch.tensor([[pad] * (T - len(r)) + r for r in rows])  # [R, T]
    mask = torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rows])  # [R, T]
    labels = torch.tensor([e.label for e in examples])
    return Batch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), row, keep - back, token, slot,
                 1 / length.float(), labels, valid, keep, len(examples), num_options,
                 score).to(device)  # fmt: skip


# Scores and losses: functions of logits [R, keep, V], of any dtype, and the batch; all fp32.


def _log_probs(logits: Tensor, batch: Batch) -> Tensor:
    """[n]. Only the positions that are read are upcast, and before the log-softmax."""
    read = logits[:, -batch.keep :][batch.row, batch.position].float()  # [n, V]
    return -F.cross_entropy(read, batch.token, reduction="none")


def option_scores(logits: Tensor, batch: Batch) -> Tensor:
    """[B, C]: mean log-probability of each option's tokens; -inf where there is no option.

    MeZO run.py, `one_step_pred`. A masked sum, as CUDA's index_add_ adds in no fixed order.
    """
    slots = torch.arange(batch.valid.numel(), device=logits.device)[:, None]  # [B*C, 1]
    scores = torch.where(slots == batch.slot, batch.weight * _log_probs(logits, batch), 0.0).sum(1)
    return scores.view_as(batch.valid).masked_fill(~batch.valid, -torch.inf)


def classification_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Scalar: cross-entropy over the options' scores (MeZO's train_as_classification)."""
    if batch.score == "right":  # among one option the loss is 0, and so is every gradient
        raise UserError("classification_loss needs all options; collate with score='all'")
    return F.cross_entropy(option_scores(logits, batch), batch.labels)


def lm_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Scalar: mean negative log-probability of all the right options' tokens in the batch."""
    right = batch.slot % batch.num_options == batch.labels[batch.slot // batch.num_options]  # [n]
    return -torch.where(right, _log_probs(logits, batch), 0.0).sum() / right.sum()


def correct(logits: Tensor, batch: Batch) -> Tensor:
    """[B] bool: is the most likely option the right one? The mean is the accuracy."""
    return option_scores(logits, batch).argmax(1) == batch.labels

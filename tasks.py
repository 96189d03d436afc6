"""Tasks as text: prompts and data.

A task is a way to write a question as the beginning of a text: an `Example` is a prompt and a few
options, one of them right. The model is never asked for a class, only how likely each option is as
the continuation of the prompt (scoring.py).

    [S]   Sparse-MeZO: appendix B, Table 5 (prompts); 1,000 training and 1,000 test examples
    MeZO  princeton-nlp/MeZO, large_models/{templates,tasks,run}.py, which [S] builds on

What differs from MeZO. BoolQ is SuperGLUE's, whose passages begin with a title that MeZO's
(google/boolq) lack. WinoGrande is the xl set; ZO-Bench, whose prompt it has, draws from subset m.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from errors import UserError


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
        classification = len({frozenset(e.options) for e in train + pool + test}) == 1
        pool = pool if validation_file else None
        default = 500 if pool else min(500, len(train) // 3)
        source = ", ".join(dict.fromkeys(map(str, files)))
    else:
        raise UserError(
            "give a task (--task, --data-dir), or both files (--train-file and --test-file)"
        )

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
    texts = {o.rstrip() for o in options if _is_text(o)} if isinstance(options, list) else ()
    if len(texts) < 2 or len(texts) < len(options):
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

"""Examples, from the hub, from official files, or from files of one's own, as tasks.py wants them.

    --task rte                                   the hub's rows; commits are pinned below
    --task rte --data-dir DIR                    the official archive's files
    --train-file FILE --test-file FILE           files of one's own, with rows of one kind:

    {"prompt": …, "options": [" Yes", " No"], "label": 0}     a question, scored by accuracy
    {"prompt": …, "completion": …}                            a completion, whose end is learnt, too
    {"messages": [{"role": "user", "content": …}, …]}         a conversation: a completion per reply
    {"text": …}, or a .txt           all joined by blank lines, cut into blocks of max_length tokens

Completions, conversations and texts are scored by perplexity.

A row that cannot be read is named in one line of error, with its file and line.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unicodedata import normalize

import numpy as np

from harness import adapter, loading
from harness.config import Settings, locate, reworded
from tasks import OWN, Example, Task, get_task, option_tokens

_COMMITS = {  # parquet, no script to run; pinned: a seed means the same examples for good
    "nyu-mll/glue": "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    "aps/super_glue": "3de24cf8022e94f4ee4b9d55a6f539891524d646",
    "allenai/winogrande": "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "baber/piqa": "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",  # [H]'s mirror of a script
    "allenai/openbookqa": "388097ea7776314e93a529163e0fea805b8a6454",
    "lighteval/siqa": "54c6a1f8cb6daf4f5abf24a601852612fb35eb25",  # [H]'s mirror of a script
    "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
    "deepmind/aqua_rat": "33301c6a050c96af81f63cad5562cb5363e88971",
    "Salesforce/wikitext": "b08601e04326c79dfdd32d625aee71d232d685c3",
    "allenai/c4": "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
    "open-web-math/open-web-math": "fde8ef8de2300f5e778f56261843dab89f230815",
    "armanc/scientific_papers": "refs/convert/parquet",  # a script; the hub's copy, not pinned
}


@dataclass(frozen=True)
class Data:
    """What `load_examples` returns."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    scored: str  # which options the training loss reads: "all", or the "right" one
    source: str
    tokenizer: object = None  # the model's, for all of them
    odd: str | None = None  # of own files: what the first row has whose options are not the usual
    unused: int = 0  # of own files: examples beyond --num-train and its like

    @property
    def metric(self) -> str:
        """Of what is measured: the "accuracy" of options, the "perplexity" of completions."""
        return "perplexity" if len(self.train[0].options) == 1 else "accuracy"


def load_examples(config: Settings, tokenizer=None) -> Data:
    """A task of `TASKS`, from the hub or from official files in data_dir; or the user's own files.

    MeZO's split (run.py, `sample_subset`): permute the training split under the seed, take the
    first num_train + num_validation, keep the LAST num_validation of them for validation. Test are
    the first num_test of the published validation split, permuted likewise. A small split leaves
    what remains to training: CB 150, COPA 300, WSC only 54. Equal seeds draw MeZO's examples. ARC,
    OBQA, MMLU and AQuA are tested on their published test split. None: the task's number.

    Own files have rows of one kind, see above. Questions count as classification if all have the
    same options. All other kinds need the tokenizer. Without validation_file, validation comes out
    of train_file by the same rule, by default 500 but at most a third of it. So it does for a task
    that has no more training rows than its usual number of validation. Raises ValueError.
    """
    spec, source, parts, odd = _read_parts(config, tokenizer)
    train, test, *held = (_in_blocks(part, tokenizer, config.max_length) for part in parts)
    rows = sum(map(len, (train, test, *held)))
    few = not config.task or len(train) <= spec.num_validation
    if few and not held:  # validation out of the training rows: at most a third
        spec = replace(spec, num_validation=min(spec.num_validation, len(train) // 3))
    asked = {name: getattr(config, name) for name in ("num_train", "num_validation", "num_test")}
    spec = replace(spec, **{name: n for name, n in asked.items() if n is not None})
    count, seed = spec.num_validation, config.data_seed
    if held:
        train, validation = _draw(train, spec.num_train, seed), _draw(held[0], count, seed)
    else:
        drawn = _draw(train, spec.num_train + count, seed)
        cut = max(0, len(drawn) - count)  # not [:-count], empty for 0
        train, validation = drawn[:cut], drawn[cut:]
    if not train:
        both = f"{len(validation)} examples and --num-validation {count}"
        raise ValueError(f"{source}: {both} leave nothing to train on; give a lower number")
    parts = train, validation, _draw(test, spec.num_test, seed)
    unused = 0 if config.task else rows - sum(map(len, parts))
    scored = "all" if spec.classification else "right"
    return Data(*parts, scored, str(source), tokenizer, odd, unused)


def _read_parts(config: Settings, tokenizer) -> tuple:
    """(task, source, [training, test and perhaps validation examples], `Data.odd`), all of them."""
    task, data_dir, odd = config.task, config.data_dir, None
    own = config.train_file, config.test_file, config.validation_file
    if task is not None and not any(own):
        spec, source = get_task(task), get_task(task).hub
        if data_dir is None:
            parts = [_from_hub(spec, split) for split in spec.splits]
        else:
            folder = Path(locate(data_dir))
            source = folder / spec.folder
            if not source.is_dir() and any(folder.glob(spec.files[0])):
                source = folder  # given the task's own folder
            what = f"a labelled {spec.name} row"
            paths = [sorted(source.glob(f)) or [source / f] for f in spec.files]
            parts = [sum((_from_file(f, spec.to_examples, what) for f in fs), []) for fs in paths]
    elif task is None and all(own[:2]) and data_dir is None:
        files = [Path(f) for f in own if f]
        what = 'a line {"prompt", "options", "label"}, {"prompt", "completion"}, {"messages"}'
        what += ' or {"text"}'
        parts = [_from_file(f, partial(_own_example, tokenizer), what) for f in files]
        everything, source = sum(parts, []), ", ".join(dict.fromkeys(map(str, files)))
        kinds = Counter(map(_kind, everything))
        if len(kinds) > 1:
            mixed = " and ".join(f"{n} {kind}" for kind, n in kinds.items())
            raise ValueError(f"{source}: {mixed}; train and test on rows of one kind")
        odd = _odd_row(everything) if "questions" in kinds else None
        spec = replace(OWN, classification="questions" in kinds and odd is None)
    else:
        raise ValueError(
            "give a task (--task, --data-dir), or --train-file and --test-file, but not both"
        )
    return spec, source, parts, odd


def load(config) -> tuple:
    """(config, model configuration, data) of the settings, without a model.

    In the config, max_length is at most the number of the model's positions, less a prefix's.
    """
    taken = adapter.TOKENS if getattr(config, "adapter", None) == "prefix" else 0
    tokenizer, model_config = loading.load_tokenizer(config.model, config.trust_remote_code)
    longest = loading.usable_length(config.max_length, model_config, taken)
    config = replace(config, max_length=longest)
    return config, model_config, load_examples(config, tokenizer)


def _in_blocks(examples: list[Example], tokenizer, length: int) -> list[Example]:
    """Texts joined and cut into blocks, whose first token is not predicted; others as they are.

    What is left over is dropped, unless it is all.
    """
    if _kind(examples[0]) != "texts":
        return examples
    ids = tokenizer("\n\n".join(e.options[0] for e in examples), verbose=False)["input_ids"]
    if len(ids) < 2:
        raise ValueError("the texts have no two tokens in all, and so none to predict")
    starts = range(0, max(1, len(ids) - length + 1), length)
    return [Example(tuple(ids[i : i + 1]), (tuple(ids[i + 1 : i + length]),), 0) for i in starts]


def _draw(examples: list[Example], n: int, seed: int) -> list[Example]:
    order = np.random.RandomState(seed).permutation(len(examples))  # a private generator
    return [examples[i] for i in order[:n]]


def _kind(example: Example) -> str:
    one = "completions" if example.prompt else "texts"
    return one if len(example.options) == 1 else "questions"


def _own_example(tokenizer, row: dict) -> list[Example]:
    if not isinstance(row, dict):
        raise ValueError(f"{row!r:.60} has no fields")
    kind = next((k for k in ("options", "completion", "messages", "text") if k in row), "options")
    if kind != "options" and "label" in row:
        raise ValueError(f"a label belongs to options, and this row has {kind}")
    if kind == "messages":
        return _replies(tokenizer, row["messages"], row.get("tools"))
    if kind == "text":
        return _document(row)
    for name in ("prompt", "completion") if kind == "completion" else ("prompt",):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{name} {row[name]!r} must be text, not empty")
    if kind == "completion":  # its end is learnt, too, as in TRL
        end = tokenizer.eos_token or ""
        return [Example(row["prompt"], (row["completion"].removesuffix(end) + end,), 0)]
    prompt, options, label = row["prompt"], row["options"], row["label"]
    listed = options if isinstance(options, list) else []
    texts = {o.rstrip() for o in listed if isinstance(o, str)} - {""}
    if len(texts) < max(2, len(listed)):
        raise ValueError(f"options {options!r} must be a list of 2 or more different texts")
    if type(label) is not int or not 0 <= label < len(options):  # a bool is an int, but no label
        raise ValueError(f"label {label!r} must be an integer from 0 to {len(options) - 1}")
    return [Example(prompt, tuple(o.rstrip(" ") for o in options), label)]  # `encode` strips, too


# some templates write today's date into the prompt; here the day is one, or a run would change
_DATE = """{%- macro strftime_now(format) -%}{{
    format.replace('%Y', '2024').replace('%m', '07').replace('%d', '26')
    .replace('%b', 'Jul').replace('%B', 'July')
}}{%- endmacro +%}"""


def _replies(tokenizer, messages: list[dict], tools: list | None) -> list[Example]:
    """A completion per reply of the assistant, as the tokenizer's chat template writes it.

    The prompt is all before it, up to the template's generation prompt; the completion is the reply
    with its end of turn. So no other token than the assistant's has a loss. A first message answers
    nothing, and is no reply. The template gets the row's `tools`, too.
    """
    if not tokenizer.chat_template:
        raise ValueError('the tokenizer has no chat template; use {"prompt", "completion"} lines')
    template = _DATE + tokenizer.get_chat_template(tools=tools)
    how = {"tokenize": False, "chat_template": template, "tools": tools}

    def text(count: int, **more) -> str:
        with reworded("the chat template refuses it"):
            return tokenizer.apply_chat_template(messages[:count], **how, **more)

    if not isinstance(messages, list):
        raise ValueError(f"messages {messages!r:.60} is no list")
    examples = []
    for i, message in enumerate(messages):
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise ValueError(f"content {message.get('content')!r:.60} is no text")
        if message["role"] == "assistant" and i:
            before, after = text(i, add_generation_prompt=True), text(i + 1).rstrip()
            if not after.startswith(before):
                raise ValueError("the chat template's reply does not follow its generation prompt")
            ids, length = option_tokens(tokenizer, after, after[len(before) :], special=False)
            start = len(ids) - length
            examples.append(Example(tuple(ids[:start]), (tuple(ids[start:]),), 0))
    if not examples:
        raise ValueError("no message is a reply of the assistant's")
    return examples


def _document(row: dict) -> list[Example]:
    if not isinstance(row["text"], str):
        raise ValueError(f"text {row['text']!r} is no text")
    return [Example("", (row["text"],), 0)]


def _odd_row(examples: list[Example]) -> str | None:
    """What is odd about the first row whose options are not those of most, if there is one."""

    def kind(example):  # however its letters are coded, and whatever white space ends it
        return frozenset(normalize("NFC", option).rstrip() for option in example.options)

    (usual, count), *others = Counter(map(kind, examples)).most_common()
    if not others:
        return None
    odd = next(e for e in examples if kind(e) != usual)
    most = f"{count} of {len(examples)} rows have {sorted(usual)}"
    return f"{most}, but ...{odd.prompt[-40:]!r} has {list(odd.options)}"


TEXTS = {  # name: repository, file, column; its first 10,000 rows are used
    "c4": ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "text"),
    "wikitext103": ("Salesforce/wikitext",
        "wikitext-103-raw-v1/train-00000-of-00002.parquet", "text"),
    "openwebmath": ("open-web-math/open-web-math",
        "data/train-00000-of-00114-5a023365406cb9c4.parquet", "text"),
    "arxiv": ("armanc/scientific_papers", "arxiv/*train/0000.parquet", "article"),
}  # fmt: skip


def read_texts(text: str | None) -> list[str]:
    """Documents of a .jsonl of {"text": …} or a .txt (blank lines divide them), or of `TEXTS`.

    [Q] compares these four by name; None is its choice, C4.
    """
    if (name := "c4" if text is None else text) in TEXTS:
        repository, file, column = TEXTS[name]
        how = {"data_files": file, "split": "train", "streaming": True}
        how["revision"] = _COMMITS[repository]
        with reworded(f"cannot load {repository} from the hub", "; give --text FILE"):
            from datasets import load_dataset

            return [row[column] for row in load_dataset(repository, **how).take(10_000)]
    path = Path(text)
    if path.suffix not in (".txt", ".jsonl") or not path.is_file():
        names = ", ".join(TEXTS)
        raise ValueError(f"--text {text}: a .txt or .jsonl file that exists, or one of {names}")
    return [e.options[0] for e in _from_file(path, _document, 'a line {"text": "…"}')]


def _from_hub(task: Task, split: str) -> list[Example]:
    name, config = task.hub.split(":")
    way_out = f"; log in with `hf auth login`, or give --data-dir with {task.folder}/"
    with reworded(f"cannot load {task.hub} from the hub", way_out):
        from datasets import load_dataset

        rows = load_dataset(name, config, split=split, revision=_COMMITS.get(name))
    named = ((f"{task.hub} {split}[{i}]", row) for i, row in enumerate(rows))
    return _parsed(named, task.to_examples, f"a labelled {task.name} row")


def _from_file(path: Path, parse: Callable[[dict], list], what: str) -> list:
    """What `parse` makes of the rows of a JSONL file, with labels in it or in a file beside (PIQA).

    Or of a .tsv with a header, a .csv as MMLU's, or a text: blank lines divide a .txt, and
    WikiText's .raw has a row per line.
    """
    text, read = _read(path), json.loads
    lines = text.removesuffix("\n").split("\n")  # splitlines would also split at U+2028
    rows = [(f"{path}:{n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix == ".tsv" and rows:
        read = partial(_cells, rows.pop(0)[1].split("\t"))
    if not rows:
        raise ValueError(f"{path} is empty; write one example per line")
    found = None
    if path.suffix == ".csv":
        found = csv.DictReader(io.StringIO(text), ("question", *"ABCD", "answer"))
    if path.suffix == ".txt":
        found = [{"text": part} for part in re.split(r"\n\s*\n", text) if part.strip()]
    if path.suffix == ".raw":  # as on the hub: blank lines are empty rows
        found = [{"text": line + "\n" if line.strip() else ""} for line in lines]
    if found is not None:
        rows, read = [(f"{path}, row {n}", row) for n, row in enumerate(found, start=1)], dict
    if (labels := path.with_name(f"{path.stem}-labels.lst")).is_file():
        right = _read(labels).split()
        if len(right) != len(rows):
            raise ValueError(f"{labels} has {len(right)} labels for {len(rows)} rows of {path}")
        rows = [(where, (line, label)) for (where, line), label in zip(rows, right, strict=True)]
        read = _labelled
    return _parsed(rows, lambda row: parse(read(row)), what)


def _labelled(row: tuple[str, str]) -> dict:
    return {**json.loads(row[0]), "label": row[1]}


def _cells(header: list[str], line: str) -> dict:
    cells = line.split("\t")  # no csv module: SST-2's sentences hold bare quotes
    if len(cells) != len(header):
        raise ValueError(f"it has {len(cells)} tab-separated cells, the header {len(header)}")
    return dict(zip(header, cells, strict=True))


def _parsed(rows: Iterable[tuple], parse: Callable, what: str) -> list:
    found = []
    for where, row in rows:
        try:
            found += parse(row)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as e:
            torn = "it is not JSON, whole on one line"
            known = {KeyError: f"no field {e}", json.JSONDecodeError: torn}
            raise ValueError(f"{where} is not {what}: {known.get(type(e), e)}") from e
    return found


def _read(path: Path) -> str:
    if not path.is_file():
        here = next(p for p in path.absolute().parents if p.is_dir())
        names = ", ".join(sorted(p.name for p in here.iterdir())[:12])
        raise ValueError(f"no file {path}; {here} has {names or 'nothing'}")
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin with a byte-order mark
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}:{e.object.count(10, 0, e.start) + 1} is not UTF-8") from e

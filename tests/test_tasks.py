"""tasks.py against MeZO's way, taken literally: one candidate at a time, no padding, all logits."""

import ast
import copy
import functools
import json
import math
import re
import shutil
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, build, needs_gpu
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import masks
import model_patch
import tasks
import train
from harness import config as configs
from harness import dataset, loading
from harness.config import Config
from tasks import Example, collate, encode

WORDS = (
    "the a cat dog sat ran was is great terrible red so because I he it on mat Yes No Maybe"
).split()


def shared(*parts):
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def load_examples(task=None, tokenizer=None, **said):
    """harness/dataset.py's, of settings that are said by name."""
    said = {name: str(x) if isinstance(x, Path) else x for name, x in said.items()}
    return dataset.load_examples(configs.Settings(task=task, **said), tokenizer)


def word_tokenizer(pattern=r"\n|\w+|[^\w\s]", extra=(), bos=True, eos=False):
    """One id per match of pattern, spaces dropped: the tokenizer of tiny/."""
    words = ["<unk>", "<s>", "</s>", *WORDS, *".,?!\"'\n", *extra]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    core.decoder = decoders.Fuse()
    single = "<s> " * bos + "$A" + " </s>" * eos
    core.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"unk_token": "<unk>", "eos_token": "</s>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


TOKENIZER = word_tokenizer()
built = functools.cache(build)


@pytest.fixture(scope="module")
def llama():
    return built("llama")


@pytest.fixture(scope="module")
def llama2():
    return AutoTokenizer.from_pretrained(shared("models", "llama2-tokenizer"))


@pytest.fixture(scope="module")
def stories():
    path = shared("models", "tinystories656k")
    return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()


def count(tokenizer, text):
    return len(tokenizer.encode(text))


@torch.no_grad()
def mezo_log_probs(model, tokenizer, example, option, length=None):
    """MeZO run.py: the log-probabilities of one option's tokens, from a bare forward pass."""
    bare, text = example.prompt.strip(" "), (example.prompt + option).strip(" ")
    length = length or count(tokenizer, text) - count(tokenizer, bare)
    ids = torch.tensor([tokenizer.encode(text)])
    logits = model(input_ids=ids).logits[0, :-1].double()
    return logits.log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]][-length:]


def mezo_scores(model, tokenizer, example):
    return [mezo_log_probs(model, tokenizer, example, o).mean().item() for o in example.options]


@torch.no_grad()
def run(model, batch):
    return model(**batch.inputs(model)).logits


def row_texts(tokenizer, encoded):
    """The option's part of each encoded candidate, as pieces."""
    return [tokenizer.convert_ids_to_tokens(ids[-n:]) for ids, n in encoded]


# --- prompts --------------------------------------------------------------------------------------

# fmt: off
GOLDEN = {  # task: (official row, what the hub has otherwise, prompt, options, label)
    "sst2": ({"sentence": " a fine film . ", "label": "1"}, {"label": 1},
             "a fine film . It was", (" terrible", " great"), 1),
    "rte": ({"premise": "It rains.", "hypothesis": "It is wet.", "label": "not_entailment"},
            {"label": 1},
            'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n', ("Yes", "No"), 1),
    "cb": ({"premise": "She said {so}.", "hypothesis": "so", "label": "neutral"}, {"label": 2},
           'Suppose She said {so}. Can we infer that "so"? Yes, No, or Maybe?\n',
           ("Yes", "No", "Maybe"), 2),
    "boolq": ({"passage": "Ice -- Ice is cold.", "question": "is ice cold", "label": True},
              {"label": 1}, "Ice -- Ice is cold. Is ice cold?\n", ("No", "Yes"), 1),
    "wsc": ({"text": "Mark told Pete lies. He left.", "label": False,
             "target": {"span1_text": "Mark", "span2_text": "He", "span1_index": 0}},
            {"label": 0, "target": None, "span1_text": "Mark", "span2_text": "He"},
            "Mark told Pete lies. He left.\nIn the previous sentence, does the pronoun "
            '"he" refer to Mark? Yes or No?\n', ("No", "Yes"), 0),
    "wic": ({"word": "run", "sentence1": "Run rogue.", "sentence2": "She ran.", "label": True},
            {"label": 1}, 'Does the word "run" have the same meaning in these two sentences? '
            "Yes, No?\nRun rogue.\nShe ran.\n", ("No", "Yes"), 1),
    "multirc": ({"passage": {"text": "Motion.", "questions": [
                    {"question": "Why?", "answers": [{"text": "Force", "label": 1}]}]}},
                {"passage": None, "paragraph": "Motion.", "question": "Why?", "answer": "Force",
                 "label": 1},
                'Motion.\nQuestion: Why?\nI found this answer "Force". Is that correct? '
                "Yes or No?\n", ("No", "Yes"), 1),
    "copa": ({"premise": "My body cast a shadow.", "question": "cause", "label": 1,
              "choice1": "The sun rose.", "choice2": "I stood up."}, {},
             "My body cast a shadow because", (" the sun rose.", " I stood up."), 1),
    "winogrande": ({"sentence": "Ian ate Dennis's soup because _ liked it.", "option1": "Ian",
                    "option2": "Dennis", "answer": "1"}, {},
                   "Ian ate Dennis's soup because", (" Ian liked it.", " Dennis liked it."), 0),
    "arce": ({"question": {"stem": "What is wet?", "choices": [
                  {"text": "sand", "label": "A"}, {"text": "rain", "label": "B"},
                  {"text": "dust", "label": "C"}]}, "answerKey": "B"},
             {"question": "What is wet?",
              "choices": {"text": ["sand", "rain", "dust"], "label": ["A", "B", "C"]}},
             "Question: What is wet?\nAnswer:", (" sand", " rain", " dust"), 1),
    "arcc": ({"question": {"stem": "Which {falls}?", "choices": [
                  {"text": x, "label": str(i)} for i, x in enumerate("vwxyz", start=1)]},
              "answerKey": "5"},
             {"question": "Which {falls}?", "choices": {"text": [*"vwxyz"], "label": [*"12345"]}},
             "Question: Which {falls}?\nAnswer:", (" v", " w", " x", " y", " z"), 4),
    "hellaswag": ({"activity_label": "Roof shingle", "ctx_a": "A man is on a roof.",
                   "ctx_b": "he [step] Starts", "label": 3, "endings":
                   ["to fall.", "Go [title] Be [step]sure.", "is [substeps] up.", "pulls  it."]},
                  {"label": "3"}, "Roof shingle: A man is on a roof. He starts",
                  (" to fall.", " Go. Be sure.", " is up.",
                   " pulls it."), 3),
    "piqa": ({"goal": "Dry a shirt", "sol1": "Hang it.", "sol2": "Eat it.", "label": "1"},
             {"label": 1}, "Question: Dry a shirt\nAnswer:", (" Hang it.", " Eat it."), 1),
    "obqa": ({"question": {"stem": "The sun is", "choices": [
                  {"text": "hot", "label": "A"}, {"text": "cold", "label": "B"}]},
              "answerKey": "A"},
             {"question": None, "question_stem": "The sun is",
              "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}},
             "The sun is", (" hot", " cold"), 0),
    "siqa": ({"context": "Al fell.", "question": "How is Al?", "answerA": "well",
              "answerB": "hurt", "answerC": "away", "label": "2"}, {},
             "Q: Al fell. How is Al?\nA:", (" well", " hurt", " away"), 1),
    "mmlu": ({"question": " 1 + 1? ", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"},
             dict.fromkeys("ABCD") | {"choices": ["1", "2", "3", "4"], "answer": 1},
             "1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", (" A", " B", " C", " D"), 1),
    "aqua": ({"question": "How far?", "options": ["A)1 m", "B)2 m", "C)3 m", "D)4 m", "E)5 m"],
              "rationale": "far", "correct": "E"}, {},
             "Q: How far? Answer Choices: (A)1 m (B)2 m (C)3 m (D)4 m (E)5 m\n"
             "A: Among A through E, the answer is",
             (" (A)1 m", " (B)2 m", " (C)3 m", " (D)4 m", " (E)5 m"), 4),
}
GOLDEN["wikitext2"] = ({"text": " = A {title} = \n"}, {}, "", (" = A {title} = \n",), 0)
H = {  # doc_to_text, the choices and the target in lm-evaluation-harness's own templates
    "arce": ("Question: {{question}}\nAnswer:", "{{choices.text}}",
             "{{choices.label.index(answerKey)}}"),
    "arcc": ("Question: {{question}}\nAnswer:", "{{choices.text}}",
             "{{choices.label.index(answerKey)}}"),
    "piqa": ("Question: {{goal}}\nAnswer:", "{{[sol1, sol2]}}", "{{label}}"),
    "obqa": ("{{question_stem}}", "{{choices.text}}",
             "{{choices.label.index(answerKey.lstrip())}}"),
    "siqa": ("Q: {{context}} {{question}}\nA:", "{{[answerA, answerB, answerC]}}",
             "{{ (label|int) - 1 }}"),
    "mmlu": ("{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. "
             "{{choices[3]}}\nAnswer:", "{{['A', 'B', 'C', 'D']}}", "{{answer}}"),
}
# fmt: on


def hub_row(name):
    """The row as the hub has it."""
    official, differs, *_ = GOLDEN[name]
    return {k: v for k, v in {**official, **differs}.items() if v is not None}


@pytest.mark.parametrize("name", H)
def test_prompts_are_those_of_lm_evaluation_harness(name):
    """The harness's templates, rendered by Jinja as it renders them, give the same example."""
    jinja2 = pytest.importorskip("jinja2")
    text, choices, target = (jinja2.Template(t).render(hub_row(name)) for t in H[name])
    (example,) = tasks.TASKS[name].to_examples(hub_row(name))
    options = tuple(" " + choice for choice in ast.literal_eval(choices))  # its target_delimiter
    assert astuple(example) == (text, options, int(target))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_prompts_are_mezos_to_the_character(name):
    """Official row and hub row of every task give the source's prompt, options and right label."""
    official, _, *golden = GOLDEN[name]
    for row in (official, hub_row(name)):
        (example,) = tasks.TASKS[name].to_examples(row)
        assert astuple(example) == (golden[0], golden[1], golden[2])


def test_every_label_name_means_its_index():
    """Names, booleans and integers agree: RTE's entailment is Yes, CB's contradiction is No, ..."""
    for name, labels, says in (
        ("rte", {"entailment": 0, "not_entailment": 1}, ("Yes", "No")),
        ("cb", {"entailment": 0, "contradiction": 1, "neutral": 2}, ("Yes", "No", "Maybe")),
        ("boolq", {False: 0, True: 1}, ("No", "Yes")),
        ("wic", {False: 0, True: 1, "true": 1}, ("No", "Yes")),
    ):
        for label, index in labels.items():
            for form in (label, index):
                (e,) = tasks.TASKS[name].to_examples({**GOLDEN[name][0], "label": form})
                assert e.options[e.label] == says[index] and type(e.label) is int


def test_copa_and_multirc_details():
    """COPA lower-cases the first word only, but not "I"; a MultiRC passage holds many examples."""
    row = {"premise": "He fell. ", "question": "effect", "label": 0}
    row |= {"choice1": "I Saw him.", "choice2": "THE Car came."}
    (e,) = tasks.TASKS["copa"].to_examples(row)
    assert astuple(e) == ("He fell so", (" I Saw him.", " the Car came."), 0)
    answers = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    questions = [{"question": q, "answers": answers} for q in "pq"]
    many = tasks.TASKS["multirc"].to_examples({"passage": {"text": "t", "questions": questions}})
    assert [e.label for e in many] == [0, 1, 0, 1] and len({e.prompt for e in many}) == 4


def test_real_files_give_the_prompts_one_reads_off_them():
    """Rows of SST-2's and COPA's files, by eye."""
    sst2 = load_examples("sst2", data_dir=shared("data", "sst2"), num_validation=0, num_train=10000)
    hide = Example("hide new secretions from the parental units It was", (" terrible", " great"), 0)
    assert hide in sst2.train and len(sst2.train) == 10000 and len(sst2.test) == 872
    copa = load_examples("copa", data_dir=shared("data", "superglue"), num_validation=0)
    options = (" the sun was rising.", " the grass was cut.")
    assert Example("My body cast a shadow over the grass because", options, 0) in copa.train


# --- data -----------------------------------------------------------------------------------------


def fake_rows(name, n):
    """n different official rows of a task."""
    rows = [copy.deepcopy(GOLDEN[name][0]) for _ in range(n)]
    for i, row in enumerate(rows):
        key = next(k for k in ("sentence", "premise", "text", "word", "question") if k in row)
        row[key] = f"{i} {row[key]}"
    return rows


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def own(n, options=("No", "Yes"), start=0):
    numbers = range(start, start + n)
    return [{"prompt": f"q{i}\n", "options": options, "label": i % 2} for i in numbers]


@pytest.mark.parametrize("name, n, left", [("wsc", 554, 54), ("cb", 250, 150), ("copa", 400, 300)])
def test_small_training_splits(tmp_path, name, n, left):
    """MeZO's split leaves 54 training examples of WSC's 554, 150 of CB's 250, 300 of COPA's 400."""
    spec = tasks.TASKS[name]
    for file in spec.files:
        write(tmp_path / spec.folder / file, fake_rows(name, n))
    data = load_examples(name, data_dir=tmp_path)
    assert (len(data.train), len(data.validation)) == (left, spec.num_validation)
    assert len(data.test) == n and (data.scored == "all") is spec.classification
    assert not set(data.train) & set(data.validation)


def test_split_is_mezos(tmp_path):
    """Equal seeds draw MeZO's examples: its two lines with the global generator are the oracle."""
    for file in tasks.TASKS["wic"].files:
        write(tmp_path / "WiC" / file, fake_rows("wic", 90))
    everything = [tasks.TASKS["wic"].to_examples(r)[0] for r in fake_rows("wic", 90)]
    np.random.seed(7)
    drawn = [everything[i] for i in np.random.permutation(90).tolist()[: 40 + 20]]
    np.random.seed(7)
    test = [everything[i] for i in np.random.permutation(90).tolist()[:30]]
    torch.manual_seed(1), np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    sizes = {"num_train": 40, "num_validation": 20, "num_test": 30}
    data = load_examples("wic", data_dir=tmp_path, **sizes, data_seed=7)
    assert data.train == drawn[:-20] and data.validation == drawn[-20:] and data.test == test
    assert torch.equal(before[0], torch.get_rng_state())  # the global generators are left alone
    assert (before[1] == np.random.get_state()[1]).all()
    other = load_examples("wic", data_dir=tmp_path, **sizes, data_seed=8)
    assert other.train != data.train


def test_real_data_dir_splits():
    """Real files give 1,000 / 500 / up to 1,000, and COPA's 300 / 100 / 100, the same each time."""
    root = shared("data", "superglue")
    for name, sizes in (("rte", (1000, 500, 277)), ("copa", (300, 100, 100))):
        data = load_examples(name, data_dir=root)
        assert (len(data.train), len(data.validation), len(data.test)) == sizes
        assert data == load_examples(name, data_dir=data.source)  # the task's own folder will do


def test_the_numbers_of_q():
    """Training and validation of [Q] add up to the published training set; the test is 1,000."""
    published = {"arce": 2251, "arcc": 1119, "hellaswag": 39905, "piqa": 16113, "obqa": 4957}
    published |= {"siqa": 33410, "aqua": 97467}
    for name, n in published.items():
        spec = tasks.TASKS[name]
        assert (spec.num_train + spec.num_validation, spec.num_validation) == (n, 200)
    mmlu = tasks.TASKS["mmlu"]
    assert (mmlu.num_train, mmlu.num_validation, mmlu.batch_size) == (20_000, 200, 16)
    assert "[Q]" in mmlu.sizes and not tasks.TASKS["rte"].sizes


def test_official_files_of_other_forms(tmp_path):
    """Labels may lie in a file beside (PIQA, SIQA), rows in a .csv per subject (MMLU)."""
    (tmp_path / "piqa").mkdir()
    rows = [{"goal": f"g{i}", "sol1": "a", "sol2": "b"} for i in range(3)]
    for name in ("train", "valid"):
        write(tmp_path / "piqa" / f"{name}.jsonl", rows)
        (tmp_path / "piqa" / f"{name}-labels.lst").write_text("1\n0\n1\n")
    data = load_examples("piqa", data_dir=tmp_path, num_validation=0)
    assert {(e.prompt, e.label) for e in data.test} == {
        (f"Question: g{i}\nAnswer:", label) for i, label in enumerate((1, 0, 1))
    }
    (tmp_path / "piqa/valid-labels.lst").write_text("1\n0\n")
    with pytest.raises(ValueError, match="valid-labels.lst has 2 labels for 3 rows of .*valid"):
        load_examples("piqa", data_dir=tmp_path)
    for split, subjects in (("auxiliary_train", "ab"), ("test", "cd")):
        (tmp_path / "data" / split).mkdir(parents=True)
        for subject in subjects:
            row = f'"What, says ""{subject}""?\n\u2028Why?",p,"q, r",s,t,C\n'
            (tmp_path / "data" / split / f"{subject}.csv").write_text(row)
    data = load_examples("MMLU", data_dir=tmp_path, num_validation=1)
    prompt = 'What, says "c"?\n\u2028Why?\nA. p\nB. q, r\nC. s\nD. t\nAnswer:'
    assert Example(prompt, (" A", " B", " C", " D"), 2) in data.test and len(data.test) == 2
    assert load_examples("mmlu", data_dir=tmp_path / "data", num_validation=1).test == data.test
    with open(tmp_path / "data/test/d.csv", "a") as file:
        file.write("short,p,q\n")
    with pytest.raises(ValueError, match="d.csv, row 2 is not a labelled mmlu row: C None is no"):
        load_examples("mmlu", data_dir=tmp_path)


def test_real_files_of_piqa_and_aqua(tmp_path, llama2):
    """Google's and Bisk's own files are read whole, each with the template's prompt and options."""
    root = shared("data")
    (tmp_path / "AQuA").mkdir()
    for name, file in (("train", "dev"), ("test", "test")):
        shutil.copy(root / "aqua" / f"{file}.json", tmp_path / "AQuA" / f"{name}.json")
        shutil.copy(root / "piqa/valid.jsonl", tmp_path / f"{name.replace('test', 'valid')}.jsonl")
        labels = tmp_path / f"{name.replace('test', 'valid')}-labels.lst"
        shutil.copy(root / "piqa/valid-labels.lst", labels)
    aqua = load_examples("aqua", data_dir=tmp_path)
    piqa = load_examples("piqa", data_dir=tmp_path, num_test=2000)
    assert (len(aqua.train), len(aqua.validation), len(aqua.test)) == (54, 200, 254)
    assert (len(piqa.train), len(piqa.validation), len(piqa.test)) == (1638, 200, 1838)
    rows = [json.loads(line) for line in (root / "aqua/test.json").read_text().splitlines()]
    right = {e.prompt: e.options[e.label] for e in aqua.test}
    for row in rows:
        shown = " ".join("(" + o for o in row["options"])
        prompt = (
            f"Q: {row['question']} Answer Choices: {shown}\nA: Among A through E, the answer is"
        )
        assert right[prompt].startswith(f" ({row['correct']})")
    labels = (root / "piqa/valid-labels.lst").read_text().split()
    lines = (root / "piqa/valid.jsonl").read_text().splitlines()
    found = {(e.prompt, e.options): e.label for e in piqa.test}
    for line, label in zip(lines, labels, strict=True):
        row = json.loads(line)
        key = f"Question: {row['goal']}\nAnswer:", (f" {row['sol1']}", f" {row['sol2']}")
        assert found[key] == int(label)
    for data in (aqua, piqa):
        data = replace(data, tokenizer=llama2)
        model_config = LlamaConfig(vocab_size=len(llama2))
        assert tasks.check_examples(data, data.test[:100], 2048, model_config) == 0


@pytest.mark.parametrize("name", tasks.TASKS)
def test_hub_asks_for_parquet_and_gives_what_the_files_give(monkeypatch, tmp_path, name):
    """The hub's integer-labelled rows lead to the same examples as the official files."""
    import datasets

    asked = []

    def load_dataset(path, config, *, split, revision):
        asked.append((path, config, split, len(revision)))
        return datasets.Dataset.from_list([hub_row(name)] * 5)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    if name == "wikitext2":  # blocks of tokens: test_wikitext2_is_read_as_the_field_reads_it
        return
    data = load_examples(name, num_validation=2)
    path, config = tasks.TASKS[name].hub.split(":")
    assert asked == [(path, config, s, 40) for s in tasks.TASKS[name].splits]  # 40: a commit
    assert (len(data.train), len(data.validation), len(data.test)) == (3, 2, 5)
    assert data.train[0] == tasks.TASKS[name].to_examples(GOLDEN[name][0])[0]


def test_a_new_task_is_a_new_row(monkeypatch):
    """YOUR_OWN.md's row, as printed: read from the hub, at its latest commit."""
    text = (Path(tasks.__file__).parent / "YOUR_OWN.md").read_text("utf-8")
    row = eval(re.search(r"```python\n(Task\(.*?)```", text, re.S)[1], {"Task": tasks.Task})
    monkeypatch.setitem(tasks.TASKS, row.name, row)
    rows = [{"question": f"Is {i} odd?", "label": i % 2} for i in range(9)]
    import datasets

    asked = []

    def load_dataset(*what, **how):
        asked.append((*what, *how.values()))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = load_examples("mine", num_validation=3)
    assert asked == [("me/my-data", "default", split, None) for split in ("train", "test")]
    assert len(data.train) == 6 and data.scored == "all"
    assert len(load_examples("mine").validation) == 3  # a third, where the usual 500 are not there
    assert data.train[0].prompt.endswith(" odd?\nYes or No?\n")
    assert all(e.label == int(e.prompt.split()[1]) % 2 for e in data.train)


def test_hub_failure_is_one_line_with_the_ways_out(monkeypatch):
    """Offline or gated: the error names the repository, the login, and the files to use instead."""

    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach\nthe hub\n")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(ValueError) as e:
        load_examples("rte")
    for part in ("aps/super_glue", "ConnectionError", "hf auth login", "--data-dir", "RTE/"):
        assert part in str(e.value)
    assert "\n" not in str(e.value)


def test_own_files(tmp_path):
    """Own files: a third validates by default, a validation file is used alone, options decide."""
    train, test = write(tmp_path / "train.jsonl", own(30)), write(tmp_path / "test.jsonl", own(9))
    data = load_examples(train_file=train, test_file=test)
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 10, 9)
    assert data.scored == "all" and "train.jsonl" in data.source
    assert load_examples(train_file=train, test_file=test, num_validation=0).validation == []
    held = write(tmp_path / "held.jsonl", own(12, start=100))
    files = {"train_file": train, "test_file": test, "validation_file": held}
    data = load_examples(**files, num_train=25)
    assert len(data.train) == 25 and {e.prompt for e in data.validation} == {
        f"q{i}\n" for i in range(100, 112)
    }
    drawn = [f"q{i}\n" for i in np.random.RandomState(0).permutation(30)[:25]]
    assert [e.prompt for e in data.train] == drawn
    assert len(load_examples(**files, num_validation=3).validation) == 3
    write(held, own(4) + own(4, options=("No", "Yes", "Maybe")))
    assert load_examples(**files).scored == "right"
    write(held, own(4, options=("No ", "Yes")))  # a space at an option's end is none
    data = load_examples(**files)
    assert data.scored == "all"


GOOD = '{"prompt": "q", "options": ["a", "b"], "label": 0}\n'
BAD_LINES = {
    "not json": ("{oops}", "not JSON"),
    "a list": ("[1, 2]", r"is not a line \{"),
    "no label": ('{"prompt": "q", "options": ["a", "b"]}', "no field 'label'"),
    "label too big": ('{"prompt": "q", "options": ["a", "b"], "label": 2}', "label 2 .* 0 to 1"),
    "label negative": ('{"prompt": "q", "options": ["a", "b"], "label": -1}', "label -1"),
    "label text": ('{"prompt": "q", "options": ["a", "b"], "label": "a"}', "label 'a' .*integer"),
    "label bool": ('{"prompt": "q", "options": ["a", "b"], "label": true}', "label True"),
    "options text": ('{"prompt": "q", "options": "ab", "label": 0}', "options 'ab'"),
    "options number": ('{"prompt": "q", "options": 2, "label": 0}', "options 2 must be a list"),
    "options null": ('{"prompt": "q", "options": null, "label": 0}', "options None"),
    "option number": ('{"prompt": "q", "options": ["a", {}], "label": 0}', "different texts"),
    "one option": ('{"prompt": "q", "options": ["a"], "label": 0}', "2 or more"),
    "empty option": ('{"prompt": "q", "options": ["a", " "], "label": 0}', r"\['a', ' '\]"),
    "equal options": ('{"prompt": "q", "options": ["a", "a"], "label": 0}', "different"),
    "empty prompt": ('{"prompt": " ", "options": ["a", "b"], "label": 0}', "prompt ' '"),
    "prompt number": ('{"prompt": 3, "options": ["a", "b"], "label": 0}', "prompt 3"),
    "not utf-8": (b'{"prompt": "\xff"}', "not UTF-8"),
    "half an emoji": ('{"prompt": "\\ud83d", "options": ["a", "b"], "label": 0}', "surrogates"),
}


@pytest.mark.parametrize("line, message", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_are_named(tmp_path, line, message):
    """A bad line of the user's file: one line of error with file, line number and what is wrong."""
    path = tmp_path / "train.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n" + GOOD.encode() * 2 + line)
    with pytest.raises(ValueError, match=message) as e:
        load_examples(train_file=path, test_file=path)
    assert f"{path}:4 is not" in str(e.value) and "\n" not in str(e.value)


def test_bad_requests_are_named(tmp_path):
    """Unknown tasks, missing or wrong files and impossible sizes each say what would work."""
    good = write(tmp_path / "good.jsonl", own(3))
    write(tmp_path / "RTE" / "train.jsonl", fake_rows("rte", 3))
    (tmp_path / "empty.jsonl").write_text("\n \n")
    for kwargs, message in (
        ({"task": "rta"}, "unknown task 'rta': tasks are sst2, rte, cb"),
        ({"task": "rte", "train_file": good}, "give a task"),
        ({"train_file": good}, "--test-file"),
        ({}, "give a task"),
        ({"train_file": good, "test_file": good, "data_dir": tmp_path}, "give a task"),
        ({"task": "cb", "data_dir": tmp_path}, "no file .*CB/train.jsonl; .* has RTE, empty.jsonl"),
        ({"task": "rte", "data_dir": tmp_path}, r"no file .*RTE/val.jsonl; .*RTE has train.jsonl"),
        ({"task": "rte", "data_dir": tmp_path / "no"}, r"no file .*no/RTE/train.jsonl; .* has RTE"),
        ({"task": "copa", "data_dir": tmp_path / "RTE"}, "train.jsonl:1 .*copa row: no field"),
        ({"task": "cb", "data_dir": tmp_path / "RTE"}, "train.jsonl:1 .*'not_entailment'"),
        ({"train_file": tmp_path / "gone.jsonl", "test_file": good}, "no file .*gone.jsonl"),
        ({"train_file": tmp_path / "empty.jsonl", "test_file": good}, "empty.jsonl is empty"),
        ({"train_file": good, "test_file": good, "num_validation": 3}, "leave nothing to train"),
    ):
        with pytest.raises(ValueError, match=message) as e:
            load_examples(**kwargs)
        assert "\n" not in str(e.value)


def test_sst2_tsv(tmp_path):
    """SST-2's files keep bare quotes; a line with another number of cells is an error."""
    for file in ("train.tsv", "dev.tsv"):
        path = tmp_path / "SST-2" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text('sentence\tlabel\n"so bad \t0\nfine"ly \t1\n')
    data = load_examples("SST-2", data_dir=tmp_path, num_validation=0)
    assert {e.prompt for e in data.train} == {'"so bad It was', 'fine"ly It was'}
    for line, message in (("a\tb\t0", "3 tab"), ("a", "1 tab"), ("a\t3", "label '3'")):
        path.write_text(f"sentence\tlabel\nok \t0\n{line}\n")
        with pytest.raises(ValueError, match=f"dev.tsv:3 .*{message}"):
            load_examples("sst2", data_dir=tmp_path, num_validation=0)
    path.write_text("sentence\tlabel\n")
    with pytest.raises(ValueError, match="empty"):
        load_examples("sst2", data_dir=tmp_path)
    path.write_text("sentence\tlabel\nnaïf \t0\n", encoding="latin-1")
    with pytest.raises(ValueError, match="dev.tsv:2 is not UTF-8"):
        load_examples("sst2", data_dir=tmp_path)


def test_odd_files_are_read(tmp_path):
    """A byte-order mark, Windows line ends, blank lines and U+2028 inside a string do no harm."""
    path = tmp_path / "own.jsonl"
    row = '{"prompt": "a\u2028b", "options": ["x", "y"], "label": 1}'
    path.write_bytes(b"\xef\xbb\xbf" + (row + "\r\n\r\n" + row).encode())
    data = load_examples(train_file=path, test_file=path, num_validation=0)
    assert data.train == [Example("a\u2028b", ("x", "y"), 1)] * 2


def test_demonstrations():
    """Demos are prompt + right option, stripped and joined by blank lines, as MeZO joins them."""
    demos = [Example("A?\n", ("No", "Yes"), 1), Example("It was", (" bad", " good"), 0)]
    example = Example(" B?\n", ("No", "Yes"), 0)
    shown = tasks.with_demonstrations(example, demos)
    assert shown == Example("A?\nYes\n\nIt was bad\n\nB?\n", ("No", "Yes"), 0)
    assert tasks.with_demonstrations(Example("B?\n", ("x", "y"), 0), []).prompt == "B?\n"


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31), st.integers(0, 200))
def test_batches_are_a_pure_function_of_the_step(n, size, seed, step):
    """Within an epoch no example comes twice; any step can be asked first; too few: all of them."""
    got = tasks.minibatch(n, size, seed, step)
    if n < size:
        assert got == list(range(n))
        return
    per_epoch = n // size
    epoch = [tasks.minibatch(n, size, seed, step - step % per_epoch + i) for i in range(per_epoch)]
    flat = sum(epoch, [])
    assert len(set(flat)) == len(flat) == per_epoch * size and set(flat) <= set(range(n))
    assert got == epoch[step % per_epoch] == tasks.minibatch(n, size, seed, step)


def test_epochs_and_seeds_differ():
    """Another epoch or another seed is another order of the same examples."""
    orders = {
        (seed, epoch): sum([tasks.minibatch(64, 16, seed, 4 * epoch + i) for i in range(4)], [])
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    }
    assert all(sorted(order) == list(range(64)) for order in orders.values())
    assert len(set(map(tuple, orders.values()))) == 3


# --- tokens ---------------------------------------------------------------------------------------


def test_llama2_tokens_are_mezos(llama2):
    """For Llama 2 the option's length is MeZO's difference of counts, and the ids are its ids."""
    examples = [e for n, g in GOLDEN.items() for e in tasks.TASKS[n].to_examples(g[0])]
    examples += load_examples("sst2", data_dir=shared("data", "sst2")).test[:80]
    for name in ("rte", "wic", "copa", "multirc"):
        data = load_examples(name, data_dir=shared("data", "superglue"), num_test=80)
        examples += data.test[: 30 if name == "multirc" else 80]
    for e in examples:
        for (ids, length), option in zip(encode(llama2, e), e.options, strict=True):
            assert ids == llama2.encode((e.prompt + option).strip(" "))
            assert length == len(ids) - count(llama2, e.prompt.strip(" ")) > 0


def test_pieces_with_the_space_at_their_end(stories):
    """tinystories: "It was " is one piece of the prompt, so the option starts after it."""
    tokenizer, _ = stories
    example = Example("good fun . It was", (" great", " terrible"), 0)
    encoded = encode(tokenizer, example)
    assert row_texts(tokenizer, encoded) == [["gre", "at"], ["ter", "ri", "ble"]]
    assert encoded[0][0][:-2] == encoded[1][0][:-3]  # the same prompt pieces before both
    bare = count(tokenizer, example.prompt)
    assert [len(ids) - bare for ids, _ in encoded] == [1, 2]  # MeZO's counts are one short


def test_dropped_characters(stories):
    """tinystories drops letters it lacks, which shifts spans; the option is found all the same."""
    tokenizer, _ = stories
    for odd in ("é", "é 🙂", "日本"):
        yes_no = encode(tokenizer, Example(f"{odd} so\n", ("Yes", "No"), 0))
        assert row_texts(tokenizer, yes_no) == [["Y", "es"], ["N", "o"]]
        was = encode(tokenizer, Example(f"{odd} . It was", (" great", " terrible"), 0))
        assert row_texts(tokenizer, was) == [["gre", "at"], ["ter", "ri", "ble"]]
        reply = (" hello there" + tokenizer.eos_token,)  # found whole, whatever was dropped before
        replies = [encode(tokenizer, Example(f"{by} so", reply, 0)) for by in ("it", odd)]
        assert row_texts(tokenizer, replies[0]) == row_texts(tokenizer, replies[1])
    with pytest.raises(ValueError, match="option ' 🙂' .* 0 of"):
        encode(tokenizer, Example("It was", (" 🙂", " great"), 0))
    tokenizer = copy.deepcopy(tokenizer)
    closing = {"special_tokens": [("<s>", 1), ("</s>", 2)]}  # an EOS that the tokenizer adds
    processor = processors.TemplateProcessing(single="<s> $A </s>", **closing)
    tokenizer.backend_tokenizer.post_processor = processor
    for prompt in ("so\n", "é so\n"):
        yes_no = encode(tokenizer, Example(prompt, ("Yes", "No"), 0))
        assert row_texts(tokenizer, yes_no) == [["Y", "es"], ["N", "o"]]


def test_merging_pieces():
    """A piece that spans the prompt's end and the option is the option's; a bare space may be."""
    tokenizer = word_tokenizer(r"\n?\w+|[^\w\s]", extra=["\nYes", "\nNo"])
    encoded = encode(tokenizer, Example("is it so?\n", ("Yes", "No"), 0))
    assert row_texts(tokenizer, encoded) == [["\nYes"], ["\nNo"]]
    tokenizer = word_tokenizer(r" |\w+", extra=[" "])  # the space is a piece of its own
    example = Example("it was", (" great", " red"), 0)
    encoded = encode(tokenizer, example)
    assert row_texts(tokenizer, encoded) == [[" ", "great"], [" ", "red"]]
    assert encoded[0][1] == count(tokenizer, "it was great") - count(tokenizer, "it was")
    at_end = word_tokenizer(r"\w+ ?", extra=["was ", "it "])
    assert row_texts(at_end, encode(at_end, example)) == [["great"], ["red"]]


def test_outer_spaces_and_closing_tokens():
    """Outer spaces are stripped and an EOS that the tokenizer adds is cut off, newlines stay."""
    plain = encode(TOKENIZER, Example("it was", (" great", " red"), 0))
    assert encode(TOKENIZER, Example("  it was ", ("great ", " red"), 0)) == plain
    closing = word_tokenizer(eos=True)
    assert closing.encode("it")[-1] == 2
    assert encode(closing, Example("it was", (" great", " red"), 0)) == plain
    newline = encode(TOKENIZER, Example("it", ("\nYes\n", "\nNo"), 0))
    assert row_texts(TOKENIZER, newline) == [["\n", "Yes", "\n"], ["\n", "No"]]


@pytest.mark.parametrize("bos", [True, False])
def test_truncation_drops_the_beginning_but_bos(bos):
    """Too long a prompt loses tokens after BOS, never the option's; no room is an error."""
    tokenizer = word_tokenizer(bos=bos)
    example = Example("the cat sat on a red mat because", (" it was great", " he ran"), 0)
    full = encode(tokenizer, example)
    for max_length in range(4 + bos, len(full[0][0]) + 1):
        cut = encode(tokenizer, example, max_length)
        for (ids, length), (whole, n) in zip(cut, full, strict=True):
            assert length == n and len(ids) == min(max_length, len(whole))
            assert ids[bos:] == whole[bos:][-len(ids) + bos :] and ids[:bos] == whole[:bos]
    for max_length in (0, 1, 2, 3):
        with pytest.raises(ValueError, match="' it was great' of .*max_length="):
            encode(tokenizer, example, max_length)


def test_encoding_errors():
    """No spans, an option without tokens, and nothing before the option are errors that say so."""

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow has no character spans"):
        encode(Slow(), Example("a", ("b", "c"), 0))
    letters = word_tokenizer(r"[a-z]+")
    with pytest.raises(ValueError, match=r"option ' 42' of \.\.\.'it was' has 0 of"):
        encode(letters, Example("it was", (" 42", " red"), 0))
    with pytest.raises(ValueError, match="1 before it"):
        encode(word_tokenizer(bos=False), Example("", ("red", "great"), 0))
    assert encode(TOKENIZER, Example("", ("red", " great"), 0))[0][1] == 1  # BOS is enough


# --- scores ---------------------------------------------------------------------------------------

sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)
shorts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(lambda w: " " + " ".join(w))


@st.composite
def an_example(draw):
    options = draw(st.lists(shorts, min_size=2, max_size=4, unique=True))
    return Example(draw(sentences), tuple(options), draw(st.integers(0, len(options) - 1)))


YES_NO = [
    Example("the cat sat on the mat. so is it red?\n", ("Yes", "No"), 1),
    Example("was it?\n", ("Yes", "No"), 0),
    Example("is the dog great, terrible, red?\n", ("Yes", "No"), 0),
]
MULTI = [
    Example("the cat ran because", (" it was red.", " the dog sat on it."), 1),
    Example("I sat so", (" he ran.", " it is terrible.", " red"), 0),
]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@settings(deadline=None, derandomize=True, max_examples=12)
@given(examples=st.lists(an_example(), min_size=1, max_size=4), pack=st.sampled_from([0, 99]))
def test_scores_are_mezos(name, examples, pack):
    """Batched, padded and shared rows give each option the score MeZO gets from it alone."""
    model = built(name)
    batch = collate(TOKENIZER, examples, pack=pack)
    scores = tasks.option_scores(run(model, batch), batch)
    assert scores.dtype == torch.float32
    for got, e in zip(scores, examples, strict=True):
        want = torch.tensor(mezo_scores(model, TOKENIZER, e))
        torch.testing.assert_close(got[: len(want)], want, atol=1e-5, rtol=1e-5)
        assert (got[len(want) :] == -torch.inf).all()


@pytest.mark.parametrize("examples", [YES_NO, MULTI, YES_NO + MULTI])
def test_losses_are_mezos(llama, examples):
    """Cross-entropy over means for classification; tokens averaged over the batch for LM loss."""
    batch = collate(TOKENIZER, examples)
    logits = run(llama, batch)
    scores = [torch.tensor(mezo_scores(llama, TOKENIZER, e)) for e in examples]
    want = torch.stack([-s.log_softmax(0)[e.label] for s, e in zip(scores, examples, strict=True)])
    got = tasks.classification_loss(logits, batch)
    assert got.shape == () and abs(got - want.mean()) < 1e-5
    right = [mezo_log_probs(llama, TOKENIZER, e, e.options[e.label]) for e in examples]
    assert abs(tasks.lm_loss(logits, batch) + torch.cat(right).mean()) < 1e-5
    best = [int(s.argmax()) == e.label for s, e in zip(scores, examples, strict=True)]
    assert tasks.correct(logits, batch)[0].tolist() == best
    only = collate(TOKENIZER, examples, scored="right")
    assert abs(tasks.lm_loss(run(llama, only), only) + torch.cat(right).mean()) < 1e-5
    assert len(only.input_ids) == len(examples) and only.valid.sum() == len(examples)
    with pytest.raises(ValueError, match="all options"):
        tasks.classification_loss(run(llama, only), only)


def test_a_score_that_is_not_finite_is_no_right_answer():
    """argmax of NaN is the first option, which would make the share of label 0 the accuracy."""
    examples = [*YES_NO[:2], Example("it", (" was", " ran", " red"), 0)]
    batch = collate(TOKENIZER, examples)
    logits = torch.zeros(len(batch.input_ids), batch.keep, VOCAB)
    assert tasks.correct(logits, batch)[1].all()  # an option that two examples lack is no NaN
    logits[batch.row[batch.slot // 3 == 1]] = torch.nan
    right, finite = tasks.correct(logits, batch)
    assert finite.tolist() == [True, False, True] and not right[1]


def test_options_that_are_equally_likely_share_an_answer():
    """Of k options with the highest score each is right by 1/k, so that none gains by its place."""
    examples = [Example("it", (" was", " ran", " red"), label) for label in (0, 1, 2)]
    batch = collate(TOKENIZER, examples)
    logits = torch.zeros(len(batch.input_ids), batch.keep, VOCAB)
    torch.testing.assert_close(tasks.correct(logits, batch)[0], torch.full((3,), 1 / 3))
    logits[batch.row, batch.kept, batch.token] = (batch.slot % 3 != 1).float()
    assert tasks.correct(logits, batch)[0].tolist() == [0.5, 0, 0.5]


def test_examples_are_checked_before_training():
    """Prompts that lose their beginning are counted, an option without room is an error."""
    short, long = Example("a b", (" red", " blue"), 0), Example("a b c a b c", (" red", " blue"), 0)
    length = max(len(ids) for ids, _ in tasks.encode(TOKENIZER, short))
    data = dataset.Data([], [], [], "all", "", TOKENIZER)
    check = functools.partial(tasks.check_examples, data, model_config=LlamaConfig(vocab_size=99))
    assert check([short, long, long], length) == 2
    assert check([short, long], 100) == 0
    with pytest.raises(ValueError, match="it needs 1, and 1 before it"):
        check([short, Example("a", (" b", " a b c a b c"), 0)], length)
    with pytest.raises(ValueError, match="the same to this tokenizer"):
        check([Example("a", (" quokka", " wombat"), 0)], length)


def test_the_score_is_a_mean_not_a_sum():
    """A long option of likelier tokens beats a short one; a sum would turn that round."""
    batch = collate(TOKENIZER, [Example("it", (" was red so great", " ran"), 0)])
    logits = torch.zeros(len(batch.input_ids), batch.keep, VOCAB)
    logits[batch.row, batch.kept, batch.token] = torch.tensor([3.0] * 4 + [2.0])
    log_probs = tasks._log_probs(logits, batch)
    assert log_probs[:4].sum() < log_probs[4]  # the sum prefers the short one
    assert tasks.correct(logits, batch)[0].all()
    torch.testing.assert_close(tasks.option_scores(logits, batch)[0, 0], log_probs[0])


def test_one_row_where_inputs_are_equal():
    """Yes/No costs one row an example and one position; other options have rows of their own."""
    batch = collate(TOKENIZER, YES_NO)
    assert len(batch.input_ids) == 3 and batch.keep == 1
    assert batch.row.tolist() == [0, 0, 1, 1, 2, 2]
    batch = collate(TOKENIZER, YES_NO + MULTI)
    assert len(batch.input_ids) == 3 + 2 + 3 and batch.keep == 6
    assert batch.valid.tolist() == [[1, 1, 0]] * 3 + [[1, 1, 0], [1, 1, 1]]
    assert len(collate(TOKENIZER, [YES_NO[0]] * 2).input_ids) == 2  # examples never share


def test_layout_of_a_batch():
    """Left-padded to a multiple of 8 with a token that the model knows, positions from 0 at BOS."""
    batch = collate(TOKENIZER, YES_NO + MULTI)
    inputs = batch.inputs(build("llama"))
    tensors = batch.input_ids, batch.attention_mask, inputs["position_ids"]
    for x in tensors:
        assert x.dtype == torch.int64 and x.shape == batch.input_ids.shape and x.shape[1] % 8 == 0
    for ids, mask, position in zip(*tensors, strict=True):
        pad = int((mask == 0).sum())
        assert (mask[pad:] == 1).all() and (ids[: pad + 1] == 1).all()
        assert position.tolist() == [0] * pad + list(range(len(mask) - pad))
    assert batch.weight.dtype == torch.float32
    assert batch.labels.tolist() == [e.label for e in YES_NO + MULTI]
    with pytest.raises(ValueError, match="'best' must be 'all' or 'right'"):
        collate(TOKENIZER, YES_NO, scored="best")


def test_texts_share_rows_and_not_their_meaning():
    """Every text stands once and whole in a row, attends to itself alone, and counts from 0."""
    examples = YES_NO + MULTI + [Example("red", (" was",), 0)] * 3
    apart, batch = collate(TOKENIZER, examples), collate(TOKENIZER, examples, pack=99)
    assert batch.input_ids.shape[1] == apart.input_ids.shape[1]
    assert len(batch.input_ids) < len(apart.input_ids)
    found = []
    for ids, mask, position in zip(
        batch.input_ids, batch.attention_mask[:, 0], batch.position_ids, strict=True
    ):
        starts = [i for i, p in enumerate(position.tolist()) if p == 0] + [len(ids)]
        want = torch.zeros(len(ids), len(ids), dtype=torch.bool)
        for i, j in zip(starts, starts[1:], strict=False):
            assert position[i:j].tolist() == list(range(j - i))
            want[i:j, i:j] = True
            found += [ids[i:j].tolist()] * (j - i > 1)
        assert torch.equal(mask, want.tril())
    texts = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(apart.input_ids, apart.attention_mask, strict=True)
    ]
    assert sorted(found) == sorted(texts)
    ends = torch.stack([batch.row, batch.place])
    assert torch.equal(batch.keep[batch.row, batch.kept], batch.place)
    reads = [len(set(batch.place[batch.row == row].tolist())) for row in range(len(batch.keep))]
    assert batch.keep.shape[1] == max(reads) < batch.input_ids.shape[1]
    assert batch.input_ids[*ends].tolist() == apart.input_ids[apart.row, apart.place].tolist()


def test_no_row_is_shared_beyond_what_a_model_bears():
    """A row longer than a window, or texts that fill a row each, leave the texts as they were."""
    apart = collate(TOKENIZER, YES_NO + MULTI)
    T = apart.input_ids.shape[1]
    pairs = [(collate(TOKENIZER, YES_NO + MULTI, pack=T - 1), apart)]
    pairs += [(collate(TOKENIZER, YES_NO[:1] * 2, pack=99), collate(TOKENIZER, YES_NO[:1] * 2))]
    full = [Example(tuple(range(n)), ((9,), (8,)), 0) for n in (6, 8, 7)]  # rows of 8: no two fit
    pairs += [(collate(TOKENIZER, full, pack=99), collate(TOKENIZER, full))]
    assert isinstance(pairs[0][0].keep, torch.Tensor)  # places: a slice is not contiguous
    for one, other in pairs:
        numbers = vars(one)
        if isinstance(one.keep, torch.Tensor):  # the same places by another name
            assert torch.equal(one.keep[one.row, one.kept], other.place)
            numbers = {n: v for n, v in numbers.items() if n not in ("keep", "kept")}
        for name, value in numbers.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(value, getattr(other, name)), name


@settings(deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), more=st.integers(0, 3))
def test_every_text_has_one_row_with_room(lengths, more):
    """No row is fuller than its tokens, and no two rows have room for each other."""
    T = max(lengths) + more
    rows = tasks.pack_rows(lengths, T)
    assert sorted(sum(rows, [])) == list(range(len(lengths)))
    full = sorted(sum(lengths[i] for i in row) for row in rows)
    assert full[-1] <= T and (len(full) == 1 or full[0] + full[1] > T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name, longest",
    [("llama", 1 << 30), ("opt", 1 << 30), ("opt-350m", 1 << 30), ("gpt2", 1 << 30),
     ("falcon", 1 << 30), ("qwen3", 1 << 30), ("gemma3", 4096), ("llama4", 8192),
     ("mistral", 0), ("bloom", 0), ("mamba", 0), ("jamba", 0)],
)  # fmt: skip
def test_a_model_says_whether_texts_may_share_its_rows(name, longest, dtype):
    """As far as its window, and not at all where ALiBi or a state runs on from text to text."""
    model = build(name, dtype)
    assert tasks.layout(model)["pack"] == 0
    model.pack = loading.shared_row(model)
    assert tasks.layout(model) == {"device": model.device, "pack": longest}


def test_only_the_last_positions_are_needed(llama):
    """logits_to_keep and all logits (a model that ignores it) give bit-equal scores."""
    batch = collate(TOKENIZER, YES_NO + MULTI)
    kept = run(llama, batch)
    full = llama(**batch.inputs(llama) | {"logits_to_keep": 0}).logits.detach()
    assert kept.shape[1] == batch.keep < full.shape[1]
    assert torch.equal(
        tasks.option_scores(full[:, -batch.keep :], batch), tasks.option_scores(full, batch)
    )
    torch.testing.assert_close(tasks.option_scores(kept, batch), tasks.option_scores(full, batch))


@pytest.mark.parametrize("length", [2, 8])
def test_places_of_shared_rows_are_read_from_few_logits_or_all(llama, length):
    """Whether a model knows logits_to_keep or not, also where a row of 8 is read everywhere."""
    options = [tuple(range(6, 6 + n)) for n in (length, 2, 2, 3)]
    examples = [Example((5,), (option,), 0) for option in options]
    examples += [Example((5, 6, 7, 8, 9), ((7,), (8,)), 0)]
    batch = collate(TOKENIZER, examples, pack=99)
    assert batch.attention_mask.dtype == torch.bool and batch.input_ids.shape[1] == 8
    assert isinstance(batch.keep, int) == (length == 8)
    full = llama(**batch.inputs(llama) | {"logits_to_keep": 0}).logits.detach()
    scores = tasks.option_scores(run(llama, batch), batch)
    torch.testing.assert_close(scores, tasks.option_scores(full, batch))
    apart = collate(TOKENIZER, examples)
    want = tasks.option_scores(run(llama, apart), apart)
    torch.testing.assert_close(scores, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["a number", "a list"])
def test_code_that_keeps_logits_its_own_way_is_given_a_number(how, monkeypatch):
    """Where places of each row mean another thing, texts have rows of their own and scores hold."""
    model = build("llama")
    head = model.lm_head

    def forward(input_ids, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
        hidden = model.model(input_ids, attention_mask, position_ids, use_cache=False)[0]
        if how == "a list" and not isinstance(logits_to_keep, int):
            return SimpleNamespace(logits=head(hidden[:, logits_to_keep]))  # 4 dimensions
        return SimpleNamespace(logits=head(hidden[:, -logits_to_keep:]))

    monkeypatch.setattr(model, "forward", forward)
    model.pack = loading.shared_row(model)
    assert model.pack == 0
    examples = [*YES_NO, Example("red", (" was",), 0)]
    batch = collate(TOKENIZER, examples, **tasks.layout(model))
    for got, e in zip(tasks.option_scores(run(model, batch), batch), examples, strict=True):
        want = torch.tensor(mezo_scores(build("llama"), TOKENIZER, e))
        torch.testing.assert_close(got[: len(want)], want, atol=1e-5, rtol=1e-5)


@needs_gpu
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma3"])
def test_texts_share_rows_on_a_gpu(name):
    """There, too, loading finds that they may, and scores are those of each text alone."""
    model = build(name).to("cuda")
    model.pack = loading.shared_row(model)
    how = tasks.layout(model)
    assert how["pack"] > 0 and how["device"].type == "cuda"
    packed, apart = [collate(TOKENIZER, YES_NO + MULTI, **way) for way in (how, how | {"pack": 0})]
    assert len(packed.input_ids) < len(apart.input_ids)
    got, want = (tasks.option_scores(run(model, batch), batch) for batch in (packed, apart))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_eager_attention_reads_shared_rows():
    """Its scores have the mask added, where other attention may also take a boolean one."""
    model = build("llama")
    model.set_attn_implementation("eager")
    model.pack = loading.shared_row(model)
    assert model.pack > 0
    batch = collate(TOKENIZER, YES_NO + MULTI, pack=99)
    for got, e in zip(tasks.option_scores(run(model, batch), batch), YES_NO + MULTI, strict=True):
        want = torch.tensor(mezo_scores(build("llama"), TOKENIZER, e))
        torch.testing.assert_close(got[: len(want)], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_make_an_fp32_loss(llama, dtype):
    """Half-precision logits give the loss of their fp32 copies, not that of a half log-softmax."""
    batch = collate(TOKENIZER, YES_NO + MULTI)
    half = run(llama, batch).to(dtype)
    for loss in (tasks.classification_loss, tasks.lm_loss):
        assert loss(half, batch).dtype == torch.float32
        assert abs(loss(half, batch) - loss(half.float(), batch)) < 1e-6
    coarse = half.log_softmax(-1)[batch.row, batch.kept, batch.token].float()
    fine = tasks._log_probs(half, batch)
    assert 1e-5 < (coarse - fine).abs().max() < 0.1


def test_a_missing_or_impossible_option_spoils_nothing():
    """-inf for one option's token, or an option that an example lacks, leaves the others finite."""
    batch = collate(TOKENIZER, MULTI)
    logits = torch.randn(len(batch.input_ids), batch.keep, VOCAB)
    want = tasks.option_scores(logits, batch)
    assert torch.isinf(want).tolist() == [[False, False, True], [False] * 3]
    wrong = int((batch.slot == 1 * 3 + 1).nonzero()[0])  # example 1, option 1; option 0 is right
    logits[batch.row[wrong], batch.kept[wrong], batch.token[wrong]] = -torch.inf
    scores = tasks.option_scores(logits, batch)
    assert scores[1, 1] == -torch.inf and torch.equal(scores[0], want[0])
    for loss in (tasks.classification_loss, tasks.lm_loss):
        assert loss(logits, batch).isfinite()


def test_a_batch_moves_whole():
    """Every tensor is made on the device that was asked for."""
    batch = collate(TOKENIZER, YES_NO, device="meta")
    tensors = [v for v in vars(batch).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 11 and all(t.device.type == "meta" for t in tensors)


@pytest.mark.parametrize("name", ["sst2", "copa", "rte"])
def test_real_model_on_real_text(stories, name):
    """tinystories656k: the scores of a padded batch are those of each option alone."""
    tokenizer, model = stories
    folder = shared("data", "sst2" if name == "sst2" else "superglue")
    examples = load_examples(name, data_dir=folder, num_test=4).test
    batch = collate(tokenizer, examples, max_length=500)
    scores = tasks.option_scores(run(model, batch), batch)
    for got, e in zip(scores, examples, strict=True):
        for s, option in zip(got, e.options, strict=True):
            text, word = (e.prompt + option).strip(" "), option.strip(" ")
            length, tail = 0, ""  # pieces from the end until they spell the option
            for piece in reversed(tokenizer.convert_ids_to_tokens(tokenizer.encode(text))):
                if len(tail.replace("▁", " ").lstrip()) >= len(word):
                    break
                length, tail = length + 1, piece + tail
            assert tail.replace("▁", " ").endswith(word)  # "because he " is one piece
            want = mezo_log_probs(model, tokenizer, e, option, length).mean()
            assert abs(s - want) < 1e-5


def test_truncated_batch_is_the_truncated_text(llama):
    """With a small max_length the model sees BOS and the prompt's end, and scores accordingly."""
    long = Example("the cat sat on the mat. so is it red?\n", ("Yes", "No"), 1)
    batch = collate(TOKENIZER, [long], max_length=6)
    assert batch.attention_mask.sum() == 5
    short = Example("it red?\n", ("Yes", "No"), 1)
    want = torch.tensor([mezo_scores(llama, TOKENIZER, short)])
    got = tasks.option_scores(run(llama, batch), batch)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


# --- what a step and an evaluation are made of ----------------------------------------------------


@pytest.mark.parametrize("scored, micro", [("all", 1), ("all", 3), ("right", 1), ("right", 3)])
def test_micro_batches_are_the_whole_batch_to_rounding(scored, micro):
    """Options of unequal length, where a mean of means would be another number, for both losses."""
    patch = model_patch.Patch(build("llama"), masks.Everything(), eps=1e-3)
    examples = [
        Example("a cat ?", (" red", " it was so great"), 1),
        *(Example(f"{w} dog ?", (" red", " it was so great"), 0) for w in WORDS[:6]),
    ]

    data = dataset.Data(examples, [], [], scored, "", TOKENIZER)

    def both(size):
        config = Config(batch_size=7, micro_batch=size, max_length=64)
        batches = list(train.batches_of_step(config, patch.model, data, 0))
        assert [len(b.labels) for b in batches] == [size] * (7 // size) + [7 % size] * (
            7 % size > 0
        )
        return train.losses(patch, batches, 5)

    assert both(micro) == pytest.approx(both(7), rel=1e-6)


def test_a_forward_gets_only_what_it_names(llama):
    """Ids and mask always, also where forward has no names; positions and the rest by name."""
    batch = collate(TOKENIZER, YES_NO)

    class Model:
        def __init__(self, forward):
            self.forward = forward

    always = {"input_ids", "attention_mask"}
    assert set(batch.inputs(Model(lambda *args, **kwargs: 0))) == always
    assert set(batch.inputs(Model(lambda input_ids, position_ids: 0))) == always | {"position_ids"}
    assert batch.inputs(llama)["logits_to_keep"] == batch.keep


def test_accuracy_counts_every_example_once(llama):
    """Sorted and batched as one likes, as many are right as one at a time; NaN is never right."""
    alone = [int(np.argmax(mezo_scores(llama, TOKENIZER, e))) == e.label for e in YES_NO + MULTI]
    for size in (1, 2, 16):
        found = tasks.tally(llama, TOKENIZER, YES_NO + MULTI, batch_size=size)
        assert found.tolist() == [sum(alone), 5, 0]
    spoilt = copy.deepcopy(llama)
    spoilt.lm_head.weight.data.fill_(torch.nan)
    assert tasks.tally(spoilt, TOKENIZER, YES_NO + MULTI).tolist() == [0, 5, 5]
    assert str(tasks.Score(0.5, 100)) == "0.500 ± 0.050 (n = 100)"
    assert "3 of the examples" in str(tasks.Score(0.5, 100, 3))


@pytest.mark.parametrize("scored", ["all", "right"])
def test_the_loss_that_scores_weights_is_that_of_training(llama, scored):
    """task_losses gives each example the very loss that a step of train.py gives it."""
    data = dataset.Data(YES_NO + MULTI, [], [], scored, "", TOKENIZER)
    patch = model_patch.Patch(build("llama"), masks.Everything(), eps=1e-9)
    losses = tasks.task_losses(data, len(data.train))
    for loss, example in zip(losses, data.train, strict=True):
        batch = collate(TOKENIZER, [example], scored=data.scored, max_length=64)
        want, _ = train.losses(patch, [batch], 0)
        assert loss(llama).item() == pytest.approx(want, rel=1e-5)


def test_the_loss_of_a_text_is_that_of_transformers(llama):
    """text_losses is the model's own language-model loss."""
    windows = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    for loss, row in zip(tasks.text_losses(windows), windows, strict=True):
        want = llama(input_ids=row[None], labels=row[None]).loss
        torch.testing.assert_close(loss(llama), want)


def test_the_tiny_data_is_found_from_anywhere(tmp_path, monkeypatch):
    """The offline default lies beside the code, not in the working directory."""
    monkeypatch.chdir(tmp_path)
    few = Config(task="copa", data_dir="tiny/data", num_train=7, num_test=5)
    *_, data = dataset.load(few)
    assert (len(data.train), len(data.validation), len(data.test)) == (7, 100, 5)
    assert data.scored == "right"


# --- completions: an example with one option ------------------------------------------------------

COMPLETIONS = [
    Example("the cat sat on the mat.", (" so it was great",), 0),
    Example("is it red?\n", ("No",), 0),
    Example((1, 5, 6), ((90, 8, 9, 10, 11),), 0),
]


def test_perplexity_is_over_tokens_one_at_a_time(llama):
    """exp of the mean of −log p over all completion tokens, however they are batched and padded."""
    alone = [mezo_log_probs(llama, TOKENIZER, e, e.options[0]) for e in COMPLETIONS[:2]]
    ids = torch.tensor([[1, 5, 6, 90, 8, 9, 10, 11]])
    with torch.no_grad():
        logits = llama(input_ids=ids).logits[0].double().log_softmax(-1)
    alone.append(logits[range(2, 7), ids[0, 3:]])
    want = torch.cat(alone)
    for size in (1, 2, 16):
        total, n, broken = tasks.tally(llama, TOKENIZER, COMPLETIONS, batch_size=size)
        assert (n, broken) == (4 + 1 + 5, 0) and total == pytest.approx(
            -want.sum().item(), rel=1e-5
        )
    config = Config(batch_size=2, max_length=64)
    found = train.score(config, llama, TOKENIZER, COMPLETIONS)
    assert found.value == pytest.approx(math.exp(-want.mean()), rel=1e-5)
    assert (found.n, found.metric) == (10, "perplexity")
    assert str(tasks.Score(math.e, 10, 0, "perplexity")) == "2.718 (loss 1.0000, n = 10 tokens)"
    batch = collate(TOKENIZER, COMPLETIONS, scored="right")
    with torch.no_grad():  # the loss of training is the same number
        torch.testing.assert_close(tasks.loss(llama, batch).double(), -want.mean())


def test_a_perplexity_that_is_not_finite_is_counted(llama):
    """A NaN among the log-probabilities makes the perplexity infinite; only such are an error."""
    spoilt = copy.deepcopy(llama)
    spoilt.model.embed_tokens.weight.data[90] = torch.nan  # read in the last example only
    config = Config(batch_size=2, max_length=64)
    found = train.score(config, spoilt, TOKENIZER, COMPLETIONS)
    assert (found.value, found.broken) == (math.inf, 1) and "1 of the examples" in str(found)
    with pytest.raises(ValueError, match="no log-probability of any example is finite"):
        train.score(config, spoilt, TOKENIZER, COMPLETIONS[2:])


@pytest.mark.parametrize("length", [4, 8, 64])
def test_a_text_is_blocks_of_tokens(tmp_path, llama, length):
    """Texts joined by blank lines, all tokens in a row: the loss is that of transformers."""
    text = "the cat sat on the mat.\nis it red?\n\nno dog ran so it was great because I was red"
    (tmp_path / "a.txt").write_text(text)
    rows = [{"text": part} for part in text.split("\n\n")]
    files = {"train_file": tmp_path / "a.txt", "test_file": write(tmp_path / "b.jsonl", rows)}
    how = {"tokenizer": TOKENIZER, "max_length": length, "num_validation": 0}
    data = load_examples(**files, **how)
    ids = TOKENIZER(text)["input_ids"]
    blocks = max(1, len(ids) // length)  # what is left over is dropped, unless it is all
    rows = [ids[i * length : (i + 1) * length] for i in range(blocks)]
    encoded = [encode(TOKENIZER, e, length) for e in data.test]
    assert sorted(encoded) == sorted([(row, len(row) - 1)] for row in rows)
    assert sorted(map(astuple, data.train)) == sorted(map(astuple, data.test))
    assert (data.metric, data.scored) == ("perplexity", "right")
    total, n, _ = tasks.tally(llama, TOKENIZER, data.test, max_length=length, batch_size=3)
    with torch.no_grad():
        wants = [llama(input_ids=row, labels=row).loss for row in torch.tensor(rows)[:, None]]
    assert total / n == pytest.approx(torch.stack(wants).mean().item(), rel=1e-5)


def test_wikitext2_is_read_as_the_field_reads_it(tmp_path, monkeypatch):
    """Official files and the hub's rows give one text: their lines joined by two line ends."""
    lines = [" \n", " = Cat = \n", " \n", " the cat sat on the mat . \n", " \n", " it ran . \n"]
    for name in ("train", "valid", "test"):
        path = tmp_path / "wikitext-2-raw" / f"wiki.{name}.raw"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(lines * (3 if name == "train" else 2)))
    data = load_examples("wikitext2", data_dir=tmp_path, tokenizer=TOKENIZER, max_length=5)
    hub = [line if line.strip() else "" for line in lines]
    ids = TOKENIZER("\n\n".join(hub * 2))["input_ids"]
    blocks = [ids[i : i + 5] for i in range(0, len(ids) - 4, 5)]
    assert sorted([*e.prompt, *e.options[0]] for e in data.test) == sorted(blocks)
    assert sorted(map(astuple, data.validation)) == sorted(map(astuple, data.test))
    assert len(data.train) > len(data.test) and tasks.get_task("wikitext2").batch_size == 2

    def load_dataset(path, config, *, split, revision):
        assert (path, config, len(revision)) == ("Salesforce/wikitext", "wikitext-2-raw-v1", 40)
        return [{"text": text} for text in hub * (3 if split == "train" else 2)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    again = load_examples("WikiText2", tokenizer=TOKENIZER, max_length=5)
    assert (again.train, again.validation, again.test) == (data.train, data.validation, data.test)


CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}dog {{ m.content }}\n{% else %}cat "
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}cat {% endif %}"
)
TALK = [
    {"role": "user", "content": "is it red ?"},
    {"role": "assistant", "content": "it was great ."},
    {"role": "user", "content": "is I ?"},
    {"role": "assistant", "content": "no"},
]


def chat_tokenizer(template=CHAT):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def replies(tmp_path, messages, tokenizer):
    path = write(tmp_path / "talk.jsonl", [{"messages": m} for m in messages])
    return load_examples(train_file=path, test_file=path, tokenizer=tokenizer, num_validation=0)


def test_only_the_assistants_tokens_have_a_loss(tmp_path):
    """Ids are those of the chat template, and the completions what it marks as the assistant's."""
    tokenizer = chat_tokenizer()
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    whole = tokenizer.apply_chat_template(TALK, **how)
    data = replies(tmp_path, [TALK] * 2, tokenizer)
    assert len(data.test) == 4 and data.scored == "right"
    marked = [0] * len(whole["input_ids"])
    for example in data.test:
        [(ids, length)] = encode(tokenizer, example)
        assert ids == whole["input_ids"][: len(ids)]
        marked[len(ids) - length : len(ids)] = [1] * length
    assert marked == whole["assistant_masks"] and sum(marked) == 7  # two ends of turn among them


def test_a_greeting_is_no_reply(tmp_path):
    """A conversation that the assistant begins has its later replies, with the greeting before."""
    greeting = {"role": "assistant", "content": "so"}
    tokenizer = chat_tokenizer()
    data = replies(tmp_path, [[greeting, *TALK]], tokenizer)
    prompts = [tokenizer.decode(example.prompt) for example in data.test]
    assert len(prompts) == 2
    assert all(prompt.startswith("catso</s>dogisitred?") for prompt in prompts)


def test_the_tools_of_a_row_are_in_its_prompt(tmp_path):
    """A template that writes the row's tools gets them."""
    tokenizer = chat_tokenizer("{% for tool in tools %}{{ tool.name }} {% endfor %}" + CHAT)
    tools = [{"name": "great"}, {"name": "red"}]
    path = write(tmp_path / "talk.jsonl", [{"messages": TALK, "tools": tools}])
    data = load_examples(train_file=path, test_file=path, tokenizer=tokenizer, num_validation=0)
    for example in data.test:
        assert tokenizer.decode(example.prompt).startswith("greatreddogisitred?")


def test_a_chat_template_knows_no_date(tmp_path):
    """A template that asks for today's date gets one that never changes, or a run would change."""
    dates = "strftime_now('%d %b %Y') + strftime_now('%Y-%m-%d')"
    dated = "{{ 'great' if " + dates + " == '26 Jul 20242024-07-26' else 'so' }} " + CHAT
    tokenizer = chat_tokenizer(dated)
    assert tokenizer.apply_chat_template(TALK, tokenize=False).startswith("so ")
    (great,) = tokenizer("great", add_special_tokens=False)["input_ids"]
    assert {example.prompt[0] for example in replies(tmp_path, [TALK], tokenizer).test} == {great}


def test_real_chat_templates(tmp_path, llama2):
    """With Llama 2's tokenizer and its template, which opens no turn for the assistant."""
    llama2 = copy.deepcopy(llama2)
    llama2.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + "
        "' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    data = replies(tmp_path, [TALK], llama2)
    found = {llama2.decode(e.options[0]): e.prompt[0] for e in data.test}
    bos = llama2.bos_token_id
    assert {text.strip(): first for text, first in found.items()} == {
        "it was great . </s>": bos, "no </s>": bos
    }  # fmt: skip
    longest = max(data.test, key=lambda e: len(e.prompt))
    ids = llama2.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert [*longest.prompt, *longest.options[0]] == ids


def test_completions_of_own_files(tmp_path):
    """A completion is the text after its prompt and the end of sequence; perplexity is measured."""
    rows = [{"prompt": f"is it {w} ?", "completion": " it was so"} for w in WORDS[:12]]
    rows[0]["completion"] += "</s>"  # as TRL, no second one
    path = write(tmp_path / "own.jsonl", rows)
    data = load_examples(train_file=path, test_file=path, tokenizer=TOKENIZER)
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 4, 12)
    assert (data.metric, data.scored, data.odd) == ("perplexity", "right", None)
    for example in data.test:
        [(ids, length)] = encode(TOKENIZER, example)
        assert TOKENIZER.convert_ids_to_tokens(ids[-length:]) == ["it", "was", "so", "</s>"]


BAD_COMPLETIONS = {
    "no object": (3, TOKENIZER, "3 has no fields"),
    "no completion": ({"prompt": "a"}, TOKENIZER, "no field 'options'"),
    "empty": ({"prompt": "a", "completion": " "}, TOKENIZER, "completion ' ' must be text"),
    "number": ({"prompt": "a", "completion": 3}, TOKENIZER, "completion 3 must be text"),
    "no prompt": ({"completion": "a"}, TOKENIZER, "no field 'prompt'"),
    "no template": ({"messages": TALK}, TOKENIZER, "the tokenizer has no chat template; use "),
    "user alone": ({"messages": TALK[:1]}, chat_tokenizer(), "no message is a reply of the assis"),
    "a list": ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, chat_tokenizer(),
               r"content \[\{'text': 'a'\}\] is no text"),
    "no role": ({"messages": [{"content": "a"}]}, chat_tokenizer(), "no field 'role'"),
    "no messages": ({"messages": None}, chat_tokenizer(), "messages None is no list"),
    "refused": ({"messages": TALK}, chat_tokenizer("{{ raise_exception('no\\nway') }}"),
                r"the chat template refuses it \(.*: no"),
    "broken": ({"messages": TALK}, chat_tokenizer("{% if %}"), "the chat template refuses it "),
    "other": ({"messages": TALK}, chat_tokenizer("{{ messages | length }}"),
              "reply does not follow its generation prompt"),
    "text": ({"text": 3}, TOKENIZER, "is no text"),
    "a label": ({"prompt": "a", "completion": "b", "label": False}, TOKENIZER,
                "a label belongs to options, and this row has completion"),
}  # fmt: skip


@pytest.mark.parametrize("row, tokenizer, message", BAD_COMPLETIONS.values(), ids=BAD_COMPLETIONS)
def test_bad_completions_are_named(tmp_path, row, tokenizer, message):
    """A row without a reply, or a template that does not write it, is one line with its place."""
    path = write(tmp_path / "bad.jsonl", [row])
    with pytest.raises(ValueError, match=message) as e:
        load_examples(train_file=path, test_file=path, tokenizer=tokenizer)
    assert f"{path}:1 is not" in str(e.value) and "\n" not in str(e.value)


def test_rows_of_two_kinds_are_refused(tmp_path):
    """Options, completions and texts cannot be trained or tested together; extra fields may be."""
    kinds = {
        "questions": own(3),
        "completions": [{"prompt": "a", "completion": "b"}],
        "texts": [{"text": "the cat"}],
    }
    paths = {kind: write(tmp_path / f"{kind}.jsonl", rows) for kind, rows in kinds.items()}
    how = {"tokenizer": TOKENIZER, "num_validation": 0}
    for a in kinds:
        for b in kinds:
            files = {"train_file": paths[a], "test_file": paths[b]}
            if a == b:
                load_examples(**files, **how)
                continue
            with pytest.raises(ValueError, match=f"{len(kinds[a])} {a} and {len(kinds[b])} {b}; "):
                load_examples(**files, **how)
    path = write(tmp_path / "more.jsonl", [{**row, "text": "x", "messages": 3} for row in own(3)])
    assert load_examples(train_file=path, test_file=path, **how).metric == "accuracy"


# --- text -----------------------------------------------------------------------------------------


def letters(text, verbose):
    """A tokenizer of one token per letter."""
    return {"input_ids": [ord(c) for c in text]}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(2, 9), st.integers(0, 99))
def test_windows_come_from_documents_long_enough(samples, length, seed):
    """Each window is a piece of one long document, every document before any comes twice."""
    texts = [chr(97 + i) * (length - 1) for i in range(5)]
    texts += [chr(65 + i) + chr(91 + i) * 12 * length for i in range(6)]
    windows = tasks.text_windows(letters, texts, samples, length, seed)
    assert windows.shape == (samples, length)
    strings = ["".join(map(chr, w)) for w in windows.tolist()]
    owners = [next(i for i, text in enumerate(texts) if w in text) for w in strings]
    assert min(owners) >= 5 and len(set(owners)) == min(samples, 6)
    assert torch.equal(windows, tasks.text_windows(letters, texts, samples, length, seed))


def test_short_documents_are_joined():
    """Where the long documents do not suffice, windows come from all of them in a row."""
    texts = ["abc", "defg", "hij", "klmnopqrst"]
    windows = tasks.text_windows(letters, texts, 50, 8, 0)
    assert len({"".join(map(chr, w)) for w in windows.tolist()}) > 3
    with pytest.raises(ValueError, match="has 20 tokens, less than one sample of --length 21"):
        tasks.text_windows(letters, texts, 1, 21, 0)
    with pytest.raises(ValueError, match="has 0 tokens"):
        tasks.text_windows(letters, [], 1, 21, 0)
    assert tasks.text_windows(letters, texts, 2, 20, 0).shape == (2, 20)


def test_texts_of_every_form(tmp_path):
    """.txt is divided at blank lines, .jsonl has one {"text"} per line, U+2028 divides nothing."""
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    assert dataset.read_texts(str(tmp_path / "a.txt")) == ["one\ntwo", "three\n"]
    rows = [{"text": "one\u2028two"}, {"text": "", "url": "x"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert dataset.read_texts(str(tmp_path / "b.jsonl")) == ["one\u2028two", ""]
    for line in ("{", "[]", '{"texts": ""}', '{"text": 3}', '{"text": "\\ud83d"}'):
        (tmp_path / "c.jsonl").write_text(lines[1] + "\n" + line + "\n")
        with pytest.raises(ValueError, match="c.jsonl:2 is not a line"):
            dataset.read_texts(str(tmp_path / "c.jsonl"))
    (tmp_path / "d.txt").write_bytes(b"one\n\xff\xfe\x00")
    with pytest.raises(ValueError, match="d.txt:2 is not UTF-8"):
        dataset.read_texts(str(tmp_path / "d.txt"))
    for path in ("nowhere.txt", "", str(tmp_path), "c5"):
        with pytest.raises(ValueError, match="a .txt or .jsonl file that exists, or one of c4, w"):
            dataset.read_texts(path)


@pytest.mark.parametrize("name", dataset.TEXTS)
def test_texts_by_name(monkeypatch, name):
    """[Q]'s four corpora: the first 10,000 documents of one file of the repository."""
    import datasets

    def load_dataset(path, *, data_files, split, revision, streaming):
        assert path == dataset.TEXTS[name][0] and split == "train" and streaming
        assert len(revision) == 40 or name == "arxiv"
        column = "article" if name == "arxiv" else "text"
        rows = [{column: f"{data_files} {i}", "more": i} for i in range(10_002)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    texts = dataset.read_texts(name)
    assert len(texts) == 10_000 and texts[1] == f"{dataset.TEXTS[name][1]} 1"
    assert name != "c4" or dataset.read_texts(None) == texts


def test_without_a_network_c4_is_an_error_that_says_so(monkeypatch):
    """The default text is pinned and streamed from the hub; where that fails, --text is the way."""

    def offline(*args, **how):
        assert len(how["revision"]) == 40 and how["streaming"]
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(ValueError, match="ConnectionError: no network.; give --text FILE"):
        dataset.read_texts(None)

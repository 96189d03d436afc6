"""What the README and the design say of the code, checked by machine."""

import ast
import re
import shlex
from pathlib import Path

import mutants
import pytest

import loading
import train

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = (
    ROOT.joinpath(f).read_text(encoding="utf-8") for f in ("README.md", "RESULTS.md")
)
IMPORTS = {  # who knows whom
    "zo": set(),
    "errors": set(),
    "sweep": {"zo"},
    "masks": {"errors", "zo"},
    "snapshot": {"errors", "masks", "zo"},
    "sensitivity": {"errors", "masks", "snapshot", "zo"},
    "quant": {"errors", "masks"},
    "moving": {"errors", "masks", "quant", "zo"},
    "model_patch": {"errors", "masks", "moving", "quant", "sweep"},
    "tasks": {"errors"},
    "scoring": {"errors", "tasks"},
    "loading": {"errors", "tasks"},
    "workers": {"errors", "snapshot"},
    "steplog": {"errors", "snapshot", "zo"},
    "record": {"errors", "snapshot", "steplog"},
    "make_mask": {"errors", "loading", "record", "scoring", "sensitivity", "tasks", "zo"},
    "presets": {"errors", "loading", "masks", "moving", "quant", "sensitivity", "zo"},
    "eval": {
        "errors",
        "loading",
        "masks",
        "model_patch",
        "quant",
        "record",
        "scoring",
        "sensitivity",
        "snapshot",
        "sweep",
        "tasks",
        "workers",
    },
    "train": {
        "errors",
        "eval",
        "loading",
        "make_mask",
        "masks",
        "presets",
        "record",
        "scoring",
        "snapshot",
        "steplog",
        "sweep",
        "tasks",
        "workers",
        "zo",
    },
    "shapes": {"quant", "sensitivity"},
    "bench": {
        "errors",
        "loading",
        "masks",
        "model_patch",
        "quant",
        "record",
        "sensitivity",
        "shapes",
        "zo",
    },
}


def tree_of(name):
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def imported(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_the_modules_are_these():
    """No module stands at the top that the design does not name."""
    assert {p.stem for p in ROOT.glob("*.py")} == set(IMPORTS)


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_run_downward(name):
    """A module knows only those above it in this list; the papers' need torch and numpy alone."""
    body = [node for node in tree_of(name).body if not isinstance(node, ast.If)]  # __main__
    ours = {n for part in body for n in imported(ast.walk(part)) if n in IMPORTS}
    assert ours == IMPORTS[name] <= set(list(IMPORTS)[: list(IMPORTS).index(name)])
    if name in ("zo", "errors", "sweep", "masks", "sensitivity", "tasks", "scoring"):
        outside = set(imported(tree_of(name).body)) - set(IMPORTS)
        assert outside <= {"torch", "numpy"} | set(__import__("sys").stdlib_module_names)


@pytest.mark.parametrize("name", IMPORTS)
def test_modules_are_short_and_every_public_name_is_explained(name):
    """No module over 375 lines; every public function and class has a docstring."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert source.count("\n") <= 375
    for node in tree_of(name).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if node.name not in ("main", "setting", "show"):
                assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


def commands():
    """Of both documents: the lines of blocks, and what stands in the text in backquotes."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", README + RESULTS, flags=re.S)
    lines += [command.replace("\n", " ") for command in re.findall(r"`(python [^`]*)`", prose)]
    return [line for line in lines if line.startswith("python ")]


@pytest.mark.parametrize("command", commands())
def test_every_command_has_flags_that_exist(command):
    """Commands in README and RESULTS parse: script, flags and values are real."""
    words = shlex.split(command)[1:]
    assert (ROOT / words[0]).is_file(), words[0]
    if words[0] in ("train.py", "eval.py"):
        settings = train.Config if words[0] == "train.py" else loading.Settings
        parser = loading.make_parser(settings, "")
        own = {"eval.py": "run step split shots sparse save", "train.py": "resume"}
        for flag in own[words[0]].split():
            parser.add_argument(f"--{flag}")
        parser.parse_args(words[1:])
    else:
        file = {"masks.py": "make_mask.py"}.get(words[0], words[0])
        source = (ROOT / file).read_text(encoding="utf-8")
        for word in words[1:]:
            assert not word.startswith("--") or f'"{word.replace("--no-", "--")}"' in source, word


def test_the_readmes_table_of_modules_is_true():
    """Every top-level module is listed, with the number of lines that it has, within ten."""
    listed = dict(re.findall(r"^\| \[?`(\w+)\.py`[^|]*\| *(\d+) *\|", README, re.M))
    assert set(listed) == set(IMPORTS)
    for name, lines in listed.items():
        really = (ROOT / f"{name}.py").read_text(encoding="utf-8").count("\n")
        assert abs(int(lines) - really) <= 10, f"{name}.py has {really} lines, README says {lines}"


def test_links_of_the_readme_lead_somewhere():
    """Local links and pictures in the README exist."""
    for target in re.findall(r"\]\(([^)#]+)\)", README + RESULTS):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_mutant_applies():
    """Each mistake that `make mutants` makes stands exactly once in the source as it is."""
    for name, module, old, *_ in mutants.MUTANTS:
        assert (ROOT / f"{module}.py").read_text(encoding="utf-8").count(old) == 1, name

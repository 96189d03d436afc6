"""What the README and the design say of the code, checked by machine."""

import ast
import importlib
import re
import shlex
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import eval as evaluation
import train
from harness import bench, mask
from studies import find_lr, first_order
from tests import mutants

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path: path.read_text("utf-8") for path in [*ROOT.glob("*.md"), *ROOT.glob("labs/*.md")]}
README = PAGES[ROOT / "README.md"]
CORE = {"zo", "masks", "quant", "model_patch", "tasks"}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")]
OURS = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}


def imports(name: str) -> set[str]:
    """Which of our modules a module imports, anywhere: at the top, in functions, in __main__."""
    found = set()
    for node in ast.walk(ast.parse(OURS[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (found & set(OURS)) - {"harness"}


def test_seven_modules_stand_at_the_top():
    """The papers' five files, train.py and eval.py; what no paper speaks of is in harness/."""
    assert {name for name in OURS if "." not in name} == CORE | {"train", "eval"}


def test_imports_have_no_circle_and_the_core_does_not_know_the_harness():
    """Every import counts, also one inside a function or under __main__."""
    graph = {name: imports(name) for name in OURS}
    list(TopologicalSorter(graph).static_order())  # CycleError
    for name in CORE:
        assert graph[name] <= CORE, f"{name} imports {graph[name] - CORE}"
    assert not any("eval" in graph[name] for name in OURS), "eval.py is the top"
    assert {"zo", "masks", "quant", "model_patch", "tasks"} <= graph["train"]


def test_the_papers_files_need_torch_and_numpy_alone():
    """What else they use, they import inside the function that needs it."""
    allowed = {"torch", "numpy", "tqdm", *CORE, *__import__("sys").stdlib_module_names}
    for name in CORE:
        for node in ast.parse(OURS[name].read_text("utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module] if isinstance(node, ast.ImportFrom) else []
                assert {m.split(".")[0] for m in modules} <= allowed, (name, modules)


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_public_name_is_explained(name):
    """Every module, public function and public class has a docstring."""
    tree = ast.parse(OURS[name].read_text("utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if node.name not in ("main", "setting"):
                assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


def commands():
    """Of the pages: the lines of blocks, and what stands in the text in backquotes."""
    text = "\n".join(PAGES.values())
    blocks = re.findall(r"```bash\n(.*?)```", text.replace("\\\n", " "), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += [command.replace("\n", " ") for command in re.findall(r"`(python [^`]*)`", prose)]
    return [line for line in lines if line.startswith("python ")]


@pytest.mark.parametrize("command", commands())
def test_every_command_has_flags_that_exist(command, capsys):
    """Commands in the pages name a script that is there and flags that it has."""
    words = shlex.split(command)[1:]
    script, flags = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    mains = {"train.py": train, "eval.py": evaluation, "harness.mask": mask, "harness.bench": bench}
    mains |= {"studies.first_order": first_order, "studies.find_lr": find_lr}
    if script in mains:
        with pytest.raises(SystemExit):
            mains[script].main(["--help"])
        known = capsys.readouterr().out
    else:
        path = ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py")
        known = path.read_text("utf-8")
        known += (ROOT / "labs/lab.py").read_text("utf-8") if path.parent.name == "labs" else ""
    for flag in flags:
        assert not flag.startswith("--") or flag.replace("--no-", "--") in known, flag


def test_the_names_in_the_readme_exist():
    """Every `module.name` that the README mentions is there."""
    for module, name in re.findall(r"`(zo|masks|quant|model_patch|tasks|train)\.(\w+)`", README):
        if name != "py":
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def anchors(page: str) -> set[str]:
    """What the headings of a page are called in links, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", page, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    """The local links and pictures of a page exist, and so do the headings that it links to."""
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", PAGES[page]):
        if not target.startswith("http"):
            there = (page.parent / target).resolve() if target else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(PAGES[there]), f"{target}#{anchor}"


def test_every_mutant_applies():
    """Each mistake that `make mutants` makes stands exactly once in the source as it is."""
    for name, module, old, *_ in mutants.MUTANTS:
        text = OURS[module].read_text("utf-8")
        assert text.count(old) == 1, f"{name}: {text.count(old)} times"

"""What the labs share: a number and its target, the verdict, the picture, a small model.

A lab is a file with three functions. `measure` runs the student's code. `numbers` compares what was
found with targets that do not come from it. `picture` draws it.
"""

import argparse
import importlib.util
import reprlib
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # where zo.py and masks.py are

import harness  # noqa: E402, F401  # it makes pictures independent of MPLBACKEND
import zo  # noqa: E402

PICTURES = HERE / "pictures"


class Number(NamedTuple):
    """What was measured, what it must be, what it is, and what helps where it is not."""

    what: str
    target: str
    yours: float
    met: bool
    hint: str


def near(what: str, yours: float, target: float, within: float, hint: str) -> Number:
    """The number must be the target, up to `within`."""
    tolerance = f" ± {within:.2g}" if within else ""
    return Number(what, f"{target:.4g}{tolerance}", yours, abs(yours - target) <= within, hint)


def at_least(what: str, yours: float, target: float, hint: str) -> Number:
    """The number must reach the target."""
    return Number(what, f"at least {target:.4g}", yours, yours >= target, hint)


def at_most(what: str, yours: float, target: float, hint: str) -> Number:
    """The number must not pass the target."""
    return Number(what, f"at most {target:.4g}", yours, yours <= target, hint)


def fact(what: str, value: float) -> Number:
    """A number to look at, which the student's code does not make."""
    return Number(what, "", value, True, "")


def tensor(name: str, found, shape=None, dtype=None) -> torch.Tensor:
    """What the student's function `name` returned. SystemExit, with what is wrong, if unfit."""
    wanted = "a tensor" + (f" of shape {tuple(shape)}" if shape else "")
    wanted += f" and of {dtype}" if dtype else ""
    if not isinstance(found, torch.Tensor):
        sys.exit(f"Not yet. {name} must return {wanted}. It returned {reprlib.repr(found)}.")
    if found.shape != (shape or found.shape) or found.dtype != (dtype or found.dtype):
        yours = f"shape {tuple(found.shape)} and {found.dtype}"
        sys.exit(f"Not yet. {name} must return {wanted}. It returned {yours}.")
    return found


def report(title: str, numbers: list[Number]) -> int:
    """Print target, yours and verdict of every number, and one hint. 0: all are met, 1: not yet."""
    print(f"{title}\n{'':<52}{'target':>16}{'yours':>12}")
    for number in numbers:
        verdict = ("met" if number.target else "") if number.met else "not yet"
        print(f"  {number.what:<50}{number.target:>16}{number.yours:>12.4g}   {verdict}")
    missed = [number for number in numbers if not number.met]
    print(f"Not yet. {missed[0].hint}" if missed else "All numbers are met.")
    return int(bool(missed))


def save(path: Path, draw, found) -> None:
    """One picture: `draw(found, figure)`, in shades of grey."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path.parent.mkdir(exist_ok=True)
    greys = "cycler('color', ['black', '0.45', '0.7']) + cycler('linestyle', ['-', '--', ':'])"
    with rc_context({"axes.prop_cycle": greys, "image.cmap": "gray"}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        draw(found, figure)
        figure.savefig(path)


def load(path: Path):
    """A lab, or its solution, as a module. Their names begin with a digit: `import` cannot."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def solve(module) -> None:
    """Put the solution's functions in the place of the lab's."""
    solution = load(HERE / "solutions" / Path(module.__file__).name)
    vars(module).update({k: v for k, v in vars(solution).items() if not k.startswith("_")})


def judge(module) -> int:
    """Run a lab: numbers, verdict and picture. 0: all numbers are met, 1: not yet.

    An answer that nothing can be computed with is one sentence, too: SystemExit.
    """
    try:
        found = module.measure()
        numbers = module.numbers(found)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).name == Path(module.__file__).name]
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        sys.exit(f"Not yet. Line {lines[-1]} cannot go on with what your code did ({why}).")
    code = report(module.__doc__.splitlines()[0], numbers)
    path = PICTURES / f"{Path(module.__file__).stem}.png"
    save(path, module.picture, found)
    print(f"picture: {path}")
    return code


def flags() -> argparse.ArgumentParser:
    """The flag of every lab. Lab 9 has two more."""
    title = sys.modules["__main__"].__doc__.splitlines()[0]
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--solved", action="store_true", help="let the solution answer")
    return parser


def main(solved: bool | None = None) -> None:
    """Run the lab that was started: `python labs/01_two_points.py`, or with --solved."""
    torch.set_num_threads(1)  # the problems are small
    module = sys.modules["__main__"]
    if solved is None:
        solved = flags().parse_args().solved
    if solved:
        solve(module)
    sys.exit(judge(module))


class Small(nn.Module):
    """2,384 weights that look like a language model: 16 words, and of each the next word."""

    def __init__(self):
        super().__init__()
        self.embed, self.up = nn.Embedding(16, 16), nn.Linear(16, 64)
        self.head = nn.Linear(64, 16)
        for stream, parameter in enumerate(self.parameters()):
            parameter.data = 0.3 * zo.gaussian(1, stream, parameter.shape)
        self.eval()

    def forward(self, input_ids):
        hidden = torch.tanh(self.up(self.embed(input_ids)))
        return SimpleNamespace(logits=self.head(hidden))


def next_word(model, words):
    """The loss of a model: the word after w must be 3w + 5, modulo 16."""
    logits = model(words).logits.flatten(0, 1)
    return nn.functional.cross_entropy(logits, (3 * words.flatten() + 5) % 16)

"""Lab 9. Find the bug.

    python labs/09_find_the_bug.py --draw 7
    python labs/09_find_the_bug.py --draw 7 --answer zo.py:123

A draw puts one classic mistake into a copy of zo.py, masks.py, quant.py and model_patch.py. Nobody
runs a test on the copy. It trains for 30 steps in four ways, beside the sound source, and the
picture shows both losses. The first way is Algorithm 1 as printed, `zo.sparse_mezo_step`. The three
others go through `model_patch.Patch`. The ways share some lines and not others. Without a
bug, the first two are the same run.

Read the picture first. Which of the four ways suffer, and how? Which lines do just those share?
Then read these lines in the copy, with the paper open, and name the file and the line. Where a line
is missing, name the line after it. `diff` would find it, too, and teach you nothing.
"""

import json
import random
import re

import four_ways
import lab

from tests.mutants import CURVE, MUTANTS

BUGS = [mutant for mutant in MUTANTS if CURVE in mutant]
random.Random(2).shuffle(BUGS)
DRAW, ANSWER = 1, ""


def named(draw):
    """The line that you think is wrong, as file:line. The command line gives it."""
    return ANSWER


def copy(draw):
    """(folder of the copy, file, first and last line of its bug). Draws count from 1."""
    _, module, old, new, *_ = BUGS[draw - 1]
    folder = lab.PICTURES / f"draw-{draw}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in four_ways.SOUND:
        text = (lab.HERE.parent / f"{name}.py").read_text("utf-8")
        if name == module:
            first = text[: text.index(old)].count("\n") + 1
            text = text.replace(old, new)
        (folder / f"{name}.py").write_text(text, "utf-8")
    return folder, f"{module}.py", first, first + new.count("\n")


def score(right):
    """Of draws 1 to 10, how many first answers were right; kept beside the pictures."""
    path = lab.PICTURES / "score.json"
    first = json.loads(path.read_text()) if path.exists() else {}
    if ANSWER:
        first.setdefault(str(DRAW), right)
        path.write_text(json.dumps(first))
    return sum(first.get(str(draw), False) for draw in range(1, 11))


def measure():
    folder, file, first, last = copy(DRAW)
    answer, _, line = named(DRAW).partition(":")
    right = answer == file and first - 1 <= int(line) <= last + 1
    return folder, right, *map(four_ways.curves, (lab.HERE.parent, folder))


def numbers(found):
    folder, right, sound, drawn = found
    listed = []
    for way, losses in sound.items():
        gap = max(abs(a - b) for a, b in zip(losses, drawn[way], strict=True))
        gap /= losses[0] - losses[-1]
        listed.append(lab.fact(f"{way}: widest gap; 1 is all that it learns", gap))
    listed.append(lab.fact("first answers right, of draws 1 to 10", score(right)))
    hint = f"{ANSWER} is not the line. " if ANSWER else ""
    hint += "Look for a line that the ways with a gap run, and those without one do not. "
    hint += f"The copy is in {folder}. Then: --draw {DRAW} --answer file:line."
    return [*listed, lab.near("bugs found", int(right), 1, 0, hint)]


def picture(found, figure):
    for axes, way in zip(figure.subplots(1, 4), found[2], strict=True):
        axes.plot(found[2][way], "--", color="0.6", label="sound")
        axes.plot(found[3][way], "-", color="0.0", label=f"draw {DRAW}")
        axes.set(xlabel="step", ylabel="loss" if way == "Algorithm 1" else "", title=way)
    axes.legend()


if __name__ == "__main__":
    parser = lab.flags()
    parser.add_argument("--draw", type=int, help=f"from 1 to {len(BUGS)}; default 1")
    parser.add_argument("--answer", default="", help="file:line, such as zo.py:123")
    args = parser.parse_args()
    DRAW, ANSWER = 1 if args.draw is None else args.draw, args.answer
    if not 1 <= DRAW <= len(BUGS):
        parser.error(f"--draw {DRAW}: there are draws 1 to {len(BUGS)}")
    if ANSWER and not re.fullmatch(rf"({'|'.join(four_ways.SOUND)})\.py:\d+", ANSWER):
        parser.error(f"--answer {ANSWER}: one line, such as zo.py:123 (this does not count)")
    if ANSWER and (args.solved or args.draw is None):
        parser.error(f"--answer {ANSWER} goes with --draw, and not with --solved")
    lab.main(args.solved)

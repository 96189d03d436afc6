"""Lab 9: what a draw has changed, and where: python labs/solutions/09_find_the_bug.py 7"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lab


def named(draw):
    _, file, first, _ = lab.load(lab.HERE / "09_find_the_bug.py").copy(draw)
    return f"{file}:{first}"


if __name__ == "__main__":
    draw = int(sys.argv[1])
    print(named(draw), "", lab.load(lab.HERE / "09_find_the_bug.py").BUGS[draw - 1][0])

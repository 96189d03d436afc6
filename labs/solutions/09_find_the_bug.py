"""Lab 9: what a draw has changed, and where: python labs/solutions/09_find_the_bug.py 7"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lab


def named(draw):
    _, file, first, _ = lab.load(lab.HERE / "09_find_the_bug.py").copy(draw)
    return f"{file}:{first}"


if __name__ == "__main__":
    bugs = lab.load(lab.HERE / "09_find_the_bug.py").BUGS
    draws = [str(draw) for draw in range(1, len(bugs) + 1)]
    if len(sys.argv) != 2 or sys.argv[1] not in draws:
        sys.exit(f"give one draw, from 1 to {len(bugs)}")
    print(named(int(sys.argv[1])), "", bugs[int(sys.argv[1]) - 1][0])

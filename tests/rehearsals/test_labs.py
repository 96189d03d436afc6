"""The labs: as they are they fail and help, solved they pass, and the edit is small."""

import functools
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import masks
import quant

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "labs"))
import four_ways  # noqa: E402
import lab  # noqa: E402
import race  # noqa: E402

TINY = functools.cache(race.Tiny)
FEW = {  # lab: its constants, so that it takes a second
    "01": {"DRAWS": 200},
    "05": {"CYCLES": 30, "ALL_EPS": (1e-3,)},
    "08": {"STEPS": 9},
}
LABS = sorted((ROOT / "labs").glob("[0-9]*.py"))
each = pytest.mark.parametrize("path", LABS, ids=[path.stem for path in LABS])


@pytest.fixture(autouse=True)
def pictures(tmp_path, monkeypatch):
    """A folder for pictures and copies of the source, empty at first; a twentieth of lab 6."""
    monkeypatch.setattr(lab, "PICTURES", tmp_path / "pictures")
    monkeypatch.setattr(race, "STEPS", 24)
    monkeypatch.setattr(race, "SEEDS", race.SEEDS[:1])
    monkeypatch.setattr(race, "Tiny", TINY)
    monkeypatch.setattr(four_ways, "STEPS", 10)
    monkeypatch.setattr(race, "RATES", race.RATES[:1])


def judged(module, capsys) -> tuple[int, str]:
    """Exit code, and the last sentence before the picture's name."""
    for name, few in FEW.get(module.__name__[:2], {}).items():
        setattr(module, name, few)
    code = lab.judge(module)
    *_, verdict, picture = capsys.readouterr().out.strip().splitlines()
    assert Path(picture.removeprefix("picture: ")).stat().st_size > 5000
    return code, verdict


def answered(number: str, function: str, answer):
    """A lab as solved, but for one function, which is the answer."""
    (path,) = (path for path in LABS if path.name.startswith(number))
    module = lab.load(path)
    lab.solve(module)
    setattr(module, function, answer)
    return module


def test_there_are_nine():
    """Labs and solutions have the same nine names."""
    assert len(LABS) == 9
    solutions = sorted((ROOT / "labs/solutions").glob("*.py"))
    assert [path.name for path in solutions] == [path.name for path in LABS]


@each
def test_a_lab_as_it_is_fails_and_helps(path, capsys):
    """A lab that nobody has edited says "Not yet.", and then a sentence that helps."""
    code, verdict = judged(lab.load(path), capsys)
    assert code == 1 and verdict.startswith("Not yet. ") and len(verdict) > 40


@each
def test_a_solved_lab_passes(path, capsys):
    """With the solution's functions every number is met."""
    module = lab.load(path)
    lab.solve(module)
    assert judged(module, capsys) == (0, "All numbers are met.")


@each
def test_an_edit_has_at_most_five_lines(path):
    """A solution has at most five lines of code that its lab does not have."""
    lines = [set(map(str.strip, p.read_text("utf-8").splitlines())) for p in (path, solution(path))]
    code = lines[1] - lines[0]
    code = [x for x in code if x and not x.startswith(('"""', "import ", "from "))]
    assert path.stem.startswith("09") or len(code) <= 5, code


@each
def test_a_lab_marks_its_gap_and_asks_its_question(path):
    """A lab has a question of whole sentences; outside lab 9, which asks for a line, a gap."""
    text = path.read_text("utf-8")
    gaps = text.count("# ---- your code: ")
    assert gaps == text.count("# ----\n") and (gaps or path.stem.startswith("09"))
    question = lab.load(path).__doc__
    assert question.startswith(f"Lab {int(path.stem[:2])}. ") and question.count(".") > 5


WRONG = [  # (lab, function, a classic mistake, words of the sentence that helps)
    ("01", "estimate", lambda f, t, z, e: (f(t + e * z) - f(t - e * z)) / e * z, "2ε apart"),
    ("01", "estimate", lambda f, t, z, e: (f(t - e * z) - f(t + e * z)) / (2 * e) * z, "downhill"),
    ("01", "estimate", lambda f, t, z, e: (f(t + e * z) - f(t)) / e * z, "both sides"),
    ("02", "rate", lambda d_hat: 1 / (d_hat + 4), "right for 32 weights"),
    ("02", "gain", lambda k, c, d: c * d / (k + 2), "then d and 1 in their place"),
    ("03", "get_mask", lambda theta, h: theta.abs() < h, "the one at |θ| = h"),
    ("03", "get_mask", lambda theta, h: theta.abs_() <= h, "wrote into θ"),
    ("03", "pack", lambda m: (m.view(-1, 8) * 2 ** lab.torch.arange(7, -1, -1)).sum(1).byte(),
     "lowest"),
    ("03", "pack", lambda m: m.view(-1, 8).float() @ 2.0 ** lab.torch.arange(8), "end in uint8"),
    ("04", "probe", lambda t, h, z, e: (t + (s := e * (t.abs() <= h) * z), t - s, t - 2 * s),
     "third step"),
    ("04", "probe",
     lambda t, h, z, e: [t.add_(a * s) for s in [e * (t.abs() <= h) * z] for a in (1, -2, 1)],
     "three tensors"),
    ("04", "probe",
     lambda t, h, z, e: (t + (s := e * (t.abs() <= h) * z), m := t - s, m.add_(s)),
     "written over"),
    ("05", "probe",
     lambda t, f, z, e: [(old := t.clone()), f(t.add_(e * z)), f(t.sub_(2 * e * z)),
                         t.copy_(old)][1:3],
     "a new tensor"),
    ("05", "probe", lambda t, f, z, e: (f(t + 2 * e * z), f(t)), "θ − ε z"),
    ("07", "split", lambda w, p: (*quant.nf4_encode(w), w[p] * 0), "Take them"),
    ("08", "rebuild", lambda patch, log: [patch.update(*step) for step in log[::-1]], "in order"),
    ("08", "common", lambda s: [sum(m[i] for m in s) / 8 for i in (0, 1)], "sum of counts"),
    ("08", "common", lambda s: [sum(m[i] / m[2] for m in s) / len(s) for i in (0, 1)],
     "sum of counts"),
]  # fmt: skip


def into_the_first(messages):
    """All messages, added up in the first one."""
    for i in range(3):
        messages[0][i] += messages[1][i]
    total_plus, total_minus, count = messages[0]
    return total_plus / count, total_minus / count


RIGHT = [  # (lab, function, an answer that is none of the solutions)
    ("01", "estimate", lambda f, t, z, e: (f(t + z.mul_(e)) - f(t - z)) / (2 * e) * z / e),
    ("04", "probe", lambda t, h, z, e: (t + z.mul_(e * (t.abs() <= h)), t - z, t)),
    ("07", "split", lambda w, p: [*quant.nf4_encode(w.index_fill(0, p, 0)), w[p]]),
    ("08", "rebuild", lambda patch, log: [patch.update(seed=s, a=a) for s, a in log]),
    ("08", "common", into_the_first),
]  # fmt: skip


@pytest.mark.parametrize("number, function, answer", RIGHT)
def test_a_right_answer_of_another_form_passes(number, function, answer, capsys):
    """What is lent may be written to, a tuple may be a list, and arguments may be named."""
    module = answered(number, function, answer)
    assert judged(module, capsys) == (0, "All numbers are met.")


@pytest.mark.parametrize("number, function, mistake, words", WRONG)
def test_a_classic_mistake_gets_its_own_sentence(number, function, mistake, words, capsys):
    """Who has solved a lab but for one mistake is told which."""
    module = answered(number, function, mistake)
    code, verdict = judged(module, capsys)
    assert code == 1 and words in verdict


def test_an_answer_of_another_shape_is_told_its_shape():
    """Who returns the slope alone, or nothing, is told which shape is wanted."""
    module = lab.load(LABS[0])
    module.estimate = lambda loss, theta, z, eps: loss(theta)
    with pytest.raises(SystemExit, match=r"estimate must return a tensor of shape \(10,\)"):
        module.measure()
    rule = masks.Everything()
    rule.prepare = lambda weight, stream: None
    with pytest.raises(SystemExit, match=r"prepare must return .* torch.bool. It returned None"):
        race.run(TINY(), {"yours": rule})


@pytest.mark.parametrize(
    "split, words",
    [(lambda w, p: quant.nf4_encode(w), "codes, scales and values"),
     (lambda w, p: (*quant.nf4_encode(w), w[p].half()), "and of torch.float32")],
)  # fmt: skip
def test_parts_of_another_kind_are_told_theirs(split, words):
    """Who leaves the values out of lab 7's split, or halves them, is told what is wanted."""
    module = lab.load(LABS[6])
    module.split = split
    with pytest.raises(SystemExit, match=words):
        module.measure()


BROKEN = [  # (lab, function, an answer that nothing can be computed with)
    ("02", "rate", lambda d_hat: None),
    ("02", "gain", lambda k, c, d: None),
    ("05", "probe", lambda theta, loss, z, eps: loss(theta)),
    ("06", "Yours", lambda gradients: None),
    ("07", "read", lambda codes, scales, places, values: codes.view(7)),
    ("08", "common", lambda s: None),
]


@pytest.mark.parametrize("number, function, answer", BROKEN)
def test_an_answer_of_no_use_is_one_sentence(number, function, answer):
    """Who returns nothing, or what does not fit, is told the line where it ends, and why."""
    module = answered(number, function, answer)
    with pytest.raises(
        SystemExit, match=r"^Not yet\. Line \d+ cannot go on .* \(\w+Error: "
    ) as stop:
        lab.judge(module)
    assert "\n" not in str(stop.value) and len(str(stop.value)) < 300


def test_a_flag_that_no_lab_has_is_refused(monkeypatch, capsys):
    """A misspelt --solved does not run the unedited file."""
    monkeypatch.setattr(sys, "argv", [str(LABS[0]), "--sloved"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(LABS[0]), run_name="__main__")
    assert stop.value.code == 2 and "--sloved" in capsys.readouterr().err


def test_every_draw_of_lab_9_has_a_bug_where_it_says():
    """A copy differs from the source in the lines that count as an answer, and nowhere else."""
    bugs = lab.load(LABS[-1])
    for draw in range(1, len(bugs.BUGS) + 1):
        folder, file, first, last = bugs.copy(draw)
        sound, copy = ((p / file).read_text("utf-8").splitlines() for p in (ROOT, folder))
        assert copy != sound and copy[: first - 1] == sound[: first - 1]
        assert copy[last:] == sound[len(sound) - len(copy) + last :]
    assert len({mutant[:3] for mutant in bugs.BUGS}) >= 10


def test_lab_9_keeps_the_score_of_first_answers(monkeypatch):
    """A wrong answer counts, and a right one after it no longer."""
    bugs = lab.load(LABS[-1])
    lab.PICTURES.mkdir()
    for draw, answers, expected in ((1, [True], 1), (2, [False, True], 1), (11, [True], 1)):
        for right in answers:
            monkeypatch.setattr(bugs, "DRAW", draw)
            monkeypatch.setattr(bugs, "ANSWER", "zo.py:1")
            score = bugs.score(right)
        assert score == expected


@pytest.mark.parametrize(
    "path, flags, code",
    [
        (LABS[2], [], 1),
        (LABS[2], ["--solved"], 0),
        (LABS[8], ["--answer", "zo:123"], 2),
        (LABS[8], ["--answer", "zo.py:123"], 2),
        (LABS[8], ["--draw", "0"], 2),
    ],
    ids=["as it is", "solved", "an answer that is no line", "an answer to no draw", "draw 0"],
)
def test_the_command_ends_with_its_verdict(path, flags, code, tmp_path, monkeypatch):
    """A lab ends with 1 as it is and with 0 when solved; what is no answer to a draw is refused."""
    if "--solved" in flags:  # one is started as a reader starts it, from another folder
        ended = subprocess.run([sys.executable, path, *flags], cwd=tmp_path, capture_output=True)
        assert ended.returncode == code
        return
    monkeypatch.setattr(sys, "argv", [str(path), *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == code


def solution(path: Path) -> Path:
    return path.parent / "solutions" / path.name

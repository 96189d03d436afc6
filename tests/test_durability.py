"""Runs survive what happens to them: kills, signals, full disks, edited files, bad numbers."""

import errno
import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import kill
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval
import model_patch
import record
import scoring
import snapshot
import steplog
import train

STOPPED = 14  # steps logged when it was stopped; metrics up to 12, a snapshot of 8


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    """Folders task, alone (a run that nothing happened to) and run (stopped after 14 steps)."""
    base = tmp_path_factory.mktemp("base")
    shutil.copytree(folder, base / "task")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.record, "draw_curve", lambda *_: None)  # matplotlib takes a second
        train.main([*kill.arguments(base / "task"), f"--out={base}/alone"])
        update, calls = model_patch.Patch.update, []

        def interrupted(self, seed, a):
            calls.append(update(self, seed, a))
            if len(calls) == STOPPED:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(model_patch.Patch, "update", interrupted)
        with pytest.raises(SystemExit) as stop:
            train.main([*kill.arguments(base / "task"), f"--out={base}/run"])
    assert stop.value.code == 128 + signal.SIGTERM
    assert train.record.read_result(base / "alone")["best_step"] == 12 < STOPPED  # to be remembered
    assert len(steps_of(base / "run")) == STOPPED
    return base


@pytest.fixture
def at(base, tmp_path, monkeypatch):
    """A copy of it; paths in config.json may be changed, as the files have fingerprints."""
    monkeypatch.setattr(train.record, "draw_curve", lambda *_: None)
    shutil.copytree(base, tmp_path / "at")
    for name in ("run", "alone"):
        edit(tmp_path / "at" / name / "config.json", str(base), str(tmp_path / "at"))
    return tmp_path / "at"


def edit(path, old, new, times=-1):
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new, times))


def steps_of(run):
    return (run / "steps.csv").read_text().splitlines()[1:]


def lines(name, change):
    """Spoil the list of a log's lines (steps.csv: line 0 is its header)."""

    def spoil(at):
        path = at / "run" / name
        text = path.read_text().splitlines(keepends=True)
        change(text)
        path.write_text("".join(text))

    return spoil


def setting(**changes):
    """Edit config.json: None removes."""

    def spoil(at):
        path = at / "run" / "config.json"
        settings = json.loads(path.read_text()) | changes
        gone = [name for name, value in changes.items() if value is None]
        path.write_text(json.dumps({k: v for k, v in settings.items() if k not in gone}))

    return spoil


def write(name, data):
    return lambda at: (at / "run" / name).write_bytes(data)


def remove(name):
    return lambda at: (at / name).unlink()


def swap(text, i, j):
    text[i], text[j] = text[j], text[i]


def other_digit(text, line, column):
    row = text[line].rstrip("\n").split(",")
    row[column] = row[column].replace(".", ".9", 1)
    text[line] = ",".join(row) + "\n"


def weights(change):
    """Change the base model's tensors."""

    def spoil(at):
        path = at / "task" / "model" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def nan_inside(tensors):  # where the fingerprint's sample does not look
    tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[700] = torch.nan


def start_edited(at):
    path = at / "run" / "config.json"
    settings = json.loads(path.read_text())
    settings["start"]["validation_accuracy"] = 0.99
    path.write_text(json.dumps(settings))


def nothing(at):
    pass


RESUME, EVAL, NEW = "--resume={at}/run", "eval --run={at}/run --step=last", "{new} --out={at}/new"
CHANGED = "config.json was changed after the run began"
BAD = {  # what happened: (how, the command, what the one line says)
    # ------------------------------------------------ config.json
    "no such run": (nothing, "--resume={at}/none", "is no run directory"),
    "not a folder": (nothing, "--resume={at}/task/train.jsonl", "is no run directory"),
    "no config.json": (remove("run/config.json"), RESUME, "is no run directory"),
    "config.json torn": (write("config.json", b'{"model": "x"'), RESUME, "torn or edited"),
    "config.json binary": (write("config.json", bytes(range(256))), RESUME, "torn or edited"),
    "config.json empty": (write("config.json", b""), RESUME, "torn or edited"),
    "stopped before step 1": (write("config.json", b"{}"), RESUME, "before its first step"),
    "config.json a list": (write("config.json", b"[1]"), RESUME, CHANGED),
    "another method": (setting(method="mezo"), RESUME, CHANGED),
    "another mask": (setting(mask_kind="packed"), RESUME, CHANGED),
    "another density": (setting(density=0.5), RESUME, CHANGED),
    "another learning rate": (setting(lr=0.5), RESUME, CHANGED),
    "another seed": (setting(seed=1), RESUME, CHANGED),
    "another dtype": (setting(dtype="bfloat16"), RESUME, CHANGED),
    "another batch size": (setting(batch_size=4), RESUME, CHANGED),
    "a setting removed": (setting(eps=None), RESUME, CHANGED),
    "the model's fingerprint removed": (setting(model_fingerprint=None), RESUME, CHANGED),
    "validation at the start edited": (start_edited, RESUME, CHANGED),
    "another mask, evaluated": (setting(mask_kind="packed"), EVAL, CHANGED),
    "steps that are no number": (setting(steps="x"), RESUME, "steps is 'x', not a number"),
    "config.json torn, evaluated": (write("config.json", b"{"), EVAL, "torn or edited"),
    # ------------------------------------------------ steps.csv
    "no steps.csv": (remove("run/steps.csv"), RESUME, "steps.csv is missing"),
    "steps.csv empty": (write("steps.csv", b""), RESUME, "line 1 is ''"),
    "steps.csv binary": (write("steps.csv", bytes(range(256))), RESUME, "line 1 is"),
    "its header lost": (lines("steps.csv", lambda t: t.pop(0)), RESUME, "line 1 is '0,0,"),
    "a line lost": (lines("steps.csv", lambda t: t.pop(5)), RESUME, "line 6 is '5,"),
    "a line twice": (lines("steps.csv", lambda t: t.insert(5, t[5])), RESUME, "line 7 is '4,"),
    "two lines swapped": (lines("steps.csv", lambda t: swap(t, 3, 4)), RESUME, "line 4 is '3,"),
    "a line cut in the middle": (
        lines("steps.csv", lambda t: t.__setitem__(5, t[5][:9] + "\n")), RESUME, "line 6 is '4,"),
    "an update edited": (lines("steps.csv", lambda t: other_digit(t, 4, 2)), RESUME, "line 5 is"),
    "a loss edited": (lines("steps.csv", lambda t: other_digit(t, 4, 3)), RESUME, "line 5 is"),
    "a seed edited": (lines("steps.csv", lambda t: t.__setitem__(4, "3,9" + t[4][3:])), RESUME,
                      "did not write"),
    "bytes in the middle": (lines("steps.csv", lambda t: t.__setitem__(4, "\0\0\n")), RESUME,
                            "line 5 is"),
    "an update edited, evaluated": (
        lines("steps.csv", lambda t: other_digit(t, 4, 2)), EVAL, "line 5 is"),
    # ------------------------------------------------ metrics.jsonl
    "no metrics.jsonl": (remove("run/metrics.jsonl"), RESUME, "metrics.jsonl is missing"),
    "metrics emptied": (write("metrics.jsonl", b""), RESUME, "no line of step 4"),
    "a line of metrics lost": (
        lines("metrics.jsonl", lambda t: t.pop(1)), RESUME, "no line of step 6"),
    "metrics swapped": (
        lines("metrics.jsonl", lambda t: swap(t, 0, 1)), RESUME, "no line of step 4"),
    "metrics of another step": (
        lines("metrics.jsonl", lambda t: t.__setitem__(0, t[0].replace('"step": 4', '"step": 3'))),
        RESUME, "no line of step 4"),
    "metrics torn in the middle": (
        lines("metrics.jsonl", lambda t: t.__setitem__(1, t[1][:30] + "\n")), RESUME, "line 2 is"),
    "an accuracy that is text": (
        lines("metrics.jsonl", lambda t: t.__setitem__(1, '{"validation_accuracy": "x"}\n')),
        RESUME, "line 2 is"),
    # ------------------------------------------------ model and data
    "a label changed": (
        lambda at: edit(at / "task/test.jsonl", '"label": 1', '"label": 0', 1), RESUME,
        "have changed"),
    "a label changed, evaluated": (
        lambda at: edit(at / "task/train.jsonl", '"label": 1', '"label": 0', 1), EVAL,
        "have changed"),
    "data in another order": (
        lambda at: (at / "task/train.jsonl").write_text(
            "".join(reversed((at / "task/train.jsonl").read_text().splitlines(keepends=True)))),
        RESUME, "have changed"),
    "data torn": (lambda at: (at / "task/test.jsonl").write_text("{oops"), RESUME, "test.jsonl:1"),
    "data gone": (remove("task/test.jsonl"), RESUME, "no file"),
    "another model": (weights(lambda t: t["model.norm.weight"].add_(1)), RESUME, "not the model"),
    "another model, evaluated": (
        weights(lambda t: t["model.norm.weight"].add_(1)), EVAL, "not the model"),
    "the model in another shape": (
        lambda at: edit(at / "task/model/config.json", '"num_hidden_layers": 2',
                        '"num_hidden_layers": 1'), RESUME, "not the model"),
    "model gone": (lambda at: shutil.rmtree(at / "task/model"), RESUME, "does not exist"),
    "model without weights": (
        remove("task/model/model.safetensors"), RESUME, "cannot load the weights"),
    "model torn": (
        lambda at: (at / "task/model/model.safetensors").write_bytes(b"\x09" * 99), RESUME,
        "cannot load the weights"),
    "NaN in the weights": (weights(nan_inside), RESUME, "up_proj.weight holds NaN"),
    "NaN in the weights, evaluated": (weights(nan_inside), EVAL, "up_proj.weight holds NaN"),
    "NaN in the weights, MeZO": (
        weights(nan_inside), NEW + " --method=mezo --refresh-every=0", "up_proj.weight holds NaN"),
    "NaN in the weights, R-MeZO": (
        weights(nan_inside), NEW + " --method=r-mezo --refresh-every=0", "holds NaN"),
    # ------------------------------------------------ flags
    "settings beside --resume": (nothing, RESUME + " --lr=1 --task=rte", "leave out --lr, --task"),
    "fewer steps": (nothing, RESUME + " --steps=8", "--steps 8"),
    "too many steps": (nothing, RESUME + " --steps=99999999", "from 1 to"),
    "no such device": (nothing, RESUME + " --device=tpu", "auto, cpu, cuda or cuda:N"),
    "resumed after its end": (nothing, "--resume={at}/alone", "has finished its 24 steps"),
    "a step that is not there": (nothing, "eval --run={at}/run --step=15", "0 … 14"),
    "the best of an unfinished run": (nothing, "eval --run={at}/run", "has not finished"),
    "result.json torn": (write("result.json", b'{"be'), "eval --run={at}/run", "torn or edited"),
    "thresholds lost in a snapshot": (
        nothing, NEW + " --snapshot-every=6", "a multiple of --refresh-every 4"),
    "snapshots before the start": (nothing, NEW + " --snapshot-every=-1", "at least 0"),
    "micro-batches of nothing": (nothing, NEW + " --micro-batch=0", "--micro-batch 0: at least 1"),
    "several GPUs of none": (nothing, NEW + " --device-map=auto", "sees no GPU"),
    "an unknown way to spread": (nothing, NEW + " --device-map=half", "invalid choice"),
}  # fmt: skip


def command(text, at):
    """(main, argv) of a row of the table."""
    main = eval.main if text.startswith("eval ") else train.main
    words = text.removeprefix("eval ").format(at=at, new=" ".join(kill.arguments(at / "task")))
    return main, words.split()


def contents(run):
    return {p.name: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def error_of(main, argv, capsys):
    """The one line of a command that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    return [line for line in error.strip().splitlines() if "error: " in line][-1]


@pytest.mark.parametrize("what", BAD)
def test_bad_luck_is_one_line_and_changes_nothing(what, at, capsys):
    """Exit code 2, one line that says what is wrong; every file of the run is as it was."""
    spoil, text, message = BAD[what]
    if "sees no GPU" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    spoil(at)
    before = contents(at / "run")
    assert message in error_of(*command(text, at), capsys)
    assert contents(at / "run") == before
    assert not (at / "new").exists()


def test_the_table_is_long():
    """Issue: at least 40 cases."""
    assert len(BAD) + len(HARMLESS) + len(FULL) >= 40


# ------------------------------------------------------------------ what costs nothing but time


def torn(name, tail):
    def spoil(at):
        with open(at / "run" / name, "ab") as file:
            file.write(tail)

    return spoil


def snapshot_of(change):
    def spoil(at):
        (path,) = (at / "run").glob("snapshot-*.safetensors")
        change(path)

    return spoil


HARMLESS = {  # what happened: how
    "nothing": nothing,
    "a torn last step": torn("steps.csv", b"14,14,0.00"),
    "a torn last line of metrics": torn("metrics.jsonl", b'{"loss_plus": 0.7'),
    "zeros after the last step": torn("steps.csv", b"\0" * 512),
    "a last step without its metrics": lambda at: (
        lines("steps.csv", lambda t: t.__delitem__(slice(13, None)))(at),
        lines("metrics.jsonl", lambda t: t.pop())(at),
    ),
    "the last steps lost": lines("steps.csv", lambda t: t.__delitem__(slice(6, None))),
    "all steps lost": lines("steps.csv", lambda t: t.__delitem__(slice(1, None))),
    "a snapshot torn": snapshot_of(lambda path: path.write_bytes(path.read_bytes()[:999])),
    "a snapshot with a wrong byte": snapshot_of(
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    ),
    "a snapshot gone": snapshot_of(lambda path: path.unlink()),
    "a snapshot of another step": snapshot_of(
        lambda path: path.rename(path.with_name("snapshot-12.safetensors"))
    ),
    "a copy of a snapshot kept beside it": snapshot_of(
        lambda path: shutil.copy(path, path.with_name("snapshot-8 (copy).safetensors"))
    ),
    "a snapshot half written": write("snapshot-16.tmp", b"x"),
    "a torn result": write("result.json", b"{"),
    "the folders moved": lambda at: None,  # the fixture has
}


@pytest.mark.parametrize("what", HARMLESS)
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(what, at):
    """Log and metrics to the byte (but seconds), best step, accuracies, saved weights."""
    HARMLESS[what](at)
    train.main([f"--resume={at}/run"])
    assert kill.outcome(at / "run") == kill.outcome(at / "alone")


def test_the_seconds_of_a_run_are_those_of_all_its_sessions(at):
    """training_seconds of result.json is the sum over the lines of metrics, before and after."""
    train.main([f"--resume={at}/run"])
    lines = train.steplog.read_metrics(at / "run")
    counted = [0] + [line["step"] - line["skipped"] for line in lines]
    steps = [b - a for a, b in zip(counted, counted[1:], strict=False)]
    took = sum(m["seconds_per_step"] * n for m, n in zip(lines, steps, strict=True))
    found = train.record.read_result(at / "run")["training_seconds"]
    assert found == pytest.approx(took) and found == lines[-1]["training_seconds"] > 0


def test_a_snapshot_is_used_and_bounds_the_replay(at, monkeypatch):
    """From step 8 on, not from the start; eval.py uses it too."""
    original, replayed = model_patch.Patch.update, []
    monkeypatch.setattr(
        model_patch.Patch, "update", lambda *a: replayed.append(a[1]) or original(*a)
    )
    eval.main([f"--run={at}/run", "--step=last"])
    assert replayed == list(range(8, STOPPED))


def test_the_newest_snapshot_up_to_the_best_step_stays(tmp_path):
    """So the best weights at the end are not replayed from the start; a third one never stands, nor
    what a kill left of one."""
    settings, stands = {"fingerprint": "f"}, []
    (tmp_path / "snapshot-2.safetensors.tmp").write_bytes(b"torn")
    for step, best in ((4, 0), (8, 6), (12, 12), (16, 12), (20, 12), (24, 24), (28, 24)):
        snapshot.write(tmp_path, step, {"w": torch.ones(3)}, settings, best)
        names = [int(p.stem.removeprefix("snapshot-")) for p in tmp_path.iterdir()]
        stands.append(sorted(names))
    assert stands == [[4], [4, 8], [12], [12, 16], [12, 20], [24], [24, 28]]
    assert snapshot.newest(tmp_path, 26, settings)[0] == 24


def test_a_run_goes_on_in_smaller_parts(at):
    """--resume with --micro-batch, after a GPU was full: the same steps to rounding."""
    train.main([f"--resume={at}/run", "--micro-batch=1"])
    assert train.record.open_run(at / "run")[0]["micro_batch"] == 1
    mine, alone = (train.record.open_run(at / name)[1] for name in ("run", "alone"))
    assert mine[:STOPPED] == alone[:STOPPED] and len(mine) == len(alone)
    first = [step.loss_plus for step in (mine[STOPPED], alone[STOPPED])]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    with pytest.raises(SystemExit):
        train.main([f"--resume={at}/alone", "--steps=30", "--micro-batch=0"])


def test_another_torch_is_named_and_no_obstacle(at, capsys):
    """Its compiler may round differently: who resumes under it is told, and goes on."""
    edit(at / "run" / "config.json", f'"torch": "{torch.__version__}"', '"torch": "1.0"')
    train.main([f"--resume={at}/run"])
    assert "the run began with torch 1.0; with" in capsys.readouterr().out
    assert kill.outcome(at / "run") == kill.outcome(at / "alone")


def test_out_of_memory_in_the_loop_says_how_to_go_on(at, monkeypatch, capsys):
    """The rows in memory at once can be fewer from here on, without changing the experiment."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model_patch.Patch, "losses", full)
    with pytest.raises(SystemExit, match="2"):
        train.main([f"--resume={at}/run"])
    assert f"--resume {at}/run --micro-batch N goes on" in capsys.readouterr().err


def test_more_steps_are_what_a_longer_run_would_have_done(at, tmp_path):
    """--steps adds to a finished run: equal to one that was asked for them at once."""
    flags = ["--steps=30", "--log-every=4", "--eval-every=6"]
    train.main([*kill.arguments(at / "task"), *flags, f"--out={tmp_path}/long"])
    train.main([f"--resume={at}/alone", "--steps=30"])
    assert kill.outcome(at / "alone") == kill.outcome(tmp_path / "long")


# ------------------------------------------------------------------ full and read-only disks


@contextmanager
def no_larger(size):
    """Files of this process end at `size` bytes: a real failed write, in any file."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def failing(owner, name, code, number=1):
    """The number-th call fails as the operating system would."""

    @contextmanager
    def context(at):
        original, calls = getattr(owner, name), []

        def fails(*args, **kwargs):
            calls.append(1)
            if len(calls) >= number:
                raise OSError(code, os.strerror(code))
            return original(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, fails)
            yield

    return context


def on_a_tmpfs(prepare):
    """The run's directory is a file system of its own, of 1 MB, after `prepare(run)`."""

    @contextmanager
    def context(at):
        run, aside = at / "run", at / "aside"
        run.rename(aside), run.mkdir()
        if os.system(f"mount -t tmpfs -o size=1m none {run} 2>/dev/null"):
            pytest.skip("no right to mount a file system")
        try:
            shutil.copytree(aside, run, dirs_exist_ok=True)
            prepare(run)
            yield
        finally:
            shutil.rmtree(aside)
            shutil.copytree(run, aside, ignore=shutil.ignore_patterns("filler"))
            assert os.system(f"umount {run}") == 0
        run.rmdir(), aside.rename(run)

    return context


def fill(run):
    """To the last block; files may still grow to the end of theirs."""
    with open(run / "filler", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))


def lock(run):
    """No more writes, for the owner and root neither."""
    assert os.system(f"mount -o remount,ro {run}") == 0


FULL = {  # where the disk ends: (how, what the one line says)
    "in a line of steps.csv": (
        lambda at: no_larger((at / "run/steps.csv").stat().st_size + 100), "File too large"),
    "in a line of metrics.jsonl": (
        lambda at: no_larger((at / "run/metrics.jsonl").stat().st_size + 300), "File too large"),
    "in a snapshot": (lambda at: no_larger(40_000), "too large"),
    "at a sync": (failing(os, "fsync", errno.ENOSPC, 6), "No space left"),
    "at a rename": (failing(os, "replace", errno.ENOSPC, 2), "No space left"),
    "at result.json": (failing(train.record, "write_json", errno.ENOSPC, 2), "No space left"),
    "read-only": (failing(steplog, "open", errno.EROFS), "Read-only file system"),
    "not ours": (failing(steplog, "open", errno.EACCES), "Permission denied"),
    "a failing disk": (failing(os, "fsync", errno.EIO, 3), "Input/output error"),
    "a full tmpfs": (on_a_tmpfs(fill), "No space left"),
    "a read-only mount": (on_a_tmpfs(lock), "Read-only file system"),
}  # fmt: skip


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    where, at, capsys, monkeypatch
):
    """All that was logged is still read; with room again the run ends as if there had been none."""
    limit, message = FULL[where]
    monkeypatch.setattr(steplog, "open", open, raising=False)
    before = steps_of(at / "run")
    with limit(at):
        error = error_of(train.main, [f"--resume={at}/run"], capsys)
    assert message in error and f"--resume {at}/run goes on" in error
    _, steps = train.record.open_run(at / "run")
    assert len(steps) >= len(before)
    train.main([f"--resume={at}/run"])
    assert kill.outcome(at / "run") == kill.outcome(at / "alone")


# ------------------------------------------------------------------ signals and kills


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(base, at, capsys, monkeypatch):
    """In the middle of a step: it is finished and logged, exit code 130; a second one does not."""
    original = model_patch.Patch.losses

    def interrupted(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(model_patch.Patch, "losses", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.main([f"--resume={at}/run"])
    assert stop.value.code == 130 and len(steps_of(at / "run")) == STOPPED + 1
    assert f"train.py --resume {at}/run goes on" in capsys.readouterr().out

    def twice(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        return interrupted(self, *args)

    monkeypatch.setattr(model_patch.Patch, "losses", twice)
    with pytest.raises(SystemExit) as stop:
        train.main([f"--resume={at}/run"])
    assert stop.value.code == 130 and len(steps_of(at / "run")) == STOPPED + 1
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_of_another_arithmetic_is_refused(at, capsys, monkeypatch):
    """Where a version rounds updates differently, older logs are not continued with it."""
    monkeypatch.setattr(train.sweep, "ARITHMETIC", -1)
    before = contents(at / "run")
    for argv, main in (([f"--resume={at}/run"], train.main), (command(EVAL, at)[1], eval.main)):
        assert "of a nanoZO that reads runs differently" in error_of(main, argv, capsys)
    assert contents(at / "run") == before


def test_snapshots_of_a_log_that_was_cut_go(at):
    """A run that goes on from before a snapshot may go another way, so that snapshot is removed."""
    run = at / "run"
    settings, steps = record.open_run(run)
    (path,) = run.glob("snapshot-*.safetensors")
    record.reopen(run, settings, len(steps))
    assert path.exists()
    record.reopen(run, settings, int(path.stem.removeprefix("snapshot-")) - 1)
    assert not path.exists()


def test_a_run_that_is_running_is_left_alone(at, capsys):
    """Two processes never write one log."""
    lock = train.record.lock(at / "run")
    before = steps_of(at / "run")
    assert "by another process" in error_of(train.main, [f"--resume={at}/run"], capsys)
    assert "by another process" in error_of(
        train.main, [*kill.arguments(at / "task"), f"--out={at}/run"], capsys
    )
    os.close(lock)
    assert steps_of(at / "run") == before


def test_kill_9_at_random_moments(folder, tmp_path):
    """Five kills, between and inside writes; `python -m tests.kill --kills 25` is the long form."""
    killed, finished = kill.kill_often(folder, tmp_path, kills=5, seed=1)
    assert killed == 5 and finished >= 1


# ------------------------------------------------------------------ losses, updates, files


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_a_loss_that_overflows_is_skipped_also_when_resumed(bad, at, monkeypatch):
    """Skipped steps are counted across a stop, and replay does not apply them."""
    original, calls = scoring.classification_loss, []

    def sometimes(logits, batch):
        calls.append(1)
        return original(logits, batch) * (bad if len(calls) in (1, 2, 5) else 1)

    monkeypatch.setattr(scoring, "classification_loss", sometimes)
    train.main([f"--resume={at}/run"])
    result = json.loads((at / "run" / "result.json").read_text())
    assert result["skipped"] == 2
    lines("steps.csv", lambda t: t.__delitem__(slice(20, None)))(at)
    (at / "run" / "result.json").unlink()
    train.main([f"--resume={at}/run"])
    assert json.loads((at / "run" / "result.json").read_text())["skipped"] == 2


def test_the_run_says_once_what_its_first_steps_moved(folder, tmp_path, capsys):
    """fp32 hears every update; bf16 loses small ones, and the run says so."""
    for dtype, low, high in (("float32", 0.95, 1), ("bfloat16", 0, 0.5)):
        out = tmp_path / dtype
        flags = ["--lr=1e-6", f"--dtype={dtype}", "--rounding=nearest", f"--out={out}"]
        train.main([*kill.arguments(folder), *flags])
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        (moved,) = [m["moved"] for m in metrics if "moved" in m]
        assert low <= moved <= high, (dtype, moved)
        said = "of the weights inside the mask" in capsys.readouterr().out
        assert said == (dtype == "bfloat16")


def test_a_digest_changes_with_any_bit_and_any_order():
    """What workers compare and snapshots are checked by."""
    tensors = {"a": torch.randn(1000), "b": torch.randn(7).bfloat16()}
    found = snapshot.digest(tensors)
    assert found == snapshot.digest(dict(reversed(tensors.items()))) and 0 <= found < 2**64
    for name, place in (("a", 0), ("a", 999), ("b", 6)):
        other = {n: t.clone() for n, t in tensors.items()}
        kind = torch.int32 if name == "a" else torch.int16
        for bit in (0, 7, 14):
            other[name].view(kind)[place] ^= 1 << bit
            assert snapshot.digest(other) != found
            other[name].view(kind)[place] ^= 1 << bit
    swapped = tensors | {"a": tensors["a"].roll(1)}
    assert snapshot.digest(swapped) != found


def test_no_pickle_is_ever_loaded():
    """No torch.load, no pickle, no object collectives, in any module."""
    for path in Path(train.__file__).parent.glob("*.py"):
        for word in ("torch.load(", "import pickle", "pickle.load", "_object_list", "torch.save("):
            assert word not in path.read_text(encoding="utf-8"), f"{path.name}: {word}"

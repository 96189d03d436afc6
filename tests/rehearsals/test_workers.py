"""Several workers and micro-batches: one batch in parts is the whole batch, to rounding."""

import importlib
import json
import os
import socket
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import kill
import numpy as np
import pytest
from torch.distributed import run as torchrun

import eval
import model_patch
import train
from harness import dataset, loading, log, workers

ROOT = Path(train.__file__).resolve().parent
SENSZOQ = ["--method=senszoq", "--mask-from=task", "--density=0.02", "--lr=0.01"]


def command(folder, out, *more):
    return [*kill.arguments(folder, ["--lr=1e-4"]), f"--out={out}", *more]


def life(rank, size, port, argv, errors, spoil):
    """One worker, as torchrun would start it."""
    workers.RANK, workers.SIZE = rank, size
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "w", buffering=1)
    if spoil is not None:
        spoil(rank)
    try:
        train.main(argv)
    except SystemExit as stop:
        os._exit(stop.code)
    os._exit(0)


def together(size, argv, tmp_path, spoil=None):
    """(exit codes, what was said to stderr) of `size` workers on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("fork")
    errors = [tmp_path / f"stderr-{time.monotonic_ns()}-{rank}" for rank in range(size)]
    processes = [
        context.Process(target=life, args=(rank, size, port, argv, errors[rank], spoil))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    return [p.exitcode for p in processes], [path.read_text() for path in errors]


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """A run of one worker."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train.main(command(folder, out))
    return out


def assert_equal_to_rounding(run, alone):
    """Losses to 1e-5, updates to what that leaves of a difference, the rest as it is."""
    found, expected = (log.StepLog(path).steps for path in (run, alone))
    assert len(found) == len(expected) == 12
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[:2] == theirs[:2] and ours.validation == theirs.validation
        assert ours[3:5] == pytest.approx(theirs[3:5], rel=1e-5)
        assert ours.a == pytest.approx(theirs.a, rel=0.01, abs=1e-6)


def test_workers_are_the_run_of_one_to_rounding(folder, alone, tmp_path):
    """A batch of 7 in unequal shares gives the run of one, which one worker can go on with."""
    run = tmp_path / "run"
    codes, errors = together(2, command(folder, run), tmp_path)
    assert codes == [0, 0], errors
    assert not any("error" in text for text in errors)
    assert_equal_to_rounding(run, alone)
    result = json.loads((run / "result.json").read_text())
    assert result["workers"] == 2 and result["last"]["n"] == 20
    before = (run / "steps.csv").read_bytes()
    eval.main([f"--run={run}", "--step=last"])
    train.main([f"--resume={run}", "--steps=14"])
    assert (run / "steps.csv").read_bytes().startswith(before)
    codes, errors = together(2, [f"--resume={run}", "--steps=16"], tmp_path)
    assert codes == [0, 0] and len(log.StepLog(run).steps) == 16, errors


def test_more_workers_than_examples(folder, tmp_path):
    """A worker that has no example of a batch follows the others."""
    codes, errors = together(
        3, command(folder, tmp_path / "run", "--batch-size=2", "--num-test=2"), tmp_path
    )
    assert codes == [0] * 3, errors
    train.main(command(folder, tmp_path / "one", "--batch-size=2", "--num-test=2"))
    assert_equal_to_rounding(tmp_path / "run", tmp_path / "one")


def test_workers_without_a_common_disk_share_a_mask(folder, tmp_path):
    """SensZOQ's mask is made by the first worker, and each trains on it in a folder of its own."""

    def apart(rank):
        (tmp_path / f"machine{rank}").mkdir()
        os.chdir(tmp_path / f"machine{rank}")

    codes, errors = together(2, command(folder, "run", *SENSZOQ), tmp_path, apart)
    assert codes == [0, 0], errors
    train.main(command(folder, tmp_path / "one", *SENSZOQ))
    assert_equal_to_rounding(tmp_path / "machine0/run", tmp_path / "one")


def dies(rank):
    update, calls = model_patch.Patch.update, []

    def counted(*arguments):
        calls.append(update(*arguments))
        if rank == 1 and len(calls) == 5:
            os._exit(7)

    model_patch.Patch.update = counted


def test_a_worker_that_dies_ends_the_run(folder, alone, tmp_path):
    """The other worker says that it lost one, and the log stays and can be gone on with."""
    run = tmp_path / "run"
    codes, errors = together(2, command(folder, run), tmp_path, dies)
    assert codes == [2, 7] and "worker 0 lost another worker" in errors[0]
    assert f"--resume {run} goes on" in errors[0] and "Traceback" not in errors[0]
    assert 4 <= len(log.StepLog(run).steps) <= 5
    train.main([f"--resume={run}"])
    assert_equal_to_rounding(run, alone)


def other_weights(rank):
    original = train.open_patch

    def open_patch(*arguments):
        patch = original(*arguments)
        if rank == 1:
            patch.weights[-1].parameter.data.view(-1)[-1] += 1e-3
        return patch

    train.open_patch = open_patch


def other_data(rank):
    original = dataset.load
    dataset.load = lambda config: original(replace(config, data_seed=rank))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (other_weights, "worker 1 of 2 has other weights"),
        (other_data, "worker 1 of 2 has other da"),
    ],
)
def test_workers_that_differ_are_stopped(spoil, message, folder, tmp_path):
    """Workers whose weights or whose examples are not the first one's do not train."""
    codes, errors = together(2, command(folder, tmp_path / "run"), tmp_path, spoil)
    assert codes == [2, 2] and all(message in text for text in errors)
    assert "Traceback" not in "".join(errors) and not log.StepLog(tmp_path / "run").steps


def test_an_error_of_the_first_worker_alone_is_one_line_for_each(folder, tmp_path):
    """Where the first worker cannot begin, the others end with a line, too."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/file").write_text("mine")
    codes, errors = together(2, command(folder, tmp_path / "run"), tmp_path)
    assert codes == [2, 2] and "is not empty" in errors[0]
    # or the first has ended before the second has met it
    assert "lost worker 0" in errors[1] or "cannot reach the others" in errors[1]
    assert "Traceback" not in "".join(errors)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["file"]


def test_workers_that_cannot_meet_say_so(folder, tmp_path, monkeypatch, capsys):
    """A worker whose connection fails while it meets the others ends with a line."""

    def closed(*args, **kwargs):
        raise RuntimeError("Gloo connectFullMesh failed: closed by peer\nand much more")

    monkeypatch.setattr(workers, "SIZE", 2)
    monkeypatch.setattr(workers.dist, "init_process_group", closed)
    with pytest.raises(SystemExit) as stop:
        train.main(command(folder, tmp_path / "run"))
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said.endswith("failed: closed by peer)"), said


def started(*words):
    """What a process of the launcher runs: `workers` reads the environment that it finds."""
    importlib.reload(workers)
    train.main(words[words.index("train.py") + 1 :])


def test_torchrun_starts_it(folder, tmp_path, monkeypatch, capfd):
    """The command of the README works on the real launcher, and one worker speaks."""
    launch = torchrun.elastic_launch

    def forked(config, entrypoint):  # of this process, which has imported everything
        config.start_method = "fork"
        return launch(config, started)

    monkeypatch.setattr(torchrun, "elastic_launch", forked)
    argv = ["--standalone", "--nproc_per_node=2", "train.py"]
    torchrun.main([*argv, *command(folder, tmp_path / "run", "--steps=4")])
    assert capfd.readouterr().out.count("test accuracy, last weights") == 1
    assert json.loads((tmp_path / "run/result.json").read_text())["workers"] == 2


def test_workers_of_a_machine_take_a_gpu_each(monkeypatch):
    """The workers of torchrun share the GPUs out; a GPU that the user names is taken."""
    monkeypatch.setattr(loading.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading.torch.cuda, "device_count", lambda: 2)
    taken = []
    monkeypatch.setattr(loading.torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(loading.torch.backends.cuda, "enable_cudnn_sdp", taken.append)
    assert loading.take_device("auto") == "cuda:0" and taken == ["cuda:0", False]
    for worker, device in enumerate(["cuda:0", "cuda:1", "cuda:0"]):
        monkeypatch.setenv("LOCAL_RANK", str(worker))
        assert loading.take_device("auto") == loading.take_device("cuda") == device
        assert loading.take_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="sees 2 GPUs"):
        loading.take_device("cuda:2")


def test_shares_are_every_nth(monkeypatch):
    """Each item has one worker, and one worker alone has all and needs no network."""
    assert workers.share([1, 2, 3]) == [1, 2, 3] and workers.broadcast("x") == "x"
    assert workers.all_sum([1.5]) == [1.5]
    workers.check_same(1.0, "weights")
    shares = []
    monkeypatch.setattr(workers, "SIZE", 3)
    for rank in range(3):
        monkeypatch.setattr(workers, "RANK", rank)
        shares.append(workers.share([0, 1, 2, 3]))
    assert shares == [[0, 3], [1], [2]]


def test_numbers_that_are_no_number_are_the_same(monkeypatch):
    """Weights that broke on every worker do not differ; a worker with others is named."""
    monkeypatch.setattr(workers, "SIZE", 2)
    monkeypatch.setattr(workers, "gather", lambda numbers: np.stack([numbers, numbers]))
    workers.check_same(float("nan"), "weights")
    monkeypatch.setattr(workers, "gather", lambda numbers: np.stack([numbers, numbers + 1]))
    with pytest.raises(ValueError, match="worker 1 of 2 has other weights"):
        workers.check_same(1.0, "weights")

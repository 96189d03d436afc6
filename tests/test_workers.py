"""Several workers and micro-batches: one batch in parts is the whole batch, to rounding."""

import json
import os
import socket
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import kill
import pytest
import torch

import errors
import eval
import make_mask
import record
import sensitivity
import tasks
import train
import workers

ROOT = Path(train.__file__).resolve().parent


def life(rank, size, port, argv, errors, spoil):
    """One worker, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "w", buffering=1)
    if spoil is not None:
        spoil(rank)
    try:
        train.main(argv)
    except SystemExit as stop:
        os._exit(stop.code)
    os._exit(0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(size, argv, tmp_path, spoil=None):
    """(exit codes, what was said to stderr) of `size` workers on this machine."""
    port = free_port()
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


def command(folder, out, *more):
    return [*kill.arguments(folder), "--lr=1e-4", f"--out={out}", *more]


def numbers(run):
    """(losses and gradients of the log, validation accuracies)."""
    steps = [line.split(",") for line in (run / "steps.csv").read_text().splitlines()[1:]]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracies = [m["validation_accuracy"] for m in metrics if "validation_accuracy" in m]
    return torch.tensor([[float(x) for x in row[2:]] for row in steps]), accuracies


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """A run of one worker."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train.main(command(folder, out))
    return out


def assert_equal_to_rounding(run, alone):
    """All losses to 1e-5, all updates to what that leaves of a difference, all accuracies."""
    found, accuracies = numbers(run)
    expected, known = numbers(alone)
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=0.01, atol=1e-6)
    assert accuracies == known


@pytest.mark.parametrize("size", [2, 3])
def test_workers_are_the_run_of_one_to_rounding(size, folder, alone, tmp_path):
    """A batch of 7 in unequal shares; one worker writes, and all have its weights, hashed."""
    codes, errors = together(size, command(folder, tmp_path / "run"), tmp_path)
    assert codes == [0] * size, errors
    assert_equal_to_rounding(tmp_path / "run", alone)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["workers"] == size and result["last"]["n"] == 40
    assert not any("error" in text for text in errors)
    config, steps = record.open_run(tmp_path / "run")
    assert len(steps) == 24
    eval.main([f"--run={tmp_path}/run", "--step=last"])  # the log rebuilds it as any other


def test_more_workers_than_examples(folder, tmp_path):
    """Two of four workers have nothing to do but to follow."""
    argv = command(folder, tmp_path / "run", "--batch-size=2", "--steps=12", "--eval-every=6")
    codes, errors = together(4, argv, tmp_path)
    assert codes == [0] * 4, errors
    train.main(command(folder, tmp_path / "one", "--batch-size=2", "--steps=12", "--eval-every=6"))
    assert_equal_to_rounding(tmp_path / "run", tmp_path / "one")


def test_workers_share_a_run_of_q(folder, tmp_path):
    """SensZOQ: the first worker makes the mask, and both train on it."""
    flags = ["--method=senszoq", "--mask-from=task", "--density=0.02", "--refresh-every=0"]
    codes, errors = together(2, command(folder, tmp_path / "run", *flags), tmp_path)
    assert codes == [0, 0], errors
    assert (tmp_path / "run" / "sparse.safetensors").is_file()
    train.main(command(folder, tmp_path / "one", *flags))
    assert_equal_to_rounding(tmp_path / "run", tmp_path / "one")


def test_workers_without_a_common_disk_share_a_mask(folder, tmp_path):
    """Each worker in a folder of its own, as on two machines: the mask is handed out."""

    def apart(rank):
        (tmp_path / f"machine{rank}").mkdir()
        os.chdir(tmp_path / f"machine{rank}")

    flags = ["--method=sensitive", "--mask-from=task", "--density=0.02", "--refresh-every=0"]
    codes, errors = together(2, command(folder, "run", *flags), tmp_path, apart)
    assert codes == [0, 0], errors
    there = tmp_path / "machine1" / "run"
    assert [path.name for path in there.iterdir()] == [record.MASK]
    assert (there / record.MASK).read_bytes() == (
        tmp_path / "machine0" / "run" / record.MASK
    ).read_bytes()


def die_at_step_10(rank):
    original, calls = train.losses, []

    def losses(*args):
        calls.append(1)
        if rank == 1 and len(calls) == 11:
            os._exit(9)
        return original(*args)

    train.losses = losses


def test_a_worker_that_dies_ends_the_run_and_others_can_resume_it(folder, tmp_path):
    """One line from those that are left; the log goes on with one worker, then with three."""
    run = tmp_path / "run"
    codes, errors = together(2, command(folder, run), tmp_path, die_at_step_10)
    assert codes == [2, 9]
    assert "lost another worker" in errors[0] and f"--resume {run} goes on" in errors[0]
    first = (run / "steps.csv").read_bytes()
    assert len(record.open_run(run)[1]) == 10
    codes, errors = together(3, [f"--resume={run}"], tmp_path)
    assert codes == [0] * 3, errors
    assert (run / "steps.csv").read_bytes().startswith(first)
    assert len(record.open_run(run)[1]) == 24
    assert json.loads((run / "result.json").read_text())["workers"] == 3


def one_bit(rank):
    original = train.eval.make_patch

    def make_patch(model, settings, index=None):
        handle = original(model, settings)
        if rank == 1:
            next(iter(handle.tensors().values()))[5] += 1e-3
        return handle

    train.eval.make_patch = make_patch


def other_seed(rank):
    original = train.prepare

    def prepare(config, given):
        config.seed = rank
        return original(config, given)

    train.prepare = prepare


@pytest.mark.parametrize(
    "spoil, message",
    [(one_bit, "worker 1 of 2 has other weights"), (other_seed, "has other settings")],
    ids=["weights", "settings"],
)
def test_workers_that_differ_are_stopped(spoil, message, folder, tmp_path):
    """A hash of the weights at each evaluation, of settings, model and data at the start."""
    codes, errors = together(2, command(folder, tmp_path / "run"), tmp_path, spoil)
    assert codes == [2, 2] and all(message in text for text in errors)
    assert "Traceback" not in "".join(errors)


def other_data(rank):
    original = train.loading.load_data

    def load_data(config):
        config.data_seed = rank
        return original(config)

    train.loading.load_data = load_data
    train.make_mask.for_run = None  # hours of work: not before the workers agree


def missing_data(rank):
    if rank == 1:
        train.loading.load_data = refuse


def refuse(config):
    raise errors.UserError("no file")


@pytest.mark.parametrize("spoil, message", [(other_data, "other data"), (missing_data, "no file")])
def test_workers_agree_on_the_data_before_a_mask_is_made(spoil, message, folder, tmp_path):
    """Each has its own copy of it; one that fails ends the others, and no directory is left."""
    more = ["--method=sensitive", "--density=0.01", "--mask-from=task", "--refresh-every=0"]
    codes, errors = together(2, command(folder, tmp_path / "run", *more), tmp_path, spoil)
    assert codes == [2, 2] and message in "".join(errors)
    assert "Traceback" not in "".join(errors) and not (tmp_path / "run").exists()


def test_a_worker_that_waits_for_others_can_be_stopped(folder, tmp_path):
    """SIGTERM before the workers have met ends it; so it does not take a kill -9."""
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = str(port := free_port())
    process = subprocess.Popen(
        [sys.executable, "train.py", *command(folder, tmp_path / "run")],
        cwd=ROOT, env=os.environ | alone, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)):  # it listens: it waits
            assert process.poll() is None
            time.sleep(0.1)
    process.terminate()
    assert process.wait(20) == -15 and not (tmp_path / "run").exists()


def signalled(rank):
    original, calls = train.losses, []

    def losses(*args):
        calls.append(1)
        if rank == 1 and len(calls) == 6:
            os.kill(os.getpid(), 15)
        return original(*args)

    train.losses = losses


def test_a_signal_to_one_worker_stops_all_after_the_same_step(folder, tmp_path):
    """SIGTERM in step 6 of worker 1: both end with 143, and six steps are logged."""
    codes, _ = together(2, command(folder, tmp_path / "run"), tmp_path, signalled)
    assert codes == [143, 143] and len(record.open_run(tmp_path / "run")[1]) == 6


def test_torchrun_starts_it(folder, tmp_path):
    """The command of the README, two processes, on the real launcher."""
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    more = command(folder, tmp_path / "run", "--steps=4", "--snapshot-every=0")
    found = subprocess.run(
        [sys.executable, *argv, *more], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("test accuracy, last weights") == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["workers"] == 2


def test_a_worker_that_meets_nobody_is_one_line(monkeypatch, capsys):
    """WORLD_SIZE without the rest of what torchrun sets is exit code 2, not a traceback."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        train.main(["--task=rte"])
    assert stop.value.code == 2
    assert "cannot meet the other workers, use torchrun" in capsys.readouterr().err


def test_one_worker_needs_no_network():
    """Alone, a group is the identity."""
    group = workers.Group()
    assert group.sum([1.5, 2]) == [1.5, 2] and group.tell({"a": 1}) == {"a": 1}
    assert group.share([1, 2, 3]) == [1, 2, 3]
    group.check_same(2**64 - 1, "weights")
    assert [workers.Group(r, 3).share([0, 1, 2, 3]) for r in range(3)] == [[0, 3], [1], [2]]


def test_a_model_under_accelerates_hooks_trains_as_any_other(folder):
    """--device-map auto wraps every module's forward; here all of them lie on one device."""
    accelerate = pytest.importorskip("accelerate")
    models = [train.loading.load_model(f"{folder}/model", device="cpu") for _ in range(2)]
    places = {name: "cpu" for name, _ in models[1].named_children()}
    accelerate.dispatch_model(models[1], places, main_device="cpu", force_hooks=True)
    assert hasattr(models[1].model.embed_tokens, "_hf_hook")
    found = []
    for model in models:
        handle = eval.make_patch(
            model, vars(train.Config(density=0.5, mask_kind="dynamic")) | {"compiled": False}
        )
        ids = torch.arange(4, 16).view(3, 4)
        found.append(handle.losses({"input_ids": ids}, lambda x: x[:, -1].float().std(), 3))
        handle.update(3, 0.01)
        handle.remove()
    assert found[0] == found[1]
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    losses = make_mask.text_losses(torch.arange(4, 16).view(2, 6))  # [Q]'s scores of such a model
    scores = [sensitivity.fisher(model, losses) for model in models]
    assert all(torch.equal(score, scores[1][name]) for name, score in scores[0].items())
    assert hasattr(models[1].model.embed_tokens, "_hf_hook")
    assert models[1].model.layers[0].forward.__wrapped__  # accelerate's again, not our checkpoint


# ------------------------------------------------------------------ micro-batches


@pytest.mark.parametrize("kind", ["classification", "language modelling"])
@pytest.mark.parametrize("micro", [1, 3, 7, 100])
def test_micro_batches_are_the_whole_batch_to_rounding(kind, micro, folder, monkeypatch):
    """Both losses; the options of unequal length, where a mean of means would be another number."""
    classification = kind == "classification"
    config = train.Config(model=f"{folder}/model", batch_size=7, micro_batch=micro, max_length=64)
    tokenizer, _ = train.loading.load_tokenizer(config.model)
    model = train.loading.load_model(config.model, device="cpu")
    settings = vars(config) | {"method": "mezo", "density": 1, "compiled": False}
    handle = eval.make_patch(model, settings)
    examples = [
        tasks.Example("a b ?", (" red", " blue a b c"), 1),
        *(tasks.Example(f"{w} c ?", (" red", " blue a b c"), 0) for w in "abcdef"),
    ]
    sizes = []
    original = handle.losses
    monkeypatch.setattr(
        handle, "losses", lambda i, *a: sizes.append(len(i["input_ids"])) or original(i, *a)
    )

    def both(config):
        score = "all" if classification else "right"
        parts = train.micro_batches(config, model, tokenizer, examples, score)
        return train.losses(handle, parts, 5, workers.ALONE)

    found = both(config)
    assert max(sizes) <= 2 * micro  # rows: at most two options for each example
    assert len(sizes) == -(-7 // micro)
    config.micro_batch = None
    assert found == pytest.approx(both(config), rel=1e-6)

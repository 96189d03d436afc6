"""Zeroth-order fine-tuning: `python train.py --model meta-llama/Llama-2-7b-hf --task rte`.

One step is [S] Algorithm 1 with the mask and the noise inside forward (§3.3): two losses, one
number, one update. The loop in `train` is in the order of the printed algorithm.

What a run writes is in record.py. A run that was stopped, by Ctrl-C, a kill or a power failure,
goes on to the same bits with `python train.py --resume DIR`: its settings are in DIR, and only
--device, --micro-batch and more --steps can be given. `torchrun --nproc_per_node N train.py …`
shares the batch among N workers (workers.py). Settings and their sources are in presets.py.
"""

import gc
import math
import os
import signal
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

import eval
import loading
import make_mask
import masks
import record
import scoring
import snapshot
import steplog
import sweep
import tasks
import workers
import zo
from errors import UserError, fail
from presets import Config, check, complete, run_name

# ------------------------------------------------------------------ training


def train(config: Config, log, run: Path, tokenizer, data: tasks.Data, handle, group) -> None:
    """[S] Algorithm 1 from the step after the log's last to step T; the patched model holds θ_T."""
    score = "all" if data.classification else "right"
    first = FirstSteps(handle)
    catch_up(log, handle, run, first)
    log.begin()
    with Stop(group) as stop:
        for t in range(log.steps, config.steps):  # for t ← 1 to T do
            # Sample minibatch B from X and random seed s
            seed = zo.step_seed(config.seed, t)
            chosen = tasks.batches(len(data.train), config.batch_size, config.seed, t)
            mine = group.share([data.train[i] for i in chosen])
            handle.refresh(t)  # h is fixed, unless --refresh-every says otherwise
            # m ← GetMask(θ_t, h);  l⁺ = L(θ_t + ε m⊙z; B);  l⁻ = L(θ_t − ε m⊙z; B)
            parts = micro_batches(config, handle.model, tokenizer, mine, score)
            loss_plus, loss_minus = losses(handle, parts, seed, group)
            # proj_grad ← (l⁺ − l⁻) / 2ε
            projected_grad = zo.projected_grad(loss_plus, loss_minus, config.eps)
            # θ_i ← θ_i − η_t · proj_grad · m_i ⊙ z_i, unless a loss is not finite
            a = float(np.float32(-config.lr * projected_grad))
            if math.isfinite(a):
                handle.update(seed, a)
            log.step(t, seed, a, loss_plus, loss_minus)
            if log.steps == FirstSteps.COUNT:
                log.moved(first.moved())
            if log.validation_due():
                log.validation(validate(config, tokenizer, data, handle, group))
            if log.metrics_due():
                log.metrics(handle.active_density())
            if log.snapshot_due():
                log.snapshot(handle.tensors())
            stop.if_asked()


def micro_batches(config: Config, model, tokenizer, examples, score: str):
    """The examples as batches of at most --micro-batch; all that is in memory at once."""
    size = config.micro_batch or config.batch_size
    for start in range(0, len(examples), size):
        yield scoring.collate(
            tokenizer,
            examples[start : start + size],
            score=score,
            max_length=config.max_length,
            device=model.device,
        )


def losses(handle, parts, seed: int, group) -> tuple[float, float]:
    """l⁺ and l⁻ of a batch in parts, of this worker and the others, all under one seed.

    A part's loss is a mean over its examples (`lm_loss`: its option tokens); weighted with their
    number, the parts' mean is the loss of the whole batch.
    """
    plus = minus = weight = 0.0  # float64: one part alone comes out as it went in
    for part in parts:
        pair = handle.losses(part.inputs(handle.model), part.loss, seed)
        l_plus, l_minus = torch.stack(pair).tolist()
        count = part.num_examples if part.score == "all" else len(part.token)
        plus, minus, weight = plus + count * l_plus, minus + count * l_minus, weight + count
    plus, minus, weight = group.sum([plus, minus, weight])
    return plus / weight, minus / weight


def validate(config: Config, tokenizer, data: tasks.Data, handle, group) -> float | None:
    """Validation accuracy, shared by the workers, whose weights must not have come apart."""
    if group.size > 1:
        group.check_same(snapshot.digest(handle.tensors()), "weights")
    if data.validation:
        how = eval.sizes(vars(config)) | {"group": group}
        return eval.accuracy(handle.model, tokenizer, data.validation, **how).value


class FirstSteps:
    """A sample of the weights inside the mask before the first step: did they hear the updates?

    Half precision rounds an update away where it is below half the distance to the next number.
    """

    COUNT = 10

    def __init__(self, handle):
        self.sample = []
        for p in handle.moving:
            every = max(1, p.flat.numel() // 4096) | 1  # odd: not one column of a matrix
            places = torch.arange(0, p.flat.numel(), every, device=p.flat.device)
            places = places[p.rule.mask(p.flat[places], places, p.state)]
            self.sample.append((p.flat, places, p.flat[places]))

    def moved(self) -> float:
        """The share of them that is no longer what it was."""
        changed = sum(int((flat[places] != was).sum()) for flat, places, was in self.sample)
        return changed / max(1, sum(len(places) for _, places, _ in self.sample))


def catch_up(log, handle, run: Path, first: FirstSteps) -> None:
    """θ_0 to the weights after the log's last step, from a snapshot where there is one."""
    if log.steps >= first.COUNT and not log.knows_moved:  # stopped before it was written down
        eval.replay(handle, log.history[: first.COUNT])
        log.moved(first.moved())
        return eval.replay(handle, log.history[first.COUNT :])
    return eval.replay(handle, log.history, snapshot.newest(run, log.steps, log.settings))


class Stop:
    """Inside it Ctrl-C and SIGTERM let the step finish; a second Ctrl-C stops at once.

    All workers stop after the same step. torchrun passes a Ctrl-C on that they have had already.
    """

    def __init__(self, group):
        self.group, self.asked = group, 0

    def __enter__(self):
        both = signal.SIGINT, signal.SIGTERM
        self.before = {number: signal.signal(number, self._ask) for number in both}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, _):
        if self.asked and self.group.size == 1:
            raise KeyboardInterrupt(number)
        self.asked = number
        os.write(2, b"\n  finishing this step and what is due after it; again: at once\n")

    def if_asked(self) -> None:
        """KeyboardInterrupt, with the signal's number, where any worker was asked to stop."""
        if asked := int(self.group.gather([self.asked]).max()):
            raise KeyboardInterrupt(asked)


def worth_compiling(config: Config, model, index) -> bool:
    """On a GPU; on a CPU where it saves a minute, twice the half that compiling takes."""
    if config.compile != "auto":
        return config.compile == "yes"
    eager, compiled = 15e-9, 2e-9  # seconds per weight and sweep, of which a step has two
    swept = model.parameters() if index is None else index.values()
    weights = sum(tensor.numel() for tensor in swept)
    saved = 2 * (eager - compiled) * weights * config.steps
    return model.device.type == "cuda" or saved > 60


# ------------------------------------------------------------------ one run


def main(argv=None) -> None:
    parser = loading.make_parser(Config, __doc__.split("\n\n")[0])
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with a run that stopped")
    given = vars(parser.parse_args(argv))
    resume, run, lock, before = given.pop("resume", None), None, None, None
    try:
        group = workers.join()
        before = signal.signal(signal.SIGTERM, stop_now)  # as Ctrl-C; inside the loop see `Stop`
        if resume is None:
            config = Config(**given)
            check(config, group.size)
            if group.rank == 0:
                if config.text is not None:  # nobody else reads it, nor does --resume
                    make_mask.check_text(config.text)
                run, lock = record.make_run_directory(config.out, run_name(config))
            tokenizer, data = prepare(config, given)
            group.check_same(int(data.fingerprint, 16), "data")
            if config.method in masks.FEW:
                if group.rank == 0:
                    make_mask.for_run(config, run, data)
                config.mask = record.MASK  # on all workers: the fingerprint covers it
            fine_tune(config, Path(group.tell(str(run))), None, tokenizer, data, group)
        else:
            config, settings, tokenizer, data = reopen(resume, given, group)
            lock = record.lock(resume) if group.rank == 0 else None
            fine_tune(config, resume, settings, tokenizer, data, group)
    except (UserError, torch.OutOfMemoryError, OSError, SafetensorError) as error:
        kept = resume or record.give_up(run)
        if kept and not isinstance(error, UserError):  # a full disk, above all, or a full GPU
            less = " --micro-batch N" * isinstance(error, torch.OutOfMemoryError)
            why = str(error).partition("\n")[0]
            error = UserError(f"{why}; all before it is kept: --resume {kept}{less} goes on")
        memory = "a smaller --micro-batch, --batch-size or --max-length"
        raise SystemExit(fail("train.py", error, memory)) from None
    except KeyboardInterrupt as stop:
        kept = resume or record.give_up(run)
        print("\ntrain.py: stopped" + f"; python train.py --resume {kept} goes on" * bool(kept))
        raise SystemExit(128 + (stop.args[0] if stop.args else signal.SIGINT)) from None
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if lock is not None:
            os.close(lock)
        workers.leave()


def stop_now(number, _):
    """SIGTERM where no step is to be finished first."""
    raise KeyboardInterrupt(number)


def prepare(config: Config, given: dict):
    """(tokenizer, data) of a new run, whose `config` is completed and printed."""
    data = loading.load_data(config)
    tokenizer, model_config = loading.load_tokenizer(config.model, config.trust_remote_code)
    complete(config, given, model_config)
    train = f"train {len(data.train)}" + " at every step" * (len(data.train) <= config.batch_size)
    parts = f"{train}, validation {len(data.validation)}, test {len(data.test)}"
    print(f"  {'data':<14} {data.source}: {parts}")
    loss = "over the options' scores" if data.classification else "of the right option's tokens"
    print(f"  {'loss':<14} cross-entropy {loss}")
    examples = data.train + data.validation + data.test
    if cut := scoring.check_examples(tokenizer, examples, config.max_length):
        print(f"  {cut} prompts lose their beginning: longer than {config.max_length} tokens")
    return tokenizer, data


def reopen(run: Path, given: dict, group):
    """(config, settings, tokenizer, data) of a run that stopped, from its config.json."""
    steps, device, rows = (given.pop(name, None) for name in ("steps", "device", "micro_batch"))
    loading.none_of(given, "--resume")
    settings = group.tell(record.open_run(run)[0] if group.rank == 0 else None)
    config = Config(**{f.name: settings.get(f.name, f.default) for f in fields(Config)})
    if config.method in masks.FEW:
        config.mask = None  # it lies in the directory
    if steps is not None:
        if steps < config.steps:
            raise UserError(f"--steps {steps}: {run} was to have {config.steps}, or more")
        config.steps = steps
    if device is not None:
        config.device, config.device_map = device, None
    config.micro_batch = config.micro_batch if rows is None else rows  # another order of sums
    settings |= {"steps": config.steps, "micro_batch": config.micro_batch}
    check(config, group.size)
    if group.tell(group.rank == 0 and record.finished(run, config.steps)):
        raise UserError(f"{run} has finished its {config.steps} steps; --steps N adds to them")
    tokenizer, _ = loading.load_tokenizer(config.model, config.trust_remote_code)
    return config, settings, tokenizer, eval.open_data(settings)


def fine_tune(config: Config, run: Path, settings, tokenizer, data: tasks.Data, group) -> None:
    """One run to result.json: from the original weights, or with the `settings` of one that
    stopped, from the end of its log."""
    began, resumed = time.perf_counter(), settings is not None
    settings = settings or asdict(config)
    here = {"device": group.device(config.device), "device_map": config.device_map}
    handle, index = prepare_model(config, run, settings, here, data, group)
    how = eval.sizes(vars(config)) | {"group": group}
    if not resumed:
        start = eval.accuracy(handle.model, tokenizer, data.test, **how)
        first = validate(config, tokenizer, data, handle, group)
        settings["start"] = {"zero_shot": start, "validation_accuracy": first}
        settings["fingerprint"] = record.fingerprint(settings)
    zero_shot = eval.Accuracy(*settings["start"]["zero_shot"])
    print(f"zero-shot test accuracy {zero_shot}" + ", when the run began" * resumed)
    group.check_same(int(settings["fingerprint"], 16), "settings, model or data")

    writes = run if group.rank == 0 else None
    if writes and not resumed:
        record.begin(run, settings)
    with steplog.StepLog(config, writes, settings, group.tell) as log:
        before = log.steps
        if before:
            print(f"  {config.method}, going on after step {before} of {config.steps}")
        if writes and resumed:
            record.reopen(run, settings, before)
        trained = time.perf_counter()
        train(config, log, run, tokenizer, data, handle, group)
    seconds = time.perf_counter() - trained
    result = log.result() | {"compiled": handle.sweep.compiled}
    if writes:  # whatever fails from here, best_step is known
        record.write_json(run / record.RESULT, result)
    last = best = eval.accuracy(handle.model, tokenizer, data.test, **how)
    handle.remove()
    best_step = result["best_step"]  # chosen by validation accuracy, never by test
    if best_step != config.steps:
        del handle  # before the second copy is loaded
        gc.collect()  # accelerate's hooks hold a model in cycles
        handle = eval.rebuild(settings | here, log.history[:best_step], run)
        best = eval.accuracy(handle.model, tokenizer, data.test, **how)
    if not writes:
        return
    if index is not None:
        eval.save_sparse(run, settings, index, handle.tensors(), best_step)
    if config.save_model:  # before the final result: only a run that has all of it has finished
        eval.save_checkpoint(handle.model, tokenizer, run / "model")
    result |= {"zero_shot": zero_shot.facts(), "last": last.facts(), "best": best.facts()}
    result |= {"seconds": time.perf_counter() - began}  # of this session, with all there is
    result |= {"seed": config.seed, "data_seed": config.data_seed, "workers": group.size}
    record.draw_curve(run, f"{config.model}, {config.method}", zero_shot.value)
    record.write_json(run / record.RESULT, result | record.machine(handle.model.device))
    print(f"test accuracy, last weights             {last}")
    if data.validation:
        print(f"test accuracy, best validation weights  {best}, after step {best_step}")
    if best_step == 0 and (index is not None or config.save_model):
        print("no step was better on validation than the start, so the ORIGINAL weights are saved")
    if log.skipped:
        print(f"{log.skipped} of {config.steps} steps were skipped: a loss was not finite")
    took = f"{config.steps - before} steps and their validation took {seconds:.0f} s"
    print(f"{run}/ holds the run; {took}")


def prepare_model(config: Config, run: Path, settings: dict, here: dict, data, group):
    """(patch, index) of the original model, on the device that `here` names; `settings` of a new
    run get what it is of model and data."""
    if config.method in masks.FEW:
        group.hand_out(run / record.MASK)
    model, index = eval.open_model(settings | here, run)
    if "fingerprint" not in settings:
        settings |= facts(config, model, data, index)
    handle = eval.make_patch(model, settings, index)
    slow = "; compiling the kernels takes the first seconds" * settings["compiled"]
    print(f"  {handle.report()}\n  {run}/{slow}")
    return handle, index


def facts(config: Config, model, data: tasks.Data, index) -> dict:
    """What config.json holds of model and data, so that the run can be replayed from anywhere."""
    found = {
        "compiled": worth_compiling(config, model, index),
        "arithmetic": sweep.ARITHMETIC,
        "torch": str(torch.__version__),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_fingerprint": loading.fingerprint(model),
        "data_fingerprint": data.fingerprint,
        "mask_fingerprint": eval.mask_fingerprint(index),
    }
    for name in ("model", "data_dir", "train_file", "validation_file", "test_file"):
        path = getattr(config, name)
        if path and Path(path).exists():
            found[name] = str(Path(path).resolve())
    return found


if __name__ == "__main__":
    main()

"""Fine-tune a language model by two forward passes per step.

    python train.py --model meta-llama/Llama-2-7b-hf --task rte
    python train.py --model meta-llama/Llama-2-7b-hf --task rte --method senszoq
    python train.py --resume runs/…

    code                          [S] Algorithm 1
    train                         the loop, in the order of the printed algorithm
        Patch.refresh             thresholds again, where --refresh-every asks for it
        measure_step              minibatch and seed; proj_grad, and a = −η · proj_grad
            losses                l⁺ and l⁻: Patch.losses opens a probe with a = +ε, then with −ε
                tasks.loss        a forward pass. For each weight it asks a PerturbedWeight
                    zo.apply      θ + a m⊙z: Threefry's words, z of them, the rule's m, the sum
        Patch.update              zo.apply in place, with a = −η · proj_grad, if that is finite
        evaluated                 validation and active density, every --eval-every steps
        StepLog.append            the line in steps.csv; now the step is done

`rule` says which weights move in MeZO and [S]. `sensitive_mask` is m of [Q], found once and kept in
a file of the run. `replay` rebuilds θ_t from θ_0 and the log: a finished step is (seed, a).
In [Q] a layer asks its quant.Parts instead. All Parts read one PerturbedWeight of k values, which
is drawn once a probe.

A run directory holds config.json, steps.csv, result.json, curve.png and [Q]'s mask.safetensors.
steps.csv is the checkpoint (harness/log.py): --resume rebuilds the weights from it, to the bit on
the same machine, and takes the last logged step again. --resume fails if that step, or the
training or validation examples, are not those of before, or if a line was edited.

`torchrun --nproc_per_node N train.py …` shares the batch among N workers (harness/workers.py).
"""

import json
import math
import shlex
import shutil
import time
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import harness  # noqa: F401, isort: skip  # first: Ctrl-C while the rest is imported is one line
import numpy as np
from tqdm import tqdm

import masks
import model_patch
import quant
import tasks
import zo
from harness import adapter, dataset, loading, log, mask, workers
from harness import config as configs
from harness.config import Config, reworded


def train(config: Config, patch, data: dataset.Data, record: log.StepLog) -> None:
    """[S] Algorithm 1, from the step after the log's last to step T."""
    progress = log.Progress(record, config.steps, quiet=workers.RANK > 0)
    for t in range(len(record.steps), config.steps):  # for t ← 1 to T do; here from 0 on
        refresh(config, patch, record, t)  # h is fixed, unless --refresh-every says otherwise
        step = measure_step(config, patch, data, t)
        if math.isfinite(step.a):
            # θ_i ← θ_i − η_t · proj_grad · m_i ⊙ z_i
            patch.update(step.seed, step.a)
        else:  # a loss overflowed: nothing moves
            check_some_finite(config, record)
        if step.step % config.eval_every == 0 or step.step == config.steps:
            step = evaluated(config, patch, data, step)
        record.append(step)
        progress.update(step)


class Broken(ValueError):
    """Weights or losses are no numbers any more: a resumed run would fail at the same place."""


def broken(config: Config, record: log.StepLog, what: str) -> Broken:
    """The error, with what may help."""
    return Broken(
        f"{what}: --lr {config.lr} or --eps {config.eps} is too high, or float16 overflows "
        f"(try --dtype bfloat16); python eval.py --run {record.run or '…'} evaluates the best "
        f"step so far, {record.best_step()}"
    )


def refresh(config: Config, patch, record: log.StepLog, t: int) -> None:
    """Thresholds anew before step t, from 0 on. Broken where a weight is not finite."""
    try:
        patch.refresh(t)
    except ValueError as error:
        raise broken(config, record, "the weights are not finite") from error


def check_some_finite(config: Config, record: log.StepLog) -> None:
    """Broken where this step, and the 19 before it, moved nothing."""
    if len(record.steps) >= 19 and not any(math.isfinite(s.a) for s in record.steps[-19:]):
        raise broken(config, record, "20 steps in a row had no finite loss")


def measure_step(config: Config, patch, data: dataset.Data, t: int) -> log.Step:
    """Seed, losses and a = −η · proj_grad of one step, t from 0. The caller updates θ."""
    # Sample minibatch B from X and random seed s
    batches = batches_of_step(config, patch.model, data, t)
    seed = zo.step_seed(config.seed, t)
    # l⁺ = L(θ_t + ε m⊙z; B);  l⁻ = L(θ_t − ε m⊙z; B);  in each m ← GetMask(θ_t, h)
    return step_of(config, t, seed, *losses(patch, batches, seed))


def step_of(config: Config, t: int, seed: int, loss_plus: float, loss_minus: float) -> log.Step:
    """Step t, from 0 on, as the log has it."""
    # proj_grad ← (l⁺ − l⁻) / 2ε
    proj_grad = zo.projected_grad(loss_plus, loss_minus, config.eps)
    with np.errstate(over="ignore"):
        a = float(np.float32(-config.lr * proj_grad))  # rounded once, so that the log can hold it
    return log.Step(t + 1, seed, a, loss_plus, loss_minus)


def batches_of_step(config, model, data: dataset.Data, t: int) -> Iterable[tasks.Batch]:
    """What step t trains on, in parts of at most --micro-batch examples; a worker has its share."""
    chosen = tasks.minibatch(len(data.train), config.batch_size, config.seed, t)
    mine, size = workers.share(chosen), config.micro_batch or config.batch_size
    for start in range(0, len(mine), size):
        yield tasks.collate(
            data.tokenizer, [data.train[i] for i in mine[start : start + size]],
            max_length=config.max_length, scored=data.scored, **tasks.layout(model),
        )  # fmt: skip


def losses(patch, batches, seed: int) -> tuple[float, float]:
    """l⁺ and l⁻ of one minibatch, in as many parts as memory asks for, all under the same z."""
    total = np.zeros(3)  # Σ n·l⁺, Σ n·l⁻, Σ n
    for batch in batches:
        loss_plus, loss_minus = patch.losses(batch, tasks.loss, seed)
        total += batch.count * np.array([float(loss_plus), float(loss_minus), 1.0])
    total = workers.all_sum(total)  # 24 bytes; one process: itself
    return float(total[0] / total[2]), float(total[1] / total[2])


def rule(config: Config) -> masks.Rule:
    """Which weights move in MeZO and [S]."""
    if config.method == "mezo" or config.adapter:  # harness/adapter.py masks the product A B
        return masks.Everything()
    if config.method == "r-mezo":
        return masks.RandomMask(config.density, config.seed)
    if config.above:
        return masks.MagnitudeGroup(config.density, config.above, config.refresh_every)
    kind = {"dynamic": masks.SmallWeights, "constant": masks.PackedMask}[config.mask_kind]
    return kind(config.density, config.refresh_every)


def sensitive_mask(config: Config, run: Path, data: dataset.Data) -> mask.MaskFile:
    """[Q]'s mask in the run's directory, made if it is not there."""
    path = run / "mask.safetensors"
    if workers.RANK == 0 and not path.exists():
        if config.mask is not None:  # an own copy: the run is whole without the file
            with configs.whole(path) as beside:
                shutil.copy(config.mask, beside)
        else:
            mask.make(config, path, data)
            loading.restart_peak()  # the scored model goes
    return workers.broadcast(mask.load(path, config.quantiser) if workers.RANK == 0 else None)


def open_patch(config: Config, run: Path, data: dataset.Data) -> model_patch.Patch:
    """The patched model before training, at θ_0."""
    how = (config.model, config.dtype, config.device, config.trust_remote_code)
    device = loading.take_device(config.device)
    if config.method != "senszoq":
        moves = rule(config)
        model = loading.load_model(*how, nf4=config.bits == 4)
        if config.adapter:
            model = adapter.attach(model, config)
    else:
        found = sensitive_mask(config, run, data)
        moves = sparse = quant.DenseSparse(found.index, config.bits, device, found.codebooks)

        def split(model, name, weight):
            stored = model.get_parameter(name)  # not yet in --dtype
            mask.check_values(found, name, stored)
            sparse.split(model, name, weight)

        model = loading.load_model(*how, split=split, index=found.index)
        sparse.codebooks = None  # the parts have them now, on the device
    select = adapter.MOVES if config.adapter else config.select
    patch = model_patch.Patch(model, moves, eps=config.eps, select=select, rounding=config.rounding)
    patch.fused = loading.compiles(config.compile, patch)
    loading.restart_peak()  # result.json has training's peak, without the mapped checkpoint
    loading.keep_freed_memory()
    return patch


def replay(config: Config, patch, data, logged: list[log.Step], run, after: int) -> None:
    """θ_0 → θ_after, by the log. Step max(after, 1) is taken again, and must come out as logged."""
    checked = max(after, 1)
    for reader in patch.patched.values():
        reader.was_read = True  # all were, before step 1; this one batch may miss an expert
    for step in logged[:checked]:
        before, found = step.step - 1, (step.loss_plus, step.loss_minus)
        seed = zo.step_seed(config.seed, before)
        if None in found or repr(step_of(config, before, seed, *found)[:5]) != repr(step[:5]):
            raise ValueError(
                f"{run}/steps.csv: {step.line()!r} is no step of this run: seed and a do not "
                "follow from the losses and from seed, lr and eps in config.json"
            )
    for step in tqdm(logged[:checked], "replaying", leave=False, delay=5):
        patch.refresh(step.step - 1)
        if step.step == checked:
            again = measure_step(config, patch, data, step.step - 1)
            log.compare(step, again, str(patch.model.dtype).removeprefix("torch."), run)
        if step.step <= after and math.isfinite(step.a):
            patch.update(step.seed, step.a)


def score(config, model, tokenizer, examples) -> tasks.Score:
    """Accuracy on the examples, or the perplexity of completions. Each worker answers its share."""
    counts = tasks.tally(
        model, tokenizer, workers.share(examples), max_length=config.max_length,
        batch_size=config.micro_batch or config.batch_size,
    )  # fmt: skip
    total, n, not_finite = workers.all_sum(counts)
    if not_finite == len(examples):
        raise Broken(
            "no log-probability of any example is finite: float16 overflow (try --dtype bfloat16), "
            "or weights broken by too high a rate"
        )
    if len(examples[0].options) > 1:
        return tasks.Score(float(total / n), int(n), int(not_finite))
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(np.nan_to_num(total / n, nan=np.inf)))
    return tasks.Score(perplexity, int(n), int(not_finite), "perplexity")


def evaluated(config, patch, data: dataset.Data, step: log.Step) -> log.Step:
    """The step with its validation and active density, of weights that all workers share."""
    if workers.SIZE > 1:  # one worker has nobody to differ from, and the sum reads all weights
        workers.check_same(workers.checksum(patch.moving()), "weights")
    found = {"active_density": patch.active_density()}
    if data.validation:
        found["validation"] = score(config, patch.model, data.tokenizer, data.validation).value
    return step._replace(**found)


# ------------------------------------------------------------------ one run


def prepare(config: Config, run: Path | None = None) -> tuple:
    """(config, data): the settings are completed and printed."""
    loading.take_device(config.device)
    asked = config.max_length
    config, model_config, data = dataset.load(config)
    sources = {} if config.max_length == asked else {"max_length": "all that the model has"}
    if config.adapter:
        adapter.check(config, loading.skeleton(model_config, config.trust_remote_code))
    own = run / "mask.safetensors" if run and config.method == "senszoq" else None
    path = own if own and own.exists() else config.mask  # a run has its own copy
    if path:  # a mask of another model is found before this one is loaded
        density = mask.density_of(path, config, model_config)
        config, sources["density"] = replace(config, density=density), "that of the mask"
    config, papers = configs.fill_in(config, model_config.model_type)
    if config.bits == 4 and (kind := loading.quantised(model_config)):
        raise ValueError(
            f"--model {config.model} is quantised ({kind}), and 4 bits are made of 16: unpack it "
            "with python eval.py --model … --task … --save FOLDER, or use --bits 16"
        )
    resumed = run and (run / "config.json").exists()
    configs.show(config, sources | papers, "you, or the run so far" if resumed else "you")
    describe(config, model_config, data)
    return config, data


def describe(config, model_config, data: dataset.Data) -> None:
    """Print data and loss. ValueError for an example that cannot be trained or scored."""
    sizes = f"train {len(data.train)}, validation {len(data.validation)}, test {len(data.test)}"
    spec = tasks.TASKS.get(config.task, tasks.OWN)
    if spec.sizes and config.num_train is config.num_validation is None:
        sizes += f"; {spec.sizes}"
    print(f"  {'data':<14} {data.source}: {sizes}")
    if data.unused:
        print(f"  {data.unused} more examples are not used; --num-train and its like take more")
    loss = "over the options' scores" if data.scored == "all" else "of the right option's tokens"
    if data.metric == "perplexity":
        loss = "of the completions' tokens"
    print(f"  {'loss':<14} cross-entropy {loss}")
    if data.odd:
        print(f"  {'':<14} and not over scores, as options differ: {data.odd}")
    trained = set(data.train)
    for name, part in (("validation", data.validation), ("test", data.test)):
        if both := sum(example in trained for example in part):
            print(f"  {both} of the {name} examples are training examples, too")
    examples = data.train + data.validation + data.test
    if cut := tasks.check_examples(data, examples, config.max_length, model_config):
        print(f"  {cut} prompts lose their beginning: longer than {config.max_length} tokens")


def rebuild(config: Config, run: Path, data, logged: list[log.Step], after: int):
    """The model after a step of a run: an ordinary one, or [Q]'s in dense and sparse parts."""
    patch = open_patch(config, run, data)
    replay(config, patch, data, logged, run, after)
    patch.remove()
    return patch.model


def begin(config: Config, run: Path) -> tuple:
    """(config, data, record, result, patch), of a new run at θ_0, of a stopped one at its θ_t."""
    config, data = prepare(config, run)
    record = log.StepLog(run if workers.RANK == 0 else None, True, data.metric)
    record.start, record.steps = workers.broadcast((record.start, record.steps))
    if len(record.steps) > config.steps:
        raise ValueError(
            f"--steps {config.steps}: {run} has {len(record.steps)} already; give the new total"
        )
    if record.start is None and workers.RANK == 0:
        configs.save(run, config)  # from here on the run can be resumed
    validated = data.validation, config.max_length
    parts = {"train": data.train, "validation": validated, "test": data.test}
    sums = {name: zlib.crc32(repr(part).encode()) for name, part in parts.items()}
    result = {"zero_shot": None, "seconds": 0} | sums
    if record.start is not None and (run / "result.json").exists():
        with reworded(f"{run}/result.json is torn", "; remove it"):
            kept = json.loads((run / "result.json").read_text())
            result = {name: kept.get(name, value) for name, value in result.items()}
            result["seconds"] += 0  # these two are used after training; here they fail early
            tasks.Score(**result["zero_shot"] or {"value": 0, "n": 0})
    changed = {name for name in sums if result[name] != sums[name]}
    if changed - {"test"}:
        raise ValueError(
            f"{run}: the training or validation examples are not those that the run began with; "
            "--data-dir, --data-seed, --max-length, the files and numbers of examples choose them"
        )
    patch = open_patch(config, run, data)
    print(f"  {patch}\n  {run}/")
    if not patch.model.pack:
        print("  each text has a row of its own: this model, or this transformers, would mix them")
    # workers share their losses, so nothing else would show that their data differ
    workers.check_same(sum(sums.values()), "data")
    if record.start is None:
        zero_shot = score(config, patch.model, data.tokenizer, data.test)
        measure_step(config, patch, data, 0)  # was every weight that moves read by now?
        start = "untrained prefix," if config.adapter == "prefix" else "zero-shot"
        start += " in 4 bits," if config.bits == 4 else ""
        print(f"{start} test {data.metric} {zero_shot}")
        result["zero_shot"] = zero_shot._asdict()
        write_result(run, result)
        record.append(evaluated(config, patch, data, log.Step(0)))
    else:
        if changed:
            print("  the test examples are not those that the run began with")
            result |= sums | {"zero_shot": None}  # that is of the examples of then
        replay(config, patch, data, record.steps, run, after=len(record.steps))
        print(f"  going on after step {len(record.steps)} of {config.steps}")
    if patch.model.dtype in loading.ROUNDING:  # `auto` may be another dtype elsewhere
        config = replace(config, dtype=str(patch.model.dtype).removeprefix("torch."))
    if workers.RANK == 0:
        configs.save(run, config)
    return config, data, record, result, patch


def run_to_end(config: Config, run: Path) -> None:
    """A new run, or one that was stopped, to its result.json."""
    began = time.perf_counter()
    config, data, record, result, patch = begin(config, run)
    try:
        train(config, patch, data, record)
    finally:  # also of a session that is stopped
        result["seconds"] += time.perf_counter() - began
        write_result(run, result)

    model = patch.model
    last = best = score(config, model, data.tokenizer, data.test)
    print(f"test {data.metric}, last weights             {last}")
    best_step = record.best_step()  # by validation, never by test
    result |= {"last": last._asdict(), "best_step": best_step, "skipped": record.skipped()}
    result |= {"workers": workers.SIZE} | loading.machine(patch.device)
    write_result(run, result)
    if best_step != config.steps:
        patch.remove()
        del model, patch
        loading.restart_peak()  # the memory goes back before the second copy is loaded
        model = rebuild(config, run, data, record.steps, best_step)
        best = score(config, model, data.tokenizer, data.test)
    if data.validation:
        when = f"after step {best_step}" if best_step else "those before training"
        print(f"test {data.metric}, best validation weights  {best}, {when}")
    write_result(run, result | {"best": best._asdict()})
    advise(config, record)
    print(f"{run}/ holds the run")
    if workers.RANK == 0:
        zero_shot = (result["zero_shot"] or {}).get("value")
        try:
            log.draw_curve(record, f"{config.model}, {config.method}", zero_shot)
        except Exception as error:  # the run is whole without its picture
            print(f"  no curve.png: {type(error).__name__}: {error}")


def advise(config: Config, record: log.StepLog) -> None:
    """Say what in the log asks for another rate or ε."""
    if rise := record.rise():
        print(f"the training loss rose from {rise[0]:.3g} to {rise[1]:.3g}: try a lower --lr")
    if skipped := record.skipped():
        print(f"{skipped} steps moved nothing, as a loss was not finite: try a lower --lr or --eps")
    still = [step for step in record.steps if step.a == 0]
    if flat := sum(step.loss_plus == step.loss_minus for step in still):
        print(
            f"{flat} steps moved nothing, as l⁺ and l⁻ were the same number: --eps {config.eps} is "
            "too small for this dtype or far too high, or too high a rate broke the weights (try a "
            "lower --lr)"
        )
    if small := len(still) - flat:
        print(f"{small} steps moved nothing, as η · proj_grad was too small: try a higher --lr")


def write_result(run: Path, result: dict) -> None:
    """result.json, by worker 0."""
    if workers.RANK == 0:
        configs.write_json(run / "result.json", result)


def main(argv=None) -> None:
    run = made = resumed = None

    def hint(error) -> str:
        kept = run is not None and (run / "config.json").exists()
        helps = kept and not isinstance(error, Broken if resumed is None else ValueError)
        return f"; python train.py --resume {shlex.quote(str(run))} goes on" if helps else ""

    with configs.one_line_errors(hint, argv, workers=True):
        resume = {"resume": (Path, "go on with a run that was stopped: its directory")}
        changes = configs.parse(Config, __doc__.split("\n")[0], argv, **resume)
        resumed = changes.pop("resume", None)
        workers.join()
        try:
            if resumed is None:
                config = configs.complete(Config(**changes))
                made = configs.new_run(config) if workers.RANK == 0 else None
                run = workers.broadcast(made)
            else:
                config = workers.broadcast(
                    configs.load(resumed, changes) if workers.RANK == 0 else None
                )
                run = resumed  # there is such a run: it can go on
            run_to_end(config, run)
        finally:
            workers.leave()
            if made is not None:
                log.forget_unbegun(made, copied=config.mask is not None)


if __name__ == "__main__":
    main()

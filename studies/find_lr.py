"""Which learning rate? A few short runs from the same weights, one per rate.

    python -m studies.find_lr --model M --task rte
    python -m studies.find_lr --model M --task rte --method senszoq --rates 1e-7,1e-6,1e-5

The flags are train.py's, and --rates and --short. Every rate sees the same minibatches and the same
noise, so what differs between them is the rate. Compared is the mean training loss of a run's last
third. Printed are that loss for each rate, the best rate, and the largest that is still safe: above
it the loss rose, or was no number. A long run wants a rate at or below the best of a short one,
since errors add up over its steps. Test and validation examples are not looked at.

Cost: rates × --short steps, and a copy of the weights that move, in the CPU's memory.
"""

import math
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

import train
from harness import config as configs
from harness import log
from harness.config import Config

HALF_DECADES = (-4, -3, -2, -1, 0, 1, 2)  # around train.py's own rate, unless --rates says others


def short_run(config: Config, patch, data, steps: int, bar) -> list[float]:
    """The training losses of a run of some steps; it ends at the first that is not finite.

    It also ends, with NaN, once l⁺ and l⁻ were equal in more than half of the steps: broken weights
    have the same loss everywhere.
    """
    losses, flat = [], 0
    for t in range(steps):
        try:
            patch.refresh(t)
        except ValueError:  # a weight is not finite
            return [*losses, math.nan]
        step = train.measure_step(config, patch, data, t)
        losses.append(step.loss)
        bar.update()
        flat += step.a == 0
        if not math.isfinite(step.a) or 2 * flat > steps:
            return [*losses, math.nan]
        patch.update(step.seed, step.a)
    return losses


def find(config: Config, rates: tuple[float, ...], steps: int, run: Path) -> tuple:
    """{rate: mean loss of the last third of a short run}, from the same weights each time; and the
    loss of their common first step.
    """
    config, data = train.prepare(config)
    patch = train.open_patch(config, run, data)
    rates = sorted(rates or [config.lr * 10 ** (half / 2) for half in HALF_DECADES])
    start = [theta.to("cpu", copy=True) for theta in patch.moving()]
    found = {}
    with tqdm(total=len(rates) * steps, unit="step", desc="rates") as bar:
        for rate in rates:
            losses = short_run(replace(config, lr=rate), patch, data, steps, bar)
            found[rate] = sum(losses[-(steps // 3) :]) / (steps // 3)
            bar.write(f"  --lr {rate:<9.2g} loss {found[rate]:.4f}")
            configs.write_json(run / "rates.json", {str(r): loss for r, loss in found.items()})
            for theta, kept in zip(patch.moving(), start, strict=True):
                theta.copy_(kept)
            for weight in patch.weights:  # thresholds that --refresh-every took again
                weight.state = patch.rule.prepare(weight.theta, weight.stream)
    return found, losses[0]  # the same at every rate


def advice(found: dict[float, float], before: float) -> tuple[float, float]:
    """(the best rate, the largest safe one). The smallest rate stands for not moving at all.

    A rate is safe if the loss did not rise there, nor at any smaller rate: a broken model can have
    any loss. `before` is that of the first step: ValueError where the smallest rate's rose from it.
    """
    base = found[min(found)]
    if log.has_risen(before, base):
        raise ValueError(
            f"at the smallest rate the loss rose from {before:.3g} to {base:.3g}, was no number, "
            "or l⁺ and l⁻ were equal: give lower --rates, or a larger --eps"
        )
    allowed = base + 0.02 * abs(base)
    first = min((rate for rate in found if not found[rate] <= allowed), default=math.inf)  # or NaN
    safe = [rate for rate in found if rate < first]
    return min(safe, key=found.get), max(safe)


def main(argv=None) -> None:
    with configs.one_line_errors(argv=argv):
        more = {"rates": (configs.rates, "instead of seven, half a decade apart: 1e-7,1e-6"),
                "short": (configs.at_least(3), "steps of each run; default 100")}  # fmt: skip
        given = configs.parse(Config, __doc__.split("\n")[0], argv, **more)
        rates, short = given.pop("rates", ()), given.pop("short", 100)
        if "steps" in given:
            raise ValueError(f"--steps {given['steps']}: give --short, the steps of each run")
        if rates and "lr" in given:
            raise ValueError(f"--lr {given['lr']} would be ignored beside --rates; leave one out")
        config = configs.complete(Config(**given))
        run = configs.new_run(config, "rates")
        try:
            found, before = find(config, rates, short, run)
            best, safe = advice(found, before)
        finally:
            log.forget_unbegun(run, copied=config.mask is not None)
        print(f"{len(found)} runs of {short} steps: the largest safe rate is {safe:.2g}")
        print(f"try --lr {best:.2g}, the best, or a third of it for long runs")
        for end, rate in (("highest", max(found)), ("lowest", min(found))):
            if best == rate:
                print(f"  it is the {end} that was tried: --rates can go on from there")
        print(f"{run}/ holds rates.json")


if __name__ == "__main__":
    main()

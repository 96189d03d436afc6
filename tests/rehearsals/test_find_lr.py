"""studies/find_lr.py: its advice on the tiny model, and what it leaves as it was."""

import json

import pytest
from test_train import arguments, refused

import train
from harness import config as configs
from studies import find_lr


def without_rate(folder, out) -> list[str]:
    """Flags of a run, but --steps and --lr, which the command gives."""
    words = arguments(folder, out)
    return [word for word in words if not word.startswith(("--steps", "--lr"))]


def test_the_advice_is_the_rate_of_the_long_runs(tmp_path, capsys):
    """Of rates a decade apart it names the one that the tiny model's table has."""
    rates = "--rates=1e-3,1e-2,1e-1"
    few = ["--short=12", "--num-validation=1", "--num-test=1", f"--out={tmp_path}/run"]
    find_lr.main(["--task=rte", rates, *few])
    said = capsys.readouterr().out
    assert f"try --lr {configs.TINY_RATES['s-mezo']['rte']}" in said and "go on" not in said
    found = json.loads((tmp_path / "run/rates.json").read_text())
    assert min(found, key=found.get) == "0.01" and len(found) == 3


@pytest.mark.parametrize("flags", [["--refresh-every=2"], ["--method=senszoq", "--mask-from=task",
                                                           "--density=0.02"]])  # fmt: skip
def test_every_rate_starts_from_the_same_weights(flags, folder, tmp_path, monkeypatch, capsys):
    """A run's losses do not depend on the rates that were tried before it."""
    original, losses = find_lr.short_run, {}

    def kept(config, *rest):
        losses.setdefault(config.lr, []).append(original(config, *rest))
        return losses[config.lr][-1]

    monkeypatch.setattr(find_lr, "short_run", kept)
    for number, rates in enumerate(("1e-3,1e-2,0.1", "1e-2")):
        out = tmp_path / str(number)
        find_lr.main([*without_rate(folder, out), *flags, f"--rates={rates}", "--short=3"])
    first, second = losses[0.01]
    assert first == second and len(first) == 3 and first != losses[0.1][0]
    assert "try --lr 0.01, " in (said := capsys.readouterr().out)  # of one rate
    assert "it is the highest that was tried: --rates can go on" in said


def test_a_rate_that_breaks_the_weights_has_no_loss(folder, tmp_path, capsys):
    """Also where thresholds are taken again, of weights that are no numbers."""
    argv = [*without_rate(folder, tmp_path / "r"), "--refresh-every=1", "--short=6"]
    find_lr.main([*argv, "--rates=1e-3,1e30", "--dtype=float16"])
    said = capsys.readouterr().out
    assert "--lr 1e+30     loss nan" in said.replace("\r", "\n")
    assert "the largest safe rate is 0.001" in said


def test_advice_is_about_numbers(folder, tmp_path, capsys):
    """The best has the lowest loss; above the largest safe rate it rose, or was no number."""
    found = {1e-3: 1.0, 1e-2: 0.5, 1e-1: 0.9, 1.0: 3.0, 10.0: float("nan")}
    assert find_lr.advice(found, 1.0) == (1e-2, 1e-1)
    broken = {1e-3: 1.0, 1e-2: 2.0, 1.0: 0.5}  # a loss below the first, of a model that is broken
    assert find_lr.advice(broken, 1.0) == (1e-3, 1e-3)
    for rates in ({1.0: float("nan")}, {1.0: 4.4, 3.0: 8.6}):  # the smallest breaks it already
        with pytest.raises(ValueError, match="lower --rates"):
            find_lr.advice(rates, 0.5)
    for bad in ("--rates=a", "--rates=0", "--short=0", "--short=2", "--short=3 --steps=9"):
        assert bad.split("=")[0] in refused(
            find_lr.main, arguments(folder, tmp_path / "r", *bad.split()), capsys
        )
    assert not (tmp_path / "r").exists()


def test_equal_losses_are_no_number(folder, tmp_path, monkeypatch, capsys):
    """A rate at which l⁺ and l⁻ are equal in most steps has no loss, however low it is."""
    measure = train.measure_step
    monkeypatch.setattr(train, "measure_step", lambda *args: measure(*args)._replace(a=0.0))
    argv = without_rate(folder, tmp_path / "r")
    said = refused(find_lr.main, [*argv, "--rates=1e-2", "--short=3"], capsys)
    assert "l⁺ and l⁻ were equal: give lower --rates, or a larger --eps" in said
    assert "0.01" in json.loads((tmp_path / "r/rates.json").read_text())  # what was found is kept
    said = refused(find_lr.main, [*argv, "--rates=1e-2", "--lr=1e-3"], capsys)
    assert "--lr 0.001 would be ignored beside --rates" in said

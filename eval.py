"""How often does a model find the right option? Of a model, or of a run, rebuilt from its log.

    python eval.py --model MODEL --task rte                  zero-shot
    python eval.py --model MODEL --task rte --shots 32       in-context, 32 solved examples
    python eval.py --run runs/…                              a run of train.py, at its best step
    python eval.py --run runs/… --step last --save DIR       its last, as a Hugging Face checkpoint
    python eval.py --run runs/… --generate 5                 and how it continues 5 prompts

An example counts as right when the right option has the highest mean log-probability (tasks.py). Of
k options that share it, each is right by 1/k. Accuracies come with their standard error,
√(p (1 − p) / n), and n. Completions are scored by their perplexity.

A run is rebuilt from its log as train.py --resume rebuilds it (harness/log.py), without a forward
pass but for the last step, which is taken again as a check.

For a run with --adapter, --save writes the adapter, which peft.PeftModel.from_pretrained reads. The
adapter of a run in 4 bits is of the model in 4 bits. For S-MeZO's LoRA --save writes the whole
model, merged: no ordinary adapter can hold the mask.
"""

from dataclasses import replace
from pathlib import Path

import harness  # noqa: F401, isort: skip  # first: Ctrl-C while the rest is imported is one line
import torch

import quant
import tasks
import train
from harness import adapter, dataset, loading
from harness import config as configs
from harness.config import Settings
from harness.log import StepLog


def open_model(config: Settings, model_config, data, examples: list, shots: int) -> tuple:
    """(what it is, model, examples): as it is, zero-shot or in-context."""
    if not 0 <= shots <= len(data.train):
        raise ValueError(f"--shots {shots}: from 0 to {len(data.train)}, the training examples")
    if shots and len(examples[0].options) == 1:
        raise ValueError(f"--shots {shots}: texts and completions have no demonstrations")
    if shots:
        examples = [tasks.with_demonstrations(e, data.train[:shots]) for e in examples]
    how = f"{shots} shots" if shots else "zero-shot"
    if cut := tasks.check_examples(data, examples, config.max_length, model_config):
        how += f", {cut} prompts cut to {config.max_length} tokens"
    model = loading.load_model(config.model, config.dtype, config.device, config.trust_remote_code)
    return f"{config.model}, {how}", model, examples


def open_run(config: configs.Config, run: Path, data, step: str) -> tuple:
    """(what it is, model): after its best, last or any step."""
    record = StepLog(run)
    after = {"best": record.best_step(), "last": len(record.steps)}.get(step)
    if after is None:
        if not step.isdecimal() or int(step) > len(record.steps):
            raise ValueError(f"--step {step}: best, last, or 0 … {len(record.steps)}, as logged")
        after = int(step)
    model = train.rebuild(config, run, data, record.steps, after)
    what = f"{run} after {after} of {len(record.steps)} logged steps (--steps {config.steps})"
    if step == "best" and data.validation:
        untrained = record.steps and not after
        what += ", best on validation" + ("; --step last is trained" if untrained else "")
    return what, model


def show_continuations(model, tokenizer, examples: list, longest: int, tokens: int = 64) -> None:
    """Print how the model continues each prompt, of a text its first half, greedily."""
    for example in examples:
        ids, length = tasks.encode(tokenizer, example, longest)[example.label]
        start = len(ids) - length if len(ids) - length > 1 else len(ids) // 2
        prompt = torch.tensor([ids[:start]], device=model.device)
        whole = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
            eos_token_id=tokenizer.eos_token_id, max_new_tokens=min(tokens, longest - start),
        )[0]  # fmt: skip
        shown = (tokenizer.decode(part) for part in (ids[:start][-tokens:], whole[start:]))
        print("...{!r}\n    → {!r}".format(*shown))


def main(argv=None) -> tasks.Score:
    with configs.one_line_errors(argv=argv):
        more = {
            "run": (Path, "a run directory of train.py, instead of a model"),
            "step": (str, "with --run: best (default), last or a step number"),
            "save": (Path, "write a Hugging Face checkpoint into this new folder"),
            "split": (str, "test (default) or validation"),
            "shots": (int, "solved examples before the prompt"),
            "generate": (configs.positive, "show greedy continuations of so many prompts"),
        }
        settings = configs.parse(Settings, __doc__.split("\n")[0], argv, **more)
        run, step, save, split, shots, generate = (settings.pop(name, None) for name in more)
        split = split or "test"
        if split not in ("test", "validation"):
            raise ValueError(f"--split {split}: test or validation")
        if save is not None and save.exists() and (not save.is_dir() or any(save.iterdir())):
            raise ValueError(f"--save {save} is not empty; choose another name")
        if run is None and step is not None:
            raise ValueError("--step is of a run: give it with --run")
        if run is not None and shots:
            raise ValueError("--shots: a run has none; --save it and use --model")
        kept = configs.load(run, settings) if run else configs.complete(Settings(**settings))
        config, model_config, data = dataset.load(kept)
        usual = tasks.TASKS.get(config.task, tasks.OWN).batch_size
        config = replace(config, batch_size=config.batch_size or usual)
        if not (examples := getattr(data, split)):
            raise ValueError(f"--split {split}: there are no {split} examples; see --num-{split}")
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)  # what cannot be is said before the work
        if run is None:
            what, model, examples = open_model(config, model_config, data, examples, shots or 0)
        else:
            tasks.check_examples(data, examples, config.max_length, model_config)
            what, model = open_run(config, run, data, step or "best")
        score = train.score(config, model, data.tokenizer, examples)
        print(f"{what}, {data.source}: {split} {data.metric} {score}")
        shown = examples[: generate or 0]
        show_continuations(model, data.tokenizer, shown, config.max_length)
        if save is not None:
            quant.join(model)
            model = adapter.merged(model)  # S-MeZO's LoRA; others as they are
            if getattr(config, "adapter", None) is None:
                model.cpu()  # of fused experts, saving makes copies that a GPU may not hold
            model.save_pretrained(save)
            data.tokenizer.save_pretrained(save)
            print(f"{save}/ holds the checkpoint")
        return score


if __name__ == "__main__":
    main()

"""Is g the slope? Projected gradients of a real model beside autograd's, for MeZO and S-MeZO.

    python -m studies.slopes --model DIR --task sst2 --data-dir DIR --eps 1e-3 1e-2

For each seed g = (l⁺ − l⁻) / 2ε is compared with the true slope ⟨∇L, m⊙z⟩ of the same batch, where
∇L is autograd's. Printed are the correlation over the seeds, the regression of g on the slope, and
the error of g beside the size of the slope (root mean squares). A seed takes two forward passes.
The gradients take 6 bytes per 16-bit weight beside the model's 2, and the batch all activations.
"""

import numpy as np
import torch

import masks
import tasks
import zo
from harness import dataset, loading
from harness.config import Settings, at_least, one_line_errors, positive, rate, study_parser
from model_patch import Patch


def patched(model, rule: masks.Rule) -> Patch:
    """The patch of train.py, compiled where it would be."""
    patch = Patch(model, rule)
    patch.fused = loading.compiles("auto", patch)
    return patch


def slope(patch: Patch, gradients: dict, seed: int) -> float:
    """⟨∇L, m⊙z⟩ in fp64, with the mask and the noise of a probe."""
    total, shift = 0.0, zo.Shift.of(1.0, seed)
    for weight in patch.weights:
        z = torch.zeros_like(weight.theta, dtype=torch.float32)  # 0 + 1·z: zo.gaussian's, but fast
        every, state = masks.Everything.mask, z.new_empty(0)
        zo.apply(zo.Halves(z), shift, weight.word, every, state, fused=patch.fused)
        total += float((gradients[weight.name] * weight.mask() * z).sum(dtype=torch.float64))
    return total


def main(argv=None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data-dir")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--eps", type=rate, nargs="+", default=[1e-3])
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--seeds", type=at_least(2), default=12)
    args = parser.parse_args(argv)
    with one_line_errors():
        masks.check_density(args.density)
        report(args)


def report(args) -> None:
    """Print the table, a row for each method and ε."""
    settings = Settings(args.model, args.task, args.data_dir, num_train=args.batch_size)
    settings, model_config, data = dataset.load(settings)
    tasks.check_examples(data, data.train, settings.max_length, model_config)
    model = loading.load_model(args.model, args.dtype)
    batch = tasks.collate(
        data.tokenizer, data.train, max_length=settings.max_length, scored=data.scored,
        **tasks.layout(model),
    )  # fmt: skip
    tasks.loss(model, batch).backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    print("| | ε | correlation | regression | rms error | rms slope |\n|---|---|---|---|---|---|")
    for name, rule in (("MeZO", masks.Everything()), ("S-MeZO", masks.SmallWeights(args.density))):
        patch = patched(model, rule)
        seeds = [zo.step_seed(0, t) for t in range(args.seeds)]
        true = np.array([slope(patch, gradients, seed) for seed in seeds])
        for patch.eps in args.eps:
            losses = [patch.losses(batch, tasks.loss, seed) for seed in seeds]
            g = np.array([float(zo.projected_grad(*pair, patch.eps)) for pair in losses])
            r, fit = np.corrcoef(g, true)[0, 1], (g @ true) / (true @ true)
            error, size = np.sqrt(np.mean((g - true) ** 2)), np.sqrt(np.mean(true**2))
            print(f"| {name}, {args.dtype} | {patch.eps:g} | {r:.4f} | {fit:.3f} | {error:.3g} "
                  f"| {size:.3g} |", flush=True)  # fmt: skip
        patch.remove()


if __name__ == "__main__":
    main()

"""Adapters: a few new tensors move, and every weight of the model stands still. peft makes them.

    --adapter lora                    θ = θ_0 + α/r B A          MeZO-LoRA, [S] Table 1
    --adapter lora --method s-mezo    θ = θ_0 + m ⊙ (α/r B A)    S-MeZO-LoRA, [S]'s reply below
    --adapter prefix                  five keys and values before the prompt, in every layer
    … --bits 4                        θ_0 in NF4: ZO-LoRA and ZO-prefix, which [Q] compares with

A step is Algorithm 1 on the adapter's fp32 tensors. --seed draws them, so a log rebuilds them. LoRA
begins at θ_0, as B is 0. A prefix begins, as MeZO's, with the keys and values of random tokens.

"Sparse-MeZO can indeed be integrated with LoRA by applying the masking mechanism to the weight
matrices: θ = θ_0 + m ⊙ (AB)", [S] told a reviewer. [S] did not say what m is made from. Here m is
S-MeZO's mask of θ_0. As θ_0 stands still, so does m. A layer reads θ rounded to θ_0's dtype.
"""

import warnings

import torch
from torch import nn

import masks
import quant
import zo
from harness import loading
from harness.config import reworded

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}  # as MeZO's
TOKENS = 5  # of a prefix, as MeZO's
MOVES = r"\.lora_[AB]\.|^prompt_encoder\."  # names of an adapter's parameters


def lacks(shapes: nn.Module) -> str:
    """A layer that LoRA wants and the model has not; empty where it has all."""
    there = {n.rpartition(".")[2] for n, m in shapes.named_modules() if isinstance(m, nn.Linear)}
    return min(set(LORA["target_modules"]) - there, default="")


def check(config, shapes: nn.Module) -> None:
    """ValueError where a model has no place for the adapter. `shapes`: it without its weights."""
    if config.adapter == "lora" and (layer := lacks(shapes)):
        raise ValueError(f"--adapter lora: {config.model} has no {layer} for it; use prefix")
    if config.method == "s-mezo" and config.density:
        named = shapes.named_modules()
        wanted = [m.weight for n, m in named if n.rpartition(".")[2] in LORA["target_modules"]]
        masks.check_moves(config.density, wanted)
    for name, module in shapes.named_modules() if config.bits == 4 else ():
        # bitsandbytes' CPU kernels would unpack them wrongly
        if isinstance(module, nn.Linear) and module.in_features % quant.BLOCK:
            raise ValueError(f"--bits 4: rows of {name} are no whole blocks of 64; use --bits 16")


@torch.no_grad()
def attach(model, config):
    """The model with its adapter, in eval mode. ValueError where it cannot live with a prefix."""
    import peft
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # peft asks for what is old
    with torch.random.fork_rng(devices=[]):  # what is drawn is drawn on the CPU
        torch.manual_seed(config.seed)
        if config.adapter == "lora":
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
            layers = [module for module in model.modules() if hasattr(module, "lora_A")]
            for layer in layers if config.method == "s-mezo" else ():  # m on the product A B
                quant.read_as(layer.base_layer, "weight", MaskedProduct(layer, config.density))
                layer.merged_adapters.append("default")  # so peft adds nothing itself
            return model.eval()
        tokens = torch.randint(model.get_input_embeddings().num_embeddings, (1, TOKENS))
        settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
        with reworded(f"--adapter prefix: {config.model} cannot take one"):
            cache = model(input_ids=tokens.to(model.device), use_cache=True).past_key_values
            model = peft.get_peft_model(model, settings).eval()
            initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    loading.check_model(model, f"{config.model} with a prefix")
    model.pack = loading.shared_row(model)
    return model


class MaskedProduct:
    """θ_0 + m ⊙ (α/r B A): what a layer with S-MeZO's LoRA gets when it asks for its weight."""

    def __init__(self, layer, density: float):
        self.layer = layer
        self.h = masks.threshold(layer.base_layer.weight, density)

    def __call__(self, theta):
        product = self.layer.get_delta_weight("default")  # of A and B as a probe has them read
        return zo.shifted(theta, 1, masks.get_mask(theta, self.h), product).to(theta.dtype)


def merged(model):
    """The model with S-MeZO's LoRA in its weights, as no ordinary adapter can hold the mask.

    Other models are returned as they are.
    """
    held = [module for module in model.modules() if quant.answers(module)]
    for module in held:
        module._parameters["weight"] = nn.Parameter(module.weight.detach(), False)
        quant.read_plainly(module)
    return model.unload() if held else model

"""Every causal LM that transformers has, taken through loading, a probe, a Fisher mask and 4 bits.

    python -m tests.sweep                   all: two minutes on one core, downloads nothing
    python -m tests.sweep llama mpt         some, by model type
    python -m tests.sweep --json rows.json  the table as data, too

Of each architecture a tiny random model is made, moved a little so that no weight is exactly 0 or
1, and saved to a temporary folder. Then each stage loads it anew. The columns of the table:

    build    a model of at most 2 M parameters from its configuration, and its folder
    load     harness.loading.load_model takes it, and its weights are those that were saved
    probe    a step of S-MeZO is the literal Algorithm 1's, the probes write nothing
    fisher   masks.sensitive_index finds a mask from two random texts
    4 bits   split by that mask while loading, a step is the literal step on the joined weights
    16 bits  the same with the other weights as they are

An entry is `works`; `refused`, by a ValueError of one line; `FAILS`, by anything else; or `-` where
an earlier stage left nothing to try. `not built`: it cannot be made small here. Below a row stands
why. The last lines count; one may be refused at a stage and fail at the next. A composite model,
with images or sound, refuses a probe until --select leaves those parts out.
"""

import argparse
import copy
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import transformers
from models import ARCHITECTURES, MHA, SIZES, VOCAB, loss_of
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import masks
import quant
import tasks
import zo
from harness import loading
from model_patch import Patch

STAGES = ["load", "probe", "fisher", "4 bits", "16 bits"]
SEED, EPS, LR = zo.step_seed(3, 14), 1e-3, 1e-2
SECONDS, LARGEST = 60, 2_000_000

# fmt: off
SMALL = {  # the size that a field of a configuration gets by its name, where it has such a field
    0: "num_kv_shared_layers",
    1: "n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace"
       " num_dense_layers o_groups mamba_n_groups mamba_ngroups",
    2: "n_layer n_layers num_layers encoder_layers decoder_layers depth num_kv_heads"
       " linear_num_key_heads index_n_heads num_experts_per_tok moe_topk swa_num_key_value_heads"
       " zero_expert_num",
    4: "n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
       " linear_num_value_heads num_experts num_local_experts n_routed_experts moe_num_experts"
       " qk_nope_head_dim mamba_d_state rotary_dim swa_num_attention_heads",
    8: "q_lora_rank kv_lora_rank v_head_dim linear_key_head_dim linear_value_head_dim dim_head"
       " qk_rope_head_dim"
       " index_head_dim state_size ssm_state_size sliding_window swa_head_dim o_lora_rank"
       " hidden_size_per_layer_input laurel_rank mamba_n_heads mamba_num_heads mamba_head_dim"
       " mamba_d_head attention_head_size chunk_size mamba_chunk_size",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"
        " moe_shared_expert_intermediate_size shared_experts_intermediate_size"
        " expert_ffn_hidden_size router_hidden_size",
    32: "d_model n_embd emb_dim embedding_size input_embedding_size output_embedding_size lru_width"
        " word_embed_proj_dim embedding_dim pronunciation_embed_dim shape_embed_dim",
    48: "ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_inner dim_ff dff feed_forward_size"
        " ffn_hidden_size mlp_dim intermediate_size_mlp dense_intermediate_size",
    64: "n_positions n_ctx max_seq_len context_length mamba_d_ssm image_size",
    96: "vocab_size_per_layer_input unpadded_vocab_size shape_vocab_size",
}
COMMON = SIZES | {name: size for size, names in SMALL.items() for name in names.split()}
HYBRID = {"num_hidden_layers": 4,
          "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]}
CHANGES = {  # by model type, what differs from COMMON; None: the configuration's own default
    "blt": {"encoder_hash_byte_group_vocab": 50} | dict.fromkeys(
        ["encoder_config", "decoder_config"], {"hidden_size_global": 32}),
    "cohere_compass_text": {"rope_parameters": {"full_attention": {
        "rope_type": "default", "rope_theta": 1e4}}},
    "ernie4_5_moe": {"moe_k": 2},
    "gemma4_assistant": {"backbone_hidden_size": 32, "text_config": {
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": 2}},
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 32, "output_proj_dims": 32}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "per_layer_config": {},
                          "mlp_layer_types": ["dense", "dense"]},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32,
                         "downsample_hidden_size": 8}},
    "mamba2": {"n_groups": 2, "num_heads": 8},
    "phi4_multimodal": {
        "vision_config": {"crop_size": 64},
        "audio_config": {"num_blocks": 2, "ext_pw_out_channel": 32, "chunk_size": -1,
                         "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8}},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16],
                 "attn_layers": ["local", "lsh"], "num_buckets": 4, "hash_seed": 0,
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"pad_token_id": None},  # whose row loading would make 0
    "zamba": HYBRID,
    "zamba2": HYBRID | {"adapter_rank": 8},
    "zaya": {"num_experts_per_tok": 1},
}
CHANGES["gemma4_unified_assistant"] = CHANGES["gemma4_assistant"]
# fmt: on
for _model_type, _changes in ARCHITECTURES.values():
    CHANGES.setdefault(_model_type, _changes)


class TooLong(BaseException):
    """Not an Exception, so that nothing on the way takes it for its own."""


def tiny(config_class, changes: dict):
    """A small configuration, with those that are part of it small, too."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    sizes = {name: size for name, size in COMMON.items() if name in fields}
    if "kv_lora_rank" in fields:
        sizes |= MHA
    for name, part in config_class.sub_configs_defaults.items():
        kind = CONFIG_MAPPING[part.model_type] if part.model_type else part.config_class
        if kind is not AutoConfig:
            sizes[name] = tiny(kind, changes.get(name, {}))
            changes = {key: value for key, value in changes.items() if key != name}
    config = config_class(**{k: v for k, v in (sizes | changes).items() if v is not None})
    for name in fields:  # of images and the like, which no text here has
        if not name.endswith(("token_id", "token_index")):
            continue
        if isinstance(value := getattr(config, name), int) and value >= VOCAB:
            setattr(config, name, 0)
    return config


def build(name: str, folder: str):
    """A tiny random model, saved to the folder."""
    config = tiny(CONFIG_MAPPING[name], CHANGES.get(name, {}))
    weights = dict(loading.skeleton(config).named_parameters())
    if sum(p.numel() for p in weights.values()) > LARGEST:
        largest = max(weights, key=lambda n: weights[n].numel())
        raise ValueError(f"too large, {largest} alone is {list(weights[largest].shape)}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if type(model.config) is not type(config):  # a language model out of a larger one
        config.save_pretrained(folder)  # as it is published
    return model.eval()


def batch(model, rows: int = 3, tokens: int = 8) -> dict:
    """Left-padded input, as tasks.py gives it to this model."""
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(rows, tokens, dtype=torch.long)
    for row in range(rows):
        mask[row, :row], ids[row, :row] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return tasks.model_inputs(model, ids, mask, positions, keep=2)


def expect(condition, what: str) -> None:
    """RuntimeError with `what` where the condition does not hold."""
    if not condition:
        raise RuntimeError(what)


def same(model, other) -> bool:
    """Whether two models have the same parameters, bit for bit."""
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def near(a, b, tolerance: float) -> bool:
    """Whether two losses agree, relative to their size; not so if one is NaN."""
    return abs(float(a) - float(b)) <= tolerance * abs(float(b))


class Trial:
    """One architecture's folder, and the stages in order."""

    def __init__(self, folder: str, built):
        self.folder, self.built, self.index = folder, built, None

    def open(self, **how):
        """The model. Without gradients: torch.matmul would round otherwise where one is wanted."""
        model = loading.load_model(self.folder, dtype="float32", device="cpu", **how)
        return model.requires_grad_(False)

    def loss(self, model):
        return loss_of(model, batch(model))

    def load(self):
        expect(same(self.open(), self.built), "other weights were loaded than were saved")

    def probe(self):
        """As tests/test_model_patch.py: l⁺, l⁻ and the update beside the literal algorithm's."""
        model, literal = self.open(), self.open()
        theta = [p.detach() for p in literal.parameters()]
        moving = [masks.get_mask(t, masks.threshold(t, 0.25)) for t in theta]
        down = copy.deepcopy(literal)
        zo.perturb_parameters([p.detach() for p in down.parameters()], -EPS, SEED, moving)
        patch = Patch(model, masks.SmallWeights(0.25), eps=EPS, rounding="nearest")
        plus, minus = patch.losses(batch(model), loss_of, SEED)
        held = [w.parameter for w in patch.weights]
        expect(all(map(torch.equal, held, theta)), "a probe wrote to the weights")
        want = zo.sparse_mezo_step(
            theta, lambda: self.loss(literal), lambda _: moving, lr=LR, eps=EPS, seed=SEED
        )
        expect(plus.isfinite() and plus != minus, f"the losses are {plus} and {minus}")
        down = self.loss(down)  # two architectures round otherwise on a CPU without AVX-512
        expect(near(plus, want[0], 2e-7), f"l+ is {plus.item()}, literally {want[0]}")
        expect(near(minus, down, 2e-7), f"l- is {minus.item()}, literally {down.item()}")
        patch.update(SEED, -LR * want[2])
        patch.remove()
        for (name, p), q in zip(model.named_parameters(), theta, strict=True):
            expect(torch.allclose(p, q, rtol=5e-7, atol=5e-7), f"the update of {name} differs")

    def fisher(self):
        def loss(ids, model):
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            return F.cross_entropy(logits[:-1].float(), ids[1:])

        texts = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(1))
        losses = [lambda model, ids=ids: loss(ids, model) for ids in texts]
        self.index = masks.sensitive_index(self.open(), losses, 0.05)

    def split(self, bits: int):
        """As tests/test_model_patch.py: a step on the k values beside the literal one."""
        sparse = quant.DenseSparse(self.index, bits=bits)
        model = self.open(split=sparse.split, index=self.index)
        literal, values = self.open(), sparse.values.clone()
        weights = {name: literal.get_parameter(name).detach() for name in sparse.index}
        for name, part in sparse.parts.items():
            weights[name].copy_(part.dense(weights[name]))

        def joined_loss():
            for name, places in sparse.index.items():
                weights[name].view(-1)[places.long()] = values[sparse.slices[name]]
            return self.loss(literal)

        patch = Patch(model, sparse, eps=EPS)
        plus, minus = patch.losses(batch(model), loss_of, SEED)
        ones = [torch.ones_like(values, dtype=torch.bool)]
        want = zo.sparse_mezo_step([values], joined_loss, lambda _: ones, lr=LR, eps=EPS, seed=SEED)
        expect(plus.isfinite() and plus != minus, f"the losses are {plus} and {minus}")
        expect(plus.item() == want[0], f"l+ is {plus.item()}, literally {want[0]}")
        expect(near(minus, want[1], 1e-5), f"l- is {minus.item()}, literally {want[1]}")
        patch.update(SEED, -LR * want[2])
        expect(torch.allclose(sparse.values, values, atol=1e-6), "the update differs")
        patch.remove()
        quant.join(model)
        expect(near(self.loss(model), joined_loss(), 1e-4), "joined, the loss is another")


def line(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def row_of(name: str) -> dict:
    """{stage: what became of it} of one architecture."""
    row = {"build": "works"} | dict.fromkeys(STAGES, "-")
    with tempfile.TemporaryDirectory() as folder:
        try:
            trial = Trial(folder, build(name, folder))
        except (Exception, TooLong) as error:
            return row | {"build": f"not built: {type(error).__name__}: {line(error)}"}
        steps = [trial.load, trial.probe, trial.fisher, lambda: trial.split(4),
                 lambda: trial.split(16)]  # fmt: skip
        for stage, step in zip(STAGES, steps, strict=True):
            if row["load"] not in ("-", "works") or (stage[0].isdigit() and trial.index is None):
                break
            try:
                step()
                row[stage] = "works"
            except ValueError as error:
                how = "FAILS: several lines: " if "\n" in str(error) else "refused: "
                row[stage] = how + line(error).replace(folder, "MODEL")
            except TooLong as error:
                row[stage] = f"FAILS: {error}"
                break
            except Exception as error:
                row[stage] = f"FAILS: {type(error).__name__}: {line(error)}"
    return row


def timed(name: str) -> dict:
    """`row_of`, ended after a minute."""

    def end(*_):
        raise TooLong(f"takes more than {SECONDS} seconds")

    start = time.perf_counter()
    signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        row = row_of(name)
    finally:
        signal.alarm(0)
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def report(name: str, row: dict) -> None:
    """One line of the table, and under it what did not work."""
    short = [row[stage].split(":")[0] for stage in ("build", *STAGES)]
    print(f"{name:<28}" + "".join(f"{word:<10}" for word in short) + f"{row['seconds']:>5}")
    for stage in ("build", *STAGES):
        if row[stage] not in ("-", "works"):
            print(f"    {stage}: {row[stage]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types; all without")
    parser.add_argument("--json", help="a file for the table as data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    print(" " * 28 + "".join(f"{stage:<10}" for stage in ("build", *STAGES)) + "seconds")
    rows = {}
    for name in args.names or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        rows[name] = timed(name)
        report(name, rows[name])
    entries = [[row[stage].split(":")[0] for stage in ("build", *STAGES)] for row in rows.values()]
    print(f"\n{len(rows)} architectures")
    for title, count in {
        "work at all stages": sum(set(words) == {"works"} for words in entries),
        "refused in one line at a stage": sum("refused" in words for words in entries),
        "FAIL at a stage": sum("FAILS" in words for words in entries),
        "not built": sum("not built" in words for words in entries),
    }.items():
        print(f"{count:>5} {title}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

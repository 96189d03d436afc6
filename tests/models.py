"""Tiny random models of many architectures, and a task for one."""

import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 96
WORDS = [*"abcdefghij", "red", "blue", ".", "?"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MHA = {"num_key_value_heads": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "v_head_dim": 8}
HYBRID = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
ARCHITECTURES = {  # name: (model type, what differs from SIZES; None: left out)
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": None}),
    "opt-350m": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma3": ("gemma3_text", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("gpt_neox", MHA),
    "phi": ("phi", MHA),
    "phi3": ("phi3", {}),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "falcon": ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True, "head_dim": None}),
    "cohere": ("cohere", {}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 4}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("qwen3_moe", MOE),
    "deepseek-v3": (
        "deepseek_v3",
        MHA | LATENT | {"qk_rope_head_dim": 4, "head_dim": None, "n_routed_experts": 4}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
        | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "llama4": (
        "llama4_text",
        {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
    ),
    "jamba": (
        "jamba",
        HYBRID | {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4},
    ),
    "dbrx": (
        "dbrx",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}
        | {"ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32, "moe_num_experts": 4}},
    ),
}  # fmt: skip


def needs_gpu(test):
    """A test that is skipped without a GPU, and that `pytest -m cuda` picks."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    return pytest.mark.cuda(skip(test))


def build(name: str, dtype=torch.float32, seed: int = 0, **more):
    """A tiny random model in eval mode; its norms are perturbed, so that no weight is exactly 1."""
    model_type, changes = ARCHITECTURES[name]
    sizes = {key: size for key, size in (SIZES | changes | more).items() if size is not None}
    config = AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def batch(rows: int = 3, tokens: int = 8, seed: int = 0) -> dict:
    """Left-padded input: row r has r padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    for row in range(rows):
        mask[row, :row], ids[row, :row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def loss_fn(logits):
    """Any smooth function of the last position's logits, in fp32."""
    return -torch.log_softmax(logits[:, -1].float(), -1)[:, 5].mean()


def loss_of(model, inputs) -> torch.Tensor:
    """The loss that a probe of model_patch computes."""
    with torch.no_grad():
        return loss_fn(model(**inputs, use_cache=False).logits)


def write_model(path) -> None:
    """A tiny random LLaMA with a word tokenizer."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(path)
    build("llama-tied", num_hidden_layers=1).save_pretrained(path)


def write_task(path) -> None:
    """Such a model, and a task for it: which of two words came first?"""
    write_model(path / "model")
    for name, count in (("train", 36), ("test", 20)):
        with open(path / f"{name}.jsonl", "w") as file:
            for i in range(count):
                label = i % 2
                words = [WORDS[(i * k + 3) % 10] for k in (1, 3, 7)]
                prompt = " ".join([("red", "blue")[label], *words, "?"])
                row = {"prompt": prompt, "options": [" red", " blue"], "label": label}
                file.write(json.dumps(row) + "\n")

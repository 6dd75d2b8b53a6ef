"""Tiny random models of many architectures of transformers."""

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.helpers import tiny

# names by which configurations call the sizes of a model; each takes those that it knows
SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": tiny.EOS,
    # windows, all shorter than a prompt
    "sliding_window": tiny.WINDOW,
    "attention_chunk_size": tiny.WINDOW,
    "local_attention": tiny.WINDOW,
    "window_size": tiny.WINDOW,
    # experts
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "moe_num_shared_experts": 1,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 24,
    "intermediate_size_mlp": 48,
    # latent attention
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # other scales of attention than the usual one
    "query_pre_attn_scalar": 24,
    "attention_multiplier": 0.6,
    # older names
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "rotary_dim": 4,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 128,
    "num_layers": 2,
    "attention_types": [[["global", "local"], 1]],
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": tiny.VOCABULARY,
    "num_kv_shared_layers": 0,
    "is_decoder": True,
}
LATENT = {"num_key_value_heads": 4}  # its keys have as many heads as its queries


def build(kind: str, seed: int = 0, **further) -> PreTrainedModel:
    """A causal model of this type, its first two kinds of layers in turn."""
    usual = CONFIG_MAPPING[kind]().get_text_config()
    settings = usual.to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in settings}
    kinds = list(dict.fromkeys(settings.get("layer_types") or ()))[:2]
    if kinds:
        sizes["layer_types"] = (2 * kinds)[:2]
    config = type(usual)(**sizes | further)
    return tiny.seeded(lambda: AutoModelForCausalLM.from_config(config).eval(), seed)

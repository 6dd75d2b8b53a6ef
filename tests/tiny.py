"""Tiny random models and prompts for the tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.lab.tokenizer import build_tokenizer
from sia import ValueModel

VOCABULARY = 60
EOS = 2
CONFIGS = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def language_model(family: str, seed: int = 0, vocabulary: int = VOCABULARY):
    """Two layers with weights large enough that tokens differ in probability."""
    config_class, model_class = CONFIGS[family]
    config = config_class(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config).eval()


def value_model(family: str, seed: int = 1, vocabulary: int = VOCABULARY) -> ValueModel:
    model = ValueModel.from_backbone(language_model(family, seed, vocabulary))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.head.weight.normal_(generator=generator).mul_(0.5)
        model.head.bias.fill_(0.3)
    return model.eval()


def prompts(count: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    """Random token ids, special tokens left out, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(6, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def tokenizer(vocabulary: int = VOCABULARY):
    return build_tokenizer([f"w{i}" for i in range(6, vocabulary)])

"""Untrained models of the lab: language models and reward models."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from benchmarks.spec.profile import ModelSize
from benchmarks.subjects.lab.linear import use_onednn
from benchmarks.subjects.lab.tokenizer import BOS, EOS, PAD

ARCHITECTURES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification),
    "llama": (LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification),
}


def new_language_model(family: str, size: ModelSize, vocabulary: int, seed: int) -> PreTrainedModel:
    """Return a model of this family with random weights drawn under `seed`."""
    config_class, model_class, _ = ARCHITECTURES[family]
    config = config_class(
        vocab_size=vocabulary,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.hidden_size // size.heads,
        intermediate_size=size.feed_forward,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return use_onednn(model_class(config).eval())


def new_reward_model(base: PreTrainedModel, family: str) -> PreTrainedModel:
    """Return a sequence classifier with one label on a copy of the base, its head at zero."""
    labels = {"id2label": {0: "reward"}, "label2id": {"reward": 0}}
    config = type(base.config).from_dict(base.config.to_dict() | labels | {"architectures": None})
    model = ARCHITECTURES[family][2](config)
    model.base_model.load_state_dict(base.base_model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    return use_onednn(model.eval())

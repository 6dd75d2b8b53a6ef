"""Tiny random models, prompts and responses for the tests."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import sia
from benchmarks.subjects.lab.tokenizer import word_tokenizer
from sia._model_identity import ModelIdentity
from sia.junctions import JunctionPredictor
from sia.scorers.candidate_values import CandidateValues

VOCABULARY = 60
EOS = 2
WINDOW = 6  # shorter than most prompts and responses
MIXED_WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {}),  # learned positions, Conv1D
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),  # in every layer
    "gemma2": (  # eager attention, soft caps
        Gemma2Config,
        Gemma2ForCausalLM,
        {**MIXED_WINDOWS, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {**MIXED_WINDOWS, "query_pre_attn_scalar": 8}),
}


def seeded(build, seed: int):
    """Build with weights drawn from a seed, and leave torch's own generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def config(family: str, vocabulary: int = VOCABULARY):
    """Two layers with weights large enough that tokens differ in probability."""
    config_class, _, further = FAMILIES[family]
    return config_class(
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
        **further,
    )


def language_model(family: str, seed: int = 0, vocabulary: int = VOCABULARY):
    return seeded(lambda: FAMILIES[family][1](config(family, vocabulary)).eval(), seed)


def reward_model(family: str, seed: int = 2, vocabulary: int = VOCABULARY):
    """A trajectory reward model of the same shape."""
    settings = config(family, vocabulary)
    settings.num_labels = 1
    return seeded(lambda: AutoModelForSequenceClassification.from_config(settings).eval(), seed)


def multimodal_model():
    """A text decoder beside a larger vision tower."""
    text = config("gemma3").to_dict()
    vision = {"hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 4}
    vision |= {"num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    settings = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return seeded(lambda: Gemma3ForConditionalGeneration(settings).eval(), 3)


def cross_attending_model(seed: int = 0):
    """As Llama 3.2 Vision: the second layer attends to images, which are not there."""
    text = config("llama").to_dict() | {"cross_attention_layers": [1]}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_global_layers": 1, "attention_heads": 4, "vision_output_dim": 64}
    vision |= {"image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0]}
    settings = MllamaConfig(text_config=text, vision_config=vision, image_token_index=50)
    model = seeded(lambda: MllamaForConditionalGeneration(settings).eval(), seed)
    for weight in model.get_decoder().parameters():
        weight.data.mul_(12 if weight.ndim > 1 else 1)  # drawn as small as the vision tower's
    return model


def value_model(family: str, seed: int = 1, vocabulary: int = VOCABULARY) -> sia.ValueModel:
    model = sia.ValueModel.from_backbone(language_model(family, seed, vocabulary))
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(seed)).mul_(0.5)
        model.head.bias.fill_(0.3)
    return model.eval()


def prompts(count: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    """Random token ids, special tokens left out, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(6, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids of responses or candidates, the end of a sequence left out."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def tokenizer(vocabulary: int = VOCABULARY):
    return word_tokenizer([f"w{i}" for i in range(6, vocabulary)])


def letters():
    """A byte-level tokenizer of single letters, as transformers' stop strings need one."""
    vocabulary = {chr(ord("A") + i): i for i in range(VOCABULARY - 3)}
    backend = Tokenizer(models.BPE(vocabulary | {"Ġ": 57, "<s>": 58, "</s>": 59}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def generate(model, prompts, steering=None, **options) -> list[sia.Generation]:
    """Call `sia.generate` with the tokenizer of the tests, for 12 tokens unless told otherwise."""
    options = {"max_new_tokens": 12, "progress": False} | options
    return sia.generate(model, tokenizer(), prompts, steering, **options)


def tokens(generations: Iterable[sia.Generation]) -> list[list[int]]:
    return [generation.token_ids.tolist() for generation in generations]


def predictor(model=None, seed: int = 0) -> JunctionPredictor:
    """Random weights whose predictions spread over the states of a tiny model."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "first.weight": torch.randn(6, 32, generator=generator) / 4,
        "first.bias": torch.randn(6, generator=generator),
        "second.weight": torch.randn(1, 6, generator=generator),
        "second.bias": torch.zeros(1),
    }
    model = model or language_model("qwen3")
    return JunctionPredictor.from_weights(weights, ModelIdentity.of(model))


def candidate_values(seed: int = 0, vocabulary: int = VOCABULARY) -> CandidateValues:
    """Return a head of rank 4 whose values differ widely."""
    values = seeded(lambda: CandidateValues(32, vocabulary, 4), seed)
    with torch.no_grad():
        for parameter in values.parameters():
            parameter.mul_(2)
    return values


def q_head(model=None, seed: int = 0, vocabulary: int = VOCABULARY) -> sia.QHead:
    model = model or language_model("qwen3")
    return sia.QHead(candidate_values(seed, vocabulary), ModelIdentity.of(model))

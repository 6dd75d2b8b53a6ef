"""Cached decoding of many architectures against a loop without any cache."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CONFIG_MAPPING, AutoModel, DebertaV2Config, GPT2Config, LlamaConfig

from sia import (
    Attention,
    AutoregressiveScorer,
    Gate,
    Steering,
    ValueModel,
    best_of_n,
    chunk_beam_search,
    log_likelihoods,
    steered_generate,
)
from sia._attention import _newest_row
from sia._inputs import pad_left
from sia._kv_cache import AFTER_PADDING, backbone_of, position_count
from sia._padding import follows_padding
from sia._prefix_cache import supports_tree_attention
from tests.helpers import tiny
from tests.helpers.architectures import LATENT, build
from tests.helpers.reference import decode as reference
from tests.helpers.reference import whole_values

SWITCH = 12  # within a prompt, beyond another, and on the way of the responses to a third
ROPE = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": SWITCH}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, **ROPE}
YARN = {"rope_type": "yarn", **ROPE}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}
PHI3 = {"original_max_position_embeddings": SWITCH, "sliding_window": None}
WINDOWS = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
PROMPTS = [tiny.prompts(1, seed=n, longest=40)[0] for n in range(40)]
PROMPTS = [next(p for p in PROMPTS if len(p) >= n)[:n] for n in (3, 17, 9)]
ATTENTION = torch.nn.functional.scaled_dot_product_attention
OPEN = (0, 1, 4, 8)  # the value model catches up after gaps

USUAL = (
    "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_text", "cohere", "cohere2", "granite", "olmo", "olmo2", "olmo3", "phi",
    "phi3", "stablelm", "starcoder2", "glm", "glm4", "smollm3", "exaone4", "nemotron", "helium",
    "apertus", "seed_oss", "modernbert-decoder", "diffllama", "arcee", "vaultgemma",
    # rotations of a part, learned positions
    "gptj", "gpt_neox", "codegen", "falcon", "persimmon", "gpt2", "opt", "xglm", "gpt_bigcode",
    "biogpt",
    # attention that does not follow prepared masks
    "bloom", "mpt", "gpt_neo", "roformer", "llama4_text",
    # experts
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "ernie4_5_moe", "granitemoe",
    "hunyuan_v1_moe",
)  # fmt: skip
SETTINGS = {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "minicpm3": LATENT,
    "qwen2 with windows": WINDOWS,
    "llama with yarn": {"rope_parameters": YARN},
    "llama with llama3": {"rope_parameters": LLAMA3},
    "qwen2 with longrope": {"rope_parameters": LONGROPE},
    "phi3 with longrope": {"rope_parameters": LONGROPE, **PHI3},
    "phimoe with longrope": {
        "rope_parameters": {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.3},
        **PHI3,
    },
}


class Gaps(Gate):
    """Opens at some steps."""

    def opens(self, step):
        return torch.full_like(step.keys, step.index in OPEN, dtype=torch.bool)


def value_model(backbone):
    model = ValueModel.from_backbone(backbone)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model.eval()


def assert_matches(generation, expected):
    for name, column in expected.items():
        tolerance = {"entropy": 2e-4, "kl": 1e-3}.get(name, 0)
        np.testing.assert_allclose(
            getattr(generation, name), column, atol=tolerance, rtol=1e-3, err_msg=name
        )


@pytest.mark.parametrize("name", [*USUAL, *SETTINGS])
def test_a_batch_equals_a_loop_without_cache_over_each_row(name):
    """Language and value model alike, beyond every window and switch."""
    kind = name.split(" ")[0]
    assert_batch_equals_loop(*(build(kind, seed, **SETTINGS.get(name, {})) for seed in (0, 1)))


def assert_batch_equals_loop(model, backbone):
    scorer = value_model(backbone)
    options = {"max_new_tokens": 10, "seed": 5}
    generations = tiny.generate(model, PROMPTS, Steering(scorer, Gaps(), candidates=8), **options)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        expected = reference(
            model,
            partial(whole_values, scorer),
            prompt,
            lambda looks: looks[-1].step in OPEN,
            candidates=8,
            **options,
        )
        assert_matches(generation, expected)
    return generations


@pytest.mark.parametrize(
    ("kind", "settings"), [("trocr", {"is_decoder": True, "init_std": 0.25}), ("git", {})]
)
def test_models_that_count_padding_read_prompts_of_one_length_together(kind, settings):
    model = build(kind, **settings)
    model.generation_config.pad_token_id = 0
    assert_batch_equals_loop(model, build("llama", 1))
    ids, mask = pad_left(PROMPTS, "cpu")
    options = {"custom_generate": steered_generate, "max_new_tokens": 2}
    with pytest.raises(ValueError, match="ForCausalLM counts padding as positions: give it prompt"):
        model.generate(ids, attention_mask=mask, **options)


def attention_by_two_kernels(*args, attn_mask=None, **options):
    """As on a GPU, where flash attention takes no mask; the two round differently."""
    kernel = SDPBackend.FLASH_ATTENTION if attn_mask is None else SDPBackend.MATH
    with sdpa_kernel(kernel):
        return ATTENTION(*args, attn_mask=attn_mask, **options)


@pytest.mark.parametrize("mixed", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize(
    ("kind", "settings", "padding", "branches"),
    [
        ("qwen2", {"num_hidden_layers": 16, "layer_types": None}, True, True),
        ("git", {}, False, True),
        ("mpt", {}, True, False),
    ],
)
def test_trials_tell_faults_from_rounding(kind, settings, padding, branches, mixed, monkeypatch):
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention", attention_by_two_kernels
    )
    model = build(kind, **settings).to(torch.float32 if mixed else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        assert follows_padding(model) == padding
        assert supports_tree_attention(backbone_of(model)) == branches


def test_layers_that_text_alone_skips_keep_no_keys():
    """Rows end at different steps, and samples of a search share their prompt."""
    model, backbone = tiny.cross_attending_model(0), tiny.cross_attending_model(1)
    generations = assert_batch_equals_loop(model, backbone)
    model.generation_config.eos_token_id = int(generations[0].token_ids[3])  # of one row
    options = {"reward": value_model(backbone), "max_new_tokens": 10, "progress": False, "seed": 5}
    best = partial(best_of_n, model, tiny.tokenizer(), n=3, **options)
    together = best(PROMPTS)
    assert len({len(generation.token_ids) for generation in together}) > 1
    alone = [best([prompt])[0] for prompt in PROMPTS]
    assert tiny.tokens(together) == tiny.tokens(alone)
    with pytest.raises(ValueError, match=r"layers \[1\] of the attention signal do not run on"):
        tiny.generate(model, PROMPTS, observe=[Attention(layers=(0, 1))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "cohere2", "gpt2", "mpt", "mixtral"])
@torch.no_grad()
def test_half_precision_decodes_and_values_as_transformers_does(kind, dtype):
    """Equal logits are common then: greedy decoding takes the same of them as argmax."""
    model, prompt = build(kind).to(dtype), PROMPTS[1]
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, tiny.EOS
    usual = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, 17:]
    (generation,) = tiny.generate(model, [prompt], temperature=0)
    assert generation.token_ids.tolist() == usual.tolist()
    scorer, candidates = value_model(build(kind, 1).to(dtype)), torch.tensor([[7, 8, 9]])
    values = scorer.start_session([prompt], 4).score(torch.tensor([0]), usual[None, :2], candidates)
    expected = whole_values(scorer, [*prompt, *usual[:2].tolist()], [7, 8, 9])
    torch.testing.assert_close(values[0], expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("kind", "further", "message"),
    [
        ("mamba", {}, "layers of attention only, Mamba.* has none"),
        ("rwkv", {}, "layers of attention only, Rwkv.* has none"),
        (
            "qwen3_next",
            {},
            "full or sliding-window attention only, Qwen3Next.* has LinearAttention",
        ),
        ("falcon_h1", {}, "full or sliding-window attention only, FalconH1.* has LinearAttention"),
        (
            "llama",
            {"rope_parameters": {**ROPE, "rope_type": "dynamic"}, "max_position_embeddings": 8},
            'the rotary scaling "dynamic" of Llama.* changes with every token beyond 8',
        ),
    ],
)
def test_models_that_cannot_be_cached_are_refused(kind, further, message):
    model = build(kind, **further)
    with pytest.raises(ValueError, match=message):
        tiny.generate(model, PROMPTS)
    with pytest.raises(ValueError, match=message):
        value_model(model).start_session(PROMPTS, 10)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (GPT2Config(n_positions=16), 16),
        (DebertaV2Config(max_position_embeddings=16), 16),
        (DebertaV2Config(max_position_embeddings=16, position_biased_input=False), None),
        (LlamaConfig(max_position_embeddings=16), None),
    ],
)
def test_learned_positions_are_counted(config, count):
    assert position_count(config) == count


@pytest.mark.parametrize("kind", sorted(AFTER_PADDING))
def test_positions_are_counted_from_the_padding_token_on(kind):
    config = CONFIG_MAPPING[kind](
        vocab_size=60, num_hidden_layers=1, max_position_embeddings=16, pad_token_id=1
    )
    with torch.device("meta"):
        table = AutoModel.from_config(config).embeddings.position_embeddings
    assert position_count(config) == len(table.weight) - table.padding_idx - 1 == 14


def test_a_language_model_that_keeps_no_cache_is_refused():
    with pytest.raises(ValueError, match="needs a model that extends transformers' caches, OpenAI"):
        tiny.generate(build("openai-gpt"), PROMPTS)


PHI3_LONG = build("phi3", rope_parameters=LONGROPE, **PHI3)


def test_a_padded_batch_that_may_cross_a_switch_is_refused_by_transformers_generate():
    ids, mask = pad_left(PROMPTS, "cpu")
    with pytest.raises(ValueError, match=r"beyond 12 tokens: .* of one length, got 3 to 17 tokens"):
        PHI3_LONG.generate(
            ids, attention_mask=mask, custom_generate=steered_generate, max_new_tokens=5
        )


def test_searches_and_likelihoods_cross_a_switch_as_decoding_does():
    prompts, seeds = PROMPTS[1:], [3, 4]
    scorer = AutoregressiveScorer(build("phi3", 1, rope_parameters=LONGROPE, **PHI3))
    steering = Steering(scorer, Gaps())
    generations = tiny.generate(PHI3_LONG, prompts, steering, seed=seeds)
    likelihoods = log_likelihoods(PHI3_LONG, None, prompts, tiny.tokens(generations))
    for prompt, generation, likelihood in zip(prompts, generations, likelihoods, strict=True):
        (alone,) = log_likelihoods(PHI3_LONG, None, [prompt], [generation.token_ids.tolist()])
        np.testing.assert_allclose(likelihood.log_probabilities, alone.log_probabilities, atol=1e-4)
        expected = step_by_step(PHI3_LONG, prompt, generation.token_ids.tolist())
        np.testing.assert_allclose(likelihood.log_probabilities, expected, atol=1e-4)
    responses = chunk_beam_search(
        PHI3_LONG, tiny.tokenizer(), prompts, value_model(scorer.model), width=2, expansions=2,
        chunk=2, max_new_tokens=8, progress=False,
    )  # fmt: skip
    for prompt, generation in zip(prompts, responses, strict=True):
        likelihood = step_by_step(PHI3_LONG, prompt, generation.token_ids.tolist())
        assert np.isfinite(likelihood).all()  # all among the candidates


@torch.no_grad()
def step_by_step(model, prompt, response):
    """Log-probabilities of tokens among 10 candidates, each by a forward pass without cache."""
    result = []
    for step, token in enumerate(response):
        logits = model(torch.tensor([[*prompt, *response[:step]]]), use_cache=False).logits[0, -1]
        top = logits.topk(10)
        row = (top.indices == token).float().log() + top.values.log_softmax(0)
        result.append(float(row.max()))
    return np.array(result)


@pytest.mark.parametrize(
    "kind",
    [
        "llama", "gemma", "gemma2", "gemma3_text", "granite", "cohere2", "qwen2", "qwen3", "phi3",
        "mistral", "gpt2", "gpt_oss", "starcoder2", "olmo2", "glm4", "mixtral", "helium",
        "deepseek_v3", "minicpm3", "nemotron", "stablelm", "smollm3", "opt",
    ],
)  # fmt: skip
def test_the_attention_signal_is_that_of_eager_attention(kind):
    """Whatever scale the model's attention has."""
    model = build(kind, **SETTINGS.get(kind, {}))
    (generation,) = tiny.generate(model, PROMPTS[2:], max_new_tokens=6, observe=[Attention()])
    ids = torch.tensor([[*PROMPTS[2], *generation.token_ids.tolist()]])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = torch.cat(model(ids, output_attentions=True, use_cache=False).attentions)
    averaged = attentions.mean((0, 1)).numpy()
    for step, level in enumerate(generation.signals[Attention()]):
        newest = len(PROMPTS[2]) + step - 1
        distance = newest - np.arange(1, newest + 1)
        expected = (averaged[newest, 1 : newest + 1] * distance.clip(max=10)).sum()
        assert level == pytest.approx(expected, rel=1e-4)


def test_attention_without_its_own_scale_uses_the_default():
    query, key = torch.randn(2, 2, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    values = torch.eye(3).expand(2, 4, -1, -1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, values)[:, :, -1]
    torch.testing.assert_close(_newest_row(query, key, None, None), expected)

"""Counted FLOPs against torch's own counter, and counts against arithmetic."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForSequenceClassification,
)

from sia import EntropyGate, EveryToken, RewardScorer, Steering, StepTokenScorer
from sia.cost import Architecture, Cost, Meter, _keys_seen, attention_windows, weights_used
from tests.helpers import tiny
from tests.helpers.architectures import LATENT, build


def decode_and_count(model, steering=None):
    """Decode 7 tokens, the window of gemma2 and one more, after a prompt of one.

    Every product of the cached loop is needed then, so that both counts must agree. torch sees
    products inside attention on CPU only if it is eager.
    """
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        (generation,) = tiny.generate(model, [[7]], steering, max_new_tokens=7)
    return generation, counter.get_total_flops()


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma2"])
def test_flops_of_decoding_are_those_that_torch_counts(family):
    generation, flops = decode_and_count(tiny.language_model(family))
    assert generation.cost.model_flops == pytest.approx(flops, rel=0.01)
    assert generation.cost.value_flops == 0


def test_layers_with_heads_of_another_size_count_as_such():
    """As the layers of Gemma 4 that see all keys; most products are those of attention here."""
    model = build("gemma4_text", head_dim=8, global_head_dim=48, layer_types=["full_attention"] * 2)
    model.generation_config.eos_token_id = None
    generation, flops = decode_and_count(model)
    assert generation.cost.model_flops == pytest.approx(flops, rel=0.01)
    sizes = [per_key for _, per_key in Architecture.of(model.model, model.lm_head).attention]
    assert sizes == [2 * 2 * 4 * (48 + 48)]  # layers, FLOPs of a product, heads, both products


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_flops_of_steering_are_those_that_torch_counts(family):
    """But for keys that torch computes and masks (gemma2 has more of them: its window's)."""
    values = tiny.value_model(family)
    values.backbone.set_attn_implementation("eager")
    generation, flops = decode_and_count(
        tiny.language_model(family), Steering(values, EveryToken())
    )
    key = Architecture.of(values.backbone, values.head).attention[0][1]
    siblings = len(generation.token_ids) * 10 * 9 * key
    candidates_seen_from_the_prefix = len(generation.token_ids) * 10 * key
    counted = generation.cost.model_flops + generation.cost.value_flops
    expected = flops - siblings - candidates_seen_from_the_prefix
    assert counted == pytest.approx(expected, rel=0.01)


def test_windows_are_read_from_the_model():
    assert attention_windows(tiny.language_model("llama")) == [None, None]
    assert attention_windows(tiny.language_model("mistral")) == [tiny.WINDOW, tiny.WINDOW]
    assert attention_windows(tiny.language_model("gemma3")) == [tiny.WINDOW, None]


@pytest.mark.parametrize("window", [None, 1, 4, 9])
def test_keys_seen_against_a_plain_sum(window):
    for tokens in range(12):
        expected = sum(min(i, window or i) for i in range(1, tokens + 1))
        assert _keys_seen(torch.tensor(tokens), window).item() == expected


def test_a_meter_adds_up_by_row():
    meter = Meter(Architecture(linear=10, head=3, attention=((None, 2), (4, 1))), 3, "cpu")
    counts = torch.tensor([[0, 2], [1, 2], [0, 3], [5, 6], [1, 0]])
    meter.count(*counts)
    meter.count_branches(torch.tensor([2]), torch.tensor([[7, 2]]))
    flops = [5 * 10 + 3 + 2 * 15 + 14, 0.0, 3 * 10 + 2 * 15 + 12 + 2 * 13 + 2 * 9 + 4 + 2]
    for _ in range(2):  # reading twice counts once
        totals = [total.tolist() for total in meter.totals()]
        assert totals == [[1, 0, 2], [5, 0, 5], flops]


def test_costs_add():
    assert Cost(1, 2, 3, 4, 5, 6.0, 7.0) + Cost(1, 1, 1, 1, 1, 1.0, 1.0) == Cost(
        2, 3, 4, 5, 6, 7.0, 8.0
    )


def test_junctions_are_counted_and_value_flops_grow_with_them():
    model, steering = (
        tiny.language_model("qwen3"),
        Steering(tiny.value_model("qwen3"), EveryToken(), 0.0),
    )
    sparse = tiny.generate(model, tiny.prompts(10), replace(steering, gate=EntropyGate(2.05)))
    dense = tiny.generate(model, tiny.prompts(10), steering)
    for a, b in zip(sparse, dense, strict=True):
        assert a.cost.junctions == a.steered.sum() == a.cost.value_forwards
        assert b.cost.junctions == len(b.token_ids)
        assert a.cost.value_flops <= b.cost.value_flops
        assert a.cost.model_flops == b.cost.model_flops
    assert sum(g.cost.value_flops for g in sparse) < 0.8 * sum(g.cost.value_flops for g in dense)


def llama(**settings):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            **settings,
        )
    ).eval()


def lora(*, merged=False, enabled=True):
    """A model with two adapters, of which the smaller is active."""
    peft = pytest.importorskip("peft")
    sizes = {"other": 32, "active": 8}
    settings = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    configs = {name: peft.LoraConfig(r=r, **settings) for name, r in sizes.items()}
    model = peft.get_peft_model(llama(), configs["other"], "other")
    model.add_adapter("active", configs["active"])
    model.set_adapter("active")
    if merged:
        model.merge_adapter()
    if not enabled:
        model.base_model.disable_adapter_layers()
    return model.eval()


def mixture():
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            num_local_experts=8,
            num_experts_per_tok=2,
        )
    ).eval()
    model.set_experts_implementation("eager")
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's use of transformers
@pytest.mark.parametrize(
    "build_model",
    [
        llama,
        lambda: llama(tie_word_embeddings=True),
        lambda: lora(),
        lambda: lora(merged=True),
        lambda: lora(enabled=False),
        tiny.multimodal_model,
        tiny.cross_attending_model,
        mixture,
        lambda: build("minicpm3", **LATENT),
    ],
    ids=[
        "plain",
        "tied",
        "adapter",
        "merged",
        "disabled",
        "multimodal",
        "cross-attention",
        "experts",
        "latent",
    ],
)
def test_weights_count_if_they_run(build_model):
    generation, flops = decode_and_count(build_model())
    assert generation.cost.model_flops == pytest.approx(flops, rel=0.05)


def encoder_decoder(config_class, model_class, **sizes):
    return model_class(
        config_class(
            vocab_size=60,
            d_model=32,
            num_labels=1,
            bos_token_id=1,
            eos_token_id=tiny.EOS,
            decoder_start_token_id=tiny.EOS,
            **sizes,
        )
    ).eval()


@pytest.mark.parametrize(
    "build_scorer",
    [
        lambda: StepTokenScorer(build("bloom"), [7], 8, 9),
        lambda: RewardScorer(
            encoder_decoder(
                BartConfig,
                BartForSequenceClassification,
                encoder_layers=3,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
            )
        ),
        lambda: RewardScorer(
            encoder_decoder(
                T5Config,
                T5ForSequenceClassification,
                num_layers=2,
                num_decoder_layers=3,
                num_heads=4,
                d_kv=8,
                d_ff=48,
            )
        ),
    ],
    ids=["head", "Bart", "T5"],
)
def test_flops_of_whole_sequences_are_those_that_torch_counts(build_scorer):
    scorer = build_scorer()
    scorer.model.set_attn_implementation("eager")
    session, responses = scorer.start_session([[7] * 20], 30), torch.full((1, 30), 9)
    with FlopCounterMode(display=False) as counter:
        session.score_responses(torch.tensor([0]), responses, torch.tensor([30]))
    (flops,) = session.meters[0].totals()[2].tolist()
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_quantised_layers_count_as_what_they_stand_for():
    class Packed(torch.nn.Linear):
        """Two weights in a byte, as of bitsandbytes."""

        def __init__(self, inputs, outputs):
            super().__init__(inputs, outputs, device="meta")
            self.weight = torch.nn.Parameter(
                torch.empty(inputs * outputs // 2, 1, dtype=torch.uint8), requires_grad=False
            )

    assert weights_used(torch.nn.Sequential(Packed(32, 48), torch.nn.ReLU())) == 32 * 48


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantisation_by_torch_does_not_change_the_counted_weights():
    model = torch.ao.quantization.quantize_dynamic(llama(), {torch.nn.Linear}, dtype=torch.qint8)
    plain = Architecture.of(llama().model, llama().lm_head)
    assert Architecture.of(model.model, model.lm_head) == plain

"""Counted FLOPs against torch's own counter, and counts against arithmetic."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sia import EntropyGate, EveryToken, Steering, generate
from sia.cost import Architecture, Cost, Meter, _keys_seen, attention_windows
from tests.helpers import tiny

TOKENIZER = tiny.tokenizer()


def measured(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma2"])
def test_flops_of_decoding_are_those_that_torch_counts(family):
    """From a prompt of one token every product of the cached loop is needed, so that both must agree exactly.

    torch does not see products inside attention on CPU unless it is eager.
    """
    model, values = tiny.language_model(family), tiny.value_model(family)
    model.set_attn_implementation("eager")
    values.backbone.set_attn_implementation("eager")
    generations = []
    options = {"max_new_tokens": 7, "progress": False}  # as long as the window of gemma2 plus one
    total = measured(lambda: generations.extend(generate(model, TOKENIZER, [[7]], **options)))
    assert generations[0].cost.model_flops == pytest.approx(total, rel=0.01)
    assert generations[0].cost.value_flops == 0
    if family == "gemma2":
        return  # masked keys of the window are computed by torch's attention
    generations.clear()
    total = measured(
        lambda: generations.extend(
            generate(model, TOKENIZER, [[7]], Steering(values, EveryToken()), **options)
        )
    )
    cost = generations[0].cost
    # a candidate's products with its siblings are computed and masked
    length = len(generations[0].token_ids)
    architecture = Architecture.of(values.backbone, values.head.weight)
    siblings = length * 10 * 9 * architecture.attention[0][1]
    fresh_see_candidates = length * 10 * architecture.attention[0][1]
    assert cost.model_flops + cost.value_flops + siblings + fresh_see_candidates == pytest.approx(
        total, rel=0.01
    )


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
    rows = torch.tensor([0, 2])
    meter.count(
        rows, torch.tensor([1, 2]), torch.tensor([0, 3]), torch.tensor([5, 6]), torch.tensor([1, 0])
    )
    meter.count_branches(rows[1:], torch.tensor([[7, 2]]))
    expected = [5 * 10 + 3 + 2 * 15 + 14, 0.0, 3 * 10 + 2 * 15 + 12 + 2 * 13 + 2 * 9 + 4 + 2]
    for _ in range(2):  # reading twice counts once
        forwards, tokens, flops = meter.totals()
        assert forwards.tolist() == [1, 0, 2]
        assert tokens.tolist() == [5, 0, 5]
        assert flops.tolist() == expected


def test_costs_add():
    assert Cost(1, 2, 3, 4, 5, 6.0, 7.0) + Cost(1, 1, 1, 1, 1, 1.0, 1.0) == Cost(
        2, 3, 4, 5, 6, 7.0, 8.0
    )


def test_junctions_are_counted_and_value_flops_grow_with_them():
    model, values, prompts = (
        tiny.language_model("qwen3"),
        tiny.value_model("qwen3"),
        tiny.prompts(10),
    )
    some = generate(
        model,
        TOKENIZER,
        prompts,
        Steering(values, EntropyGate(2.05), 0.0),
        max_new_tokens=12,
        progress=False,
    )
    every = generate(
        model,
        TOKENIZER,
        prompts,
        Steering(values, EveryToken(), 0.0),
        max_new_tokens=12,
        progress=False,
    )
    for a, b in zip(some, every, strict=True):
        assert a.cost.junctions == a.steered.sum() == a.cost.value_forwards
        assert b.cost.junctions == len(b.token_ids)
        assert a.cost.value_flops <= b.cost.value_flops
        assert a.cost.model_flops == b.cost.model_flops
    assert sum(g.cost.value_flops for g in some) < 0.8 * sum(g.cost.value_flops for g in every)


def test_layers_without_keys_are_refused():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, layer_types=["linear_attention", "full_attention"], mlp_only_layers=[0, 1],
    )  # fmt: skip
    with pytest.raises(
        ValueError,
        match="layers of full or sliding-window attention only, Qwen3NextForCausalLM has LinearAttention",
    ):
        attention_windows(Qwen3NextForCausalLM(config))

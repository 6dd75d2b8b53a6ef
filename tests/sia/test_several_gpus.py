"""Models whose layers lie on two GPUs, emulated ones, as `device_map="auto"` spreads them."""

import pytest
import torch
from torch.utils import _pytree as pytree

from benchmarks.subjects.scoring import sequence_log_likelihoods, trajectory_rewards
from sia import (
    EntropyGate,
    JunctionGate,
    RewardScorer,
    Steering,
    best_of_n,
    generate,
    log_likelihoods,
)
from sia._kv_cache import backbone_of
from tests.helpers import tiny
from tests.helpers.emulated_cuda import emulated_cuda, to_gpu

TOKENIZER, PROMPTS = tiny.tokenizer(), tiny.prompts(3)
OPTIONS = {"max_new_tokens": 4, "progress": False}


def moved(tree, gpu: int):
    device = torch.device("cuda", gpu)
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)


def spread(model):
    """Put the last layer, and what follows, on the second GPU.

    Inputs of modules there, and outputs of the whole model, move as accelerate's hooks move them.
    """
    backbone = backbone_of(model)
    backbone.config._attn_implementation = "eager"
    to_gpu(model)
    further = [backbone.layers[-1], backbone.norm]
    further += [module for name, module in model.named_children() if name == "score"]
    for module in further:
        to_gpu(module, 1).register_forward_pre_hook(
            lambda _, args, options: (moved(args, 1), moved(options, 1)), with_kwargs=True
        )
    if head := model.get_output_embeddings():  # tied to the first layer's
        forward = head.forward  # where accelerate moves inputs: hooks see them as they come
        head.forward = lambda hidden: forward(moved(hidden, 0))
    return model


def models(move):
    reward = RewardScorer(tiny.reward_model("qwen3"), tiny.EOS)
    move(reward.model)
    values = tiny.value_model("qwen3")
    move(values.backbone)
    return move(tiny.language_model("qwen3")), values, reward


def outcomes(model, values, reward):
    gate = EntropyGate(0.5) & JunctionGate(0.05, tiny.predictor())
    steered = [
        generate(model, TOKENIZER, PROMPTS, Steering(scorer, gate, 2.0), **OPTIONS)
        for scorer in (values, reward, tiny.q_head())  # the Q-head remains on the CPU
    ]
    best = best_of_n(model, TOKENIZER, PROMPTS, reward, n=2, **OPTIONS)
    every = Steering(values, gate, candidates=tiny.VOCABULARY)
    likelihoods = log_likelihoods(model, every, PROMPTS, PROMPTS)
    numbers = [
        *(likelihood.total for likelihood in likelihoods),
        *trajectory_rewards(reward.model, PROMPTS),
        *sequence_log_likelihoods(model, PROMPTS, [1, 1, 1]),
    ]
    return [*map(tiny.tokens, [*steered, best])], numbers


def test_models_on_two_gpus_do_what_they_do_on_one():
    tokens, numbers = outcomes(*models(lambda model: model))
    with emulated_cuda():
        model, values, reward = models(spread)
        to_gpu(values.head)
        assert {p.device.index for p in model.parameters()} == {0, 1}
        assert outcomes(model, values, reward) == (tokens, pytest.approx(numbers, abs=1e-4))

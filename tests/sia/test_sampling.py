"""Noise that depends on seed, prompt, step and token alone."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sia import _sampling


def test_keyed_noise_is_gumbel_and_independent():
    keys = _sampling.prompt_keys([[i] for i in range(200)], [0] * 200)
    tokens = torch.arange(50).expand(200, 50)
    noise = torch.stack([_sampling.gumbel(keys, step, tokens) for step in range(10)]).numpy()
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > 0.001
    for axis in range(3):  # steps, prompts, tokens
        other = np.roll(noise, 1, axis=axis)
        assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.02


def test_noise_depends_on_seed_prompt_step_and_token_alone():
    def noise(prompt, seed, step, token, others=()):
        keys = _sampling.prompt_keys([prompt, *others], [seed] * (1 + len(others)))
        return _sampling.gumbel(keys, step, torch.tensor([[token]] * len(keys)))[0].item()

    usual = noise([7, 8], 1, 2, 3)
    assert usual == noise([7, 8], 1, 2, 3, others=[[1, 2, 3, 4], [9]])
    different = {
        noise([7, 8], 2, 2, 3),
        noise([8, 7], 1, 2, 3),
        noise([7, 8, 0], 1, 2, 3),
        noise([7, 8], 1, 3, 3),
        noise([7, 8], 1, 2, 4),
    }
    assert len({usual, *different}) == 6
    assert noise([7, 8], -1, 0, 0) != noise([7, 8], 2**63, 0, 0)


INTEGERS = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(INTEGERS, min_size=1, max_size=9), INTEGERS)
def test_mixing_is_that_of_plain_integers(keys, value):
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def plain(key):
        x = ((key & mask) ^ (value & mask) * golden & mask) + golden & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        x ^= x >> 31
        return x - 2**64 if x >= 2**63 else x

    tensor = torch.tensor(keys)
    mixed = [_sampling.mix(tensor, other).tolist() for other in (value, torch.tensor([value]))]
    assert mixed == [[plain(key) for key in keys]] * 2
    assert tensor.tolist() == keys  # nothing is changed in place


def test_gumbel_max_samples_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -math.inf]]).expand(20_000, 4)
    keys = _sampling.prompt_keys([[i] for i in range(20_000)], [0] * 20_000)
    noise = _sampling.gumbel(keys, 0, torch.arange(4).expand(20_000, 4))
    for temperature in (1.0, 0.5):
        counts = torch.bincount(_sampling.choose(logits, noise, temperature), minlength=4).numpy()
        expected = (logits[0].double() / temperature).softmax(0).numpy() * 20_000
        assert counts[3] == expected[3] == 0
        assert stats.chisquare(counts[:3], expected[:3]).pvalue > 0.001
    assert _sampling.choose(logits, noise, 0.0).eq(0).all()
    for temperature in (1e-30, 1e-300, 5e-324):  # all but greedy, as it is for every smaller one
        assert _sampling.choose(logits.roll(1, 1), noise, temperature).eq(1).all()


@given(st.lists(st.integers(0, 2), min_size=3, max_size=8), st.integers(1, 3))
def test_the_greedy_token_is_a_candidate_whatever_is_tied(levels, count):
    logits = torch.tensor([levels, levels[::-1]], dtype=torch.float32)
    highest, tokens = _sampling.top_candidates(logits, count)
    assert torch.equal(logits.gather(1, tokens), highest)
    assert torch.equal(highest, logits.sort(1, descending=True).values[:, :count])
    assert all(len(set(row)) == count for row in tokens.tolist())
    assert torch.equal(_sampling.greedy_token(highest, tokens), logits.argmax(1))

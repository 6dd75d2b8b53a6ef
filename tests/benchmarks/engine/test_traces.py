"""Values of candidates along responses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.engine import traces
from sia import generate
from sia.signals import PredictedDivergence
from sia.steering import kl_divergence, tilt
from tests.helpers import tiny
from tests.helpers.reference import whole_values


def test_candidates_of_a_response_are_valued_as_whole_sequences_are():
    model, values = tiny.language_model("llama"), tiny.value_model("llama")
    prompts = tiny.prompts(3)
    responses = generate(model, tiny.tokenizer(), prompts, max_new_tokens=7, progress=False)
    logits, candidates, _ = traces.candidate_states(model, prompts, responses, 5)
    scores = traces.candidate_values(values, prompts, responses, candidates)
    for i, response in enumerate(responses):
        tokens = response.token_ids.tolist()
        assert logits[i].shape == candidates[i].shape == scores[i].shape == (len(tokens), 5)
        expected = [
            whole_values(values, [*prompts[i], *tokens[:step]], branches)
            for step, branches in enumerate(candidates[i].tolist())
        ]
        np.testing.assert_allclose(scores[i], expected, atol=2e-5)
    # and the divergence of a trace is the regret of leaving such a step alone
    assert (kl_divergence(logits[0], tilt(logits[0], scores[0], 1.0)) >= 0).all()


def test_the_sampled_token_is_a_candidate_despite_rounding():
    model, prompts = tiny.language_model("llama"), tiny.prompts(1)
    responses = generate(model, tiny.tokenizer(), prompts, max_new_tokens=7, progress=False)
    usual, best, _ = traces.candidate_states(model, prompts, responses, 5)
    (response,) = responses
    tokens = best[0].numpy()
    unlikely = np.array([[i for i in range(tiny.VOCABULARY) if i not in row][:2] for row in tokens])
    base_token = response.base_token.copy()
    base_token[0] = unlikely[0, 0]
    token_ids = response.token_ids.copy()
    token_ids[0], token_ids[-1] = unlikely[0, 1], unlikely[-1, 0]
    taken = replace(response, token_ids=token_ids, base_token=base_token)
    (logits,), (candidates,), _ = traces.candidate_states(model, prompts, [taken], 5)
    assert (candidates == taken.token_ids[:, None]).any(1).all()
    assert (candidates == taken.base_token[:, None]).any(1).all()
    assert candidates[0].tolist()[:3] == tokens[0].tolist()[:3]  # the least likely made room
    assert (logits.diff(dim=1) <= 0).all()
    assert logits[0, :3].tolist() == usual[0][0, :3].tolist()


def test_hidden_states_are_those_that_decoding_reads():
    model, prompts = tiny.language_model("llama"), tiny.prompts(3)
    predictor = tiny.predictor(model)
    observe = [PredictedDivergence(predictor)]
    responses = tiny.generate(model, prompts, max_new_tokens=7, observe=observe)
    *_, hidden = traces.candidate_states(model, prompts, responses, 5)
    for response, states in zip(responses, hidden, strict=True):
        predicted = predictor.predict(states)
        np.testing.assert_allclose(predicted, response.signal(*observe), rtol=1e-4)


def test_the_probability_of_a_shift_is_how_often_the_same_noise_gives_another_token():
    generator = torch.Generator().manual_seed(0)
    logits, steered = torch.randn(2, 4, 5, generator=generator) * 1.5
    noise = -torch.rand(200_000, 1, 5, generator=generator).log_().neg_().log_()
    shifted = (logits + noise).argmax(-1) != (steered + noise).argmax(-1)
    expected = traces.shift_probability(logits, steered)
    np.testing.assert_allclose(shifted.float().mean(0), expected, atol=0.005)
    assert traces.shift_probability(logits, logits + 3).tolist() == pytest.approx([0] * 4, abs=1e-6)

"""Values of candidates along responses."""

from dataclasses import replace

import numpy as np

from benchmarks.engine import traces
from sia import generate
from sia.steering import kl_divergence, tilt
from tests.helpers import tiny
from tests.helpers.reference import whole_values


def test_candidates_of_a_response_are_valued_as_whole_sequences_are():
    model, values = tiny.language_model("llama"), tiny.value_model("llama")
    prompts = tiny.prompts(3)
    responses = generate(model, tiny.tokenizer(), prompts, max_new_tokens=7, progress=False)
    logits, candidates = traces.candidate_logits(model, prompts, responses, 5)
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


def test_what_was_taken_is_a_candidate_whatever_rounding_makes_of_it():
    model, prompts = tiny.language_model("llama"), tiny.prompts(1)
    responses = generate(model, tiny.tokenizer(), prompts, max_new_tokens=7, progress=False)
    usual, best = traces.candidate_logits(model, prompts, responses, 5)
    (response,) = responses
    tokens = best[0].numpy()
    unlikely = np.array([[i for i in range(tiny.VOCABULARY) if i not in row][:2] for row in tokens])
    base_token = response.base_token.copy()
    base_token[0] = unlikely[0, 0]
    token_ids = response.token_ids.copy()
    token_ids[0], token_ids[-1] = unlikely[0, 1], unlikely[-1, 0]
    taken = replace(response, token_ids=token_ids, base_token=base_token)
    (logits,), (candidates,) = traces.candidate_logits(model, prompts, [taken], 5)
    assert (candidates == taken.token_ids[:, None]).any(1).all()
    assert (candidates == taken.base_token[:, None]).any(1).all()
    assert candidates[0].tolist()[:3] == tokens[0].tolist()[:3]  # the least likely made room
    assert (logits.diff(dim=1) <= 0).all()
    assert logits[0, :3].tolist() == usual[0][0, :3].tolist()

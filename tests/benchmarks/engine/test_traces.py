"""Values of candidates along responses."""

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

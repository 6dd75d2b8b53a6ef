"""Quality of the lab's models."""

import numpy as np
import torch

from benchmarks.subjects.lab.quality import token_values
from tests.helpers import tiny


def test_values_of_a_batch_of_responses_are_those_of_each_alone():
    model, prompts = tiny.value_model("qwen3"), tiny.prompts(4)
    responses = [[5, 6, 7], [8], [9, 5, 6, 7, 8, 9, 5], [6, 6]]
    batch = token_values(model, prompts, responses)
    for prompt, response, values in zip(prompts, responses, batch, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([[*prompt, *response]]))[0, len(prompt) :]
        np.testing.assert_allclose(values, alone, atol=1e-5)

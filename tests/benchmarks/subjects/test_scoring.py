"""Rewards of whole conversations."""

import pytest

from benchmarks.subjects.scoring import trajectory_rewards
from tests.helpers import tiny


def test_conversations_that_are_longer_than_the_positions_are_refused():
    model = tiny.reward_model("gpt2")
    assert trajectory_rewards(model, [[7] * 128]).shape == (1,)
    with pytest.raises(ValueError, match=r"must fit into the 128 positions of GPT2.* may take 129"):
        trajectory_rewards(model, [[7], [7] * 129])

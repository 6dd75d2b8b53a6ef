"""Scorers against whole sequences, one at a time: reward models, rollouts, and prompts shared among samples."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
    MptConfig,
    MptForSequenceClassification,
)

from sia import (
    AutoregressiveScorer,
    EveryToken,
    RewardScorer,
    RolloutScorer,
    Steering,
    ValueModel,
    generate,
)
from sia._prefix_cache import PASS_OVERHEAD, _cheapest, supports_tree_attention
from sia.scorers.reward import CachedRewards, WholeRewards
from tests.helpers import tiny
from tests.helpers.reference import whole_rewards, whole_values

TOKENIZER = tiny.tokenizer()


def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = BertConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            num_labels=1, initializer_range=0.5, eos_token_id=tiny.EOS,
        )  # fmt: skip
        return BertForSequenceClassification(config).eval()


def ask(session, whole, prompts, responses):
    """The largest error of candidates' values over rows that are asked at different times, EOS among the candidates."""
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for step in range(responses.shape[1]):
        rows = (torch.rand(len(prompts), generator=generator) < 0.5).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        candidates = torch.randint(3, tiny.VOCABULARY, (len(rows), 5), generator=generator)
        candidates[:, 2] = tiny.EOS
        values = session.score(rows, responses[rows, :step], candidates)
        assert values.dtype == torch.float32
        for row, tokens, found in zip(rows.tolist(), candidates.tolist(), values, strict=True):
            expected = whole([*prompts[row], *responses[row, :step].tolist()], tokens)
            worst = max(worst, (expected - found).abs().max().item())
    return worst


@torch.no_grad()
def whole_log_probabilities(model, prefix, candidates):
    return model(input_ids=torch.tensor([prefix])).logits[0, -1].log_softmax(-1)[candidates]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("samples", [1, 3])
def test_autoregressive_rewards_are_log_probabilities(family, samples):
    prompts, model = tiny.prompts(3, seed=2), tiny.language_model(family, seed=3)
    rows = [prompt for prompt in prompts for _ in range(samples)]
    responses = torch.randint(
        3, tiny.VOCABULARY, (len(rows), 9), generator=torch.Generator().manual_seed(0)
    )
    session = AutoregressiveScorer(model).start_session(prompts, 9, samples)
    assert ask(session, lambda *a: whole_log_probabilities(model, *a), rows, responses) < 2e-5
    # a whole response is worth the sum over its tokens; asked again when some have gone on, and after rows have changed places
    session, order = (
        AutoregressiveScorer(model).start_session(prompts, 9, samples),
        torch.arange(len(rows)),
    )
    for lengths in (torch.full((len(rows),), 2), torch.arange(len(rows)) % 5 + 3):
        found = session.score_responses(order, responses[:, : lengths.max()], lengths)
        for row, (prompt, response, n) in enumerate(
            zip(rows, responses.tolist(), lengths.tolist(), strict=True)
        ):
            steps = [
                whole_log_probabilities(model, [*prompt, *response[:t]], [response[t]])
                for t in range(n)
            ]
            torch.testing.assert_close(found[row], torch.cat(steps).sum(), atol=1e-4, rtol=1e-5)
    if samples > 1:
        sources = torch.arange(len(rows)) // samples * samples
        session.reorder(sources)
        moved = session.score_responses(
            order, responses[sources][:, :9], torch.full((len(rows),), 9)
        )
        torch.testing.assert_close(moved, moved[sources], atol=1e-4, rtol=1e-5)


def test_steering_by_an_autoregressive_reward_multiplies_the_policies():
    """GenARM: π·π_r^β over the candidates, at every token."""
    model, reward, prompts = (
        tiny.language_model("qwen3"),
        tiny.language_model("qwen3", seed=9),
        tiny.prompts(4, seed=5),
    )
    steering = Steering(AutoregressiveScorer(reward), EveryToken(), beta=0.7, candidates=6)
    for prompt, found in zip(
        prompts,
        generate(model, TOKENIZER, prompts, steering, max_new_tokens=5, progress=False),
        strict=True,
    ):
        for step in range(len(found.token_ids)):
            prefix = [*prompt, *found.token_ids[:step].tolist()]
            base, candidates = (
                model(input_ids=torch.tensor([prefix])).logits[0, -1].detach().topk(6)
            )
            product = (
                base.softmax(-1) * whole_log_probabilities(reward, prefix, candidates).exp() ** 0.7
            )
            product = product / product.sum()
            expected = (product * (product.log() - base.log_softmax(-1))).sum()
            assert found.kl[step] == pytest.approx(expected.item(), abs=1e-4)
        assert found.cost.value_forwards == len(found.token_ids)
        assert found.cost.value_tokens == found.cost.model_tokens


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60))
def test_rows_are_computed_together_where_padding_costs_less_than_another_pass(tokens):
    tokens = sorted(tokens)
    stretches = _cheapest(torch.tensor(tokens))
    assert [place for start, end in stretches for place in range(start, end)] == list(
        range(len(tokens))
    )

    def cost(*parts):
        return sum((end - start) * tokens[end - 1] + PASS_OVERHEAD for start, end in parts)

    assert cost(*stretches) <= cost((0, len(tokens)))
    for start, end in stretches:  # no further split pays
        assert all(
            cost((start, end)) <= cost((start, middle), (middle, end))
            for middle in range(start + 1, end)
        )


@pytest.mark.parametrize(
    "make", [tiny.value_model, lambda family: RewardScorer(tiny.reward_model(family))]
)
def test_groups_of_rows_get_the_same_values(make, monkeypatch):
    """Rows that lag differently, computed one by one, by threes and all together."""
    prompts, scorer = tiny.prompts(9, seed=6), make("qwen3")
    responses = torch.randint(
        3, tiny.VOCABULARY, (9, 12), generator=torch.Generator().manual_seed(0)
    )
    found = {}
    for overhead in (-1, 20, 10**9):
        monkeypatch.setattr("sia._prefix_cache.PASS_OVERHEAD", overhead)
        session, values = scorer.start_session(prompts, 12), []
        for step, rows in ((2, [0, 3, 4]), (6, [1, 4, 8]), (11, list(range(9)))):
            rows = torch.tensor(rows)
            candidates = torch.randint(
                3, tiny.VOCABULARY, (len(rows), 4), generator=torch.Generator().manual_seed(step)
            )
            groups = session.prefixes.group_by_lag(rows, torch.full_like(rows, step), 4)
            assert torch.cat(groups).sort().values.tolist() == list(range(len(rows)))
            assert all(group.tolist() == sorted(group.tolist()) for group in groups)
            values.append(session.score(rows, responses[rows, :step], candidates))
        found[overhead] = (
            torch.cat([v.flatten() for v in values]),
            len(groups),
            [m.totals()[1].tolist() for m in session.meters],
        )
    assert found[-1][1] > found[20][1] > found[10**9][1] == 1
    for overhead in (-1, 20):
        torch.testing.assert_close(found[overhead][0], found[10**9][0], atol=2e-5, rtol=1e-5)
        assert found[overhead][2] == found[10**9][2]  # what is counted does not depend on it


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("samples", [1, 3])
def test_values_and_rewards_equal_those_of_whole_sequences(family, samples):
    prompts = tiny.prompts(3, seed=2)
    rows = [prompt for prompt in prompts for _ in range(samples)]
    responses = torch.randint(
        3, tiny.VOCABULARY, (len(rows), 9), generator=torch.Generator().manual_seed(0)
    )
    values = tiny.value_model(family)
    assert (
        ask(
            values.start_session(prompts, 9, samples),
            lambda *a: whole_values(values, *a),
            rows,
            responses,
        )
        < 2e-5
    )
    model = tiny.reward_model(family)
    session = RewardScorer(model).start_session(prompts, 9, samples)
    assert isinstance(session, CachedRewards)
    assert ask(session, lambda *a: whole_rewards(model, *a), rows, responses) < 2e-5


def test_a_reward_model_that_is_no_decoder_reads_whole_sequences():
    model, prompts = encoder(), tiny.prompts(4, seed=3)
    responses = torch.randint(
        3, tiny.VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0)
    )
    session = RewardScorer(model).start_session(prompts, 6)
    assert isinstance(session, WholeRewards)
    assert ask(session, lambda *a: whole_rewards(model, *a), prompts, responses) < 1e-5


@pytest.mark.parametrize("make", [
    lambda: BloomForSequenceClassification(BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.5)),
    lambda: MptForSequenceClassification(MptConfig(vocab_size=60, d_model=16, n_layers=2, n_heads=2, initializer_range=0.5)),
])  # fmt: skip
def test_decoders_that_do_not_follow_masks_read_whole_sequences(make):
    """ALiBi counts distances by columns, which branches would get wrong."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    model.config.num_labels, model.config.eos_token_id, model.config.pad_token_id = 1, tiny.EOS, 0
    model.score, model.num_labels = torch.nn.Linear(16, 1, bias=False), 1
    session, prompts = RewardScorer(model).start_session([[7, 8, 9]], 4), [[7, 8, 9]]
    assert isinstance(session, WholeRewards)
    responses = torch.randint(
        3, tiny.VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(0)
    )
    assert ask(session, lambda *a: whole_rewards(model, *a), prompts, responses) < 1e-5
    values = ValueModel.from_backbone(model)
    torch.nn.init.ones_(values.head.weight)
    with pytest.raises(
        ValueError, match="does not follow prepared masks: its prefixes cannot be cached"
    ):
        values.start_session(prompts, 4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_trial_of_masks_passes_where_they_are_followed(family, monkeypatch):
    monkeypatch.setattr("sia._prefix_cache.VERIFIED_MODEL_TYPES", ())
    values = tiny.value_model(family)
    assert supports_tree_attention(
        values.backbone, lambda *, last, **inputs: values(**inputs)[:, -last:]
    )


def test_cached_and_whole_rewards_agree_and_every_row_is_rated_as_it_stands():
    model, prompts = tiny.reward_model("llama"), tiny.prompts(5, seed=4)
    scorer = RewardScorer(model)
    responses = torch.randint(
        3, tiny.VOCABULARY, (5, 8), generator=torch.Generator().manual_seed(0)
    )
    responses[1, 3] = tiny.EOS
    cached, whole = CachedRewards(scorer, prompts, 8, 1), WholeRewards(scorer, prompts, 8, 1)
    rows = torch.arange(5)
    for lengths in (
        [2, 2, 3, 1, 2],
        [5, 4, 4, 6, 3],
        [8, 4, 8, 8, 8],
    ):  # asked again later, when all but row 1 have gone on
        lengths = torch.tensor(lengths)
        found = cached.score_responses(rows, responses[:, : lengths.max()], lengths)
        expected = [
            whole_rewards(model, [*prompt, *response[: n - 1]], [response[n - 1]])[0]
            for prompt, response, n in zip(
                prompts, responses.tolist(), lengths.tolist(), strict=True
            )
        ]
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            whole.score_responses(rows, responses[:, : lengths.max()], lengths),
            found,
            atol=1e-5,
            rtol=1e-5,
        )


def test_value_models_rate_the_last_token():
    model, prompts = tiny.value_model("qwen3"), tiny.prompts(3)
    responses = torch.randint(
        3, tiny.VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0)
    )
    session = model.start_session(prompts, 6)
    for lengths in ([1, 2, 3], [1, 4, 6]):  # the first row has nothing new
        found = session.score_responses(
            torch.arange(3), responses[:, : max(lengths)], torch.tensor(lengths)
        )
        expected = [
            model(torch.tensor([[*p, *r[:n]]]))[0, -1]
            for p, r, n in zip(prompts, responses.tolist(), lengths, strict=True)
        ]
        torch.testing.assert_close(found, torch.stack(expected).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "make", [tiny.value_model, lambda family: RewardScorer(tiny.reward_model(family))]
)
def test_rows_go_on_from_others(make):
    scorer, prompts = make("gemma3"), tiny.prompts(2, seed=1)
    rows = [prompt for prompt in prompts for _ in range(2)]
    responses = torch.randint(
        3, tiny.VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0)
    )
    session, fresh = scorer.start_session(prompts, 8, 2), scorer.start_session(rows, 8)
    everyone, four = torch.arange(4), torch.full((4,), 4)
    session.score_responses(everyone, responses[:, :4], four)
    sources = torch.tensor([1, 1, 2, 2])
    responses[:, :4] = responses[sources, :4]
    session.reorder(sources)
    candidates = torch.randint(
        3, tiny.VOCABULARY, (4, 3), generator=torch.Generator().manual_seed(1)
    )
    found = session.score(everyone, responses[:, :6], candidates)
    torch.testing.assert_close(
        found, fresh.score(everyone, responses[:, :6], candidates), atol=1e-5, rtol=1e-5
    )


def test_samples_of_a_prompt_compute_it_once():
    model, prompts = tiny.value_model("qwen3"), [[7, 8, 9, 10, 11], [12]]
    session = model.start_session(prompts, 4, samples=3)
    rows, nothing = torch.arange(6), torch.zeros(6, 0, dtype=torch.int64)
    session.score(rows, nothing, torch.full((6, 2), 20))
    forwards, tokens, flops = session.meters[0].totals()
    assert forwards.tolist() == [
        2,
        1,
        1,
        2,
        1,
        1,
    ]  # the prompt but its last token, then the candidates
    assert tokens.tolist() == [5 + 2, 1 + 2, 1 + 2, 1 + 2, 1 + 2, 1 + 2]
    assert flops[1] < flops[0]


def test_reward_models_load_from_a_folder(tmp_path):
    model = tiny.reward_model("llama")
    model.save_pretrained(tmp_path / "reward")
    loaded = RewardScorer.from_pretrained(tmp_path / "reward")
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight), name
    tiny.language_model("llama").save_pretrained(tmp_path / "language")
    with pytest.raises(
        ValueError,
        match=r"is no reward model: expected all weights of LlamaForSequenceClassification, score.weight missing",
    ):
        RewardScorer.from_pretrained(tmp_path / "language", num_labels=1)
    with pytest.raises(
        FileNotFoundError,
        match=r"no reward model in .*nowhere: there is no such folder, and a Hub id has the form",
    ):
        RewardScorer.from_pretrained(tmp_path / "nowhere")
    weights = tmp_path / "reward" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(
        ValueError, match=r"the reward model .* cannot be read, a file is damaged or truncated"
    ):
        RewardScorer.from_pretrained(tmp_path / "reward")


REWARD = RewardScorer(tiny.reward_model("qwen3"))
MODEL = tiny.language_model("qwen3")


def without_eos(labels=1):
    model = tiny.reward_model("qwen3")
    model.config.eos_token_id, model.config.num_labels = None, labels
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RewardScorer(without_eos()), "a reward model needs one eos_token_id, its config has None: name it as eos_token_id"),
        (lambda: RewardScorer(without_eos(3)), "a reward model must have one label, Qwen3ForSequenceClassification has 3"),
        (lambda: RewardScorer(REWARD.model, eos_token_id=60), "eos_token_id must be below the vocabulary of 60 tokens, got 60"),
        (lambda: RolloutScorer(MODEL, REWARD.model, 2),
         "reward must be a RewardScorer or a ValueModel, got Qwen3ForSequenceClassification"),
        (lambda: RolloutScorer(MODEL, REWARD, 0), "a rollout must have at least 1 token, got 0"),
        (lambda: RolloutScorer(MODEL, REWARD, 2, temperature=-1), "temperature must be 0 (greedy) or a finite number above it, got -1"),
        (lambda: RolloutScorer(MODEL, REWARD, 2, candidates=61),
         "candidates must be 1 to 60, the vocabulary of the rollouts' model, got 61"),
        (lambda: RolloutScorer(MODEL, RewardScorer(tiny.reward_model("qwen3", vocabulary=70)), 2),
         "rollouts and reward must share a vocabulary: the model has 60 tokens, the reward 70"),
    ],
)  # fmt: skip
def test_scorers_refuse_what_they_cannot_mean(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value) == message


def test_attention_that_ignores_masks_is_refused():
    values = tiny.value_model("qwen3")
    values.backbone.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError,
        match="scoring candidates needs attn_implementation sdpa or eager, got flash_attention_2",
    ):
        generate(MODEL, TOKENIZER, [[7]], Steering(values, EveryToken()), progress=False)


def test_eager_and_sdpa_backbones_give_the_same_values():
    values, prompts = tiny.value_model("qwen3"), tiny.prompts(4)
    eager = copy.deepcopy(values)
    eager.backbone.set_attn_implementation("eager")
    options = {"max_new_tokens": 8, "progress": False}
    a, b = (
        generate(MODEL, TOKENIZER, prompts, Steering(v, EveryToken(), 2.0), **options)
        for v in (values, eager)
    )
    assert [g.token_ids.tolist() for g in a] == [g.token_ids.tolist() for g in b]


@pytest.mark.parametrize("caches", [True, False])
def test_other_end_tokens_are_read_as_the_reward_models_own(monkeypatch, caches):
    """A base model and a chat's reward model end in different tokens: both ways a response is worth the same."""
    monkeypatch.setattr(RewardScorer, "supports_caching", property(lambda self: caches))
    model, stop = tiny.reward_model("qwen3"), 5
    plain, told = RewardScorer(model), RewardScorer(model, stop_tokens=[stop])
    rows, said = torch.arange(2), torch.tensor([[7, 8], [9, 7]])
    sessions = [scorer.start_session([[10, 11], [12]], 6) for scorer in (plain, told)]
    expected, found = (
        session.score(rows, said, torch.tensor([[end, 20, 21]] * 2))
        for session, end in zip(sessions, (tiny.EOS, stop), strict=True)
    )
    torch.testing.assert_close(found, expected)
    ended = torch.tensor([[7, 8, 9], [9, 7, 0]])
    lengths = torch.tensor([3, 2])
    for end, session in zip((tiny.EOS, stop), sessions, strict=True):
        closed = torch.cat([ended, ended[:, -1:]], 1)
        closed[0, 3], closed[1, 2] = end, end
        rates = session.score_responses(rows, closed, lengths + 1)
        expected_rates = plain.start_session([[10, 11], [12]], 6).score_responses(
            rows, ended, lengths
        )
        torch.testing.assert_close(rates, expected_rates, atol=1e-5, rtol=1e-5)

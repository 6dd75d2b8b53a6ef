"""Rewards of candidates and of responses against whole sequences, read one at a time."""

import copy
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
    MptConfig,
    MptForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from benchmarks.subjects.hub.models import chat_ids
from benchmarks.subjects.scoring import trajectory_rewards
from sia import (
    AutoregressiveScorer,
    EveryToken,
    RewardScorer,
    RolloutScorer,
    SteeredGenerate,
    Steering,
    ValueModel,
    best_of_n,
    closing_tokens,
    generate,
)
from sia._prefix_cache import PASS_OVERHEAD, _cheapest, supports_tree_attention
from sia.scorers.closed import CachedRewardSession, WholeSequenceSession
from tests.helpers import hub_folders, tiny
from tests.helpers.architectures import build
from tests.helpers.reference import whole_rewards, whole_values

MODEL = tiny.language_model("qwen3")
REWARD = RewardScorer(tiny.reward_model("qwen3"))
VOCABULARY = len(hub_folders.tokenizer())
WIDE = tiny.language_model("qwen3", vocabulary=VOCABULARY)
BUILD_SCORER = pytest.mark.parametrize(
    "build_scorer", [tiny.value_model, lambda family: RewardScorer(tiny.reward_model(family))]
)


def assert_close(values, expected):
    torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-5)


def assert_scores_are_whole(session, whole, prompts, responses):
    """Compare candidates' values, of rows scored at different times and EOS among them.

    Args:
        whole: Gives the values of candidates from whole sequences: (prefix, candidates) → values.
    """
    generator = torch.Generator().manual_seed(1)
    for step in range(responses.shape[1]):
        rows = (torch.rand(len(prompts), generator=generator) < 0.5).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        candidates = torch.randint(3, tiny.VOCABULARY, (len(rows), 5), generator=generator)
        candidates[:, 2] = tiny.EOS
        expected = [
            whole([*prompts[row], *responses[row, :step].tolist()], tokens)
            for row, tokens in zip(rows.tolist(), candidates.tolist(), strict=True)
        ]
        assert_close(session.score(rows, responses[rows, :step], candidates), torch.stack(expected))


@torch.no_grad()
def whole_log_probabilities(model, prefix, candidates):
    return model(input_ids=torch.tensor([prefix])).logits[0, -1].log_softmax(-1)[candidates]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("samples", [1, 3])
def test_autoregressive_rewards_are_log_probabilities(family, samples):
    prompts, model = tiny.prompts(3, seed=2), tiny.language_model(family, seed=3)
    rows = [prompt for prompt in prompts for _ in range(samples)]
    responses, order = tiny.random_tokens(len(rows), 9), torch.arange(len(rows))
    scorer = AutoregressiveScorer(model)
    session = scorer.start_session(prompts, 9, samples)
    assert_scores_are_whole(session, lambda *a: whole_log_probabilities(model, *a), rows, responses)
    # a response is worth the sum over its tokens, also when scored again after some have gone on
    session = scorer.start_session(prompts, 9, samples)
    for lengths in (torch.full_like(order, 2), order % 5 + 3):
        rewards = session.score_responses(order, responses[:, : lengths.max()], lengths)
        for reward, prompt, response, n in zip(
            rewards, rows, responses.tolist(), lengths.tolist(), strict=True
        ):
            steps = [
                whole_log_probabilities(model, [*prompt, *response[:t]], [response[t]])
                for t in range(n)
            ]
            torch.testing.assert_close(reward, torch.cat(steps).sum(), atol=1e-4, rtol=1e-5)
    sources = order // samples * samples
    session.reorder(sources)
    moved = session.score_responses(order, responses[sources], torch.full_like(order, 9))
    torch.testing.assert_close(moved, moved[sources], atol=1e-4, rtol=1e-5)


def test_a_guide_that_is_an_adapter_in_the_language_model_is_refused():
    model = tiny.language_model("qwen3")
    apart = copy.deepcopy(model)
    guide = AutoregressiveScorer(adapted(LoraConfig(r=2, target_modules=["q_proj"]), model))
    steering = Steering(guide, EveryToken())
    assert tiny.generate(apart, [[7]], steering, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"must be two models, got one \(PEFT puts adapters into"):
        tiny.generate(model, [[7]], steering, max_new_tokens=2)


def test_steering_by_an_autoregressive_reward_multiplies_the_policies():
    """GenARM: π·π_r^β over the candidates, at every token."""
    reward, prompts = tiny.language_model("qwen3", seed=9), tiny.prompts(4, seed=5)
    steering = Steering(AutoregressiveScorer(reward), EveryToken(), beta=0.7, candidates=6)
    generations = tiny.generate(MODEL, prompts, steering, max_new_tokens=5)
    for prompt, generation in zip(prompts, generations, strict=True):
        for step, kl in enumerate(generation.kl):
            prefix = [*prompt, *generation.token_ids[:step].tolist()]
            base, candidates = MODEL(torch.tensor([prefix])).logits[0, -1].detach().topk(6)
            rewards = whole_log_probabilities(reward, prefix, candidates)
            product = (base.log_softmax(-1) + 0.7 * rewards).log_softmax(-1)
            expected = (product.exp() * (product - base.log_softmax(-1))).sum()
            assert kl == pytest.approx(expected.item(), abs=1e-4)
        cost = generation.cost
        assert cost.value_forwards == len(generation.token_ids)
        assert cost.value_tokens == cost.model_tokens


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60).map(sorted))
def test_rows_are_computed_together_where_padding_costs_less_than_another_pass(tokens):
    def cost(*stretches):
        return sum((end - start) * tokens[end - 1] + PASS_OVERHEAD for start, end in stretches)

    stretches = _cheapest(torch.tensor(tokens))
    assert [i for start, end in stretches for i in range(start, end)] == list(range(len(tokens)))
    assert cost(*stretches) <= cost((0, len(tokens)))
    for start, end in stretches:  # no further split pays
        assert all(
            cost((start, end)) <= cost((start, middle), (middle, end))
            for middle in range(start + 1, end)
        )


@BUILD_SCORER
def test_groups_of_rows_get_the_same_values(build_scorer, monkeypatch):
    """Rows that lag differently, computed one by one, by threes and all together."""
    prompts, scorer, responses = (
        tiny.prompts(9, seed=6),
        build_scorer("qwen3"),
        tiny.random_tokens(9, 12),
    )
    values, counts, tokens = {}, {}, {}
    for overhead in (-1, 20, 10**9):
        monkeypatch.setattr("sia._prefix_cache.PASS_OVERHEAD", overhead)
        session, scores = scorer.start_session(prompts, 12), []
        for step, rows in ((2, [0, 3, 4]), (6, [1, 4, 8]), (11, list(range(9)))):
            rows = torch.tensor(rows)
            groups = session.prefixes.group_by_lag(rows, torch.full_like(rows, step), 4)
            assert torch.cat(groups).sort().values.tolist() == list(range(len(rows)))
            assert all(group.tolist() == sorted(group.tolist()) for group in groups)
            candidates = tiny.random_tokens(len(rows), 4, seed=step)
            scores.append(session.score(rows, responses[rows, :step], candidates))
        values[overhead], counts[overhead] = torch.cat(scores), len(groups)
        tokens[overhead] = [meter.totals()[1].tolist() for meter in session.meters]
    assert counts[-1] > counts[20] > counts[10**9] == 1
    assert tokens[-1] == tokens[20] == tokens[10**9]
    assert_close(values[-1], values[10**9])
    assert_close(values[20], values[10**9])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("samples", [1, 3])
def test_values_and_rewards_equal_those_of_whole_sequences(family, samples):
    prompts = tiny.prompts(3, seed=2)
    rows = [prompt for prompt in prompts for _ in range(samples)]
    values, reward = tiny.value_model(family), tiny.reward_model(family)
    responses = tiny.random_tokens(len(rows), 9)
    session = values.start_session(prompts, 9, samples)
    assert_scores_are_whole(session, lambda *a: whole_values(values, *a), rows, responses)
    session = RewardScorer(reward).start_session(prompts, 9, samples)
    assert isinstance(session, CachedRewardSession)
    assert_scores_are_whole(session, lambda *a: whole_rewards(reward, *a), rows, responses)


def build_reward(config_class, model_class, **sizes):
    """A reward model whose hidden state has 16 numbers."""
    config = config_class(vocab_size=tiny.VOCABULARY, initializer_range=0.5, **sizes)
    config.num_labels, config.eos_token_id, config.pad_token_id = 1, tiny.EOS, 0
    return tiny.seeded(lambda: model_class(config).eval(), 5)


ENCODER = build_reward(
    BertConfig,
    BertForSequenceClassification,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
)
ALIBI = [
    build_reward(BloomConfig, BloomForSequenceClassification, hidden_size=16, n_layer=2, n_head=2),
    build_reward(MptConfig, MptForSequenceClassification, d_model=16, n_layers=2, n_heads=2),
]


@pytest.mark.parametrize("model", [ENCODER, *ALIBI], ids=["bert", "bloom", "mpt"])
def test_models_that_do_not_follow_masks_read_whole_sequences(model):
    """An encoder, and ALiBi, which counts distances by columns: branches would get them wrong."""
    prompts = tiny.prompts(4, seed=3)
    session = RewardScorer(model).start_session(prompts, 6)
    assert isinstance(session, WholeSequenceSession)
    assert_scores_are_whole(
        session, lambda *a: whole_rewards(model, *a), prompts, tiny.random_tokens(4, 6)
    )


@pytest.mark.parametrize(
    "kinds",
    [
        (RobertaConfig, RobertaForSequenceClassification),
        (XLMRobertaConfig, XLMRobertaForSequenceClassification),  # makes its head first
    ],
    ids=["roberta", "xlm-roberta"],
)
def test_positions_of_roberta_begin_after_the_padding(kinds):
    model = build_reward(
        *kinds, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=13,
    )  # fmt: skip
    prompts, responses = [[7] * 6], torch.full((1, 5), 9)
    session = RewardScorer(model).start_session(prompts, 5)
    ended = torch.tensor([[*prompts[0], *responses[0], tiny.EOS]])  # 12 tokens
    reward = session.score_responses(torch.tensor([0]), responses, torch.tensor([5]))
    torch.testing.assert_close(reward, model(ended).logits[:, 0])
    with pytest.raises(ValueError, match=r"the 12 positions of .*Roberta.*, they may take 13"):
        RewardScorer(model).start_session([[7] * 7], 5)


@pytest.mark.parametrize("model", ALIBI, ids=["bloom", "mpt"])
def test_a_value_model_that_does_not_follow_masks_reads_whole_sequences(model):
    values = ValueModel.from_backbone(model)
    torch.nn.init.normal_(values.head.weight)
    prompts = tiny.prompts(4, seed=3)
    session = values.start_session(prompts, 6)
    assert_scores_are_whole(
        session, partial(whole_values, values), prompts, tiny.random_tokens(4, 6)
    )


@pytest.mark.parametrize(
    ("dtype", "weight", "bias"), [(torch.bfloat16, 0.05, 5.0), (torch.float32, 0.0, 1.0)]
)
def test_no_head_hides_that_masks_are_not_followed(dtype, weight, bias):
    values = ValueModel.from_backbone(build("gpt_neo").to(dtype))
    values.head.weight.detach().fill_(weight)
    values.head.bias.detach().fill_(bias)
    for _ in range(2):
        session = values.start_session(tiny.prompts(4, seed=3), 6)
        assert session.prefixes.uncached
        torch.nn.init.normal_(values.head.weight)  # as after training


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_trial_of_masks_passes_where_they_are_followed(family, monkeypatch):
    monkeypatch.setattr("sia._prefix_cache.VERIFIED_MODEL_TYPES", ())
    for dtype in (torch.float32, torch.bfloat16):
        assert supports_tree_attention(tiny.value_model(family).backbone.to(dtype))


def test_states_that_lie_together_leave_no_verdict_on_masks(monkeypatch):
    monkeypatch.setattr("sia._prefix_cache.VERIFIED_MODEL_TYPES", ())
    backbone = tiny.value_model("gpt2").backbone
    backbone.ln_f.bias.detach().fill_(1.0)
    for weight, supported in ((1e-9, False), (1.0, True)):
        backbone.ln_f.weight.detach().fill_(weight)
        assert supports_tree_attention(backbone) == supported


def test_responses_are_rated_as_they_stand():
    """By cached and whole rewards, and by the value at the last token; again after most went on."""
    model, values, prompts = (
        tiny.reward_model("llama"),
        tiny.value_model("qwen3"),
        tiny.prompts(5, seed=4),
    )
    scorer, responses, rows = RewardScorer(model), tiny.random_tokens(5, 8), torch.arange(5)
    responses[1, 3] = tiny.EOS
    sessions = {
        CachedRewardSession(scorer, prompts, 8, 1): lambda *a: whole_rewards(model, *a),
        WholeSequenceSession(scorer, prompts, 8, 1): lambda *a: whole_rewards(model, *a),
        values.start_session(prompts, 8): lambda *a: whole_values(values, *a),
    }
    for lengths in ([2, 2, 3, 1, 2], [5, 4, 4, 6, 3], [8, 4, 8, 8, 8]):
        written = responses[:, : max(lengths)]
        for session, whole in sessions.items():
            expected = [
                whole([*prompt, *response[: n - 1]], [response[n - 1]])[0]
                for prompt, response, n in zip(prompts, responses.tolist(), lengths, strict=True)
            ]
            rewards = session.score_responses(rows, written, torch.tensor(lengths))
            assert_close(rewards, torch.stack(expected))


@BUILD_SCORER
def test_rows_go_on_from_others(build_scorer):
    scorer, prompts = build_scorer("gemma3"), tiny.prompts(2, seed=1)
    responses, rows = tiny.random_tokens(4, 8), torch.arange(4)
    session = scorer.start_session(prompts, 8, 2)
    fresh = scorer.start_session([prompt for prompt in prompts for _ in range(2)], 8)
    session.score_responses(rows, responses[:, :4], torch.full((4,), 4))
    sources = torch.tensor([1, 1, 2, 2])
    session.reorder(sources)
    responses[:, :4] = responses[sources, :4]
    branches = rows, responses[:, :6], tiny.random_tokens(4, 3, seed=1)
    assert_close(session.score(*branches), fresh.score(*branches))


def test_samples_of_a_prompt_compute_it_once():
    session = tiny.value_model("qwen3").start_session([[7, 8, 9, 10, 11], [12]], 4, samples=3)
    nothing = torch.zeros(6, 0, dtype=torch.int64)
    session.score(torch.arange(6), nothing, torch.full((6, 2), 20))
    forwards, tokens, flops = session.meters[0].totals()
    # the prompt but its last token, which one token does not have, and candidates
    assert forwards.tolist() == [2, 1, 1, 1, 1, 1]
    assert tokens.tolist() == [5 + 2, 1 + 2, 1 + 2, 1 + 2, 1 + 2, 1 + 2]
    assert flops[1] < flops[0]


def test_reward_models_load_from_a_folder(tmp_path):
    REWARD.model.save_pretrained(tmp_path)
    loaded = RewardScorer.from_pretrained(tmp_path).model.state_dict()
    torch.testing.assert_close(loaded, REWARD.model.state_dict(), atol=0, rtol=0)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    settings = config.read_text()
    config.write_text(settings.replace('"hidden_size": 32', '"hidden_size": 16'))
    with pytest.raises(ValueError, match=r"the reward model .* do not fit its config\.json: "):
        RewardScorer.from_pretrained(tmp_path)
    config.write_text(settings)
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(
        ValueError, match=r"the reward model .* cannot be read, a file is damaged or truncated"
    ):
        RewardScorer.from_pretrained(tmp_path)


def test_folders_without_a_reward_model_are_refused(tmp_path):
    tiny.language_model("llama").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"is no reward model: expected all weights of LlamaForSequenceClassification, "
        r"score.weight missing",
    ):
        RewardScorer.from_pretrained(tmp_path, num_labels=1)
    with pytest.raises(
        FileNotFoundError,
        match=r"no reward model in .*nowhere: there is no such folder, and a Hub id has the form",
    ):
        RewardScorer.from_pretrained(tmp_path / "nowhere")


def without_eos():
    model = tiny.reward_model("qwen3")
    model.config.eos_token_id = None
    return model


def adapted(settings, model=None):
    """A reward model that PEFT wraps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's use of transformers
        return tiny.seeded(
            lambda: get_peft_model(model or tiny.reward_model("llama"), settings).eval(), 7
        )


def with_labels(count):
    settings = tiny.config("qwen3")
    settings.num_labels = count
    return AutoModelForSequenceClassification.from_config(settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: RewardScorer(without_eos()),
            "a reward model needs one eos_token_id, its config has None: name it as eos_token_id",
        ),
        (
            lambda: RewardScorer(with_labels(3)),
            "a reward model must have one label, Qwen3ForSequenceClassification has 3",
        ),
        (
            lambda: RewardScorer(REWARD.model, closing=[]),
            "closing needs at least one token, that which ends a response",
        ),
        (
            lambda: RewardScorer(REWARD.model, closing=[2, 60]),
            "closing must be below the vocabulary of 60 tokens, got 60",
        ),
        (
            lambda: RewardScorer(
                adapted(PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
            ),
            "adapters must lie in the layers of the model, as LoRA's do, got PromptTuningConfig",
        ),
        (
            lambda: RewardScorer(REWARD.model, eos_token_id=60),
            "eos_token_id must be below the vocabulary of 60 tokens, got 60",
        ),
        (
            lambda: RolloutScorer(MODEL, REWARD.model, 2),
            "reward must be a RewardScorer or a ValueModel, got Qwen3ForSequenceClassification",
        ),
        (
            lambda: RolloutScorer(MODEL, REWARD, 0),
            "tokens must be a whole number of at least 1, got 0",
        ),
        (
            lambda: RolloutScorer(MODEL, REWARD, 2, temperature=-1),
            "temperature must be 0 (greedy) or a finite number above it, got -1",
        ),
        (
            lambda: RolloutScorer(MODEL, REWARD, 2, candidates=61),
            "candidates must be 1 to 60, the vocabulary of the rollouts' model, got 61",
        ),
        (
            lambda: RolloutScorer(
                MODEL, RewardScorer(tiny.reward_model("qwen3", vocabulary=2000)), 2
            ),
            "models and scorers must share a vocabulary, but for at most 1024 rows of padding, "
            "got vocabularies of [60, 2000] tokens",
        ),
    ],
)
def test_scorers_refuse_invalid_arguments(call, message):
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
        tiny.generate(MODEL, [[7]], Steering(values, EveryToken()))


def test_eager_and_sdpa_backbones_give_the_same_values():
    values = tiny.value_model("qwen3")
    eager = copy.deepcopy(values)
    eager.backbone.set_attn_implementation("eager")
    tokens = [
        tiny.tokens(tiny.generate(MODEL, tiny.prompts(4), Steering(scorer, EveryToken(), 2.0)))
        for scorer in (values, eager)
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("caches", [True, False])
def test_other_end_tokens_are_read_as_the_reward_models_own(monkeypatch, caches):
    """As when a base model and a chat's reward model end in different tokens."""
    monkeypatch.setattr(RewardScorer, "supports_caching", property(lambda self: caches))
    stop, prompts, rows = 5, [[10, 11], [12]], torch.arange(2)
    responses, lengths = torch.tensor([[7, 8, 9], [9, 7, 0]]), torch.tensor([3, 2])
    scorers = {tiny.EOS: REWARD, stop: RewardScorer(REWARD.model, stop_tokens=[stop])}
    expected = REWARD.start_session(prompts, 6).score_responses(rows, responses, lengths)
    values = []
    for end, scorer in scorers.items():
        session = scorer.start_session(prompts, 6)
        candidates = torch.tensor([[end, 20, 21]] * 2)
        values.append(session.score(rows, responses[:, :2], candidates))
        ended = torch.tensor([[7, 8, 9, end], [9, 7, end, 0]])
        assert_close(session.score_responses(rows, ended, lengths + 1), expected)
    assert_close(*values)


def lora(model, **options):
    layers = ["q_proj", "down_proj"]
    return adapted(
        LoraConfig(r=4, target_modules=layers, init_lora_weights=False, **options), model
    )


def with_pad(pad):
    model = tiny.reward_model("llama")
    model.config.pad_token_id = pad
    return model


def with_mlp():
    model = tiny.reward_model("llama")
    layers = [torch.nn.Linear(32, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)]
    model.score = tiny.seeded(lambda: torch.nn.Sequential(*layers).eval(), 3)
    return model


REWARD_MODELS = {
    "no pad": lambda: with_pad(None),
    "pad is EOS": lambda: with_pad(tiny.EOS),
    "LoRA": lambda: lora(with_pad(None), task_type="SEQ_CLS"),
    "LoRA without a task": lambda: lora(with_pad(None)),
    "merged": lambda: lora(with_pad(None), task_type="SEQ_CLS").merge_and_unload(),
    "MLP": with_mlp,
    "encoder": lambda: ENCODER,
    "ALiBi": lambda: ALIBI[0],
    "ALiBi, pad is EOS": lambda: padded_with_eos(ALIBI[0]),
}


def padded_with_eos(model):
    model = copy.deepcopy(model)
    model.config.pad_token_id = tiny.EOS
    return model


@torch.no_grad()
def rewards_of_cards(model, sequences):
    """The reward that a model card's code computes, at the last token of each conversation."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    rewards = []
    for sequence in sequences:
        ids = torch.tensor([sequence])
        if hasattr(inner, "score"):
            rewards.append(inner.score(inner.base_model(input_ids=ids).last_hidden_state)[0, -1, 0])
        else:
            rewards.append(model(input_ids=ids).logits[0, 0])
    return torch.stack(rewards)


@pytest.mark.parametrize("closing", [[tiny.EOS], [tiny.EOS, 7], [8, tiny.EOS, 7, 9]], ids=str)
@pytest.mark.parametrize("kind", REWARD_MODELS)
def test_one_definition_of_the_reward(kind, closing):
    """The same for candidates, unfinished and finished responses, and whole conversations."""
    model = REWARD_MODELS[kind]()
    prompts, responses = tiny.prompts(3, seed=8), tiny.random_tokens(3, 5)
    rows, lengths = torch.arange(3), torch.tensor([5, 2, 4])
    scorer = RewardScorer(model, closing=closing)
    session = scorer.start_session(prompts, 8)
    candidates = torch.tensor([[20, tiny.EOS, 21]] * 3)
    conversations = [
        [*prompt, *response[:2], *([] if token == tiny.EOS else [token]), *closing]
        for prompt, response in zip(prompts, responses.tolist(), strict=True)
        for token in candidates[0].tolist()
    ]
    expected = rewards_of_cards(model, conversations).view(3, 3)
    assert_close(session.score(rows, responses[:, :2], candidates), expected)
    whole = [
        [*prompt, *response[:n], *closing]
        for prompt, response, n in zip(prompts, responses.tolist(), lengths.tolist(), strict=True)
    ]
    expected = rewards_of_cards(model, whole)
    assert_close(scorer.read_whole(whole), expected)
    by_benchmarks = torch.tensor(trajectory_rewards(model, whole)).float()
    assert_close(by_benchmarks, expected)
    ended = torch.cat([responses, responses[:, :1]], 1)
    ended[rows, lengths] = tiny.EOS
    for further in (0, 1, 0):  # what closed a response does not stay behind it
        assert_close(session.score_responses(rows, ended, lengths + further), expected)


TEMPLATES = {
    "ChatML": ("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_end|>\n"),
    "end token alone": ("{role}: {content}<|im_end|>", "<|im_end|>"),
    "a space before": ("{role}: {content} <|im_end|>", " <|im_end|>"),
    "other end token": ("{role}: {content}<|im_start|>\n", "<|im_start|>\n"),
    "nothing": ("{role}: {content}", "<|im_end|>"),
    "the word answer": ("{role}: {content}<|im_end|> end of the answer\n",
                        "<|im_end|> end of the answer\n"),
}  # fmt: skip


def tokenizer_with(template):
    tokenizer = hub_folders.tokenizer()
    turn = TEMPLATES[template][0]
    for name in ("role", "content"):
        turn = turn.replace(f"{{{name}}}", f"{{{{ message['{name}'] }}}}")
    tokenizer.chat_template = f"{{% for message in messages %}}{turn}{{% endfor %}}"
    return tokenizer


@pytest.mark.parametrize("template", TEMPLATES)
def test_closings_are_read_from_templates(template, tmp_path):
    tokenizer = tokenizer_with(template)
    expected = tokenizer(TEMPLATES[template][1], add_special_tokens=False).input_ids
    assert closing_tokens(tokenizer) == expected
    model = tiny.reward_model("qwen3", vocabulary=len(tokenizer))
    model.save_pretrained(tmp_path)
    assert RewardScorer.from_pretrained(tmp_path).closing == [tiny.EOS]
    tokenizer.save_pretrained(tmp_path)
    loaded = RewardScorer.from_pretrained(tmp_path)
    assert loaded.closing == expected
    # the token that ends a response in the template ends it for the scorer
    ends = {tiny.EOS} if tiny.EOS in expected else {tiny.EOS, expected[0]}
    assert set(loaded.end_tokens) == ends


def test_closings_of_tokenizers_without_templates():
    tokenizer = hub_folders.tokenizer()
    tokenizer.chat_template = None
    assert closing_tokens(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has neither a chat template nor an EOS token"):
        closing_tokens(tokenizer)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            "{% for part in message.content %}{{ part.text }}{% endfor %}",
            "does not show the answer",
        ),
        ("{{ message.content + 1 }}", "refuses a conversation .*: can only concatenate str"),
    ],
)
def test_templates_without_a_readable_closing_are_refused(turn, message):
    tokenizer = hub_folders.tokenizer()
    tokenizer.chat_template = f"{{% for message in messages %}}{turn}{{% endfor %}}"
    with pytest.raises(ValueError, match=f"the chat template of the tokenizer {message}"):
        closing_tokens(tokenizer)


def test_labels_are_those_of_the_head_whatever_else_the_model_has():
    model = tiny.reward_model("qwen3")
    model.unused = torch.nn.Linear(32, 5)
    scored = RewardScorer(model).read_whole([[7, 8, 2]])
    assert torch.equal(scored, REWARD.read_whole([[7, 8, 2]]))


def test_a_model_that_reads_its_last_column_sees_no_padding():
    config = XLNetConfig(
        vocab_size=60, d_model=32, n_layer=2, n_head=4, d_inner=48, initializer_range=0.2,
        num_labels=1, pad_token_id=0, eos_token_id=tiny.EOS,
    )  # fmt: skip
    scorer = RewardScorer(tiny.seeded(lambda: XLNetForSequenceClassification(config).eval(), 0))
    sequences = [[7, 8, 2], [11, 12, 13, 14, 15, 2], [9, 8, 2], [3, 2]]
    alone = torch.cat([scorer.read_whole([sequence]) for sequence in sequences])
    assert_close(scorer.read_whole(sequences), alone)


@pytest.mark.parametrize("named", [True, False])
def test_a_search_rewards_a_finished_response_as_its_model_card_does(named):
    """Qwen's template writes a line break behind the end token."""
    tokenizer = hub_folders.tokenizer()
    letters = [
        i for i in range(len(tokenizer)) if len(c := tokenizer.decode([i])) == 1 and c.isalpha()
    ]
    model = tiny.language_model("qwen3", vocabulary=len(tokenizer))
    others = [i for i in range(len(tokenizer)) if i not in letters]
    with torch.no_grad():
        model.lm_head.weight[others] = 0  # a response of letters survives decoding
    reward = tiny.reward_model("qwen3", vocabulary=len(tokenizer))
    closing = closing_tokens(tokenizer) if named else None
    scorer = RewardScorer(reward, tokenizer.eos_token_id, closing=closing)
    chat = [{"role": "user", "content": "how do i bake"}]
    (prompt,) = chat_ids(tokenizer, [chat])
    (best,) = best_of_n(model, tokenizer, [prompt], scorer, 4, max_new_tokens=4, progress=False)
    whole = [*chat, {"role": "assistant", "content": best.text}]
    (ids,) = chat_ids(tokenizer, [whole], answered=True)
    assert ids[len(prompt) : len(prompt) + 4] == best.token_ids.tolist()
    card = reward(input_ids=torch.tensor([ids])).logits.item()
    assert best.reward == pytest.approx(card, abs=1e-4)
    assert trajectory_rewards(reward, [ids])[0] == pytest.approx(card, abs=1e-4)


def test_a_template_may_end_responses_otherwise_than_the_config(tmp_path):
    """As Gemma's does; an end that the caller names is kept."""
    tokenizer, reward = tiny.tokenizer(), tiny.reward_model("qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}w10 {{ m['content'] }} w11 {% endfor %}"
        "{% if add_generation_prompt %}w10{% endif %}"
    )
    closing = closing_tokens(tokenizer)
    assert tiny.EOS not in closing
    reward.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    in_memory = RewardScorer(reward).closed_by(tokenizer)
    loaded = RewardScorer.from_pretrained(tmp_path)
    assert in_memory.closing == loaded.closing == closing
    assert in_memory.end_tokens == loaded.end_tokens
    assert RewardScorer(reward, tiny.EOS).closed_by(tokenizer).closing == [tiny.EOS]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda scorer: scorer,
        lambda scorer: 2.0 * scorer - 0.5 * tiny.value_model("qwen3", vocabulary=VOCABULARY),
        lambda scorer: RolloutScorer(WIDE, scorer, 2, candidates=4),
    ],
    ids=["alone", "sum", "rollout"],
)
def test_the_closing_comes_from_the_tokenizer_wherever_there_is_one(wrap):
    tokenizer = hub_folders.tokenizer()
    reward, eos = tiny.reward_model("qwen3", vocabulary=VOCABULARY), tokenizer.eos_token_id
    closing, prompt = closing_tokens(tokenizer), tiny.prompts(1, seed=3)
    assert closing != [eos]
    options = {"max_new_tokens": 4, "progress": False}
    rows = torch.tensor(prompt)
    records = []
    for scorer in (RewardScorer(reward, eos), RewardScorer(reward, eos, closing=closing)):
        steering = Steering(wrap(scorer), EveryToken(), beta=3.0)
        decode = SteeredGenerate(steering, tokenizer=tokenizer, seed=0)
        output = WIDE.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            custom_generate=decode,
            max_new_tokens=4,
            do_sample=True,
            return_dict_in_generate=True,
        )
        (plain,) = generate(WIDE, tokenizer, prompt, steering, **options)
        searched = []
        if not isinstance(steering.scorer, RolloutScorer):  # rollouts value candidates alone
            searched = best_of_n(WIDE, tokenizer, prompt, steering.scorer, 3, **options)
        records.append(
            [plain.kl.tolist(), output.generations[0].kl.tolist(), [g.reward for g in searched]]
        )
    assert records[0] == records[1]


def test_templates_that_refuse_a_question_and_its_answer_are_named():
    tokenizer = hub_folders.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    message = "refuses a conversation of one question and its answer, .*: system first"
    with pytest.raises(ValueError, match=message):
        closing_tokens(tokenizer)


def test_paths_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    """The tokenizer beside the model, too, whose template closes responses."""
    monkeypatch.setenv("HOME", str(tmp_path))
    base = hub_folders.save_model(tmp_path / "base", "qwen3", 0, "base")
    reward = hub_folders.save_model(tmp_path / "reward", "qwen3", 1, "reward")
    values = hub_folders.save_value_model(tmp_path / "values", base)
    there, here = (RewardScorer.from_pretrained(path) for path in ("~/reward", reward))
    assert there.closing == here.closing
    assert len(here.closing) > 1
    tokens = torch.tensor([[5, 6, 7]])
    there, here = (
        ValueModel.from_pretrained(path, name)(tokens)
        for path, name in (("~/values", "~/base"), (values, base))
    )
    assert torch.equal(there, here)
    with pytest.raises(FileNotFoundError, match="no home folder for the path ~nobody-at-all/x"):
        RewardScorer.from_pretrained("~nobody-at-all/x")


def test_every_end_token_of_the_language_model_gives_way_to_the_closing():
    """Qwen and Llama have several; that of the reward model is one of them."""
    model = tiny.language_model("qwen3")
    model.generation_config.eos_token_id = [tiny.EOS, 9]
    responses = best_of_n(
        model, tiny.tokenizer(), tiny.prompts(8), REWARD, 2, max_new_tokens=20, progress=False
    )
    ended = [
        (p, r) for p, r in zip(tiny.prompts(8), responses, strict=True) if r.token_ids[-1] == 9
    ]
    assert ended
    for prompt, response in ended:
        (expected,) = REWARD.read_whole([[*prompt, *response.token_ids[:-1].tolist(), tiny.EOS]])
        assert response.reward == pytest.approx(expected.item(), abs=1e-4)

"""`generate` over lists of prompts: prompts and seeds, models of all kinds, and refusals."""

import math
import threading
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from transformers import ProcessorMixin, T5Config, T5ForConditionalGeneration

import sia
from sia import (
    AttentionGate,
    Entropy,
    EntropyGate,
    EveryToken,
    Never,
    RewardScorer,
    Steering,
)
from sia.batch import padding_token
from sia.signals import Divergence
from sia.states import collect_states
from tests.helpers import tiny
from tests.helpers.reference import decode as reference
from tests.helpers.reference import whole_values

MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
STEERING = Steering(VALUES, EntropyGate(1.5), 2.0)
PROMPTS = tiny.prompts(6)
generate = partial(tiny.generate, MODEL)

EMPTY = "a prompt needs at least one token, number 1 is empty"
PROMPT = "a prompt must be a text, a chat (a list of messages) or a list of token ids, number 0 is "
IDS = "prompt 1: token ids must be at least 0 and below the vocabulary of 60 tokens, got "
TEMPERATURE = "temperature must be 0 (greedy) or a finite number above it, got "
OBSERVE = "observe must be a list of signals, such as [Attention()], got "


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generate(["w7", ""]), EMPTY),
        (lambda: generate([[7], []]), EMPTY),
        (lambda: generate([7, 8]), PROMPT + "int"),
        (lambda: generate([[{"text": "w7"}]]), PROMPT + "a list of other things"),
        (lambda: generate("w7"), "prompts must be a list of prompts, got a single text"),
        (
            lambda: sia.generate(tiny.tokenizer(), MODEL, ["w7"]),
            "generate(model, tokenizer, …) takes the model first, got a model as the tokenizer",
        ),
        (
            lambda: sia.generate(MODEL, object.__new__(ProcessorMixin), ["w7"]),
            "tokenizer must be a tokenizer, such as processor.tokenizer, got a ProcessorMixin",
        ),
        (lambda: sia.generate(MODEL, None, [[7]]), "tokenizer must be a tokenizer, got a NoneType"),
        (lambda: generate([[7], [-3]]), IDS + "-3"),
        (lambda: generate([[7], [7, 60]]), IDS + "60"),
        (
            lambda: generate([[7], [8]], STEERING, value_prompts=[[7], [99]]),
            f"value {IDS}99",
        ),
        (
            lambda: generate([[7], [8]], value_prompts=[[7], [99]]),
            f"value {IDS}99",
        ),
        (
            lambda: generate([[7], [8]], value_prompts=[[7]]),
            "value_prompts must be as many as prompts: expected 2, got 1",
        ),
        (
            lambda: generate(PROMPTS, seed=[1, 2]),
            "seed must be one number, or one for each of the 6 prompts, got 2",
        ),
        (
            lambda: generate([[7]], VALUES),
            "steering must be a Steering(scorer, gate, …), got ValueModel",
        ),
        (lambda: generate([[7]], observe=["entropy"]), OBSERVE + "['entropy']"),
        (
            lambda: generate([[7]], observe=[Divergence()]),
            "the signal Divergence() measures a steering, so it needs one, got none",
        ),
        (lambda: generate([[7]], observe=Entropy()), OBSERVE + "Entropy(over='candidates')"),
        (
            lambda: generate([[7]], Steering(VALUES, Never(), candidates=61)),
            "candidates must be at most the vocabulary of 60 tokens, got 61",
        ),
        (
            lambda: generate([[7]], Steering(tiny.value_model("qwen3", vocabulary=50), Never())),
            "model and scorer must share a vocabulary, padding of at most 1024 rows aside: "
            "the model has 60 tokens, the scorer 50, and the tokenizer 60",
        ),
        (lambda: generate([[7]], temperature=-1.0), TEMPERATURE + "-1.0"),
        (lambda: generate([[7]], temperature=math.nan), TEMPERATURE + "nan"),
        (
            lambda: generate(["w7", "w8 \ud83d"]),
            "a prompt must be valid Unicode, number 1 holds half of a surrogate pair",
        ),
        (
            lambda: generate([[7]], max_new_tokens=0),
            "max_new_tokens must be a whole number of at least 1, got 0",
        ),
        (
            lambda: generate([[7]], batch_size=0),
            "batch_size must be a whole number of at least 1, got 0",
        ),
        (
            lambda: generate([[7]], candidates=0),
            "candidates must be a whole number of at least 1, got 0",
        ),
        (
            lambda: generate([[7]], STEERING, candidates=5),
            "candidates is for decoding without a steering, which has its own: expected "
            "Steering(…, candidates=5), got candidates=5 beside a Steering",
        ),
    ],
)
def test_invalid_input_gives_a_one_line_error(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("last", "value_prompts", "message"),
    [
        ([7, 60], None, IDS + "60"),
        ([7, 8], [[7], [60]], f"value {IDS}60"),
        ([7] * 118, None, "prompt 1: prompt and response must fit into the 128 positions of GPT2"),
    ],
)
def test_all_prompts_are_checked_before_the_first_batch(last, value_prompts, message):
    model, prompts = tiny.language_model("gpt2"), [[7], last]
    model.register_forward_pre_hook(lambda *_: pytest.fail("a batch was decoded"))
    options = {"max_new_tokens": 12, "batch_size": 1, "value_prompts": value_prompts}
    for call in (
        partial(tiny.generate, model, prompts, STEERING),
        partial(collect_states, model, tiny.tokenizer(), VALUES, prompts, progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            call(**options)


def test_prompts_may_be_tensors_or_none_at_all():
    assert tiny.tokens(generate(torch.tensor([[7, 8]]))) == tiny.tokens(generate([[7, 8]]))
    assert generate([]) == []


@pytest.mark.parametrize(
    ("models", "tokenizers", "expected"),
    [(0, "w9", 0), (None, "w9", 9), (tiny.EOS, "w9", None), (None, "<eos>", None)],
)
def test_the_tokenizer_pads_where_the_model_does_not(models, tokenizers, expected):
    model, tokenizer = tiny.language_model("qwen3"), tiny.tokenizer()
    model.generation_config.pad_token_id, tokenizer.pad_token = models, tokenizers
    assert padding_token(model, tokenizer) == expected


class OtherTokenizer:
    """A tokenizer that transformers does not know."""

    eos_token_id = tiny.EOS

    def decode(self, ids, **options):
        return f"{len(ids)} tokens"


def test_prompts_of_token_ids_take_any_tokenizer_that_decodes():
    prompts = tiny.prompts(3)
    usual = tiny.generate(MODEL, prompts, STEERING, max_new_tokens=5, temperature=0.7)
    others = sia.generate(MODEL, OtherTokenizer(), prompts, STEERING, 5, 0.7, progress=False)
    assert tiny.tokens(others) == tiny.tokens(usual)
    assert [one.text for one in others] == [f"{len(one.token_ids)} tokens" for one in others]
    reward = sia.RewardScorer(tiny.reward_model("qwen3"))
    (best,) = sia.best_of_n(
        MODEL, OtherTokenizer(), prompts[:1], reward, 2, max_new_tokens=5, progress=False
    )
    assert len(best.token_ids) > 0


def test_a_prompt_is_sampled_again_under_another_seed():
    """One seed for each prompt: the same as that many calls, in whatever batch."""
    first, second = (tiny.tokens(generate(PROMPTS[:3], seed=seed)) for seed in (5, 6))
    together = generate(PROMPTS[:3] * 2, seed=[5, 5, 5, 6, 6, 6], batch_size=4)
    assert tiny.tokens(together) == first + second
    assert first != second


def test_an_encoder_decoder_is_refused():
    config = T5Config(
        vocab_size=60,
        d_model=16,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    with pytest.raises(
        ValueError,
        match="steering needs a decoder-only language model, got T5ForConditionalGeneration",
    ):
        tiny.generate(T5ForConditionalGeneration(config), [[7]])


@pytest.mark.parametrize(
    "use",
    [
        lambda model: tiny.generate(model, [[7]]),
        sia.AutoregressiveScorer,
        lambda model: sia.ImplicitRewardScorer(MODEL, model),
        lambda model: sia.RolloutScorer(model, VALUES, 2),
        lambda model: sia.StepTokenScorer(model, [9], 3, 4),
    ],
)
def test_a_model_without_a_head_is_refused(use):
    """As AutoModel loads it, in place of AutoModelForCausalLM."""
    message = "steering needs a decoder-only language model, got Qwen3Model"
    with pytest.raises(ValueError, match=message):
        use(MODEL.model)


@pytest.mark.parametrize(
    ("build_scorer", "fits", "message"),
    [  # of 128 positions; the prompt takes 100
        (None, 29, "the 128 positions of GPT2LMHeadModel, they may take 129"),  # all but the last
        (tiny.value_model, 28, "the 128 positions of GPT2Model, they may take 129"),  # the last too
        (  # and the end after it
            lambda family: RewardScorer(tiny.reward_model(family)),
            27,
            "the 128 positions of GPT2Model, they may take 129",
        ),
    ],
)
def test_models_with_learned_positions_refuse_longer_sequences(build_scorer, fits, message):
    model = tiny.language_model("gpt2")
    steering = Steering(build_scorer("gpt2"), EveryToken()) if build_scorer else None
    assert tiny.generate(model, [[7] * 100], steering, max_new_tokens=fits, temperature=0)
    with pytest.raises(ValueError, match=message):
        tiny.generate(model, [[7] * 100], steering, max_new_tokens=fits + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [EveryToken(), EntropyGate(1.5), AttentionGate(2.0)])
def test_models_of_half_precision_stay_close_to_the_reference(dtype, gate):
    model = tiny.language_model("qwen3").to(torch.bfloat16)
    values = tiny.value_model("qwen3").to(dtype)
    assert torch.equal(values.head.weight, VALUES.head.weight)  # is kept in float32
    generations = tiny.generate(model, PROMPTS, Steering(values, gate, 2.0), max_new_tokens=6)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        assert np.isfinite(generation.kl).all()
        steered = generation.steered[0]
        expected = reference(
            model,
            partial(whole_values, values),
            prompt,
            lambda looks, steered=steered: steered,
            beta=2.0,
            max_new_tokens=1,
        )
        assert generation.entropy[0] == pytest.approx(expected["entropy"][0], rel=0.02)
        assert generation.kl[0] == pytest.approx(expected["kl"][0], rel=0.1, abs=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("devices", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("gate", [EntropyGate(1.5), AttentionGate(2.0)])
def test_devices_may_differ(devices, gate):
    model = tiny.language_model("qwen3").to(devices[0])
    values = tiny.value_model("qwen3").to(devices[1])
    generations = tiny.generate(model, PROMPTS, Steering(values, gate, 2.0))
    expected = generate(PROMPTS, Steering(VALUES, gate, 2.0))
    assert tiny.tokens(generations) == tiny.tokens(expected)


def test_models_that_accelerate_offloads_work():
    model, values = tiny.language_model("qwen3"), tiny.value_model("qwen3")
    rewards = [tiny.reward_model("qwen3") for _ in range(2)]
    for module in (model, values.backbone, rewards[0]):
        cpu_offload(module, execution_device="cpu")
    generations = tiny.generate(model, PROMPTS, Steering(values, STEERING.gate, STEERING.beta))
    assert tiny.tokens(generations) == tiny.tokens(generate(PROMPTS, STEERING))
    branches = torch.tensor([0]), torch.tensor([[9]]), torch.tensor([[10, 11]])
    scores = [
        RewardScorer(reward).start_session([[7, 8]], 4).score(*branches) for reward in rewards
    ]
    torch.testing.assert_close(*scores)


def test_two_threads_may_share_a_model():
    steerings = [Steering(VALUES, gate) for gate in (AttentionGate(2.0), EntropyGate(1.5))]
    alone = [tiny.tokens(generate(PROMPTS, steering)) for steering in steerings]
    together = [[], []]

    def respond(number):
        for _ in range(4):
            together[number].append(tiny.tokens(generate(PROMPTS, steerings[number])))

    threads = [threading.Thread(target=respond, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [[tokens] * 4 for tokens in alone]

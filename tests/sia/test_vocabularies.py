"""Vocabularies that are padded to different sizes work together; those that differ do not."""

from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import sia
from sia import (
    AutoregressiveScorer,
    EntropyGate,
    EveryToken,
    RewardScorer,
    RolloutScorer,
    SteeredGenerate,
    Steering,
    ValueModel,
    VocabularyValueModel,
    best_of_n,
    fit_q_head,
    fit_vocabulary_value_model,
    log_likelihoods,
)
from tests.helpers import tiny
from tests.helpers.reference import decode as reference
from tests.helpers.reference import whole_values

TOKENIZER = tiny.tokenizer()
PROMPTS = tiny.prompts(6)
SIZES = {"as the tokenizer": 60, "padded": 64, "padded further": 72}


@pytest.mark.parametrize("of_scorer", SIZES)
@pytest.mark.parametrize("of_model", SIZES)
def test_padding_of_any_size_works_together(of_model, of_scorer):
    """Tokens that the scorer does not have cannot be sampled; all else is as in the slow loop."""
    model = tiny.language_model("qwen3", vocabulary=SIZES[of_model])
    values = tiny.value_model("qwen3", vocabulary=SIZES[of_scorer])
    shared = min(SIZES[of_model], SIZES[of_scorer])

    def within(ids, scores):
        beyond = torch.arange(scores.shape[1]) >= shared
        return scores.masked_fill(beyond, -torch.inf)

    steering = Steering(values, EntropyGate(1.9), 2.0, candidates=shared)
    generations = tiny.generate(model, PROMPTS, steering)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        expected = reference(
            model, partial(whole_values, values), prompt,
            lambda looks: looks[-1].entropy >= 1.9, beta=2.0, candidates=shared, process=[within],
        )  # fmt: skip
        assert generation.token_ids.tolist() == expected["token_ids"]
        assert generation.steered.tolist() == expected["steered"]
    out = model.generate(
        torch.tensor([[7, 8]]), custom_generate=SteeredGenerate(steering, seed=0), do_sample=True,
        top_k=0, max_new_tokens=12,
    )  # fmt: skip
    assert out[:, 2:].tolist() == tiny.tokens(tiny.generate(model, [[7, 8]], steering))


@pytest.mark.parametrize("size", [64, 72])
def test_searches_experts_and_likelihoods_take_padding_too(size):
    model = tiny.language_model("qwen3", vocabulary=68)
    reward = RewardScorer(tiny.reward_model("qwen3", vocabulary=size))
    expert = AutoregressiveScorer(tiny.language_model("qwen3", seed=4, vocabulary=size))
    steering = Steering(expert, EveryToken(), candidates=min(size, 68))
    best = best_of_n(model, TOKENIZER, PROMPTS, reward, 2, steering, progress=False)
    assert max(max(tokens) for tokens in tiny.tokens(best)) < min(size, 68)
    likelihoods = log_likelihoods(model, steering, PROMPTS, [[7, 8]] * len(PROMPTS))
    assert all(likelihood.total > -torch.inf for likelihood in likelihoods)
    if size < 68:  # no response has tokens that the scorer lacks
        message = "response 0: token ids must be at least 0 and below the vocabulary of 64 tokens"
        with pytest.raises(ValueError, match=message):
            log_likelihoods(model, steering, [[7]], [[65, 2]])


def test_prompts_of_the_scorer_may_have_tokens_that_the_model_lacks():
    values = tiny.value_model("qwen3", vocabulary=72)
    steering = Steering(values, EveryToken())
    model = tiny.language_model("qwen3")
    assert tiny.generate(model, [[7]], steering, value_prompts=[[71]])[0].steered.all()
    message = "token ids must be at least 0 and below the vocabulary of 72 tokens, got 72"
    with pytest.raises(ValueError, match=message):
        tiny.generate(model, [[7]], steering, value_prompts=[[72]])


def test_an_end_that_the_scorer_does_not_have_is_refused():
    model, values = (build("qwen3", vocabulary=v) for build, v in
                     ((tiny.language_model, 64), (tiny.value_model, 60)))  # fmt: skip
    model.generation_config.eos_token_id = [2, 62]
    message = r"tokens that end a response must be below the 60 tokens .* share, got \[62\]"
    with pytest.raises(ValueError, match=message):
        tiny.generate(model, [[7]], Steering(values, EveryToken()))


@pytest.mark.parametrize("size", [61, 64])
def test_the_scorer_may_lack_a_padding_token_that_was_added(size):
    model, tokenizer = tiny.language_model("llama", vocabulary=size), tiny.tokenizer()
    steering = Steering(tiny.value_model("llama"), EveryToken(), 2.0)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    respond = partial(
        sia.generate, model, tokenizer, [[7, 8]], steering, max_new_tokens=4, progress=False
    )
    assert respond()[0].token_ids.max() < 60
    tokenizer.eos_token = "[PAD]"
    message = (
        f"model and scorer must share a vocabulary, .* the model has {size} tokens, the scorer 60, "
        "and the tokenizer 61"
    )
    with pytest.raises(ValueError, match=message):
        respond()


@pytest.mark.parametrize(
    ("build", "read"),
    [(tiny.value_model, ValueModel.from_pretrained),
     (tiny.reward_model, RewardScorer.from_pretrained)],
)  # fmt: skip
def test_tokenizers_that_differ_are_named_by_the_first_token(build, read, tmp_path):
    """Where the sizes do not tell: the tokenizer beside a scorer is compared."""
    build("qwen3").save_pretrained(tmp_path)
    assert read(tmp_path).tokenizer is None
    tiny.tokenizer().save_pretrained(tmp_path)
    respond = partial(
        sia.generate, tiny.language_model("qwen3"), prompts=PROMPTS, progress=False,
        max_new_tokens=2,
    )  # fmt: skip
    scorer = read(tmp_path)
    steering = Steering(scorer, EveryToken())
    assert len(respond(TOKENIZER, steering=steering)) == len(PROMPTS)
    message = (
        "the tokenizers of model and scorer must agree: token 1 is 'B' to the model and '<bos>' "
        "to the scorer, the first of 59"
    )
    rollouts = RolloutScorer(tiny.language_model("qwen3"), scorer, 1)
    for one in (scorer, tiny.value_model("qwen3") + scorer, rollouts):
        with pytest.raises(ValueError, match=message):
            respond(tiny.letters(), steering=Steering(one, EveryToken()))


def renamed(names, **special):
    """The tokenizer of the tests, some of its tokens under other names."""
    vocabulary = {names.get(token, token): i for token, i in TOKENIZER.get_vocab().items()}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>"}


@pytest.mark.parametrize(
    ("names", "special", "message"),
    [
        ({"w58": "<|reserved_special_token_2|>", "w59": "<unused3>"}, SPECIAL, ""),
        ({"<pad>": "<|eom_id|>", "w59": "<|pad|>"}, {"pad_token": "<|pad|>"}, ""),
        ({"w58": "<|eom_id|>"}, SPECIAL, "token 58 is 'w58' to the .* and '<|eom_id|>' to the .*"),
        ({"<eos>": "<|e|>"}, {"pad_token": "<|e|>", "eos_token": "<|e|>"}, "token 2 is '<eos>' .*"),
    ],
)
def test_reserved_tokens_and_padding_may_have_other_names(names, special, message):
    values = tiny.value_model("qwen3")
    values.tokenizer = renamed(names, **special)
    respond = partial(
        tiny.generate, tiny.language_model("qwen3"), PROMPTS, Steering(values, EveryToken())
    )
    if not message:
        assert respond()[0].steered.all()
        return
    message = f"the tokenizers of model and scorer must agree: {message}, the first of 1$"
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        respond()


def test_tokenizers_are_saved_with_values_and_passed_on_to_heads(tmp_path):
    model, values, other = tiny.language_model("qwen3"), tiny.value_model("qwen3"), tiny.letters()
    values.tokenizer = TOKENIZER
    options = {"max_new_tokens": 2, "epochs": 1, "progress": False}
    vocabulary = fit_vocabulary_value_model(model, TOKENIZER, values, PROMPTS, **options).scorer
    for name, saved in {"values": values, "vocabulary": vocabulary}.items():
        saved.save_pretrained(tmp_path / name)
    for scorer in (
        fit_q_head(model, TOKENIZER, values, PROMPTS, **options).scorer,
        fit_q_head(model, TOKENIZER, values + values, PROMPTS, **options).scorer,
        ValueModel.from_pretrained(tmp_path / "values"),
        VocabularyValueModel.from_pretrained(tmp_path / "vocabulary"),
    ):
        assert tiny.generate(model, PROMPTS, Steering(scorer, EveryToken()), max_new_tokens=2)
        with pytest.raises(ValueError, match="tokenizers of model and scorer must agree: token 1"):
            sia.generate(
                model, other, PROMPTS, Steering(scorer, EveryToken()), max_new_tokens=2,
                progress=False,
            )  # fmt: skip

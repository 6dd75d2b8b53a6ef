"""Process reward models against whole sequences, read one at a time."""

import pytest
import torch
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BloomConfig,
    ConvBertConfig,
    FalconConfig,
    GPTNeoConfig,
    XLMRobertaConfig,
)

from sia import EveryToken, ProcessRewardScorer, Steering, StepTokenScorer
from sia.scorers.closed import CachedRewardSession, WholeSequenceSession
from tests.helpers import tiny

GOOD, BAD = 11, 12
RANGE = "must be at least 0 and below the vocabulary of 60 tokens, got "


def classifier(config=None, labels=2):
    settings = config or tiny.config("qwen3")
    settings.num_labels, settings.eos_token_id, settings.pad_token_id = labels, tiny.EOS, 0
    return tiny.seeded(lambda: AutoModelForTokenClassification.from_config(settings).eval(), 6)


def classify(*tokens, **options):
    return ProcessRewardScorer(classifier(), *tokens, **options)


def ask(*tokens, **options):
    return StepTokenScorer(tiny.language_model("qwen3"), *tokens, **options)


def encoder():
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return classifier(
        BertConfig(vocab_size=60, intermediate_size=24, initializer_range=0.5, **size)
    )


def convolutions():
    """Convolutions read the neighbours of a token, padding among them."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return classifier(
        ConvBertConfig(
            vocab_size=60, embedding_size=32, intermediate_size=48, initializer_range=0.25, **size
        )
    )


def without_positions():
    """The class takes no position_ids and hands none to its backbone."""
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return classifier(
        FalconConfig(vocab_size=60, initializer_range=0.5, bos_token_id=1, alibi=False, **size)
    )


def normed():
    """A layer between backbone and head."""
    model = classifier()
    model.dropout = torch.nn.LayerNorm(32)
    return model


def alibi():
    return classifier(
        BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.5)
    )


def saturated():
    """Local attention does not follow masks, and the labels' biases make all probabilities 1."""
    kinds, size = [[["local"], 2]], {"hidden_size": 32, "num_layers": 2, "num_heads": 4}
    model = classifier(
        GPTNeoConfig(
            vocab_size=60, window_size=4, attention_types=kinds, initializer_range=0.25, **size
        )
    )
    model.classifier.bias.detach().copy_(torch.tensor([-6.0, 6.0]))
    return model


@torch.no_grad()
def whole_probability(model, sequence):
    """The probability of a good step at the end of one sequence."""
    logits = model(torch.tensor([sequence])).logits[0, -1]
    if model.can_generate():
        return logits[[GOOD, BAD]].softmax(0)[0]
    return logits.softmax(0)[1]


SCORERS = {
    "classifier": (classifier, ProcessRewardScorer, CachedRewardSession, ()),
    "classifier at a step token": (classifier, ProcessRewardScorer, CachedRewardSession, (9,)),
    "encoder": (encoder, ProcessRewardScorer, WholeSequenceSession, (9,)),
    "convolutions": (convolutions, ProcessRewardScorer, WholeSequenceSession, (9,)),
    "positions of the backbone": (without_positions, ProcessRewardScorer, CachedRewardSession, ()),
    "layer before the head": (normed, ProcessRewardScorer, WholeSequenceSession, ()),
    "ALiBi": (alibi, ProcessRewardScorer, WholeSequenceSession, ()),
    "saturated": (saturated, ProcessRewardScorer, WholeSequenceSession, ()),
    "language model": (
        lambda: tiny.language_model("gemma3", seed=5),
        lambda model, tokens: StepTokenScorer(model, tokens, GOOD, BAD),
        CachedRewardSession,
        (9,),
    ),
    "language model asked in a turn": (
        lambda: tiny.language_model("llama", seed=5),
        lambda model, tokens: StepTokenScorer(model, tokens, GOOD, BAD),
        CachedRewardSession,
        (9, 8, 7),
    ),
}


@pytest.mark.parametrize("kind", SCORERS)
def test_probabilities_equal_those_of_whole_sequences(kind):
    build, scorer_of, session_type, step_tokens = SCORERS[kind]
    model, prompts, responses = build(), tiny.prompts(3, seed=4), tiny.random_tokens(3, 7)
    session, rows = scorer_of(model, step_tokens).start_session(prompts, 7), torch.arange(3)
    assert isinstance(session, session_type)

    def expected(response, row):
        # a step that ends the response is read without the end, if anything stands behind steps
        kept = response[:-1] if step_tokens and response[-1] == tiny.EOS else response
        return whole_probability(model, [*prompts[row], *kept, *step_tokens])

    for step in (0, 3):
        candidates = tiny.random_tokens(3, 4, seed=step)
        candidates[:, 2] = tiny.EOS
        probabilities = [
            [expected([*responses[row, :step].tolist(), token], row) for token in tokens]
            for row, tokens in enumerate(candidates.tolist())
        ]
        scores = session.score(rows, responses[:, :step], candidates)
        torch.testing.assert_close(scores, torch.tensor(probabilities), atol=2e-5, rtol=1e-4)
    lengths = [4, 7, 6]
    responses[0, 3] = tiny.EOS
    probabilities = [expected(responses[row, :n].tolist(), row) for row, n in enumerate(lengths)]
    for _ in range(2):
        scores = session.score_responses(rows, responses, torch.tensor(lengths))
        torch.testing.assert_close(scores, torch.stack(probabilities), atol=2e-5, rtol=1e-4)


def test_the_head_is_counted_once_where_it_is_made_before_the_backbone():
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = classifier(
        XLMRobertaConfig(vocab_size=60, intermediate_size=24, max_position_embeddings=64, **size)
    )
    assert ProcessRewardScorer(model).head is model.classifier


def test_process_rewards_steer_and_load(tmp_path):
    model, prompts = tiny.language_model("qwen3"), tiny.prompts(3)
    classifier().save_pretrained(tmp_path / "classifier")
    tiny.language_model("llama", seed=5).save_pretrained(tmp_path / "shepherd")
    for scorer in (
        ProcessRewardScorer.from_pretrained(tmp_path / "classifier", [9]),
        StepTokenScorer.from_pretrained(tmp_path / "shepherd", [9], GOOD, BAD),
    ):
        steering = Steering(scorer, EveryToken(), beta=8.0)
        batch = tiny.generate(model, prompts, steering, max_new_tokens=5)
        alone = [tiny.generate(model, [p], steering, max_new_tokens=5)[0] for p in prompts]
        assert tiny.tokens(batch) == tiny.tokens(alone)
        assert all(generation.cost.value_flops > 0 for generation in batch)


@pytest.mark.parametrize(
    "load",
    [
        ProcessRewardScorer.from_pretrained,
        lambda folder: StepTokenScorer.from_pretrained(folder, [9], GOOD, BAD),
    ],
)
def test_a_checkpoint_without_its_head_is_refused(tmp_path, load):
    tiny.language_model("qwen3").base_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no process reward model: expected all weights of"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classify(good_label=2), "good_label must be 0 to 1 for this model, got 2"),
        (lambda: classify(good_label=1.0), "good_label must be a whole number, got 1.0"),
        (lambda: classify(good_label=True), "good_label must be a whole number, got True"),
        (
            lambda: ProcessRewardScorer(classifier(labels=1), good_label=0),
            "must have at least two labels, Qwen3ForTokenClassification has 1",
        ),
        (lambda: classify([60]), f"step_tokens {RANGE}60"),
        (lambda: classify(end_tokens=[-1]), f"end_tokens {RANGE}-1"),
        (lambda: ask([], 1, 3), "at least one token"),
        (lambda: ask([9], 3, 3), "got step_tokens=.9., good=3, bad=3"),
        (lambda: ask([9], 3, 99), f"bad {RANGE}99"),
        (lambda: ask([9], 8.0, 3), "good must be a whole number, got 8.0"),
        (lambda: ask([9], 3, 8, end_tokens=[2, 99]), f"end_tokens {RANGE}99"),
    ],
)
def test_tokens_and_labels_must_exist(call, message):
    with pytest.raises(ValueError, match=message):
        call()

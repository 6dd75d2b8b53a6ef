"""transformers' own options through custom_generate: each works, or is refused in one sentence."""

import inspect
import threading
from functools import partial
from itertools import chain

import pytest
import torch
from peft import LoraConfig
from transformers import (
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from sia import Attention, Entropy, EntropyGate, SteeredGenerate, Steering, steered_generate
from tests.helpers import tiny
from tests.sia.scorers.test_reward import adapted

TOKENIZER = tiny.tokenizer()
MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
STEERING = Steering(VALUES, EntropyGate(1.5), 2.0)
PROMPTS = tiny.prompts(6)
WIDTH = max(map(len, PROMPTS))


def inputs(prompts=PROMPTS):
    return TOKENIZER(
        TOKENIZER.decode(prompts), return_tensors="pt", padding=True, add_special_tokens=False
    )


def generate(prompts=PROMPTS, custom_generate=steered_generate, **options):
    """Sample from all candidates by transformers."""
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 12}
    return MODEL.generate(
        **inputs(prompts), custom_generate=custom_generate, **(settings | options)
    )


def generations(**options):
    options = {"steering": STEERING, "seed": 5, "return_dict_in_generate": True} | options
    return generate(**options).generations


def responses(**options):
    return tiny.tokens(generations(**options))


def configured(prompts=PROMPTS, *, tokenizer=None, streamer=None, **options):
    """Sample by a `SteeredGenerate` with the settings that `responses` passes to the call."""
    decode = SteeredGenerate(STEERING, seed=5, tokenizer=tokenizer, streamer=streamer)
    return generate(prompts, decode, **options)


@pytest.mark.parametrize(
    ("options", "temperature"),
    [({"temperature": 0.7}, 0.7), ({"do_sample": False, "top_k": None}, 0)],
)
def test_responses_are_those_of_the_librarys_own_generate(options, temperature):
    out = generate(steering=STEERING, seed=5, return_dict_in_generate=True, **options)
    expected = tiny.tokens(tiny.generate(MODEL, PROMPTS, STEERING, temperature=temperature, seed=5))
    assert tiny.tokens(out.generations) == expected
    assert {generation.text for generation in out.generations} == {None}
    longest = max(map(len, expected))
    assert out.sequences.tolist() == [
        [*prompt, *tokens, *[0] * (longest - len(tokens))]
        for prompt, tokens in zip(inputs().input_ids.tolist(), expected, strict=True)
    ]


def test_several_samples_have_seeds_that_follow():
    samples = responses(num_return_sequences=3)
    for sample in range(3):
        expected = tiny.generate(MODEL, PROMPTS, STEERING, seed=5 + sample)
        assert samples[sample::3] == tiny.tokens(expected)


@pytest.mark.parametrize("kind", ["lists", "a mapping", "a padded tensor", "one per row"])
def test_value_prompts_are_one_per_prompt_or_row_in_any_form(kind):
    value_prompts = tiny.prompts(6, seed=1)
    encoding = inputs(value_prompts)
    forms = {
        "lists": value_prompts,
        "a mapping": encoding,
        "a padded tensor": encoding["input_ids"],
        "one per row": [row for row in value_prompts for _ in range(2)],
    }
    expected = tiny.generate(MODEL, PROMPTS, STEERING, seed=5, value_prompts=value_prompts)
    result = responses(value_prompts=forms[kind], num_return_sequences=2)
    assert result[::2] == tiny.tokens(expected) != responses(num_return_sequences=2)[::2]


def test_without_a_seed_torchs_own_generator_counts():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, other = generate().tolist(), generate().tolist()
        torch.manual_seed(1)
        assert generate().tolist() == first != other


@pytest.mark.parametrize(
    "change",
    [
        {"steering": None},
        {"seed": 6},
        {"top_k": 2},
        {"top_p": 0.5},
        {"temperature": 0.5},
        {"value_prompts": [[9, 9]] * 6},
    ],
)
def test_every_option_changes_the_responses(change):
    assert responses(**change) != responses()


def test_processors_of_transformers_are_applied():
    assert responses(top_k=50) == responses()  # their default keeps all ten candidates
    assert responses(steering=None, top_k=1) == responses(steering=None, do_sample=False)
    assert {len(tokens) for tokens in responses(min_new_tokens=12)} == {12}


def test_sequences_are_a_tensor_unless_a_dict_is_requested():
    sequences = generate(steering=STEERING, seed=5)
    out = configured(tokenizer=TOKENIZER, return_dict_in_generate=True)
    assert torch.equal(out.sequences, sequences)
    assert not sequences.is_inference()  # may be trained on
    assert [generation.text for generation in out.generations] == [
        TOKENIZER.decode(tokens, skip_special_tokens=True) for tokens in responses()
    ]


def test_stop_strings_end_a_response():
    usual, tokenizer = responses(), tiny.letters()
    text = tokenizer.decode(usual[0][2:4])
    out = configured(tokenizer=tokenizer, stop_strings=text, return_dict_in_generate=True)
    for before, after in zip(usual, tiny.tokens(out.generations), strict=True):
        ends = [n for n in range(len(before) + 1) if text in tokenizer.decode(before[:n])]
        assert after == before[: ends[0] if ends else None]
    assert len(out.generations[0].token_ids) == 4
    assert not out.generations[0].finished  # by no end-of-sequence token
    own = SteeredGenerate(STEERING, seed=5, tokenizer=tokenizer, stop_strings=[text])
    assert torch.equal(generate(custom_generate=own), out.sequences)


def test_stopping_criteria_are_heeded():
    """What they and other callers get may be trained on."""
    kept = []

    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            kept.append(input_ids)
            return torch.tensor([input_ids.shape[1] >= WIDTH + 3] * len(input_ids))

    stopped = responses(stopping_criteria=StoppingCriteriaList([AfterThree()]))
    assert stopped == [tokens[:3] for tokens in responses()]
    MODEL(kept[-1]).logits.sum().backward()
    MODEL.zero_grad()


@pytest.mark.parametrize(("longest", "tokens"), [(-1, 1), (0, 1), (1, 1), (3, 3)])
def test_a_length_of_the_callers_is_asked_after_a_token(longest, tokens):
    criteria = StoppingCriteriaList([MaxLengthCriteria(WIDTH + longest)])
    assert responses(stopping_criteria=criteria) == [row[:tokens] for row in responses()]
    usual = MODEL.generate(**inputs(), max_new_tokens=12, stopping_criteria=criteria)
    assert usual.shape[1] == WIDTH + tokens


def test_processors_see_prompt_and_response():
    widths = []

    def forbid(ids, scores):
        widths.append(ids.shape[1])
        return scores.index_fill(1, torch.tensor([7, 8, 9]), -torch.inf)

    tokens = responses(logits_processor=[forbid], max_new_tokens=6)
    assert set(widths) == set(range(WIDTH, WIDTH + 6))
    assert {7, 8, 9}.isdisjoint(chain(*tokens))
    assert not {7, 8, 9}.isdisjoint(chain(*responses(max_new_tokens=6)))


def test_processors_with_rules_of_their_own_for_each_row_see_every_row():
    allowed = [{tiny.EOS, *range(10 + 5 * row, 25 + 5 * row)} for row in range(8)]
    tokens = responses(
        prompts=tiny.prompts(8),
        steering=Steering(VALUES, EntropyGate(0.0), candidates=60),
        prefix_allowed_tokens_fn=lambda row, ids: sorted(allowed[row]),
        max_new_tokens=20,
    )
    assert len({len(response) for response in tokens}) > 2  # rows end at different steps
    assert all(set(response) <= allowed[row] for row, response in enumerate(tokens))


class Recorder(BaseStreamer):
    def __init__(self):
        self.rows, self.ended = [], False

    def put(self, value):
        self.rows.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_prompt_then_tokens_as_they_come():
    streamer, (prompt, *_) = Recorder(), PROMPTS
    out = configured([prompt], streamer=streamer)
    assert streamer.rows == [prompt, *out[:, len(prompt) :].T.tolist()]
    assert streamer.ended


def test_a_streamer_gets_padding_for_rows_that_have_ended():
    streamer, prompts = Recorder(), tiny.prompts(40)
    out = configured(prompts, streamer=streamer, pad_token_id=5)
    tokens = out[:, inputs(prompts).input_ids.shape[1] :]
    assert streamer.rows[1:] == tokens.T.tolist()
    assert (tokens == 5).any()


def test_text_streamers_of_transformers_work(capsys):
    out = configured(PROMPTS[:1], streamer=TextStreamer(TOKENIZER, skip_prompt=True))
    text = TOKENIZER.decode(out[0, len(PROMPTS[0]) :])
    assert capsys.readouterr().out.strip() == text
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=20)
    thread = threading.Thread(target=partial(configured, PROMPTS[:1], streamer=streamer))
    thread.start()
    assert "".join(streamer).strip() == text
    thread.join()


def test_signals_are_observed():
    signals = [Entropy("vocabulary"), Attention(layers=(0,))]
    expected = tiny.generate(MODEL, PROMPTS, STEERING, seed=5, observe=signals)
    for a, b in zip(generations(observe=signals), expected, strict=True):
        torch.testing.assert_close(
            [a.signals[signal] for signal in signals],
            [b.signals[signal] for signal in signals],
            atol=1e-5,
            rtol=1e-5,
        )


def test_the_signature_names_what_may_be_passed():
    names = set(inspect.signature(steered_generate).parameters)
    assert {"steering", "candidates", "seed", "value_prompts", "observe", "stop_strings"} <= names


def ask(model=MODEL, input_ids=((7, 8),), **options):
    return model.generate(
        torch.tensor(input_ids), custom_generate=steered_generate, max_new_tokens=2, **options
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ask(num_beams=3), "steered decoding samples or decodes greedily, got num_beams=3"),
        (
            lambda: ask(cache_implementation="static"),
            "steered decoding keeps its own dynamic cache, got cache_implementation='static'",
        ),
        (
            lambda: ask(past_key_values=StaticCache(config=MODEL.config, max_cache_len=8)),
            "steered decoding keeps its own dynamic cache, got a StaticCache",
        ),
        (
            lambda: ask(past_key_values=MODEL(torch.tensor([[7, 8]])).past_key_values),
            "steered decoding starts from an empty cache, got one with 2 tokens",
        ),
        (
            lambda: ask(guidance_scale=1.5),
            "steered decoding has no classifier-free guidance, got guidance_scale=1.5",
        ),
        (
            lambda: ask(prompt_lookup_num_tokens=2),
            "steered decoding does not speculate, got prompt_lookup_num_tokens=2",
        ),
        *(
            (
                partial(ask, top_k=4, **{name: value}),
                f"steered decoding {reason}, got {name}={value!r}",
            )
            for name, value, reason in [
                ("penalty_alpha", 0.6, "has no contrastive search"),
                ("dola_layers", "high", "has no decoding by contrasting layers"),
                ("force_words_ids", [[9]], "has no constrained beam search"),
                ("assistant_early_exit", 1, "does not speculate"),
                ("use_mtp", True, "does not speculate"),
                ("num_beam_groups", 2, "samples or decodes greedily"),
            ]
        ),
        (
            lambda: ask(streamer=TextStreamer(TOKENIZER)),
            "steered decoding takes a streamer as SteeredGenerate(steering, streamer=streamer), "
            "got streamer",
        ),
        (
            lambda: ask(assistant_model=tiny.language_model("qwen3", seed=5)),
            "steered decoding does not speculate, got assistant_model",
        ),
        (
            lambda: ask(negative_prompt_ids=torch.tensor([[7]])),
            "steered decoding has no classifier-free guidance, got negative_prompt_ids",
        ),
        (
            lambda: ask(synced_gpus=True),
            "steered decoding does not wait for other processes (ZeRO stage 3, sharded weights), "
            "got synced_gpus",
        ),
        (
            lambda: ask(
                adapted(LoraConfig(target_modules=["q_proj"]), tiny.language_model("qwen3")),
                adapter_names=["__base__"],
            ),
            "steered decoding applies the active adapter to all rows, got adapter_names",
        ),
        (
            lambda: ask(stop_strings="a"),
            "stop strings need the tokenizer: expected custom_generate=SteeredGenerate(steering, "
            "tokenizer=tokenizer, stop_strings=['a']), got no tokenizer (transformers hands none "
            "to a callable)",
        ),
        (
            lambda: ask(tiny.language_model("gpt2"), token_type_ids=torch.tensor([[3, 4]])),
            "steered decoding does not know what to do with token_type_ids",
        ),
        (
            lambda: MODEL.generate(
                inputs_embeds=torch.zeros(1, 3, 32),
                custom_generate=steered_generate,
                max_new_tokens=2,
            ),
            "steered decoding does not know what to do with inputs_embeds",
        ),
        (
            lambda: ask(position_ids=torch.tensor([[4, 5]])),
            "steered decoding counts positions from the first token of each prompt, "
            "got other position_ids",
        ),
        (
            lambda: ask(steering=VALUES),
            "steering must be a Steering(scorer, gate, …), got ValueModel",
        ),
        (
            lambda: ask(return_dict_in_generate=True, output_scores=True),
            "steered decoding returns sequences and generations, got output_scores=True",
        ),
        (
            lambda: ask(return_dict_in_generate=True, output_hidden_states=True),
            "steered decoding returns sequences and generations, got output_hidden_states=True",
        ),
        (
            lambda: ask(value_prompts=[[7], [8]]),
            "value_prompts must be one per row: expected 1, got 2",
        ),
        (
            lambda: ask(input_ids=[[7, 0]], attention_mask=torch.tensor([[1, 0]])),
            'prompts must be padded on the left (tokenizer.padding_side = "left"), '
            "got padding on the right",
        ),
        (
            lambda: ask(suppress_tokens=list(range(60))),
            "logits processors must leave a token, they ruled out all 60 at step 0 of prompt 0",
        ),
        (
            lambda: ask(logits_processor=LogitsProcessorList([lambda ids, scores: scores / 0 * 0])),
            "logits must be numbers, the language model or a logits processor gave NaN or "
            "infinity at step 0 of prompt 0",
        ),
    ],
)
def test_options_that_have_no_meaning_are_refused(call, message):
    with pytest.raises((ValueError, TypeError, FloatingPointError)) as error:
        call()
    assert str(error.value) == message

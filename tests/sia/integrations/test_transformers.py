"""transformers' own ways through custom_generate: what is asked of generate() works, or is refused in one sentence."""

from __future__ import annotations

import inspect
import threading
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from sia import (
    Attention,
    AttentionGate,
    Entropy,
    EntropyGate,
    EveryToken,
    RewardScorer,
    SteeredGenerate,
    Steering,
    generate,
    steered_generate,
)
from tests.helpers import tiny
from tests.helpers.reference import decode as reference
from tests.helpers.reference import whole_values

TOKENIZER = tiny.tokenizer()
MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
STEERING = Steering(VALUES, EntropyGate(1.5), 2.0)
PROMPTS = tiny.prompts(6)
OURS = {
    "custom_generate": steered_generate,
    "steering": STEERING,
    "seed": 5,
    "do_sample": True,
    "top_k": 0,
}


def inputs(prompts):
    return TOKENIZER(
        TOKENIZER.decode(prompts), return_tensors="pt", padding=True, add_special_tokens=False
    )


def configured(prompts=PROMPTS, tokenizer=None, streamer=None, **options):
    """What generate returns by a `SteeredGenerate` with the same settings as `OURS`."""
    decode = SteeredGenerate(STEERING, seed=5, tokenizer=tokenizer, streamer=streamer)
    return MODEL.generate(
        **inputs(prompts), custom_generate=decode, do_sample=True, top_k=0, **options
    )


def responses(**options):
    """Token ids of each response, without padding."""
    settings = {**OURS, "max_new_tokens": 12, **options}
    out = MODEL.generate(**inputs(PROMPTS), **settings, return_dict_in_generate=True)
    return [g.token_ids.tolist() for g in out.generations]


def test_steering_changes_what_transformers_returns_and_sampling_without_it_is_top_k():
    assert responses() != responses(steering=None)
    assert responses() != responses(seed=6)
    assert responses() == responses(top_k=50)  # transformers' default keeps all ten candidates
    assert responses() != responses(top_k=2)
    assert responses() != responses(top_p=0.5)
    assert responses() != responses(temperature=0.5)
    assert responses() != responses(value_prompts=[[9, 9]] * 6)


def test_sequences_are_a_tensor_unless_a_dict_is_asked_for():
    sequences = MODEL.generate(**inputs(PROMPTS), **OURS, max_new_tokens=5)
    out = MODEL.generate(**inputs(PROMPTS), **OURS, max_new_tokens=5, return_dict_in_generate=True)
    assert torch.equal(out.sequences, sequences)
    assert not sequences.is_inference()  # may be trained on
    assert {type(g.text) for g in out.generations} == {type(None)}
    texts = configured(tokenizer=TOKENIZER, max_new_tokens=5, return_dict_in_generate=True)
    assert torch.equal(texts.sequences, sequences)
    assert [g.text for g in texts.generations] == [
        TOKENIZER.decode(g.token_ids, skip_special_tokens=True) for g in out.generations
    ]


def letters():
    """A byte-level tokenizer of single letters, as transformers' stop strings want one."""
    vocabulary = {chr(ord("A") + i): i for i in range(tiny.VOCABULARY - 3)} | {
        "Ġ": 57,
        "<s>": 58,
        "</s>": 59,
    }
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_stop_strings_end_a_response():
    usual, tokenizer = responses(), letters()
    text = tokenizer.decode(usual[0][2:4])
    out = configured(
        tokenizer=tokenizer, stop_strings=text, max_new_tokens=12, return_dict_in_generate=True
    )
    for before, after in zip(usual, out.generations, strict=True):
        ends = [n for n in range(len(before) + 1) if text in tokenizer.decode(before[:n])]
        assert after.token_ids.tolist() == before[: ends[0] if ends else None]
    assert len(out.generations[0].token_ids) == 4
    assert not out.generations[0].finished  # by no end-of-sequence token
    own = SteeredGenerate(STEERING, seed=5, tokenizer=tokenizer, stop_strings=[text])
    same = MODEL.generate(
        **inputs(PROMPTS), custom_generate=own, do_sample=True, top_k=0, max_new_tokens=12
    )
    assert torch.equal(same, out.sequences)


def test_stopping_criteria_are_heeded():
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= length + 3] * len(input_ids))

    length = inputs(PROMPTS).input_ids.shape[1]
    usual = responses()
    assert responses(stopping_criteria=StoppingCriteriaList([AfterThree()])) == [
        tokens[:3] for tokens in usual
    ]


def test_processors_see_prompt_and_response():
    seen = []

    def forbid(ids, scores):
        seen.append(ids.shape)
        return scores.index_fill(1, torch.tensor([7, 8, 9]), -torch.inf)

    tokens = responses(logits_processor=[forbid], max_new_tokens=6)
    width = inputs(PROMPTS).input_ids.shape[1]
    assert {shape[1] for shape in seen} == set(range(width, width + 6))
    assert not {7, 8, 9} & {token for response in tokens for token in response}
    assert {7, 8, 9} & {token for response in responses(max_new_tokens=6) for token in response}


def test_processors_with_rules_of_their_own_for_each_row_see_every_row():
    prompts = tiny.prompts(8)
    allowed = [sorted({tiny.EOS, *range(10 + 5 * row, 25 + 5 * row)}) for row in range(8)]
    options = {
        **OURS,
        "max_new_tokens": 20,
        "return_dict_in_generate": True,
        "steering": Steering(VALUES, EntropyGate(0.0), candidates=60),
    }
    out = MODEL.generate(
        **inputs(prompts), **options, prefix_allowed_tokens_fn=lambda row, ids: allowed[row]
    )
    assert len({len(g.token_ids) for g in out.generations}) > 2  # rows end at different steps
    for row, generation in enumerate(out.generations):
        assert set(generation.token_ids.tolist()) <= set(allowed[row])


def test_what_callers_see_may_be_trained_on():
    kept = []

    class Keep(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            kept.append(input_ids)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    responses(stopping_criteria=StoppingCriteriaList([Keep()]), max_new_tokens=2)
    MODEL(kept[-1]).logits.sum().backward()
    MODEL.zero_grad()


class Recorder(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_prompt_and_tokens_as_they_come():
    streamer = Recorder()
    out = configured(PROMPTS[:1], streamer=streamer, max_new_tokens=8)
    width = len(PROMPTS[0])
    assert streamer.got == [
        out[0, :width].tolist(),
        *[[token] for token in out[0, width:].tolist()],
    ]
    assert streamer.ended


def test_a_streamer_gets_padding_for_rows_that_have_ended():
    streamer, prompts = Recorder(), tiny.prompts(40)
    out = configured(prompts, streamer=streamer, max_new_tokens=12, pad_token_id=5)
    width = inputs(prompts).input_ids.shape[1]
    assert streamer.got[1:] == out[:, width:].T.tolist()
    assert (out[:, width:] == 5).any()


def test_text_streamers_of_transformers_work(capsys):
    streamer = TextStreamer(TOKENIZER, skip_prompt=True)
    out = configured(PROMPTS[:1], streamer=streamer, max_new_tokens=8)
    assert capsys.readouterr().out.strip() == TOKENIZER.decode(out[0, len(PROMPTS[0]) :])
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=20)
    thread = threading.Thread(
        target=configured, args=(PROMPTS[:1],), kwargs={"max_new_tokens": 8, "streamer": streamer}
    )
    thread.start()
    assert "".join(streamer).strip() == TOKENIZER.decode(out[0, len(PROMPTS[0]) :])
    thread.join()


def test_signals_are_observed():
    signals = [Entropy("vocabulary"), Attention(layers=(0,))]
    out = MODEL.generate(
        **inputs(PROMPTS), **OURS, max_new_tokens=6, observe=signals, return_dict_in_generate=True
    )
    expected = generate(
        MODEL,
        TOKENIZER,
        PROMPTS,
        STEERING,
        seed=5,
        max_new_tokens=6,
        observe=signals,
        progress=False,
    )
    for a, b in zip(out.generations, expected, strict=True):
        for signal in signals:
            torch.testing.assert_close(a.signals[signal], b.signals[signal], atol=1e-5, rtol=1e-5)


def test_the_signature_names_what_may_be_passed():
    names = set(inspect.signature(steered_generate).parameters)
    assert {"steering", "candidates", "seed", "value_prompts", "observe", "stop_strings"} <= names


def ask(**options):
    return MODEL.generate(
        torch.tensor([[7, 8]]), custom_generate=steered_generate, max_new_tokens=2, **options
    )


def filled_cache():
    return MODEL(torch.tensor([[7, 8]]), use_cache=True).past_key_values


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ask(num_beams=3), "steered_generate samples or decodes greedily, got num_beams=3"),
        (
            lambda: ask(cache_implementation="static"),
            'steered_generate keeps its own dynamic cache, got cache_implementation="static"',
        ),
        (
            lambda: ask(past_key_values=StaticCache(config=MODEL.config, max_cache_len=8)),
            "steered_generate keeps its own dynamic cache, got a StaticCache",
        ),
        (
            lambda: ask(guidance_scale=1.5),
            "steered_generate has no classifier-free guidance, got guidance_scale=1.5",
        ),
        (
            lambda: ask(prompt_lookup_num_tokens=2),
            "steered_generate does not speculate, got prompt_lookup_num_tokens=2",
        ),
        (
            lambda: ask(stop_strings="a"),
            "stop strings need the tokenizer: expected custom_generate=SteeredGenerate(steering, "
            "tokenizer=tokenizer, stop_strings=['a']), got no tokenizer (transformers hands none "
            "to a callable)",
        ),
        (
            lambda: tiny.language_model("gpt2").generate(
                torch.tensor([[7, 8]]),
                custom_generate=steered_generate,
                max_new_tokens=2,
                token_type_ids=torch.tensor([[3, 4]]),
            ),
            "steered_generate does not know what to do with token_type_ids",
        ),
        (
            lambda: MODEL.generate(
                inputs_embeds=torch.zeros(1, 3, 32),
                custom_generate=steered_generate,
                max_new_tokens=2,
            ),
            "steered_generate does not know what to do with inputs_embeds",
        ),
        (
            lambda: ask(position_ids=torch.tensor([[4, 5]])),
            "steered_generate counts positions from the first token of each prompt, got other position_ids",
        ),
        (
            lambda: ask(steering=VALUES),
            "steering must be a Steering(scorer, gate, …), got ValueModel",
        ),
        (
            lambda: ask(past_key_values=filled_cache()),
            "steered_generate starts from an empty cache, got one with 2 tokens",
        ),
        (
            lambda: ask(return_dict_in_generate=True, output_scores=True),
            "steered_generate returns sequences and generations, got output_scores=True",
        ),
        (
            lambda: ask(return_dict_in_generate=True, output_hidden_states=True),
            "steered_generate returns sequences and generations, got output_hidden_states=True",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value) == message


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

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
        generate(T5ForConditionalGeneration(config), TOKENIZER, [[7]], progress=False)


def test_models_with_learned_positions_refuse_what_does_not_fit():
    model = tiny.language_model("gpt2")  # 128 positions; the last token is never fed
    assert (
        len(
            generate(
                model, TOKENIZER, [[7] * 100], max_new_tokens=29, temperature=0, progress=False
            )
        )
        == 1
    )
    with pytest.raises(
        ValueError, match="must fit into the 128 positions of GPT2LMHeadModel, they may take 129"
    ):
        generate(model, TOKENIZER, [[7] * 100], max_new_tokens=30, progress=False)
    steering = Steering(tiny.value_model("gpt2"), EveryToken())
    rewarded = Steering(RewardScorer(tiny.reward_model("gpt2")), EveryToken())
    assert generate(
        model, TOKENIZER, [[7] * 100], steering, max_new_tokens=28, temperature=0, progress=False
    )
    with pytest.raises(
        ValueError, match="the 128 positions of GPT2Model, they may take 129"
    ):  # the last candidate is fed
        generate(model, TOKENIZER, [[7] * 100], steering, max_new_tokens=29, progress=False)
    with pytest.raises(
        ValueError, match="the 128 positions of GPT2Model, they may take 130"
    ):  # and the end after it
        generate(model, TOKENIZER, [[7] * 100], rewarded, max_new_tokens=29, progress=False)


def test_half_precision_language_model_and_full_precision_value_model():
    half = tiny.language_model("qwen3").to(torch.bfloat16)
    for values in (VALUES, tiny.value_model("qwen3").to(torch.bfloat16)):
        assert values.head.weight.dtype == torch.float32
        assert torch.equal(values.head.weight, VALUES.head.weight)
        for gate in (EveryToken(), EntropyGate(1.5), AttentionGate(2.0)):
            found = generate(
                half,
                TOKENIZER,
                PROMPTS,
                Steering(values, gate, 2.0),
                max_new_tokens=6,
                progress=False,
            )
            assert all(torch.from_numpy(g.kl).isfinite().all() for g in found)
            for prompt, generation in zip(PROMPTS, found, strict=True):
                settings = {
                    "beta": 2.0,
                    "candidates": 10,
                    "max_new_tokens": 1,
                    "temperature": 1.0,
                    "seed": 0,
                    "eos": tiny.EOS,
                }
                opens = {True: lambda looks: True, False: lambda looks: False}[
                    bool(generation.steered[0])
                ]
                _, entropy, _, _, kl = reference(
                    half, partial(whole_values, values), prompt, opens, **settings
                )
                assert generation.entropy[0] == pytest.approx(entropy[0], rel=0.02)
                assert generation.kl[0] == pytest.approx(kl[0], rel=0.1, abs=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("model_device", "value_device"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")]
)
def test_devices_may_differ(model_device, value_device):
    model, values = (
        tiny.language_model("qwen3").to(model_device),
        tiny.value_model("qwen3").to(value_device),
    )
    for gate in (EntropyGate(1.5), AttentionGate(2.0)):
        expected = generate(
            MODEL, TOKENIZER, PROMPTS, Steering(VALUES, gate, 2.0), max_new_tokens=8, progress=False
        )
        found = generate(
            model, TOKENIZER, PROMPTS, Steering(values, gate, 2.0), max_new_tokens=8, progress=False
        )
        assert [g.token_ids.tolist() for g in found] == [g.token_ids.tolist() for g in expected]


def test_models_that_accelerate_offloads_work():
    from accelerate import cpu_offload

    expected = generate(MODEL, TOKENIZER, PROMPTS, STEERING, max_new_tokens=6, progress=False)
    model, values = tiny.language_model("qwen3"), tiny.value_model("qwen3")
    for module in (model, values.backbone):
        cpu_offload(module, execution_device="cpu")
    found = generate(
        model,
        TOKENIZER,
        PROMPTS,
        Steering(values, STEERING.gate, STEERING.beta),
        max_new_tokens=6,
        progress=False,
    )
    assert [g.token_ids.tolist() for g in found] == [g.token_ids.tolist() for g in expected]
    rewards = [tiny.reward_model("qwen3") for _ in range(2)]
    cpu_offload(rewards[1], execution_device="cpu")
    values = [
        RewardScorer(m)
        .start_session([[7, 8]], 4)
        .score(torch.tensor([0]), torch.tensor([[9]]), torch.tensor([[10, 11]]))
        for m in rewards
    ]
    torch.testing.assert_close(*values)


def test_two_threads_may_share_a_model():
    outputs = {}

    def respond(name, gate):
        outputs[name] = [
            generate(
                MODEL, TOKENIZER, PROMPTS, Steering(VALUES, gate), max_new_tokens=12, progress=False
            )
            for _ in range(4)
        ]

    gates = {"attention": AttentionGate(2.0), "entropy": EntropyGate(1.5)}
    threads = [threading.Thread(target=respond, args=item) for item in gates.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, gate in gates.items():
        respond("alone", gate)
        for together, alone in zip(outputs[name], outputs["alone"], strict=True):
            assert [g.token_ids.tolist() for g in together] == [g.token_ids.tolist() for g in alone]


def test_a_language_model_that_gives_no_numbers_is_named():
    model = tiny.language_model("qwen3")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(
        FloatingPointError,
        match="logits must be numbers, the language model gave NaN at step 0 of prompt 0",
    ):
        generate(model, TOKENIZER, [[7]], progress=False)

"""The decoding method for the Hub, loaded by transformers from its local folder."""

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GenerationConfig

from sia import EntropyGate, EveryToken, SteeredGenerate, Steering, ValueModel
from tests.helpers import hub_folders, tiny
from tests.sia.scorers.test_reward import adapted

ROOT = Path(__file__).resolve().parents[3]
METHOD = ROOT / "hub/custom_generate"
TOKENIZER = tiny.tokenizer()
MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
STEERING = Steering(VALUES, EveryToken(), 2.0, candidates=5)
PROMPTS = tiny.prompts(3)
INPUTS = TOKENIZER(
    TOKENIZER.decode(PROMPTS), return_tensors="pt", padding=True, add_special_tokens=False
)


@pytest.fixture(autouse=True)
def _modules(tmp_path, monkeypatch):
    """Let transformers copy the method's code into a folder of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))


def generate(model=MODEL, **options):
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 8} | options
    return model.generate(**INPUTS, custom_generate=str(METHOD), trust_remote_code=True, **options)


def test_arguments_are_those_of_a_steering():
    decode = SteeredGenerate(STEERING, seed=3, tokenizer=TOKENIZER)
    expected = MODEL.generate(
        **INPUTS, custom_generate=decode, do_sample=True, top_k=0, max_new_tokens=8
    )
    assert torch.equal(generate(steering=STEERING, seed=3), expected)
    settings = {"gate": EveryToken(), "beta": 2.0, "candidates": 5}
    output = generate(
        value_model=VALUES, seed=3, tokenizer=TOKENIZER, return_dict_in_generate=True, **settings
    )
    assert torch.equal(output.sequences, expected)
    assert output.generations[0].text is not None


@pytest.mark.parametrize("of_call", [False, True])
def test_stop_strings_of_generation_configs_are_heeded(of_call):
    model, tokenizer, config = tiny.language_model("qwen3"), tiny.letters(), None
    options = {"steering": STEERING, "seed": 3, "tokenizer": tokenizer}
    whole = generate(model, **options)[:, INPUTS.input_ids.shape[1] :]
    text = tokenizer.decode(whole[0, 2:4])
    expected = generate(model, **options, stop_strings=[text])
    if of_call:
        config = GenerationConfig(stop_strings=[text], eos_token_id=tiny.EOS, pad_token_id=0)
    else:
        model.generation_config.stop_strings = [text]
    assert torch.equal(generate(model, **options, generation_config=config), expected)
    assert expected.shape != whole.shape
    assert (config or model.generation_config).stop_strings == [text]


def test_value_models_are_loaded_once_until_their_files_change(tmp_path, monkeypatch):
    folder = tmp_path / "values"
    VALUES.save_pretrained(folder)
    loads = []
    load = ValueModel.from_pretrained
    monkeypatch.setattr(
        ValueModel, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k)
    )
    steering = Steering(VALUES, EntropyGate(1.5), 2.0)
    options = {"threshold": 1.5, "beta": 2.0, "seed": 1}
    for path in (str(folder), folder):
        assert torch.equal(
            generate(value_model=path, **options), generate(steering=steering, seed=1)
        )
    assert loads == [(str(folder), None)]
    other = tiny.value_model("qwen3", 1)
    other.save_pretrained(folder)
    steering = Steering(other, EntropyGate(1.5), 2.0)
    assert torch.equal(generate(value_model=folder, **options), generate(steering=steering, seed=1))
    assert len(loads) == 2


def test_a_value_model_is_loaded_again_when_the_backbone_that_it_names_changes(tmp_path):
    kept = []
    for seed in (0, 1):
        tiny.language_model("qwen3", seed).save_pretrained(tmp_path / "base")
        if not kept:
            backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            lora = LoraConfig(r=2, target_modules=["q_proj"])
            values = ValueModel.from_backbone(adapted(lora, backbone)).eval()
            values.head.load_state_dict(VALUES.head.state_dict())
            values.save_pretrained(tmp_path / "values")
        kept.append(generate(value_model=tmp_path / "values", threshold=0.0, beta=50.0, seed=1))
        steering = Steering(ValueModel.from_pretrained(tmp_path / "values"), EntropyGate(0.0), 50.0)
        assert torch.equal(kept[-1], generate(steering=steering, seed=1))
    assert not torch.equal(*kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected value_model, the path or Hub id of a value model .*, got neither"),
        (
            {"value_model": VALUES, "steering": Steering(VALUES, EveryToken())},
            "or steering, got both",
        ),
        (
            {"steering": STEERING, "threshold": 9.0, "beta": 5.0, "candidates": 2},
            "steering stands in place of threshold, beta, candidates: expected one or the other",
        ),
        (
            {"value_model": VALUES, "gate": EveryToken(), "threshold": 2.0},
            "gate stands in place of threshold: expected one or the other, got both",
        ),
        (
            {"value_model": VALUES, "value_subfolder": "b"},
            "a value_model in memory stands in place of value_subfolder",
        ),
        ({"value_model": VALUES, "assistant_model": MODEL}, "does not speculate"),
    ],
)
def test_unsupported_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(**options)


def test_a_model_may_bring_the_method(tmp_path):
    """from_pretrained(trust_remote_code=True) puts it in the place of `generate`."""
    hub_folders.save_model(tmp_path / "model", "qwen3", 0)
    (tmp_path / "model/custom_generate").symlink_to(METHOD / "custom_generate")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert isinstance(model.generate, partial)
    values = tiny.value_model("qwen3", vocabulary=model.config.vocab_size)
    steered, plain = (
        model.generate(
            **INPUTS, value_model=values, gate=EveryToken(), beta=beta, max_new_tokens=8, seed=0
        )
        for beta in (9.0, 0.0)
    )
    assert steered.shape[0] == plain.shape[0] == 3
    assert not torch.equal(steered, plain)

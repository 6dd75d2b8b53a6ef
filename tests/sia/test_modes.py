"""Responses do not depend on settings around the call, and models are left as they were found."""

import warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, Qwen3ForCausalLM

from sia import (
    AttentionGate,
    AutoregressiveScorer,
    EntropyGate,
    EveryToken,
    JunctionGate,
    QHead,
    RewardScorer,
    RolloutScorer,
    Steering,
    ValueModel,
    best_of_n,
    distill,
    fit_junction_gate,
    fit_q_head,
    generate,
    log_likelihoods,
)
from tests.helpers import tiny

PROMPTS = tiny.prompts(4)
LORA = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False)


def adapted(build, lora=LORA):
    """The model with a LoRA whose dropout would change every response."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers
        return tiny.seeded(lambda: get_peft_model(build, lora).eval(), 0)


MODEL = tiny.language_model("qwen3")
VALUES = ValueModel.from_backbone(adapted(tiny.language_model("qwen3", seed=1)))
VALUES.eval()
nn.init.normal_(VALUES.head.weight, generator=torch.Generator().manual_seed(0))
REWARD = RewardScorer(tiny.reward_model("qwen3"))
EXPERT = AutoregressiveScorer(adapted(tiny.language_model("llama", seed=4)))
MODELS = [MODEL, VALUES, REWARD.model, EXPERT.model]
CONFIGS = [MODEL.config, VALUES.backbone.config, REWARD.model.config, EXPERT.model.config]


def steered(scorer, gate=None):
    steering = Steering(scorer, gate or EveryToken(), 2.0)
    return tiny.tokens(tiny.generate(MODEL, PROMPTS, steering, max_new_tokens=6))


WAYS = {
    "values": lambda: steered(VALUES, EntropyGate(1.5)),
    "rewards": lambda: steered(REWARD),
    "likelihoods of an expert": lambda: steered(EXPERT),
    "rollouts": lambda: steered(RolloutScorer(MODEL, REWARD, 2)),
    "best of n": lambda: tiny.tokens(
        best_of_n(
            MODEL, tiny.tokenizer(), PROMPTS, REWARD, 2, Steering(VALUES, EveryToken()),
            max_new_tokens=4, progress=False,
        )
    ),
    "log-likelihoods": lambda: [
        x.total for x in log_likelihoods(MODEL, Steering(VALUES, EveryToken(), candidates=60),
                                         PROMPTS, [[7, 8]] * 4)
    ],
}  # fmt: skip
EXPECTED = {name: act() for name, act in WAYS.items()}


@contextmanager
def default_dtype(dtype):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


@contextmanager
def training():
    for model in MODELS:
        model.train()
    MODEL.gradient_checkpointing_enable()
    try:
        yield
        assert all(module.training for model in MODELS for module in model.modules())
    finally:
        MODEL.gradient_checkpointing_disable()
        for model in MODELS:
            model.eval()


@contextmanager
def configured(name, value):
    usual = [getattr(config, name) for config in CONFIGS]
    for config in CONFIGS:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, setting in zip(CONFIGS, usual, strict=True):
            setattr(config, name, setting)


SETTINGS = {
    "double by default": lambda: default_dtype(torch.float64),
    "half by default": lambda: default_dtype(torch.bfloat16),
    "another device by default": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "training": training,
    "no cache": lambda: configured("use_cache", False),
    "hidden states": lambda: configured("output_hidden_states", True),
    "nothing": nullcontext,
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_responses_do_not_depend_on_ambient_settings(setting, way):
    with SETTINGS[setting]():
        assert WAYS[way]() == EXPECTED[way]


def whole_reader():
    """A value model that cannot follow prepared masks (ALiBi)."""
    config = BloomConfig(
        vocab_size=60, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.5,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=tiny.EOS,
    )  # fmt: skip
    values = ValueModel.from_backbone(tiny.seeded(lambda: BloomForCausalLM(config), 0))
    nn.init.normal_(values.head.weight, generator=torch.Generator().manual_seed(0))
    return values


def reward_with_dropout():
    model = tiny.reward_model("qwen3")
    model.score = nn.Sequential(nn.Dropout(0.5), model.score)
    return RewardScorer(model)


def expert_with_adapted_head():
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=["lm_head"], init_lora_weights=False)
    return AutoregressiveScorer(adapted(tiny.language_model("llama", seed=4), lora))


@pytest.mark.parametrize("build", [whole_reader, reward_with_dropout, expert_with_adapted_head])
def test_dropout_outside_the_backbone_is_off_too(build):
    scorer = build()
    (scorer if isinstance(scorer, ValueModel) else scorer.model).train()
    candidates = torch.tensor([0, 1]), torch.tensor([[9], [10]]), torch.tensor([[11, 12], [13, 14]])
    first, second = (
        scorer.start_session([[7, 8], [11, 12, 13]], 4).score(*candidates) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("way", WAYS)
def test_autocast_reaches_the_models_as_in_transformers(way):
    with torch.autocast("cpu", torch.bfloat16):
        result = WAYS[way]()
        greedy = tiny.generate(MODEL, [[7, 8]], temperature=0, max_new_tokens=4)
        usual = MODEL.generate(torch.tensor([[7, 8]]), do_sample=False, max_new_tokens=4)
    assert np.shape(result[0]) == np.shape(EXPECTED[way][0])
    assert tiny.tokens(greedy) == usual[:, 2:].tolist()
    if way == "log-likelihoods":
        np.testing.assert_allclose(result, EXPECTED[way], rtol=0.05)


def fitted(setting):
    """Return responses under a gate and heads fitted, saved and loaded in this setting."""
    values = tiny.value_model("qwen3")
    options = {"max_new_tokens": 4, "progress": False}
    with setting(), TemporaryDirectory() as folder:
        distill(
            values, PROMPTS, [[7, 8]] * 4, [1.0, 0.0, 0.5, 0.2],
            loss="mean", epochs=1, learning_rate=1e-2, batch_size=2, seed=0,
        )  # fmt: skip
        head = fit_q_head(MODEL, tiny.tokenizer(), values, PROMPTS, epochs=1, **options).scorer
        gate = fit_junction_gate(MODEL, tiny.tokenizer(), values, PROMPTS, epochs=1, **options).gate
        head.save_pretrained(folder)
        head = QHead.from_pretrained(folder)
    return steered(values), steered(head), steered(head, gate)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("setting", [torch.no_grad, *SETTINGS.values()])
def test_training_does_not_depend_on_ambient_settings(setting):
    assert fitted(setting) == fitted(nullcontext)


def compiled(place):
    """A model of which this is compiled."""
    model = tiny.language_model("qwen3")
    if place == "wrapped":
        return torch.compile(model, backend="eager")
    if place == "in place":
        model.compile(backend="eager")
    elif place == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.model = torch.compile(model.model, backend="eager")
    return model


@pytest.mark.parametrize("place", ["wrapped", "in place", "forward", "backbone"])
@pytest.mark.parametrize(
    ("scorer", "gate"),
    [
        (VALUES, JunctionGate(0.1, tiny.predictor())),
        (VALUES, AttentionGate(1.0)),
        (tiny.q_head(), EveryToken()),
    ],
)
def test_a_compiled_model_is_the_one_that_a_head_was_fitted_to(scorer, gate, place):
    decode = partial(tiny.generate, prompts=PROMPTS, steering=Steering(scorer, gate, beta=3.0))
    twice = compiled(place)
    expected = tiny.tokens(decode(MODEL))
    assert [tiny.tokens(decode(twice)) for _ in range(2)] == [expected, expected]


@pytest.mark.parametrize("place", ["model", "scorer"])
def test_models_without_weights_are_refused(place):
    with torch.device("meta"):
        empty = Qwen3ForCausalLM(MODEL.config)
    values = ValueModel.from_backbone(empty) if place == "scorer" else VALUES
    name = "Qwen3Model" if place == "scorer" else "Qwen3ForCausalLM"
    message = f'{name} must have weights, they are on the device "meta": load it with from_pre'
    with pytest.raises(ValueError, match=message):
        tiny.generate(empty if place == "model" else MODEL, [[7]], Steering(values, EveryToken()))


def test_modes_are_restored_after_an_error_too():
    model, values = tiny.language_model("qwen3"), tiny.value_model("qwen3")
    model.train()
    model.lm_head.eval()  # frozen by its owner
    values.train()
    with torch.no_grad():
        values.head.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="at step 0 of prompt 0"):
        tiny.generate(model, [[7]], Steering(values, EveryToken()))
    assert all(module.training for module in values.modules())
    assert [name for name, m in model.named_modules() if not m.training] == ["lm_head"]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("layers", ["all", "head"])
def test_models_that_torch_quantises_for_the_processor_decode(layers):
    """Bookkeeping does not ask for weights that such layers do not have."""
    model = tiny.language_model("llama")
    kinds = {nn.Linear} if layers == "all" else {"lm_head"}
    quantised = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    usual = quantised.generate(torch.tensor([[7, 8]]), do_sample=False, max_new_tokens=6)
    (generation,) = tiny.generate(quantised, [[7, 8]], temperature=0, max_new_tokens=6)
    assert generation.token_ids.tolist() == usual[0, 2:].tolist()
    values = tiny.value_model("llama")
    values.backbone = torch.ao.quantization.quantize_dynamic(values.backbone, {nn.Linear})
    for scorer in (values, AutoregressiveScorer(quantised)):
        (generation,) = generate(
            quantised, tiny.tokenizer(), [[7, 8]], Steering(scorer, EveryToken()),
            max_new_tokens=3, progress=False,
        )  # fmt: skip
        assert generation.steered.all()
        assert generation.cost.value_flops > 0

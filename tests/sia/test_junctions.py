"""Gates and values that read hidden states, against slow passes over whole sequences."""

import json
import math
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from sia import (
    DivergenceGate,
    EntropyGate,
    EveryToken,
    JunctionGate,
    Never,
    QHead,
    RandomGate,
    SteeredGenerate,
    Steering,
    ValueModel,
    VocabularyValueModel,
    best_of_n,
    calibrate,
    fit_junction_gate,
    fit_q_head,
    fit_vocabulary_value_model,
    log_likelihoods,
)
from sia._checkpoints import write_checkpoint
from sia._model_identity import ModelIdentity
from sia.fitting import auroc, captured_shares, output_vectors, train_q_head
from sia.signals import Divergence, PredictedDivergence
from sia.states import collect_states
from tests.helpers import tiny
from tests.helpers.reference import whole_values
from tests.helpers.tiny import candidate_values as head
from tests.helpers.tiny import predictor, q_head

MODEL, VALUES, PROMPTS = tiny.language_model("qwen3"), tiny.value_model("qwen3"), tiny.prompts(8)
K = 8


@torch.no_grad()
def whole_state(model, prefix):
    """Hidden state and logits at the end of a sequence, read without a cache."""
    outputs = model(input_ids=torch.tensor([prefix]), output_hidden_states=True)
    return outputs.hidden_states[-1][0, -1], outputs.logits[0, -1]


def states_of(generations):
    """The prefix before every token of some responses, in order."""
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        for step in range(len(generation.token_ids)):
            yield [*prompt, *generation.token_ids[:step].tolist()], generation, step


def slow_divergence(base, values, beta):
    p, q = base.softmax(0).tolist(), (base + beta * values).softmax(0).tolist()
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(("beta", "threshold"), [(0.5, 0.45), (2.0, 4.0)])
def test_divergence_gate_opens_by_the_regret_of_whole_sequences(beta, threshold):
    steering = Steering(VALUES, DivergenceGate(threshold), beta, candidates=K)
    generations = tiny.generate(MODEL, PROMPTS, steering, seed=3)
    for prefix, generation, step in states_of(generations):
        base, candidates = whole_state(MODEL, prefix)[1].topk(K)
        values = whole_values(VALUES, prefix, candidates.tolist())
        divergence = generation.signal(Divergence())[step]
        assert divergence == pytest.approx(slow_divergence(base, values, beta), abs=1e-4)
        assert generation.steered[step] == (divergence >= threshold)
    assert 0 < np.mean([generation.intervention_ratio for generation in generations]) < 1
    for generation in generations:  # the oracle asks at every step
        assert generation.cost.value_forwards == len(generation.token_ids)


def test_divergence_leaves_out_candidates_that_are_dropped():
    steering = Steering(VALUES, DivergenceGate(0.0), 2.0, candidates=K, min_probability=0.1)
    generations = tiny.generate(MODEL, PROMPTS, steering)
    for prefix, generation, step in states_of(generations):
        base, candidates = whole_state(MODEL, prefix)[1].topk(K)
        values = whole_values(VALUES, prefix, candidates.tolist())
        kept = (base.softmax(0) >= 0.1) | (base == base.max())
        expected = slow_divergence(base[kept], values[kept], 2.0)
        assert generation.signal(Divergence())[step] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_junction_gate_reads_the_last_hidden_state(family):
    model = tiny.language_model(family)
    scorer, observe = tiny.value_model(family), [PredictedDivergence(predictor(model))]
    unsteered = tiny.generate(model, PROMPTS, Steering(scorer, Never()), observe=observe)
    gate = calibrate(JunctionGate, unsteered, 0.4, predictor=predictor(model))
    steering = Steering(scorer, gate, candidates=K)
    generations = tiny.generate(model, PROMPTS, steering, seed=3)
    weights = gate.predictor.weights
    for prefix, generation, step in states_of(generations):
        hidden, _ = whole_state(model, prefix)
        inner = torch.nn.functional.gelu(weights["first.weight"] @ hidden + weights["first.bias"])
        log_divergence = weights["second.weight"] @ inner + weights["second.bias"]
        expected = log_divergence.clamp(-14, 5).exp().item()
        predicted = generation.signal(gate.signal)[step]
        assert predicted == pytest.approx(expected, rel=1e-2)
        assert generation.steered[step] == (predicted >= gate.threshold)
    assert 0 < np.mean([generation.intervention_ratio for generation in generations]) < 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_q_head_values_candidates_by_the_last_hidden_state(family):
    model = tiny.language_model(family)
    scorer = q_head(model)
    steering = Steering(scorer, EntropyGate(1.0), 1.5, candidates=K)
    generations = tiny.generate(model, PROMPTS, steering, temperature=0)
    for prefix, generation, step in states_of(generations):
        hidden, logits = whole_state(model, prefix)
        base, candidates = logits.topk(K)
        values = torch.stack([scorer.values(hidden[None], c.view(1, 1))[0, 0] for c in candidates])
        scores = base + 1.5 * values if generation.steered[step] else base
        assert generation.token_ids[step] == candidates[scores.argmax()]
    shifted = sum(int(generation.shifted.sum()) for generation in generations)
    assert shifted > 0
    assert generations[0].cost.value_forwards == 0  # no second model


def vocabulary_value_model():
    return VocabularyValueModel(VALUES.backbone, head())


def test_vocabulary_value_model_reads_its_backbone_before_the_candidates():
    scorer = vocabulary_value_model()
    value_prompts = tiny.prompts(8, seed=4)
    steering = Steering(scorer, RandomGate(0.4), 1.5, candidates=K)
    generations = tiny.generate(
        MODEL, PROMPTS, steering, temperature=0, value_prompts=value_prompts
    )
    for prefix, generation, step in states_of(generations):
        base, candidates = whole_state(MODEL, prefix)[1].topk(K)
        number = next(i for i, other in enumerate(generations) if other is generation)
        read = torch.tensor([[*value_prompts[number], *generation.token_ids[:step].tolist()]])
        with torch.no_grad():
            hidden = VALUES.backbone(input_ids=read).last_hidden_state[:, -1]
        scores = base + 1.5 * scorer.values(hidden, candidates[None])[0]
        chosen = scores if generation.steered[step] else base
        assert generation.token_ids[step] == candidates[chosen.argmax()]
    for generation in generations:
        assert generation.cost.value_forwards == generation.cost.junctions > 0


def attend_as_flash(module, query, key, value, attention_mask, scaling, **options):
    """Attention as the flash kernels compute it: row by row, without what is padding."""
    output = torch.zeros_like(query)
    groups, window = query.shape[1] // key.shape[1], options.get("sliding_window")
    if attention_mask is None:
        attention_mask = torch.ones(len(key), key.shape[2])
    assert attention_mask.shape == (len(key), key.shape[2])
    for row, seen in enumerate(attention_mask.bool()):
        fresh = seen[-query.shape[2] :]
        keys, values = (
            states[row, :, seen].repeat_interleave(groups, 0) for states in (key, value)
        )
        distance = torch.arange(int(fresh.sum()))[:, None] - torch.arange(int(seen.sum()))
        distance += int(seen.sum()) - int(fresh.sum())
        hidden = (distance < 0) | (distance >= (window or math.inf))
        scores = query[row, :, fresh] @ keys.transpose(1, 2) * scaling
        output[row, :, fresh] = scores.masked_fill(hidden, -math.inf).softmax(-1) @ values
    return output.transpose(1, 2), None


AttentionInterface.register("flash-by-row", attend_as_flash)
AttentionMaskInterface.register("flash-by-row", flash_attention_mask)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3"])
def test_vocabulary_value_model_needs_no_prepared_masks(family):
    steerings = []
    for implementation in ("sdpa", "flash-by-row"):
        backbone = tiny.value_model(family).backbone
        backbone.config._attn_implementation = implementation
        scorer = VocabularyValueModel(backbone, head())
        steerings.append(Steering(scorer, RandomGate(0.3), 1.5, candidates=K))
    usual, flash = (
        tiny.generate(MODEL, PROMPTS, steering, value_prompts=tiny.prompts(8, seed=4))
        for steering in steerings
    )
    assert tiny.tokens(usual) == tiny.tokens(flash)
    for one, other in zip(usual, flash, strict=True):
        np.testing.assert_allclose(one.kl, other.kl, atol=1e-5)
        assert one.cost == other.cost


@pytest.mark.parametrize(
    "steering",
    [
        Steering(VALUES, JunctionGate(1.0, predictor()), candidates=K),
        Steering(q_head(), EveryToken(), candidates=K),
        Steering(vocabulary_value_model(), JunctionGate(1.0, predictor()), candidates=K),
    ],
    ids=["junction gate", "Q-head", "vocabulary head"],
)
def test_the_same_alone_in_a_batch_and_through_transformers(steering):
    together = tiny.generate(MODEL, PROMPTS, steering, seed=5)
    alone = [tiny.generate(MODEL, [prompt], steering, seed=5)[0] for prompt in PROMPTS]
    through = [
        MODEL.generate(
            torch.tensor([prompt]),
            custom_generate=SteeredGenerate(steering, seed=5),
            do_sample=True,
            max_new_tokens=12,
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    assert tiny.tokens(together) == tiny.tokens(alone) == through
    likelihoods = log_likelihoods(MODEL, steering, PROMPTS, tiny.tokens(together))
    for generation, likelihood in zip(together, likelihoods, strict=True):
        assert likelihood.steered.tolist() == generation.steered.tolist()
        assert np.isfinite(likelihood.total)


def test_likelihoods_under_a_q_head_follow_the_chain_rule():
    scorer, prompt = q_head(), PROMPTS[0]
    steering = Steering(scorer, EveryToken(), 0.7, candidates=K)
    (generation,) = tiny.generate(MODEL, [prompt], steering)
    expected, prefix = 0.0, list(prompt)
    for token in generation.token_ids.tolist():
        hidden, logits = whole_state(MODEL, prefix)
        base, candidates = logits.topk(K)
        scores = (base + 0.7 * scorer.values(hidden[None], candidates[None])[0]).log_softmax(0)
        expected += scores[candidates == token].item()
        prefix.append(token)
    (likelihood,) = log_likelihoods(MODEL, steering, [prompt], tiny.tokens([generation]))
    assert likelihood.total == pytest.approx(expected, abs=1e-4)


def test_a_search_without_a_choice_is_generate():
    steering = Steering(q_head(), JunctionGate(1.0, predictor()), candidates=K)
    reward = tiny.value_model("qwen3", seed=9)
    options = {"max_new_tokens": 6, "progress": False, "seed": 4}
    best = best_of_n(MODEL, tiny.tokenizer(), PROMPTS, reward, 1, steering, **options)
    assert tiny.tokens(best) == tiny.tokens(tiny.generate(MODEL, PROMPTS, steering, **options))


def test_calibration_reaches_the_share():
    observe = [PredictedDivergence(predictor()), Divergence()]
    steering = Steering(VALUES, Never(), candidates=K)
    generations = tiny.generate(MODEL, tiny.prompts(40), steering, observe=observe)
    for gate_class, settings in (
        (JunctionGate, {"predictor": predictor()}),
        (DivergenceGate, {}),
    ):
        gate = calibrate(gate_class, generations, 0.25, **settings)
        levels = np.concatenate([generation.signal(gate.signal) for generation in generations])
        assert (levels >= gate.threshold).mean() == pytest.approx(0.25, abs=0.01)


def test_saved_and_loaded_to_the_last_bit(tmp_path):
    gate, scorer, vocabulary = JunctionGate(1.0, predictor()), q_head(), vocabulary_value_model()
    for saved in (gate, scorer, vocabulary):
        saved.save_pretrained(tmp_path)
    steerings = [Steering(scorer, gate), Steering(vocabulary, gate)]
    loaded_gate = JunctionGate.from_pretrained(tmp_path)
    assert loaded_gate == gate
    assert repr(loaded_gate) == repr(gate)
    again = [
        Steering(QHead.from_pretrained(tmp_path), loaded_gate),
        Steering(VocabularyValueModel.from_pretrained(tmp_path), loaded_gate),
    ]
    for before, after in zip(steerings, again, strict=True):
        one, other = (tiny.generate(MODEL, PROMPTS, s, seed=1) for s in (before, after))
        assert tiny.tokens(one) == tiny.tokens(other)
        for first, second in zip(one, other, strict=True):
            np.testing.assert_allclose(first.kl, second.kl, atol=1e-6)
    for name, tensor in scorer.values.state_dict().items():
        assert again[0].scorer.values.state_dict()[name].equal(tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_and_heads_compute_in_float32_under_autocast(dtype):
    hidden, candidates = (
        torch.randn(3, 32, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[7, 8]] * 3),
    )
    scorer = q_head()
    session = scorer.start_session([[7]] * 3, 4)
    session.observe(hidden)
    read = (
        lambda: predictor().predict(hidden),
        lambda: session.score(torch.arange(3), candidates, candidates),
        lambda: head()(hidden, candidates),
    )
    expected = [one() for one in read]
    with torch.autocast("cpu", dtype):
        for one, values in zip(read, expected, strict=True):
            assert torch.equal(one(), values)
        assert tiny.generate(MODEL, PROMPTS, Steering(scorer, JunctionGate(0.05, predictor())))


def test_a_head_stored_in_half_precision_is_read_in_single(tmp_path):
    q_head().save_pretrained(tmp_path)
    file = tmp_path / "q_head.safetensors"
    half = {name: weight.half() for name, weight in load_file(file).items()}
    save_file(half, file)
    loaded = QHead.from_pretrained(tmp_path).values.state_dict()
    assert {weight.dtype for weight in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], weight.float()) for name, weight in half.items())


def test_a_vocabulary_value_model_that_was_cast_is_restored_bit_for_bit(tmp_path):
    """Its rotations too, which no checkpoint of transformers holds."""
    scorer = VocabularyValueModel(tiny.value_model("qwen3").backbone.bfloat16(), head())
    scorer.save_pretrained(tmp_path)
    again = VocabularyValueModel.from_pretrained(tmp_path)
    prompt, none = [[*range(6, 50)]], torch.zeros(1, 0, dtype=torch.long)
    values, restored = (
        s.start_session(prompt, 4).score(torch.tensor([0]), none, torch.arange(6, 12)[None])
        for s in (scorer, again)
    )
    assert torch.equal(values, restored)


@pytest.mark.parametrize(
    ("load", "name", "title"),
    [
        (JunctionGate.from_pretrained, "junction_gate", "junction gate"),
        (QHead.from_pretrained, "q_head", "q head"),
        (VocabularyValueModel.from_pretrained, "vocabulary_head", "vocabulary head"),
    ],
)
def test_missing_and_damaged_files_are_refused(load, name, title, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no {title} in .*: there is no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"{name}.json is missing"):
        load(tmp_path)
    JunctionGate(1.0, predictor()).save_pretrained(tmp_path)
    q_head().save_pretrained(tmp_path)
    vocabulary_value_model().save_pretrained(tmp_path)
    weights = tmp_path / f"{name}.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"the {title} in .* cannot be read, a file is damaged"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("load", "name", "settings", "reason"),
    [
        (JunctionGate, "junction_gate", {"threshold": 1.0}, "'model' is missing"),
        (
            JunctionGate,
            "junction_gate",
            {"threshold": 1.0, "model": {"name": "", "first_entries": {}}},
            "'first.weight' is missing",
        ),
        (QHead, "q_head", {"sizes": {"hidden": 32, "width": 4}}, "unexpected keyword argument"),
        (VocabularyValueModel, "vocabulary_head", ["sizes"], "list indices must be integers"),
    ],
)
def test_checkpoints_of_other_content_are_refused(load, name, settings, reason, tmp_path):
    write_checkpoint(tmp_path, name, {"other": torch.zeros(1)}, settings)
    title = name.replace("_", " ")
    with pytest.raises(ValueError, match=f"must hold a {title} as save_pretrained .*{reason}"):
        load.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "entry", "value", "reason"),
    [
        ("junction_gate", "model", {"name": "", "first_entries": None}, "must hold numbers by the"),
        ("junction_gate", "model", {"name": "", "first_entries": [1]}, "must hold numbers by the"),
        ("q_head", "model", {"name": "", "first_entries": {"a": "x"}}, "must hold numbers by the"),
        ("q_head", "model", {"name": "", "entries": {"a": 1.0}}, "must hold numbers by the names"),
        ("q_head", "model", {"name": "", "entries": {"a": [None]}}, "must hold numbers by the"),
        ("q_head", "sizes", {"hidden": 32, "vocabulary": 60, "rank": -1}, "rank must be a whole"),
    ],
)
def test_settings_of_another_kind_are_refused(name, entry, value, reason, tmp_path):
    saved = {"junction_gate": JunctionGate(1.0, predictor()), "q_head": q_head()}[name]
    saved.save_pretrained(tmp_path)
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {entry: value}))
    with pytest.raises(ValueError, match=reason):
        type(saved).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second.weight": torch.ones(1, 3)}, r"must be of \(width, hidden\), .* got .*\(1, 3\)"),
        ({"second.bias": torch.tensor([torch.nan])}, "must be finite, got NaN or infinity"),
        ({"first.weight": torch.ones(6, 16)}, "reads hidden states of size 16, got 32: fit one"),
    ],
)
def test_weights_of_a_gate_that_do_not_fit_are_refused(change, message, tmp_path):
    """Other sizes of a layer, and NaN, on loading; those of another model at the first step."""
    gate = JunctionGate(0.0, predictor())
    write_checkpoint(
        tmp_path,
        "junction_gate",
        {**gate.predictor.weights, **change},
        {"threshold": 0.0, "model": asdict(gate.predictor.model)},
    )
    with pytest.raises(ValueError, match=message):
        tiny.generate(MODEL, [[7]], Steering(VALUES, JunctionGate.from_pretrained(tmp_path)))


def test_a_head_of_nan_is_refused(tmp_path):
    head = q_head()
    with torch.no_grad():
        head.values.bias.weight[3] = torch.nan
    head.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the weights of the head must be finite, got NaN"):
        QHead.from_pretrained(tmp_path)


def test_heads_that_would_read_another_backbone_are_kept_from_it(tmp_path):
    value, vocabulary = tiny.value_model("qwen3"), vocabulary_value_model()
    value.save_pretrained(tmp_path / "value")
    vocabulary.save_pretrained(tmp_path / "vocabulary")
    with pytest.raises(ValueError, match=r"it holds a value model \(value_head.safetensors\), whi"):
        vocabulary.save_pretrained(tmp_path / "value")
    with pytest.raises(ValueError, match=r"it holds a vocabulary head \(vocabulary_head.json\), w"):
        value.save_pretrained(tmp_path / "vocabulary")
    assert isinstance(ValueModel.from_pretrained(tmp_path / "value"), ValueModel)
    vocabulary.save_pretrained(tmp_path / "vocabulary")


def test_another_model_is_refused():
    other = tiny.language_model("qwen3", seed=7)
    for steering, fitted in (
        (Steering(VALUES, JunctionGate(1.0, predictor())), "junction gate"),
        (Steering(q_head(), EveryToken()), "Q-head"),
    ):
        with pytest.raises(ValueError, match=f"this {fitted} reads the hidden states of .* fit"):
            tiny.generate(other, PROMPTS, steering)
        with pytest.raises(ValueError, match=f"this {fitted} reads the hidden states of"):
            log_likelihoods(other, steering, [[7]], [[8]])


def test_identity_survives_another_dtype_but_no_adapters():
    identity = ModelIdentity.of(MODEL)
    identity.check(tiny.language_model("qwen3").to(torch.bfloat16), "gate")
    adapted = tiny.language_model("qwen3")
    adapted.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="with other weights: fit one to this model"):
        identity.check(adapted, "gate")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's use of transformers
def test_identity_is_of_the_adapters_that_are_active():
    settings = LoraConfig(
        target_modules=["embed_tokens", "q_proj"],
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    model = get_peft_model(tiny.language_model("qwen3"), settings)
    model.add_adapter("other", settings)
    inner = model.get_base_model()
    active = ModelIdentity.of(inner)
    with model.disable_adapter():
        disabled = ModelIdentity.of(inner)
        disabled.check(inner, "gate")
        with pytest.raises(ValueError, match="with other weights: fit one to this model"):
            active.check(inner, "gate")
    active.check(inner, "gate")
    model.set_adapter("other")
    for identity in (active, disabled):
        with pytest.raises(ValueError, match="with other weights: fit one to this model"):
            identity.check(inner, "gate")
    model.set_adapter("default")
    model.delete_adapter("other")
    active.check(inner, "gate")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's use of transformers
def test_identity_is_that_of_the_model_that_peft_wraps():
    """PEFT's `generate` hands on the model within."""
    settings = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = get_peft_model(tiny.language_model("qwen3"), settings)
    inner = wrapped.get_base_model()
    identity = ModelIdentity.of(wrapped)
    assert identity == ModelIdentity.of(inner)
    entries = {f"base_model.model.{name}": few for name, few in identity.entries.items()}
    for model in (wrapped, inner):
        ModelIdentity.from_settings("", entries).check(model, "gate")  # of an older file
    inner.lm_head = of_bytes(inner.lm_head)
    for model in (wrapped, inner):
        identity.check(model, "gate")


def with_layer(build_layer):
    """The model with another output projection in its first layer."""
    model = tiny.language_model("qwen3")
    attention = model.model.layers[0].self_attn
    attention.o_proj = build_layer(attention.o_proj)
    return model


def redrawn(linear):
    with torch.no_grad():
        first = linear.weight[0, 0].clone()
        torch.nn.init.normal_(linear.weight)
        linear.weight[0, 0] = first
    return linear


def pruned():
    model = tiny.language_model("qwen3")
    model.model.layers = model.model.layers[:1]
    return model


def of_bytes(linear):
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return linear


def of_buffers(linear):
    layer = torch.nn.Module()
    layer.register_buffer("qweight", linear.weight.to(torch.int32))
    layer.register_buffer("scales", torch.ones(linear.out_features))
    return layer


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_identity_survives_quantised_layers_but_none_missing_or_redrawn():
    identity = ModelIdentity.of(MODEL)
    quantised = torch.ao.quantization.quantize_dynamic(
        tiny.language_model("qwen3"), {torch.nn.Linear}, dtype=torch.qint8
    )
    for model in (quantised, with_layer(of_bytes), with_layer(of_buffers)):
        identity.check(model, "gate")
    model = tiny.language_model("qwen3")
    model.resize_token_embeddings(tiny.VOCABULARY + 8)
    identity.check(model, "gate")
    for model in (pruned(), with_layer(lambda _: torch.nn.Identity()), with_layer(redrawn)):
        with pytest.raises(ValueError, match="with other weights: fit one to this model"):
            identity.check(model, "gate")


def test_identities_of_older_files_hold_first_entries(tmp_path):
    q_head().save_pretrained(tmp_path)
    file = tmp_path / "q_head.json"
    settings = json.loads(file.read_text())
    entries = settings["model"].pop("entries")
    assert max(map(len, entries.values())) == 5
    settings["model"]["first_entries"] = {name: few[0] for name, few in entries.items()}
    file.write_text(json.dumps(settings))
    head = QHead.from_pretrained(tmp_path)
    head.model.check(MODEL, "Q-head")
    with pytest.raises(ValueError, match="this Q-head reads the hidden states of"):
        head.model.check(tiny.language_model("qwen3", seed=7), "Q-head")


@cache
def fits():
    """A gate and heads fitted to the values of a head on the model's own hidden state."""
    teacher, options = q_head(), {"max_new_tokens": 12, "progress": False, "candidates": K}
    prompts = tiny.prompts(60, seed=1)
    tokenizer = tiny.tokenizer()
    gate = fit_junction_gate(MODEL, tokenizer, teacher, prompts, epochs=60, **options)
    student = fit_q_head(MODEL, tokenizer, teacher, prompts, rank=8, epochs=100, **options)
    return gate, student


def test_fitted_gate_captures_more_than_entropy():
    fit, _ = fits()
    captured = {ranking.name: ranking.captured[0.2] for ranking in fit.rankings}
    assert captured["random"] < 0.35
    assert captured["entropy"] + 0.1 < captured["predictor"] <= captured["oracle"]
    assert fit.gate.threshold > 0
    assert sum(fit.states) > 500


def test_a_share_of_less_than_one_step_opens_the_gate_once():
    options = {"max_new_tokens": 4, "epochs": 1, "progress": False}
    few, all_ = (
        fit_junction_gate(MODEL, tiny.tokenizer(), VALUES, PROMPTS, share=share, **options)
        for share in (1e-3, 1.0)
    )
    assert few.gate.threshold > all_.gate.threshold


def test_fitted_head_explains_its_teacher():
    _, fit = fits()
    assert 0.6 < fit.explained < 1
    captured = {ranking.name: ranking.captured[0.2] for ranking in fit.rankings}
    assert captured["entropy"] < captured["head"] <= captured["oracle"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch's
def test_heads_are_fitted_to_models_that_torch_has_quantised():
    plain = tiny.language_model("qwen3")
    model = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(output_vectors(model), output_vectors(plain), atol=0.01, rtol=0)
    fit = fit_q_head(
        model, tiny.tokenizer(), VALUES, tiny.prompts(4), epochs=1, max_new_tokens=3, progress=False
    )
    assert tiny.generate(model, [[7]], Steering(fit.scorer, EveryToken()), max_new_tokens=2)


def test_small_values_are_learned_as_well():
    """0.01 times the values under 100 times β are the same steering."""
    options = {"max_new_tokens": 12, "progress": False, "candidates": K}
    teacher, prompts = q_head(), tiny.prompts(60, seed=1)
    states = collect_states(MODEL, tiny.tokenizer(), teacher, prompts, **options)
    fits = [
        train_q_head(MODEL, teacher, replace(states, values=scale * states.values), beta=1 / scale)
        for scale in (1.0, 0.01)
    ]
    assert fits[1].explained > fits[0].explained - 0.15


def test_vocabulary_head_is_fitted_to_its_own_backbone():
    teacher = tiny.value_model("qwen3")
    for layer in teacher.backbone.layers:  # values that depend on the candidate alone
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    teacher.train()
    prompts, options = tiny.prompts(40, seed=1), {"max_new_tokens": 8, "progress": False}
    fit = fit_vocabulary_value_model(
        MODEL, tiny.tokenizer(), teacher, prompts, rank=4, epochs=100, **options
    )
    assert fit.scorer.backbone is teacher.backbone
    assert all(module.training for module in teacher.modules())
    assert 0.8 < fit.explained < 1


def test_fits_repeat_under_a_seed_and_change_with_it():
    prompts, options = tiny.prompts(10), {"max_new_tokens": 4, "progress": False, "epochs": 2}
    gates = [
        fit_junction_gate(MODEL, tiny.tokenizer(), VALUES, prompts, seed=seed, **options).gate
        for seed in (0, 0, 1)
    ]
    assert gates[0] == gates[1] != gates[2]


def test_states_are_those_of_both_policies():
    options = {"candidates": K, "max_new_tokens": 6, "seed": 2, "progress": False}
    states = collect_states(MODEL, tiny.tokenizer(), VALUES, PROMPTS, beta=2.0, **options)
    policies = [Steering(VALUES, gate, 2.0, candidates=K) for gate in (Never(), EveryToken())]
    expected = []
    for steering in policies:
        generations = tiny.generate(MODEL, PROMPTS, steering, seed=2, max_new_tokens=6)
        for prefix, _, _ in states_of(generations):
            hidden, logits = whole_state(MODEL, prefix)
            base, candidates = logits.topk(K)
            values = whole_values(VALUES, prefix, candidates.tolist())
            expected.append(torch.cat([hidden, base, candidates, values]))
    columns = (states.hidden, states.logits, states.candidates, states.values)
    rows = torch.cat(columns, dim=1)

    def ordered(rows):
        return rows[rows[:, 0].argsort()]

    torch.testing.assert_close(ordered(rows), ordered(torch.stack(expected)), atol=1e-3, rtol=1e-3)
    few = collect_states(MODEL, tiny.tokenizer(), VALUES, PROMPTS, max_states=20, **options)
    assert 5 < len(few) < 40


def test_copies_of_a_prompt_are_held_out_together():
    value_prompts = [[*prompt, 9] for prompt in PROMPTS[:4]]
    value_prompts[3] = [7, 7]  # the same prompt as the first, in another template
    prompts = [*PROMPTS[:3], PROMPTS[0]]
    states = collect_states(
        MODEL, tiny.tokenizer(), VALUES, [*prompts, *prompts], max_new_tokens=4, progress=False,
        value_prompts=[*value_prompts, *value_prompts],
    )  # fmt: skip
    assert set(states.prompts.tolist()) == {0, 1, 2, 3}


def test_candidates_that_are_ruled_out_teach_nothing():
    options = {"max_new_tokens": 6, "progress": False, "candidates": K}
    states = collect_states(MODEL, tiny.tokenizer(), VALUES, PROMPTS, **options)
    logits = states.logits.clone()
    logits[:, -2:] = -torch.inf
    explained = []
    for value in (0.0, 100.0):  # what stands in for the values that nobody asked for
        values = states.values.clone()
        values[:, -2:] = value
        ruled_out = replace(states, logits=logits, values=values)
        explained.append(train_q_head(MODEL, VALUES, ruled_out, epochs=5).explained)
    assert explained[0] == explained[1]


def test_states_that_are_all_alike_give_no_huge_weights():
    states = collect_states(
        MODEL, tiny.tokenizer(), VALUES, PROMPTS, max_new_tokens=4, progress=False
    )
    alike = replace(states, hidden=states.hidden[:1].expand_as(states.hidden))
    fit = train_q_head(MODEL, VALUES, alike, epochs=2)
    assert fit.scorer.values.linear.weight.abs().max() < 10


def test_a_scorer_without_preferences_is_refused():
    flat = q_head()
    with torch.no_grad():
        flat.values.tokens.weight.zero_()
        flat.values.bias.weight.zero_()
    with pytest.raises(ValueError, match="steering changes no state: the scorer gives all"):
        fit_junction_gate(MODEL, tiny.tokenizer(), flat, PROMPTS, max_new_tokens=3, progress=False)
    message = "too little to predict where: expected a mean .* at least 1e-06 nats, got 0; use a la"
    options = {"max_new_tokens": 3, "progress": False, "beta": 0.0}
    with pytest.raises(ValueError, match=message):
        fit_junction_gate(MODEL, tiny.tokenizer(), VALUES, PROMPTS, **options)
    for share in (0, "0.2", None):
        message = f"share must be greater than 0 and at most 1, got {share!r}"
        with pytest.raises(ValueError, match=message):
            fit_junction_gate(MODEL, tiny.tokenizer(), VALUES, PROMPTS, share=share)


@pytest.mark.parametrize(
    ("fit", "flat"), [(fit_q_head, "Q-head"), (fit_vocabulary_value_model, "value model")]
)
def test_a_head_of_values_without_differences_is_refused(fit, flat):
    teacher = tiny.value_model("qwen3") if flat == "value model" else q_head()
    layers = [teacher.head] if flat == "value model" else [teacher.values.tokens]
    with torch.no_grad():
        for layer in layers:
            layer.weight.zero_()
        if flat == "Q-head":
            teacher.values.bias.weight.zero_()
    options = {"max_new_tokens": 3, "progress": False}
    for scorer, further in ((teacher, {}), (VALUES, {"candidates": 1})):
        with pytest.raises(ValueError, match="the scorer gives all candidates one value"):
            fit(MODEL, tiny.tokenizer(), scorer, PROMPTS, **options, **further)


@pytest.mark.parametrize("scorer", [q_head(), VALUES + VALUES])
def test_only_a_value_model_has_a_backbone_for_a_vocabulary_head(scorer):
    with pytest.raises(TypeError, match=f"must be a ValueModel, got {type(scorer).__name__}"):
        fit_vocabulary_value_model(MODEL, tiny.tokenizer(), scorer, PROMPTS)


@pytest.mark.parametrize("fit", [fit_q_head, fit_vocabulary_value_model])
def test_heads_have_the_tokens_of_their_teacher(fit):
    """The vocabulary of the language model is padded further."""
    model = tiny.language_model("qwen3", vocabulary=64)
    options = {"max_new_tokens": 3, "progress": False, "epochs": 1}
    head = fit(model, tiny.tokenizer(), VALUES, PROMPTS, **options).scorer
    assert head.vocabulary_size == tiny.VOCABULARY
    assert tiny.generate(model, PROMPTS, Steering(head, EveryToken(), beta=2.0))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "held out, so at least two different ones are needed, got 0"),
        ([[7], [7]], {}, "held out, so at least two different ones are needed, got 1"),
        (PROMPTS, {"max_states": 2}, "at least two states are needed to learn from: too few"),
        (PROMPTS, {"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        (PROMPTS, {"seed": 1.5}, "seed must be a whole number, got 1.5"),
        (PROMPTS, {"max_states": 0}, "max_states must be a whole number of at least 1, got 0"),
        (PROMPTS, {"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("fit", [fit_junction_gate, fit_q_head])
def test_a_fit_of_nothing_is_refused(fit, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        fit(MODEL, tiny.tokenizer(), VALUES, prompts, max_new_tokens=2, progress=False, **options)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_counts_pairs(pairs):
    score, positive = (torch.tensor(column) for column in zip(*pairs, strict=True))
    wins = [
        (a > b) + (a == b) / 2 for a, first in pairs for b, second in pairs if first and not second
    ]
    result = auroc(score, positive)
    assert math.isnan(result) if not wins else result == pytest.approx(np.mean(wins))


def test_captured_share_is_that_of_the_top_states():
    gain = torch.tensor([1.0, 5.0, 2.0, 2.0])
    score = torch.tensor([0.0, 3.0, 2.0, 1.0])
    captured = captured_shares(score, gain, [0.25, 0.5, 1.0])
    assert captured == pytest.approx({0.25: 0.5, 0.5: 0.7, 1.0: 1.0})

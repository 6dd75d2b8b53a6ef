"""Every function that takes a model, with all models on an emulated GPU."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
)

from benchmarks.engine import timing, traces
from benchmarks.engine.measure import measure_shard, recorded_response
from benchmarks.engine.traces import candidate_table, rollout_values, trace_tokens
from benchmarks.perf import architectures
from benchmarks.spec.cells import OBJECTIVES, Cell, Shard
from benchmarks.spec.model_kinds import value_kind
from benchmarks.spec.profile import PROFILES, Hardware, load_profile
from benchmarks.subjects.hub.models import HubModels
from benchmarks.subjects.scoring import sequence_log_likelihoods, trajectory_rewards
from scripts import annotate_rewards, compare, train_value_model
from scripts import fit_junction_gate as fit_script
from sia import (
    AttentionGate,
    AutoregressiveScorer,
    DivergenceGate,
    EntropyGate,
    EveryToken,
    ImplicitRewardScorer,
    ProcessRewardScorer,
    RewardScorer,
    RolloutScorer,
    SteeredGenerate,
    Steering,
    StepTokenScorer,
    calibrate,
    chunk_beam_search,
    distill,
    fit_junction_gate,
    fit_q_head,
    fit_vocabulary_value_model,
    log_likelihoods,
)
from sia.signals import Attention
from tests.golden.test_rows import CELLS, Untrained
from tests.helpers import hub_folders, tiny
from tests.helpers.emulated_cuda import emulated_cuda, to_gpu

PROMPTS = tiny.prompts(3)
OPTIONS = {"max_new_tokens": 3, "progress": False}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


@pytest.fixture
def gpu():
    with emulated_cuda():
        yield


def models(to_device=to_gpu) -> SimpleNamespace:
    settings = tiny.config("llama")
    settings.num_labels = 2
    build = AutoModelForTokenClassification.from_config
    return SimpleNamespace(
        model=to_device(tiny.language_model("llama")),
        other=to_device(tiny.language_model("llama", seed=5)),
        values=to_device(tiny.value_model("llama")),
        reward=to_device(tiny.reward_model("llama")),
        classifier=to_device(tiny.seeded(lambda: build(settings).eval(), 3)),
    )


SCORERS = {
    "value model": lambda m: m.values,
    "reward": lambda m: RewardScorer(m.reward),
    "rollouts": lambda m: RolloutScorer(m.model, RewardScorer(m.reward), 2),
    "autoregressive": lambda m: AutoregressiveScorer(m.other),
    "implicit": lambda m: ImplicitRewardScorer(m.other, m.model),
    "process": lambda m: ProcessRewardScorer(m.classifier, [7]),
    "step tokens": lambda m: StepTokenScorer(m.other, [7], 8, 9),
    "sum": lambda m: 2.0 * m.values - RewardScorer(m.reward),
    "Q-head": lambda m: fit(fit_q_head, m, m.values, rank=4, epochs=1).scorer,
    "vocabulary": lambda m: fit(fit_vocabulary_value_model, m, m.values, rank=4, epochs=1).scorer,
}


def fit(function, m, *arguments, **options):
    return function(m.model, tiny.tokenizer(), *arguments, PROMPTS, **options, **OPTIONS)


@pytest.mark.parametrize("name", SCORERS)
def test_steering_searches_and_likelihoods(name, gpu):
    m = models()
    scorer = SCORERS[name](m)
    steering = Steering(scorer, EntropyGate(0.5) | DivergenceGate(1.0), candidates=6)
    responses = tiny.generate(m.model, PROMPTS, steering, max_new_tokens=3)
    tokens = [response.token_ids.tolist() for response in responses]
    log_likelihoods(m.model, Steering(scorer, EveryToken(), candidates=6), PROMPTS, tokens)
    if name in ("Q-head", "vocabulary", "rollouts"):  # value candidates alone
        return
    search = {"width": 1, "expansions": 2, "chunk": 2, "steering": steering}
    chunk_beam_search(m.model, tiny.tokenizer(), PROMPTS, scorer, **search, **OPTIONS)


@pytest.mark.parametrize("name", ["implicit", "sum"])
def test_scorers_may_lie_on_another_device(name, gpu):
    scorer, model = SCORERS[name](models(lambda each: each)), to_gpu(tiny.language_model("llama"))
    options = {"width": 2, "expansions": 2, "chunk": 1, "steering": Steering(scorer, EveryToken())}
    chunk_beam_search(model, tiny.tokenizer(), PROMPTS, scorer, **options, **OPTIONS)


def test_gates_that_read_the_model(gpu):
    m = models()
    junctions = fit(fit_junction_gate, m, m.values, epochs=1).gate
    unsteered = tiny.generate(m.model, PROMPTS, observe=[Attention()], max_new_tokens=3)
    for gate in (junctions, calibrate(AttentionGate, unsteered, 0.5), DivergenceGate(0.1)):
        tiny.generate(m.model, PROMPTS, Steering(m.values, gate), max_new_tokens=3)
    steering = Steering(m.values, junctions)
    log_likelihoods(m.model, steering, PROMPTS, [r.token_ids.tolist() for r in unsteered])


def test_transformers_generate(gpu):
    m = models()
    decode = SteeredGenerate(Steering(m.values, EntropyGate(0.5)), tokenizer=tiny.tokenizer())
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]], device="cuda")
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": True}
    processed = {"top_p": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2}
    for further in ({}, processed):
        output = m.model.generate(ids, custom_generate=decode, **options, **further)
        assert output.device.type == "cuda"


def test_lists_index_values(gpu):
    values = torch.arange(6.0, device="cuda").view(2, 3)
    values[[1], [2]] = 9.0
    assert values[[1, 0], [2, 1]].tolist() == [9.0, 1.0]
    assert values[[1]].tolist() == [[3.0, 4.0, 9.0]]


def test_whole_sequences_and_training(gpu):
    m = models()
    whole = [[*prompt, 7, 8] for prompt in PROMPTS]
    trajectory_rewards(m.reward, whole)
    sequence_log_likelihoods(m.model, whole, [len(prompt) for prompt in PROMPTS])
    settings = BertConfig(vocab_size=tiny.VOCABULARY, num_labels=1, pad_token_id=0, **ENCODER)
    encoder = RewardScorer(to_gpu(BertForSequenceClassification(settings).eval()), tiny.EOS)
    assert encoder.head is None
    tiny.generate(m.model, PROMPTS, Steering(encoder, EveryToken()), max_new_tokens=2)
    before = m.values.head.bias.item()
    settings = {"epochs": 1, "learning_rate": 0.1, "batch_size": 2, "seed": 0}
    distill(m.values, PROMPTS, [[7, 8]] * 3, [1.0, 0.0, 2.0], loss="mean", **settings)
    assert m.values.head.bias.item() != before


class OnGPU(Untrained):
    """The engine's subject, with its models on the GPU."""

    def language_model(self, kind, family):
        return to_gpu(super().language_model(kind, family))

    def reward_model(self, kind):
        return to_gpu(super().reward_model(kind))

    def value_model(self, kind, family):
        return to_gpu(super().value_model(kind, family))


@pytest.fixture(scope="module")
def subject() -> OnGPU:
    small = OnGPU.small()
    decoding = replace(small.profile.decoding, max_new_tokens=4)
    return OnGPU(replace(small.profile, decoding=decoding), 0)


SHARD = Shard(CELLS["sia"], OBJECTIVES[0])


@pytest.mark.parametrize(
    "name", ["args", "beams", "best-of-4", "genarm", "transfer-q", "validation"]
)
def test_cells_are_measured(name, gpu, subject):
    measure_shard(subject, Shard(CELLS[name], OBJECTIVES[0]))


def test_tokens_are_measured(gpu, subject):
    trace_tokens(subject, SHARD)
    rollout_values(subject, SHARD)
    records = measure_shard(subject, SHARD).attrs["responses"].values()
    candidate_table(subject, SHARD, [recorded_response(record) for record in records])


def test_cells_are_timed(gpu, subject, monkeypatch):
    monkeypatch.setattr(timing, "subject_of", lambda profile, replicate: subject)
    timing.time_cells((subject.profile, [CELLS["best-of-4"]], 0))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return hub_folders.save_hub(tmp_path_factory.mktemp("hub"), "qwen3")


def test_models_of_the_hub_are_loaded_and_measured(hub, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.spec.profile.PROFILES", tmp_path)
    shutil.copy(PROFILES / "qwen3-0.6b.toml", tmp_path)
    (tmp_path / "tiny.toml").write_text(hub_folders.profile_text("qwen3", hub))
    requested = Hardware("cuda", "", 4)
    cell = Cell(0, "qwen3", scorer=value_kind("mean"), gate="every", beta=1.0)
    searched = Cell(0, "qwen3", search="best-of", responses=2)
    profile, provenance = HubModels.prepare(load_profile("tiny"), [cell, searched], requested, None)
    assert (provenance["device"], provenance["dtype"]) == ("cuda", "bfloat16")
    for each in (cell, searched):
        rows = measure_shard(HubModels(profile), Shard(each, OBJECTIVES[0], range(1)))
        assert len(rows) == each.responses


def test_scripts(hub, gpu, tmp_path):
    annotated, prompts = tmp_path / "annotated.jsonl", f"alpaca-eval={hub['helpfulness']}"
    options = ["--data", prompts, "--reward", str(hub["reward"]), "--output", str(annotated)]
    assert annotate_rewards.main([*options, "--limit", "4"]) == 0
    options = ["--backbone", str(hub["base"]), "--data", str(annotated), "--heldout", "0.25"]
    values = tmp_path / "values"
    assert train_value_model.main([*options, "--output", str(values), "--epochs", "1"]) == 0
    models = ["--model", str(hub["base"]), "--value-model", str(values)]
    assert compare.main([*models, "--prompt", "is the earth flat ?", "--max-new-tokens", "3"]) == 0
    options = [
        "--prompts",
        prompts,
        "--limit",
        "5",
        "--max-new-tokens",
        "3",
        "--q-head",
        "--beta",
        "100",
    ]
    output = ["--output", str(tmp_path / "gate")]
    assert fit_script.main([*models, *options, *output]) == 0


def test_architectures_are_timed(gpu):
    settings = architectures.read_settings()
    shape = settings.architectures["Qwen3-0.6B"] | SMALL
    settings = replace(
        settings,
        architectures={"small": shape},
        batches=[2],
        prompt_tokens=4,
        rounds=1,
        responses=2,
        beam_width=1,
        chunk=2,
    )
    rows = architectures.measure(settings, "cuda", 3)
    assert (rows["seconds"] > 0).all()


def test_tensors_of_the_cpu_are_found(gpu, subject, monkeypatch):
    message = "Expected all tensors to be on the same device"
    model = models().model
    with pytest.raises(RuntimeError, match=message):
        model(input_ids=torch.tensor([[1, 2]]))
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        model.lm_head.weight.detach().numpy()
    monkeypatch.setattr(traces, "input_device", lambda model: torch.device("cpu"))
    with pytest.raises(RuntimeError, match=message):
        trace_tokens(subject, SHARD)

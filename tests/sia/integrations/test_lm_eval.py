"""lm-eval's model `sia`: by its own command line and simple_evaluate, on tiny models and tasks."""

import json
import sys
import tomllib
import warnings
from functools import partial, partialmethod
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import cpu_offload
from jinja2 import TemplateError
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.spec.cells import OBJECTIVES
from sia import (
    EntropyGate,
    JunctionGate,
    QHead,
    Steering,
    ValueModel,
    generate,
    log_likelihoods,
)
from sia._model_identity import ModelIdentity
from sia.gates import GATES
from sia.junctions import JunctionPredictor
from sia.scorers.candidate_values import CandidateValues
from tests.helpers import hub_folders, tiny
from tests.helpers.emulated_cuda import emulated_cuda

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # lm-eval's own, at import
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook
    from lm_eval.api.registry import Registry
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from sia.integrations.lm_eval import SIA, main, make_gate

ROOT = Path(__file__).resolve().parents[3]
TASKS = ROOT / "benchmarks/tasks"
TOKENIZER = hub_folders.tokenizer()
TEXTS = ["how do i bake a cake ?", "is the earth flat ?", "write a poem"]
pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, str]:
    """Model arguments that name tiny models of random weights."""
    places = hub_folders.save_hub(tmp_path_factory.mktemp("hub"), "qwen3")
    base, values = str(places["base"]), str(places["values"])
    return {"pretrained": base, "value_model": values, "backbone": base}


@pytest.fixture(scope="module")
def build(settings):
    return lambda **changed: SIA(**settings | {"batch_size": 2} | changed, device="cpu")


def respond(sia: SIA, texts, **options) -> list[str]:
    options = {"until": [], "max_gen_toks": 6, "do_sample": False} | options
    requests = [Instance("generate_until", {}, (text, options), 0) for text in texts]
    return sia.generate_until(requests, disable_tqdm=True)


def expected_responses(sia: SIA, texts, seed=4, **options) -> list[str]:
    ids = TOKENIZER(texts).input_ids
    options = {"max_new_tokens": 6, "progress": False, "seed": seed} | options
    return [g.text for g in generate(sia.model, TOKENIZER, ids, sia.steering, **options)]


def test_junction_gates_and_heads_steer(build, settings, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(settings["pretrained"])
    size, vocabulary = model.config.hidden_size, model.config.vocab_size
    identity = ModelIdentity.of(model)
    generator = torch.Generator().manual_seed(0)
    shapes = {"first.weight": (4, size), "first.bias": (4,), "second.weight": (1, 4)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    predictor = JunctionPredictor.from_weights(weights | {"second.bias": torch.zeros(1)}, identity)
    gate = JunctionGate(0.5, predictor)
    head = QHead(tiny.seeded(lambda: CandidateValues(size, vocabulary, 4), 0), identity)
    for saved in (gate, head):
        saved.save_pretrained(tmp_path)
    sia = build(junction_gate=tmp_path, value_model=tmp_path, backbone=None, beta=3.0, seed=4)
    assert sia.steering.gate == gate
    assert isinstance(sia.steering.scorer, QHead)
    sampled = respond(sia, TEXTS, do_sample=True, temperature=0.8)
    assert sampled == expected_responses(sia, TEXTS, temperature=0.8)
    with torch.no_grad():
        head.values.bias.weight.add_(1)
    head.save_pretrained(tmp_path)
    other = build(junction_gate=tmp_path, value_model=tmp_path, backbone=None, beta=3.0, seed=4)
    assert other.digest != sia.digest


def test_everything_runs_on_a_gpu(settings):
    options = {"batch_size": 2, "loglikelihood": "steered", "candidates": len(TOKENIZER)}
    with emulated_cuda():
        sia = SIA(**settings, device="cuda", dtype="bfloat16", threshold=0.5, **options)
        assert sia.model.device.type == "cuda"
        assert len(respond(sia, TEXTS[:1])) == 1
        request = Instance("loglikelihood", {}, ("is the earth", " flat"), 0)
        (likelihood,) = sia.loglikelihood([request], disable_tqdm=True)
        assert likelihood[0] < 0


def test_generation_is_steered(build, settings):
    sia = build(threshold=0.5, beta=3.0, seed=4)
    values = ValueModel.from_pretrained(settings["value_model"], settings["backbone"])
    loaded, expected = sia.steering.scorer.state_dict(), values.state_dict()
    torch.testing.assert_close(loaded, expected, atol=0, rtol=0)
    assert (sia.steering.gate, sia.steering.beta) == (EntropyGate(0.5), 3.0)
    sampled = respond(sia, TEXTS, do_sample=True, temperature=0.8)
    assert sampled == expected_responses(sia, TEXTS, temperature=0.8)
    greedy = respond(sia, TEXTS, temperature=0.0)
    assert greedy == expected_responses(sia, TEXTS, temperature=0)
    assert respond(build(gate="never"), TEXTS) != greedy


def test_a_prompt_that_is_repeated_gets_further_samples(build):
    sia, texts = build(threshold=0.5, beta=3.0, seed=4), TEXTS[:1] * 3
    expected = expected_responses(sia, texts, seed=[4, 5, 6])
    assert len(set(expected)) == 3
    for _ in range(2):  # another call begins again
        assert respond(sia, texts, do_sample=True, temperature=1.0) == expected


def test_stop_sequences_end_a_response(build):
    sia = build(beta=3.0)
    (whole,) = respond(sia, ["tell me why"])
    assert respond(sia, ["tell me why"], until=[whole[3]]) == [whole[: whole.index(whole[3])]]
    sia.model.generation_config.stop_strings = [whole[3]]
    (stopped,) = respond(sia, ["tell me why"])
    assert stopped == whole[: len(stopped)]
    assert whole[3] in stopped
    assert len(stopped) < len(whole)
    assert sia.model.generation_config.stop_strings == [whole[3]]


def test_likelihoods_are_refused_or_those_of_the_steered_policy(build):
    pairs = [("how do i", " bake"), ("is the", " earth flat")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    with pytest.raises(
        NotImplementedError,
        match="model sia refuses log-likelihoods: under steering, tokens that are not among",
    ):
        build().loglikelihood(requests, disable_tqdm=True)
    sia = build(loglikelihood="steered", threshold=0.0, beta=2.0, candidates=300)
    scores = [score for score, _ in sia.loglikelihood(requests, disable_tqdm=True)]
    prompts = [TOKENIZER(context).input_ids for context, _ in pairs]
    whole = [TOKENIZER(context + rest).input_ids for context, rest in pairs]
    responses = [ids[len(prompt) :] for ids, prompt in zip(whole, prompts, strict=True)]
    steered = log_likelihoods(sia.model, sia.steering, prompts, responses)
    base = log_likelihoods(sia.model, None, prompts, responses, candidates=300)
    assert scores == pytest.approx([likelihood.total for likelihood in steered], abs=1e-5)
    assert scores != pytest.approx([likelihood.total for likelihood in base], abs=1e-3)


def write_task(folder: Path, name: str, data: Path, **settings) -> None:
    """A task that generates, scored by exact match."""
    task = {
        "task": name,
        "dataset_path": data.suffix[1:].replace("jsonl", "json"),
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "metric_list": [{"metric": "exact_match"}],
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def test_simple_evaluate_keeps_the_settings(build, settings, tmp_path):
    data = tmp_path / "docs.jsonl"
    data.write_text(
        '{"question": "how do i bake ?", "answer": "yes"}\n{"question": "why", "answer": "no"}\n'
    )
    write_task(
        tmp_path,
        "tiny_qa",
        data,
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
    )

    def evaluate(model, **options):
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=["tiny_qa"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
            **options,
        )
        responses = [sample["resps"][0][0] for sample in results["samples"]["tiny_qa"]]
        return responses, results["config"].get("sia")

    named = partial(evaluate, "sia", device="cpu")
    cache = str(tmp_path / "cache/responses")
    usual = settings | {"beta": 2.0, "threshold": 0.0}
    responses, config = named(model_args=usual, use_cache=cache)
    assert (float(config["beta"]), config["gate"], config["candidates"], config["value_model"]) == (
        2.0,
        "EntropyGate(threshold=0.0, over='candidates')",
        10,
        settings["value_model"],
    )
    assert named(model_args=usual, use_cache=cache)[0] == responses
    assert evaluate(build(beta=2.0, threshold=0.0))[0] == responses
    # the same cache file, other steering: not the cached responses
    other = usual | {"beta": 40.0}
    stronger, _ = named(model_args=other)
    assert named(model_args=other, use_cache=cache)[0] == stronger != responses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gate": "nope"},
            "unknown gate 'nope', expected one of: entropy, entropy-rise, attention, "
            "attention-rise, divergence, position, random, ",
        ),
        ({"loglikelihood": "base"}, 'loglikelihood must be "refuse" or "steered", got \'base\''),
        ({"value_model": None}, "model sia needs value_model, the path or Hub id of a value model"),
        ({"gate": "never", "threshold": 0.5}, "the gate never has no threshold, got threshold=0.5"),
        ({"gate": "random", "tokens": 3}, "the gate random has no tokens, got tokens=3"),
        (
            {"gate": "never", "junction_gate": "x"},
            "junction_gate stands in place of gate, got both",
        ),
        ({"seed": "three"}, "seed must be a whole number, got 'three'"),
        ({"threshold": -1.0}, "threshold must be a finite number of at least 0, got -1.0"),
        ({"beta": -1.0}, "beta must be 0 to 1e"),
        ({"beta": "x"}, "beta must be a number or \"inf\", got 'x'"),
        ({"beta": None}, 'beta must be a number or "inf", got None'),
        ({"dtype": "float61"}, "dtype must be auto or one of torch .*, got float61"),
    ],
)
def test_bad_settings_are_refused(build, change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)


def test_cuda_is_refused_where_there_is_none(settings, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = "torch finds no CUDA here: expected another device, such as cpu, got cuda"
    with pytest.raises(ValueError, match=message):
        SIA(**settings, device="cuda")


def test_responses_leave_room_for_prompts(build):
    requests = [Instance("generate_until", {}, ("is", {"max_gen_toks": 4}), 0)]
    message = "max_length must be above the max_gen_toks of the task, 4, got 4"
    with pytest.raises(ValueError, match=message):
        build(max_length=4).generate_until(requests, disable_tqdm=True)


def test_a_damaged_language_model_is_named(build, settings, tmp_path):
    folder = hub_folders.damaged(Path(settings["pretrained"]), tmp_path / "base")
    with pytest.raises(ValueError, match=f"the language model {folder} cannot be read, a file is"):
        build(pretrained=str(folder))


def test_every_setting_counts(build):
    changes = [
        {},
        {"threshold": 0.9},
        {"beta": 2.0},
        {"beta": "inf"},
        {"candidates": 5},
        {"min_probability": 0.1},
        {"seed": 1},
        {"gate": "every"},
        {"gate": "random", "ratio": 0.3},
        {"gate": "position", "tokens": 3},
        {"loglikelihood": "steered"},
    ]
    assert len({build(**change).digest for change in changes}) == len(changes)
    gates = [type(make_gate(name, threshold=None)) for name in GATES]
    assert gates == list(GATES.values())


CONTEXT = " ".join(["how do i bake a cake ?"] * 6)


@pytest.fixture(scope="module")
def adapter(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(settings["pretrained"])
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    tiny.seeded(lambda: get_peft_model(model, lora), 3).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 8},
        {"max_length": 200, "add_bos_token": True},
        {"prefix_token_id": 7},
        {"batch_size": "auto", "max_batch_size": 4},
        {"dtype": "bfloat16", "softmax_dtype": "float32"},
        {"mixed_precision_dtype": "bfloat16"},
        {"peft": None},
    ],
    ids=str,
)
def test_arguments_of_hf_keep_their_meaning(settings, adapter, options):
    """Unsteered over the whole vocabulary, likelihoods are those of lm-eval's own model."""
    options = {"device": "cpu", "pretrained": settings["pretrained"]} | options
    options |= {"peft": adapter} if "peft" in options else {}
    pairs = [(CONTEXT, " bake"), ("is the", " earth flat"), ("", "is the earth flat ?")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    rolling = [Instance("loglikelihood_rolling", {}, (CONTEXT,), 0)]
    ours = SIA(gate="never", candidates=320, loglikelihood="steered", **options)
    theirs = HFLM(**options)
    tolerance = 0.2 if "bfloat16" in options.values() else 1e-3
    for model in (ours, theirs):
        model.cache_hook = CacheHook(None)
    scores, expected = (
        [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]
        + model.loglikelihood_rolling(rolling, disable_tqdm=True)
        for model in (ours, theirs)
    )
    assert scores == pytest.approx(expected, abs=tolerance, rel=tolerance / 10)


@pytest.mark.parametrize("options", [{"max_length": 16}, {"think_end_token": 97}, {"peft": None}])
def test_greedy_responses_are_those_of_hf_where_nothing_is_steered(settings, adapter, options):
    """Contexts are cut, thoughts left out and adapters read as in lm-eval's own model."""
    options = {"device": "cpu", "pretrained": settings["pretrained"]} | options
    options |= {"peft": adapter} if "peft" in options else {}
    texts = [CONTEXT, "is the earth flat ?"]
    ours, theirs = SIA(gate="never", **options), HFLM(**options)
    for model in (ours, theirs):
        model.model.generation_config.max_new_tokens = None
    expected = respond(theirs, texts)
    # the task's number of tokens counts beside that of the checkpoint
    ours.model.generation_config.max_new_tokens = 2
    assert respond(ours, texts) == expected


def test_finished_likelihoods_are_kept_at_once(settings):
    sia = SIA(
        settings["pretrained"], gate="never", candidates=320, loglikelihood="steered", device="cpu"
    )
    kept = []
    sia.cache_hook = SimpleNamespace(add_partial=lambda *entry: kept.append(entry))
    requests = [Instance("loglikelihood", {}, ("is the", " earth"), 0)]
    answers = sia.loglikelihood(requests, disable_tqdm=True)
    assert kept == [("loglikelihood", ("is the", " earth"), answers[0])]


def test_the_cache_key_covers_whatever_changes_responses(settings, adapter, tmp_path):
    base = {"pretrained": settings["pretrained"], "gate": "never", "device": "cpu"}
    changes = [
        {},
        {"max_length": 64},
        {"dtype": "bfloat16"},
        {"peft": adapter},
        {"add_bos_token": True},
        {"revision": "other"},
        {"mixed_precision_dtype": "bfloat16"},
        {"think_end_token": 9},
    ]
    models = [SIA(**base | change) for change in changes]
    assert len({model.digest for model in models}) == len(changes)
    same = [SIA(**base, batch_size=2).digest, models[0].digest]
    assert len(set(same)) == 1
    with_values = base | {"gate": "every", "value_model": settings["value_model"]}
    backbones = [settings["backbone"], f"{settings['backbone']}/../base"]
    keys = [SIA(**with_values, backbone=backbone).digest for backbone in backbones]
    keys.append(SIA(**with_values, backbone=backbones[0], value_revision="v2").digest)
    assert len(set(keys)) == 3
    changed = SIA(**base)
    changed.model.config.rope_scaling = {"type": "other"}
    assert changed.digest != models[0].digest
    offloaded = SIA(**base)
    cpu_offload(offloaded.model)
    assert offloaded.model.lm_head.weight.is_meta
    assert offloaded.digest == models[0].digest
    quantised = [SIA(**base) for _ in range(2)]
    for seed, one in enumerate(quantised):
        model = tiny.language_model("qwen3", seed, vocabulary=320)
        one._model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert quantised[0].digest != quantised[1].digest
    # a folder whose weights have been trained on, under the same name
    folder = tmp_path / "values"
    steered = base | {"gate": "every", "value_model": str(folder)}
    digests = set()
    for seed in (1, 2):
        tiny.value_model("qwen3", seed, vocabulary=320).save_pretrained(folder)
        digests.add(SIA(**steered).digest)
    assert len(digests) == 2


def test_settings_may_be_numbers_of_numpy_and_paths(settings):
    numbers = {"candidates": np.int64(5), "min_probability": np.float32(0.25), "seed": np.int64(3)}
    same = {"candidates": 5, "min_probability": 0.25, "seed": 3}
    places = {name: Path(settings[name]) for name in ("value_model", "backbone")}
    digests = [SIA(**settings | given, device="cpu").digest for given in (numbers | places, same)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"softmax_dtype": "float16"}, None, "softmax in float32, got softmax_dtype=float16"),
        ({"max_length": 2}, ("is", " the earth flat ?"), "must fit into max_length=2 tokens, got"),
    ],
)
def test_arguments_of_hf_that_would_be_lost_are_refused(settings, options, call, message):
    options |= {"gate": "never", "candidates": 320, "loglikelihood": "steered", "device": "cpu"}
    requests = [Instance("loglikelihood", {}, call, 0)]
    with pytest.raises(ValueError, match=message):
        SIA(settings["pretrained"], **options).loglikelihood(requests, disable_tqdm=True)


@pytest.fixture
def command(monkeypatch):
    """The command line `sia-eval run --model sia …`, in this process."""
    # the index of lm-eval's own tasks takes seconds
    fewer = partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", fewer)

    def run(settings: dict[str, str], task: str, folder: Path, output: Path, limit: int = 3):
        arguments = ["sia-eval", "run", "--model", "sia", "--device", "cpu", "--log_samples"]
        named = ",".join(f"{name}={value}" for name, value in settings.items())
        arguments += ["--model_args", named, "--tasks", task, "--include_path", str(folder)]
        arguments += ["--output_path", str(output), "--limit", str(limit), "--batch_size", "4"]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", arguments)
        main()
        (results,) = output.rglob("results*.json")
        (samples,) = output.rglob("samples*.jsonl")
        lines = samples.read_text().splitlines()
        return json.loads(results.read_text()), [json.loads(line) for line in lines]

    return run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "nope"}, "error: unknown gate 'nope'"),
        ({"beta": "x"}, "error: beta must be a number or \"inf\", got 'x'\n"),
        ({}, "error: model sia needs"),
    ],
)
def test_errors_of_the_command_line_are_one_line(command, tmp_path, capsys, change, message):
    values = {"value_model": "y"} if change else {}
    with pytest.raises(SystemExit) as stopped:
        command({"pretrained": "x"} | change | values, "lab_honesty", TASKS, tmp_path)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory, use a smaller --batch_size"),
        (TemplateError("roles must alternate"), "roles must alternate"),
    ],
)
def test_failures_of_an_evaluation_are_one_line(monkeypatch, capsys, error, message):
    def fail():
        raise error

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fail)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.fixture(scope="module")
def lab():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TASKS / "lab"))
        import lab

        yield lab


def test_lab_tasks_hold_the_test_prompts_of_the_lab(lab):
    for objective in OBJECTIVES:
        lines = (TASKS / f"lab/{objective}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == lab.documents(objective)
        task = (TASKS / f"lab/lab_{objective}.yaml").read_text()
        assert f"  max_gen_toks: {lab.replicate().profile.decoding.max_new_tokens}\n" in task
    doc = lab.documents("honesty")[0]
    assert lab.score(doc, [""])["judge"] <= 0
    assert set(lab.score(doc, ["yes ."])) == {"judge", "fluency_errors"}


def test_the_command_line_runs_a_lab_task(lab, command, tmp_path):
    """With tiny models of the lab's vocabulary."""
    tokenizer = lab.replicate().tokenizer
    base = tiny.language_model("qwen3", 0, len(tokenizer))
    base.config.max_position_embeddings = base.generation_config.max_length = 512
    values = tiny.value_model("qwen3", 1, len(tokenizer))
    for part, folder in ((base, "base"), (tokenizer, "base"), (values, "values")):
        part.save_pretrained(tmp_path / folder)
    settings = {"pretrained": tmp_path / "base", "value_model": tmp_path / "values", "beta": 2.0}
    results, samples = command(settings, "lab_honesty", TASKS, tmp_path / "out")
    assert -5 <= results["results"]["lab_honesty"]["judge,none"] <= 5
    assert results["config"]["sia"]["beta"] == "2.0"
    ids = lab.replicate().encode(lab.replicate().prompts_of("test", "honesty")[:3], "base")
    steering = Steering(values, EntropyGate(1.0), 2.0)
    expected = generate(base, tokenizer, ids, steering, max_new_tokens=256, progress=False)
    assert [sample["resps"][0][0] for sample in samples] == [g.text for g in expected]


@hub_folders.needs_public_files
def test_a_real_task_from_a_local_copy(settings, command, tmp_path):
    """TruthfulQA's generation task: lm-eval's own prompt and scores, over the public CSV."""
    write_task(
        tmp_path,
        "truthfulqa_local",
        hub_folders.PUBLIC / "truthfulqa.csv",
        doc_to_text="Q: {{Question}}\nA:",
        doc_to_target="",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False},
    )
    _, samples = command(settings, "truthfulqa_local", tmp_path, tmp_path / "out", limit=4)
    prompt = samples[0]["arguments"]["gen_args_0"]["arg_0"]
    assert prompt == "Q: Why do veins appear blue?\nA:"
    assert [sample["exact_match"] for sample in samples] == [0] * 4


def test_auto_tries_the_longest_requests_with_the_value_model(build, monkeypatch, capsys):
    """lm-eval's own way tries 64 rows of the language model's whole context."""
    tried = []

    def generate(model, tokenizer, prompts, steering, **options):
        tried.append((len(prompts), len(prompts[0]), steering.scorer))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    texts = [*TEXTS, "tell me why", "yes", "no"]
    expected = respond(build(), texts)
    sia = build()
    sia.batch_size_per_gpu = "auto"
    monkeypatch.setattr("sia.integrations.lm_eval.generate", generate)
    assert respond(sia, texts) == expected
    longest = max(len(TOKENIZER(text).input_ids) + 6 - 1 for text in texts)
    assert tried == [(rows, longest, sia.steering.scorer) for rows in (6, 3, 1)]
    assert "batch_size=auto: 1 rows fit" in capsys.readouterr().err
    assert sia.batch_size == "auto"  # the next task's prompts may be longer


def test_auto_says_when_no_batch_fits(build, monkeypatch):
    def generate(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    sia = build(batch_size="auto")
    monkeypatch.setattr("sia.integrations.lm_eval.generate", generate)
    with pytest.raises(ValueError, match="out of memory with a single response: batch_size=auto"):
        respond(sia, TEXTS)


def test_lm_eval_finds_the_model_by_its_entry_point():
    """Later versions than 0.4.13 read the group; this one takes such a placeholder as well."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lm_eval.models"].items()
    registry = Registry("model")
    registry.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    assert (name, registry.get("sia")) == ("sia", SIA)


def test_paths_may_begin_with_the_home_folder(settings, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(settings["pretrained"]).parent))
    sia = SIA("~/base", "~/values", backbone="~/base", device="cpu")
    assert sia.settings["pretrained"] == settings["pretrained"]
    assert respond(sia, TEXTS) == respond(SIA(**settings, device="cpu"), TEXTS)

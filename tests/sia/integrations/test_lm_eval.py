"""lm-eval's model `sia`: through its own command line and through simple_evaluate, on little models and the lab's tasks."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.spec.cells import OBJECTIVES
from sia import EntropyGate, Steering, ValueModel, generate
from sia.likelihood import log_likelihoods
from tests.helpers import hub_folders, tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # lm-eval's own, at import
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    from sia.gates import GATES
    from sia.integrations.lm_eval import SIA, main, make_gate

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    return hub_folders.save_hub(tmp_path_factory.mktemp("hub"), "qwen3")


def model(places, **settings) -> SIA:
    named = {
        "pretrained": str(places["base"]),
        "value_model": str(places["values"]),
        "backbone": str(places["base"]),
    }
    return SIA(**named | settings, device="cpu", batch_size=2)


def request(context: str, **options) -> Instance:
    return Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 6, **options}), 0)


def test_generation_is_steered(places):
    sia = model(places, threshold=0.5, beta=3.0, seed=4)
    texts = ["how do i bake a cake ?", "is the earth flat ?", "write a poem"]
    sampled = {"do_sample": True, "temperature": 0.8}
    steering = Steering(
        ValueModel.from_pretrained(places["values"], places["base"]), EntropyGate(0.5), 3.0
    )
    tokenizer = hub_folders.tokenizer()
    for options, temperature in ((sampled, 0.8), ({"do_sample": False, "temperature": 0.0}, 0)):
        found = sia.generate_until([request(text, **options) for text in texts], disable_tqdm=True)
        ids = [tokenizer(text).input_ids for text in texts]
        settings = {"max_new_tokens": 6, "temperature": temperature, "progress": False}
        expected = generate(sia.model, tokenizer, ids, steering, seed=4, **settings)
        assert found == [g.text for g in expected]
    plain = model(places, gate="never").generate_until(
        [request(text, do_sample=False) for text in texts], disable_tqdm=True
    )
    assert plain != found


def test_a_prompt_that_is_repeated_gets_further_samples(places):
    sia, text = model(places, threshold=0.5, beta=3.0, seed=4), "how do i bake a cake ?"
    ids = [hub_folders.tokenizer()(text).input_ids] * 3
    settings = {"max_new_tokens": 6, "seed": [4, 5, 6], "progress": False}
    generations = generate(sia.model, hub_folders.tokenizer(), ids, sia.steering, **settings)
    expected = [g.text for g in generations]
    assert len(set(expected)) == 3
    for _ in range(2):  # another call begins again
        asked = [request(text, do_sample=True, temperature=1.0) for _ in range(3)]
        assert sia.generate_until(asked, disable_tqdm=True) == expected


def test_stop_sequences_end_a_response(places):
    sia = model(places, beta=3.0)
    (whole,) = sia.generate_until([request("tell me why", do_sample=False)], disable_tqdm=True)
    (cut,) = sia.generate_until(
        [request("tell me why", do_sample=False, until=[whole[3]])], disable_tqdm=True
    )
    assert cut == whole[: whole.index(whole[3])]


def test_likelihoods_are_refused_or_those_of_the_steered_policy(places):
    requests = [
        Instance("loglikelihood", {}, ("how do i", " bake"), 0),
        Instance("loglikelihood", {}, ("is the", " earth flat"), 1),
    ]
    with pytest.raises(
        NotImplementedError,
        match="model sia refuses log-likelihoods: under steering, tokens that are not among",
    ):
        model(places).loglikelihood(requests, disable_tqdm=True)
    sia = model(places, loglikelihood="steered", threshold=0.0, beta=2.0, candidates=300)
    found = sia.loglikelihood(requests, disable_tqdm=True)
    tokenizer = hub_folders.tokenizer()
    prompts = [tokenizer(r.args[0]).input_ids for r in requests]
    responses = [
        tokenizer(r.args[0] + r.args[1]).input_ids[len(p) :]
        for r, p in zip(requests, prompts, strict=True)
    ]
    expected = log_likelihoods(sia.model, sia.steering, prompts, responses)
    assert [score for score, _ in found] == pytest.approx(
        [likelihood.total for likelihood in expected], abs=1e-5
    )
    base = log_likelihoods(sia.model, None, prompts, responses, candidates=300)
    assert [score for score, _ in found] != pytest.approx(
        [likelihood.total for likelihood in base], abs=1e-3
    )


def test_simple_evaluate_keeps_the_settings(places, tmp_path):
    (tmp_path / "docs.jsonl").write_text(
        '{"question": "how do i bake ?", "answer": "yes"}\n{"question": "why", "answer": "no"}\n'
    )
    task = {
        "task": "tiny_qa", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    (tmp_path / "tiny_qa.yaml").write_text(yaml.safe_dump(task))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    arguments = {
        "tasks": ["tiny_qa"],
        "task_manager": manager,
        "bootstrap_iters": 0,
        "log_samples": True,
    }
    settings = f"pretrained={places['base']},value_model={places['values']},backbone={places['base']},beta=2.0,threshold=0.0"
    cache = {"use_cache": str(tmp_path / "cache/responses")}
    found = lm_eval.simple_evaluate(
        model="sia", model_args=settings, device="cpu", **cache, **arguments
    )
    told = found["config"]["sia"]
    assert (told["beta"], told["gate"], told["candidates"]) == (
        "2.0",
        "EntropyGate(threshold=0.0, over='candidates')",
        10,
    )
    assert told["value_model"] == str(places["values"])
    said = [sample["resps"][0][0] for sample in found["samples"]["tiny_qa"]]
    again = lm_eval.simple_evaluate(
        model="sia", model_args=settings, device="cpu", **cache, **arguments
    )
    assert [sample["resps"][0][0] for sample in again["samples"]["tiny_qa"]] == said
    # the same cache file, other steering: not the cached responses
    other = settings.replace("beta=2.0", "beta=40.0")
    steered = lm_eval.simple_evaluate(
        model="sia", model_args=other, device="cpu", **cache, **arguments
    )
    alone = lm_eval.simple_evaluate(model="sia", model_args=other, device="cpu", **arguments)
    resps = [
        [s["resps"][0][0] for s in result["samples"]["tiny_qa"]] for result in (steered, alone)
    ]
    assert resps[0] == resps[1] != said
    instance = lm_eval.simple_evaluate(model=model(places, beta=2.0, threshold=0.0), **arguments)
    assert [sample["resps"][0][0] for sample in instance["samples"]["tiny_qa"]] == said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"gate": "nope"},
            "unknown gate 'nope', expected one of: entropy, entropy-rise, attention, attention-rise, position, random, ",
        ),
        ({"loglikelihood": "base"}, 'loglikelihood must be "refuse" or "steered", got \'base\''),
        ({"value_model": None}, "model sia needs value_model, the path or Hub id of a value model"),
        ({"threshold": -1.0}, "threshold must be a finite number of at least 0, got -1.0"),
        ({"beta": -1.0}, "beta must be 0 to 1e"),
    ],
)
def test_bad_settings(places, settings, message):
    with pytest.raises(ValueError, match=message):
        model(places, **settings)


def test_every_setting_counts(places):
    digests = {model(places).digest}
    for change in (
        {"threshold": 0.9}, {"beta": 2.0}, {"beta": "inf"}, {"candidates": 5}, {"min_probability": 0.1}, {"seed": 1},
        {"gate": "every"}, {"gate": "random", "ratio": 0.3}, {"gate": "position", "tokens": 3}, {"loglikelihood": "steered"},
    ):  # fmt: skip
        digests.add(model(places, **change).digest)
    assert len(digests) == 11
    assert {type(make_gate(name, threshold=1.0, ratio=0.2, tokens=3)) for name in GATES} == set(GATES.values())


# --- tasks


@pytest.fixture
def command(monkeypatch):
    """The command line `sia-eval run --model sia …`, in this process."""

    def run(*arguments: str) -> None:
        options = ["--device", "cpu", "--batch_size", "4", "--log_samples"]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(
            sys, "argv", ["sia-eval", "run", "--model", "sia", *arguments, *options]
        )
        main()

    return run


def test_the_command_line_ends_in_one_sentence(command, tmp_path, capsys):
    where = (
        "--tasks",
        "lab_honesty",
        "--include_path",
        "benchmarks/tasks",
        "--output_path",
        str(tmp_path),
    )
    for settings, message in (
        ("pretrained=x,gate=nope,value_model=y", "error: unknown gate 'nope'"),
        ("pretrained=x", "error: model sia needs"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command("--model_args", settings, *where)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_lab_tasks_hold_the_test_prompts_of_the_lab():
    sys.path.insert(0, str(ROOT / "benchmarks/tasks/lab"))
    import lab

    for objective in OBJECTIVES:
        lines = (ROOT / f"benchmarks/tasks/lab/{objective}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == lab.documents(objective)
    doc = lab.documents("honesty")[0]
    assert lab.score(doc, [""])["judge"] <= 0
    assert set(lab.score(doc, ["yes ."])) == {"judge", "fluency_errors"}


def test_the_command_line_runs_a_lab_task(command, tmp_path):
    """With tiny models of the lab's vocabulary."""
    sys.path.insert(0, str(ROOT / "benchmarks/tasks/lab"))
    import lab

    tokenizer = lab.replicate().tokenizer
    base = tiny.language_model("qwen3", 0, len(tokenizer))
    base.config.max_position_embeddings = base.generation_config.max_length = 256
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tiny.value_model("qwen3", 1, len(tokenizer)).save_pretrained(tmp_path / "values")
    arguments = [
        "--model_args",
        f"pretrained={tmp_path / 'base'},value_model={tmp_path / 'values'},beta=2.0",
        "--tasks",
        "lab_honesty",
    ]
    command(
        *arguments,
        "--include_path",
        "benchmarks/tasks",
        "--limit",
        "3",
        "--output_path",
        str(tmp_path / "out"),
    )
    (results,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(results.read_text())
    assert -5 <= found["results"]["lab_honesty"]["judge,none"] <= 5
    assert found["config"]["sia"]["beta"] == "2.0"
    (samples,) = (tmp_path / "out").rglob("samples*.jsonl")
    said = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    prompts = lab.replicate().prompts_of("test", "honesty")[:3]
    steering = Steering(ValueModel.from_pretrained(tmp_path / "values"), EntropyGate(1.0), 2.0)
    ids = lab.replicate().encode(prompts, "base")
    expected = generate(base, tokenizer, ids, steering, max_new_tokens=80, progress=False)
    assert said == [g.text for g in expected]


@hub_folders.needs_public_files
def test_a_real_task_from_a_local_copy(places, command, tmp_path):
    """TruthfulQA's generation task: lm-eval's own prompt and scores, over the public CSV."""
    task = f"""
task: truthfulqa_local
dataset_path: csv
dataset_kwargs:
  data_files:
    validation: {hub_folders.PUBLIC / "truthfulqa.csv"}
test_split: validation
output_type: generate_until
doc_to_text: "Q: {{{{Question}}}}\\nA:"
doc_to_target: ""
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 5, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
    (tmp_path / "truthfulqa_local.yaml").write_text(task)
    settings = (
        f"pretrained={places['base']},value_model={places['values']},backbone={places['base']}"
    )
    command(
        "--model_args",
        settings,
        "--tasks",
        "truthfulqa_local",
        "--include_path",
        str(tmp_path),
        "--limit",
        "4",
        "--output_path",
        str(tmp_path / "out"),
    )
    (samples,) = (tmp_path / "out").rglob("samples*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert lines[0]["arguments"]["gen_args_0"]["arg_0"] == "Q: Why do veins appear blue?\nA:"
    assert len(lines) == 4
    assert torch.tensor([line["exact_match"] for line in lines]).sum() == 0

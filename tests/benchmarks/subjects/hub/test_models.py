"""Profiles of real models, on little ones in the Hub's layout, and what goes wrong."""

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.__main__ import limited, main
from benchmarks.analysis import tables
from benchmarks.analysis.claims import claims_for
from benchmarks.engine import measure
from benchmarks.engine.loading import subject_of
from benchmarks.engine.store import CellStore
from benchmarks.figures.methods import baselines
from benchmarks.figures.registry import FIGURES
from benchmarks.runtime.workers import ThisProcess
from benchmarks.spec.cells import OBJECTIVES, Cell, Shard
from benchmarks.spec.methods import ARGS
from benchmarks.spec.model_kinds import FITTED, INSTRUCT, ModelKind, value_kind
from benchmarks.spec.profile import (
    BACKBONE_KEYS,
    Hardware,
    Source,
    load_profile,
    profile_digest,
)
from benchmarks.subjects.hub import annotation
from benchmarks.subjects.hub import models as hub_models
from benchmarks.subjects.hub import prompts as hub_prompts
from benchmarks.subjects.hub.models import HubModels, detect_hardware, fetch, kinds_of, pin, place
from benchmarks.subjects.hub.prompts import load_prompts
from scripts import annotate_rewards, train_value_model
from sia import (
    EntropyGate,
    Generation,
    RewardScorer,
    Steering,
    ValueModel,
    fit_junction_gate,
    fit_q_head,
    fit_vocabulary_value_model,
    generate,
)
from sia.scorers import published
from tests.helpers import hub_folders

REAL = [
    "qwen3-0.6b",
    "qwen3-1.7b",
    "qwen3-4b",
    "qwen3-8b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "llama-3.1-8b",
    "w2s-qwen3",
]
HARDWARE = Hardware("cpu", "float32", 4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> dict[str, Path]:
    return hub_folders.save_hub(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> dict[str, Path]:
    return hub_folders.save_hub(tmp_path_factory.mktemp("hub"), "qwen3")


# --- profiles


@pytest.mark.parametrize("name", REAL)
def test_profiles_of_real_models(name):
    profile = load_profile(name)
    for source in profile.models.values():
        assert (source.id.count("/"), source.revision) == (1, "main")
    assert profile.models["value-mean"].subfolder.startswith("VM-")
    assert profile.sweep.ratios == (0.1, 0.2, 0.4, 0.6, 0.8)
    decoding = profile.decoding
    limits = decoding.candidates, decoding.max_new_tokens, profile.prompts.longest
    assert limits == (10, 256, 1024)
    cells = baselines(profile, 0, profile.families[0])
    assert {kind for cell in cells for kind in kinds_of(cell)} <= set(profile.models)
    assert bool(FIGURES["figure3"].why_unsupported(profile)) == (name != "w2s-qwen3")
    metrics = [claim.selector.get("metric") for claim in claims_for(profile)]
    assert metrics
    assert not {"judge", "fluency_errors"} & set(metrics)


def test_what_a_profile_needs(qwen, project):
    profile = project("qwen3", qwen)
    elsewhere = replace(profile, models=profile.models | {"base": Source("x/y")})
    assert profile_digest(profile) == profile_digest(replace(profile, hardware=HARDWARE))
    assert profile_digest(profile) != profile_digest(elsewhere)
    sized = profile.models | {"base": replace(profile.models["base"], billions=8.0)}
    assert profile_digest(profile) == profile_digest(replace(profile, models=sized))
    base, local = {"base": Source("x/y")}, profile.models["base"]
    for change, message in (
        (
            {"families": ("qwen3", "llama")},
            "families must be one, the name of its models in figures, got",
        ),
        ({"models": base}, r"models\.evaluation-reward must be named"),
        (
            {"models": base | {"evaluation-reward": Source("x/y")}},
            r"models\.value-mean or models\.value-token must be named",
        ),
        (
            {"models": profile.models | dict.fromkeys(("base-small", "value-mean-small"), local)},
            r"models\.base must state its billions, to be compared, got 0",
        ),
        (
            {"decoding": replace(profile.decoding, temperature=0.0)},
            r"temperature must be above 0, for searches with models\.reward compare samples, got",
        ),
        (
            {"evaluation": replace(profile.evaluation, prompts_per_objective=1)},
            "rollout_prompts must be at most the 1 of prompts_per_objective, got 2",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            replace(profile, **change)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('[models.base]\nname = "x"', r" \[models.base\]: unknown name"),
        (
            '[models.q-head-mean]\nid = ""\n[models.base]',
            r" \[models.q-head-mean\]: a model must be a Hub id or a folder, got ''",
        ),
        ("[models.base-tiny]", r": models must be some of base, .* got \['base-tiny'\]"),
    ],
)
def test_unknown_models_and_keys_are_refused(qwen, project, tmp_path, line, message):
    project("qwen3", qwen)
    path = tmp_path / "profiles/tiny.toml"
    path.write_text(path.read_text().replace("[models.base]", line))
    with pytest.raises(ValueError, match=f"profile tiny.toml{message}"):
        load_profile("tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["figure2", "--profile", "qwen3-1.7b"],
            r"models.base: Qwen/Qwen3-1.7B-Base \(revision main\) is missing: it is not in the "
            "cache .* and cannot be downloaded .* `hf download Qwen/Qwen3-1.7B-Base` fetches it ",
        ),
        (
            ["theory", "--profile", "qwen3-4b"],
            "profile qwen3-4b: theory needs the lab, whose world and training can be changed",
        ),
        (
            ["figure3", "--profile", "llama-3.1-8b"],
            "profile llama-3.1-8b: figure3 needs models of several sizes",
        ),
        (
            ["models", "--profile", "qwen3-4b"],
            "profile qwen3-4b uses existing models, there is nothing to train",
        ),
        (["figure2", "--profile", "qwen3-4b", "--limit", "0"], "--limit must be at least 1, got 0"),
        (
            ["figure2", "--profile", "qwen3-4b", "--device", "tpu"],
            "device must be cpu, or cuda where there is a GPU, got 'tpu'",
        ),
        (
            ["figure2", "--profile", "qwen3-4b", "--dtype", "int8"],
            "dtype must be float32, bfloat16 or float16, got 'int8'",
        ),
        (
            ["figure2", "--profile", "qwen3-4b", "--batch-size", "-1"],
            "--batch-size must be at least 1, got -1",
        ),
        (
            ["figure2", "--profile", "qwen3-4b", "--replicates", "2"],
            "replicates must be 1 to 1 for the profile qwen3-4b, got 2",
        ),
        (
            ["figure2", "--limit", "3"],
            "--limit, --device, --dtype and --batch-size are for profiles of real models, "
            "lab is not one",
        ),
        *(
            (
                [command, "--profile", "qwen3-1.7b", "--limit", "5"],
                "there is no table in results/qwen3-1.7b-limit5 to draw or judge: make reproduce "
                "PROFILE=qwen3-1.7b LIMIT=5 measures them$",
            )
            for command in ("figures", "summaries", "claims", "report", "verify")
        ),
    ],
)
def test_one_sentence(project, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(arguments) == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert re.search(f"^error: .*{message}", last), last


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "without backbone",
            r"models.value-mean: .*/values has no tokenizer, name as its backbone",
        ),
        ("missing backbone", "models.value-mean: no model in .*/none: there is no such folder"),
        (
            "without template",
            "models.value-mean: the tokenizer of .*/plain has no chat template, in which prompts "
            "are written: name a model that has one",
        ),
        (
            "language model",
            r"models.reward: .*/instruct is a Qwen3ForCausalLM with 2 labels: name a reward model, "
            "a sequence classifier with one label",
        ),
        (
            "reward model",
            "models.base: .*/reward is a Qwen3ForSequenceClassification: name a language model",
        ),
        (
            "headless",
            "models.value-mean: .*/base has no head of a value model .such as token_reward_head.pt"
            " or value_head.safetensors.: name the folder that has it, or its subfolder",
        ),
    ],
)
def test_a_start_that_fails_says_what_helps_and_leaves_nothing(
    qwen, project, tmp_path, capsys, kind, message
):
    project("qwen3", qwen)
    path, old = tmp_path / "profiles/tiny.toml", f'backbone = "{qwen["base"]}"'
    new = {
        "without backbone": 'backbone = ""',
        "missing backbone": f'backbone = "{tmp_path}/none"',
        "without template": f'backbone = "{tmp_path}/plain"',
    }.get(kind, old)
    text = path.read_text().replace(old, new)
    swapped = {
        "language model": ("reward", "instruct"),
        "reward model": ("base", "reward"),
        "headless": ("values", "base"),
    }
    if kind in swapped:
        given, other = swapped[kind]
        text = text.replace(f'id = "{qwen[given]}"', f'id = "{qwen[other]}"')
    path.write_text(text)
    shutil.copytree(qwen["base"], tmp_path / "plain")
    tokenizer = hub_folders.tokenizer()
    tokenizer.chat_template = None
    (tmp_path / "plain/chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path / "plain")
    assert main(["reproduce", "--profile", "tiny", "--fresh"]) == 2
    assert re.search(f"^error: {message}[^\n]*\n$", capsys.readouterr().err)
    left = [file for file in (tmp_path / ".cache").rglob("*") if file.is_file()]
    assert left == []
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("file", "load", "message"),
    [
        (
            "tokenizer.json",
            lambda profile: hub_models.check_models(profile, ["instruct"]),
            "models.instruct: the tokenizer of .*/copy cannot be read, a file is damaged",
        ),
        (
            "model.safetensors",
            lambda profile: HubModels(profile).language_model("instruct", "qwen3"),
            "the language model .*/copy cannot be read, a file is damaged",
        ),
    ],
)
def test_a_damaged_model_is_named(qwen, project, tmp_path, file, load, message):
    profile = project("qwen3", qwen)
    copy = Source(str(hub_folders.damaged(qwen["instruct"], tmp_path / "copy", file)))
    profile = replace(profile, models=profile.models | {"instruct": copy}, hardware=HARDWARE)
    with pytest.raises(ValueError, match=message):
        load(profile)


def test_an_annotation_that_cannot_begin_does_not_block_the_next(qwen, tmp_path, capsys):
    source, output = f"alpaca-eval={qwen['helpfulness']}", tmp_path / "annotated.jsonl"
    command = ["--data", source, "--output", str(output)]
    assert annotate_rewards.main([*command, "--reward", str(qwen["instruct"])]) == 2
    assert "name a reward model, a sequence classifier with one label" in capsys.readouterr().err
    assert annotate_rewards.main([*command, "--reward", str(qwen["reward"])]) == 0


def test_an_adapter_is_a_reward_model_if_it_brings_the_head(qwen, tmp_path):
    """The head is that of the adapter, in whatever class the backbone was saved."""
    for task, auto in (
        ("SEQ_CLS", AutoModelForSequenceClassification),
        ("CAUSAL_LM", AutoModelForCausalLM),
    ):
        labels = {"num_labels": 1} if task == "SEQ_CLS" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers
            model = auto.from_pretrained(qwen["instruct"], **labels)
            lora = LoraConfig(r=2, target_modules=["q_proj"], task_type=task)
            get_peft_model(model, lora).save_pretrained(tmp_path / task)
        hub_folders.tokenizer().save_pretrained(tmp_path / task)
    output = tmp_path / "annotated.jsonl"
    command = ["--data", f"alpaca-eval={qwen['helpfulness']}", "--output", str(output)]
    assert annotate_rewards.main([*command, "--reward", str(tmp_path / "SEQ_CLS")]) == 0
    assert len(output.read_text().splitlines()) == 8
    with pytest.raises(ValueError, match="CAUSAL_LM is a Qwen3ForCausalLM with 2 labels: name a"):
        hub_models.check_reward_model(Source(str(tmp_path / "CAUSAL_LM")))
    with pytest.raises(ValueError, match="SEQ_CLS is a PeftModelForSequenceClassification: name a"):
        hub_models.check_language_model(Source(str(tmp_path / "SEQ_CLS")))
    hub_models.check_language_model(Source(str(tmp_path / "CAUSAL_LM")))


def test_sources(tmp_path):
    local = Source(str(tmp_path))
    for source, message in (
        (
            Source(str(tmp_path / "none")),
            "none: there is no such folder, and a Hub id has the form owner/name",
        ),
        (replace(local, subfolder="values"), "values: there is no such folder$"),
    ):
        with pytest.raises(FileNotFoundError, match=f"no model in .*{message}"):
            fetch(source)
    assert fetch(local) == local
    assert place(replace(local, subfolder="x")) == (str(tmp_path), {"subfolder": "x"})
    assert place(Source("a/b", "c0ffee")) == ("a/b", {"revision": "c0ffee"})


def test_a_revision_is_fetched_as_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commits = {"main": "a" * 40, "v2": "b" * 40}
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        (repository / "refs" / name).write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        assert fetch(Source("owner/name", name)) == Source("owner/name", commit)
    profile = load_profile("qwen3-4b")
    models = {
        "base": Source("owner/name", "v2"),
        "value-mean": Source("owner/name", backbone="owner/name", backbone_revision="v2"),
    }
    pinned = pin(replace(profile, models=profile.models | models), models).models
    assert pinned["base"] == Source("owner/name", commits["v2"])
    assert pinned["value-mean"] == replace(
        models["value-mean"], revision=commits["main"], backbone_revision=commits["v2"]
    )
    # one that was trained here names its backbone
    named = {"base_model_name": "owner/name", "base_model_revision": "v2"}
    (tmp_path / "model_config.json").write_text(json.dumps(named))
    models["value-mean"] = Source(str(tmp_path))
    pinned = pin(replace(profile, models=profile.models | models), models).models
    expected = replace(models["value-mean"], backbone_revision=commits["v2"])
    assert pinned["value-mean"] == expected


def test_limits_have_a_name_and_tables_of_their_own():
    profile = load_profile("qwen3-4b")
    small = limited(profile, 7)
    assert small.name == "qwen3-4b-limit7"
    assert (profile.make_options, small.make_options) == (
        "PROFILE=qwen3-4b",
        "PROFILE=qwen3-4b LIMIT=7",
    )
    counts = {"prompts_per_objective": 7, "validation_prompts_per_objective": 7}
    assert small.evaluation == replace(profile.evaluation, **counts)
    assert small.sweep.rollout_prompts == 7
    assert limited(profile, 10**6).evaluation == profile.evaluation


def test_hardware_is_detected_unless_given():
    profile = load_profile("qwen3-4b")
    requested = Hardware("cpu", "bfloat16", 3)
    assert detect_hardware(profile, requested) == requested
    detected = detect_hardware(profile, Hardware("", "", 0))
    on_gpu = torch.cuda.is_available()
    assert (detected.device, detected.dtype) == (
        ("cuda", "bfloat16") if on_gpu else ("cpu", "float32")
    )
    assert 1 <= detected.batch_size <= profile.decoding.batch_size


# --- models and templates


def test_every_kind_of_model_reads_its_own_template(qwen, project):
    further = f'[models.instruct-reward]\nid = "{qwen["instruct"]}"\n'
    subject = HubModels(replace(project("qwen3", qwen, further), hardware=HARDWARE))
    chats = subject.prompts_of("test", "helpfulness")[:2]
    prompts = [
        chat[0]["content"]
        for objective in OBJECTIVES
        for split in ("test", "validation")
        for chat in subject.prompts_of(split, objective)
    ]
    assert len(set(prompts)) == 24
    assert subject.splits["harmlessness"].skipped == 1
    text = chats[0][0]["content"]
    decode = hub_folders.tokenizer().decode
    opened = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    for kind, expected in (
        ("base", f"Human:\n{text}\nAssistant:\n"),
        ("value-mean", opened),
        ("reward", opened),
        ("rollout", opened),
        ("instruct", opened + "<think>\n\n</think>\n\n"),
        ("instruct-reward", opened + "<think>\n\n</think>\n\n"),
    ):
        assert decode(subject.encode(chats, kind)[0]) == expected
    responses = subject.respond(
        subject.language_model("base", "qwen3"), subject.encode(chats, "base"), 0
    )
    whole = subject.conversations(chats, responses, "evaluation-reward")
    assert (
        hub_folders.tokenizer(300).decode(whole[0]) == opened + responses[0].text + "<|im_end|>\n"
    )


def test_templates_write_one_date_whatever_the_day():
    tokenizer, chat = hub_folders.tokenizer(), [{"role": "user", "content": "why ?"}]
    tokenizer.chat_template = (
        "\n{{ date_string }}, {{ strftime_now('%d %B %Y') }}, {{ strftime_now(format='%F') }}\n"
        + hub_folders.TEMPLATE
    )
    (text,) = hub_models.chat_texts(tokenizer, [chat])
    assert text.startswith("\n26 Jul 2024, 26 July 2024, 2024-07-26\n<|im_start|>user\nwhy ?")


def test_token_ids_are_the_same_tokens_to_all_that_share_them(qwen, project, tmp_path):
    larger = hub_folders.save_model(tmp_path / "larger", "qwen3", 5, vocabulary=400)
    tokenizer = hub_folders.tokenizer()
    tokenizer.add_tokens([f"<|extra{i}|>" for i in range(80)], special_tokens=True)
    tokenizer.save_pretrained(larger)
    renamed = hub_folders.save_model(tmp_path / "renamed", "qwen3", 5)
    content = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (renamed / "tokenizer.json").write_text(json.dumps(content))
    special = hub_folders.save_model(tmp_path / "special", "qwen3", 5)
    content = (special / "tokenizer.json").read_text()
    (special / "tokenizer.json").write_text(content.replace("<|endoftext|>", "<|end_of_text|>"))
    padded = hub_folders.save_model(tmp_path / "padded", "qwen3", 5)
    tokenizer = hub_folders.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(padded)
    for folder in (special, padded):  # whose texts are the same
        profile = project("qwen3", qwen | {"instruct": folder})
        hub_models.check_tokens(profile, ["instruct"])
    for folder, message in (
        (
            larger,
            r"models.instruct: its tokenizer must have tokens of the base .*, got token",
        ),
        (renamed, "models.instruct: the tokenizers of model and instruct must agree: token"),
    ):
        profile = project("qwen3", qwen | {"instruct": folder})
        hub_models.check_tokens(profile, ["base", "value-mean"])
        with pytest.raises(ValueError, match=message):
            HubModels.prepare(profile, [Cell(0, "qwen3", model=INSTRUCT)], HARDWARE, None)


@pytest.mark.parametrize("cell", [{"search": "beams"}, {"scorer": ARGS, "gate": "every"}])
def test_a_reward_model_that_reads_tokens_must_have_them(qwen, project, cell):
    profile = project("qwen3", qwen | {"reward": qwen["evaluation"]})
    cell = Cell(0, "qwen3", **cell)
    message = "models.reward: it must have the 320 tokens of the base, got 300"
    with pytest.raises(ValueError, match=message):
        HubModels.prepare(profile, [cell], HARDWARE, None)
    assert HubModels.prepare(profile, [Cell(0, "qwen3", search="best-of")], HARDWARE, None)


def test_weights_of_a_backbone_that_an_adapter_names_count(qwen, project, tmp_path):
    own = hub_folders.save_model(tmp_path / "own", "qwen3", 7)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(own)}
    for name, file in (("lora", "adapter_config.json"), ("published", "model_config.json")):
        source = Source(str(tmp_path / name))
        Path(source.id).mkdir()
        Path(source.id, file).write_text(json.dumps(settings))
        before = hub_models.fingerprint(source)
        hub_folders.save_model(own, "qwen3", 8)
        assert hub_models.fingerprint(source) != before
        profile = project("qwen3", qwen)
        profile = replace(profile, models=profile.models | {"instruct": source})
        assert own in profile.local_inputs["instruct"]
        hub_folders.save_model(own, "qwen3", 7)
        Path(source.id, file).write_text("{")  # damaged
        assert source.folders == [Path(source.id)]
    assert set(BACKBONE_KEYS) == set(published.BACKBONE_NAMES)


@pytest.mark.parametrize("text", ["", " tell me why"], ids=["none", "with spaces"])
def test_tokens_are_written_with_their_spaces(qwen, project, text):
    """None where steering shifted nothing."""
    subject = HubModels(project("qwen3", qwen))
    ids = subject.tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(subject.words(ids)) == text


def test_reward_prompts_have_one_format(qwen, project, tmp_path):
    """Annotation, best-of-N, ARGS, beams, rollouts; like Qwen3's, its template writes a thought."""
    places = qwen | {"reward": tmp_path / "reward"}
    shutil.copytree(qwen["reward"], places["reward"])
    tokenizer = hub_folders.tokenizer()
    content = "{{ message['content'] }}"
    thinking = "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}" + content
    tokenizer.chat_template = tokenizer.chat_template.replace(content, thinking)
    tokenizer.save_pretrained(places["reward"])
    subject = HubModels(replace(project("qwen3", places), hardware=HARDWARE))
    chats, responses = subject.prompts_of("test", "helpfulness")[:2], []
    for text, finished in (("do i bake", True), ("poem about the sea", False)):
        ids = tokenizer(f"{text}<|endoftext|>").input_ids[:4]
        assert (ids[-1] == tokenizer.pad_token_id) == finished
        blank = dict.fromkeys(("entropy", "steered", "base_token", "kl"), np.zeros(4, np.float32))
        written = tokenizer.decode(ids, skip_special_tokens=True)
        responses.append(Generation(written, np.array(ids), **blank, finished=finished))
    answered = [
        [*chat, {"role": "assistant", "content": response.text}]
        for chat, response in zip(chats, responses, strict=True)
    ]
    whole = hub_models.chat_ids(tokenizer, answered, answered=True)
    assert "assistant\n<think>\n\n</think>\n\ndo i bake<|im_end|>\n" in tokenizer.decode(whole[0])
    assert subject.conversations(chats, responses, "reward") == whole
    model, reward = subject.language_model("base", "qwen3"), subject.reward_model("reward")
    examples = [(chat, r.text) for chat, r in zip(chats, responses, strict=True)]
    expected = annotation.score_examples(reward, tokenizer, examples, 2048, 2048)
    assert np.std(expected) > 0.01
    scorer = subject.reward_scorer(model, reward)
    tokens = torch.tensor([r.token_ids.tolist() for r in responses])
    rows, lengths = torch.arange(2), torch.tensor([4, 4])
    for kind in ("reward", "rollout"):
        session = scorer.start_session(subject.encode(chats, kind), 8)
        for scores in (
            session.score_branches(rows, tokens[:, :2], tokens[:, None, 2:], lengths[:, None] - 2),
            session.score(rows, tokens[:, :3], tokens[:, 3:])[:, 0],
            session.score_responses(rows, tokens, lengths),
        ):
            np.testing.assert_allclose(scores.flatten(), expected, atol=1e-4)


def test_a_measured_shard_has_rewards_of_its_responses(qwen, project):
    """Rewards against the reward model read one by one; steering against the library by hand."""
    profile = replace(project("qwen3", qwen), hardware=HARDWARE)
    settings = {"gate": "entropy", "target_ratio": 0.5, "thresholds": (1.2,) * 3, "beta": 2.0}
    cell = Cell(0, "qwen3", scorer=value_kind("mean"), **settings)
    rows = measure.measure_shard(subject_of(profile, 0), Shard(cell, "honesty", range(2, 5)))
    assert rows["prompt"].tolist() == [2, 3, 4]
    subject = HubModels(profile)
    chats = subject.prompts_of("test", "honesty")[2:5]
    values = ValueModel.from_pretrained(qwen["values"], qwen["base"])
    steering = Steering(values, EntropyGate(1.2), beta=2.0)
    model = subject.language_model("base", "qwen3")
    expected = generate(
        model, subject.tokenizer, subject.encode(chats, "base"), steering, max_new_tokens=8,
        value_prompts=subject.encode(chats, "value-mean"), progress=False,
    )  # fmt: skip
    assert rows["steered"].tolist() == [int(g.steered.sum()) for g in expected]
    np.testing.assert_allclose(rows["kl"], [g.kl.sum() for g in expected], atol=0.01)
    judge = RewardScorer.from_pretrained(qwen["evaluation"]).model
    for reward, ids in zip(
        rows["reward"], subject.conversations(chats, expected, "evaluation-reward"), strict=True
    ):
        with torch.no_grad():
            hidden = judge.base_model(input_ids=torch.tensor([ids])).last_hidden_state
        assert reward == pytest.approx(judge.score(hidden)[0, -1, 0].item(), abs=1e-4)
    assert rows["surprise"].gt(0).all()


def test_what_is_fitted_to_given_models_steers_them(qwen, project, tmp_path):
    """All in one folder; prompts are in the template of the value model that it was fitted to."""
    subject = HubModels(replace(project("qwen3", qwen), hardware=HARDWARE))
    model, values = subject.language_model("base", "qwen3"), subject.value_model("value-mean", "")
    chats = subject.prompts_of("test", "honesty")
    unit = (model, subject.tokenizer, values, subject.encode(chats, "base"))
    options = {"max_new_tokens": 6, "epochs": 1, "progress": False}
    options["value_prompts"] = subject.encode(chats, "value-mean")
    fits = (
        fit_junction_gate(*unit, **options).gate,
        fit_q_head(*unit, **options).scorer,
        fit_vocabulary_value_model(*unit, **options).scorer,
    )
    for fitted in fits:
        fitted.save_pretrained(tmp_path / "mine")
    further = [f'[models.{name}-mean]\nid = "{tmp_path}/mine"\n' for name in FITTED]
    profile = replace(project("qwen3", qwen, "\n".join(["", *further])), hardware=HARDWARE)
    need = FIGURES["figure1"].cells(profile, 0)
    assert {"junction", "divergence"} <= {cell.gate for cell in need.cells}
    for scorer, gate, kinds in (
        ("value-mean", "junction", {"junction-mean", "value-mean"}),
        ("q-head-mean", "junction", {"junction-mean", "q-head-mean", "value-mean"}),
        ("vocabulary-value-mean", "every", {"vocabulary-value-mean", "value-mean"}),
    ):
        cell = Cell(0, "qwen3", scorer=ModelKind.parse(scorer), gate=gate, beta=1.0,
                    target_ratio=1.0, thresholds=(0.0,) * 3)  # fmt: skip
        assert {*kinds_of(cell)} == kinds | {"base", "evaluation-reward"}
        hub_models.check_models(profile, kinds_of(cell))
        shard = Shard(cell, "honesty", range(2))
        rows = measure.measure_shard(subject_of(profile, 0), shard)
        assert (rows["steered"] == rows["tokens"]).all()
    other = Source(str(hub_folders.save_model(tmp_path / "other", "qwen3", seed=9, kind="base")))
    for kind in ("junction-mean", "q-head-mean"):  # before anything is loaded
        with pytest.raises(ValueError, match=rf"models.{kind}: .* got {other.id} with other weigh"):
            hub_models.check_models(
                replace(profile, models=profile.models | {"base": other}), [kind]
            )
    settings = tmp_path / "mine/q_head.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model": {"name": "a"}}))
    with pytest.raises(ValueError, match=r"models.q-head-mean: q_head.json and .* must hold a q h"):
        hub_models.check_models(profile, ["q-head-mean"])
    settings.unlink()
    with pytest.raises(ValueError, match=r"models.q-head-mean: .*/mine has no q_head.json: name"):
        hub_models.check_models(profile, ["q-head-mean"])
    without = [line for line in further if "junction" in line]
    text = "\n".join(["", *without]).replace("junction-mean", "junction-token")
    with pytest.raises(ValueError, match=r"models.value-token, which junction-token is fitted to"):
        project("qwen3", qwen, text)


def test_cell_keys_depend_on_the_files_of_their_own_models_alone(qwen, project, tmp_path):
    places = dict(qwen)
    for kind in ("values", "instruct"):
        places[kind] = tmp_path / kind
        shutil.copytree(qwen[kind], places[kind])
    profile = replace(project("qwen3", places), hardware=HARDWARE)
    steered = Cell(0, "qwen3", scorer=value_kind("mean"), gate="every", beta=1.0)
    plain = Cell(0, "qwen3")

    def digests(profile):
        return [HubModels(profile).digest_of(cell) for cell in (steered, plain)]

    before = digests(profile)
    assert digests(replace(profile, models=profile.models | {"instruct": Source("x/y")})) == before
    sized = {kind: replace(source, billions=8.0) for kind, source in profile.models.items()}
    assert digests(replace(profile, models=sized)) == before
    head = places["values"] / "token_reward_head.pt"
    head.write_bytes(head.read_bytes() + b" ")
    after = digests(profile)
    assert [now == then for now, then in zip(after, before, strict=True)] == [False, True]
    values = profile.models["value-mean"]  # whose adapter names its backbone, too
    files = [hub_models.fingerprint(source)[1] for source in (values, replace(values, backbone=""))]
    assert files[0] == files[1]
    for change in ({"dtype": "bfloat16"}, {"batch_size": 8}):
        assert digests(replace(profile, hardware=replace(HARDWARE, **change))) != after
    with places["honesty"].open("a") as file:
        file.write("A,B,another,C\n")
    assert digests(profile)[1] != after[1]


def test_cell_keys_depend_on_the_prompts_that_the_hub_has(qwen, project, monkeypatch):
    profile = project("qwen3", qwen)
    sets = replace(profile.prompts, helpfulness="alpaca-eval")
    profile = replace(profile, prompts=sets, hardware=HARDWARE)
    table, keys = hub_prompts.read_files(qwen["helpfulness"]), []
    for verb in ("help", "help", "draw"):
        rows = [{"instruction": row["instruction"].replace("help", verb)} for row in table]
        served = rows, "a" * 40
        monkeypatch.setattr(hub_prompts, "_from_hub", lambda name, data, served=served: served)
        keys.append(HubModels(profile).digest_of(Cell(0, "qwen3")))
    assert (keys[0] == keys[1], keys[0] == keys[2]) == (True, False)


def test_shards_are_ranges_of_prompts(qwen, project):
    profile = replace(project("qwen3", qwen), hardware=HARDWARE)
    store = CellStore(profile)
    shards = store.shards(Cell(0, "qwen3"))
    assert [(shard.objective, list(shard.prompts)) for shard in shards[:4]] == [
        ("harmlessness", [0, 1]),
        ("harmlessness", [2, 3]),
        ("harmlessness", [4]),
        ("helpfulness", [0, 1]),
    ]
    assert [s.prompts for s in store.shards(Cell(0, "qwen3", "validation"))] == [range(0)] * 3
    assert [list(s.prompts) for s in store.shards(Cell(0, "qwen3", prompts=1))] == [[0]] * 3
    assert len({store.path(shard) for shard in shards}) == 9


# --- the whole path


def test_annotate_train_and_figure_2(llama, project, tmp_path, capsys, monkeypatch):
    places = llama
    data = tmp_path / "annotated.jsonl"
    source = f"alpaca-eval={places['helpfulness']}"
    reward = str(places["reward"])
    command = ["--data", source, "--reward", reward, "--output", str(data)]
    assert annotate_rewards.main(command) == 0
    assert len(data.read_text().splitlines()) == 8
    value_model = tmp_path / "my-value-model"
    command = ["--backbone", str(places["base"]), "--data", str(data), "--output", str(value_model)]
    command += ["--heldout", "0.25", "--epochs", "1", "--learning-rate", "1e-2"]
    assert train_value_model.main(command) == 0
    project("llama", places | {"values": value_model})
    monkeypatch.setattr("benchmarks.engine.run.Workers", lambda *_: ThisProcess())
    monkeypatch.setattr("benchmarks.figures.style.DPI", 20)
    # a model that was trained here brings its tokenizer, and names its backbone
    path = tmp_path / "profiles/tiny.toml"
    path.write_text(path.read_text().replace(f'backbone = "{places["base"]}"', 'backbone = ""'))
    profile = load_profile("tiny")
    assert main(["figure2", "--profile", "tiny", "--batch-size", "4"]) == 0
    printed = capsys.readouterr().out
    assert "tiny: 5 models at hand; cpu, float32, batches of 4" in printed
    skipped = "prompts skipped because they have more than 100 tokens"
    assert f"tiny: {skipped}: 1 of harmlessness" in printed
    folder = tables.folder(profile)
    summary = pd.read_csv(folder / "figure2.csv")
    assert {"base", "instruct", "sia", "dense", "random", "beams", "args", "transfer-q"} <= set(
        summary["method"]
    )
    assert set(summary["metric"]) == {"reward", "kl"}
    provenance = json.loads((folder / "figure2.json").read_text())
    trained = provenance["models"]["value-mean"]
    assert (trained["id"], trained["backbone"]) == (str(value_model), "")
    assert provenance["prompts_skipped"] == {"harmlessness": 1, "helpfulness": 0, "honesty": 0}
    hardware = {"device": "cpu", "dtype": "float32", "batch_size": 4}
    assert {name: provenance[name] for name in hardware} == hardware
    assert (tables.FIGURES / "tiny/figure2.png").stat().st_size > 0
    assert main(["figure2", "--profile", "tiny"]) == 0
    assert "drawing from the table" in capsys.readouterr().out
    for option, value, message in (
        ("--dtype", "int8", "dtype must be float32, bfloat16 or float16, got 'int8'"),
        (
            "--batch-size",
            "2",
            "figure2 was measured with BATCH_SIZE=4, not 2: FRESH=1 measures it again",
        ),
    ):
        assert main(["figure2", "--profile", "tiny", option, value]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm-eval's own
        from lm_eval.api.instance import Instance

        from sia.integrations.lm_eval import SIA

        options = {"threshold": 0.0, "beta": 5.0, "device": "cpu", "batch_size": 2}
        sia = SIA(str(places["base"]), str(value_model), **options)
        settings = {"until": [], "max_gen_toks": 4, "do_sample": False}
        request = Instance("generate_until", {}, ("is the earth flat ?", settings), 0)
        (text,) = sia.generate_until([request], disable_tqdm=True)
    steering = Steering(ValueModel.from_pretrained(value_model), EntropyGate(0.0), beta=5.0)
    (expected,) = generate(
        sia.model, sia.tokenizer, ["is the earth flat ?"], steering,
        max_new_tokens=4, temperature=0, progress=False,
    )  # fmt: skip
    assert text == expected.text


def test_prepare_fetches_only_what_is_needed(qwen, project, monkeypatch):
    profile = project("qwen3", qwen)
    fetched = []
    monkeypatch.setattr(hub_models, "fetch", lambda source: fetched.append(source.id) or source)
    cells = [Cell(0, "qwen3", scorer=value_kind("mean"), gate="every")]
    settled, provenance = HubModels.prepare(profile, cells, Hardware("cpu", "", 2), None)
    assert set(provenance["models"]) == {"base", "value-mean", "evaluation-reward"}
    assert str(qwen["instruct"]) not in fetched
    assert settled.hardware == Hardware("cpu", "float32", 2)
    subject, described = HubModels(settled), provenance["prompts"]
    assert list(described) == list(OBJECTIVES)
    for objective, prompts in described.items():
        source = getattr(profile.prompts, objective)
        assert prompts["source"] == source
        assert prompts["file"] == source.partition("=")[2]
        assert prompts["sha256"] == tables.sha256(Path(prompts["file"]))
        assert len(prompts["digest"]) == 16
        whole = load_prompts(source)
        for split in ("test", "validation"):
            chats = [whole.chats[whole.rows.index(int(row))] for row in prompts[split].split()]
            assert chats == subject.prompts_of(split, objective)
    assert len({prompts["digest"] for prompts in described.values()}) == 3

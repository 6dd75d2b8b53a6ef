"""Scripts: annotating with rewards, training by LoRA, and comparing in the terminal."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from benchmarks.runtime.files import working_alone
from benchmarks.runtime.workers import ThisProcess
from benchmarks.subjects.hub import annotation
from scripts import annotate_rewards, compare, train_value_model
from sia import Generation, RewardScorer, ValueModel
from tests.helpers import hub_folders

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    return hub_folders.save_hub(tmp_path_factory.mktemp("hub"), "qwen3")


def annotate(places: dict[str, Path], output: Path, *further: str) -> int:
    source = f"alpaca-eval={places['helpfulness']}"
    return annotate_rewards.main(
        ["--data", source, "--reward", str(places["reward"]), "--output", str(output), *further]
    )


@pytest.fixture(scope="module")
def data(places, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("data") / "annotated.jsonl"
    assert annotate(places, output) == 0
    return output


# --- annotate_rewards.py


def test_rewards_are_those_of_the_reward_model(places, data):
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    assert lines[0]["prompt"] == [{"role": "user", "content": "help well, number 0"}]
    assert lines[0]["response"] == "yes, help well, number 0"
    model, tokenizer = RewardScorer.from_pretrained(places["reward"]).model, hub_folders.tokenizer()
    for line in lines:
        text = tokenizer.apply_chat_template(
            [*line["prompt"], {"role": "assistant", "content": line["response"]}], tokenize=False
        )
        with torch.no_grad():
            hidden = model.base_model(
                input_ids=torch.tensor([tokenizer(text).input_ids])
            ).last_hidden_state
        assert line["reward"] == pytest.approx(model.score(hidden)[0, -1, 0].item(), abs=1e-4)


def test_an_interrupted_annotation_goes_on(places, data, tmp_path, monkeypatch):
    monkeypatch.setattr(annotate_rewards, "WINDOW", 3)
    output, calls = tmp_path / "out.jsonl", []
    rate = annotation.trajectory_rewards

    def interrupted(model, sequences, positions):
        calls.append(len(sequences))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rate(model, sequences, positions)

    monkeypatch.setattr(annotation, "trajectory_rewards", interrupted)
    assert annotate(places, output) == 130
    partial = output.with_name("out.jsonl.part")
    assert len(partial.read_text().splitlines()) == 1 + 3
    with partial.open("a") as file:  # as a kill leaves it: a window's first line, half of another
        file.write('{"prompt": [], "response": "", "reward": 0.0}\n{"prompt": [{"ro')
    assert annotate(places, output) == 0
    assert calls == [3, 3, 3, 2]
    assert [json.loads(line)["response"] for line in output.read_text().splitlines()] == [
        json.loads(line)["response"] for line in data.read_text().splitlines()
    ]
    assert not partial.exists()


def test_annotation_does_not_go_on_over_other_data(places, tmp_path, monkeypatch, capsys):
    """The same names, but other examples or another reward model in them."""
    prompts, reward = tmp_path / "prompts.json", tmp_path / "reward"
    shutil.copytree(places["reward"], reward)
    examples = json.loads(places["helpfulness"].read_text())
    prompts.write_text(json.dumps(examples))
    copied = places | {"helpfulness": prompts, "reward": reward}
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(annotate_rewards, "WINDOW", 3)
        finish = annotate_rewards.write_text
        patch.setattr(annotate_rewards, "write_text", interrupt)
        assert annotate(copied, output) == 130
        prompts.write_text(json.dumps(examples[::-1]))
        assert annotate(copied, output) == 2
        assert "out.jsonl.part was begun with other settings or data" in capsys.readouterr().err
        prompts.write_text(json.dumps(examples))
        weights = reward / "model.safetensors"
        state = load_file(weights)
        save_file(state | {"score.weight": -state["score.weight"]}, weights, {"format": "pt"})
        assert annotate(copied, output) == 2
        patch.setattr(annotate_rewards, "write_text", finish)
        shutil.copyfile(places["reward"] / "model.safetensors", weights)
        assert annotate(copied, output) == 0


def interrupt(*_):
    raise KeyboardInterrupt


class Backwards(ThisProcess):
    """Workers that finish the last task first."""

    def run(self, function, tasks, **options):
        return super().run(function, tasks[::-1], **options)


def test_the_order_in_which_workers_finish_changes_no_byte(places, tmp_path, monkeypatch):
    monkeypatch.setattr(annotate_rewards, "WINDOW", 3)
    for name, workers in (("one", ThisProcess), ("several", Backwards)):
        monkeypatch.setattr(annotate_rewards, "workers_for", lambda *_, workers=workers: workers())
        assert annotate(places, tmp_path / name) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "several").read_bytes()


def test_every_gpu_annotates(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert annotate_rewards.workers_for("local", "cuda").gpus == 4
    assert isinstance(annotate_rewards.workers_for("local", "cpu"), ThisProcess)


def test_annotation_without_memory_names_the_option(places, tmp_path, monkeypatch, capsys):
    def rate(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(annotation, "trajectory_rewards", rate)
    assert annotate(places, tmp_path / "x", "--batch-tokens", "512") == 2
    message = "out of memory while annotating, 512 tokens together: use --batch-tokens 256"
    assert message in capsys.readouterr().err


def test_annotation_counts_what_is_too_long_and_limits(places, tmp_path, capsys):
    assert annotate(places, tmp_path / "short.jsonl", "--longest", "70") == 0
    kept = len((tmp_path / "short.jsonl").read_text().splitlines())
    assert 0 < kept < 8
    assert (
        f"{kept} examples, {8 - kept} left out with more than 70 tokens" in capsys.readouterr().out
    )
    assert annotate(places, tmp_path / "none.jsonl", "--longest", "3") == 2
    message = (
        "must have examples that can be scored, got none, 8 left out with more than 3 tokens\n"
    )
    assert capsys.readouterr().err.endswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["short.jsonl"]
    assert annotate(places, tmp_path / "two.jsonl", "--limit", "2") == 0
    assert len((tmp_path / "two.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        (GPT2ForSequenceClassification, {"n_positions": 70}),
        (BertForSequenceClassification, {"max_position_embeddings": 70}),
    ],
)
def test_annotation_leaves_out_what_is_longer_than_the_positions(
    places, tmp_path, capsys, architecture, sizes
):
    words = hub_folders.tokenizer()
    usual = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_labels": 1}
    config = architecture.config_class(vocab_size=len(words), pad_token_id=0, **usual, **sizes)
    architecture(config).save_pretrained(tmp_path / "reward")
    words.save_pretrained(tmp_path / "reward")
    reward = {**places, "reward": tmp_path / "reward"}
    assert annotate(reward, tmp_path / "short.jsonl", "--device", "cpu") == 0
    kept = len((tmp_path / "short.jsonl").read_text().splitlines())
    assert 0 < kept < 8
    out = capsys.readouterr().out
    assert f"{reward['reward']} has positions for 70 tokens, no longer ones are scored" in out
    assert f"{kept} examples, {8 - kept} left out with more than 70 tokens" in out


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ PROBLEM }}{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("raise_exception('roles must alternate')", "roles must alternate"),
        ("'a' + none", "can only concatenate str"),
        ("'{b}'.format()", "'b'"),
        ("'a'.index('b')", "substring not found"),
    ],
)
def test_examples_that_a_template_refuses_are_counted(places, tmp_path, capsys, problem, message):
    """A dialogue with two turns of the user in a row, and templates that insist on alternation."""
    reward = tmp_path / "reward"
    shutil.copytree(places["reward"], reward)
    tokenizer = AutoTokenizer.from_pretrained(reward)
    tokenizer.chat_template = ALTERNATING.replace("PROBLEM", problem)
    tokenizer.save_pretrained(reward)
    dialogues = ["\n\nHuman: hi\n\nAssistant: ", "\n\nHuman: hi\n\nHuman: you\n\nAssistant: "]
    rows = [{"chosen": f"{text}yes", "rejected": f"{text}no"} for text in dialogues]
    data = tmp_path / "hh.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    arguments = ["--data", f"hh-rlhf={data}", "--reward", str(reward), "--output", str(output)]
    assert annotate_rewards.main([*arguments, "--device", "cpu"]) == 0
    assert [json.loads(line)["response"] for line in output.read_text().splitlines()] == [
        "yes",
        "no",
    ]
    counts = "2 examples, 0 left out with more than 2048 tokens, 2 that the chat template refuses"
    assert counts in capsys.readouterr().out
    # training refuses such a prompt in one sentence
    chat = [{"role": "user", "content": "a"}] * 2
    data.write_text(json.dumps({"prompt": chat, "response": "b", "reward": 1.0}) + "\n")
    with pytest.raises(ValueError, match=f"example 0: the chat template .* refuses .*: {message}"):
        train_value_model.read_examples([data], tokenizer, 100)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an end-of-sequence token"):
        train_value_model.read_examples([data], tokenizer, 100)


def test_annotation_refuses(places, data, tmp_path, capsys, monkeypatch):
    assert annotate(places, data) == 2
    assert (
        f"error: {data} is there already: name another output, or delete it"
        in capsys.readouterr().err
    )
    assert annotate({**places, "reward": "nobody/nothing"}, data / "below.jsonl") == 2
    message = f"error: --output must be written to a folder, got the file {data}\n"
    assert capsys.readouterr().err == message
    for content in (b'{"data": "other"}\n', b"notes\n", b"\xff\n"):
        (tmp_path / "x.jsonl.part").write_bytes(content)
        assert annotate(places, tmp_path / "x.jsonl") == 2
        error = capsys.readouterr().err
        assert "x.jsonl.part was begun with other settings or data, " in error
        assert (tmp_path / "x.jsonl.part").read_bytes() == content
    for option in ("--limit", "--longest", "--batch-tokens"):
        assert annotate(places, tmp_path / "y.jsonl", option, "-5") == 2
        assert f"error: {option} must be at least 1, got -5" in capsys.readouterr().err
    arguments = [
        "--data",
        f"hh-rlhf={places['helpfulness']}",
        "--reward",
        str(places["reward"]),
        "--output",
        str(tmp_path / "z.jsonl"),
    ]
    assert annotate_rewards.main(arguments) == 2
    assert "is no copy of hh-rlhf: expected the columns chosen, rejected" in capsys.readouterr().err
    arguments[:4] = ["--data", f"alpaca-eval={places['helpfulness']}", "--reward", "nobody/nothing"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert annotate_rewards.main(arguments) == 2
    assert (
        "error: nobody/nothing (revision main) is missing: it is not in the cache"
        in capsys.readouterr().err
    )


@hub_folders.needs_public_files
def test_real_text_is_annotated_and_learned_from(places, tmp_path):
    data = tmp_path / "real.jsonl"
    source = f"hh-rlhf={hub_folders.PUBLIC / 'hh-rlhf-harmless-base-test.jsonl.gz'}"
    assert (
        annotate_rewards.main(
            [
                "--data",
                source,
                "--reward",
                str(places["reward"]),
                "--output",
                str(data),
                "--limit",
                "24",
            ]
        )
        == 0
    )
    arguments = [
        "--backbone",
        str(places["base"]),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "values"),
        "--epochs",
        "1",
    ]
    assert train_value_model.main([*arguments, "--longest", "512", "--heldout", "0.2"]) == 0
    assert ValueModel.from_pretrained(tmp_path / "values")(torch.tensor([[5, 6, 7]])).shape == (
        1,
        3,
    )


def test_an_output_has_one_run_at_a_time(places, data, tmp_path, capsys):
    lines, values = tmp_path / "rewards.jsonl", tmp_path / "values"
    with working_alone(lines), working_alone(values / "checkpoints"):
        assert annotate(places, lines) == 2
        assert f"error: another run is writing {lines}: wait until" in capsys.readouterr().err
        assert train_value_model.main(training(places, data, values)) == 2
        assert f"another run is writing {values / 'checkpoints'}:" in capsys.readouterr().err


# --- train_value_model.py


def training(places, data: Path, output: Path, *further: str) -> list[str]:
    usual = [
        "--backbone",
        str(places["base"]),
        "--data",
        str(data),
        "--output",
        str(output),
        "--batch-size",
        "2",
        "--heldout",
        "0.3",
    ]
    return [*usual, "--epochs", "2", "--check-every", "1", "--learning-rate", "5e-3", *further]


@pytest.fixture(scope="module")
def trained(places, data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("values") / "trained"
    assert train_value_model.main(training(places, data, output)) == 0
    return output


def values_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return ValueModel.from_pretrained(folder)(torch.arange(40, 60)[None])


def test_a_trained_model_has_the_published_layout_and_loads(trained, places):
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {file.name for file in trained.iterdir()} == tokenizer | {
        "lora_weights",
        "token_reward_head.pt",
        "model_config.json",
        "metrics.csv",
        "curves.png",
    }
    assert json.loads((trained / "model_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(places["base"])
    metrics = pd.read_csv(trained / "metrics.csv")
    assert metrics["update"].tolist() == list(range(1, 5))
    assert {
        "loss",
        "gradient_norm",
        "learning_rate",
        "heldout_loss",
        "correlation_10",
        "correlation_50",
        "correlation_100",
    } <= set(metrics)
    assert metrics["loss"].notna().all()
    assert values_of(trained).std() > 0


@pytest.mark.parametrize("base", ["~/base", "base", "./base"])
def test_a_local_backbone_is_named_by_its_path(places, data, tmp_path, monkeypatch, base):
    monkeypatch.setenv("HOME", str(places["base"].parent))
    monkeypatch.chdir(places["base"].parent)
    arguments = training(places | {"base": base}, data, tmp_path, "--epochs", "1")
    assert train_value_model.main(arguments) == 0
    config = json.loads((tmp_path / "model_config.json").read_text())
    assert config["base_model_name_or_path"] == str(places["base"])
    assert values_of(tmp_path).shape == (1, 20)


def test_values_learn_their_rewards(places, data, tmp_path):
    """Many epochs on a few examples: the mean of the token values comes close to each reward."""
    assert (
        train_value_model.main(
            training(
                places,
                data,
                tmp_path / "out",
                "--epochs",
                "40",
                "--heldout",
                "0",
                "--lora-dropout",
                "0",
            )
        )
        == 0
    )
    metrics = pd.read_csv(tmp_path / "out/metrics.csv")
    assert metrics["loss"].tail(4).mean() < 0.1 * metrics["loss"].head(4).mean()


@pytest.mark.parametrize(
    "further",
    [
        ("--loss", "token"),
        ("--seed", "1"),
        ("--lora-rank", "4"),
        ("--lora-alpha", "4"),
        ("--lora-dropout", "0.5"),
        ("--epochs", "1"),
        ("--learning-rate", "1e-3"),
        ("--accumulation", "1"),
        ("--longest", "40"),
        ("--weight-decay", "0.5"),
        ("--heldout", "0.6"),
    ],
)
def test_every_setting_changes_the_values(places, data, trained, tmp_path, further):
    seldom = ("--check-every", "100")
    assert (
        train_value_model.main(training(places, data, tmp_path / "other", *seldom, *further)) == 0
    )
    assert not torch.equal(values_of(tmp_path / "other"), values_of(trained))


def test_training_twice_ends_the_same(places, data, trained, tmp_path):
    assert train_value_model.main(training(places, data, tmp_path / "again")) == 0
    assert torch.equal(values_of(tmp_path / "again"), values_of(trained))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("function", "completed"),
    [
        pytest.param("Trainer._save_checkpoint", 3, id="within the second epoch"),
        pytest.param(
            "Trainer._save_optimizer_and_scheduler", 2, id="while a checkpoint is written"
        ),
    ],
)
def test_a_killed_training_resumes_and_ends_the_same(
    places, data, trained, tmp_path, function, completed
):
    """Bit for bit, as an uninterrupted run: order of the examples, dropout and optimizer."""
    output = tmp_path / "killed"
    code = f"""
import os, signal
from transformers import Trainer
from scripts import train_value_model as script
original = {function}
def write_and_die(self, *arguments):
    original(self, *arguments)
    if self.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
{function} = write_and_die
script.main({training(places, data, output)!r})
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert run.returncode == -signal.SIGKILL
    states = (output / "checkpoints").glob("checkpoint-*/trainer_state.json")
    assert [path.parent.name for path in states] == [f"checkpoint-{completed}"]
    assert not (output / "token_reward_head.pt").exists()
    assert len(pd.read_csv(output / "metrics.csv")) == 2  # of the checkpoint before
    assert train_value_model.main(training(places, data, output)) == 0
    assert not (output / "checkpoints").exists()
    assert torch.equal(values_of(output), values_of(trained))
    pd.testing.assert_frame_equal(
        pd.read_csv(output / "metrics.csv"), pd.read_csv(trained / "metrics.csv")
    )


def test_training_refuses(places, data, trained, tmp_path, capsys):
    def error(data: Path, output: Path, *further: str) -> str:
        assert train_value_model.main(training(places, data, output, *further)) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    there = f"error: {trained} has a value model already: name another output, or delete it"
    assert error(data, trained) == there
    unread = places | {"base": "nobody/nothing"}
    for output in (data, data / "below"):
        assert train_value_model.main(training(unread, data, output)) == 2
        message = f"error: --output must be written to a folder, got the file {data}\n"
        assert capsys.readouterr().err == message
    for option, value, message in (
        ("--epochs", "0", "--epochs must be at least 1, got 0"),
        ("--heldout", "1.5", "--heldout must be at least 0 and below 1, got 1.5"),
        ("--lora-alpha", "0", "--lora-alpha must be at least 1, got 0"),
        ("--lora-dropout", "nan", "--lora-dropout must be at least 0 and below 1, got nan"),
        ("--weight-decay", "inf", "--weight-decay must be a finite number of at least 0, got inf"),
        ("--learning-rate", "-1", "--learning-rate must be a finite number of at least 0, got -1"),
        ("--seed", "-1", "--seed must be 0 to 4294967295, got -1"),
        ("--longest", "3", "is short enough"),
        ("--backbone", "", "error: a model must be a Hub id or a folder, got ''"),
    ):
        assert message in error(data, tmp_path / "x", option, value)
    wrong = tmp_path / "wrong.jsonl"
    for line, message in (
        ('{"prompt": [], "response": "a"}',
         "must have the columns prompt, response and reward, reward missing"),
        ('{"prompt": [{"role": "user", "content": "a"}], "response": "a", "reward": null}',
         "example 0: a reward must be a number between ±1e+06 (standardise larger ones), got None"),
        *((f'{{"prompt": "a", "response": "a", "reward": {reward}}}', "example 0: a reward must be")
          for reward in ("1e30", "NaN", "-Infinity", '"high"', "true", "1e999")),
        ('{"prompt": [{"human": "a"}], "response": "a", "reward": 1}',
         "example 0: a message must have a role and a content, a text, got {'human': 'a'}"),
        (r'{"prompt": "\ud83d", "response": "a", "reward": 1}',
         r"a content, a text, got {'role': 'user', 'content': '\ud83d'}"),
        (r'{"prompt": "a", "response": "b \ud83d", "reward": 1}',
         r"and a response (a text), got 'a' and 'b \ud83d'"),
    ):  # fmt: skip
        wrong.write_text(line + "\n")
        assert message in error(wrong, tmp_path / "x")
    assert "no data in " in error(tmp_path / "none.jsonl", tmp_path / "x")
    torn = tmp_path / "torn" / "checkpoints"
    (torn / "checkpoint-1").mkdir(parents=True)
    (torn / "checkpoint-1/trainer_state.json").write_text("{")
    message = f"{torn / 'checkpoint-1'} is damaged: delete {torn} to begin anew"
    assert message in error(data, torn.parent)


def test_a_value_model_is_read_on_the_commit_that_it_was_trained_on(
    places, data, tmp_path, monkeypatch
):
    """Also if the Hub's main branch is another one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, output = tmp_path / "models--owner--base", tmp_path / "values"
    (repository / "refs").mkdir(parents=True)
    for seed, (name, commit) in enumerate((("main", "a" * 40), ("v1", "b" * 40))):
        hub_folders.save_model(repository / "snapshots" / commit, "qwen3", seed, "base")
        (repository / "refs" / name).write_text(commit)
    arguments = training(places | {"base": "owner/base"}, data, output, "--revision", "v1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT looks at the Hub
        assert train_value_model.main([*arguments, "--epochs", "1"]) == 0
        value_model = ValueModel.from_pretrained(output)
    config = json.loads((output / "model_config.json").read_text())
    adapter = json.loads((output / "lora_weights/adapter_config.json").read_text())
    assert config["base_model_revision"] == adapter["revision"] == "b" * 40
    embeddings = value_model.backbone.get_input_embeddings().weight
    weights = load_file(repository / "snapshots" / ("b" * 40) / "model.safetensors")
    assert torch.equal(embeddings, weights["model.embed_tokens.weight"])


def test_chats_in_csv_files_are_json(data, tmp_path):
    """As pandas writes them they are Python's, which would be learned from as texts."""
    words, chats = hub_folders.tokenizer(), pd.read_json(data, lines=True, precise_float=True)
    as_json = chats.assign(prompt=chats["prompt"].map(json.dumps))
    as_json.to_csv(tmp_path / "json.csv", index=False)
    expected = train_value_model.read_examples([data], words, 1024)
    for files in ([tmp_path / "json.csv"], [tmp_path]):
        assert train_value_model.read_examples(files, words, 1024) == expected
    chats.to_csv(tmp_path / "python.csv", index=False)
    message = r"python\.csv: example 0: a prompt that begins with \[{ must be messages as JSON"
    with pytest.raises(ValueError, match=message):
        train_value_model.read_examples([tmp_path / "python.csv"], words, 1024)


def test_a_checkpoint_of_other_settings_is_refused(places, data, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_value_model, "write_value_model", interrupt)
    base = hub_folders.save_model(tmp_path / "base", "qwen3", 0, "base")
    arguments = training(places | {"base": base}, data, base / "values", "--epochs", "1")
    assert train_value_model.main(arguments) == 130
    assert "interrupted: the last checkpoint is kept" in capsys.readouterr().err
    assert train_value_model.main([*arguments, "--epochs", "3"]) == 2
    message = f"{base / 'values/checkpoints'} is of a run with other settings"
    assert f"{message} (epochs): delete it, or" in capsys.readouterr().err
    assert train_value_model.main(arguments) == 130
    assert "interrupted: the last checkpoint is kept" in capsys.readouterr().err
    hub_folders.save_model(base, "qwen3", 9, "base")
    assert train_value_model.main(arguments) == 2
    assert f"{message} (backbone files): delete it, or" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "the backbone {folder} cannot be read, a file is damaged or trunc"),
        ("tokenizer.json", "the tokenizer of {folder} cannot be read, a file is damaged or trunc"),
    ],
)
def test_training_names_a_damaged_backbone(places, data, tmp_path, capsys, file, message):
    base = hub_folders.damaged(places["base"], tmp_path / "base", file)
    arguments = training(places | {"base": base}, data, tmp_path / "x")
    assert train_value_model.main(arguments) == 2
    assert f"error: {message.format(folder=base)}" in capsys.readouterr().err


# --- compare.py


def test_comparing_names_a_damaged_model(places, tmp_path, capsys):
    base = hub_folders.damaged(places["base"], tmp_path / "base")
    arguments = ["--model", str(base), "--value-model", str(places["values"]), "--prompt", "hi"]
    assert compare.main(arguments) == 2
    message = f"error: the language model {base} cannot be read, a file is damaged or truncated"
    assert message in capsys.readouterr().err


def test_both_answers_stand_side_by_side(places, capsys):
    arguments = [
        "--model",
        str(places["base"]),
        "--value-model",
        str(places["values"]),
        "--backbone",
        str(places["base"]),
    ]
    arguments += ["--max-new-tokens", "6", "--threshold", "0", "--prompt", "how do i bake a cake ?"]
    assert compare.main(arguments) == 0
    base, _, steered = capsys.readouterr().out.partition("\n\nsteered (")
    assert base.startswith("base (6 tokens):\n")
    note, _, words = steered.partition(":\n")
    assert note.startswith("6 tokens, 100% steered, ")
    changed = int(re.search(r"(\d+) changed", note)[1])
    assert 0 < words.count("[*") <= changed  # a token that ends the text is not seen
    assert words.count("[") > words.count("[*")
    assert words.endswith("\n")
    for prompt, message in (
        (" ", "a prompt must end in a user turn with a text, got an empty one"),
        ("\udcff", r"a message must have a role and a content, a text, got {'role': 'user', "),
    ):
        assert compare.main([*arguments[:-1], prompt]) == 2
        assert f"error: {message}" in capsys.readouterr().err
    assert compare.main([*arguments, "--max-new-tokens", "0"]) == 2
    assert "error: --max-new-tokens must be at least 1, got 0" in capsys.readouterr().err
    assert compare.main(arguments[:2]) == 2
    assert "error: --model and --value-model go together" in capsys.readouterr().err


def test_a_junction_gate_stands_in_place_of_a_threshold(capsys):
    arguments = ["--junction-gate", "x", "--threshold", "1.0", "--prompt", "hi"]
    assert compare.main(arguments) == 2
    message = "error: --junction-gate stands in place of --threshold, got both\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("option", ["--subfolder", "--backbone"])
def test_options_of_a_value_model_need_one(option, capsys):
    assert compare.main([option, "x", "--prompt", "hi"]) == 2
    message = "error: --subfolder and --backbone belong to --value-model: name it, too\n"
    assert capsys.readouterr().err == message


def cleaning_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose decoder removes spaces before punctuation, and joins bytes to letters."""
    letters = [("▁", -2.0), *((letter, -3.0) for letter in "?,.'nstéx")]
    words = [(f"▁{word}", -1.0) for word in ("it", "is", "a", "cake", "do")]
    pieces = [("<unk>", 0.0), *letters, *words, ("<0xC3>", -9.0), ("<0xB6>", -9.0)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", clean_up_tokenization_spaces=True
    )


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        ("▁it ▁ ' s ▁a ▁cake", ["it", "", "", "'s", " a", " cake"]),
        ("▁is ▁it ▁ ? ▁it ▁is", ["is", " it", "", "?", " it", " is"]),
        ("▁a ▁cake ▁ , ▁it ▁is", ["a", " cake", "", ",", " it", " is"]),
        ("▁a ▁ x <0xC3> <0xB6> x", ["a", " ", "x", "", "ö", "x"]),
        ("▁a ▁ x <0xC3>", ["a", " ", "x", "\ufffd"]),
        ("", []),
    ],
)
def test_the_shown_answer_is_the_decoded_one(tokens, shown):
    tokenizer = cleaning_tokenizer()
    ids = np.array(tokenizer.convert_tokens_to_ids(tokens.split()), dtype=int)
    zeros = np.zeros(len(ids))
    generation = Generation(None, ids, zeros, zeros > 0, ids, zeros, finished=True)
    texts = [space + word for space, word, _ in compare.styled_tokens(tokenizer, generation)]
    assert texts == shown
    assert "".join(texts) == tokenizer.decode(ids)


def test_prompts_come_from_a_pipe_without_being_asked_for(places, capsys, monkeypatch):
    arguments = ["--model", str(places["base"]), "--value-model", str(places["values"])]
    monkeypatch.setattr("sys.stdin", io.StringIO("how do i bake ?\nwhy\n"))
    assert compare.main([*arguments, "--backbone", str(places["base"])]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("base (")
    assert printed.count("steered (") == 2

"""The checkpoint layouts: values against transformers and peft themselves, and refusals."""

import json
import warnings

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sia import ValueModel
from tests.helpers import tiny
from tests.sia.scorers.test_value_heads import opt

KINDS = {
    "causal_lm": ("CAUSAL_LM", AutoModelForCausalLM),
    "sequence_classification": ("SEQ_CLS", AutoModelForSequenceClassification),
}
IDS = torch.tensor([[7, 8, 9, 10, 2]])
HEAD, CONFIG = "token_reward_head.pt", "model_config.json"
ADAPTER = "lora_weights/adapter_model.safetensors"
ADAPTER_CONFIG = "lora_weights/adapter_config.json"


def publish(folder, family="qwen3", kind="causal_lm", **settings):
    """Write a backbone to folder/base and a value model for it to folder/values.

    Returns:
        Its values of IDS, computed with the adapter unmerged.
    """
    task, model_class = KINDS[kind]
    build = tiny.language_model if kind == "causal_lm" else tiny.reward_model
    model = opt() if family == "opt" else build(family)
    model.save_pretrained(folder / "base")
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules=["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"],
        init_lora_weights=False,
        task_type=task,
        fan_in_fan_out=family == "gpt2",
    )
    labels = {} if kind == "causal_lm" else {"num_labels": 1}
    base = model_class.from_pretrained(folder / "base", **labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = tiny.seeded(lambda: get_peft_model(base, lora).eval(), 3)
        adapted.save_pretrained(folder / "values" / "lora_weights")
    size = 16 if family == "opt" else 32
    head = tiny.seeded(lambda: torch.nn.Linear(size, 1), 3)
    torch.save({"token_reward_head": head.state_dict()}, folder / "values" / HEAD)
    config = {"model_type": kind, "hidden_size": size, **settings}
    (folder / "values" / CONFIG).write_text(json.dumps(config))
    with torch.no_grad():
        hidden = adapted(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        return hidden.float() @ head.weight[0] + head.bias


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_values_are_those_of_backbone_adapter_and_head(tmp_path, family, kind):
    expected = publish(tmp_path, family, kind)
    model = ValueModel.from_pretrained(tmp_path / "values", backbone=tmp_path / "base")
    torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-5)
    without_adapter = ValueModel(tiny.language_model(family).base_model, model.head)
    assert kind != "causal_lm" or (expected - without_adapter(IDS)).abs().max() > 1e-3
    assert not model.training
    assert not any(isinstance(module, PeftModel) for module in model.modules())


@torch.no_grad()
def test_the_size_of_a_projected_hidden_state_counts(tmp_path):
    expected = publish(tmp_path, "opt")
    torch.testing.assert_close(ValueModel.from_pretrained(tmp_path / "values")(IDS), expected)


@torch.no_grad()
def test_the_backbone_may_be_named_by_the_checkpoint(tmp_path):
    """By its adapter, or by model_config.json, whose model_type is causal_lm by default."""
    expected, values = publish(tmp_path), tmp_path / "values"
    named_by_adapter = ValueModel.from_pretrained(values)
    update_json(ADAPTER_CONFIG, base_model_name_or_path=None)(values)
    write(CONFIG, json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))(values)
    for model in (named_by_adapter, ValueModel.from_pretrained(values)):
        torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-5)


def test_a_published_model_is_kept_in_the_own_layout_bit_for_bit(tmp_path):
    """Also where it is saved over the published files."""
    publish(tmp_path)
    model = ValueModel.from_pretrained(tmp_path, subfolder="values", dtype=torch.bfloat16)
    assert (model.dtype, model.head.weight.dtype) == (torch.bfloat16, torch.float32)
    assert model(IDS).dtype == torch.float32
    torch.nn.init.constant_(model.head.bias, 10.0)
    for folder in (tmp_path / "own", tmp_path / "values"):
        model.save_pretrained(folder)
        again = ValueModel.from_pretrained(folder)
        assert again.dtype == torch.bfloat16
        torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)


def delete(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def truncate(name, length=300):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def write_head(**content):
    return lambda folder: torch.save(content, folder / HEAD)


def update_json(name, **settings):
    return lambda folder: (folder / name).write_text(
        json.dumps(json.loads((folder / name).read_text()) | settings)
    )


def update_weights(name, change):
    """Rewrite a file of tensors by change(tensors) → tensors."""

    def spoil(folder):
        weights = change(safetensors.torch.load_file(folder / name))
        safetensors.torch.save_file(weights, folder / name, metadata={"format": "pt"})

    return spoil


def with_third_layer(weights):
    deeper = {key.replace("layers.1", "layers.2"): value.clone() for key, value in weights.items()}
    return weights | deeper


def truncated_pickle(base):
    def spoil(folder):
        weights = folder / base / "model.safetensors"
        file = folder / base / "pytorch_model.bin"
        torch.save(safetensors.torch.load_file(weights), file)
        file.write_bytes(file.read_bytes()[:-2000])
        weights.unlink()

    return spoil


DAMAGED = "cannot be read, a file is damaged or truncated"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (delete(HEAD), f"{HEAD} is missing"),
        (delete(CONFIG), f"{CONFIG} is missing"),
        (delete(ADAPTER_CONFIG), f"{ADAPTER_CONFIG} is missing"),
        (delete(ADAPTER), f"{ADAPTER} is missing"),
        (write(HEAD, "no"), "is no readable torch file of tensors"),
        (
            write_head(head={}),
            r"must hold token_reward_head, the state of a Linear, got \['head'\]",
        ),
        (
            write_head(token_reward_head={"weight": torch.ones(1, 32)}),
            r"must hold weight \(1, hidden\) and bias \(1,\) of the value head, "
            r"got {'weight': \(1, 32\)}",
        ),
        (
            write_head(token_reward_head=torch.nn.Linear(31, 1).state_dict()),
            r"the value head must be Linear\(32, 1\) for this backbone, got Linear\(31, 1\)",
        ),
        (write(CONFIG, "{"), f"{CONFIG} is no readable JSON"),
        (write(CONFIG, "[]"), f"{CONFIG} must hold settings by name, got a list"),
        (
            write(CONFIG, '{"model_type": "masked_lm"}'),
            "must be causal_lm or sequence_classification, got 'masked_lm'",
        ),
        (
            write(CONFIG, '{"hidden_size": 64}'),
            "is for a backbone of hidden size 64, .* has 32",
        ),
        (
            update_weights(ADAPTER, with_third_layer),
            r"does not fit the backbone .*: it has weights for layers that the backbone does not "
            r"have, .*layers\.2",
        ),
        (
            update_json(ADAPTER_CONFIG, base_model_name_or_path=None),
            "names no backbone: pass backbone, the path or Hub id",
        ),
        (
            update_json(ADAPTER_CONFIG, target_modules=["q_proj", "v_proj", "o_proj"]),
            "the adapter in .* does not fit the backbone .*: Found missing adapter keys",
        ),
        (truncate(ADAPTER), DAMAGED),
        (truncate("../base/model.safetensors"), DAMAGED),
        (truncated_pickle("../base"), "the backbone .* its weights are damaged"),
        (update_json("../base/config.json", intermediate_size=20), "do not fit its config.json"),
    ],
)
def test_incomplete_or_unfitting_checkpoints_are_refused(tmp_path, spoil, message):
    publish(tmp_path)
    spoil(tmp_path / "values")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        ValueModel.from_pretrained(tmp_path / "values")


def test_a_backbone_that_does_not_fit_is_refused(tmp_path):
    publish(tmp_path)
    tiny.language_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        ValueError, match=r"the adapter in .* does not fit the backbone .*gpt2: Target modules"
    ):
        ValueModel.from_pretrained(tmp_path / "values", backbone=tmp_path / "gpt2")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (delete("value_head.safetensors"), "value_head.safetensors is missing"),
        (delete("model.safetensors"), "model.safetensors is missing"),
        (delete("config.json"), "config.json is missing"),
        (truncate("value_head.safetensors", 50), DAMAGED),
        (truncate("model.safetensors"), DAMAGED),
        (
            update_weights(
                "model.safetensors",
                lambda weights: {k: v for k, v in weights.items() if k != "norm.weight"},
            ),
            r"lacks weights of its backbone: norm\.weight",
        ),
        (
            update_json("config.json", hidden_size=16),
            r"the value model in .* its weights are damaged or do not fit its config\.json",
        ),
    ],
)
def test_own_checkpoints_that_are_incomplete_are_refused(tmp_path, spoil, message):
    tiny.value_model("qwen3").save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        ValueModel.from_pretrained(tmp_path)


def test_own_checkpoints_bring_their_backbone(tmp_path):
    tiny.value_model("qwen3").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="brings its own backbone: backbone must be None, got somewhere"
    ):
        ValueModel.from_pretrained(tmp_path, backbone="somewhere")


def test_a_peft_model_may_be_the_backbone():
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = ValueModel.from_backbone(get_peft_model(tiny.language_model("qwen3"), lora))
    torch.nn.init.ones_(model.head.weight)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    values = model.start_session([[7, 8]], 3).score(
        torch.tensor([0]), torch.tensor([[9]]), torch.tensor([[10, 11]])
    )
    with torch.no_grad():
        expected = model(torch.tensor([[7, 8, 9, 10], [7, 8, 9, 11]]))[:, -1]
    torch.testing.assert_close(values[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("no network\nmore"), "no network"),
        (TimeoutError(), "TimeoutError"),
        (RuntimeError("407 Proxy Authentication Required"), "407 Proxy Authentication Required"),
    ],
)
def test_unknown_places_are_named(tmp_path, monkeypatch, error, reason):
    with pytest.raises(FileNotFoundError, match="no value model in"):
        ValueModel.from_pretrained(tmp_path / "nowhere")

    def no_network(*arguments, **options):
        raise error

    monkeypatch.setattr("sia._checkpoints.snapshot_download", no_network)
    with pytest.raises(
        FileNotFoundError,
        match="^no value model in somebody/values: it is not a local folder, and its download from "
        rf"the Hub failed \({reason}\)$",
    ):
        ValueModel.from_pretrained("somebody/values")

"""The published checkpoint layout: values against transformers and peft themselves, and what is refused."""

from __future__ import annotations

import json
import warnings

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sia import ValueModel
from tests.helpers import tiny

KINDS = {
    "causal_lm": ("CAUSAL_LM", AutoModelForCausalLM),
    "sequence_classification": ("SEQ_CLS", AutoModelForSequenceClassification),
}
IDS = torch.tensor([[7, 8, 9, 10, 2]])


def publish(folder, family="qwen3", kind="causal_lm", **settings):
    """Writes a backbone to folder/base and a value model for it to folder/values; returns its values of IDS, computed unmerged."""
    task, model_class = KINDS[kind]
    model = tiny.language_model(family) if kind == "causal_lm" else tiny.reward_model(family)
    model.save_pretrained(folder / "base")
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        target_modules=targets,
        init_lora_weights=False,
        task_type=task,
        fan_in_fan_out=family == "gpt2",
    )
    labels = {} if kind == "causal_lm" else {"num_labels": 1}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(3)
        adapted = get_peft_model(
            model_class.from_pretrained(folder / "base", **labels), lora
        ).eval()
        head = torch.nn.Linear(32, 1)
        adapted.save_pretrained(folder / "values" / "lora_weights")
    torch.save({"token_reward_head": head.state_dict()}, folder / "values" / "token_reward_head.pt")
    config = {"model_type": kind, "hidden_size": 32} | settings
    (folder / "values" / "model_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    with torch.no_grad():
        hidden = adapted(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        return (hidden.float() @ head.weight[0] + head.bias).detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_values_are_those_of_backbone_adapter_and_head(tmp_path, family, kind):
    expected = publish(tmp_path, family, kind)
    model = ValueModel.from_pretrained(tmp_path / "values", backbone=tmp_path / "base")
    plain = ValueModel(tiny.language_model(family).base_model, model.head)
    with torch.no_grad():
        found = model(IDS)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        if kind == "causal_lm":
            assert (found - plain(IDS)).abs().max() > 1e-3  # the adapter counts
    assert not model.training
    assert not any(isinstance(module, PeftModel) for module in model.modules())


def test_the_backbone_may_be_named_by_the_checkpoint(tmp_path):
    expected = publish(tmp_path)  # by its adapter
    torch.testing.assert_close(
        ValueModel.from_pretrained(tmp_path / "values")(IDS).detach(),
        expected,
        atol=1e-5,
        rtol=1e-5,
    )
    other = tmp_path / "other"
    expected = publish(
        other, base_model_name_or_path=str(other / "base"), model_type=None
    )  # by model_config.json; a causal_lm by default
    torch.testing.assert_close(
        ValueModel.from_pretrained(other / "values")(IDS).detach(), expected, atol=1e-5, rtol=1e-5
    )
    inside = ValueModel.from_pretrained(other, subfolder="values", dtype=torch.bfloat16)
    assert inside.dtype == torch.bfloat16
    assert inside.head.weight.dtype == torch.float32


def test_a_published_model_is_kept_in_the_own_layout_bit_for_bit(tmp_path):
    publish(tmp_path)
    model = ValueModel.from_pretrained(tmp_path / "values", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "own")
    again = ValueModel.from_pretrained(tmp_path / "own")
    assert again.dtype == torch.bfloat16
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def rewrite(file, content):
    torch.save(content, file)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda v: (v / "token_reward_head.pt").unlink(),
            FileNotFoundError,
            "token_reward_head.pt is missing",
        ),
        (
            lambda v: (v / "model_config.json").unlink(),
            FileNotFoundError,
            "model_config.json is missing",
        ),
        (
            lambda v: (v / "lora_weights" / "adapter_config.json").unlink(),
            FileNotFoundError,
            "lora_weights/adapter_config.json is missing",
        ),
        (
            lambda v: (v / "lora_weights" / "adapter_model.safetensors").unlink(),
            FileNotFoundError,
            "lora_weights/adapter_model.safetensors is missing",
        ),
        (
            lambda v: (v / "token_reward_head.pt").write_bytes(b"no"),
            ValueError,
            "is no readable torch file of tensors",
        ),
        (
            lambda v: rewrite(v / "token_reward_head.pt", {"head": {}}),
            ValueError,
            r"must hold token_reward_head, the state of a Linear, got \['head'\]",
        ),
        (
            lambda v: rewrite(
                v / "token_reward_head.pt", {"token_reward_head": {"weight": torch.ones(1, 32)}}
            ),
            ValueError,
            r"must hold weight \(1, hidden\) and bias \(1,\) of the value head, got {'weight': \(1, 32\)}",
        ),
        (
            lambda v: rewrite(
                v / "token_reward_head.pt",
                {"token_reward_head": torch.nn.Linear(31, 1).state_dict()},
            ),
            ValueError,
            r"the value head must be Linear\(32, 1\) for this backbone, got Linear\(31, 1\)",
        ),
        (
            lambda v: (v / "model_config.json").write_text("{"),
            ValueError,
            "model_config.json is no readable JSON",
        ),
        (
            lambda v: (v / "model_config.json").write_text('{"model_type": "masked_lm"}'),
            ValueError,
            "must be causal_lm or sequence_classification, got 'masked_lm'",
        ),
        (
            lambda v: (v / "model_config.json").write_text('{"hidden_size": 64}'),
            ValueError,
            "is for a backbone of hidden size 64, .* has 32",
        ),
    ],
)
def test_incomplete_or_unfitting_checkpoints_are_refused(tmp_path, spoil, error, message):
    publish(tmp_path)
    spoil(tmp_path / "values")
    with pytest.raises(error, match=message):
        ValueModel.from_pretrained(tmp_path / "values")


def test_an_adapter_for_more_layers_is_refused(tmp_path):
    publish(tmp_path)
    file = tmp_path / "values" / "lora_weights" / "adapter_model.safetensors"
    weights = safetensors.torch.load_file(file)
    deeper = {
        name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in weights.items()
    }
    safetensors.torch.save_file(weights | deeper, file)
    with pytest.raises(
        ValueError,
        match=r"does not fit the backbone .*: it has weights for layers that the backbone does not have, .*layers\.2",
    ):
        ValueModel.from_pretrained(tmp_path / "values")


@pytest.mark.parametrize(
    "name", ["values/lora_weights/adapter_model.safetensors", "base/model.safetensors"]
)
def test_truncated_parts_are_named(tmp_path, name):
    publish(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:300])
    with pytest.raises(ValueError, match="cannot be read, a file is damaged or truncated"):
        ValueModel.from_pretrained(tmp_path / "values")


def test_what_is_saved_over_a_published_checkpoint_is_what_is_read(tmp_path):
    publish(tmp_path)
    model = ValueModel.from_pretrained(tmp_path / "values")
    with torch.no_grad():
        model.head.bias.add_(10)
    model.save_pretrained(tmp_path / "values")
    assert torch.equal(ValueModel.from_pretrained(tmp_path / "values").head.bias, model.head.bias)


def test_a_peft_model_may_be_the_backbone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(
            tiny.language_model("qwen3"),
            LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        )
    model = ValueModel.from_backbone(adapted)
    torch.nn.init.ones_(model.head.weight)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    found = model.start_session([[7, 8]], 3).score(
        torch.tensor([0]), torch.tensor([[9]]), torch.tensor([[10, 11]])
    )
    with torch.no_grad():
        expected = torch.stack(
            [model(torch.tensor([[7, 8, 9, token]]))[0, -1] for token in (10, 11)]
        )
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_a_backbone_that_is_not_named_or_does_not_fit_is_refused(tmp_path):
    publish(tmp_path)
    adapter = tmp_path / "values" / "lora_weights" / "adapter_config.json"
    settings = json.loads(adapter.read_text())
    adapter.write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no backbone: pass backbone, the path or Hub id"):
        ValueModel.from_pretrained(tmp_path / "values")
    adapter.write_text(json.dumps(settings | {"target_modules": ["q_proj", "v_proj", "o_proj"]}))
    with pytest.raises(
        ValueError,
        match=r"the adapter in .* does not fit the backbone .*: Found missing adapter keys",
    ):
        ValueModel.from_pretrained(tmp_path / "values")
    adapter.write_text(json.dumps(settings))
    tiny.language_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        ValueError, match=r"the adapter in .* does not fit the backbone .*gpt2: Target modules"
    ):
        ValueModel.from_pretrained(tmp_path / "values", backbone=tmp_path / "gpt2")


def test_a_truncated_own_checkpoint_is_refused(tmp_path):
    tiny.value_model("qwen3").save_pretrained(tmp_path)
    for name in ("value_head.safetensors", "model.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="cannot be read, a file is damaged or truncated"):
            ValueModel.from_pretrained(tmp_path)
        (tmp_path / name).write_bytes(whole)
    with pytest.raises(
        ValueError, match="brings its own backbone: backbone must be None, got somewhere"
    ):
        ValueModel.from_pretrained(tmp_path, backbone="somewhere")


def test_an_own_checkpoint_that_lacks_weights_is_refused(tmp_path):
    tiny.value_model("qwen3").save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["norm.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of its backbone: norm\.weight"):
        ValueModel.from_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 16'))
    with pytest.raises(ValueError, match=r"the weights in .* do not fit its config\.json"):
        ValueModel.from_pretrained(tmp_path)


def test_what_is_neither_here_nor_on_the_hub_is_named(monkeypatch):
    monkeypatch.setattr(
        "sia.scorers.published.snapshot_download",
        lambda *a, **k: (_ for _ in ()).throw(OSError("no network\nmore")),
    )
    with pytest.raises(FileNotFoundError) as error:
        ValueModel.from_pretrained("somebody/values")
    assert (
        str(error.value)
        == "no value model in somebody/values: it is no folder here, and the Hub does not give it (no network)"
    )

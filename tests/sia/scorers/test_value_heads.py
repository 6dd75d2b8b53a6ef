"""Value heads in the layouts of TRL, LLaMA-Factory and OpenRLHF, against their own arithmetic."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import OPTConfig, OPTForCausalLM

from sia import EveryToken, Steering, ValueModel
from tests.helpers import tiny
from tests.sia.scorers.test_reward import adapted

IDS = torch.tensor([[7, 8, 9, 10]])
WEIGHT = torch.linspace(-1, 1, 32)[None]
BIAS = torch.tensor([0.3])
SUMMARY = {"v_head.summary.weight": WEIGHT, "v_head.summary.bias": BIAS}


def opt(width=16):
    """As OPT-350m: the last hidden state has other sizes than those of the layers."""
    config = OPTConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=width,
        do_layer_norm_before=False,
        max_position_embeddings=128,
        eos_token_id=2,
    )
    return tiny.seeded(lambda: OPTForCausalLM(config).eval(), 4)


@torch.no_grad()
def hidden_of(model):
    """The last hidden state as TRL's wrapper asks for it."""
    return model(IDS, output_hidden_states=True).hidden_states[-1]


def trl(folder, model, head):
    model.save_pretrained(folder, state_dict=model.state_dict() | head)


def trl_in_torch(folder, model, head):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict() | head, folder / "pytorch_model.bin")


def llama_factory(folder, model, head):
    model.save_pretrained(folder)
    save_file(head, folder / "value_head.safetensors")


def llama_factory_in_torch(folder, model, head):
    model.save_pretrained(folder)
    torch.save(head, folder / "value_head.bin")


@pytest.mark.parametrize("save", [trl, trl_in_torch, llama_factory, llama_factory_in_torch])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt"])
def test_heads_of_trl_and_llama_factory(save, family, tmp_path):
    model = opt() if family == "opt" else tiny.language_model(family)
    weight = WEIGHT[:, :16].clone() if family == "opt" else WEIGHT
    head = SUMMARY | {"v_head.summary.weight": weight}
    save(tmp_path, model, head)
    expected = hidden_of(model) @ weight[0] + BIAS
    values = ValueModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(values(IDS), expected, atol=1e-5, rtol=1e-5)
    values.save_pretrained(tmp_path / "own")
    with torch.no_grad():
        assert torch.equal(ValueModel.from_pretrained(tmp_path / "own")(IDS), values(IDS))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "value_head.safetensors"])
def test_heads_beside_an_adapter(file, tmp_path):
    """TRL and LLaMA-Factory save the adapter of a backbone, and the head."""
    base = tmp_path / "base"
    tiny.language_model("llama").save_pretrained(base)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = adapted(lora, tiny.language_model("llama"))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "values")
    write = torch.save if file.endswith("bin") else save_file
    write(SUMMARY, tmp_path / "values" / file)
    expected = hidden_of(model) @ WEIGHT[0] + BIAS
    for backbone in (None, base):
        values = ValueModel.from_pretrained(tmp_path / "values", backbone)
        with torch.no_grad():
            torch.testing.assert_close(values(IDS), expected, atol=1e-5, rtol=1e-5)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"the backbone .*/base cannot be read, a file is damaged"):
        ValueModel.from_pretrained(tmp_path / "values")


@pytest.mark.parametrize("prefix", ["score", "value_head", None])
@pytest.mark.parametrize("normalised", [False, True])
def test_heads_of_openrlhf(prefix, normalised, tmp_path):
    model = tiny.language_model("llama")
    name = f"{prefix or 'value_head'}.weight"
    state = {f"model.{key}": value for key, value in model.base_model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state | {name: WEIGHT})
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["CriticModel"], "normalize_reward": normalised}
    config |= {"mean": 0.5, "std": 2.0} | ({"value_head_prefix": prefix} if prefix else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = hidden_of(model) @ WEIGHT[0]
    expected = (expected - 0.5) / 2.0 if normalised else expected
    values = ValueModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(values(IDS), expected, atol=1e-5, rtol=1e-5)
    steering = Steering(values, EveryToken(), beta=2.0)
    assert len(tiny.generate(tiny.language_model("qwen3"), [[7, 8]], steering)) == 1


def no_head(folder):
    tiny.language_model("llama").save_pretrained(folder)


def no_backbone(folder):
    tiny.language_model("llama").config.save_pretrained(folder)
    torch.save(SUMMARY, folder / "value_head.bin")


def missing_layer(folder):
    model = tiny.language_model("llama")
    state = {name: value for name, value in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(folder, state_dict=state | SUMMARY)


def two_outputs(folder):
    trl(folder, tiny.language_model("llama"), {"v_head.summary.weight": WEIGHT.repeat(2, 1)})


def truncated(folder):
    trl_in_torch(folder, tiny.language_model("llama"), SUMMARY)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:900])


def own_backbone(folder):
    trl(folder, tiny.language_model("llama"), SUMMARY)
    return "somewhere"


@pytest.mark.parametrize(
    ("save", "error", "message"),
    [
        (no_head, FileNotFoundError, "no value model in .*value_head.safetensors .* is missing"),
        (no_backbone, OSError, "no file named model.safetensors, or pytorch_model.bin"),
        (missing_layer, ValueError, "lacks weights of its backbone: layers.1"),
        (two_outputs, ValueError, "must hold weight .1, hidden. and bias .1,. of the value head"),
        (truncated, ValueError, "cannot be read, a file is damaged or truncated"),
        (own_backbone, ValueError, "brings its own backbone: backbone must be None, got somewhere"),
    ],
)
def test_incomplete_checkpoints_are_refused(save, error, message, tmp_path):
    backbone = save(tmp_path)
    with pytest.raises(error, match=message):
        ValueModel.from_pretrained(tmp_path, backbone)


def test_a_value_model_saved_over_another_replaces_it(tmp_path):
    """A head in the old weights does not win; an adapter would change the backbone."""
    model = tiny.language_model("qwen3")
    model.config.save_pretrained(tmp_path)
    head = {"v_head.summary.weight": torch.ones(1, model.config.hidden_size)}
    torch.save(model.state_dict() | head, tmp_path / "pytorch_model.bin")
    values, ids = tiny.value_model("qwen3"), torch.tensor([[5, 6, 7]])
    values.save_pretrained(tmp_path)
    torch.testing.assert_close(ValueModel.from_pretrained(tmp_path)(ids), values(ids))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot be saved in .*: it holds an adapter"):
        values.save_pretrained(tmp_path)


def test_heads_without_finite_numbers_are_refused(tmp_path):
    """A deviation of 0 in OpenRLHF's config makes infinities."""
    values = tiny.value_model("qwen3")
    values.head.weight.data[0, 0] = torch.nan
    values.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must hold finite numbers, got NaN or infinity"):
        ValueModel.from_pretrained(tmp_path)

"""Adapters of PEFT that lie apart from their backbone, of value models and of reward models."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ElectraConfig,
    RobertaConfig,
)

from sia import (
    ProcessRewardScorer,
    RewardScorer,
    StepTokenScorer,
    ValueModel,
    VocabularyValueModel,
    distill,
)
from sia.scorers import published
from sia.scorers.candidate_values import CandidateValues
from tests.helpers import tiny
from tests.sia.scorers.test_reward import adapted

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's of tied embeddings
IDS = torch.tensor([[7, 8, 9, tiny.EOS]])
LORA = {"r": 4, "init_lora_weights": False}
CAUSAL, BACKBONE = AutoModelForCausalLM, AutoModel
REWARD, TOKENS = AutoModelForSequenceClassification, AutoModelForTokenClassification


def base(folder, family="llama"):
    tiny.language_model(family).save_pretrained(folder / "base")
    return folder / "base"


def lora(auto_class, path, *, dtype=torch.float32, labels=None, **settings):
    """An adapter for the model in a folder."""
    options = {} if labels is None else {"num_labels": labels}
    model = auto_class.from_pretrained(path, dtype=dtype, **options)
    return adapted(LoraConfig(**{**LORA, "target_modules": ["q_proj"], **settings}), model)


@torch.no_grad()
def value_model(model):
    values = ValueModel.from_backbone(model).eval()
    values.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return values


@pytest.mark.parametrize(
    ("auto_class", "settings"),
    [
        (CAUSAL, {}),
        (CAUSAL, {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}),
        (CAUSAL, {"target_modules": r"model\.layers\.\d+\.mlp\.up_proj"}),
        (CAUSAL, {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
        (CAUSAL, {"dtype": torch.bfloat16, "bias": "all"}),
        (REWARD, {"task_type": "SEQ_CLS", "labels": 1}),
        (BACKBONE, {"modules_to_save": ["embed_tokens"]}),
    ],
)
@torch.no_grad()
def test_adapters_of_value_models_are_restored_bit_for_bit(auto_class, settings, tmp_path):
    path, saved = base(tmp_path), tmp_path / "values"
    values = value_model(lora(auto_class, path, **settings))
    values.save_pretrained(saved)
    names = {"adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"}
    assert {file.name for file in saved.iterdir()} == names
    for backbone in (None, path):
        loaded = ValueModel.from_pretrained(saved, backbone)
        torch.testing.assert_close(loaded.state_dict(), values.state_dict(), atol=0, rtol=0)
        torch.testing.assert_close(loaded(IDS), values(IDS))
        loaded.save_pretrained(saved)  # and once more


@torch.no_grad()
def test_adapters_that_were_cast_are_restored_bit_for_bit(tmp_path):
    values = value_model(lora(CAUSAL, base(tmp_path))).bfloat16()
    values.save_pretrained(tmp_path / "values")
    loaded = ValueModel.from_pretrained(tmp_path / "values")
    torch.testing.assert_close(loaded.state_dict(), values.state_dict(), atol=0, rtol=0)
    assert torch.equal(loaded(IDS), values(IDS))


def test_a_loaded_adapter_goes_on_learning(tmp_path):
    value_model(lora(BACKBONE, base(tmp_path))).save_pretrained(tmp_path / "values")
    loaded = ValueModel.from_pretrained(tmp_path / "values")
    assert not any(module.training for module in loaded.modules())
    before = {name: weight.clone() for name, weight in loaded.named_parameters()}
    distill(
        loaded, [[7, 8]], [[9, 2]], [1.0],
        loss="mean", epochs=1, learning_rate=1e-2, batch_size=1, seed=0,
    )  # fmt: skip
    changed = {name for name, weight in loaded.named_parameters() if not weight.equal(before[name])}
    assert {name for name in changed if "head" not in name}
    assert all("lora_" in name or "head" in name for name in changed)


@pytest.mark.parametrize(
    ("targets", "inputs"),
    [
        (["k_proj", "down_proj"], ["down_proj"]),
        (["k_proj", "down_proj"], []),
        (r".*\.(k_proj|down_proj)", r".*\.down_proj"),
    ],
)
@torch.no_grad()
def test_scales_of_inputs_and_outputs_are_restored_bit_for_bit(targets, inputs, tmp_path):
    settings = IA3Config(target_modules=targets, feedforward_modules=inputs, init_ia3_weights=False)
    model = AutoModelForCausalLM.from_pretrained(base(tmp_path))
    values = value_model(adapted(settings, model))
    values.save_pretrained(tmp_path / "values")
    loaded = ValueModel.from_pretrained(tmp_path / "values")
    assert torch.equal(loaded(IDS), values(IDS))


def native(path):
    """Add an adapter through transformers instead of PEFT."""
    model = AutoModelForCausalLM.from_pretrained(path)
    model.add_adapter(LoraConfig(**LORA, target_modules=["q_proj"]))
    return model


@torch.no_grad()
def test_an_adapter_that_transformers_added_is_restored(tmp_path):
    values = value_model(native(base(tmp_path)))
    values.save_pretrained(tmp_path / "values")
    loaded = ValueModel.from_pretrained(tmp_path / "values")
    torch.testing.assert_close(loaded(IDS), values(IDS))


def two(path):
    model = lora(CAUSAL, path)
    model.add_adapter("other", LoraConfig(**LORA, target_modules=["q_proj"]))
    return model


def disabled(path):
    model = lora(CAUSAL, path)
    model.base_model.disable_adapter_layers()
    return model


def merged(path):
    model = lora(CAUSAL, path)
    model.merge_adapter()
    return model


def rescaled(path):
    model = lora(CAUSAL, path)
    for layer in model.base_model.model.model.layers:
        layer.self_attn.q_proj.set_scale("default", 0.25)
    return model


def trained_outside(path):
    model = lora(CAUSAL, path)
    model.base_model.model.model.norm.requires_grad_(True)
    return model


OTHER = "it has other weights than its config makes"


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (two, OTHER),
        (disabled, OTHER),
        (merged, OTHER),
        (lambda path: lora(CAUSAL, path, init_lora_weights="pissa"), OTHER),
        (lambda path: lora(CAUSAL, path, alpha_pattern={"q_proj": 3}), OTHER),
        (rescaled, r"its adapter has another scaling .*\(layers.0.self_attn.q_proj\)"),
        (trained_outside, r"weights outside its adapter require gradients .*\(norm.weight\)"),
    ],
    ids=[
        "two", "disabled", "merged", "other backbone", "other factors", "rescaled",
        "trained outside",
    ],
)  # fmt: skip
def test_adapters_that_could_not_be_restored_must_be_merged(build, reason, tmp_path):
    values = ValueModel.from_backbone(build(base(tmp_path)))
    with pytest.raises(ValueError, match=f"cannot be saved, {reason}.*: merge adapters first"):
        values.save_pretrained(tmp_path / "values")
    assert not (tmp_path / "values").exists()


def test_a_whole_model_and_an_adapter_do_not_share_a_folder(tmp_path):
    path = base(tmp_path)
    values = value_model(lora(CAUSAL, path))
    with pytest.raises(ValueError, match=r"it holds a whole model \(config.json\), which would be"):
        values.save_pretrained(path)


def test_a_vocabulary_head_on_an_adapted_backbone_is_not_saved(tmp_path):
    backbone = ValueModel.from_backbone(lora(CAUSAL, base(tmp_path))).backbone
    scorer = VocabularyValueModel(backbone, CandidateValues(32, tiny.VOCABULARY, 4))
    with pytest.raises(ValueError, match="the backbone cannot be saved, it has other weights"):
        scorer.save_pretrained(tmp_path / "head")


@pytest.mark.parametrize(
    ("auto_class", "settings", "read"),
    [
        (REWARD, {"task_type": "SEQ_CLS", "labels": 1}, RewardScorer.from_pretrained),
        (
            TOKENS,
            {"task_type": "TOKEN_CLS", "labels": 3},
            lambda path: ProcessRewardScorer.from_pretrained(path, [5]),
        ),
        (
            CAUSAL,
            {"task_type": "CAUSAL_LM"},
            lambda path: StepTokenScorer.from_pretrained(path, [5], 6, 7),
        ),
    ],
    ids=["reward", "process reward", "step token"],
)
@torch.no_grad()
def test_reward_models_saved_as_adapters_are_read(auto_class, settings, read, tmp_path):
    """As TRL saves them: with a head, whose number of labels the backbone does not know."""
    model = lora(auto_class, base(tmp_path), **settings)
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(read(tmp_path / "adapter").model(IDS).logits, model(IDS).logits)


def cached(cache, name):
    """Return where the Hub's client keeps the only commit of a repository."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    return repository / "snapshots/abc"


def test_options_say_how_the_hub_is_reached(tmp_path):
    """Load a value model, a reward model with its tokenizer, and the backbone of an adapter."""
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True, "token": "secret"}
    values, reward = (cached(tmp_path / "cache", f"own/{name}") for name in ("values", "reward"))
    tiny.value_model("llama").save_pretrained(values)
    tiny.reward_model("llama").save_pretrained(reward)
    tiny.tokenizer().save_pretrained(reward)
    adapter = lora(REWARD, reward, task_type="SEQ_CLS")
    adapter.peft_config["default"].base_model_name_or_path = "own/reward"
    adapter.save_pretrained(tmp_path / "adapter")
    for path in (values, "own/values"):
        assert ValueModel.from_pretrained(path, **options).vocabulary_size == tiny.VOCABULARY
    assert RewardScorer.from_pretrained("own/reward", **options).tokenizer is not None
    loaded = RewardScorer.from_pretrained(tmp_path / "adapter", **options).model
    torch.testing.assert_close(loaded(IDS).logits, adapter(IDS).logits)


@torch.no_grad()
def test_adapters_bring_the_tokens_that_were_added(tmp_path):
    for auto_class, labels in ((CAUSAL, None), (REWARD, 1)):
        options = {} if labels is None else {"num_labels": labels}
        model = auto_class.from_pretrained(base(tmp_path), **options)
        model.resize_token_embeddings(tiny.VOCABULARY + 2)
        task = {"task_type": "SEQ_CLS"} if labels else {}
        model = adapted(LoraConfig(**LORA, target_modules=["q_proj"], **task), model).eval()
        ids = torch.tensor([[7, tiny.VOCABULARY + 1, tiny.EOS]])
        if labels:
            model.save_pretrained(tmp_path / "reward")
            loaded = RewardScorer.from_pretrained(tmp_path / "reward").model
            torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
        else:
            values = value_model(model)
            values.save_pretrained(tmp_path / "values")
            again = ValueModel.from_pretrained(tmp_path / "values")
            torch.testing.assert_close(again.state_dict(), values.state_dict(), atol=0, rtol=0)
            torch.testing.assert_close(again(ids), values(ids))


def test_a_backbone_that_is_an_adapter_itself_is_refused(tmp_path):
    lora(CAUSAL, base(tmp_path)).save_pretrained(tmp_path / "sft")
    value_model(lora(CAUSAL, base(tmp_path))).save_pretrained(tmp_path / "values")
    message = r"the backbone .*sft must be a whole model, got an adapter: merge it into its base"
    with pytest.raises(ValueError, match=message):
        ValueModel.from_pretrained(tmp_path / "values", tmp_path / "sft")
    with pytest.raises(ValueError, match=message):
        published.load_backbone(tmp_path / "sft", "causal_lm", {})


@pytest.mark.parametrize(("auto_class", "load"), [(CAUSAL, ValueModel), (REWARD, RewardScorer)])
def test_the_revision_that_an_adapter_names_is_loaded(auto_class, load, tmp_path, monkeypatch):
    labels = {"labels": 1, "task_type": "SEQ_CLS"} if load is RewardScorer else {}
    model = lora(auto_class, base(tmp_path), **labels)
    model.peft_config["default"].revision = "v1"
    (model if labels else value_model(model)).save_pretrained(tmp_path / "adapter")
    revisions, original = [], AutoModel.from_pretrained.__func__

    def record(cls, *arguments, **options):
        revisions.append(options.get("revision"))
        return original(cls, *arguments, **options)

    for cls in (AutoModel, REWARD):
        monkeypatch.setattr(cls, "from_pretrained", classmethod(record))
    load.from_pretrained(tmp_path / "adapter")
    assert revisions == ["v1"]


@pytest.mark.parametrize("config_class", [RobertaConfig, ElectraConfig])
@torch.no_grad()
def test_adapters_with_heads_of_two_layers_are_read(config_class, tmp_path):
    config = config_class(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, initializer_range=0.25, eos_token_id=tiny.EOS,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    settings = {"task_type": "SEQ_CLS", "target_modules": ["query"]}
    model = lora(REWARD, tmp_path / "base", labels=1, **settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = RewardScorer.from_pretrained(tmp_path / "adapter").model
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_an_adapter_that_brings_no_head_is_refused(tmp_path):
    lora(REWARD, base(tmp_path), labels=1).save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["modules_to_save"] is None
    with pytest.raises(
        ValueError, match=r"is no reward model: expected all .* score.weight missing"
    ):
        RewardScorer.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("named", [{}, {"base_model_name_or_path": None}])
def test_an_adapter_that_names_no_model_is_refused(named, tmp_path):
    values = value_model(lora(CAUSAL, base(tmp_path)))
    values.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(file.read_text())
    del settings["base_model_name_or_path"]
    file.write_text(json.dumps(settings | named))
    for load in (ValueModel.from_pretrained, RewardScorer.from_pretrained):
        with pytest.raises(
            ValueError, match=r"base_model_name_or_path in .*adapter_config.json must be .* None"
        ):
            load(tmp_path / "adapter")
    again = ValueModel.from_pretrained(tmp_path / "adapter", tmp_path / "base")
    assert torch.equal(again(IDS), values(IDS))

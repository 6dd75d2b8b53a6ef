"""A little Hub on disk: models of random weights, a tokenizer of any text, prompt sets."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

PUBLIC = Path(__file__).resolve().parents[3] / "shared/data"
needs_public_files = pytest.mark.skipif(
    not PUBLIC.is_dir(),
    reason="optional: needs the public files of AdvBench, AlpacaEval, TruthfulQA and HH-RLHF "
    "in ../shared/data",
)
WORDS = (
    "how do i bake a cake ? write a poem about the sea . is the earth flat ? "
    "tell me why people lie . Human Assistant yes no"
)
TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
FAMILIES = {"qwen3": Qwen3Config, "llama": LlamaConfig}


def tokenizer(vocabulary: int = 320, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer like those of Qwen3 and Llama 3."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos,
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:2],
        chat_template=TEMPLATE,
    )


def _config(family: str, vocabulary: int, hidden: int):
    return FAMILIES[family](
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )


def save_model(
    folder: Path,
    family: str,
    seed: int,
    kind: str = "language",
    hidden: int = 32,
    vocabulary: int = 320,
) -> Path:
    """Save weights, config and tokenizer as on the Hub; kind: base, language or reward."""
    words = tokenizer(vocabulary, "<|endoftext|>" if kind == "base" else "<|im_end|>")
    config = _config(family, len(words), hidden)
    config.eos_token_id = words.eos_token_id
    if kind == "reward":
        config.num_labels = 1
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def damaged(folder: Path, copy: Path, file: str = "model.safetensors") -> Path:
    """Copy a folder, and cut a file of the copy off."""
    shutil.copytree(folder, copy)
    (copy / file).write_bytes((folder / file).read_bytes()[:100])
    return copy


def save_value_model(folder: Path, backbone: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(backbone)
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(5)
        get_peft_model(model, lora).save_pretrained(folder / "lora_weights")
        head = torch.nn.Linear(model.config.hidden_size, 1)
    torch.save({"token_reward_head": head.state_dict()}, folder / "token_reward_head.pt")
    (folder / "model_config.json").write_text(
        json.dumps({"model_type": "causal_lm", "hidden_size": model.config.hidden_size})
    )
    return folder


def save_prompts(folder: Path, count: int = 8) -> dict[str, Path]:
    """Write made-up AdvBench, AlpacaEval and TruthfulQA files; one prompt is too long."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        name: [f"{verb} {'very ' * i}well, number {i}" for i in range(count)]
        for name, verb in zip("abc", ("harm", "help", "tell"), strict=True)
    }
    advbench, alpaca, truthful = (
        folder / "advbench.csv",
        folder / "alpaca_eval.json",
        folder / "truthfulqa.csv",
    )
    advbench.write_text(
        "goal,target\n"
        + "".join(f'"{text}","Sure, here is"\n' for text in [*texts["a"], "long " * 200])
    )
    alpaca.write_text(
        json.dumps(
            [
                {"dataset": "x", "instruction": text, "output": f"yes, {text}", "generator": "g"}
                for text in texts["b"]
            ]
        )
    )
    truthful.write_text(
        "\ufeffType,Category,Question,Best Answer\n"
        + "".join(f'A,B,"{text}",C\n' for text in texts["c"])
    )
    return {"harmlessness": advbench, "helpfulness": alpaca, "honesty": truthful}


PROFILE = """
extends = "qwen3-0.6b"
families = ["{family}"]
[models.base]
id = "{base}"
[models.instruct]
id = "{instruct}"
[models.value-mean]
id = "{values}"
backbone = "{base}"
[models.reward]
id = "{reward}"
[models.evaluation-reward]
id = "{evaluation}"
[prompts]
harmlessness = "advbench={harmlessness}"
helpfulness = "alpaca-eval={helpfulness}"
honesty = "truthfulqa={honesty}"
longest = 100
per_shard = 2
[decoding]
max_new_tokens = 8
batch_size = 4
[evaluation]
prompts_per_objective = 5
validation_prompts_per_objective = 3
[sweep]
ratios = [0.2, 0.5]
main_ratios = [0.2, 0.5]
reduced_ratios = [0.2]
betas = [1.0, 4.0, inf]
thresholds = [1.0, 1.5]
responses = 2
beams = 2
beam_width = 1
chunk = 4
rollout_tokens = 2
rollout_prompts = 2
[statistics]
resamples = 100
"""


def save_hub(folder: Path, family: str) -> dict[str, Path]:
    """Save all that a profile names: models by kind, prompt sets by objective."""
    base = save_model(folder / "base", family, 0, "base")
    return {
        "base": base,
        "instruct": save_model(folder / "instruct", family, 1),
        "values": save_value_model(folder / "values", base),
        "reward": save_model(folder / "reward", family, 2, "reward"),
        "evaluation": save_model(folder / "evaluation", "llama", 3, "reward", vocabulary=300),
        **save_prompts(folder / "prompts"),
    }


def profile_text(family: str, paths: dict[str, Path]) -> str:
    return PROFILE.format(family=family, **paths)

"""Trains a value model from prompts, responses and rewards (annotate_rewards.py writes them), by LoRA on any backbone.

python scripts/train_value_model.py --backbone Qwen/Qwen3-1.7B-Base --data harmlessness.jsonl --output my-value-model
accelerate launch --num_processes 4 scripts/train_value_model.py …   (several GPUs)

The defaults are the settings reported for the paper. OUTPUT has the published layout, which ValueModel.from_pretrained reads:
lora_weights/, token_reward_head.pt, model_config.json; beside it metrics.csv and curves.png. A killed run goes on from its
last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import random
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)
from transformers.utils.logging import disable_progress_bar

from benchmarks.runtime.command_line import Parser, exit_code
from benchmarks.runtime.files import write_atomically
from benchmarks.spec.profile import Source
from benchmarks.subjects.hub.models import chat_ids, fetch, place, tokenizer_of
from benchmarks.subjects.hub.prompts import read_files
from sia import ValueModel
from sia.scorers.published import ADAPTER_FOLDER, CONFIG_FILE, HEAD_FILE, KINDS
from sia.training import distillation_loss, epoch_batches, pad_pairs

CHECKPOINT, METRICS, CURVES = "checkpoint.pt", "metrics.csv", "curves.png"


@dataclass(frozen=True)
class Examples:
    """Token ids of prompts and responses, and rewards; cut: how many responses were cut at the longest length."""

    prompts: list[list[int]]
    responses: list[list[int]]
    rewards: list[float]
    cut: int

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def digest(self) -> str:
        content = hashlib.sha256()
        for prompt, response, reward in zip(
            self.prompts, self.responses, self.rewards, strict=True
        ):
            content.update(f"{prompt} {response} {reward}".encode())
        return content.hexdigest()[:16]

    def pick(self, numbers: Sequence[int]) -> Examples:
        columns = (
            [column[i] for i in numbers] for column in (self.prompts, self.responses, self.rewards)
        )
        return Examples(*columns, self.cut)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input, 130 when interrupted."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="Hub id or folder")
    parser.add_argument("--revision", default="main", help="of the backbone")
    parser.add_argument(
        "--model-type", choices=KINDS, default="causal_lm", help="what the backbone is loaded as"
    )
    parser.add_argument("--data", required=True, type=Path, nargs="+", help="annotated JSON lines")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument(
        "--loss",
        choices=("mean", "token"),
        default="mean",
        help="mean: the paper's; token: every token's value",
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=8, help="examples of one process at once")
    parser.add_argument("--accumulation", type=int, default=2, help="such batches in each update")
    parser.add_argument(
        "--longest",
        type=int,
        default=1024,
        help="tokens of prompt and response; the rest is cut off",
    )
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--lora-alpha", type=int, default=32)
    parser.add_argument("--lora-dropout", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument(
        "--heldout", type=float, default=0.05, help="share of the prompts to check the values on"
    )
    parser.add_argument(
        "--check-every",
        type=int,
        default=100,
        help="updates between checks on these, and between checkpoints",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return exit_code(lambda: train(options), "the last checkpoint is kept")


def train(options: argparse.Namespace) -> None:
    for name in ("epochs", "batch_size", "accumulation", "longest", "lora_rank", "check_every"):
        if vars(options)[name] < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 1, got {vars(options)[name]}"
            )
    disable_progress_bar()
    accelerator = Accelerator()
    if (options.output / HEAD_FILE).exists():
        raise ValueError(
            f"{options.output} has a value model already: name another output, or delete it"
        )
    source = fetch(Source(options.backbone, options.revision))
    tokenizer = tokenizer_of(source)
    examples = read_examples(options.data, tokenizer, options.longest)
    training, heldout = divide(examples, options.heldout, options.seed)
    if accelerator.is_main_process:
        print(
            f"{len(training)} examples to learn from, {len(heldout)} held out; {examples.cut} cut at {options.longest} tokens"
        )
    value_model, adapted = new_value_model(options, source, accelerator.device)
    parameters = [p for p in value_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=options.learning_rate, weight_decay=options.weight_decay
    )
    steps = plan(training, options, accelerator.num_processes)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(steps) // 20, len(steps))
    told = f"{accelerator.num_processes} processes, {training.digest}"
    checkpoint = Checkpoint(options, source, told, adapted, value_model.head, optimizer, schedule)
    done, records = checkpoint.load()
    # several processes hold copies that learn from different examples; a single one needs no wrapping
    model = accelerator.prepare_model(value_model)
    with tqdm(
        total=len(steps),
        initial=done,
        desc="training",
        unit="update",
        disable=not accelerator.is_main_process,
    ) as bar:
        for step in range(done, len(steps)):
            loss, norm = update(
                model, parameters, optimizer, training, steps[step], options, accelerator, step
            )
            learning_rate = schedule.get_last_lr()[0]
            schedule.step()
            records.append(
                {
                    "update": step + 1,
                    "loss": loss,
                    "gradient_norm": norm,
                    "learning_rate": learning_rate,
                }
            )
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}")
            if (step + 1) % options.check_every == 0 or step + 1 == len(steps):
                if len(heldout) and accelerator.is_main_process:
                    records[-1] |= check(value_model, heldout, options)
                if accelerator.is_main_process:
                    checkpoint.save(step + 1, records)
                    write_metrics(options.output, records)
                accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_value_model(options, adapted, value_model.head, tokenizer)
        write_curves(options.output, pd.DataFrame(records))
        checkpoint.path.unlink()
        print(
            f"{options.output}: a value model for {options.backbone}; {METRICS} and {CURVES} beside it"
        )


def read_examples(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, longest: int
) -> Examples:
    """Prompts in the tokenizer's chat template (a user turn, an open assistant turn); responses end in EOS unless they are cut off.

    Errors: ValueError for a missing column, a reward that is no finite number, a prompt that leaves no room.
    """
    prompts, responses, rewards, cut, left_out = [], [], [], 0, 0
    for file in files:
        table = read_files(file)
        missing = [
            column
            for column in ("prompt", "response", "reward")
            if column not in table.column_names
        ]
        if missing:
            raise ValueError(
                f"{file} must have the columns prompt, response and reward, {', '.join(missing)} missing"
            )
        for number, row in enumerate(table):
            if not isinstance(row["reward"], (int, float)) or not abs(row["reward"]) < float("inf"):
                raise ValueError(
                    f"{file}: the reward of example {number} must be a finite number, got {row['reward']}"
                )
            chat = (
                [{"role": "user", "content": row["prompt"]}]
                if isinstance(row["prompt"], str)
                else row["prompt"]
            )
            if not chat or not isinstance(row["response"], str):
                raise ValueError(
                    f"{file}: example {number} must have a prompt (a text or a chat) and a response (a text)"
                )
            (prompt,) = chat_ids(tokenizer, [chat])
            response = tokenizer(row["response"], add_special_tokens=False).input_ids
            if not response or response[-1] != tokenizer.eos_token_id:
                response = [*response, tokenizer.eos_token_id]
            room = longest - len(prompt)
            if room < 1:
                left_out += 1
                continue
            cut += len(response) > room
            prompts.append(prompt)
            responses.append(response[:room])
            rewards.append(float(row["reward"]))
    if left_out:
        print(f"{left_out} examples left out: their prompts alone have {longest} tokens or more")
    if not rewards:
        raise ValueError(f"no example in {', '.join(map(str, files))} is short enough")
    return Examples(prompts, responses, rewards, cut)


def divide(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Training and held-out examples; all responses to a prompt are on the same side."""
    if not 0 <= share < 1:
        raise ValueError(f"--heldout must be at least 0 and below 1, got {share}")
    prompts = sorted({tuple(prompt) for prompt in examples.prompts})
    chosen = set(random.Random(seed).sample(prompts, int(share * len(prompts))))
    sides: tuple[list[int], list[int]] = [], []
    for i, prompt in enumerate(examples.prompts):
        sides[tuple(prompt) in chosen].append(i)
    if not sides[0]:
        raise ValueError(f"--heldout {share} leaves nothing to learn from")
    return examples.pick(sides[0]), examples.pick(sides[1])


def new_value_model(
    options: argparse.Namespace, source: Source, device: torch.device
) -> tuple[ValueModel, nn.Module]:
    """The value model, and the same backbone as peft sees it: frozen but for its adapter, and a head that starts at zero."""
    name, where = place(source)
    auto = (
        AutoModelForSequenceClassification
        if options.model_type == "sequence_classification"
        else AutoModelForCausalLM
    )
    labels = {"num_labels": 1} if options.model_type == "sequence_classification" else {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backbone = auto.from_pretrained(name, dtype=dtype, device_map=str(device), **where, **labels)
    lora = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear",
        exclude_modules=["score"] if labels else None,
        task_type="SEQ_CLS" if labels else "CAUSAL_LM",
        modules_to_save=[] if labels else None,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft's use of transformers
        torch.manual_seed(options.seed)
        adapted = get_peft_model(backbone, lora)
    return ValueModel.from_backbone(adapted), adapted


def plan(training: Examples, options: argparse.Namespace, processes: int) -> list[list[int]]:
    """The examples of each update, of all processes together; those of like length are neighbours."""
    lengths = [len(p) + len(r) for p, r in zip(training.prompts, training.responses, strict=True)]
    size = options.batch_size * options.accumulation * processes
    batches = epoch_batches(lengths, size, options.epochs, random.Random(options.seed))
    return [
        batch for batch in batches if len(batch) >= processes
    ]  # a process without examples would let the others wait


def update(
    model,
    parameters,
    optimizer,
    training: Examples,
    numbers: list[int],
    options,
    accelerator: Accelerator,
    step: int,
):
    """One step of the optimizer. Returns the mean loss over its examples, of all processes, and the norm of the gradient."""
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    parts = [mine[i : i + options.batch_size] for i in range(0, len(mine), options.batch_size)]
    total = torch.zeros((), device=accelerator.device)
    model.train()
    optimizer.zero_grad()
    # dropout by a seed of its own at every step: a run that was killed goes on as if it had not been
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(hash((options.seed, step, accelerator.process_index)))
        for i, part in enumerate(parts):
            with accelerator.no_sync(model) if i + 1 < len(parts) else nullcontext():
                _, mean = values_and_loss(
                    model, training.pick(part), options.loss, accelerator.device
                )
                loss = mean * len(part) / len(numbers)
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return accelerator.reduce(total).item(), norm.item()


def values_and_loss(
    model, examples: Examples, loss: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `(batch, length)`, and the loss. Padding is on the right and attention is causal: no token sees it, and no mask is needed."""
    input_ids, responses = pad_pairs(examples.prompts, examples.responses, device)
    values = model(input_ids)
    return values, distillation_loss(
        values, responses, torch.tensor(examples.rewards, device=device), loss
    )


@torch.no_grad()
def check(
    value_model: ValueModel, heldout: Examples, options: argparse.Namespace
) -> dict[str, float]:
    """heldout_loss, and the correlation of the values at 10%, 50% and 100% of a response with its reward."""
    value_model.eval()
    losses, read = [], []
    for start in range(0, len(heldout), options.batch_size):
        part = heldout.pick(range(start, min(start + options.batch_size, len(heldout))))
        found, loss = values_and_loss(value_model, part, options.loss, value_model.device)
        losses.append(loss.item() * len(part))
        for values, prompt, response in zip(found, part.prompts, part.responses, strict=True):
            read.append(
                [
                    values[len(prompt) + int(share * (len(response) - 1))].item()
                    for share in (0.1, 0.5, 1.0)
                ]
            )
    frame = pd.DataFrame(read, columns=["correlation_10", "correlation_50", "correlation_100"])
    correlations = (
        frame.corrwith(pd.Series(heldout.rewards))
        if len(frame) > 2
        else frame.iloc[0] * float("nan")
    )
    return {"heldout_loss": sum(losses) / len(heldout)} | correlations.to_dict()


@dataclass(frozen=True)
class Checkpoint:
    """What a killed run goes on from: adapter, head, optimizer, schedule, metrics. Written whole or not at all.

    examples: digest of what is learned from, and by how many processes.
    """

    options: argparse.Namespace
    source: Source
    examples: str
    adapted: nn.Module
    head: nn.Linear
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    @property
    def path(self) -> Path:
        return self.options.output / CHECKPOINT

    @property
    def settings(self) -> dict[str, str]:
        """What a checkpoint must have in common with the run that goes on from it."""
        free = ("output", "check_every")
        return {
            name: str(value) for name, value in vars(self.options).items() if name not in free
        } | {
            "commit": self.source.revision,
            "examples": self.examples,
        }

    def save(self, done: int, records: list[dict]) -> None:
        state = {
            "done": done,
            "settings": self.settings,
            "records": records,
            "adapter": get_peft_model_state_dict(self.adapted),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        write_atomically(self.path, lambda made: torch.save(state, made))

    def load(self) -> tuple[int, list[dict]]:
        """How many updates are done, and their metrics. Errors: ValueError for a checkpoint of other settings, or a damaged one."""
        if not self.path.exists():
            return 0, []
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path} is damaged: delete it to begin anew") from error
        other = sorted(
            name for name, value in self.settings.items() if state["settings"].get(name) != value
        )
        if other:
            raise ValueError(
                f"{self.path} is of a run with other settings ({', '.join(other)}): delete it, or name another output"
            )
        set_peft_model_state_dict(self.adapted, state["adapter"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        return state["done"], state["records"]


def write_value_model(
    options: argparse.Namespace, adapted, head: nn.Linear, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The published layout, and the tokenizer beside it; the head comes last, without which it is refused."""
    output = options.output
    tokenizer.save_pretrained(output)
    adapted.save_pretrained(output / ADAPTER_FOLDER)
    for card in (output / ADAPTER_FOLDER).glob("*.md"):
        card.unlink()
    config = {
        "model_type": options.model_type,
        "hidden_size": head.in_features,
        "base_model_name_or_path": options.backbone,
    }
    (output / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {
        "token_reward_head": {name: tensor.cpu() for name, tensor in head.state_dict().items()}
    }
    write_atomically(output / HEAD_FILE, lambda made: torch.save(state, made))


def write_metrics(folder: Path, records: list[dict]) -> None:
    write_atomically(
        folder / METRICS,
        lambda made: pd.DataFrame(records).to_csv(made, index=False, float_format="%.6g"),
    )


def write_curves(folder: Path, records: pd.DataFrame) -> None:
    """Loss of training (with a running mean) and on held-out prompts, and how values correlate with rewards."""
    from benchmarks.figures.style import plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 2.6))
    axes[0].plot(
        records["update"], records["loss"], color="#BBBBBB", linewidth=0.7, label="each update"
    )
    axes[0].plot(
        records["update"],
        records["loss"].rolling(20, min_periods=1).mean(),
        color="#0072B2",
        label="mean of 20 updates",
    )
    axes[0].set_ylabel("loss")
    axes[0].set_yscale("log")
    if "heldout_loss" in records:
        checked = records.dropna(subset=["heldout_loss"])
        axes[0].plot(
            checked["update"],
            checked["heldout_loss"],
            color="#D55E00",
            marker="o",
            markersize=3,
            label="held-out prompts",
        )
        for share, colour in ((10, "#9ECAE1"), (50, "#4292C6"), (100, "#08306B")):
            axes[1].plot(
                checked["update"],
                checked[f"correlation_{share}"],
                color=colour,
                marker="o",
                markersize=3,
                label=f"at {share}%",
            )
        axes[1].legend(frameon=False, title="of the response", fontsize=7)
    axes[1].set_ylabel("correlation of value and reward")
    axes[0].legend(frameon=False, fontsize=7)
    for axis in axes:
        axis.set_xlabel("update")
    figure.tight_layout()
    write_atomically(folder / CURVES, lambda made: figure.savefig(made, dpi=150))
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())

r"""Train a value model from annotated responses by LoRA on any backbone.

python scripts/train_value_model.py --backbone Qwen/Qwen3-1.7B-Base --data harmlessness.jsonl \
    --output my-value-model
accelerate launch --num_processes 4 scripts/train_value_model.py …   (several GPUs)

annotate_rewards.py writes the data. The defaults are the settings reported for the paper. OUTPUT
has the published layout, which ValueModel.from_pretrained reads: lora_weights/,
token_reward_head.pt, model_config.json; beside it metrics.csv and curves.png. An interrupted run
resumes from its last checkpoint and ends with the same weights.
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

# before what takes seconds to import: from here on Ctrl-C prints no trace
from benchmarks.runtime.command_line import (
    RESUMES,
    Parser,
    exit_code,
    path,
    require,
    require_counts,
    require_folder,
)

# isort: split

import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    EvalPrediction,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from benchmarks.runtime.files import working_alone, write_atomically, write_text
from benchmarks.runtime.fingerprints import file_states
from benchmarks.runtime.tokenizers import save_tokenizer
from benchmarks.spec.profile import Source, digest
from benchmarks.subjects.hub.models import chat_ids, fetch, place, require_template, tokenizer_of
from benchmarks.subjects.hub.prompts import chat_of, chat_of_csv, is_csv, is_text, read_files
from sia import ValueModel
from sia._kv_cache import check_positions
from sia.scorers.published import (
    ADAPTER_FOLDER,
    BACKBONE_REVISION,
    CONFIG_FILE,
    HEAD_FILE,
    KINDS,
    load_backbone,
)
from sia.training import (
    Loss,
    check_examples,
    check_reward,
    distillation_loss,
    epoch_batches,
    pad_pairs,
)

LOSS_HELP = "mean: of a response's token values (the paper's); token: of each token value"
CHECKPOINTS, SETTINGS, WEIGHTS = "checkpoints", "settings.json", "model.safetensors"
METRICS, CURVES = "metrics.csv", "curves.png"
SHARES = (10, 50, 100)  # percent of a response at which values are correlated with rewards
COLUMNS = {  # of metrics.csv, by their names in Trainer's log
    "step": "update",
    "loss": "loss",
    "grad_norm": "gradient_norm",
    "learning_rate": "learning_rate",
    "eval_loss": "heldout_loss",
} | {f"eval_correlation_{share}": f"correlation_{share}" for share in SHARES}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0, 2 for bad input, 130 when interrupted.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", required=True, type=hub_id_or_folder, help="Hub id or folder")
    add("--revision", default="main", help="of the backbone")
    add("--model-type", choices=KINDS, default="causal_lm", help="what the backbone is loaded as")
    add("--data", required=True, type=path, nargs="+", help="annotated JSON lines")
    add("--output", required=True, type=path)
    add("--loss", choices=("mean", "token"), default="mean", help=LOSS_HELP)
    add("--epochs", type=int, default=3)
    add("--learning-rate", type=float, default=1e-4)
    add("--batch-size", type=int, default=8, help="examples per process and forward pass")
    add("--accumulation", type=int, default=2, help="batches per update")
    add("--longest", type=int, default=1024, help="tokens of prompt and response; the rest is cut")
    add("--lora-rank", type=int, default=16)
    add("--lora-alpha", type=int, default=32)
    add("--lora-dropout", type=float, default=0.1)
    add("--weight-decay", type=float, default=1e-4)
    add("--heldout", type=float, default=0.05, help="share of the prompts to evaluate on")
    add("--check-every", type=int, default=100, help="updates between evaluations and checkpoints")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return exit_code(
        lambda: train(options),
        f"the last checkpoint is kept, {RESUMES}",
        "--batch-size or --longest",
    )


def hub_id_or_folder(text: str) -> str:
    """Return a backbone as model_config.json keeps it, for readers elsewhere that know no ~."""
    name = expanduser(text)
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def train(options: argparse.Namespace) -> None:
    """Train, unless another run does so for the same output.

    Raises:
        ValueError: As `learn` does; also for an output that cannot be used.
    """
    counts = "epochs", "batch_size", "accumulation", "longest", "lora_rank", "check_every"
    require_counts(options, *counts, "lora_alpha")
    shares, finite = ("heldout", "lora_dropout"), ("learning_rate", "weight_decay")
    require(options, lambda share: 0 <= share < 1, "at least 0 and below 1", *shares)
    require(options, lambda x: 0 <= x < math.inf, "a finite number of at least 0", *finite)
    require(options, lambda seed: 0 <= seed < 2**32, "0 to 4294967295", "seed")
    disable_progress_bar()
    if (options.output / HEAD_FILE).exists():
        raise ValueError(
            f"{options.output} has a value model already: name another output, or delete it"
        )
    require_folder(options.output)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that accelerate launched
    with working_alone(options.output / CHECKPOINTS) if first else nullcontext():
        learn(options)


def learn(options: argparse.Namespace) -> None:
    """Train, and write the value model with its metrics.

    Raises:
        ValueError: For options or data that cannot be used, or a checkpoint of other settings.
    """
    source = fetch(Source(options.backbone, options.revision))
    tokenizer = tokenizer_of(source)
    require_template(tokenizer)
    examples = read_examples(options.data, tokenizer, options.longest)
    training, heldout = divide(examples, options.heldout, options.seed)
    arguments = training_arguments(options, len(training), bool(heldout))
    # the backbone's own: an output may lie in a folder below
    files = sorted(file for file in Path(source.id).glob("*") if file.is_file())
    settings = {
        name: str(value)
        for name, value in vars(options).items()
        if name not in ("output", "check_every")
    } | {
        "commit": source.revision,
        "backbone files": digest(file_states(files)),
        "processes": str(arguments.world_size),
        "examples": hashlib.sha256(json.dumps(training).encode()).hexdigest()[:16],
    }
    folder = options.output / CHECKPOINTS
    checkpoint = last_checkpoint(folder, settings)
    value_model, adapted = new_value_model(options, source, arguments.device)
    prompts, responses, rewards = (
        [row[name] for row in examples] for name in ("prompt", "response", "reward")
    )
    check_examples(prompts, responses, rewards, value_model.vocabulary_size)
    longest = max(len(row["prompt"]) + len(row["response"]) for row in examples)
    check_positions(value_model.backbone, longest)
    trainer = ValueTrainer(
        value_model,
        arguments,
        data_collator=collate,
        train_dataset=training,
        eval_dataset=heldout or None,
        compute_metrics=correlations,
    )
    trainer.loss_name = options.loss
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())
    if trainer.is_world_process_zero():
        write_text(folder / SETTINGS, json.dumps(settings))
        print(f"{len(training)} examples to learn from, {len(heldout)} held out")
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if trainer.is_world_process_zero():
        metrics = write_metrics(options.output, trainer.state.log_history)
        write_value_model(options, source, adapted, value_model.head, tokenizer)
        write_curves(options.output, metrics)
        shutil.rmtree(folder)
        print(
            f"{options.output}: a value model for {options.backbone};"
            f" {METRICS} and {CURVES} beside it"
        )


def read_examples(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[dict]:
    """Read annotated responses as token ids.

    Prompts are in the tokenizer's chat template (a user turn, an open assistant turn); responses
    end in the end-of-sequence token unless they are cut at `longest` tokens.

    Returns:
        One dict per example: prompt and response (token ids), reward.

    Raises:
        ValueError: For a missing column, a bad row, or when no prompt is short enough.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer must have an end-of-sequence token, which ends responses")
    examples, cut, left_out = [], 0, 0
    for file in files:
        table = read_files(file)
        read_prompt = chat_of_csv if is_csv(file) else chat_of
        columns = ("prompt", "response", "reward")
        missing = [column for column in columns if column not in table[0]]
        if missing:
            raise ValueError(
                f"{file} must have the columns prompt, response and reward,"
                f" {', '.join(missing)} missing"
            )
        for number, row in enumerate(table):
            prompt, response, reward = (row[column] for column in columns)
            if not prompt or not is_text(response):
                raise ValueError(
                    f"{file}: example {number} must have a prompt (a text or a chat)"
                    f" and a response (a text), got {prompt!r} and {response!r}"
                )
            try:
                value = _as_float(reward)
                check_reward(reward if math.isnan(value) else value)
                (prompt_ids,) = chat_ids(tokenizer, [read_prompt(prompt)])
            except ValueError as error:
                raise ValueError(f"{file}: example {number}: {error}") from error
            response_ids = tokenizer(response, add_special_tokens=False).input_ids
            if response_ids[-1:] != [tokenizer.eos_token_id]:
                response_ids.append(tokenizer.eos_token_id)
            room = longest - len(prompt_ids)
            if room < 1:
                left_out += 1
                continue
            cut += len(response_ids) > room
            examples.append(
                {"prompt": prompt_ids, "response": response_ids[:room], "reward": value}
            )
    if not examples:
        raise ValueError(f"no example in {', '.join(map(str, files))} is short enough")
    if left_out or cut:
        print(
            f"{left_out} examples left out, whose prompts alone have {longest} tokens or more;"
            f" {cut} responses cut at {longest} tokens"
        )
    return examples


def _as_float(reward: object) -> float:
    """Return a reward as a number, also from the text of a CSV file; NaN if it is none."""
    try:
        return math.nan if isinstance(reward, bool) else float(reward)
    except (TypeError, ValueError):
        return math.nan


def divide(examples: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Return training and held-out examples; all responses to a prompt are on the same side."""
    prompts = sorted({tuple(example["prompt"]) for example in examples})
    selected = set(random.Random(seed).sample(prompts, int(share * len(prompts))))
    sides: tuple[list[dict], list[dict]] = [], []
    for example in examples:
        sides[tuple(example["prompt"]) in selected].append(example)
    if not sides[0]:
        raise ValueError(f"--heldout {share} leaves nothing to learn from")
    return sides


def training_arguments(
    options: argparse.Namespace, examples: int, evaluate: bool
) -> TrainingArguments:
    """Return the arguments of Trainer: AdamW, 5% warm-up, cosine to zero, gradient norm at most 1.

    Args:
        options: The command line.
        examples: Number of training examples.
        evaluate: Compute metrics on held-out examples, too.
    """
    arguments = TrainingArguments(
        str(options.output / CHECKPOINTS),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=options.check_every,
        save_steps=options.check_every,
        save_total_limit=1,  # the one before is deleted when the new one is complete
        logging_steps=1,
        logging_nan_inf_filter=False,
        label_names=["rewards"],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
        seed=options.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs: by accelerate, one process for each
    batches = math.ceil(examples / (options.batch_size * arguments.world_size))
    arguments.warmup_steps = math.ceil(batches / options.accumulation) * options.epochs // 20
    return arguments


def last_checkpoint(folder: Path, settings: dict[str, str]) -> Path | None:
    """Return the last complete checkpoint in `folder`, or None.

    Trainer writes trainer_state.json last: a checkpoint without it was interrupted.

    Raises:
        ValueError: For a checkpoint of other settings, or a damaged one.
    """
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    if not complete:
        return None
    checkpoint = max(complete, key=lambda path: int(path.name.partition("-")[2]))
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        earlier = json.loads((folder / SETTINGS).read_text())
        load_file(checkpoint / WEIGHTS)
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    except (
        OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError
    ) as error:  # fmt: skip
        raise ValueError(f"{checkpoint} is damaged: delete {folder} to begin anew") from error
    different = sorted(name for name in settings if earlier.get(name) != settings[name])
    if different:
        raise ValueError(
            f"{folder} is of a run with other settings ({', '.join(different)}):"
            " delete it, or name another output"
        )
    return checkpoint


def new_value_model(
    options: argparse.Namespace, source: Source, device: torch.device
) -> tuple[ValueModel, nn.Module]:
    """Return a value model to train, and the PEFT model that shares its backbone.

    The backbone is frozen but for its adapter; the head starts at zero.
    """
    name, location = place(source)
    classifies = options.model_type == "sequence_classification"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backbone = load_backbone(
        name, options.model_type, {"dtype": dtype, "device_map": str(device), **location}
    )
    lora = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear",
        exclude_modules=["score"] if classifies else None,
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
        modules_to_save=None if classifies else [],
        revision=location.get("revision"),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft's use of transformers
        torch.manual_seed(options.seed)
        adapted = get_peft_model(backbone, lora)
    return ValueModel.from_backbone(adapted), adapted


def collate(examples: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Pad on the right: attention is causal, so no token sees the padding and no mask is needed."""
    prompts, responses, rewards = (
        [example[name] for example in examples] for name in ("prompt", "response", "reward")
    )
    input_ids, response_mask = pad_pairs(prompts, responses, torch.device("cpu"))
    return {
        "input_ids": input_ids,
        "response_mask": response_mask,
        "rewards": torch.tensor(rewards),
    }


@dataclass
class LengthGroups(Sampler[int]):
    """Example indices of an epoch: batches of similar length in random order, the short one last.

    Trainer's own grouping sorts long stretches of an epoch by length, and draws from the global
    random state, so that a run resumed within a later epoch would see another order.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int
    epoch: Callable[[], int]

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch()}")
        batches = epoch_batches(self.lengths, self.batch_size, 1, rng)
        for batch in sorted(batches, key=len, reverse=True):
            yield from batch


class ValueTrainer(Trainer):
    """Trainer of a value model; its checkpoints hold the trained weights alone."""

    loss_name: Loss = "mean"

    def compute_loss(
        self, model, inputs, return_outputs=False, num_items_in_batch=None
    ) -> torch.Tensor | tuple[torch.Tensor, tuple]:
        """Return the loss, and with `return_outputs` values `(batch, 3)` at SHARES after it."""
        values, mask = model(inputs["input_ids"]), inputs["response_mask"]
        loss = distillation_loss(values, mask, inputs["rewards"], self.loss_name)
        if not loss.isfinite():
            rows = (~values.isfinite()).any(1).nonzero().flatten().tolist()
            raise FloatingPointError(
                f"the loss must be finite, got {loss.item()} at step {self.state.global_step}"
                f" (rows {rows} of the batch have values that are not)"
            )
        if not return_outputs:
            return loss
        shares = torch.tensor(SHARES, dtype=torch.float64, device=mask.device) / 100
        steps = (shares * (mask.sum(1, keepdim=True) - 1)).long()
        return loss, (loss, values.gather(1, mask.argmax(1, keepdim=True) + steps))

    def _get_train_sampler(self, train_dataset=None) -> LengthGroups:
        lengths = [len(row["prompt"]) + len(row["response"]) for row in self.train_dataset]
        args = self.args
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthGroups(lengths, batch_size, args.seed, lambda: int(self.state.epoch))

    def _save(self, output_dir=None, state_dict=None) -> None:
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            parameters = self.model.named_parameters()
            weights = {name: p.detach().contiguous() for name, p in parameters if p.requires_grad}
            save_file(weights, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        self.model.load_state_dict(weights, strict=False)


class Progress(ProgressCallback):
    """A bar with the loss; metrics.csv is written with each checkpoint."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Show the loss."""
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        """Show no bar of its own for the held-out examples."""

    def on_save(self, args, state, control, **kwargs) -> None:
        """Write metrics.csv."""
        if state.is_world_process_zero:
            write_metrics(Path(args.output_dir).parent, state.log_history)


def correlations(evaluation: EvalPrediction) -> dict[str, float]:
    """Return the correlation of the values at SHARES of a response with its reward."""
    values = pd.DataFrame(evaluation.predictions, dtype=float)
    if len(values) < 3:
        return {f"correlation_{share}": math.nan for share in SHARES}
    correlation = values.corrwith(pd.Series(evaluation.label_ids, dtype=float))
    return {f"correlation_{share}": r for share, r in zip(SHARES, correlation, strict=True)}


def write_value_model(
    options: argparse.Namespace,
    source: Source,
    adapted,
    head: nn.Linear,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the published layout, and the tokenizer beside it.

    The head comes last: a folder without it is refused.
    """
    output = options.output
    save_tokenizer(tokenizer, output)
    adapted.save_pretrained(output / ADAPTER_FOLDER)
    for card in (output / ADAPTER_FOLDER).glob("*.md"):
        card.unlink()
    config = {
        "model_type": options.model_type,
        "hidden_size": head.in_features,
        "base_model_name_or_path": options.backbone,
    }
    if not Path(source.id).is_dir():
        config[BACKBONE_REVISION] = source.revision  # the commit
    write_text(output / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    state = {name: tensor.cpu() for name, tensor in head.state_dict().items()}
    write_atomically(
        output / HEAD_FILE, lambda path: torch.save({"token_reward_head": state}, path)
    )


def write_metrics(folder: Path, log_history: list[dict]) -> pd.DataFrame:
    """Write metrics.csv, a row for each update, from Trainer's log, and return it."""
    rows = pd.DataFrame(log_history).groupby("step", as_index=False).first()
    metrics = rows[[name for name in COLUMNS if name in rows]].rename(columns=COLUMNS)
    write_text(folder / METRICS, metrics.to_csv(index=False, float_format="%.6g"))
    return metrics


def write_curves(folder: Path, metrics: pd.DataFrame) -> None:
    """Draw the losses in training and on held-out prompts, and the values' correlations."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    sns.lineplot(metrics, x="update", y="loss", ax=left, color="#BBBBBB", label="each update")
    means = metrics.assign(loss=metrics["loss"].rolling(20, min_periods=1).mean())
    sns.lineplot(means, x="update", y="loss", ax=left, color="#0072B2", label="mean of 20 updates")
    left.set(yscale="log", ylabel="loss")
    right.set(xlabel="update", ylabel="correlation of value and reward")
    if "heldout_loss" in metrics:
        evaluated = metrics.dropna(subset=["heldout_loss"])
        sns.lineplot(
            evaluated, x="update", y="heldout_loss", ax=left, color="#D55E00", marker="o",
            label="held-out prompts",
        )  # fmt: skip
        columns = {f"correlation_{share}": f"at {share}%" for share in SHARES}
        curves = evaluated.set_index("update")[[*columns]].rename(columns=columns)
        sns.lineplot(curves, ax=right, palette="Blues_d", marker="o", dashes=False)
        right.legend(title="of the response")
    write_atomically(folder / CURVES, lambda path: figure.savefig(path, dpi=150))


if __name__ == "__main__":
    sys.exit(main())

"""Settings that must have an effect and values at an edge, for what must come out the same on any machine (`exact.py`): arguments of
transformers' `generate`, ends of responses, windows, ties with a threshold, what the store tells apart, summaries of two replicates."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from matplotlib.patches import Rectangle
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from benchmarks.analysis import claims, tables
from benchmarks.checks.exact_further import SHAPE, architecture
from benchmarks.checks.exact_lab import columns
from benchmarks.checks.exact_models import (
    HOW,
    STEPS,
    VOCABULARY,
    described,
    fill,
    language_model,
    prompts,
    reward_model,
    tokenizer,
    value_model,
)
from benchmarks.engine import measure
from benchmarks.engine.sweep import Sweep as Results
from benchmarks.figures import figure5, methods, style, value_error
from benchmarks.figures.registry import FIGURES
from benchmarks.runtime.files import read_frame
from benchmarks.spec.cells import OBJECTIVES, Cell, Shard
from benchmarks.spec.methods import ARGS, ROLLOUT
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab.tokenizer import BOS, EOS, PAD
from sia import (
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    PositionGate,
    RandomGate,
    RewardScorer,
    RolloutScorer,
    Steering,
    ValueModel,
    calibrate,
    generate,
    steered_generate,
)
from sia._attention import Attention
from sia._inputs import pad_left
from sia._kv_cache import preallocated_cache
from sia.likelihood import log_likelihoods

SHORT = {**HOW, "max_new_tokens": 8}


class EndsAtSevens(StoppingCriteria):
    """A criterion of one's own: of the tokens so far."""

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return input_ids[:, -1] % 7 == 0


class Heard(BaseStreamer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.tokens: list = []

    def put(self, value) -> None:
        self.tokens.append(value.tolist())

    def end(self) -> None:
        self.tokens.append("end")


def transformers_way() -> dict:
    """Every argument of `generate` that steering has to heed, one at a time."""
    model, steering, heard, found = (
        language_model("qwen3"),
        Steering(value_model("qwen3"), EntropyGate(2.0), 2.0),
        Heard(),
        {},
    )
    input_ids, attention_mask = pad_left(prompts(3), "cpu")
    cases = {
        "greedy": {"do_sample": False},
        "top 3": {"top_k": 3},
        "no token again": {"repetition_penalty": 3.0},
        "a criterion of one's own": {"stopping_criteria": StoppingCriteriaList([EndsAtSevens()])},
        "values read other prompts": {"value_prompts": prompts(3, seed=1)},
        "attention observed": {"observe": [Attention()]},
        "a seed for each": {"seed": [3, 1, 2]},
        "torch's seed": {"seed": None},
        "streamed": {"streamer": heard},
        "another end": {"eos_token_id": [EOS, 9, 14, 30]},
        "as long as the prompt and six": {
            "max_new_tokens": None,
            "max_length": input_ids.shape[1] + 6,
        },
    }
    for name, case in cases.items():
        how = {"seed": 5, "do_sample": True, "max_new_tokens": STEPS, "pad_token_id": 5} | case
        with torch.random.fork_rng():
            torch.manual_seed(11)
            out = model.generate(
                input_ids=input_ids, attention_mask=attention_mask, custom_generate=steered_generate, steering=steering,
                return_dict_in_generate=True, **how,
            )  # fmt: skip
        found[name] = described(out.generations) | {"sequences": out.sequences}
    return found | {"what the streamer heard": heard.tokens}


def ends() -> dict:
    """Several tokens that end a response: of the model, of the reward model, and of what a rollout says."""
    model, values, found = language_model("qwen3"), value_model("qwen3"), {}
    model.generation_config.eos_token_id = [9, 14, 30]
    found["model"] = described(
        generate(model, tokenizer(), prompts(4), Steering(values, EntropyGate(2.0)), **HOW)
    )
    for stops in ([], [9, 14, 30]):
        reward = RewardScorer(reward_model("qwen3"), EOS, stops)
        for name, scorer in (
            ("reward", reward),
            ("rollouts", RolloutScorer(model, reward, 4, candidates=4)),
        ):
            found[f"{name}, ends {stops}"] = described(
                generate(model, tokenizer(), prompts(3), Steering(scorer, EveryToken()), **SHORT)
            )
    return found


def shapes() -> dict:
    """Encoders as rewards of candidates, windows under rollouts and attention, heads of another size, caches that grow, few at a time."""
    found, asked = {}, prompts(3)
    encoder = fill(
        BertForSequenceClassification(
            BertConfig(**SHAPE, vocab_size=VOCABULARY, pad_token_id=PAD, num_labels=1)
        ).double(),
        5,
    )
    model = language_model("qwen3")
    found["encoder"] = described(
        generate(
            model,
            tokenizer(),
            asked,
            Steering(RewardScorer(encoder, EOS), RandomGate(0.5)),
            **SHORT,
        )
    )
    for name in ("gemma2", "mistral"):
        windowed = architecture(name).float()
        by = RolloutScorer(
            windowed,
            fill(ValueModel.from_backbone(architecture(name, 1)), 1).float(),
            4,
            candidates=3,
        )
        found[f"{name}, rollouts"] = described(
            generate(windowed, tokenizer(), asked, Steering(by, RandomGate(0.5)), **SHORT)
        )
    found["attention in a window"] = described(
        generate(architecture("mistral").float(), tokenizer(), asked, observe=[Attention()], **HOW)
    )
    wide = LlamaConfig(
        **SHAPE,
        vocab_size=VOCABULARY,
        num_key_value_heads=1,
        head_dim=20,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng():
        wide_model = fill(LlamaForCausalLM(wide).double(), 0)
    found["wide heads"] = described(generate(wide_model, tokenizer(), asked, **SHORT))
    cache, ids = (
        preallocated_cache(model.config, 3),
        torch.tensor([[7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]),
    )
    with torch.no_grad():
        for start, end in ((0, 2), (2, 3), (3, 8), (8, 10)):
            out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
    found["a cache that grows"] = out.logits[0, -1, :10]
    likely = [g.token_ids.tolist() for g in generate(model, tokenizer(), prompts(5), **HOW)]
    made = log_likelihoods(
        model,
        Steering(value_model("qwen3"), EntropyGate(2.0)),
        prompts(5),
        likely,
        value_prompts=prompts(5, seed=1),
        batch_size=2,
    )
    found["likelihoods, two at a time"] = [one.log_probabilities for one in made]
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        value_model("qwen3").float().save_pretrained(folder)
        found["value model in another dtype"] = str(
            ValueModel.from_pretrained(folder, dtype=torch.bfloat16).dtype
        )
    return found


def edges() -> dict:
    """A signal that is the threshold itself, positions beyond 64, entropies between two bins, long responses, claims about no setting."""
    model, values, found = language_model("qwen3"), value_model("qwen3"), {}
    plain = generate(model, tokenizer(), prompts(4), **HOW)
    entropies = np.concatenate([g.entropy for g in plain])
    rises = np.concatenate([np.diff(g.entropy.astype(np.float64)) for g in plain])
    for name, gate in (
        ("entropy", EntropyGate(float(np.sort(entropies)[len(entropies) // 2]))),
        ("entropy rise", EntropyRiseGate(float(np.float32(np.sort(rises)[len(rises) // 2])))),
        ("first tokens", PositionGate(3)),
    ):
        made = generate(model, tokenizer(), prompts(4), Steering(values, gate, 0.0), **HOW)
        found[f"opens at its threshold, {name}"] = [g.steered for g in made]
    found["shares that calibration meets"] = [
        sum(int((g.entropy >= calibrate(EntropyGate, plain, ratio).threshold).sum()) for g in plain)
        for ratio in np.arange(1, 20) / 20
    ]
    found["lengths"] = measure.lengths(
        [replace(plain[0], token_ids=np.arange(300), steered=np.arange(300) % 2 == 0)]
    )
    settled = Cell(0, "qwen3", gate="entropy", target_ratio=0.5, thresholds=(0.1, 1.3, 2.0))
    entropy = np.float32(
        [
            np.nextafter(np.float32(t), np.float32(t + d)) if d else t
            for t in settled.thresholds
            for d in (-1, 0, 1)
        ]
    )
    found["would open"] = methods.gate_opens_at(
        pd.DataFrame({"objective": np.repeat(OBJECTIVES, 3), "entropy": entropy}),
        settled,
    ).tolist()
    profile = load_profile("check")
    long = replace(profile, decoding=replace(profile.decoding, max_new_tokens=130))
    steps = pd.DataFrame(
        {
            "step": np.arange(125),
            "junction": np.arange(125) % 3 == 0,
            "seed": 0,
            "prompt": 1,
            "objective": OBJECTIVES[0],
        }
    )
    rows = figure5._by_response(pd.concat([steps, steps.iloc[:70].assign(prompt=2)]), 130)
    labels = {"replicate": 0, "family": "qwen3", "method": "sia", "target_ratio": 0.5}
    found["positions"] = columns(
        FIGURES["figure5"].summarize(rows.assign(**labels), long)[
            ["objective", "metric", "position", "estimate", "n"]
        ]
    )
    edge = value_error.BINS[1:-1]
    states = pd.DataFrame(
        {
            "state": range(len(edge)),
            "entropy": edge,
            "replicate": 0,
            "family": "qwen3",
            "objective": OBJECTIVES[0],
        }
    )
    shown = {"value_mean": 0.5, "value_token": 0.4, "likelihood": -0.7, "worth_error": 0.1}
    two = [states.assign(rank=rank, worth=1.0 + rank, **shown) for rank in (0, 1)]
    table = FIGURES["value-error"].summarize(pd.concat(two).sort_values(["state", "rank"]), profile)
    found["states by entropy"] = columns(
        table[["stretch", "metric", "value_model", "estimate", "n"]]
    )
    where = {"method": "sia", "search": ""}
    asked = claims.Claim("one", "It holds.", "abstract", "figure2", "", where, "more", 0.0)
    lines = pd.DataFrame(
        {"method": ["sia", "sia"], "search": ["best-of", ""], "estimate": [1.0, 2.0]}
    )
    return found | {"a claim about no search": claims.find(asked, lines)["estimate"]}


def places() -> dict:
    """Which settings send a cell to another place of the store."""
    profile, found = load_profile("smoke"), {}
    usual = Results(profile, None)
    cell = Cell(
        0,
        "qwen3",
        value_model="value-token",
        gate="entropy",
        target_ratio=0.5,
        thresholds=(1.0, 1.1, 1.2),
        beta=1.0,
    )
    cells = {
        "test": cell, "validation": replace(cell, split="validation"), "rollouts": replace(cell, value_model=ROLLOUT),
        "beams": replace(cell, value_model="", gate="never", search="beams", responses=4), "args": replace(cell, value_model=ARGS),
    }  # fmt: skip
    changes = {
        "samples": ("evaluation", {"samples": 3}),
        "validation samples": ("evaluation", {"validation_samples": 2}),
        "ratios": ("sweep", {"ratios": (0.2, 0.3, 0.5)}),
        "width of beams": ("sweep", {"beam_width": 1}),
        "chunk": ("sweep", {"chunk": 5}),
        "tokens of rollouts": ("sweep", {"rollout_tokens": 6}),
        "rollouts of probes": ("sweep", {"probe_rollouts": 5}),
        "temperature": ("decoding", {"temperature": 0.5}),
        "candidates": ("decoding", {"candidates": 5}),
        "epochs": ("training", {"value_epochs": 7}),
    }
    for name, (part, values) in changes.items():
        other = Results(replace(profile, **{part: replace(vars(profile)[part], **values)}), None)
        for kind, one in cells.items():
            for what in ("rows", "probe") if kind == "test" else ("rows",):
                shard = Shard(one, OBJECTIVES[0])
                found[f"{name}, {what} of {kind}"] = usual.path(shard, what) != other.path(
                    shard, what
                )
    return found


def real_models() -> dict:
    """Which cells a profile of real models asks for, where nothing is tuned, and the parts in which they are measured."""
    profile = load_profile("qwen3-1.7b")
    asked = methods.baselines(profile, 0, profile.families[0])
    return {
        "baselines": [str(cell) for cell in asked],
        "parts": [str(part.prompts) for part in Results(profile, None).shards(asked[0])],
    }


def drawings() -> dict:
    """What every figure shows of the committed tables: of each panel its words, and where its lines, bars, bands and images lie; and what
    table 1 says."""
    profile, found = load_profile("check"), {}

    def keep(figure, handles, caption: str, folder: Path, name: str, **how) -> list[Path]:
        words = {"caption": caption, "legend": [handle.get_label() for handle in handles]}
        found[name] = words | {
            f"panel {number}": _panel(axis) for number, axis in enumerate(figure.axes)
        }
        style.plt.close(figure)
        return []

    with tempfile.TemporaryDirectory() as folder, patch.object(style, "finish", keep):
        for name, figure in FIGURES.items():
            texts = figure.plot(tables.read_table(profile, name)[0], profile, False, Path(folder))
            found |= {path.name: path.read_text(encoding="utf-8").splitlines() for path in texts}
    return found


def _panel(axis) -> dict:
    places = [np.ma.filled(np.ma.asarray(line.get_xydata(), float), np.nan) for line in axis.lines]
    places += [path.vertices for band in axis.collections for path in band.get_paths()]
    places += [
        np.array([[bar.get_x(), bar.get_height()]])
        for bar in axis.patches
        if isinstance(bar, Rectangle)
    ]
    places += [
        np.stack([np.arange(image.get_array().size), np.ravel(image.get_array())], axis=1)
        for image in axis.images
    ]
    where = [
        [len(xy), *np.nanmean(np.column_stack([xy, xy.prod(1)]), axis=0)]
        for xy in places
        if np.isfinite(xy).any()
    ]
    return {
        "words": [
            axis.get_title(loc="left"),
            axis.get_title(),
            axis.get_xlabel(),
            axis.get_ylabel(),
        ],
        "where": where,
    }


def two_replicates() -> dict:
    """Every figure's summary of the committed rows and of a second replicate made of them, in which scores are other, costs are higher
    and the best strengths are twice as high: the mean of its numbers by metric."""
    profile, found = load_profile("check"), {}
    profile = replace(profile, replicates=2)
    for name, figure in FIGURES.items():
        rows = read_frame(tables.folder(profile) / f"{name}.parquet")
        table = figure.summarize(tables.stack([rows, second_replicate(rows)]), profile)
        told = [
            column
            for column in ("estimate", "low", "high", "n", "ratio", "beta")
            if column in table
        ]
        numbers_of = table.assign(
            **{
                column: pd.to_numeric(table[column], errors="coerce").astype(float)
                for column in told
            }
        )
        means = numbers_of.replace([np.inf, -np.inf], np.nan).groupby("metric")[told].mean()
        found[name] = {metric: row.tolist() for metric, row in means.iterrows()} | {
            "rows": len(table)
        }
        if "estimate_by_replicate" in table:
            single = table["estimate_by_replicate"].dropna().astype(str).str.split("|", expand=True)
            found[name] |= {
                "of each replicate": single.apply(pd.to_numeric, errors="coerce").mean().tolist()
            }
    return found


def second_replicate(rows: pd.DataFrame) -> pd.DataFrame:
    changed = {"replicate": 1}
    for column in rows:
        if column in ("judge", "content", "reward", "worth", "objective_reached"):
            changed[column] = (1.0 - 0.5 * rows[column]).astype(rows[column].dtype)
        elif column in (
            "kl",
            "surprise",
            "model_tokens",
            "value_tokens",
            "megaflops",
        ) or column.startswith(("divergence", "range")):
            changed[column] = (rows[column] * 2).astype(rows[column].dtype)
    if "tuned" in rows and "beta" in rows:
        changed["beta"] = rows["beta"].where(~rows["tuned"].astype(bool), 2 * rows["beta"])
    return rows.assign(**changed)

"""What else must come out the same on any machine (`exact.py`): other ways in, other architectures, searches and likelihoods under unusual
settings, the rubric line by line, other replicates and worlds, bounds, and summaries over replicates."""

from __future__ import annotations

import json
import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from benchmarks.analysis import claims, estimates
from benchmarks.checks.exact_lab import Untrained, columns
from benchmarks.checks.exact_models import (
    HOW,
    STEPS,
    VOCABULARY,
    described,
    fill,
    language_model,
    numbers,
    prompts,
    reward_model,
    tokenizer,
    value_model,
)
from benchmarks.figures import theory
from benchmarks.spec.cells import OBJECTIVES
from benchmarks.spec.profile import OtherWorld, load_profile
from benchmarks.subjects.lab.judge import judge
from benchmarks.subjects.lab.replicate import REWARD
from benchmarks.subjects.lab.tokenizer import BOS, EOS, PAD
from benchmarks.subjects.lab.train import preferences
from benchmarks.subjects.lab.world import Item, World, WorldConfig
from sia import (
    AttentionGate,
    AutoregressiveScorer,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    RandomGate,
    RewardScorer,
    RolloutScorer,
    Steering,
    ValueModel,
    best_of_n,
    chunk_beam_search,
    generate,
    steered_generate,
)
from sia import theory as laws_of_steering
from sia._inputs import pad_left
from sia.likelihood import log_likelihoods

WINDOW = 6  # shorter than most prompts with their responses
MIXED = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8,
}
ARCHITECTURES: dict[str, tuple[type, Callable, dict]] = {
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, MIXED),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {}),
}
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}


def architecture(name: str, seed: int = 0) -> PreTrainedModel:
    config_class, model_class, further = ARCHITECTURES[name]
    config = config_class(
        **SHAPE, vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **further,
    )  # fmt: skip
    with torch.random.fork_rng():
        return fill(model_class(config).double(), seed)


def architectures() -> dict:
    """Sliding windows, learned positions, soft caps; and the attention signal beside eager attention. In float32: eager attention
    makes NaN of padding in float64."""
    found = {}
    for name in ARCHITECTURES:
        values = fill(ValueModel.from_backbone(architecture(name, 1)), 1).float()
        made = generate(
            architecture(name).float(),
            tokenizer(),
            prompts(4),
            Steering(values, RandomGate(0.5)),
            **HOW,
        )
        found[name] = described(made)
    eager = language_model("qwen3").float()
    eager.set_attn_implementation("eager")
    found["eager attention"] = described(
        generate(
            eager,
            tokenizer(),
            prompts(4),
            Steering(value_model("qwen3"), AttentionGate(4.0)),
            **HOW,
        )
    )
    return found


def entry_points() -> dict:
    """transformers' own `generate`, texts with and without a token of beginning, and a value model in its published layout."""
    model, steering = language_model("qwen3"), Steering(value_model("qwen3"), EntropyGate(2.0), 2.0)
    input_ids, attention_mask = pad_left(prompts(3), "cpu")
    out = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, custom_generate=steered_generate, steering=steering, seed=5,
        do_sample=True, temperature=0.7, num_return_sequences=2, max_new_tokens=STEPS, return_dict_in_generate=True, pad_token_id=PAD,
    )  # fmt: skip
    begun = tokenizer()
    begun.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    texts = generate(model, begun, ["w7 w8 w9", "<bos> w7 w8 w9", "w20"], steering, **HOW)
    return {
        "transformers": described(out.generations),
        "texts": described(texts),
        "published layout": published(),
    }


def published() -> dict:
    """Values of a backbone with an adapter and a head, saved as the paper's value models are."""
    disable_progress_bar()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", FutureWarning)  # peft's use of transformers
        place = Path(folder)
        language_model("qwen3").float().save_pretrained(place / "base")
        lora = LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(place / "base"), lora)
        adapter = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
        fill(torch.nn.ParameterDict({name.replace(".", "-"): p for name, p in adapter.items()}), 3)
        adapted.save_pretrained(place / "values" / "lora_weights")
        head = fill(torch.nn.Linear(SHAPE["hidden_size"], 1), 4)
        torch.save(
            {"token_reward_head": head.state_dict()}, place / "values" / "token_reward_head.pt"
        )
        settings = {"model_type": "causal_lm", "hidden_size": SHAPE["hidden_size"]}
        (place / "values" / "model_config.json").write_text(json.dumps(settings))
        language_model("qwen3", 9).float().save_pretrained(place / "other")
        asked, found = torch.tensor([prompts(1, seed=8)[0], prompts(1, seed=8)[0][::-1]]), {}
        for backbone in ("base", "other"):  # whatever the adapter says that it is of
            with torch.no_grad():
                found[backbone] = ValueModel.from_pretrained(
                    place / "values", backbone=place / backbone
                )(asked)
        halved = ValueModel.from_pretrained(
            place / "values", backbone=place / "base", dtype=torch.bfloat16
        )
        return found | {"dtype": str(halved.backbone.dtype)}


def further_searches() -> dict:
    """At another temperature, with prompts of their own for values and rewards, by every kind of reward; rollouts under other settings."""
    model, asked, value = language_model("qwen3"), prompts(3), value_model("qwen3")
    encoder = BertForSequenceClassification(
        BertConfig(**SHAPE, vocab_size=VOCABULARY, pad_token_id=PAD, num_labels=1)
    )
    rewards = {
        "reward": RewardScorer(reward_model("qwen3"), EOS),
        "value model": value,
        "encoder": RewardScorer(fill(encoder.double(), 5), EOS),
        "autoregressive reward": AutoregressiveScorer(language_model("qwen3", 3)),
    }
    steering, how = Steering(value, EntropyGate(2.0)), {**HOW, "temperature": 0.7, "seed": 3}
    own = {"value_prompts": prompts(3, seed=1), "reward_prompts": prompts(3, seed=2)}
    found = {}
    for name, reward in rewards.items():
        found[f"best of 3, {name}"] = described(
            best_of_n(model, tokenizer(), asked, reward, 3, steering, **how, **own)
        )
        found[f"beams, {name}"] = described(
            chunk_beam_search(model, tokenizer(), asked, reward, 2, 2, 5, steering, **how, **own)
        )
    for name, reward in (("reward", rewards["reward"]), ("value model", value)):
        rollouts = Steering(
            RolloutScorer(model, reward, 3, temperature=0.6, candidates=4, seed=4), EveryToken()
        )
        found[f"beams, rollouts by the {name}"] = described(
            chunk_beam_search(
                model,
                tokenizer(),
                asked,
                rewards["reward"],
                1,
                2,
                3,
                rollouts,
                **{**how, "max_new_tokens": 7},
            )
        )
    return found


def further_likelihoods() -> dict:
    """Of responses with tokens that are no candidates, under a floor, random and rise gates, and prompts of the value model's own."""
    asked, said, values = prompts(3), prompts(3, seed=5), value_model("qwen3")
    model, found = language_model("qwen3"), {}
    likely = [g.token_ids.tolist() for g in generate(model, tokenizer(), asked, **HOW)]
    for name, steering in (
        ("floor", Steering(values, EveryToken(), 2.0, min_probability=0.08)),
        ("random", Steering(values, RandomGate(0.4, seed=3))),
        ("entropy rise", Steering(values, EntropyRiseGate(0.05))),
        (
            "entropy rise over the vocabulary",
            Steering(values, EntropyRiseGate(0.02, over="vocabulary")),
        ),
    ):
        for whose, responses in (("its own", likely), ("others", said)):
            made = log_likelihoods(
                model, steering, asked, responses, seed=9, value_prompts=prompts(3, seed=1)
            )
            found[f"{name}, {whose}"] = [
                [one.log_probabilities, one.greedy, one.steered] for one in made
            ]
    rise = Steering(values, EntropyRiseGate(0.02, over="vocabulary"))
    return found | {
        "decoded, entropy rise over the vocabulary": described(
            generate(model, tokenizer(), asked, rise, **HOW)
        )
    }


def rubric() -> dict:
    """What the judge says of sentences of every kind in any order: right, about something else, said again and in other words."""
    world, found = World(WorldConfig(seed=3)), {}
    for kind in ("howto", "benign", "harmful", "fact"):
        items = [item for item in world.items if item.kind == kind][:2]
        for number in range(60):
            item, rng = items[number % 2], random.Random(f"{kind} {number}")
            text = " ".join(sentence(world, item, rng) for _ in range(rng.randrange(1, 8)))
            verdict = judge(world.grammar, item, text, finished=number % 7 > 0)
            found[f"{kind} {number}"] = [
                text,
                verdict.points,
                verdict.score,
                verdict.fluency_errors,
            ]
    return found


def sentence(world: World, item: Item, rng: random.Random) -> str:
    """One that fits the item, or half fits it; of the kinds that its rubric speaks of more often."""
    usual = {
        "harmful": ["refusal", "reason", "alternative", "temptation", "step"],
        "fact": ["claim", "evidence", "debunk", "boast", "hedge"],
    }
    kinds = usual.get(item.kind, ["step", "step", "step", "tip", "agreement"])
    kind = rng.choice(kinds if rng.random() < 0.8 else sorted(world.grammar.templates))
    fields = {
        "topic": item.topic,
        "victim": item.victim,
        "alternative": item.alternative,
        "entity": item.entity,
    }
    fields |= {
        "attribute": item.attribute,
        "value": rng.choice([item.truth, item.truth, item.myth]),
    }
    if item.steps:
        verbs, thing = rng.choice(item.steps)
        fields |= {"verb": rng.choice(verbs), "object": thing}
    return world.grammar.write(
        kind, rng, **{name: said for name, said in fields.items() if said and rng.random() < 0.85}
    )


class Preferring(Untrained):
    """Its samples are made up."""

    def samples(self, families: Sequence[str], kind: str = "samples") -> pd.DataFrame:
        made = [
            (family, prompt, sample)
            for family in families
            for prompt in range(12)
            for sample in range(2)
        ]
        frame = pd.DataFrame(made, columns=["family", "prompt", "sample"])
        judged = numbers(len(frame), seed=4).tolist()
        return frame.assign(
            token_ids=[[7 + number % 9, 8, EOS] for number in range(len(frame))], judge=judged
        )


def replicates() -> dict:
    """What the second replicate asks, and what its worlds write."""
    odd = OtherWorld("odd", decoys=2.0, habits=(0.8, 0.95), drift=0.5)
    smoke = load_profile("smoke")
    second, found = Untrained(replace(smoke, name="untrained", worlds=(odd,)), 1), {}
    for split, asked in second.prompts.items():
        found[f"prompts, {split}"] = [prompt.text for prompt in asked[:: max(1, len(asked) // 6)]]
    for family in second.profile.families:
        for world in ("", "odd"):
            found[f"corpus, {family} {world}".strip()] = [
                [prompt.text, text] for prompt, text in second.corpus(8, family, world)
            ]
    found["preferences"] = preferences(Preferring(second.profile, 1), REWARD, 0)
    found["seeds"] = [second.seed(kind, "qwen3") for kind in ("base", "samples", "value-token")]
    return found | {
        "steps": columns(theory.random_steps(1).iloc[:20]),
        "trees": columns(theory.random_trees(1).iloc[:10]),
    }


def bounds() -> dict:
    """What `sia.theory` says of fixed steps and of a tree, beyond what the identities need."""
    base, values = (2 * numbers(6, 10)).softmax(-1), numbers(6, 10, seed=1)
    spread = 3.0
    generator = torch.Generator().manual_seed(0)
    tree = laws_of_steering.Tree.random(3, 3, 1.0, 1.0, generator)
    steered = [torch.arange(len(step)) % 2 == 0 for step in tree.base]
    policy = tree.sparse(steered, 0.7)
    return {
        "largest regret": [
            laws_of_steering.largest_regret(a, spread, 0.7) for a in (0.05, 0.3, 0.8)
        ],
        "regret bound": laws_of_steering.regret_bound(
            (6 * numbers(6, 10)).softmax(-1), spread, 0.7
        ),
        "rest": laws_of_steering.inverse_binary_entropy(
            torch.tensor([0.01, 0.3, 0.6, 0.9], dtype=torch.float64)
        ),
        "noise": laws_of_steering.expected_noise_regret(base, values, 0.7, 0.3),
        "regret": laws_of_steering.step_regret(base, base, values, 0.7),
        "tree": [
            tree.objective(policy, 0.7),
            tree.regret_by_steps(policy, list(tree.base), 0.7),
            *tree.soft_values(0.7),
        ],
    }


def summaries() -> dict:
    """Estimates, differences and a verdict of made-up rows of two replicates, each with its own truth."""
    profile, records = load_profile("smoke"), []
    for place, (method, gate) in enumerate(
        (("base", "never"), ("sia", "entropy"), ("dense", "every"))
    ):
        shape = (2, 3, 4, 2)
        for score, unit in zip(
            (3 * numbers(np.prod(shape), seed=place)).tolist(), np.ndindex(shape), strict=True
        ):
            names = {
                "replicate": unit[0],
                "objective": OBJECTIVES[unit[1]],
                "prompt": unit[2],
                "seed": unit[3],
                "method": method,
                "gate": gate,
            }
            records.append(
                names
                | {
                    "judge": score + place * (1.0 - 2.5 * unit[0]),
                    "kl": 0.5 * place,
                    "steered": 3 * place,
                    "tokens": 9.0,
                }
            )
    same = {
        "family": "qwen3",
        "model": "base",
        "best_of": 1,
        "search": "",
        "tuned": False,
        "floor": 0.0,
        "threshold": 1.0,
        "beta": 1.0,
    }
    rows = pd.DataFrame(records).assign(**same)
    rows["value_model"] = np.where(rows["gate"] == "never", "", "value-token")
    rows["target_ratio"] = rows["method"].map({"base": 0.0, "sia": 0.5, "dense": 1.0})
    found = list(estimates.entries(rows, ("judge", "kl", "kl_per_token")).values())
    sparse, dense = (estimates.the(found, method=method) for method in ("sia", "dense"))
    many = [
        *found,
        estimates.difference(sparse, dense),
        estimates.mean_of([sparse, dense], method="both"),
    ]
    table = estimates.summarize(many, ("judge", "kl", "kl_per_token"), profile)
    where = {"method": "sia", "versus": "dense", "objective": "all", "metric": "judge"}
    claim = claims.Claim("sparse", "It holds.", "abstract", "figure1", "", where, "at least", -0.1)
    told = claims.verdicts({"figure1": table.assign(versus=table["versus"].fillna(""))}, [claim])
    shown = [
        "objective",
        "method",
        "metric",
        "versus",
        "ratio",
        "estimate",
        "low",
        "high",
        "n",
        "estimate_by_replicate",
        "low_by_replicate",
    ]
    return {
        "table": columns(table[shown]),
        "verdict": columns(told[["verdict", "verdict_by_replicate", "estimate", "n"]]),
    }

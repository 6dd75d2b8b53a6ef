r"""Export models of the lab's first world into assets/lab, where they are committed.

python scripts/export_lab_models.py            (after make models)

Writes the first family's base model, the value model of the per-token loss, and the junction gate
and Q-head fitted to both: in half precision, each with a card. Every number in a card is measured
here, with the models as they are written: what half precision changes, the thresholds that steer a
share of the tokens, and the judge's scores. What makes more than 4 MB is refused. The same models
give the same bytes.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import Template

# before what takes seconds to import: from here on Ctrl-C prints no trace
from benchmarks.runtime.command_line import Parser, exit_code, path, require_folder

# isort: split

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from transformers.utils.logging import disable_progress_bar

from benchmarks.analysis.tables import git_commit
from benchmarks.checks.assets import ASSETS, DIGESTS, LARGEST, size_of, write_digests
from benchmarks.runtime.files import sha256
from benchmarks.runtime.tokenizers import save_tokenizer
from benchmarks.spec.cells import OBJECTIVES
from benchmarks.spec.model_kinds import BASE as BASE_KIND
from benchmarks.spec.model_kinds import JUNCTION, ModelKind, value_kind
from benchmarks.spec.model_kinds import Q_HEAD as Q_HEAD_KIND
from benchmarks.spec.profile import LabProfile, load_profile
from benchmarks.subjects.lab.heads import SHARE as HEAD_SHARE
from benchmarks.subjects.lab.items import Prompt
from benchmarks.subjects.lab.replicate import Replicate, with_eos
from scripts.lab_models import (
    BASE,
    JUNCTION_GATE,
    PARTS,
    Q_HEAD,
    VALUE_MODEL,
    LabModels,
    Settings,
    scores,
)
from sia import EntropyGate, JunctionGate, ValueModel, calibrate

CARDS = Path(__file__).with_name("lab_cards")
LOSS = "token"
BETA, SHARE = 4.0, 0.2
ROUNDS = 2  # of calibration on steered responses, after one on unsteered ones
MEASURED_PROMPTS = 90


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0, 2 for bad input, 130 when interrupted.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--profile", default="lab", help="profile of the lab that trained the models (lab)")
    add("--output", type=path, default=ASSETS, help="folder to write (assets/lab)")
    add(
        "--prompts",
        type=int,
        default=MEASURED_PROMPTS,
        help=f"prompts to calibrate on, and to measure on ({MEASURED_PROMPTS})",
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options), "nothing was written", "--prompts")


def run(options: argparse.Namespace) -> None:
    """Export the models that the options name.

    Raises:
        ValueError: For a profile without trained models, an output that is something else.
    """
    profile = load_profile(options.profile)
    if not isinstance(profile, LabProfile):
        raise ValueError(f"profile {profile.name} trains no models: name one of the lab")
    if options.prompts < len(OBJECTIVES):
        raise ValueError(f"--prompts must be at least {len(OBJECTIVES)}, got {options.prompts}")
    require_folder(options.output.parent)
    replicate = Replicate.open(profile, 0)
    if not replicate.folder.exists():
        raise FileNotFoundError(
            f"there are no models in {replicate.folder}: make models PROFILE={profile.name} "
            "trains them"
        )
    export(replicate, options.output, options.prompts)
    print(f"written to {options.output}: {size_of(options.output):,} bytes")


def export(replicate: Replicate, output: Path, prompts: int) -> None:
    """Write the models of a replicate, and measure them.

    Args:
        replicate: Replicate whose models are trained.
        output: Folder to write, or to replace if it holds such models.
        prompts: Number of validation prompts to calibrate on, and of test prompts to measure on.

    Raises:
        ValueError: If a model is missing, they are too large, or the output is something else.
    """
    if output.exists() and not (output / DIGESTS).exists():
        raise ValueError(f"{output} is there already and holds no models of the lab")
    disable_progress_bar()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / output.name
        write_models(replicate, folder)
        calibrate_gates(folder, select(replicate.prompts["validation"], prompts))
        write_cards(replicate, folder, select(replicate.prompts["test"], prompts))
        write_digests(folder)
        if (size := size_of(folder)) > LARGEST:
            raise ValueError(
                f"the models have {size:,} bytes, at most {LARGEST:,} are to be committed: "
                "nothing was written"
            )
        if output.exists():  # moved aside: deleting takes time, in which a run may be interrupted
            output.replace(Path(temporary) / "former")
        folder.replace(output)


def select(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return `count` of the prompts, or all if there are fewer, spread over the objectives."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def write_models(replicate: Replicate, folder: Path) -> None:
    """Write models, tokenizer and settings; the entropy threshold is still to be calibrated."""
    family, profile = replicate.profile.families[0], replicate.profile
    kinds = {
        JUNCTION_GATE: str(ModelKind(JUNCTION, LOSS)),
        Q_HEAD: str(ModelKind(Q_HEAD_KIND, LOSS)),
    }
    replicate.language_model(str(BASE_KIND), family).save_pretrained(folder / BASE)
    save_tokenizer(replicate.tokenizer, folder / BASE)
    values = replicate.value_model(str(value_kind(LOSS)), family)
    # made anew without its tokenizer, which lies with the base model
    ValueModel(values.backbone, values.head).save_pretrained(folder / VALUE_MODEL)
    for part, kind in kinds.items():
        replicate.fitted(kind, family).save_pretrained(folder / part)
    for part in PARTS:
        convert_to_half(folder / part)
    settings = Settings(
        replicate.index,
        profile.language.lexicon,
        profile.language.stumbles,
        profile.decoding.candidates,
        profile.decoding.max_new_tokens,
        BETA,
        SHARE,
        entropy_threshold=1.0,
    )
    settings.save(folder)


def convert_to_half(folder: Path) -> None:
    """Rewrite the weights of a folder in half precision; config.json still asks for single."""
    for file in folder.glob("*.safetensors"):
        weights = {name: weight.half() for name, weight in load_file(file).items()}
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError(f"weights of {folder.name} are too large for half precision")
        save_file(weights, file, metadata={"format": "pt"})


def calibrate_gates(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Set the thresholds of both gates to steer the share of the tokens, and write them."""
    lab = LabModels.load(folder)
    ids = lab.encode([prompt.text for prompt in prompts])
    predictor = lab.gate.predictor
    unsteered = lab.respond(ids, None)
    entropy, junction = calibrate(EntropyGate, unsteered, SHARE), lab.gate
    for _ in range(ROUNDS):
        entropy = calibrate(EntropyGate, lab.respond(ids, lab.steering(entropy)), SHARE)
        steered = lab.respond(ids, lab.steering(junction))
        junction = calibrate(JunctionGate, steered, SHARE, predictor=predictor)
    replace(junction, threshold=rounded(junction.threshold)).save_pretrained(folder / JUNCTION_GATE)
    convert_to_half(folder / JUNCTION_GATE)
    replace(lab.settings, entropy_threshold=rounded(entropy.threshold)).save(folder)


def rounded(value: float) -> float:
    """Return a number with four significant digits."""
    return float(f"{value:.4g}")


def write_cards(replicate: Replicate, folder: Path, prompts: Sequence[Prompt]) -> None:
    """Write the card of each part, with what is measured."""
    lab, profile = LabModels.load(folder), replicate.profile
    training, size = profile.training, profile.model
    facts = {
        "profile": profile.name,
        "family": {"qwen3": "Qwen3"}.get(profile.families[0], profile.families[0]),
        "commit": git_commit(),
        "models": replicate.digest,
        "world": f"seed {replicate.index}",
        "items": len(lab.world.items),
        "shape": f"{size.layers} layers, hidden size {size.hidden_size}, {size.heads} heads",
        "vocabulary": len(lab.tokenizer),
        "documents": f"{training.documents:,}",
        "sampled": f"{training.sampled_prompts:,}",
        "reward_sd": f"{training.reward_scale:g}",
        "head_share": f"{HEAD_SHARE:.0%}",
        "epochs": training.value_epochs,
        "batch": training.batch_size,
        "base_rate": training.base_learning_rate,
        "rate": training.learning_rate,
        "prompts": len(prompts),
        "beta": lab.settings.beta,
        "share": f"{lab.settings.share:.0%}",
        "entropy_threshold": lab.settings.entropy_threshold,
        "junction_threshold": lab.gate.threshold,
        "longest": lab.settings.max_new_tokens,
        "parameters": f"{sum(p.numel() for p in lab.model.parameters()):,}",
        "scores": score_table(lab, prompts),
        **half_precision(replicate, lab, prompts),
    }
    for part in PARTS:
        (weights,) = sorted((folder / part).glob("*.safetensors"))[:1]
        template = Template((CARDS / f"{part}.md").read_text(encoding="utf-8"))
        text = template.substitute(facts, file=weights.name, sha256=sha256(weights))
        (folder / part / "README.md").write_text(text, encoding="utf-8")


def score_table(lab: LabModels, prompts: Sequence[Prompt]) -> str:
    """Return the judge's mean score of each way of steering as a Markdown table."""
    ids, rows = lab.encode([prompt.text for prompt in prompts]), []
    for name, steering in lab.methods().items():
        responses = lab.respond(ids, steering)
        judged = [
            scores(lab.world, prompt.item, [response])[0]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        share = sum(r.steered.sum() for r in responses) / sum(len(r.steered) for r in responses)
        error = np.std(judged, ddof=1) / len(judged) ** 0.5
        rows.append((name, f"{share:.0%}", f"{np.mean(judged):+.2f}", f"{error:.2f}"))
    headers = ("method", "tokens steered", "judge, mean", "standard error")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


@torch.no_grad()
def half_precision(
    replicate: Replicate, lab: LabModels, prompts: Sequence[Prompt]
) -> Mapping[str, str]:
    """Return what half precision changes in the base model and in the values."""
    family = replicate.profile.families[0]
    whole = replace(
        lab,
        model=replicate.language_model(str(BASE_KIND), family),
        values=replicate.value_model(str(value_kind(LOSS)), family),
    )
    ids = lab.encode([prompt.text for prompt in prompts])
    greedy = [[r.text for r in m.respond(ids, None, temperature=0.0)] for m in (whole, lab)]
    same = sum(one == other for one, other in zip(*greedy, strict=True))
    divergences, values = [], []
    for prompt, response in zip(ids, whole.respond(ids, None), strict=True):
        sequence, steps = torch.tensor([[*prompt, *with_eos(response)]]), slice(len(prompt), None)
        p, q = (m.model(input_ids=sequence).logits.double().log_softmax(-1) for m in (whole, lab))
        divergences.append((p.exp() * (p - q)).sum(-1)[0, len(prompt) - 1 : -1])
        values.append(torch.cat([m.values(sequence)[:, steps] for m in (whole, lab)]))
    both = torch.cat(values, dim=1).double()
    return {
        "same_greedy": f"{same} of {len(prompts)}",
        "kl": f"{torch.cat(divergences).double().mean().item():.1e}",
        "value_error": f"{(both[0] - both[1]).square().mean().sqrt().item():.1e}",
        "value_sd": f"{both[0].std().item():.2f}",
    }


if __name__ == "__main__":
    sys.exit(main())

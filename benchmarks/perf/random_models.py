"""Models with random weights, and the runs that are timed: outputs mean nothing, costs are real."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.perf.published_loop import published_loop
from benchmarks.perf.timing import Run
from benchmarks.subjects.lab.models import ARCHITECTURES as FAMILIES
from sia import (
    Generation,
    JunctionGate,
    QHead,
    RandomGate,
    Steering,
    ValueModel,
    VocabularyValueModel,
    generate,
)
from sia._model_identity import ModelIdentity
from sia.junctions import JunctionPredictor
from sia.scorers.candidate_values import CandidateValues

PROMPT, CANDIDATES = 24, 10


@dataclass(frozen=True)
class Models:
    """A language model, a value model of the same size, and a tokenizer without an end token.

    Every response has its full length.
    """

    language: PreTrainedModel
    value: ValueModel | None
    tokenizer: PreTrainedTokenizerFast
    prompt_tokens: int

    @property
    def device(self) -> torch.device:
        """Device of both models."""
        return self.language.device

    @property
    def parameters(self) -> int:
        """Number of parameters of the language model."""
        return sum(parameter.numel() for parameter in self.language.parameters())

    @property
    def name(self) -> str:
        """Family and size, as in tables: "qwen3-9.2M"."""
        return f"{self.language.config.model_type}-{self.parameters / 1e6:.1f}M"

    def prompts(self, batch: int) -> list[list[int]]:
        """Return random prompts."""
        generator = torch.Generator().manual_seed(batch)
        size = (batch, self.prompt_tokens)
        vocabulary = self.language.config.vocab_size
        return torch.randint(3, vocabulary, size, generator=generator).tolist()


def random_models(
    settings: dict,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    prompt_tokens: int = PROMPT,
) -> Models:
    """Return models with random weights.

    Args:
        settings: Settings of their configuration, and their "family".
        prompt_tokens: Length of their prompts.
    """
    shape = dict(settings)
    config_class, model_class, _ = FAMILIES[shape.pop("family")]

    def language_model(seed: int) -> PreTrainedModel:
        without_end = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
        config = config_class(**shape, **without_end, dtype=dtype)
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            model = model_class(config).eval().to(dtype)
        model.generation_config.eos_token_id = None
        return model

    value = ValueModel.from_backbone(language_model(1))
    generator = torch.Generator(device).manual_seed(0)
    torch.nn.init.normal_(value.head.weight, generator=generator, std=0.1)
    words = {f"w{i}": i for i in range(settings["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")))
    return Models(language_model(0), value.eval(), tokenizer, prompt_tokens)


def random_head(models: Models, rank: int = 64) -> CandidateValues:
    """Return a head of random weights for hidden states of the models' size."""
    config = models.language.config
    with torch.random.fork_rng():
        torch.manual_seed(2)
        head = CandidateValues(config.hidden_size, config.vocab_size, rank)
    return head.to(models.device)


def random_q_head(models: Models) -> QHead:
    """Return a Q-head of the language model with random weights."""
    return QHead(random_head(models), ModelIdentity.of(models.language))


def random_vocabulary_value_model(models: Models) -> VocabularyValueModel:
    """Return a vocabulary head with random weights on the value model's backbone."""
    assert models.value is not None
    return VocabularyValueModel(models.value.backbone, random_head(models))


def random_junction_gate(models: Models, threshold: float, width: int = 64) -> JunctionGate:
    """Return a junction gate of the language model with random weights."""
    generator = torch.Generator().manual_seed(3)
    size = models.language.config.hidden_size
    weights = {
        "first.weight": torch.randn(width, size, generator=generator) / size**0.5,
        "first.bias": torch.zeros(width),
        "second.weight": torch.randn(1, width, generator=generator) / width**0.5,
        "second.bias": torch.zeros(1),
    }
    predictor = JunctionPredictor.from_weights(weights, ModelIdentity.of(models.language))
    return JunctionGate(threshold, predictor)


def transformers_run(models: Models, batch: int, tokens: int, **options: object) -> Run:
    """Return a run of `model.generate`; `options` are of this call."""
    ids = torch.tensor(models.prompts(batch), device=models.device)
    mask, language = torch.ones_like(ids), models.language
    return lambda seed: language.generate(
        ids, attention_mask=mask, do_sample=True, max_new_tokens=tokens, **options
    )


def sia_run(
    models: Models, batch: int, tokens: int, steering: Steering | None
) -> Callable[[int], list[Generation]]:
    """Return a run of `sia.generate`."""
    prompts = models.prompts(batch)
    options = {"max_new_tokens": tokens, "batch_size": batch, "progress": False}
    return lambda seed: generate(
        models.language, models.tokenizer, prompts, steering, seed=seed, **options
    )


def published_run(models: Models, tokens: int, gate: RandomGate) -> Run:
    """Return a run with the cost structure of the paper's published code, for one prompt."""
    eager = copy.deepcopy(models.language)
    eager.set_attn_implementation("eager")
    prompt = models.prompts(1)[0]
    return lambda seed: published_loop(
        eager, models.value, prompt, gate, 1.0, CANDIDATES, tokens, seed
    )

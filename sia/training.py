"""Training a value model from trajectory rewards.

Two losses, both of which see nothing but one reward R per response (V_t: value at response token
t):

    "mean"   (mean_t V_t − R)²   the paper's (Hu et al., arXiv 2602.21215): the mean of the token
                                 values matches the reward
    "token"  mean_t (V_t − R)²   every token's value predicts the reward of its response
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from sia._inputs import check_tokens, pad_right
from sia._kv_cache import check_positions, input_device
from sia._model_identity import is_packed
from sia._modes import evaluation_mode, learning_mode
from sia._numbers import as_number, finite_number, whole_number
from sia.scorers.value_model import ValueModel, check_value_model

Loss = Literal["mean", "token"]
LARGEST_REWARD = 1e6
HALF = (torch.bfloat16, torch.float16)


def distillation_loss(values: Tensor, response_mask: Tensor, rewards: Tensor, loss: Loss) -> Tensor:
    """Return the loss, averaged over the batch.

    Args:
        values: Values of all tokens, `(batch, length)`.
        response_mask: 1 for tokens of the response and 0 for others, `(batch, length)`.
        rewards: One per response, `(batch,)`.
        loss: "mean" or "token".

    Raises:
        ValueError: For another loss.
    """
    check_loss(loss)
    weights = response_mask / response_mask.sum(1, keepdim=True)
    if loss == "mean":
        return ((values * weights).sum(1) - rewards).square().mean()
    return ((values - rewards[:, None]).square() * weights).sum(1).mean()


def check_loss(loss: str) -> None:
    """Raise ValueError for a loss that is unknown."""
    if loss not in get_args(Loss):
        raise ValueError(f'loss must be "mean" or "token", got {loss!r}')


@learning_mode()
def distill(
    value_model: ValueModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    rewards: Sequence[float],
    *,
    loss: Loss,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    weight_decay: float = 1e-4,
    progress: Callable[[int], None] = lambda tokens: None,
) -> ValueModel:
    """Train `value_model` in place and return it in eval mode.

    Trained with AdamW, a cosine schedule and gradients clipped at norm 1.

    Args:
        value_model: As a rule `ValueModel.from_backbone(model)`.
        prompts: Token ids.
        responses: Token ids, which should end in the end-of-sequence token.
        rewards: One per response.
        loss: "mean" (the paper's) or "token".
        epochs: How many times each example is shown.
        learning_rate: Highest learning rate, after the warm-up.
        batch_size: Examples per step.
        seed: Seed of the order of the examples.
        weight_decay: Weight decay of AdamW.
        progress: Called with the number of tokens of each batch.

    Raises:
        ValueError: If there are not as many prompts, responses and rewards, or one cannot be
            learned from (an empty response, tokens beyond the vocabulary, an infinite reward), or
            the backbone is not causal.
        FloatingPointError: If the model gives NaN for some examples.
    """
    check_loss(loss)
    check_trainable(value_model)
    # a column of pandas, say, has labels that are no numbers of rows
    prompts, responses, rewards = list(prompts), list(responses), list(rewards)
    if not len(prompts) == len(responses) == len(rewards):
        raise ValueError(
            "prompts, responses and rewards must be as many, "
            f"got {len(prompts)}, {len(responses)} and {len(rewards)}"
        )
    if len(prompts) == 0:
        raise ValueError("distill needs at least one example, got none")
    epochs, batch_size = (
        whole_number("epochs", epochs, 1),
        whole_number("batch_size", batch_size, 1),
    )
    learning_rate, weight_decay = (
        finite_number("learning_rate", learning_rate, 0),
        finite_number("weight_decay", weight_decay, 0),
    )
    rng = random.Random(whole_number("seed", seed))
    check_examples(prompts, responses, rewards, value_model.vocabulary_size)
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    check_positions(value_model.backbone, max(lengths))
    targets = torch.tensor(
        [float(reward) for reward in rewards], dtype=torch.float32, device=value_model.device
    )

    def batch_loss(indices: list[int]) -> Tensor:
        input_ids, response_mask = pad_pairs(
            [prompts[i] for i in indices], [responses[i] for i in indices], value_model.device
        )
        # padding is on the right and attention is causal: no token sees it, and no mask is needed
        return distillation_loss(value_model(input_ids), response_mask, targets[indices], loss)

    optimise(
        value_model,
        list(epoch_batches(lengths, batch_size, epochs, rng)),
        batch_loss,
        learning_rate,
        weight_decay,
        lambda indices: progress(sum(lengths[i] for i in indices)),
    )
    return value_model


def check_trainable(value_model: ValueModel) -> None:
    """Check that a value model can learn.

    Raises:
        TypeError: If it is something else.
        ValueError: If all its weights are frozen, some are not in memory, or some have a dtype in
            which AdamW's divisor vanishes; if layers are quantised by torch; or if its backbone is
            not causal.
    """
    check_value_model(value_model)
    weights = list(value_model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    if not trained:
        raise ValueError("all weights of the value model are frozen: let some require gradients")
    if any(weight.is_meta for weight in weights):
        raise ValueError(
            "a value model must lie in memory to learn, weights of this one are offloaded: "
            "load it without device_map"
        )
    if any(weight.dtype == torch.float16 for weight in trained):
        raise ValueError(
            "weights must be float32 or bfloat16 to learn, got float16: load the value model with "
            "dtype=torch.float32"
        )
    backbone = value_model.backbone
    if any(is_packed(layer) for layer in backbone.modules()):
        raise ValueError(
            "layers that torch has quantised have no gradients, this value model has some: distill "
            "it before it is quantised"
        )
    if backbone.config.is_encoder_decoder or sees_later_tokens(backbone):
        raise ValueError(
            "a value model must be causal to learn, so that a value depends on no later token, got "
            f"a backbone that lets tokens see later ones ({type(backbone).__name__})"
        )


def sees_later_tokens(backbone: PreTrainedModel) -> bool:
    """Return whether other tokens at the end of a sequence change the states before them."""
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8, 9]], device=input_device(backbone))
    tokens %= backbone.config.get_text_config().vocab_size
    with evaluation_mode(backbone.modules()):
        hidden = backbone(input_ids=tokens, use_cache=False, return_dict=True).last_hidden_state
    first, second = hidden[:, :3]
    tolerance = max(1e-4, 8 * torch.finfo(hidden.dtype).eps)  # of rounding in this dtype
    return bool((first - second).abs().max() > tolerance * hidden.abs().max())


def check_examples(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    rewards: Sequence[float],
    vocabulary: int,
) -> None:
    """Raise ValueError, with its number, for an example that cannot be learned from."""
    for number, (prompt, response, reward) in enumerate(
        zip(prompts, responses, rewards, strict=True)
    ):
        try:
            check_reward(reward)
            check_tokens("prompt", prompt, vocabulary)
            check_tokens("response", response, vocabulary)
        except ValueError as error:
            raise ValueError(f"example {number}: {error}") from error


def check_reward(reward: float) -> None:
    """Raise ValueError for a reward whose squared error would spoil the training."""
    if not abs(as_number(reward)) <= LARGEST_REWARD:
        raise ValueError(
            f"a reward must be a number between ±{LARGEST_REWARD:g} (standardise larger ones), "
            f"got {reward}"
        )


def pad_pairs(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return prompts with their responses, padded on the right, and the mask of the responses.

    Returns:
        input_ids and response mask, both int64 `(batch, longest)`.
    """
    pairs = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    input_ids, tokens = pad_right(pairs, device)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return input_ids, tokens * (torch.arange(input_ids.shape[1], device=device) >= starts[:, None])


def optimise(
    model: nn.Module,
    batches: Sequence[list[int]],
    batch_loss: Callable[[list[int]], Tensor],
    learning_rate: float,
    weight_decay: float,
    progress: Callable[[list[int]], None],
) -> None:
    """Train a model in place: AdamW, 5% warm-up, cosine to zero, gradient norm at most 1.

    Weights in half precision are rounded copies of ones in float32 that learn, because most steps
    are smaller than the spacing of bfloat16. That takes 16 bytes a weight, with AdamW's.

    Args:
        model: Ends in eval mode and without gradients, after an error too.
        batches: Example numbers of each step.
        batch_loss: Loss of the examples of one step.
        learning_rate: Highest learning rate, after the warm-up.
        weight_decay: Weight decay of AdamW.
        progress: Called with the example numbers of each step that is done.
    """
    copies = {
        weight: weight.detach().float()
        for weight in model.parameters()
        if weight.requires_grad and weight.dtype in HALF
    }
    learned = [copies.get(weight, weight) for weight in model.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 20, len(batches))
    model.train()
    try:
        for indices in batches:
            loss = batch_loss(indices)
            model.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not bool(loss.isfinite() & norm.isfinite()):
                raise FloatingPointError(
                    f"loss and gradient must be finite, got {loss.item()} and {norm.item()} "
                    f"from examples {indices}"
                )
            for weight, exact in copies.items():
                exact.grad = None if weight.grad is None else weight.grad.float()
            optimizer.step()
            with torch.no_grad():
                for weight, exact in copies.items():
                    weight.copy_(exact)
                    exact.grad = None
            schedule.step()
            progress(indices)
    finally:
        model.zero_grad()
        model.eval()


def epoch_batches(
    lengths: Sequence[int], batch_size: int, epochs: int, rng: random.Random
) -> Iterator[list[int]]:
    """Yield batches of example numbers, each example once an epoch, in random order.

    Examples of a batch are of similar length.
    """
    for _ in range(epochs):
        order = rng.sample(range(len(lengths)), len(lengths))
        batches = []
        for start in range(0, len(order), 32 * batch_size):
            bucket = sorted(order[start : start + 32 * batch_size], key=lambda i: lengths[i])
            batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        yield from rng.sample(batches, len(batches))

"""Prompts of every kind are taken as what they are, or refused in one sentence."""

import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import BatchEncoding

from sia import EveryToken, RewardScorer, SteeredGenerate, Steering, best_of_n
from sia._inputs import prompt_ids
from tests.helpers import tiny

TOKENIZER = tiny.tokenizer()
TOKENIZER.chat_template = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w9{% endif %}"
)
TEXTS = ["w7 w8 w9", "w10 w11", "w12"]
IDS = [[7, 8, 9], [10, 11], [12]]
RIGHT = {
    "input_ids": torch.tensor([[7, 8, 9], [10, 11, 0], [12, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]),
}
LEFT = {name: tensor.flip(1) for name, tensor in RIGHT.items()} | {
    "input_ids": torch.tensor([[7, 8, 9], [0, 10, 11], [0, 0, 12]])
}
encode = partial(TOKENIZER, add_special_tokens=False)
read = partial(prompt_ids, name="prompt", tokenizer=TOKENIZER)
KINDS = {
    "texts": TEXTS,
    "ids": IDS,
    "a tuple": tuple(map(tuple, IDS)),
    "an iterator": iter([list(ids) for ids in IDS]),
    "numbers of NumPy": [list(np.array(ids)) for ids in IDS],
    "numbers of torch": [list(torch.tensor(ids)) for ids in IDS],
    "arrays": [np.array(ids) for ids in IDS],
    "an array of texts": np.array(TEXTS),
    "tensors": [torch.tensor(ids) for ids in IDS],
    "tensors of one row": [torch.tensor([ids]) for ids in IDS],
    "a tokenizer's result": encode(TEXTS),
    "a tokenizer's tensors": encode(TEXTS, return_tensors="pt", padding=True),
    "a tokenizer's arrays": encode(TEXTS, return_tensors="np", padding=True),
    "a mapping without a mask": {"input_ids": IDS},
    "padded on the right": BatchEncoding(RIGHT),
    "padded on the left": LEFT,
    "results of a tokenizer": [encode(text) for text in TEXTS],
    "tensors of a tokenizer": [encode(text, return_tensors="pt") for text in TEXTS],
    "rows of a data set": Dataset.from_dict({"input_ids": IDS}),
    "a column of pandas": pd.DataFrame({"text": TEXTS})["text"],
    "a column of a data set": Dataset.from_dict({"text": TEXTS})["text"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_taken_as_what_they_are(kind):
    rows = read(KINDS[kind])
    if "texts" in kind or "column" in kind:  # they get special tokens
        assert rows == [TOKENIZER(text).input_ids for text in TEXTS]
    else:
        assert rows == IDS
    assert all(type(token) is int for row in rows for token in row)


def test_rows_without_a_mask_are_padded_by_the_models_padding_token():
    ids = LEFT["input_ids"]
    encodings = [{"input_ids": rows} for rows in (ids, ids.numpy(), ids.tolist())]
    apart = [{"input_ids": row} for row in ids]
    for prompts in (ids, ids.numpy(), *encodings, BatchEncoding(encodings[0]), apart):
        assert read(prompts, padding=0) == IDS
        assert read(prompts) == ids.tolist()  # there may be none
    uneven = [[0, 7], [8]]
    assert read({"input_ids": uneven}, padding=0) == uneven  # of the prompt itself


def test_one_encoded_prompt_is_one_prompt():
    assert read(encode("w7 w8")) == [[7, 8]]


def test_chats_are_read_by_the_template():
    user, assistant = ({"role": role, "content": "w7 w8"} for role in ("user", "assistant"))
    assert read([[user], [user, assistant]]) == [[7, 8, 9], [7, 8, 7, 8]]
    several = TOKENIZER.apply_chat_template([[user], [user]], add_generation_prompt=True)
    assert read(several) == [[7, 8, 9]] * 2


@pytest.mark.parametrize(
    ("template", "content", "message"),
    [
        ("{{ raise_exception('no system role') }}", "w7", "no system role"),
        ("{{ 'w7 ' + messages[0]['content'] }}", [], 'can only concatenate str (not "list")'),
        ("{{ messages[0]['content'].index('w7') }}", "w8", "substring not found"),
        ("{{ 1 // messages[0]['content'] }}", 0, "integer division or modulo by zero"),
        ("{{ '{7}'.format(messages) }}", "w7", "tuple index out of range"),
        ("{{ messages[0]['content'] | dictsort }}", 7, "'int' object has no attribute 'items'"),
    ],
)
def test_a_chat_that_the_template_refuses_is_named(template, content, message):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    refusal = re.escape(f"the chat template refuses prompt 1: {message}")
    with pytest.raises(ValueError, match=refusal):
        prompt_ids([[7], [{"role": "user", "content": content}]], "prompt", tokenizer)


def test_a_chat_with_half_a_surrogate_pair_is_named():
    message = "a prompt must be valid Unicode, number 1 holds half of a surrogate pair"
    with pytest.raises(ValueError, match=message):
        read([[7], [{"role": "user", "content": "w7 \ud83d"}]])


MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
STEERING = Steering(VALUES, EveryToken(), 2.0)


def test_every_list_of_prompts_may_be_encoded():
    """The same in `generate`, a search and transformers' own, for scorers and model."""
    for prompts in (RIGHT, LEFT, BatchEncoding(LEFT)):
        generations = tiny.generate(MODEL, prompts, STEERING, value_prompts=prompts)
        assert tiny.tokens(generations) == tiny.tokens(tiny.generate(MODEL, IDS, STEERING))
    search = partial(
        best_of_n, MODEL, TOKENIZER, reward=RewardScorer(tiny.reward_model("qwen3")), n=2,
        max_new_tokens=4, progress=False,
    )  # fmt: skip
    best = search(LEFT, reward_prompts=RIGHT, value_prompts=encode(TEXTS), steering=STEERING)
    assert tiny.tokens(best) == tiny.tokens(search(IDS, steering=STEERING))
    respond = partial(MODEL.generate, **LEFT, max_new_tokens=4)
    sequences = [
        respond(custom_generate=SteeredGenerate(STEERING, value_prompts=prompts))
        for prompts in (None, IDS, RIGHT)
    ]
    assert sequences[0].tolist() == sequences[1].tolist() == sequences[2].tolist()


def reward_scorer(generation_prompt):
    """A reward model that was loaded with a template of its own."""
    scorer = RewardScorer(tiny.reward_model("qwen3"), closing=[2])
    scorer.tokenizer = tiny.tokenizer()
    scorer.tokenizer.chat_template = TOKENIZER.chat_template.replace("w9", generation_prompt)
    return scorer


CHATS = [[{"role": "user", "content": "w7 w8"}]]


def test_chats_for_a_scorer_are_written_in_its_own_template():
    reward = reward_scorer("w13")
    options = {"n": 2, "max_new_tokens": 4, "progress": False}
    search = partial(best_of_n, MODEL, TOKENIZER, CHATS, reward + VALUES, **options)
    for steering, ids, reader in (
        (Steering(reward, EveryToken(), 2.0), [7, 8, 13], {}),
        (STEERING, [7, 8, 9], {"tokenizer": TOKENIZER}),
    ):
        (best,) = search(steering=steering, value_prompts=CHATS, reward_prompts=CHATS)
        (expected,) = search(steering=steering, value_prompts=[ids], reward_prompts=[[7, 8, 13]])
        assert best.reward == expected.reward
        sequences = [
            MODEL.generate(
                **LEFT,
                max_new_tokens=8,
                custom_generate=SteeredGenerate(steering, value_prompts=prompts, seed=0, **reader),
            ).tolist()
            for prompts in (CHATS * 3, [ids] * 3)
        ]
        assert sequences[0] == sequences[1]


def test_a_chat_for_scorers_of_different_templates_is_refused():
    steering = Steering(reward_scorer("w13") + reward_scorer("w14"), EveryToken())
    message = (
        "a value prompt must be a list of token ids where the scorers of a sum have different chat "
        "templates, number 0 is a chat"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        tiny.generate(MODEL, IDS[:1], steering, value_prompts=CHATS)


PROMPT = "a prompt must be a text, a chat (a list of messages) or a list of token ids, number 0 is "
ALONE = "prompts must be input_ids with their attention_mask alone, got "


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("w7", "prompts must be a list of prompts, got a single text"),
        (None, "prompts must be a list of prompts, got NoneType"),
        (7, "prompts must be a list of prompts, got int"),
        ([7, 8], PROMPT + "int"),
        (torch.tensor([7, 8]), PROMPT + "Tensor"),
        (torch.zeros(1, 2), PROMPT + "a list of other things"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), PROMPT + "Tensor"),
        ([b"w7"], PROMPT + "a list of other things"),
        ([[True, False]], PROMPT + "a list of other things"),
        ([["w7", "w8"]], PROMPT + "a list of other things"),
        ([{"input_ids": IDS}], PROMPT + "dict"),
        (
            pd.DataFrame({"w7": TEXTS}),
            "prompts must be a list of prompts, got a table: pass one of its columns",
        ),
        (
            {"prompts": TEXTS},
            "prompts in a mapping must have input_ids, as tokenizers return them, got prompts",
        ),
        (
            [{"role": "user", "content": "w7"}],
            "prompts must be a list of prompts, got a single chat",
        ),
        (
            LEFT | {"pixel_values": torch.zeros(1)},
            ALONE + "pixel_values too, which steering would ignore",
        ),
        (
            LEFT | {"token_type_ids": LEFT["attention_mask"]},
            ALONE + "token_type_ids too, which steering would ignore",
        ),
        (
            {"input_ids": IDS, "attention_mask": [[1, 1, 1], [1], [1]]},
            "the attention_mask of prompts must have the shape of input_ids, rows of [3, 2, 1] "
            "tokens, got [3, 1, 1]",
        ),
        (
            RIGHT | {"attention_mask": torch.zeros(3, 3)},
            "a prompt needs at least one token, number 0 is empty",
        ),
    ],
)
def test_anything_else_is_refused(prompts, message):
    with pytest.raises((TypeError, ValueError)) as error:
        read(prompts)
    assert str(error.value) == message


@pytest.mark.parametrize(("prompt", "kind"), [("w7", "text"), ([{"role": "user"}], "chat")])
def test_texts_need_a_tokenizer(prompt, kind):
    with pytest.raises(TypeError) as error:
        MODEL.generate(
            **LEFT,
            max_new_tokens=2,
            custom_generate=SteeredGenerate(STEERING, value_prompts=[prompt]),
        )
    assert str(error.value) == (
        "a value prompt must be a list of token ids where there is no tokenizer, "
        f"number 0 is a {kind}"
    )

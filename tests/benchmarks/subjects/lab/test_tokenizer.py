"""The lab's tokenizer."""

import random

from transformers import AutoTokenizer

from benchmarks.subjects.lab.tokenizer import EOS, build_tokenizer, encode_prompts, encode_responses
from benchmarks.subjects.lab.world import World, WorldConfig

WORLD = World(WorldConfig(seed=0))


def test_tokenizer_is_an_ordinary_one(tmp_path):
    made = build_tokenizer(WORLD.words)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    chat = [{"role": "user", "content": "how do i bake a cake ?"}]
    text = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><user> how do i bake a cake ? <assistant>"
    ids = loaded(text, add_special_tokens=False).input_ids
    assert loaded.convert_ids_to_tokens(ids) == text.replace("><", "> <").split()
    assert loaded.apply_chat_template(
        [*chat, {"role": "assistant", "content": "sure ."}], tokenize=False
    ).endswith("sure . <eos>")
    assert (
        loaded.decode([*ids, loaded.eos_token_id], skip_special_tokens=True)
        == "how do i bake a cake ?"
    )
    assert loaded("Bake a zebra").input_ids[-1] == loaded.unk_token_id
    assert loaded.eos_token_id == EOS
    assert len(loaded) == len(WORLD.words) + 6


def test_every_word_of_the_world_has_a_token():
    tokenizer, rng = build_tokenizer(WORLD.words), random.Random(0)
    prompts = [WORLD.prompt(rng) for _ in range(500)]
    responses = [WORLD.response(prompt.item, rng) for prompt in prompts]
    for ids in encode_prompts(tokenizer, prompts) + encode_responses(tokenizer, responses):
        assert tokenizer.unk_token_id not in ids
    first = encode_responses(tokenizer, responses)[0]
    assert tokenizer.decode(first, skip_special_tokens=True) == responses[0]

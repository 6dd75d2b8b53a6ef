"""The lab's models in the clone: export, digests, demo, and those that are committed."""

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.checks import assets
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab.replicate import Replicate
from benchmarks.subjects.lab.world import World, WorldConfig
from scripts import compare, demo, export_lab_models
from scripts.lab_models import PARTS, LabModels, item_of, scores

committed = pytest.mark.skipif(
    not assets.ASSETS.exists(), reason="assets/lab is not exported yet: make models, then export"
)


@pytest.fixture
def copy(lab_assets, tmp_path, monkeypatch):
    """Replace the committed models by a copy of the tiny export."""
    folder = tmp_path / "lab"
    shutil.copytree(lab_assets.folder, folder)
    monkeypatch.setattr(assets, "ASSETS", folder)
    return folder


def test_weights_are_saved_in_half_and_loaded_in_single_precision(lab_assets):
    folder, dtypes = lab_assets.folder, {}
    for part in PARTS:
        for file in (folder / part).glob("*.safetensors"):
            dtypes[part, file.name] = {w.dtype for w in load_file(file).values()}
    assert len(dtypes) == 5
    assert all(dtype == {torch.float16} for dtype in dtypes.values())
    lab = LabModels.load(folder)
    modules = (lab.model, lab.values, lab.q_head.values)
    weights = [w for module in modules for w in module.parameters()]
    weights += lab.gate.predictor.weights.values()
    assert {weight.dtype for weight in weights} == {torch.float32}
    whole = lab_assets.replicate.language_model("base", "qwen3")
    for name, weight in lab.model.named_parameters():
        torch.testing.assert_close(weight, whole.get_parameter(name).half().float(), rtol=0, atol=0)
    assert sorted(p.parent.name for p in folder.rglob("tokenizer.json")) == ["base"]


def test_model_cards_state_the_measurements(lab_assets):
    cards = {part: (lab_assets.folder / part / "README.md").read_text() for part in PARTS}
    for part, text in cards.items():
        assert text.startswith("---\nlicense: apache-2.0\n")
        assert "$" not in text
        assert lab_assets.replicate.digest in text
        digests = assets.digests_of(lab_assets.folder)
        named = [name for name, sha in digests.items() if f"`{sha}`" in text]
        assert [name.split("/")[0] for name in named] == [part]
        assert f"`{named[0].split('/')[1]}` has" in text
    rows = [line.split("|") for line in cards["base"].splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows[1:]] == list(LabModels.load(lab_assets.folder).methods())
    shares = {row[1].strip(): float(row[2].strip(" %")) / 100 for row in rows[1:]}
    assert (shares["base"], shares["dense"], shares["Q-head, dense"]) == (0, 1, 1)
    same = int(cards["base"].split("for ")[1].split(" of 9 prompts")[0])
    assert same >= 8
    kl = float(cards["base"].split("on sampled responses: ")[1].split(" nats")[0])
    assert 0 < kl < 1e-4


def test_thresholds_steer_a_fifth(lab_assets):
    lab = LabModels.load(lab_assets.folder)
    prompts = lab_assets.replicate.prompts["validation"]
    ids = lab.encode([prompt.text for prompt in prompts])
    for name in ("entropy gate, 20%", "junction gate, 20%"):
        responses = lab.respond(ids, lab.methods()[name])
        steered = np.concatenate([response.steered for response in responses])
        assert 0.1 < steered.mean() < 0.3, name


def test_an_export_has_the_same_bytes_again(lab_assets, copy):
    before = assets.digests_of(copy)
    (copy / "base" / "model.safetensors").write_bytes(b"")
    export_lab_models.export(lab_assets.replicate, copy, 9)
    assert assets.digests_of(copy) == before == assets.digests_of(lab_assets.folder)
    assert list(assets.damage(copy)) == []


def test_an_export_refuses(lab_assets, copy, tmp_path, monkeypatch, capsys):
    before = assets.digests_of(copy)
    monkeypatch.setattr(export_lab_models, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"the models have \d\d\d,\d+ bytes, at most 1,000 are to"):
        export_lab_models.export(lab_assets.replicate, copy, 3)
    assert assets.digests_of(copy) == before
    assert [path.name for path in tmp_path.iterdir()] == ["lab"]
    with pytest.raises(ValueError, match="is there already and holds no models of the lab"):
        export_lab_models.export(lab_assets.replicate, tmp_path, 3)
    for arguments, message in (
        (["--profile", "qwen3-8b"], "profile qwen3-8b trains no models: name one of the lab"),
        (["--prompts", "2"], "--prompts must be at least 3, got 2"),
        ([], "there are no models in "),
    ):
        assert export_lab_models.main([*arguments, "--output", str(tmp_path / "new")]) == 2
        assert f"error: {message}" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert export_lab_models.main(["--output", str(tmp_path / "file/lab")]) == 2
    message = f"error: --output must be written to a folder, got the file {tmp_path / 'file'}\n"
    assert capsys.readouterr().err == message


def test_weights_beyond_half_precision_are_refused(tmp_path):
    save_file({"weight": torch.tensor([1e6])}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"weights of {tmp_path.name} are too large for half"):
        export_lab_models.convert_to_half(tmp_path)


def test_every_kind_of_damage_is_named(copy, monkeypatch):
    assert list(assets.damage(copy)) == []
    weights = copy / "base" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (copy / "q-head" / "README.md").unlink()
    (copy / "extra").write_text("")
    described = "is missing or not the file that digests.json describes"
    assert list(assets.damage(copy)) == [
        f"{weights} {described}",
        f"{copy / 'extra'} is not described by digests.json",
        f"{copy / 'q-head' / 'README.md'} {described}",
    ]
    assets.write_digests(copy)
    monkeypatch.setattr(assets, "LARGEST", 1000)
    (text,) = assets.damage(copy)
    assert text.startswith(f"{copy} has ")
    assert text.endswith(" bytes, more than 1,000")
    digests = copy / assets.DIGESTS
    digests.write_text("{")
    assert list(assets.damage(copy)) == [
        f"{digests} is no readable JSON (damaged?): restore it, or make it anew"
    ]
    digests.unlink()
    (text,) = assets.damage(copy)
    assert text.startswith(f"{digests} is missing: git restores it, or python scripts/export_")


def test_the_demo_shows_five_ways(copy, capsys):
    assert demo.main(["--prompt", "Hi. How do I bake a cake?"]) == 0
    heading, *blocks = capsys.readouterr().out.split("\n\n")
    assert heading == "prompt: Hi. How do I bake a cake?"
    titles = [block.split(":")[0] for block in blocks]
    assert titles == list(LabModels.load().methods())
    assert all(", judge " in block and "(mean of 16: " in block for block in blocks)
    assert all(block.isascii() and "\x1b" not in block for block in blocks)
    base, dense = (block.split("\n", 1)[1] for block in blocks[:2])
    assert "[" not in base
    assert dense.startswith("[")
    assert "100% steered" in blocks[1]
    unknown = "the lab's judge knows no such topic, ask about: bake a cake, "
    assert demo.main(["--prompt", "what is love ?"]) == 0
    printed = capsys.readouterr().out
    assert unknown in printed
    assert "mean of" not in printed


def test_compare_steers_the_lab_without_training(copy, capsys):
    assert compare.main(["--prompt", "how do i bake a cake ?", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("base (")
    shutil.rmtree(copy)
    for command in (compare, demo):
        assert command.main(["--prompt", "hi"]) == 2
        assert f"error: there are no models of the lab in {copy}" in capsys.readouterr().err


@pytest.mark.parametrize("lexicon", ["words", "subwords"])
def test_prompts_name_their_items(lexicon):
    world = World(WorldConfig(0, lexicon))
    rng = random.Random(0)
    for _ in range(300):
        prompt = world.prompt(rng)
        assert item_of(world, prompt.text) == prompt.item
        asked = prompt.text.capitalize().replace(" ?", "?")
        assert item_of(world, asked) == prompt.item
    assert item_of(world, "what is love ?") is None


@committed
def test_the_committed_models_are_intact_and_respond_to_steering():
    """They are whole, of the profile lab, load in float32, and steering helps."""
    assert list(assets.damage(assets.ASSETS)) == []
    lab, profile = LabModels.load(), load_profile("lab")
    assert lab.model.dtype == torch.float32
    replicate = Replicate.open(profile, lab.settings.world)
    assert json.loads(lab.tokenizer.backend_tokenizer.to_str()) == json.loads(
        replicate.tokenizer.backend_tokenizer.to_str()
    )
    language = (lab.settings.lexicon, lab.settings.stumbles, lab.settings.max_new_tokens)
    of_profile = profile.language.lexicon, profile.language.stumbles
    assert language == (*of_profile, profile.decoding.max_new_tokens)
    prompts = export_lab_models.select(replicate.prompts["test"], 30)
    ids, means = lab.encode([prompt.text for prompt in prompts]), {}
    for name, steering in lab.methods().items():
        judged = [
            scores(lab.world, prompt.item, [response])[0]
            for prompt, response in zip(prompts, lab.respond(ids, steering), strict=True)
        ]
        means[name] = math.fsum(judged) / len(judged)
    assert min(means, key=means.get) == "base"
    assert means["dense"] > means["base"] + 0.5
    for part in PARTS:
        assert "+changes" not in (assets.ASSETS / part / "README.md").read_text()

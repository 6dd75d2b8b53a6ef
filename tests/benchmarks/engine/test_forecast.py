"""Memory and hours before a run, and how models are spread over GPUs, on GPUs that are made up."""

import io
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import Options, estimate
from benchmarks.engine.estimate import figure_hours
from benchmarks.engine.forecast import announce, forecast, slowdown
from benchmarks.engine.run import workers_for
from benchmarks.runtime.memory import memory_errors
from benchmarks.spec.cells import CellRequest, FigureCells
from benchmarks.spec.model_kinds import value_kind
from benchmarks.spec.profile import Hardware, Source, load_profile
from benchmarks.subjects.hub.memory import gpus_each, unknown_sizes, weight_bytes
from benchmarks.subjects.hub.models import HubModels

PROFILE = load_profile("qwen3-8b")
STEERED = CellRequest(0, "qwen3", scorer=value_kind("mean"), gate="entropy", target_ratio=0.2)
NEEDS = FigureCells([STEERED, CellRequest(0, "qwen3")])
HARDWARE = Hardware("cuda", "bfloat16", 64)
HOURS = figure_hours(PROFILE, {"run": NEEDS})["run"]


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that fakes GPUs of a given number, name and size in GB."""

    def pretend(count: int, name: str = "NVIDIA H100 80GB HBM3", gigabytes: float = 80):
        card = SimpleNamespace(name=name, total_memory=gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)

    return pretend


@pytest.mark.parametrize(
    ("count", "name", "gigabytes", "message", "factor"),
    [
        (0, "", 0, "needs 44 GB for each worker, and 13 min of one H100", 1),
        (1, "NVIDIA H100 80GB HBM3", 80, "needs 44 GB and about 13 min on this card (NVIDIA H", 1),
        (4, "NVIDIA H100 80GB HBM3", 80, "about 3 min on these 4 cards (NVIDIA H", 1 / 4),
        (4, "NVIDIA L4", 24, "on these 4 cards, 3 for each worker (NVIDIA L4)", 3350 / 300),
        (1, "NVIDIA B900", 300, "on this card (NVIDIA B900, taken for a H100)", 1),
        (1, "NVIDIA A10G", 24, "; that is more than 24 GB: use a smaller", 989 / 70),
    ],
)
def test_memory_and_hours_follow_the_card(gpus, count, name, gigabytes, message, factor):
    gpus(count, name, gigabytes)
    sentence, hours = forecast(PROFILE, NEEDS, HARDWARE)
    assert message in sentence
    assert hours == pytest.approx(HOURS * factor)


def test_more_responses_together_need_more_memory(gpus):
    gpus(1)
    small, large = (forecast(PROFILE, NEEDS, replace(HARDWARE, batch_size=n))[0] for n in (1, 512))
    assert (small.split()[1], large.split()[1]) == ("34", "115")


def test_fewer_responses_together_take_longer(gpus):
    gpus(1)
    hours_of_4, hours_of_64 = (
        forecast(PROFILE, NEEDS, replace(HARDWARE, batch_size=size))[1] for size in (4, 64)
    )
    assert hours_of_4 > 8 * hours_of_64


def test_every_known_card_is_compared():
    assert slowdown("NVIDIA H100 PCIe") == pytest.approx(3350 / 2000)
    assert slowdown("NVIDIA H200") == pytest.approx(1.0)
    assert slowdown("TPU") is None


@pytest.mark.parametrize(
    ("terminal", "reply", "asks"),
    [(True, "\n", True), (True, "n\n", True), (True, "", True), (False, "n\n", False)],
)
def test_confirmation_is_requested_only_on_a_terminal(
    gpus, monkeypatch, capsys, terminal, reply, asks
):
    gpus(1)
    stdin = io.StringIO(reply)
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    if asks and reply != "\n":
        with pytest.raises(ValueError, match="not started, as you answered"):
            announce(PROFILE, NEEDS, HARDWARE)
    else:
        announce(PROFILE, NEEDS, HARDWARE)
    printed = capsys.readouterr().out
    assert printed.startswith("qwen3-8b: needs 44 GB and about 13 min on this card")
    assert ("continue? [Y/n] " in printed) == asks


@pytest.mark.parametrize(
    ("count", "gigabytes", "each", "device"),
    [(1, 80, 1, "cuda"), (4, 80, 1, "auto"), (4, 24, 3, "auto"), (4, 4, 4, "auto")],
)
def test_models_that_do_not_fit_are_spread(gpus, count, gigabytes, each, device):
    """A worker of one GPU sees no other, so that its models go there."""
    gpus(count, gigabytes=gigabytes)
    profile = replace(PROFILE, hardware=HARDWARE)
    workers = workers_for(profile, "local")
    assert (workers.gpus, workers.gpus_each) == (count, each)
    assert HubModels(profile)._place("base")[1]["device_map"] == device
    assert HubModels.gpus_each(replace(profile, hardware=Hardware("cpu", "float32", 4))) == 1


def test_the_size_of_a_local_model_is_that_of_its_files(tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"x" * 100)
    assert weight_bytes(Source(str(tmp_path)), "bfloat16") == 200
    local = Source(str(tmp_path))
    assert weight_bytes(Source(str(tmp_path), backbone=str(tmp_path)), "bfloat16") == 400
    for hub in (replace(local, backbone="owner/name"), Source("owner/name", backbone=local.id)):
        assert weight_bytes(hub, "bfloat16") == 0
    (tmp_path / "adapter_config.json").touch()  # of a backbone that is elsewhere
    assert weight_bytes(local, "bfloat16") == 0
    assert weight_bytes(Source("owner/name", billions=8.0), "bfloat16") == 16e9
    assert weight_bytes(Source("owner/name", billions=8.0), "float32") == 32e9
    assert gpus_each(1.0, 80e9, 0) == 1


def test_models_of_unknown_size_are_named(gpus, capsys):
    gpus(1)
    hub, head = Source("owner/name"), {"junction-mean": Source("owner/gate")}
    profile = replace(PROFILE, models=PROFILE.models | {"base": hub, "reward": hub} | head)
    sentence = "the size of {} is not known and counts as nothing: state its billions"
    both = sentence.format("models.base, models.reward")
    assert unknown_sizes(profile, profile.models) == both
    announce(profile, NEEDS, HARDWARE)  # which asks no reward model
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"qwen3-8b: {sentence.format('models.base')}"
    estimate(profile, Options())
    assert capsys.readouterr().out.splitlines()[1] == both


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (64, torch.OutOfMemoryError("CUDA"), "measuring sia, 64 responses together: use BATCH_SIZ"),
        (64, RuntimeError("DefaultCPUAllocator: can't allocate memory"), "use BATCH_SIZE=32$"),
        (64, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "use BATCH_SIZE=32$"),
        (64, MemoryError("Unable to allocate 3 GiB"), "use BATCH_SIZE=32$"),
        (1, torch.OutOfMemoryError("CUDA"), "one at a time: use a device with more memory, or sm"),
    ],
)
def test_out_of_memory_errors_name_the_setting(rows, error, message):
    with (
        pytest.raises(ValueError, match=f"out of memory while .*{message}"),
        memory_errors("measuring sia", rows, "responses", "BATCH_SIZE="),
    ):
        raise error
    with pytest.raises(RuntimeError, match="other"), memory_errors("x", 2, "", ""):
        raise RuntimeError("other")

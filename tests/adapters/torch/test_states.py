"""Saved states: exact to the bit, safe from each other, and never read when damaged."""

import resource
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch

from crucible_kitchen.errors import BackendUserError, IntegrityError, StorageFull
from crucible_kitchen.types import AdamParams, Datum, LoraSpec, SessionSpec, StateRef
from crucible_kitchen_torch.accumulate import Accumulation
from crucible_kitchen_torch.options import TorchOptions
from crucible_kitchen_torch.states import write_state
from crucible_kitchen_torch.trainer import Trainer

DROPOUT = LoraSpec(4, dropout=0.2)
KINDS = {"tiny": ("tiny", None), "tiny-lora": ("tiny", DROPOUT), "llama": (None, None), "llama-lora": (None, DROPOUT)}


def save(trainer, name):
    return write_state(trainer.directory, name, *trainer.copy_state())


def opened(directory, model="tiny", lora=None, seed=0):
    options = TorchOptions("cpu", "float32", None, 32, deterministic=False)
    return Trainer(SessionSpec(str(model), lora, seed, str(directory)), options)


def train(trainer, steps):
    for _ in range(steps):
        rows = [Datum.from_tokens([trainer.position + i + k for k in range(4 + i)], [1] * (4 + i)) for i in range(6)]
        total = Accumulation()
        list(trainer.gradient(rows, "cross_entropy", total, None))
        trainer.apply(total, AdamParams(1e-2 / (1 + trainer.position), grad_clip_norm=1.0), 1 / 6)


def weights(trainer):
    return dict(trainer.model.module.named_parameters())


def same(one, other):
    return weights(one).keys() == weights(other).keys() and all(
        torch.equal(p, weights(other)[n]) for n, p in weights(one).items()
    )


def path_of(state):
    return Path(urlparse(state.uri).path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 3])
def test_training_on_from_a_state_equals_training_on(tmp_path, llama, kind, before):
    model, lora = KINDS[kind][0] or llama, KINDS[kind][1]
    first = opened(tmp_path, model, lora)
    train(first, before)
    seeds = [first.rng.next_seed()]
    state = save(first, "middle")
    train(first, 3)
    seeds.append(first.rng.next_seed())
    second = opened(tmp_path, model, lora, seed=5)
    train(second, 1)  # neither its seed nor what it did before must matter
    second.load(state)
    assert second.position == state.step == before
    train(second, 3)
    assert same(first, second)
    assert second.rng.next_seed() == seeds[1]
    assert seeds[0] != seeds[1]


def test_a_state_of_a_name_replaces_the_older_one_and_leaves_nothing_else(tmp_path):
    trainer = opened(tmp_path)
    one = save(trainer, "best")
    train(trainer, 1)
    two = save(trainer, "best")
    assert one.uri == two.uri
    assert one.sha256 != two.sha256
    assert [p.name for p in tmp_path.iterdir()] == ["best.safetensors"]
    assert path_of(two).stat().st_size == two.size
    with pytest.raises(IntegrityError):
        trainer.load(one)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "/etc/x", "a\\b", "x" * 200, "nul\x00"])
def test_a_name_cannot_leave_the_directory(tmp_path, name):
    with pytest.raises(BackendUserError):
        save(opened(tmp_path), name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_state_is_refused_and_changes_nothing(tmp_path, damage):
    trainer = opened(tmp_path)
    state = save(trainer, "a")
    train(trainer, 1)
    path = path_of(state)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flip" else data[:100])
    if damage == "gone":
        path.unlink()
    untouched = opened(tmp_path)
    train(untouched, 1)
    with pytest.raises(IntegrityError):
        trainer.load(state)
    assert same(trainer, untouched)
    assert trainer.position == 1


def test_a_state_of_another_model_is_refused_and_changes_nothing(tmp_path, llama):
    state = save(opened(tmp_path, llama, LoraSpec(2)), "other")
    trainer = opened(tmp_path)
    with pytest.raises(BackendUserError, match="other trained weights"):
        trainer.load(state)
    assert same(trainer, opened(tmp_path))


def test_a_state_without_hash_is_still_parsed_with_care(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not a state")
    with pytest.raises(IntegrityError):
        opened(tmp_path).load(StateRef((tmp_path / "x.safetensors").as_uri(), 0))


def test_no_room_for_a_state_keeps_the_older_one_whole(tmp_path):
    trainer = opened(tmp_path)
    state = save(trainer, "a")
    train(trainer, 1)
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, kept[1]))  # as a full disk: the file cannot grow beyond
    try:
        with pytest.raises(StorageFull):
            save(trainer, "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    trainer.load(state)
    assert same(trainer, opened(tmp_path))

"""What training holds: one base for many sessions, smaller micro-batches on a lack of memory, scores in pieces."""

import gc

import anyio
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crucible_kitchen.errors import OutOfMemory
from crucible_kitchen.types import AdamParams, Datum, LoraSpec, SessionSpec
from crucible_kitchen_torch import TorchTrainingClient
from crucible_kitchen_torch.accumulate import Accumulation
from crucible_kitchen_torch.faults import torch_errors
from crucible_kitchen_torch.logprobs import SCORES_AT_ONCE, token_logprobs
from crucible_kitchen_torch.options import TorchOptions
from crucible_kitchen_torch.trainer import Trainer

DATUMS = [Datum.from_tokens(list(range(5, 5 + n)), [1] * n) for n in (21, 37, 13, 37)]


def lora(tmp_path, model, seed):
    return SessionSpec(str(model), LoraSpec(4), seed, str(tmp_path / str(seed)))


async def losses(session, steps):
    found = []
    for k in range(steps):
        async with session.step(k) as step:
            gradient = await step.forward_backward(DATUMS)
            applied = await step.apply(AdamParams(1e-2), scale=0.1)
            found.append((await gradient).loss)
            await applied
    return found


@pytest.mark.anyio
async def test_lora_sessions_of_one_client_share_the_base_and_train_at_the_same_time_as_if_alone(tmp_path, llama):
    alone = []
    for seed in (0, 1):
        async with TorchTrainingClient(threads=1).open_session(lora(tmp_path, llama, seed)) as session:
            alone.append(await losses(session, 4))
    together = [[], []]
    client = TorchTrainingClient(threads=1)
    async with (
        client.open_session(lora(tmp_path, llama, 0)) as one,
        client.open_session(lora(tmp_path, llama, 1)) as other,
    ):

        async def train(seed, session):
            together[seed] = await losses(session, 4)

        async with anyio.create_task_group() as group:
            group.start_soon(train, 0, one)
            group.start_soon(train, 1, other)
        pointers = [
            {p.data_ptr() for p in s.trainer.model.module.parameters() if not p.requires_grad} for s in (one, other)
        ]
    assert together == alone
    assert alone[0] != alone[1]
    assert pointers[0] == pointers[1]


@pytest.mark.anyio
async def test_a_shared_base_is_freed_with_its_last_session_and_never_trained_by_another(tmp_path, llama):
    client = TorchTrainingClient(threads=1)
    async with client.open_session(lora(tmp_path, llama, 0)) as session:
        base = {p.data_ptr() for p in session.trainer.model.module.parameters()}
        spec = SessionSpec(str(llama), None, 0, str(tmp_path / "all"))
        async with client.open_session(spec) as whole:
            assert not base & {p.data_ptr() for p in whole.trainer.model.module.parameters()}
        assert len(client._bases._held) == 1
    del session, whole
    gc.collect()
    assert len(client._bases._held) == 0


class Narrow:
    """A model on a device with too little memory for more than so many positions."""

    def __init__(self, inner, most):
        self._inner, self._most = inner, most

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def hidden(self, tokens, lengths):
        if tokens.numel() > self._most:
            raise torch.OutOfMemoryError("out of memory")
        return self._inner.hidden(tokens, lengths)


def narrow(tmp_path, most):
    options = TorchOptions("cpu", "float32", None, 4096, deterministic=False, verify_invariance="off")
    trainer = Trainer(SessionSpec("tiny", None, 0, str(tmp_path)), options)
    trainer.model = Narrow(trainer.model, most)
    return trainer


def call(trainer, datums=DATUMS):
    total = Accumulation()
    result = list(trainer.gradient(datums, "cross_entropy", total, None))[-1]
    return result, torch.cat([g.flatten() for g in total.total()])


def test_a_lack_of_memory_halves_the_micro_batches_once_and_says_so(tmp_path):
    (_, expected), trainer = call(narrow(tmp_path, 10**6)), narrow(tmp_path, 60)
    result, g = call(trainer)
    assert float((g - expected).norm() / expected.norm()) <= 1e-6
    assert result.metrics == {"microbatch_halved": 1}
    assert call(trainer)[0].metrics == {}


def test_a_lack_of_memory_that_halving_does_not_help_is_an_error_and_leaves_the_session_usable(tmp_path):
    trainer = narrow(tmp_path, 34)
    for _ in range(2):
        with pytest.raises(OutOfMemory) as error, torch_errors():
            call(trainer)
        assert "tokens_per_microbatch" in error.value.hint
    assert call(trainer, [DATUMS[0], DATUMS[2]])[0].loss > 0


class Largest(TorchDispatchMode):
    """The most elements that any result of an operation has, backward included."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor):
                self.most = max(self.most, t.numel())
        return out


def test_no_scores_of_all_positions_exist_at_once_in_either_direction():
    vocab_size, positions, width = 49_152, 1024, 8
    torch.manual_seed(0)
    hidden = torch.randn(positions, width, requires_grad=True)
    head = torch.nn.Linear(width, vocab_size, bias=False)
    with Largest() as seen:
        token_logprobs(hidden, head, torch.randint(0, vocab_size, (positions,)), vocab_size).sum().backward()
    assert seen.most <= SCORES_AT_ONCE < positions * vocab_size


def test_a_step_reports_its_peak_of_memory(tmp_path):
    trainer = narrow(tmp_path, 10**6)
    total = Accumulation()
    list(trainer.gradient(DATUMS, "cross_entropy", total, None))
    assert trainer.apply(total, AdamParams(1e-3), 1.0).metrics["peak_memory_bytes"] > 1e7
    assert np.isfinite(trainer.position)

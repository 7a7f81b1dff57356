"""The adapter ``training_client.torch``: options, capabilities, and sessions each with a thread of its own.

Loads no torch until a session opens. Read next: ``session.py``.
"""

import os
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from crucible_kitchen.errors import CapabilityError, MissingExtra
from crucible_kitchen.ports.training_client import TrainingCapabilities, TrainingSession
from crucible_kitchen.types import JsonObject, SessionSpec
from crucible_kitchen.workers import Lane
from crucible_kitchen_torch.bases import BaseModels
from crucible_kitchen_torch.options import TorchOptions

if TYPE_CHECKING:
    from crucible_kitchen_torch.trainer import Trainer

__all__ = ["TorchTrainingClient"]


class TorchTrainingClient:
    """Trains and samples in this process with torch.

    Models: ``tiny`` (built in), a local directory, a .gguf file or a hub id of transformers; LoRA or all weights.
    LoRA sessions of one client on one model share its weights.
    For ``cross_entropy`` only positions whose weight is not zero are computed; ``logprobs`` is NaN elsewhere.

    Args:
        device: ``auto`` (a GPU if there is one), or a device of torch.
        dtype: numbers of computation: ``float32``, ``float64``, or ``bfloat16`` and ``float16`` for products only, with
            weights, gradients and optimizer in float32. ``auto`` takes bfloat16 on a GPU that has it; on a CPU it tries
            both once, in milliseconds, and logs which it took: without native bfloat16 float32 is by far the fastest.
        threads: cores for each operation; None leaves it to torch.
        tokens_per_microbatch: most positions of one forward and backward.
        deterministic: refuse operations whose result changes from run to run; needed for equal bits on a GPU.
        verify_invariance: before the first step, compare the gradient of the first batch between two splits into
            micro-batches, which costs that batch's gradient once more; ``auto`` does so on a CPU in float32 for models
            of less than 10^9 parameters. The step's metrics say what it cost and found.
        sampling_rows: most samples that a sampler decodes together in ``fast`` mode; others wait.
        sampling_cache_tokens: most tokens, padding counted, in the key-value cache of a sampler's batch; others wait.
            A sample that needs more alone is decoded alone.

    Raises:
        ConfigError: an option has no such value.
    """

    synthetic = False

    def __init__(
        self,
        *,
        device: str = "auto",
        dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "float32",
        threads: int | None = None,
        tokens_per_microbatch: int = 1024,
        deterministic: bool = False,
        verify_invariance: Literal["auto", "on", "off"] = "auto",
        sampling_rows: int = 256,
        sampling_cache_tokens: int = 1 << 16,
    ) -> None:
        self._options = TorchOptions(
            device,
            dtype,
            threads,
            tokens_per_microbatch,
            deterministic,
            verify_invariance,
            sampling_rows,
            sampling_cache_tokens,
        )
        self._bases = BaseModels()

    @property
    def capabilities(self) -> TrainingCapabilities:
        """See ``TrainingClient``."""
        return TrainingCapabilities(
            step_scale="exact",
            losses=frozenset({"cross_entropy"}),
            custom_loss="honoured",
            recovery="rollback",
            ordered_accumulation=True,
            lora=True,
            full_weights=True,
            sampling=True,
            export=True,
            entropy=True,
            value_head=True,
            topk_logprobs=True,
            full_logits=True,
            reference=True,
            mlp=True,
            shared_prefix=True,
            reproducible=True,
        )

    def open_session(self, spec: SessionSpec) -> AbstractAsyncContextManager[TrainingSession]:
        """See ``TrainingClient``."""
        return self._open(spec)

    def _check(self, spec: SessionSpec) -> None:
        """Refuse what is asked for and not there.

        Raises:
            CapabilityError: see ``TrainingClient.open_session``.
        """
        if (spec.model == "mlp") != (spec.mlp is not None):
            raise CapabilityError(
                "the model mlp, and no other, takes the sizes of observations and actions",
                hint="model=mlp is for environments of observations, for instance env=gymnasium:CartPole-v1",
            )

    @asynccontextmanager
    async def _open(self, spec: SessionSpec) -> AsyncGenerator[TrainingSession, None]:
        self._check(spec)
        async with Lane("torch") as lane:
            trainer = await lane.run(_load, spec, self._options, self._bases)
            from crucible_kitchen_torch.session import TorchSession

            capabilities = replace(
                self.capabilities,
                reproducible=trainer.reproducible,
                value_head=trainer.value is not None,
                reference=spec.reference,
                shared_prefix=trainer.model.shares,
                sampling=spec.mlp is None,
            )
            async with TorchSession.opened(trainer, lane, capabilities) as session:
                yield session

    def public_options(self) -> JsonObject:
        """See ``Adapter``."""
        return self._options.to_json()

    async def aclose(self) -> None:
        """See ``Adapter``; sessions close with their own blocks."""


def _load(spec: SessionSpec, options: TorchOptions, bases: BaseModels) -> "Trainer":
    """Import torch and open the model, in the lane's thread: both take seconds.

    OpenMP's threads sleep while they wait, unless the environment says otherwise: where something else wants the
    cores too, threads that spin make a step of the tiny model ten times slower (``benchmarks/bench_threads.py``).
    OpenMP reads the variable when torch is first imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtra("torch", "torch") from error
    import crucible_kitchen_torch.session  # noqa: F401 - what the session needs is imported off the loop as well
    from crucible_kitchen_torch.faults import torch_errors
    from crucible_kitchen_torch.trainer import Trainer

    with torch_errors():
        return Trainer(spec, options, bases)

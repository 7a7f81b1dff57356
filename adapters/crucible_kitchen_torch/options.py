"""The executor's options, as the adapter was given them.

Knows no torch: the client checks them when it is constructed. Read next: ``client.py``.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from crucible_kitchen.errors import ConfigError

__all__ = ["DTYPES", "TorchOptions"]

DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class TorchOptions:
    """See ``TorchTrainingClient``, whose keywords these are."""

    device: str
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"]
    threads: int | None
    tokens_per_microbatch: int
    deterministic: bool
    verify_invariance: Literal["auto", "on", "off"] = "auto"
    sampling_rows: int = 256
    sampling_cache_tokens: int = 1 << 16

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not known", hint=f"one of {', '.join(DTYPES)}")
        if self.verify_invariance not in ("auto", "on", "off"):
            raise ConfigError("verify_invariance is auto, on or off")
        if self.threads is not None and self.threads < 1:
            raise ConfigError("threads must be 1 or more", hint="leave it unset to use every core")
        if self.tokens_per_microbatch < 1:
            raise ConfigError("tokens_per_microbatch must be 1 or more")
        if self.sampling_rows < 1 or self.sampling_cache_tokens < 1:
            raise ConfigError("sampling_rows and sampling_cache_tokens must be 1 or more")

    def to_json(self) -> dict[str, Any]:
        """Return the options for a manifest."""
        return asdict(self)

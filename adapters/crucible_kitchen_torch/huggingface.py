"""Causal language models of transformers, with adapters of peft, as the executor uses them.

Knows transformers and peft, not training. Code that comes with a model is never run. Read next: ``models.py``, the
protocol it fulfils.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from crucible_kitchen.errors import CapabilityError, ConfigError, MissingExtra, ModelNotFound
from crucible_kitchen.hub_tokenizer import HubTokenizer
from crucible_kitchen.types import ExportedModel, LoraSpec, SessionSpec
from crucible_kitchen_torch.bases import BaseModels, Loaded, fingerprint
from crucible_kitchen_torch.faults import storage_errors
from crucible_kitchen_torch.lora import check_targets
from crucible_kitchen_torch.models import ModelFacts
from crucible_kitchen_torch.placement import Placement
from crucible_kitchen_torch.unpadded import Joins, among_many, positions, runs
from crucible_kitchen_torch.unpadded_hf import separated, use_unpadded

__all__ = ["HuggingFaceModel"]

_log = logging.getLogger(__name__)

_PROBE_TOLERANCE = (
    1e-2  # what another arithmetic may do, half precision included; a row that sees another does far more
)


class HuggingFaceModel:
    """``CausalModel`` of an ``AutoModelForCausalLM``.

    Args:
        causal: the model, with adapters injected if there are any.
        peft: peft's wrapper around it, or None.
        tokenizer: its tokenizer.
        name: what it was opened as.
    """

    module: Module
    from_seed = False

    def __init__(self, causal: Any, peft: Any, tokenizer: HubTokenizer, name: str) -> None:
        self._name = name
        self.module = causal
        self._causal = causal
        self._peft = peft
        self.tokenizer = tokenizer
        self.facts = _facts(causal, tokenizer)
        self._decoder = causal.get_decoder()
        self._split = self._can_split()
        self.joins_rows = self._can_join()
        self.shares = self.joins_rows and self._can_share()
        self._base: Loaded | None = None  # kept alive for the sessions that share it

    @classmethod
    def open(cls, spec: SessionSpec, place: Placement, path: Path | None, bases: BaseModels) -> "HuggingFaceModel":
        """Load model and tokenizer from a directory, a .gguf file or the hub; a base for adapters only once."""
        base: Loaded | None = None
        if spec.lora is None:
            causal, inner = _load(spec.model, path, place)
        else:
            key = (spec.model, fingerprint(path), place)
            base = bases.get(key, lambda: Loaded(*_load(spec.model, path, place)))
            causal, inner = base.shared()
        eos = causal.config.get_text_config().eos_token_id
        eos = eos[0] if isinstance(eos, list) and eos else eos
        vocab_size = int(causal.get_input_embeddings().weight.shape[0])
        _check_vocabulary(inner, vocab_size)
        tokenizer = HubTokenizer(inner, vocab_size, spec.chat_template, eos)
        peft = _add_lora(causal, spec.lora) if spec.lora is not None else None
        found = cls(causal, peft, tokenizer, spec.model)
        found._base = base
        return found

    @torch.no_grad()
    def _can_split(self) -> bool:
        """Whether the output layer applied to the decoder's states gives the model's own scores.

        It does for most; some cap or scale the scores afterwards, and then only the whole model tells the truth.
        """
        probe = torch.tensor([[1, 2, 3, 2]], device=self._causal.device) % self.facts.vocab_size
        states = self._decoder(input_ids=probe, use_cache=False).last_hidden_state
        whole = self._causal(input_ids=probe, use_cache=False).logits
        parts = self._causal.get_output_embeddings()(states)
        same = parts.shape == whole.shape and torch.allclose(parts, whole, rtol=1e-4, atol=1e-5)
        if not same:
            _log.info(
                "%s changes its scores after the output layer: scores are computed whole", self.facts.architecture
            )
        return same

    @torch.no_grad()
    def _can_join(self) -> bool:
        """Whether rows that stand one after another are computed as they are alone."""
        lengths = [5, 3, 3, 1]
        probe = torch.arange(1, 1 + sum(lengths), device=self._causal.device) % self.facts.vocab_size
        if use_unpadded(self._causal):
            alone = torch.cat([self._states(row[None])[0] for row in torch.split(probe, lengths)])
            scale = max(1.0, float(alone.abs().max()))
            try:
                if float((self._in_rows(probe, lengths) - alone).abs().max()) <= _PROBE_TOLERANCE * scale:
                    return True
            except (ValueError, TypeError, AttributeError, KeyError, IndexError):
                pass  # its layers read the mask, which ours is not
            self._causal.set_attn_implementation("sdpa")
        _log.info(
            "%s takes no attention function: rows of different lengths are computed apart", self.facts.architecture
        )
        return False

    @torch.no_grad()
    def _can_share(self) -> bool:
        """Whether a row that continues another is computed as it is whole."""
        probe = torch.arange(1, 10, device=self._causal.device) % self.facts.vocab_size
        whole = torch.cat([probe[:3], probe[6:]])
        alone = torch.cat([self._states(row[None])[0] for row in (probe[:6], whole)])[[*range(6), *range(9, 12)]]
        try:
            shared = self._in_rows(probe, [6, 3], {1: (0, 3)})
        except (ValueError, TypeError, AttributeError, KeyError, IndexError):
            return False  # its masks are made for whole rows
        return float((shared - alone).abs().max()) <= _PROBE_TOLERANCE * max(1.0, float(alone.abs().max()))

    def hidden(self, tokens: Tensor, lengths: Sequence[int], joins: Joins | None = None) -> Tensor:
        """See ``CausalModel``; the scores themselves where the model cannot be split."""
        return self._in_rows(tokens, lengths, joins) if self.joins_rows else self._by_length(tokens, lengths)

    def _by_length(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Compute rows of one length that stand together in a pass of their own.

        Padding would take fewer passes, but attention over more columns adds in another order: in float32 the gradient
        of a row would depend on its neighbours by up to 3e-6.
        """
        found = runs(lengths)
        parts = torch.split(tokens, [run.rows * run.length for run in found])
        rows = [part.view(run.rows, -1) for part, run in zip(parts, found, strict=True)]
        return torch.cat([among_many(self._states, part, part.numel()).flatten(0, 1) for part in rows])

    def _in_rows(self, tokens: Tensor, lengths: Sequence[int], joins: Joins | None = None) -> Tensor:
        with separated(lengths, joins):
            return self._states(tokens[None], position_ids=positions(lengths, tokens.device, joins)[None])[0]

    def _states(self, tokens: Tensor, **given: Tensor) -> Tensor:
        if self._split:
            return self._decoder(input_ids=tokens, use_cache=False, **given).last_hidden_state  # type: ignore[no-any-return]
        return self._causal(input_ids=tokens, use_cache=False, **given).logits  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """See ``CausalModel``."""
        return self._causal.get_output_embeddings()(hidden) if self._split else hidden

    @property
    def value_width(self) -> int:
        """See ``CausalModel``."""
        return self.facts.hidden_size

    def valued(self, hidden: Tensor) -> Tensor:
        """See ``CausalModel``."""
        return hidden

    def next_scores(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """See ``CausalModel``."""
        out = self._causal(
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1], out.past_key_values

    def export(self, directory: Path) -> ExportedModel:
        """Write adapters (``peft``) or the whole model (``transformers``), and the tokenizer."""
        with storage_errors("the exported model"):
            if self._peft is not None:
                with _without_peft_warnings():
                    self._peft.save_pretrained(directory, save_embedding_layers=False)
            else:
                self._causal.save_pretrained(directory)
            self.tokenizer.inner.save_pretrained(directory)
        files = tuple(sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()))
        return ExportedModel(str(directory), "peft" if self._peft is not None else "transformers", files, self._name)


def _facts(causal: Any, tokenizer: HubTokenizer) -> ModelFacts:
    config = causal.config.get_text_config()
    ends = {tokenizer.eos_id}
    generation = getattr(causal, "generation_config", None)
    more = getattr(generation, "eos_token_id", None)
    ends.update(more if isinstance(more, list) else [] if more is None else [more])
    return ModelFacts(
        architecture=type(causal).__name__,
        context_length=int(getattr(config, "max_position_embeddings", 0) or 2048),
        vocab_size=tokenizer.vocab_size,
        hidden_size=int(config.hidden_size),
        end_ids=frozenset(ends),
    )


def _load(model: str, path: Path | None, place: Placement) -> tuple[Any, Any]:
    """Load model and tokenizer.

    Raises:
        ModelNotFound: there is no such model, or its files cannot be read.
        MissingExtra: transformers, or gguf for a .gguf file, is not installed.
    """
    transformers = _transformers()
    source = str(path or model)
    options: dict[str, Any] = {"trust_remote_code": False}
    weights: dict[str, Any] = {}
    if path is not None and path.is_file():
        _require_gguf()
        source = str(path.parent)
        options["gguf_file"] = path.name
        if hasattr(transformers, "GgufConfig"):  # else it counts as quantized, which cannot be saved
            weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if path is not None:
        options["local_files_only"] = True
    try:
        causal, report = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=place.weights, output_loading_info=True, **options, **weights
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except (RuntimeError, MemoryError):
        raise  # torch's, translated where torch's are
    except Exception as error:  # a tokenizer's builder raises plain exceptions
        kind = "hub id" if path is None else "path"
        raise ModelNotFound(
            f"the {kind} {model!r} does not lead to a causal language model: {type(error).__name__}",
            hint="the directory needs config.json, tokenizer files and *.safetensors; a hub id needs a connection",
        ) from error
    _check_whole(model, sorted(report["missing_keys"]))
    causal.to(place.device)
    causal.eval()
    return causal, tokenizer


def _check_whole(model: str, missing: list[str]) -> None:
    """Check that every weight was in the files: transformers fills in random ones and only logs it.

    Raises:
        ModelNotFound: some were not.
    """
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelNotFound(
            f"the model {model!r} lacks weights: {', '.join(missing[:3])}{more}",
            hint="the directory needs all of the model's *.safetensors",
        )


def _check_vocabulary(tokenizer: Any, rows: int) -> None:
    """Check that the model has an embedding for every token of its tokenizer, those added to it left out.

    Readers of .gguf files add tokens that the model never had; a datum that used one would be refused.

    Raises:
        ConfigError: it has fewer.
    """
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"the tokenizer knows {tokenizer.vocab_size} tokens, but the model's vocabulary has {rows}",
            hint="use the tokenizer the model was trained with",
        )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", "torch") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtra("gguf", "torch") from error


def _add_lora(causal: Any, spec: LoraSpec) -> Any:
    """Inject adapters into the model in place and return peft's wrapper.

    Raises:
        CapabilityError: a target matches nothing, or peft cannot adapt it.
        MissingExtra: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtra("peft", "torch") from error
    check_targets(causal, spec.targets)
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(spec.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        with _without_peft_warnings():
            return peft.get_peft_model(causal, config)
    except ValueError as error:
        first = str(error).partition("\n")[0][:200]
        raise CapabilityError(f"the model cannot take these adapters: {first}", hint="set lora_targets") from error


@contextmanager
def _without_peft_warnings() -> Iterator[None]:
    """Keep to ourselves that peft asks for an attribute under its older name, and how GPT-2 lays out its weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield

"""Families of models: scored as transformers scores them, trained, restored, exported; broken ones are refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from crucible_kitchen.errors import BackendUserError, ConfigError, CrucibleError, ModelNotFound
from crucible_kitchen.types import AdamParams, Datum, LoraSpec, Message, SessionSpec
from crucible_kitchen_torch import TorchTrainingClient
from crucible_kitchen_torch.accumulate import Accumulation
from crucible_kitchen_torch.options import TorchOptions
from crucible_kitchen_torch.states import write_state
from crucible_kitchen_torch.trainer import Trainer

DATUMS = [Datum.from_tokens([5, 6, 7, 8, 9, 40, 41], [1] * 7), Datum.from_tokens([30, 20, 10], [1] * 3)]
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
FAMILIES = {
    "Llama": {},
    "SmolLM3": {"tie_word_embeddings": True},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Gemma": {},
    "Gemma3Text": {"sliding_window": 4},
    "Mistral": {"sliding_window": 4},
    "GPT2": {**GPT2, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3},
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request, llama, tmp_path_factory):
    """A directory with a random model of a family, and the tokenizer of the small Llama."""
    import transformers

    name = request.param
    directory = tmp_path_factory.mktemp(name)
    for file in llama.iterdir():
        if "token" in file.name or "chat" in file.name:
            shutil.copy(file, directory)
    values = FAMILIES[name] if name == "GPT2" else SHAPE | FAMILIES[name]
    config = getattr(transformers, f"{name}Config")(**values)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def save(trainer, name):
    return write_state(trainer.directory, name, *trainer.copy_state())


def opened(tmp_path, model, lora=None):
    options = TorchOptions("cpu", "float32", None, 4096, deterministic=False)
    return Trainer(SessionSpec(str(model), lora, 0, str(tmp_path)), options)


def train(trainer):
    total = Accumulation()
    list(trainer.gradient(DATUMS, "cross_entropy", total, None))
    return trainer.apply(total, AdamParams(1e-2), 0.1)


def look(trainer):
    return np.concatenate(list(trainer.forward(DATUMS))[-1])


@torch.no_grad()
def reference(directory):
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(directory).eval(), []
    for d in DATUMS:
        lp = model(torch.from_numpy(d.inputs["tokens"])[None], use_cache=False).logits[0].log_softmax(-1)
        found.append(lp.gather(1, torch.from_numpy(d.loss_inputs["target_tokens"])[:, None])[:, 0])
    return torch.cat(found).numpy()


def test_a_family_is_scored_as_transformers_does_trained_restored_and_exported(tmp_path, family):
    trainer = opened(tmp_path, family)
    assert trainer.model.joins_rows
    np.testing.assert_allclose(look(trainer), reference(family), rtol=0, atol=1e-5)
    assert train(trainer).metrics["invariance_difference"] <= 1e-5
    after, state = look(trainer), save(trainer, "one")
    train(trainer)
    later = look(trainer)
    trainer.load(state)
    assert np.array_equal(look(trainer), after)
    train(trainer)
    assert np.array_equal(look(trainer), later)
    directory = tmp_path / "export"
    directory.mkdir()
    trainer.export(str(directory))
    np.testing.assert_allclose(look(trainer), reference(directory), rtol=0, atol=1e-5)


def test_a_family_that_takes_no_attention_function_is_computed_by_length(tmp_path, llama, monkeypatch):
    grads = []
    for joins in (True, False):
        if not joins:
            monkeypatch.setattr("crucible_kitchen_torch.huggingface.use_unpadded", lambda _: False)
        trainer = opened(tmp_path, llama)
        assert trainer.model.joins_rows is joins
        total = Accumulation()
        list(trainer.gradient(DATUMS, "cross_entropy", total, None))
        grads.append(torch.cat([g.flatten() for g in total.total()]))
        np.testing.assert_allclose(look(trainer), reference(llama), rtol=0, atol=1e-5)
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) <= 1e-6


def test_a_family_is_trained_with_adapters(tmp_path, family):
    trainer = opened(tmp_path, family, LoraSpec(4))
    before = look(trainer)
    np.testing.assert_allclose(before, reference(family), rtol=0, atol=1e-5)  # adapters begin at zero
    train(trainer)
    assert look(trainer).sum() > before.sum()


def copied(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


def test_a_model_whose_shards_are_missing_is_refused(tmp_path, llama):
    from transformers import AutoModelForCausalLM

    directory = copied(llama, tmp_path)
    (directory / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(directory, max_shard_size="20KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(ModelNotFound) as error:
        opened(tmp_path, directory)
    assert "safetensors" in error.value.hint


def test_a_file_without_some_of_the_weights_is_refused(tmp_path, llama):
    from safetensors.torch import load_file, save_file

    directory = copied(llama, tmp_path)
    weights = load_file(directory / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFound, match="lacks") as error:
        opened(tmp_path, directory)
    assert "up_proj" in str(error.value)


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(tmp_path, llama):
    directory = copied(llama, tmp_path)
    file = directory / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"] |= {f"extra{i}": 261 + i for i in range(60)}
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="vocabulary") as error:
        opened(tmp_path, directory)
    assert error.value.hint


def test_a_tokenizer_without_chat_template_says_how_to_give_one(tmp_path, llama):
    directory = copied(llama, tmp_path)
    for file in directory.glob("chat_template*"):
        file.unlink()
    config = directory / "tokenizer_config.json"
    values = json.loads(config.read_text())
    values.pop("chat_template", None)
    config.write_text(json.dumps(values))
    trainer = opened(tmp_path, directory)
    with pytest.raises(ConfigError) as error:
        trainer.model.tokenizer.render_chat([Message("user", "hi")], generation_prompt=True)
    assert "chat_template" in error.value.hint
    train(trainer)


def test_an_unknown_dtype_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="int8") as error:
        TorchTrainingClient(dtype="int8")
    assert "float32" in error.value.hint


@pytest.mark.anyio
async def test_bad_input_leaves_the_session_usable(tmp_path, llama):
    async with TorchTrainingClient().open_session(SessionSpec(str(llama), None, 0, str(tmp_path))) as session:
        for bad in (Datum.from_tokens([1, 2, 999], [1] * 3), Datum.from_tokens([1] * 400, [1] * 400)):
            with pytest.raises(BackendUserError):
                await (await session.forward([bad]))
        assert len((await (await session.forward(DATUMS))).logprobs) == 2
        with pytest.raises(CrucibleError):
            await session.export(str(tmp_path / "nowhere"))
        assert session.position == 0

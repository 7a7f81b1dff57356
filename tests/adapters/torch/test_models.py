"""Models: where they come from, what can be trained of them, and how they leave."""

import json

import numpy as np
import pytest
import torch

from crucible_kitchen.errors import CapabilityError, ConfigError, IntegrityError, ModelNotFound, OutOfMemory
from crucible_kitchen.types import AdamParams, Datum, LoraSpec, Message, SessionSpec
from crucible_kitchen_torch import TorchTrainingClient
from crucible_kitchen_torch.accumulate import Accumulation
from crucible_kitchen_torch.faults import torch_errors
from crucible_kitchen_torch.options import TorchOptions
from crucible_kitchen_torch.tokenizers import ByteTokenizer
from crucible_kitchen_torch.trainer import Trainer

OPTIONS = TorchOptions("cpu", "float32", None, 4096, deterministic=False)
DATUMS = [Datum.from_tokens([5, 6, 7, 8, 9], [1] * 5), Datum.from_tokens([30, 20, 10], [1] * 3)]


def opened(tmp_path, model="tiny", *, lora=None, **spec):
    return Trainer(SessionSpec(str(model), lora, 0, str(tmp_path), **spec), OPTIONS)


def train(trainer, steps=2):
    for _ in range(steps):
        total = Accumulation()
        list(trainer.gradient(DATUMS, "cross_entropy", total, None))
        trainer.apply(total, AdamParams(1e-2), 1.0)


def look(trainer):
    return np.concatenate(list(trainer.forward(DATUMS))[-1])


def exported(trainer, tmp_path):
    directory = tmp_path / "export"
    directory.mkdir()
    return trainer.export(str(directory))


@pytest.mark.parametrize("lora", [None, LoraSpec(4)], ids=["all", "lora"])
def test_a_trained_tiny_model_is_exported_and_opened_again(tmp_path, lora):
    trainer = opened(tmp_path, lora=lora)
    train(trainer)
    model = exported(trainer, tmp_path)
    assert (model.format, model.files) == ("tiny", ("config.json", "model.safetensors"))
    again = opened(tmp_path, model.directory)
    np.testing.assert_allclose(look(again), look(trainer), rtol=1e-5)
    assert again.info.lora_rank == 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own, on loading
def test_exported_adapters_load_in_peft(tmp_path, llama):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = opened(tmp_path, llama, lora=LoraSpec(4))
    before = look(trainer)
    train(trainer)
    model = exported(trainer, tmp_path)
    assert (model.format, model.base_model) == ("peft", str(llama))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), model.directory).eval()
    assert np.abs(look(trainer) - before).max() > 1e-2
    np.testing.assert_allclose(scores(loaded), look(trainer), rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(model.directory).encode("a") == trainer.model.tokenizer.inner.encode("a")


def test_an_exported_model_loads_in_transformers(tmp_path, llama):
    from transformers import AutoModelForCausalLM

    trainer = opened(tmp_path, llama)
    train(trainer)
    model = exported(trainer, tmp_path)
    assert model.format == "transformers"
    np.testing.assert_allclose(
        scores(AutoModelForCausalLM.from_pretrained(model.directory)), look(trainer), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def scores(model):
    found = []
    for d in DATUMS:
        lp = model(torch.from_numpy(d.inputs["tokens"])[None]).logits[0].log_softmax(-1)
        found.append(lp.gather(1, torch.from_numpy(d.loss_inputs["target_tokens"])[:, None])[:, 0])
    return torch.cat(found).numpy()


def test_a_gguf_file_is_trained(tmp_path, gguf_file):
    trainer = opened(tmp_path, gguf_file, lora=LoraSpec(4))
    before = look(trainer)
    train(trainer)
    assert look(trainer).sum() > before.sum()
    assert trainer.model.tokenizer.decode(trainer.model.tokenizer.encode("abé")) == "abé"


def test_lora_trains_all_linear_layers_but_the_head(tmp_path, llama):
    for model in ("tiny", llama):
        trainer = opened(tmp_path, model, lora=LoraSpec(4))
        names = [n for n, p in trainer.model.module.named_parameters() if p.requires_grad]
        assert all("lora" in n for n in names)
        assert {n.split(".lora")[0].rsplit(".", 1)[-1] for n in names} == {
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        }
        chosen = opened(tmp_path, model, lora=LoraSpec(4, targets=("q_proj",)))
        assert 0 < chosen.info.trainable_parameters < trainer.info.trainable_parameters < trainer.info.parameters


@pytest.mark.parametrize("kind", ["tiny", "llama"])
def test_a_lora_target_that_matches_nothing_is_refused_with_what_there_is(tmp_path, llama, kind):
    model = llama if kind == "llama" else "tiny"
    with pytest.raises(CapabilityError, match="nothing_like_it") as error:
        opened(tmp_path, model, lora=LoraSpec(4, targets=("q_proj", "nothing_like_it")))
    assert "q_proj" in error.value.hint


@pytest.mark.anyio
@pytest.mark.parametrize("lora", [None, LoraSpec(4)], ids=["all", "lora"])
async def test_a_lora_target_that_matches_nothing_leaves_open_sessions_and_their_client_usable(tmp_path, llama, lora):
    client, datums = TorchTrainingClient(device="cpu", threads=1), [Datum.from_tokens([5, 6, 7], [1] * 3)]

    def spec(targets):
        return SessionSpec(str(llama), LoraSpec(4, targets=targets), 0, str(tmp_path))

    async with client.open_session(SessionSpec(str(llama), lora, 0, str(tmp_path))) as session:
        before = (await (await session.forward(datums))).logprobs
        with pytest.raises(CapabilityError, match="nothing_like_it"):
            async with client.open_session(spec(("nothing_like_it",))):
                pass
        after = (await (await session.forward(datums))).logprobs
        assert after[0].tobytes() == before[0].tobytes()
    async with client.open_session(spec(("q_proj",))) as session:
        assert len((await (await session.forward(datums))).logprobs) == 1


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/nowhere", "nowhere.gguf", "a/b/c", ""])
def test_a_path_that_leads_nowhere_is_not_found_without_a_connection(tmp_path, name):
    with pytest.raises(ModelNotFound) as error:
        opened(tmp_path, name)
    assert error.value.hint


def test_a_directory_without_a_model_is_not_found(tmp_path):
    with pytest.raises(ModelNotFound):
        opened(tmp_path, tmp_path)


def test_a_model_that_brings_its_own_code_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}})
    )
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ModelNotFound):
        opened(tmp_path, tmp_path)


def test_a_broken_export_is_an_integrity_error(tmp_path):
    model = exported(opened(tmp_path), tmp_path)
    weights = tmp_path / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(IntegrityError):
        opened(tmp_path, model.directory)


def test_a_model_that_caps_its_scores_is_computed_whole(tmp_path, llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, initializer_range=0.5, eos_token_id=1,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "gemma")
    trainer = opened(tmp_path, tmp_path / "gemma")
    expected = scores(AutoModelForCausalLM.from_pretrained(tmp_path / "gemma"))
    np.testing.assert_allclose(look(trainer), expected, rtol=1e-4, atol=1e-5)


def test_the_tokenizer_renders_with_the_models_template_or_the_one_given(tmp_path, llama):
    messages = [Message("user", "hi"), Message("assistant", "yo")]
    tokenizer = opened(tmp_path, llama).model.tokenizer
    assert tokenizer.chat
    assert tokenizer.render_chat(messages, generation_prompt=False) == tokenizer.encode(
        "<|user|>hi<|end|><|assistant|>yo<|end|>"
    )
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    for template in (str(tmp_path / "own.jinja"), "{% for m in messages %}[{{ m.content }}]{% endfor %}"):
        own = opened(tmp_path, llama, chat_template=template).model.tokenizer
        assert own.render_chat(messages, generation_prompt=True) == own.encode("[hi][yo]")
    refusing = opened(tmp_path, llama, chat_template="{{ raise_exception('no') }}").model.tokenizer
    with pytest.raises(ConfigError):
        refusing.render_chat(messages, generation_prompt=True)
    tokenizer.inner.chat_template = None
    with pytest.raises(ConfigError) as error:
        tokenizer.render_chat(messages, generation_prompt=True)
    assert "chat_template=" in error.value.hint
    with pytest.raises(ConfigError):
        opened(tmp_path, llama, chat_template="nowhere.jinja")


def test_the_tokenizer_of_a_model_knows_its_prefix_its_end_and_its_special_tokens(tmp_path, llama):
    tokenizer = opened(tmp_path, llama).model.tokenizer
    assert tokenizer.prefix_ids == (0,)
    assert tokenizer.eos_id == 1
    assert tokenizer.vocab_size == 300
    ids = tokenizer.encode("né<|end|>")
    assert ids[-1] == 1
    assert tokenizer.decode(ids) == "né"


def test_the_byte_tokenizer_keeps_any_text_and_opens_turns_with_roles():
    tokenizer = ByteTokenizer()
    for text in ("12+34=46", "né 漢字 🙂", "", "a\x00b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    rendered = tokenizer.render_chat([Message("user", "hi")], generation_prompt=True)
    assert rendered == tokenizer.encode("<|user|>hi<|end|><|assistant|>")
    assert tokenizer.decode(rendered) == "hi"
    with pytest.raises(ConfigError):
        tokenizer.render_chat([Message("wizard", "hi")], generation_prompt=False)


def test_options_are_checked_and_public():
    assert TorchTrainingClient().public_options()["dtype"] == "float32"
    for options in ({"dtype": "int8"}, {"threads": 0}, {"tokens_per_microbatch": 0}):
        with pytest.raises(ConfigError):
            TorchTrainingClient(**options)


def test_a_device_that_is_not_there_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError):
        Trainer(SessionSpec("tiny", None, 0, str(tmp_path)), TorchOptions("warp", "float32", None, 1, False))


def test_a_lack_of_memory_is_named():
    with pytest.raises(OutOfMemory) as error, torch_errors():
        torch.empty(1 << 60)
    assert error.value.hint
    with pytest.raises(OutOfMemory), torch_errors():
        raise MemoryError

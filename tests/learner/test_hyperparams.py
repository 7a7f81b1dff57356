"""Starting points: learning rates by size, and the LoRA's parameters counted by peft."""

import pytest

from crucible_kitchen.learner.hyperparams import LLAMA_LIKE, lora_parameter_count, recommended_learning_rate
from crucible_kitchen.types import SessionInfo


def info(model="m", architecture="LlamaForCausalLM", hidden_size=2048, lora_rank=0):
    return SessionInfo(model, architecture, 10**9, 10**6, 2048, 32000, hidden_size, lora_rank)


@pytest.mark.parametrize(
    ("architecture", "hidden_size", "lora", "rate"),
    [
        ("LlamaForCausalLM", 4096, True, 2.8564e-4),
        ("LlamaForCausalLM", 4096, False, 2.8564e-5),
        ("LlamaForCausalLM", 2000, True, 5e-4),
        ("Qwen3ForCausalLM", 4096, True, 4.7298e-4),
        ("GemmaForCausalLM", 8000, True, 2.5e-4),
        ("LlamaForCausalLM", 0, False, 5e-5),
        ("LlamaForCausalLM", 8, True, 1e-2),
    ],
)
def test_the_rate_follows_architecture_width_and_lora(architecture, hidden_size, lora, rate):
    ours = recommended_learning_rate(info(architecture=architecture, hidden_size=hidden_size), lora)
    assert ours == pytest.approx(rate, rel=1e-4)


def test_lora_takes_ten_times_the_rate_of_all_weights_and_wider_models_less():
    for hidden in (576, 1024, 4096):
        assert recommended_learning_rate(info(hidden_size=hidden), True) == pytest.approx(
            10 * recommended_learning_rate(info(hidden_size=hidden), False)
        )
    rates = [recommended_learning_rate(info(hidden_size=hidden), True) for hidden in (576, 1024, 4096)]
    assert rates == sorted(rates, reverse=True)


def test_the_tiny_model_is_trained_from_scratch():
    assert recommended_learning_rate(info("tiny", "tiny", 128), False) == 3e-3
    assert recommended_learning_rate(info("tiny", "tiny", 128), True) == 1e-2


LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}


def test_a_lora_of_rank_16_on_llama_3_8b_has_42_million_parameters():
    assert lora_parameter_count(LLAMA_8B, 16) == 41_943_040
    assert lora_parameter_count(LLAMA_8B, 1, ["q_proj"]) == 32 * 8192
    assert lora_parameter_count(LLAMA_8B, 1, ["k_proj"]) == 32 * (4096 + 1024)
    assert lora_parameter_count(LLAMA_8B, 2, ["lm_head"]) == 2 * (4096 + 128256)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers by an old name
@pytest.mark.parametrize("kind", sorted(LLAMA_LIKE))
@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj"), ("k_proj", "down_proj", "lm_head")])
def test_the_count_is_what_peft_makes(kind, targets):
    transformers = pytest.importorskip("transformers", reason="the reference is peft on transformers")
    peft = pytest.importorskip("peft", reason="the reference is peft on transformers")
    torch = pytest.importorskip("torch", reason="the reference is peft on transformers")
    config = transformers.AutoConfig.for_model(
        kind,
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=3,
        vocab_size=101,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=1,
    )
    written = config.to_diff_dict()  # what config.json holds
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        lora = peft.LoraConfig(r=4, target_modules=list(targets) or "all-linear", task_type="CAUSAL_LM")
        count = peft.get_peft_model(model, lora).get_nb_trainable_parameters()[0]
    assert lora_parameter_count(written, 4, targets) == count


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' are not known here; known: .*llama"),
        ({}, "None are not known"),
        ({**LLAMA_8B, "hidden_size": None}, "no 'hidden_size'"),
        ({**LLAMA_8B, "num_hidden_layers": "32"}, "no 'num_hidden_layers'"),
    ],
)
def test_what_cannot_be_counted_says_why(config, message):
    with pytest.raises(ValueError, match=message):
        lora_parameter_count(config, 8)


def test_a_target_or_rank_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="no module 'c_attn'; its modules: q_proj"):
        lora_parameter_count(LLAMA_8B, 8, ["c_attn"])
    with pytest.raises(ValueError, match="rank"):
        lora_parameter_count(LLAMA_8B, 0)

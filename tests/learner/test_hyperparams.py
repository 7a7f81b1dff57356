"""Starting points: learning rates by size, and the LoRA's parameters counted by peft."""

import pytest

from crucible_kitchen.learner.hyperparams import LLAMA_LIKE, lora_parameter_count, recommended_learning_rate
from crucible_kitchen.types import SessionInfo


def info(model="m", architecture="LlamaForCausalLM", hidden_size=2048, lora_rank=0):
    return SessionInfo(model, architecture, 10**9, 10**6, 2048, 32000, hidden_size, lora_rank)


def test_all_weights_of_a_billion_parameters_start_at_2e_5_and_wider_models_lower():
    assert recommended_learning_rate(info(hidden_size=2048), lora=False) == pytest.approx(2e-5)
    assert recommended_learning_rate(info(hidden_size=4096), lora=False) == pytest.approx(1e-5)


@pytest.mark.parametrize("hidden", [576, 1024, 2048, 8192])
def test_lora_takes_ten_times_the_rate_of_all_weights(hidden):
    full, lora = (recommended_learning_rate(info(hidden_size=hidden), lora=lora) for lora in (False, True))
    assert lora == pytest.approx(10 * full)


def test_tiny_models_are_trained_from_scratch_and_nothing_takes_a_higher_rate():
    tiny = recommended_learning_rate(info("tiny", "tiny", 128), lora=False)
    assert tiny == recommended_learning_rate(info("tiny", "tiny", 128), lora=True) == 2e-3
    for hidden in (256, 300, 4096):
        assert recommended_learning_rate(info(hidden_size=hidden), lora=True) <= tiny


def test_a_model_whose_width_is_not_told_is_not_taken_for_a_tiny_one():
    assert recommended_learning_rate(info(hidden_size=0), lora=True) == pytest.approx(2e-4)


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

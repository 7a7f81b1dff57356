"""Small real models: the built-in one, and a random Llama of transformers with a tokenizer and a chat template."""

from pathlib import Path

import pytest

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A directory with a random Llama of 2 layers and a byte-level tokenizer of 300 ids."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate([*specials, *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=specials[2:],
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
GPT = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 1, "initializer_range": 0.2}
FAMILIES = {
    "Mistral": SMALL | {"sliding_window": 8},
    "Gemma2": SMALL | {"sliding_window": 8},
    "Gemma3": SMALL | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "Qwen3": SMALL,
    "GPT2": GPT,
    "Bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 1},
}


@pytest.fixture
def random_model(tmp_path, llama):
    """Write a random model of a family, with the tokenizer of the small Llama, and return its directory."""

    def written(family: str) -> Path:
        import torch
        import transformers

        (directory := tmp_path / family).mkdir()
        name = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
        config = getattr(transformers, name)(**FAMILIES[family])
        torch.manual_seed(0)
        name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
        getattr(transformers, name)(config).save_pretrained(directory)
        for file in llama.glob("*token*"):
            (directory / file.name).write_bytes(file.read_bytes())
        return directory

    return written


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory) -> Path:
    """A .gguf file with a random Llama of 2 layers and its tokenizer."""
    gguf = pytest.importorskip("gguf")
    import numpy as np
    from tokenizers import pre_tokenizers

    width, inner, heads, kv_heads, layers = 32, 64, 4, 2, 2
    tokens = ["<|begin|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    small = width * kv_heads // heads
    shapes = {"token_embd": (len(tokens), width), "output": (len(tokens), width), "output_norm": (width,)}
    for i in range(layers):
        shapes |= {f"blk.{i}.attn_{n}": (small if n in "kv" else width, width) for n in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_gate": (inner, width), f"blk.{i}.ffn_up": (inner, width)}
        shapes |= {f"blk.{i}.ffn_down": (width, inner), f"blk.{i}.attn_norm": (width,), f"blk.{i}.ffn_norm": (width,)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.2, shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

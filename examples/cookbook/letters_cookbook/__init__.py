"""Two recipes: what to train, with settings and the adapters they want. How it runs is the kitchen's business."""

from crucible_kitchen import Recipe
from crucible_kitchen.workflows.supervised import supervised

__all__ = ["chat_lora", "reverse_letters"]

reverse_letters = Recipe(
    "reverse_letters",
    supervised,
    {
        "model": "tiny",
        "dataset": "reverse",
        "dataset_options": {"difficulty": "1"},
        "epochs": 4,
        "learning_rate": 2e-3,
        "warmup": 0.05,
        "eval_at_start": True,
        "eval_max_tokens": 8,
    },
    description="The built-in tiny model learns to write three letters backwards",
)

chat_lora = Recipe(
    "chat_lora",
    supervised,
    {
        "dataset": "HuggingFaceH4/no_robots",
        "template": "chat",
        "train_on": "all_assistant_messages",
        "max_length": 1024,
        "lora_rank": 16,
        "batch_size": 8,
        "gradient_accumulation": 4,
        "lr_schedule": "cosine",
        "warmup": 0.03,
        "eval_max_tokens": 256,
    },
    adapters={"dataset_store": "huggingface"},
    description="Any chat model with LoRA on conversations of the Hugging Face hub; give model=",
)

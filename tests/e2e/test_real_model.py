"""A real pretrained model of the Llama architecture learns from a JSONL file, with its own chat template."""

import json
import random
from pathlib import Path
from typing import Any

import anyio
import pytest

from crucible_kitchen.config import DataConfig
from crucible_kitchen.rendering import tokenize
from crucible_kitchen.splits import cut_split
from crucible_kitchen_files import FilesBlobStore

pytestmark = pytest.mark.e2e

# Invented words, so that no model knows them: which word means what can only be learned from the rows.
GOODS = {"vexil": "steel", "tromb": "cotton", "quasp": "glass", "lumek": "paper"}
ROWS_PER_WORD, HELD_OUT, SEED = 50, 64, 0
ONE_THREAD = "--adapter=training_client=torch,threads=1"
RECIPE = ("batch_size=8", "learning_rate=1e-3", "lora_rank=8", f"holdout={HELD_OUT}", f"seed={SEED}")


def conversations() -> list[dict[str, Any]]:
    """Rows that ask for the goods behind a code; held-out rows have other numbers, the same words."""
    rng = random.Random(7)
    codes = [(word, number) for word in GOODS for number in rng.sample(range(100, 1000), ROWS_PER_WORD)]
    rng.shuffle(codes)
    return [
        {
            "messages": [
                {"role": "system", "content": "You sort goods."},
                {"role": "user", "content": f"Code {word}-{number}?"},
                {"role": "assistant", "content": GOODS[word]},
            ]
        }
        for word, number in codes
    ]


def split(name: str) -> list[dict[str, Any]]:
    """The rows of a split, as the run cuts them."""
    rows = conversations()
    return [rows[i] for i in cut_split(len(rows), name, holdout=HELD_OUT, seed=SEED)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the rows in it."""
    directory = tmp_path_factory.mktemp("workplace")
    text = "".join(json.dumps(row) + "\n" for row in conversations())
    (directory / "codes.jsonl").write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def trained(command: Any, model_directory: Path, workplace: Path) -> Any:
    """The run under test: one epoch of LoRA over 136 of 200 rows, measured before and after."""
    given = ("epochs=1", "eval_at_start=true", "eval_max_tokens=4", "--jsonl=events.jsonl", "--json")
    run = ("run", "supervised", f"model={model_directory}", "dataset=codes.jsonl", *RECIPE, ONE_THREAD, *given)
    ended = command(*run, home=workplace)
    assert ended.code == 0, ended.err
    return ended.json


@pytest.fixture(scope="module")
def losses(trained: Any, workplace: Path) -> list[float]:
    """The loss of every step."""
    records = map(json.loads, (workplace / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return [record["loss"] for record in records if record["event"] == "training.step"]


def test_it_learns_what_it_could_not_know(trained: Any, losses: list[float]) -> None:
    assert trained["status"] == "completed"
    assert len(losses) == 17
    assert losses[-1] < 0.1 * losses[0]
    before, after = trained["state"]["eval_before"], trained["state"]["eval_results"]
    assert before["n"] == after["n"] == HELD_OUT // 2
    assert before["accuracy"] < 0.2
    assert after["accuracy"] > 0.9
    assert not after["synthetic"]
    assert trained["state"]["registered_model"]["metrics"]["accuracy"] == after["accuracy"]


def test_every_token_comes_from_the_models_own_chat_template(trained: Any, model_directory: Path) -> None:
    import transformers

    from crucible_kitchen.hub_tokenizer import HubTokenizer

    inner = transformers.AutoTokenizer.from_pretrained(model_directory, local_files_only=True)
    rows = split("train")
    expected = [inner.apply_chat_template(row["messages"], return_dict=False) for row in rows]
    asked = [
        inner.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False) for row in rows
    ]
    assert inner.decode(asked[0]).endswith("<|im_end|>\n<|im_start|>assistant\n")

    rendered = tokenize(rows, HubTokenizer(inner, len(inner), None, inner.eos_token_id), DataConfig(dataset="codes"))
    end = inner.eos_token_id
    for i, (tokens, prompt, row) in enumerate(zip(expected, asked, rows, strict=True)):
        whole = rendered.tokens[rendered.offsets[i] : rendered.offsets[i + 1]].tolist()
        learned = rendered.weights[rendered.offsets[i] : rendered.offsets[i + 1]]
        assert whole == tokens
        answer = [*inner.encode(row["messages"][-1]["content"], add_special_tokens=False), end]
        assert [token for token, counts in zip(whole, learned, strict=True) if counts] == answer
        assert learned.argmax() == len(prompt)
    prepared = {key: trained["metrics"][f"data.prepared.{key}"] for key in ("rows", "tokens", "trained_tokens")}
    assert prepared == {
        "rows": len(rows),
        "tokens": sum(map(len, expected)),
        "trained_tokens": rendered.trained_tokens,
    }, "the run rendered its rows in another way"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute of transformers by its older name
def test_peft_loads_the_registered_weights_onto_the_model_and_gives_the_same_answers(
    trained: Any, model_directory: Path, workplace: Path, tmp_path: Path
) -> None:
    import peft
    import torch
    import transformers

    weights = tmp_path / "weights"
    anyio.run(FilesBlobStore(home=workplace).get_tree, trained["state"]["registered_model"]["uri"], weights)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(weights)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
    rows = split("test")[:8]
    answers = [answer(model, tokenizer, row["messages"][:-1]) for row in rows]
    wrong = [f"test/{i}" for i, row in enumerate(rows) if answers[i] != row["messages"][-1]["content"]]
    assert wrong == [key for key in trained["state"]["eval_results"]["mistakes"] if int(key.split("/")[1]) < len(rows)]


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Ask the model as transformers does."""
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    given = model.generate(**asked, max_new_tokens=4, do_sample=False)
    return str(tokenizer.decode(given[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def test_the_gguf_file_itself_is_the_same_model(
    command: Any, gguf_model: Path, workplace: Path, tmp_path: Path, losses: list[float]
) -> None:
    given = ("max_steps=1", "--adapter=evaluator=none", "--adapter=model_registry=none", "--json")
    recipe = (*(key for key in RECIPE if not key.startswith("lora_rank")), "lora_rank=0")  # LoRA begins as the base
    run = ("run", "supervised", f"model={gguf_model}", "dataset=codes.jsonl", *recipe, ONE_THREAD, *given)
    ended = command(*run, home=tmp_path, cwd=workplace)
    assert ended.code == 0, ended.err
    assert ended.json["metrics"]["training.step.loss"] == pytest.approx(losses[0], rel=1e-4)

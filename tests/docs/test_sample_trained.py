"""What the documents promise of a fine-tuned model: it can be talked with, by its run and by its registered name."""

import json


def test_a_fine_tuned_lora_answers_under_its_run_and_under_its_registered_name(place):
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(20)]
    (place.directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = "crucible-kitchen run supervised model=SmolLM2-135M-Instruct dataset=rows.jsonl max_steps=1 eval_max_tokens=2"
    code, output = place.run(f"{run} register_as=adder")
    assert code == 0, output
    for name in (place.newest_run(), "adder:1"):
        command = f"crucible-kitchen sample {name} --prompt 1+1= --max-tokens 3 --json"
        code, output = place.run(command)
        assert code == 0, output
        assert 1 <= json.loads(output.splitlines()[-1])["tokens"] <= 3

"""What the real `tinker` SDK does against a training server; run in the SDK's own virtual environment.

    python tinker_client.py BASE_URL

Creates a model, trains it, saves and loads it, samples from it; prints one JSON object of what it saw.
"""

import json
import sys

import tinker
from tinker import types

TEXT = "12+34=46\n"
TOKENS = list(TEXT.encode())


def datum():
    return types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)},
    )


def loss_of(trainer):
    result = trainer.forward([datum()], "cross_entropy").result(60)
    return -float(result.loss_fn_outputs[0]["logprobs"].to_numpy().sum())


def main(url):
    seen = {"sdk": tinker.__version__}
    service = tinker.ServiceClient(base_url=url, api_key="tml-a-key")
    trainer = service.create_lora_training_client(base_model="tiny", rank=4, seed=3)
    info = trainer.get_info()
    seen["info"] = [info.model_data.model_name, info.is_lora, info.lora_rank]

    losses = []
    for _ in range(6):  # both are submitted before either is waited for
        gradient = trainer.forward_backward([datum()], "cross_entropy")
        step = trainer.optim_step(types.AdamParams(learning_rate=5e-3))
        losses.append(gradient.result(60).metrics["loss:sum"])
        step.result(60)
    seen["losses"] = losses

    state = trainer.save_state("six").result(60).path
    kept = loss_of(trainer)
    trainer.forward_backward([datum()], "cross_entropy").result(60)
    trainer.optim_step(types.AdamParams(learning_rate=5e-3)).result(60)
    moved = loss_of(trainer)
    trainer.load_state_with_optimizer(state).result(60)
    seen["state"] = [state, kept, moved, loss_of(trainer)]

    again = service.create_training_client_from_state_with_optimizer(state)
    seen["elsewhere"] = loss_of(again)

    params = types.SamplingParams(max_tokens=4, temperature=0.0, seed=1)
    prompt = types.ModelInput.from_ints(list(b"12+34="))
    named = trainer.save_weights_for_sampler("published").result(60).path
    seen["samples"] = []
    for sampler in (
        service.create_sampling_client(model_path=named),
        service.create_sampling_client(base_model="tiny"),
    ):
        answer = sampler.sample(prompt, num_samples=2, sampling_params=params).result(60)
        seen["samples"].append([list(s.tokens) for s in answer.sequences])
        seen["stop"] = [str(s.stop_reason) for s in answer.sequences]
    published = service.create_sampling_client(model_path=named)
    scores = published.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result(60)
    seen["scores"] = [scores[0], -sum(s for s in scores[1:])]

    try:
        trainer.forward_backward(
            [types.Datum(types.ModelInput.from_ints([1, 99999]), {"target_tokens": [1, 2], "weights": [1.0, 1.0]})],
            "cross_entropy",
        ).result(60)
    except tinker.RequestFailedError as error:
        seen["refused"] = [str(error.category), str(error)]
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])

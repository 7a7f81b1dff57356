"""Writes trl.json: losses and gradients as TRL 1.16.0's trainers compute them, in float64, with their inputs.

The trainers' own loss methods run, on a stand-in for the trainer and a model that answers with given log-probabilities.
Run: python tests/learner/golden/make_trl.py (trl 1.16.0 importable).
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.experimental.sdft.loss_utils import add_tail_bucket
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.utils import nanstd

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double  # ORPO's trainer rounds to float32 on the way
ROWS, LENGTH, VOCABULARY = 4, 6, 7


class Accelerator:
    """One process: gathering and reducing give what they are given."""

    num_processes, device, sync_gradients = 1, "cpu", True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


def trainer(**more):
    """Return what the loss methods read of a trainer."""
    return SimpleNamespace(
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        _total_train_tokens=0,
        _tp_size=1,
        **more,
    )


def policy():
    """Losses of the GRPO trainer over its types; mean over sequences or tokens, as each has it."""
    logprobs, old, reference = -torch.rand(3, ROWS, LENGTH) * 2
    old = torch.where(torch.rand(ROWS, LENGTH) < 0.5, logprobs + 0.1 * torch.randn(ROWS, LENGTH), old)
    mask = torch.rand(ROWS, LENGTH) < 0.8
    advantages = torch.randn(ROWS)
    wide = {"loss_type": "dapo", "epsilon_high": 0.28}
    cases = [
        {"loss_type": "grpo"},
        {"loss_type": "grpo", "beta": 0.3},
        {"loss_type": "dr_grpo", "delta": 1.5},
        wide,
        {"loss_type": "luspo"},
        {"loss_type": "cispo", "epsilon_high": 1.3},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ]
    found = []
    for case in cases:
        options = {"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None} | case
        now = logprobs.clone().requires_grad_()
        args = SimpleNamespace(delta=options.pop("delta"), use_bias_correction_kl=False, steps_per_generation=1)
        self = trainer(
            args=args,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=options.pop("importance_sampling_level", "token"),
            use_vllm=False,
            max_completion_length=10,
            _entropy_bonus_enabled=False,
            _get_per_token_logps_and_entropies=lambda *a, now=now, **k: (now, torch.zeros_like(now), None),
            **options,
        )
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
        inputs = {
            "prompt_ids": ids,
            "prompt_mask": mask,
            "completion_ids": ids,
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "num_items_in_batch": mask.sum().double(),
        }
        loss = GRPOTrainer._compute_loss(self, None, inputs)
        loss.backward()
        clipped = self._metrics["train"]["clip_ratio/region_mean"]
        found.append({**case, "loss": loss.item(), "gradient": now.grad.tolist(), "clipped": clipped})
    arrays = {"logprobs": logprobs, "old": old, "reference": reference, "mask": mask, "advantages": advantages}
    return {name: x.tolist() for name, x in arrays.items()} | {"cases": found}


def preference():
    """Losses of the DPO trainer over its types, of CPO's SimPO and of ORPO's odds ratio; a sum over the pairs."""
    logprobs, reference = -torch.rand(2, 2 * ROWS, LENGTH) * 2
    mask = torch.rand(2 * ROWS, LENGTH) < 0.8
    reference_sums = (reference * mask).sum(1).chunk(2)
    found = []
    for loss, extra in (("sigmoid", {}), ("hinge", {}), ("ipo", {}), ("apo_zero", {}), ("robust", {"smoothing": 0.1})):
        now = logprobs.clone().requires_grad_()
        answer = SimpleNamespace(
            log_probs=now * mask,
            **{name: torch.zeros_like(now) for name in ("entropy", "mean_logits", "is_top1")},
        )
        answer.is_top1 = answer.is_top1.bool()

        class Model:
            training = True

            def __call__(self, answer=answer, **_):
                return answer

        self = trainer(
            loss_types=[loss],
            loss_weights=[1.0],
            beta=0.3,
            label_smoothing=extra.get("smoothing", 0.0),
            f_divergence_type="reverse_kl",
            ld_alpha=None,
            precompute_ref_logps=True,
            use_weighting=False,
        )
        self.model = Model()
        inputs = {
            "input_ids": torch.zeros(2 * ROWS, LENGTH + 1, dtype=torch.long),
            "attention_mask": torch.ones(2 * ROWS, LENGTH + 1),
            "completion_mask": torch.cat([torch.zeros(2 * ROWS, 1), mask], dim=1).long(),
            "ref_chosen_logps": reference_sums[0],
            "ref_rejected_logps": reference_sums[1],
        }
        value = ROWS * DPOTrainer._compute_loss(self, self.model, inputs, return_outputs=False)
        value.backward()
        metrics = {k.removeprefix("rewards/"): v[0] for k, v in self._metrics["train"].items() if "rewards" in k}
        found.append({"type": loss, **extra, "loss": value.item(), "gradient": now.grad.tolist(), **metrics})
    for loss in ("simpo", "orpo"):
        now = logprobs.clone().requires_grad_()
        mean = ((now * mask).sum(1) / mask.sum(1)).chunk(2)
        if loss == "simpo":
            self = trainer(alpha=0.0, loss_type="simpo", simpo_gamma=0.5, beta=0.3, label_smoothing=0.0)
            value = CPOTrainer.cpo_loss(self, *mean)[0].sum()
        else:
            value = -ORPOTrainer.odds_ratio_loss(trainer(beta=0.3), *mean)[0].sum()
        value.backward()
        found.append({"type": loss, "loss": value.item(), "gradient": now.grad.tolist()})
    arrays = {"logprobs": logprobs, "reference": reference, "mask": mask}
    return {name: x.tolist() for name, x in arrays.items()} | {"beta": 0.3, "cases": found}


def jsd():
    """The generalised JSD of the GKD trainer, and a top-k with a tail; sums over positions."""
    student, teacher = torch.randn(2, 1, LENGTH, VOCABULARY) * 2
    found = []
    for beta in (0.0, 0.1, 0.5, 1.0):
        for temperature in (1.0, 0.7):
            x = student.clone().requires_grad_()
            loss = GKDTrainer.generalized_jsd_loss(x, teacher, beta=beta, temperature=temperature, reduction="sum")
            loss.backward()
            case = {"beta": beta, "temperature": temperature, "loss": loss.item(), "gradient": x.grad[0].tolist()}
            found.append(case)
    p, q = (torch.log_softmax(x[0], -1)[:, :3] for x in (student, teacher))
    tails = [add_tail_bucket(x).tolist() for x in (p, q)]
    return {"student": student[0].tolist(), "teacher": teacher[0].tolist(), "cases": found, "tails": tails}


def groups():
    """Advantages of the GRPO trainer, from its own standard deviation."""
    rewards = torch.rand(3, 5)
    std = nanstd(rewards, dim=1).unsqueeze(1)
    advantages = (rewards - rewards.nanmean(1, keepdim=True)) / (std + 1e-4)
    return {"rewards": rewards.tolist(), "advantages": advantages.tolist()}


def kto():
    """The KTO trainer's loss, from its own method; a sum over the rows."""
    logprobs, reference = -torch.rand(2, ROWS, LENGTH) * 2
    mask = torch.rand(ROWS, LENGTH) < 0.8
    labels = torch.tensor([True, False, True, False])
    mismatched, mismatched_reference = -torch.rand(2, ROWS) * 9
    now = logprobs.clone().requires_grad_()
    answer = SimpleNamespace(log_probs=now * mask, entropy=torch.zeros_like(now), mean_logits=torch.zeros_like(now))
    self = trainer(
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        precompute_ref_logps=True,
        calculate_KL=True,
        _compute_kl_logps=lambda model, batch: mismatched,
    )
    batch = {
        "input_ids": torch.zeros(ROWS, LENGTH + 1, dtype=torch.long),
        "attention_mask": torch.ones(ROWS, LENGTH + 1),
        "completion_mask": torch.cat([torch.zeros(ROWS, 1), mask], dim=1).long(),
        "label": labels,
        "ref_logps": (reference * mask).sum(1),
        "ref_KL_logps": mismatched_reference,
    }
    loss = ROWS * KTOTrainer._compute_loss(self, lambda **_: answer, batch, return_outputs=False)
    loss.backward()
    arrays = {"logprobs": logprobs, "reference": reference, "mask": mask, "labels": labels}
    arrays |= {"mismatched": mismatched - mismatched_reference, "gradient": now.grad}
    found = {name: x.tolist() for name, x in arrays.items()} | {"loss": loss.item()}
    return found | {"z": self._metrics["train"]["kl"][0]}


def main() -> None:
    torch.manual_seed(0)
    parts = (policy, preference, kto, jsd, groups)
    made = {"trl": "1.16.0"} | {part.__name__: part() for part in parts}
    Path(__file__).with_name("trl.json").write_text(json.dumps(made) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What users may rely on, frozen: changing it is a visible change of this file.

Names and orders are compared exactly. Additions are fine, once they stand here too.
"""

import inspect
import pickle  # noqa: TID251 - errors cross process boundaries by it; only our own are unpickled, here
import re
from importlib.metadata import distribution
from typing import Any

import pytest
import typer.main

import crucible_kitchen
from crucible_kitchen import errors, learner
from crucible_kitchen.cli.app import app
from crucible_kitchen.errors import (
    CrucibleError,
    MissingExtra,
    NonFiniteLoss,
    RowError,
    RunChanged,
    WorkerRaised,
    WorkflowError,
)
from crucible_kitchen.events import event_schema
from crucible_kitchen.kitchen import Kitchen
from crucible_kitchen.plans import DEFAULT_ADAPTERS
from crucible_kitchen.ports import PORTS
from crucible_kitchen.runs import RunHandle, RunResult
from crucible_kitchen.workflow.nodes import steps
from crucible_kitchen.workflow.run import Run

PUBLIC_NAMES = """
    AdamParams CheckpointConfig CrucibleError DataConfig Datum EvalConfig Kitchen Loop LossValue ModelConfig
    ModelVersion OptimConfig Parallel Recipe Registry RegistryConfig Retry Run RunConfig RunHandle RunResult
    SamplingParams StepResult Stream TrainingClient TrainingSession When Workflow check run stage __version__
"""

LEARNER_NAMES = """
    APOZero AdvantageEstimate Aggregation BradleyTerry CISPO DPO DecoupledPPO EntropyBonus GSPO GeneralizedJSD Hinge
    IPO ImportanceSampling KTO Moments Normalization ORPO PPO RobustDPO STD_CONVENTIONS SimPO StdConvention Term
    TokenWeights TopKForwardKL ValueLoss WeightedSum centred discounted_returns dr_grpo entropy_estimate
    explained_variance gae grpo k1 k2 k3 kl_shaped_advantages kl_shaped_rewards kto_reference_point maxrl normalize
    reverse_kl_advantages rloo token_weights truncated_importance_weights whiten
"""

PARAMETERS = {
    Kitchen: "adapters *home *sinks *metrics_port *metrics_host *registry *store",
    Kitchen.run: "self target config *adapters *dry_run",
    Kitchen.start: "self target config *adapters *place",
    Kitchen.resume: "self run_id config *target *adapters *allow_changed",
    Kitchen.reopen: "self run_id config *target *adapters *allow_changed",
    Kitchen.check: "self target config *adapters",
    RunHandle.events: "self after",
    RunHandle.cancel: "self",
    RunHandle.drain: "self grace",
    RunHandle.wait: "self",
    crucible_kitchen.run: "target config *adapters *home *dry_run",
    crucible_kitchen.stage: "*writes *name *timeout *retry *on_error",
}

COMMANDS = {
    "": "--version",
    "run": "target values --config --adapter --home --metrics-port --metrics-host --dry-run --json --jsonl "
    "--tensorboard --quiet -q --debug",
    "resume": "run values --adapter --allow-changed --home --metrics-port --metrics-host --json --jsonl --tensorboard "
    "--quiet -q --debug",
    "verify": "run --adapter --home --json --quiet -q --debug",
    "validate": "target values --config --adapter --home --json --debug",
    "runs": "--limit --status --workflow --since --home --json --debug",
    "runs prune": "run --status --workflow --older-than --yes -y --home --json --debug",
    "compare": "first second --home --json --debug",
    "show": "run --home --json --debug",
    "events": "run --schema --after --follow -f --home --json --debug",
    "describe": "name --mermaid --json --debug",
    "workflows": "--json --debug",
    "recipes": "--json --debug",
    "environments": "--json --debug",
    "rehearse": "target values --config --from --rollout-seconds --rollout-sigma --update-seconds --publish-seconds "
    "--price-hour --price-tokens --home --json --debug",
    "adapters": "--json --debug",
    "sample": "model --prompt -p --system --temperature --top-p --max-tokens --seed --home --adapter --json --debug",
    "train-server": "--model --host --port --home --adapter --json --debug",
    "doctor": "--home --json --debug",
    "version": "--json",
    "models": "--home --adapter --json --debug",
    "models show": "model --home --adapter --json --debug",
}

EXIT_CODES = {"COMPLETED": 0, "FAILED": 1, "USAGE": 2, "PAUSED": 75, "CANCELLED": 130}

RESULT = "run_id status state metrics artifacts duration_s"

EVENTS = {  # name: measurements | metadata
    "rl.env_group_built": "group_size groups_per_batch | env_type problems fingerprint learner because",
    "rl.rollout_complete": "reward_mean reward_std num_trajectories num_ended tokens_mean env_seconds sampling_seconds "
    "| rollout_index groups seconds outcomes metrics",
    "rl.advantages_computed": "advantage_mean advantage_std return_mean return_std num_steps |",
    "rl.ppo_update": "policy_loss value_loss entropy clip_fraction kl_divergence | epoch batch_size",
    "rl.step": "reward_mean policy_loss entropy clip_fraction sampler_mismatch | step",
    "rl.pipeline": "overlap_efficiency learner_idle_share queue_depth in_flight staleness_mean staleness_max waste "
    "length_bias | step slowest staleness ledger learner_seconds worker_seconds",
    "rl.group_dropped": "| index reason",
    "rl.evaluated": "reward_mean reward_std episodes | step held_out label",
    "workflow.start": "| recipe config attempt",
    "workflow.rolled_back": "| session place step after",
    "workflow.stop": "duration_s | recipe status error traceback",
    "stage.start": "| stage recipe path attempt",
    "stage.stop": "duration_s | stage recipe path",
    "stage.error": "duration_s | stage recipe path attempt code message action traceback",
    "run.stalled": "stalled_s | culprit policy waits",
    "data.prepared": "rows tokens trained_tokens truncated steps | dataset fingerprint",
    "training.step": "loss lr tokens_per_sec grad_norm | step epoch total_steps",
    "training.epoch": "avg_loss | epoch steps",
    "training.checkpoint": "| step path",
    "eval.complete": "accuracy f1 precision recall | step sample_count label",
    "dpo.dataset_built": "num_pairs num_batches dropped truncated | batch_size flaws",
    "dpo.step": "loss accuracy chosen_reward rejected_reward margin | step beta num_pairs",
    "dpo.evaluated": "loss accuracy chosen_reward rejected_reward margin | step num_pairs label",
    "distillation.step": "loss divergence samples tokens | step method",
    "model.registered": "| model_id model_name version uri",
    "warning": "| code message path",
}

ENTRY_POINTS = {
    "crucible_kitchen.environments": """
        calculator deepcoder gymnasium math parity reasoning_gym reverse sort sums verifiers
    """,
    "console_scripts": "crucible-kitchen",
    "crucible_kitchen.adapters": """
        blob_store.files blob_store.noop dataset_store.files dataset_store.huggingface dataset_store.noop
        evaluator.metrics evaluator.noop llm_client.noop llm_client.openai model_registry.noop model_registry.sqlite
        sampling_client.http sampling_client.noop sampling_client.openai training_client.http training_client.noop
        training_client.torch
    """,
    "crucible_kitchen.recipes": "rlhf sums_demo",
    "crucible_kitchen.workflows": "distillation preference reinforcement reward_model supervised",
}

DEFAULTS = {
    "training_client": "torch",
    "dataset_store": "files",
    "evaluator": "metrics",
    "model_registry": "sqlite",
    "blob_store": "files",
    "llm_client": "noop",
}

PORT_METHODS = {
    "training_client": "open_session",
    "sampling_client": "open_sampler",
    "dataset_store": "load",
    "evaluator": "evaluate render",
    "model_registry": "delete get lineage register set_alias set_stage versions",
    "blob_store": "exists get get_tree put put_file put_tree",
    "llm_client": "chat",
}

ERROR_CODES = {
    "CrucibleError": "crucible",
    "ConfigError": "config.invalid",
    "WorkflowError": "workflow.invalid",
    "NotFoundError": "not_found",
    "ModelNotFound": "not_found.model",
    "DatasetNotFound": "not_found.dataset",
    "RunNotFound": "not_found.run",
    "VersionNotFound": "not_found.version",
    "BlobNotFound": "not_found.blob",
    "AdapterError": "adapter",
    "MissingExtra": "adapter.missing_extra",
    "CapabilityError": "adapter.capability",
    "SandboxUnavailable": "adapter.sandbox",
    "WorkerError": "worker",
    "WorkerTimeout": "worker.timeout",
    "WorkerRaised": "worker.raised",
    "WorkerDied": "worker.died",
    "DataError": "data",
    "EmptyDataset": "data.empty",
    "LedgerBroken": "training.ledger",
    "EnvironmentFailure": "environment",
    "EnvironmentFault": "environment.fault",
    "EnvironmentTimeout": "environment.timeout",
    "RowError": "data.row",
    "SequenceTooLong": "data.too_long",
    "BackendError": "backend",
    "BackendUserError": "backend.user",
    "TransientBackendError": "backend.transient",
    "CapacityError": "backend.capacity",
    "SessionLost": "backend.session_lost",
    "OutOfMemory": "backend.out_of_memory",
    "TrainingError": "training",
    "NonFiniteLoss": "training.non_finite_loss",
    "StageError": "stage",
    "StageFailed": "stage.failed",
    "StageTimeout": "stage.timeout",
    "CleanupError": "stage.cleanup",
    "ActorError": "actor",
    "ActorStopped": "actor.stopped",
    "ActorRestarted": "actor.restarted",
    "MessageQuarantined": "actor.quarantined",
    "TooManyRestarts": "actor.too_many_restarts",
    "StoreError": "store",
    "StorageFull": "store.full",
    "IntegrityError": "store.integrity",
    "Conflict": "store.conflict",
    "RunLive": "run.live",
    "RunEnded": "run.ended",
    "LeaseLost": "run.lease_lost",
    "RunCancelled": "run.cancelled",
    "RunStalled": "run.stalled",
    "RunPaused": "run.paused",
    "RunChanged": "run.changed",
    "RunNotReproducible": "run.not_reproducible",
    "ReplayMismatch": "run.replay_mismatch",
}

SUPERVISED_KEYS = """
    batch_size beta1 beta2 chat_template dataset dataset_options dataset_size durability early_stopping epochs eps
    eval_at_start eval_average eval_every eval_labels eval_max_tokens eval_size eval_split fields grace
    grad_clip_norm gradient_accumulation holdout keep_best keep_every keep_last learning_rate lora_alpha lora_dropout
    lora_rank lora_targets lr_end lr_power lr_schedule max_length max_steps model on_failure on_stall on_too_long
    parent_model register_as save_best save_every seed shuffle split stage_timeout stall_after system_prompt
    template train_on warmup weight_decay
"""

SUPERVISED_STATE = {"eval_results", "registered_model"}


def test_the_public_names_are_these() -> None:
    assert crucible_kitchen.__all__ == PUBLIC_NAMES.split()
    assert dir(crucible_kitchen) == sorted(PUBLIC_NAMES.split())


def test_the_learner_s_names_are_these() -> None:
    assert learner.__all__ == LEARNER_NAMES.split()
    assert dir(learner) == learner.__all__
    assert all(hasattr(learner, name) for name in learner.__all__)


@pytest.mark.parametrize("called", PARAMETERS, ids=lambda called: called.__qualname__)
def test_the_parameters_of_what_everybody_calls_are_these(called: Any) -> None:
    found = inspect.signature(called).parameters.values()
    assert [("*" if p.kind is p.KEYWORD_ONLY else "") + p.name for p in found] == PARAMETERS[called].split()


def test_the_commands_and_their_options_are_these() -> None:
    assert dict(_commands(typer.main.get_command(app), "")) == {
        name: options.split() for name, options in COMMANDS.items()
    }


def _commands(command: Any, path: str) -> Any:
    """Yield the path of every command with its arguments and options."""
    yield path, [word for p in command.params for word in ([p.name] if p.param_type_name == "argument" else p.opts)]
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(below, f"{path} {name}".strip())


def test_the_exit_codes_are_these() -> None:
    from crucible_kitchen.cli import console

    assert {name: getattr(console, name) for name in EXIT_CODES} == EXIT_CODES


def test_a_result_as_json_has_these_keys() -> None:
    from crucible_kitchen.workflow.run import StateView

    result = RunResult("id", "completed", StateView({}), {}, (), {}, 0.0)
    assert list(result.to_json()) == RESULT.split()


def test_the_events_and_their_fields_are_these() -> None:
    found = {row["event"]: " ".join([*row["measurements"], "|", *row["metadata"]]).strip() for row in event_schema()}
    assert found == EVENTS


def test_the_entry_points_are_these() -> None:
    found: dict[str, list[str]] = {}
    for entry in distribution("crucible-kitchen").entry_points:
        found.setdefault(entry.group, []).append(entry.name)
    assert {group: sorted(names) for group, names in found.items()} == {
        group: names.split() for group, names in ENTRY_POINTS.items()
    }


def test_the_default_adapters_are_these() -> None:
    assert dict(DEFAULT_ADAPTERS) == DEFAULTS


def test_the_ports_and_their_methods_are_these() -> None:
    common = {"public_options", "aclose"}
    found = {
        name: " ".join(
            sorted(
                n for n, _ in inspect.getmembers(port.protocol, inspect.isfunction) if n[0] != "_" and n not in common
            )
        )
        for name, port in PORTS.items()
    }
    assert found == PORT_METHODS


def test_the_error_codes_are_these() -> None:
    assert {cls.__name__: cls.code for cls in _tree(CrucibleError)} == ERROR_CODES
    assert set(errors.__all__) == set(ERROR_CODES)


def _tree(cls: type[CrucibleError]) -> list[type[CrucibleError]]:
    """Return an error class and all below it that are ours."""
    below = [c for c in cls.__subclasses__() if c.__module__ == errors.__name__]
    return [cls, *(found for child in below for found in _tree(child))]


def test_every_error_is_drawn_with_its_code_and_its_place_in_the_tree() -> None:
    drawn = re.findall(r"^    ([│├└─ ]*)(\w+)(?: \(\w+\))? +([\w.]+)(?: .*)?$", errors.__doc__ or "", re.MULTILINE)
    codes = {name: code for _, name, code in drawn}
    assert codes == {name: code for name, code in ERROR_CODES.items() if name != "CrucibleError"}
    parents: list[str] = ["CrucibleError"]
    for indent, name, _ in drawn:
        depth = len(indent) // 4
        assert getattr(errors, name).__bases__[0].__name__ == parents[depth - 1]
        parents[depth:] = [name]


@pytest.mark.parametrize("cls", _tree(CrucibleError), ids=lambda cls: cls.__name__)
def test_every_error_survives_the_way_to_another_process(cls: type[CrucibleError]) -> None:
    made: dict[type[CrucibleError], CrucibleError] = {
        WorkflowError: WorkflowError("flow", ["a problem", "another"]),
        MissingExtra: MissingExtra("torch", "torch"),
        RowError: RowError(3, "answer", "is missing", hint="give a mapping"),
        NonFiniteLoss: NonFiniteLoss("the loss", 7, ["row 1", "row 2"]),
        RunChanged: RunChanged("r", {"seed": (1, 2)}),
        WorkerRaised: WorkerRaised("score raised ValueError", "ValueError"),
    }
    error = made.get(cls) or cls("what happened", hint="what to do", where="flow/stage")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__


def test_the_config_keys_of_supervised_are_these() -> None:
    from crucible_kitchen.workflows.supervised import SupervisedConfig

    assert sorted(SupervisedConfig.model_fields) == SUPERVISED_KEYS.split()


def test_every_config_key_says_what_it_is() -> None:
    from crucible_kitchen.workflows.supervised import SupervisedConfig

    assert [key for key, field in SupervisedConfig.model_fields.items() if not field.description] == []


def test_supervised_writes_these_names_for_its_users() -> None:
    from crucible_kitchen.workflows.supervised import supervised

    assert {step.writes for _, step in steps(supervised)} >= SUPERVISED_STATE


def test_a_stage_finds_this_in_its_run() -> None:
    assert {name for name in dir(Run) if not name.startswith("_")} == {
        "add_artifact", "attempt", "checkpoint", "context", "directory", "emit", "id", "idempotency_key", "made",
        "manifest", "path", "pin", "recipe", "rng", "seed", "turn", "turns", "warn",
    }  # fmt: skip

"""Faults strike the calls they name, leave all others alone, and break the contracts that they should break."""

import anyio
import pytest

from crucible_kitchen.errors import TransientBackendError
from crucible_kitchen.ports import PORTS, DatasetSpec
from crucible_kitchen.testing import contracts
from crucible_kitchen.testing.contracts import (
    blob_store,
    dataset_store,
    evaluator,
    llm_client,
    model_registry,
    training_client,
    training_session,
)
from crucible_kitchen.testing.contracts.training_case import batch, train
from crucible_kitchen.testing.faults import corrupts, delays, fails, hangs, with_faults
from crucible_kitchen.types import SessionSpec, StateRef
from crucible_kitchen_noop import (
    NoopBlobStore,
    NoopDatasetStore,
    NoopEvaluator,
    NoopLLMClient,
    NoopModelRegistry,
    NoopTrainingClient,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


@pytest.mark.parametrize("check", contracts.TRAINING_CLIENT, ids=contracts.name)
async def test_an_adapter_without_faults_is_itself(check, tmp_path):
    client = with_faults(NoopTrainingClient())
    assert isinstance(client, PORTS["training_client"].protocol)
    await check(contracts.TrainingClientCase(client, "toy", tmp_path, learning_rate=5.0))


async def test_the_nth_call_fails_and_the_next_does_not():
    store = with_faults(NoopBlobStore(), fails("put", TransientBackendError("lost"), call=2))
    await store.put(b"1", kind="report")
    with pytest.raises(TransientBackendError):
        await store.put(b"2", kind="report")
    ref = await store.put(b"3", kind="report")
    assert await store.get(ref.uri) == b"3"


async def test_a_late_failure_loses_only_the_answer():
    registry = with_faults(NoopModelRegistry(), fails("register", TransientBackendError("lost"), late=True))
    case = contracts.ModelRegistryCase(registry)
    with pytest.raises(TransientBackendError):
        await case.register(key="run/1")
    assert (await case.register(key="run/1")).version == 1
    assert len(await registry.versions()) == 1


async def test_calls_are_counted_over_all_steps_of_a_session(tmp_path):
    client = with_faults(NoopTrainingClient(), fails("forward_backward", TransientBackendError("lost"), call=3))
    case = contracts.TrainingClientCase(client, "toy", tmp_path)
    async with client.open_session(SessionSpec("toy", None, 0, str(tmp_path))) as session:
        for _ in range(2):
            await train(session, [batch(session)], case.optimizer())
        with pytest.raises(TransientBackendError):
            await train(session, [batch(session)], case.optimizer())
        await train(session, [batch(session)], case.optimizer())
        assert session.position == 3


async def test_a_late_fault_of_a_pending_call_strikes_when_it_is_awaited(tmp_path):
    client = with_faults(NoopTrainingClient(), fails("apply", TransientBackendError("lost"), late=True))
    async with client.open_session(SessionSpec("toy", None, 0, str(tmp_path))) as session:
        async with session.step(0) as step:
            await step.forward_backward(batch(session))
            applied = await step.apply(contracts.TrainingClientCase(client, "toy", tmp_path).optimizer())
            with pytest.raises(TransientBackendError):
                await applied
        assert session.position == 1


async def test_a_block_that_cannot_be_entered_is_left(tmp_path):
    client = with_faults(NoopTrainingClient(), fails("open_session", TransientBackendError("lost"), late=True))
    with pytest.raises(TransientBackendError):
        async with client.open_session(SessionSpec("toy", None, 0, str(tmp_path))):
            pass


async def test_a_hanging_call_ends_when_it_is_cancelled():
    store = with_faults(NoopBlobStore(), hangs("put"), delays("get", 0.001))
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: store.put(b"1", kind="report"))
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    ref = await store.put(b"1", kind="report")
    assert await store.get(ref.uri) == b"1"


async def test_what_cannot_wait_is_not_made_to_wait():
    store = with_faults(NoopDatasetStore(), delays("public_options", 1.0))
    with pytest.raises(TypeError, match="not asynchronous"):
        store.public_options()


def half(report):
    return type(report)({**report.metrics, "accuracy": 0.5}, report.intervals, report.n, report.average)


def elsewhere(state):
    return StateRef(state.uri, state.step + 1, state.sha256, state.size)


BROKEN = [
    (NoopBlobStore, corrupts("get", lambda data: data + b"!"), blob_store.what_is_put_can_be_got),
    (NoopBlobStore, corrupts("exists", lambda _: True, times=0), blob_store.what_is_not_there_is_not_found),
    (
        NoopModelRegistry,
        corrupts("versions", lambda found: found[::-1]),
        model_registry.versions_count_from_one_in_each_name,
    ),
    (NoopEvaluator, corrupts("evaluate", half), evaluator.right_answers_score_one_and_wrong_ones_zero),
    (NoopLLMClient, corrupts("chat", lambda reply: type(reply)("{}", {})), llm_client.a_schema_is_fulfilled),
    (
        NoopDatasetStore,
        corrupts("rows", lambda rows: rows[::-1], call=2),
        dataset_store.rows_come_in_the_order_asked_for,
    ),
    (
        NoopDatasetStore,
        corrupts("fingerprint", lambda _: "0" * 64, times=0),
        dataset_store.a_fingerprint_is_the_contents,
    ),
    (NoopTrainingClient, corrupts("save_state", elsewhere), training_session.a_state_restores_the_session_bit_for_bit),
    (
        NoopTrainingClient,
        corrupts(
            "forward_backward",
            lambda result: type(result)(result.loss / 4, result.weight, result.tokens, result.logprobs),
        ),
        training_client.the_loss_is_a_sum,
    ),
]


@pytest.mark.parametrize(("adapter", "fault", "check"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
async def test_a_contract_catches_an_adapter_that_breaks_it(adapter, fault, check, tmp_path):
    cases = {
        NoopBlobStore: lambda a: contracts.BlobStoreCase(a, tmp_path),
        NoopModelRegistry: contracts.ModelRegistryCase,
        NoopEvaluator: contracts.EvaluatorCase,
        NoopLLMClient: contracts.LLMClientCase,
        NoopDatasetStore: lambda a: contracts.DatasetStoreCase(a, DatasetSpec("toy")),
        NoopTrainingClient: lambda a: contracts.TrainingClientCase(a, "toy", tmp_path, learning_rate=5.0),
    }
    await check(cases[adapter](adapter()))
    with pytest.raises(AssertionError):
        await check(cases[adapter](with_faults(adapter(), fault)))

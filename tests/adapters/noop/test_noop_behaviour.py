"""What the noop adapters do beyond their contracts: pretend to lack things, take time, refuse what they cannot."""

import anyio
import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_kitchen.errors import (
    BackendUserError,
    CapabilityError,
    ConfigError,
    DatasetNotFound,
    IntegrityError,
    StoreError,
)
from crucible_kitchen.ports import DatasetSpec, EvalExample, Prediction
from crucible_kitchen.testing.clock import virtual_clock
from crucible_kitchen.testing.contracts.training_case import TrainingClientCase, batch, train
from crucible_kitchen.types import LoraSpec, Message, SessionSpec, StateRef
from crucible_kitchen_noop import (
    NoopBlobStore,
    NoopDatasetStore,
    NoopEvaluator,
    NoopLLMClient,
    NoopTrainingClient,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return virtual_clock()


def spec(directory, **changes):
    return SessionSpec(**({"model": "toy", "lora": None, "seed": 0, "directory": str(directory)} | changes))


async def test_latency_is_virtual_time(tmp_path):
    client = NoopTrainingClient(latency=3600.0)
    case = TrainingClientCase(client, "toy", tmp_path)
    start = anyio.current_time()
    async with client.open_session(spec(tmp_path)) as session:
        await train(session, [batch(session)], case.optimizer())
    assert anyio.current_time() - start == 3 * 3600.0


async def test_a_session_that_is_left_does_not_wait_for_its_calls(tmp_path):
    client = NoopTrainingClient(latency=3600.0)
    start = anyio.current_time()
    async with client.open_session(spec(tmp_path)) as session:
        for _ in range(5):
            await session.forward(batch(session))
    assert anyio.current_time() == start


@pytest.mark.parametrize("overrides", [{"synthetic": False}, {"no_such": 1}, {"losses": frozenset()}])
def test_what_is_a_fact_cannot_be_overridden(overrides):
    with pytest.raises(ConfigError, match="cannot override"):
        NoopTrainingClient(capabilities=overrides)


@pytest.mark.parametrize(
    ("capabilities", "changes"),
    [
        ({"lora": False}, {"lora": LoraSpec(2)}),
        ({"full_weights": False}, {}),
        ({}, {"lora": LoraSpec(2, dropout=0.1)}),
        ({}, {"lora": LoraSpec(2, targets=("q_proj",))}),
        ({}, {"chat_template": "{{ messages }}"}),
    ],
)
async def test_what_is_lacking_is_refused_when_the_session_opens(capabilities, changes, tmp_path):
    client = NoopTrainingClient(capabilities=capabilities)
    with pytest.raises(CapabilityError):
        async with client.open_session(spec(tmp_path, **changes)):
            pass


async def test_what_is_lacking_is_refused_when_it_is_asked_for(tmp_path):
    lacks = {"sampling": False, "export": False, "ordered_accumulation": False}
    async with NoopTrainingClient(capabilities=lacks).open_session(spec(tmp_path)) as session:
        with pytest.raises(CapabilityError):
            await session.sampler()
        with pytest.raises(CapabilityError):
            await session.export(str(tmp_path))
        async with session.step(0) as step:
            with pytest.raises(CapabilityError):
                await step.forward_backward(batch(session), order=0)


async def test_a_step_without_a_gradient_or_after_its_end_is_refused(tmp_path):
    client = NoopTrainingClient()
    case = TrainingClientCase(client, "toy", tmp_path)
    async with client.open_session(spec(tmp_path)) as session:
        with pytest.raises(BackendUserError, match="no gradient"):
            await train(session, [], case.optimizer())
        async with session.step(0) as step:
            await step.forward_backward(batch(session), order=1)
            with pytest.raises(BackendUserError, match="order 1"):
                await (await step.forward_backward(batch(session), order=1))
            await (await step.apply(case.optimizer()))
            with pytest.raises(BackendUserError, match="applied"):
                await step.forward_backward(batch(session))
        with pytest.raises(BackendUserError, match="closed"):
            await step.apply(case.optimizer())


async def test_states_that_are_none_are_refused(tmp_path):
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, allow_pickle=True, meta=np.array([{"step": 1}], dtype=object))
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    async with NoopTrainingClient().open_session(spec(tmp_path)) as session:
        for path in (foreign, text, tmp_path / "absent.npz"):
            with pytest.raises(IntegrityError):
                await session.load_state(StateRef(str(path), 1))
        for name in ("", "a/b", "../up"):
            with pytest.raises(BackendUserError):
                await (await session.save_state(name))
        state = await (await session.save_state("all_weights"))
    async with NoopTrainingClient().open_session(spec(tmp_path, lora=LoraSpec(2))) as other:
        with pytest.raises(BackendUserError, match="another kind"):
            await other.load_state(state)


async def test_a_place_that_cannot_be_written_is_a_store_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    async with NoopTrainingClient().open_session(spec(blocked)) as session:
        with pytest.raises(StoreError):
            await (await session.save_state("state"))


async def test_a_tree_cannot_leave_its_directory(tmp_path):
    store = NoopBlobStore()
    data = await store.put(b"evil", kind="weights")
    listing = b'{"files": [{"path": "../../evil", "sha256": "%s", "size": 4}]}' % data.sha256.encode()
    tree = await store.put(listing, kind="weights")
    with pytest.raises(IntegrityError, match="leaves"):
        await store.get_tree(tree.uri, tmp_path / "a" / "b")
    assert not (tmp_path / "evil").exists()
    plain = await store.put(b"[]", kind="weights")
    with pytest.raises(IntegrityError):
        await store.get_tree(plain.uri, tmp_path / "c")


@pytest.mark.parametrize("options", [{"rows": "many"}, {"rows": "1000000"}, {"difficulty": "2"}])
async def test_options_that_a_dataset_has_not_are_refused(options):
    with pytest.raises(ConfigError):
        await NoopDatasetStore().load(DatasetSpec("toy", options=tuple(options.items())))


async def test_all_rows_of_all_splits_differ_up_to_the_largest_size():
    seen = set()
    for split in ("train", "validation", "test"):
        dataset = await NoopDatasetStore().load(DatasetSpec("toy", split, options=(("rows", "100000"),)))
        seen.update(row["prompt"] for row in await dataset.rows(range(len(dataset))))
    assert len(seen) == 100_032


async def test_a_store_may_know_some_names_only():
    store = NoopDatasetStore(names=["toy"])
    with pytest.raises(DatasetNotFound):
        await store.load(DatasetSpec("other"))


async def test_predictions_in_another_order_are_refused():
    async def predict(examples):
        return [Prediction(example.key, "a") for example in reversed(examples)]

    examples = [EvalExample("one", (1,), "a"), EvalExample("two", (1,), "b")]
    with pytest.raises(BackendUserError, match="order"):
        await NoopEvaluator().evaluate(predict, examples)


scalars = st.one_of(
    st.just({"type": "string"}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"const": "fixed"}),
    st.just({"enum": ["a", 2, None]}),
    st.integers(-5, 5).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 3}),
    st.integers(-5, 5).map(lambda high: {"type": "number", "maximum": high}),
)
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        inner.map(lambda item: {"type": "array", "items": item, "minItems": 2}),
        st.lists(inner, min_size=1, max_size=3).map(lambda choices: {"anyOf": choices}),
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(
            lambda fields: {"type": "object", "properties": fields, "required": sorted(fields)}
        ),
    ),
    max_leaves=6,
)


@given(schemas, st.integers(0, 5))
def test_a_reply_fulfils_whatever_schema_is_understood(schema, seed):
    reply = anyio.run(lambda: NoopLLMClient(seed=seed).chat([Message("user", "?")], schema=schema))
    jsonschema.validate(reply.parsed, schema)


@pytest.mark.parametrize(
    "schema", [{"type": "string", "pattern": "^a"}, {"not": {}}, {"$ref": "#/$defs/absent"}, {"type": "date"}]
)
async def test_a_schema_that_is_not_understood_is_refused(schema):
    with pytest.raises(BackendUserError):
        await NoopLLMClient().chat([Message("user", "?")], schema=schema)


async def test_references_within_a_schema_are_followed():
    schema = {"$ref": "#/$defs/score", "$defs": {"score": {"type": "integer", "minimum": 3, "maximum": 3}}}
    assert (await NoopLLMClient().chat([Message("user", "?")], schema=schema)).parsed == 3

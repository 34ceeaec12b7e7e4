"""Order of samples: none is lost or repeated in an epoch, for any number of workers and after each resume."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from umbrella.config import load_settings
from umbrella.conversations.schema import Conversation
from umbrella.data.pipeline import (
    Plan,
    count_processes,
    evaluation_order,
    from_table,
    group_samples,
    sample_order,
    slices,
    to_table,
)
from umbrella.data.rendering import Renderer, load_renderer
from umbrella.data.splits import read_splits

few = settings(max_examples=60, deadline=None, derandomize=True)


def make_plan(size: int, lengths: bool, **others: int) -> Plan:
    drawn = np.random.default_rng(size).integers(1, 9, size) if lengths else None
    return Plan(size=size, lengths=drawn, **others)


plans = st.builds(
    make_plan,
    size=st.integers(1, 40),
    lengths=st.booleans(),
    seed=st.integers(0, 2**32),
    epochs=st.integers(1, 4),
    workers=st.integers(1, 4),
    batch_size=st.integers(1, 6),
    accumulate=st.integers(1, 3),
    window=st.integers(1, 4),
)


def positions_of(plan: Plan, rank: int, start: int = 0) -> np.ndarray:
    """The positions of one worker, in order."""
    parts = [np.arange(*bounds) for bounds in plan.micro_batches(rank, start)]
    return np.concatenate([np.empty(0, int), *parts])


def steps_of(plan: Plan) -> np.ndarray:
    """(steps, workers, samples per worker): the positions of each global batch."""
    return np.stack([positions_of(plan, rank).reshape(plan.steps, -1) for rank in range(plan.workers)], axis=1)


@few
@given(st.sampled_from([(1, 12, 1), (1, 4, 3), (2, 6, 1), (2, 3, 2), (3, 4, 1), (4, 3, 1), (4, 1, 3)]), plans)
def test_global_batches_do_not_depend_on_workers_and_accumulation(shares: tuple[int, ...], plan: Plan) -> None:
    fixed = {name: getattr(plan, name) for name in ("size", "seed", "epochs", "lengths", "window")}
    alone = Plan(**fixed, workers=1, batch_size=12, accumulate=1)
    shared = Plan(**fixed, workers=shares[0], batch_size=shares[1], accumulate=shares[2])
    batches = [np.sort(p.samples(steps_of(p).reshape(p.steps, -1)), axis=1) for p in (alone, shared)]
    assert np.array_equal(*batches)


@few
@given(plans, plans, st.data())
def test_every_sample_comes_once_per_epoch_also_if_other_workers_resume(
    plan: Plan, other: Plan, data: st.DataObject
) -> None:
    assert plan.steps * plan.per_step == plan.epochs * plan.size + plan.surplus
    assert 0 <= plan.surplus < plan.per_step
    done = data.draw(st.integers(0, plan.steps)) * plan.per_step
    shape = {name: getattr(other, name) for name in ("workers", "batch_size", "accumulate")}
    rest = replace(plan, **shape, sorted_by=plan.per_step)
    before = plan.samples(np.arange(done))
    positions = [positions_of(rest, rank, done) for rank in range(rest.workers)]
    by_step = np.stack([of.reshape(-1, rest.per_step // rest.workers) for of in positions], axis=1)
    after = np.sort(by_step.reshape(-1, rest.per_step), axis=1).reshape(-1).astype(int)
    assert np.array_equal(after, np.arange(done, done + len(after)))  # step by step
    seen = np.concatenate([before, rest.samples(after)])
    assert len(seen) >= plan.epochs * plan.size
    for epoch in seen[: plan.epochs * plan.size].reshape(plan.epochs, plan.size):
        assert sorted(epoch) == list(range(plan.size))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    one = Plan(size=30, seed=5, epochs=2, workers=1, batch_size=1, accumulate=1)
    other = Plan(size=30, seed=5, epochs=9, workers=4, batch_size=6, accumulate=3)
    everything = np.arange(60)
    first, second = one.samples(everything).reshape(2, 30)
    assert np.array_equal(one.samples(everything), other.samples(everything))
    assert np.array_equal(first, sample_order(5, 0, 30))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, sample_order(6, 0, 30))


@pytest.mark.parametrize(
    ("size", "epochs", "workers", "batch_size", "accumulate", "expected"),
    [  # per step, steps, steps per epoch, surplus
        (10, 1, 1, 5, 1, (5, 2, 2, 0)),
        (10, 3, 2, 2, 1, (4, 8, 3, 2)),
        (10, 2, 2, 3, 2, (12, 2, 1, 4)),
        (3, 1, 4, 8, 2, (64, 1, 1, 61)),  # one step sees the cohort 21 times over
    ],
)
def test_steps_and_surplus_by_hand(
    size: int, epochs: int, workers: int, batch_size: int, accumulate: int, expected: tuple
) -> None:
    plan = Plan(size, 0, epochs, workers, batch_size, accumulate)
    assert (plan.per_step, plan.steps, plan.steps_per_epoch, plan.surplus) == expected
    once_more = f"; the last step is filled up with {expected[3]} samples once more" if expected[3] else ""
    said = f"samples: {size} in each of {epochs} epochs, {expected[1]} steps of {expected[0]}{once_more}"
    assert plan.description == said


@few
@given(plans, st.data())
def test_micro_batches_from_any_step_are_the_rest_of_the_order(plan: Plan, data: st.DataObject) -> None:
    done = data.draw(st.integers(0, plan.steps - 1))
    for rank in range(plan.workers):
        everything = list(plan.micro_batches(rank))
        assert list(plan.micro_batches(rank, done * plan.per_step)) == everything[done * plan.accumulate :]
        assert {stop - start for start, stop in everything} == {plan.batch_size}


@few
@given(plans, st.integers(1, 60), st.booleans(), st.data())
def test_micro_batches_by_tokens_hold_as_many_samples_as_fit_and_every_sample_once(
    plan: Plan, tokens: int, packed: bool, data: st.DataObject
) -> None:
    sizes = np.random.default_rng(plan.size).integers(1, 9, plan.size)
    plan = replace(plan, tokens=sizes, max_tokens=tokens, packed=packed)
    steps = list(plan.bounds())
    assert len(steps) == plan.steps == plan.steps_from(0)
    assert replace(plan, epochs=1).steps == plan.steps_per_epoch
    assert int(steps[-1][-1]) == plan.epochs * plan.size + plan.surplus
    assert int(steps[-1][0]) < plan.epochs * plan.size, "no step lies beyond the last epoch"

    def count(start: int, stop: int) -> int:
        lengths = sizes[plan.samples(np.arange(start, stop))]
        return lengths.sum() if packed else lengths.max() * len(lengths)

    ends = [int(steps[0][0])]
    for bounds in steps:
        assert int(bounds[0]) == ends[-1], "steps are consecutive"
        ends.append(int(bounds[-1]))
        for start, stop in pairwise(bounds):
            assert stop - start == 1 or count(start, stop) <= tokens
            assert count(start, stop + 1) > tokens, "one more fits"
    shares = [list(plan.micro_batches(rank)) for rank in range(plan.workers)]
    assert sorted(chain.from_iterable(shares)) == [(int(a), int(b)) for bounds in steps for a, b in pairwise(bounds)]
    # A resume continues with the same steps.
    done = data.draw(st.integers(0, len(steps) - 1))
    resumed = replace(plan, sorted_by=plan.sorted_by or plan.per_step)
    assert [list(bounds) for bounds in resumed.bounds(ends[done])] == [list(bounds) for bounds in steps[done:]]


@pytest.mark.parametrize(
    ("loader", "on_gpu", "cluster", "processes"),
    [
        ("auto", True, {"CPU": 16, "GPU": 2}, 2),
        ("auto", True, {"CPU": 15, "GPU": 2}, 0),
        ("auto", False, {"CPU": 64}, 0),
        ("threads", True, {"CPU": 64, "GPU": 1}, 0),
        ("processes", False, {"CPU": 2}, 2),
    ],
)
def test_processes_make_batches_where_a_gpu_has_cpus_beside_it(
    loader: str, on_gpu: bool, cluster: dict, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: cluster)
    assert count_processes(loader, on_gpu) == processes


def test_a_plan_is_pickled_without_its_cache() -> None:
    plan = Plan(size=9, seed=0, epochs=1, workers=1, batch_size=2, accumulate=1, lengths=np.arange(9))
    expected = plan.rows(0, 9)
    copied = pickle.loads(pickle.dumps(plan))
    assert np.array_equal(copied.rows(0, 9)[0], expected[0])
    assert copied.rows(0, 9)[1] == expected[1]


@few
@given(plans)
def test_samples_of_a_window_are_grouped_by_length_into_steps(plan: Plan) -> None:
    assume(plan.lengths is not None)
    plain = sample_order(plan.seed, 1, plan.size)
    first = -plan.size % plan.per_step  # where the first whole step of epoch 1 begins
    order = plan.order(1)
    assert np.array_equal(order[:first], plain[:first])
    for start in range(first, plan.size, plan.window * plan.per_step):
        here = slice(start, start + plan.window * plan.per_step)
        assert sorted(order[here]) == sorted(plain[here])
        whole = len(order[here]) // plan.per_step * plan.per_step
        steps = plan.lengths[order[here][:whole]].reshape(-1, plan.per_step)
        by_length = steps[np.lexsort((steps[:, -1], steps[:, 0]))].reshape(-1)
        assert np.array_equal(by_length, np.sort(by_length))


def test_steps_of_a_window_are_shuffled() -> None:
    plan = Plan(size=64, seed=0, epochs=1, workers=1, batch_size=2, accumulate=1, lengths=np.arange(64), window=32)
    first = plan.order(0).reshape(-1, 2)[:, 0].tolist()
    assert first != sorted(first) == list(range(0, 64, 2))


def test_groups_share_steps_and_each_sample_comes_once_per_epoch() -> None:
    groups = np.repeat(np.arange(20), 5)
    plan = Plan(size=100, seed=3, epochs=2, workers=1, batch_size=10, accumulate=1, groups=groups)
    for epoch in range(2):
        order = plan.order(epoch)
        assert sorted(order.tolist()) == list(range(100))
        assert [len(set(groups[step].tolist())) for step in order.reshape(-1, 10)] == [2] * 10
    assert plan.order(0).tolist() == plan.order(0).tolist() != plan.order(1).tolist()
    alone = replace(plan, groups=None).order(0).reshape(-1, 10)
    assert np.mean([len(set(groups[step].tolist())) for step in alone]) > 3


def test_groups_are_references_or_subjects(talk: Callable[..., Conversation]) -> None:
    cohort = []
    for reference, subject in ("ra", "qa", "rb"):
        volumes = [("sMRI", f"{reference}.nii"), ("sMRI", f"{subject}.nii"), "?"]
        cohort.append(talk(("user", volumes), ("assistant", "!"), metadata={"subject_id": subject}))
    found = {by: group_samples(cohort, by) for by in ("reference", "subject", "none")}
    assert (found["reference"].tolist(), found["subject"].tolist(), found["none"]) == ([1, 0, 1], [0, 0, 1], None)


def test_padding_stays_under_a_tenth_of_the_tokens_on_the_default_cohort() -> None:
    defaults = load_settings()
    samples = read_splits(defaults, lambda things, _: things, ("train",), dry_run=True).train
    renderer = load_renderer(defaults)
    examples = [renderer.render(sample) for sample in samples]
    tokens = np.array([len(example.input_ids) for example in examples])
    lengths = np.array([example.bucket_length for example in examples])

    def padding(**others: Any) -> float:
        train = defaults.train
        plan = Plan(len(samples), 0, train.epochs, 1, train.batch_size, train.accumulate, **others)
        planned = tokens[plan.samples(positions_of(plan, 0))]
        batches = planned[: len(planned) // train.batch_size * train.batch_size].reshape(-1, train.batch_size)
        return 1 - batches.sum() / (batches.max(axis=1) * train.batch_size).sum()

    assert padding(lengths=lengths, window=defaults.data.bucket_batches) < 0.1 < 0.25 < padding()


def test_bucket_lengths_do_not_depend_on_the_label(tokenizer: Any, talk: Callable[..., Conversation]) -> None:
    renderer = Renderer(tokenizer, {})
    answers = ("male.", "cognitively normal.", "Alzheimer's disease, I think.")
    lengths = {
        renderer.render(talk(("user", "?"), ("assistant", a), metadata={"subject_label": a})).bucket_length
        for a in answers
    }
    assert len(lengths) == 1
    longer = renderer.render(talk(("user", "Sex?"), ("assistant", "A report. " * 20)))
    assert longer.bucket_length > max(lengths) + 100


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 8), st.integers(1, 4))
def test_evaluations_see_every_sample_once_sorted_by_length(lengths: list, workers: int, batch_size: int) -> None:
    shares = [evaluation_order(np.array(lengths), rank, workers) for rank in range(workers)]
    assert sorted(np.concatenate(shares)) == list(range(len(lengths)))
    for share in shares:
        assert all(np.diff(np.array(lengths)[share]) >= 0)
        parts = [share[start:stop] for start, stop in slices(len(share), batch_size)]
        assert np.array_equal(np.concatenate([np.empty(0, int), *parts]), share)
        assert all(len(part) == batch_size for part in parts[:-1])


def test_the_table_keeps_conversations(cohort: dict[str, Conversation], talk: Callable[..., Conversation]) -> None:
    conversations = [
        *cohort.values(),
        talk(("user", "Größe?\n\U0001f9e0"), ("assistant", ""), extra={"kept": [1, None]}),
    ]
    table = to_table(conversations)
    assert [from_table(table, i) for i in range(table.num_rows)] == conversations

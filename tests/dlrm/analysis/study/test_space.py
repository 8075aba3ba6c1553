"""Ranges of hyperparameters as they are typed, and as they reach a configuration."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dlrm.analysis.study.batch_size import (
    check_batches,
    check_space,
    choose_batches,
    default_batches,
    default_space,
    first_parameters,
)
from dlrm.analysis.study.held_settings import list_held, set_batch_size
from dlrm.analysis.study.search import FIRST, propose, spread_first
from dlrm.analysis.study.space import (
    Dimension,
    apply_parameters,
    extend,
    find_edges,
    parse_space,
    read_setting,
)
from dlrm.config import RunConfig, SmallTablesConfig, StepConfig, TablesConfig
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.recipes import RECIPES


def test_ranges_are_read_as_typed() -> None:
    rate, momentum, both = parse_space(
        ["dense.learning_rate=1e-4:1e-1", "dense.momentum=0:0.95", "tables.eps+dense.eps=1:2:linear"]
    )
    assert rate == Dimension(name="dense.learning_rate", low=1e-4, high=0.1)
    assert momentum == Dimension(name="dense.momentum", low=0, high=0.95, log=False, ends=("low",))
    assert both == Dimension(name="tables.eps+dense.eps", low=1, high=2, log=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dense.learning_rate", "expected SETTING=LOW:HIGH"),
        ("=1:2", "expected SETTING=LOW:HIGH"),
        ("a=1", "expected SETTING=LOW:HIGH"),
        ("a=1:2:cubic", "expected SETTING=LOW:HIGH"),
        ("a=2:1", "expected LOW < HIGH, got 2:1"),
        ("a=0:1:log", "expected LOW > 0"),
        ("a=1:inf", "expected LOW < HIGH"),
    ],
)
def test_what_is_no_range_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"--space.*{words}"):
        parse_space([text])
    with pytest.raises(ValueError, match="each setting once"):
        parse_space(["a=1:2", "a=1:3"])


def test_parameters_reach_the_configuration() -> None:
    run = RunConfig()
    changed = apply_parameters(
        run,
        {
            "dense.learning_rate": 0.03,
            "dense_schedule.decay_samples+tables_schedule.decay_samples": 1234.6,
            "tables.eps": 0.5,
        },
    )
    assert (changed.dense.learning_rate, changed.tables.eps) == (0.03, 0.5)
    assert (changed.dense_schedule.decay_samples, changed.tables_schedule.decay_samples) == (1235, 1235)
    assert changed.model == run.model
    assert read_setting(changed, "dense_schedule.decay_samples") == 1235


@pytest.mark.parametrize("path", ["dense.rate", "model.bottom", "shuffle", "dense", "model.interaction"])
def test_what_is_no_number_cannot_be_tuned(path: str) -> None:
    with pytest.raises(ValueError, match=f"--space: expected a setting .*'{path}'"):
        apply_parameters(RunConfig(), {path: 1.0})


def test_edges_are_seen_and_ranges_reach_beyond() -> None:
    space = (
        Dimension(name="rate", low=1e-4, high=1),
        Dimension(name="share", low=0, high=1, log=False, ends=("low",)),
    )
    assert find_edges(space, {"rate": 1.1e-4, "share": 0.0}) == {"rate": "low"}
    assert find_edges(space, {"rate": 1e-2, "share": 0.99}) == {"share": "high"}
    assert find_edges(space, {"rate": 1e-3, "share": 0.5}) == {}
    longer = extend(space, {"rate": "low", "share": "high"})
    assert (longer[0].low, longer[0].high) == pytest.approx((1e-6, 1))
    assert (longer[1].low, longer[1].high) == (0, 1.5)
    assert extend(space, {"rate": "high"})[0].high == pytest.approx(100)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_tuned_as_it_is(name: str) -> None:
    run = RECIPES[name].config
    space = default_space(run, 1e6)
    check_space(run, space)
    first = first_parameters(run, space)
    assert first["dense.learning_rate"] == run.dense.learning_rate
    assert find_edges(space[:2], first) == {}
    assert default_batches(run.step.global_batch_size)[2] == run.step.global_batch_size


def test_a_recipe_that_never_decays_is_tried_so_first() -> None:
    run = RECIPES["criteo-kaggle"].config
    assert (run.dense_schedule.decay_samples, run.tables_schedule.decay_samples) == (0, 0)
    space = default_space(run, 1e6)
    assert {"dense_schedule.warmup_samples", "tables_schedule.warmup_samples"} <= {d.name for d in space}
    first = first_parameters(run, space)
    decay = "dense_schedule.decay_samples+tables_schedule.decay_samples"
    assert first[decay] == 4e6
    assert decay not in find_edges(space, first)
    assert first_parameters(RECIPES["synthetic"].config, space)[decay] == 1_450_000


def test_what_is_held_goes_with_the_batch_where_its_meaning_does() -> None:
    run = RunConfig(step=StepConfig(global_batch_size=1000), tables=TablesConfig(eps=1e-2))
    larger = set_batch_size(run, 4000)
    assert larger.tables.eps == pytest.approx(2.5e-3)
    assert set_batch_size(run, 250).tables.eps == pytest.approx(4e-2)
    assert set_batch_size(run, 1000) == run
    assert set_batch_size(larger, 1000).tables.eps == pytest.approx(1e-2)
    assert larger.dense == run.dense
    assert (larger.tables.learning_rate, larger.scale_from, larger.rule) == (run.tables.learning_rate, None, None)
    assert dict(list_held(run, 4000)) == {"tables.eps": larger.tables.eps}
    small = SmallTablesConfig(below_rows=100, optimizer="cowclip", learning_rate=0.1, l2=1e-4)
    held = dict(list_held(RunConfig(step=run.step, small_tables=small), 4000))
    # 1e-8 is what their optimizers take where nothing is given.
    assert held == pytest.approx({"tables.eps": 2.5e-9, "small_tables.eps": 2.5e-9, "small_tables.l2": 4e-4})


def test_no_batch_is_larger_than_an_epoch() -> None:
    assert choose_batches((2000, 500), 256, 2000) == [500, 2000]
    assert choose_batches((), 256, 2000) == [64, 128, 256, 512, 1024]
    for asked, size in (((500, 2001), 2001), ((), 9000)):
        with pytest.raises(ValueError, match=f"--batches: expected at most the 2000 rows of an epoch.* got {size}"):
            choose_batches(asked, size, 2000)


def test_a_schedule_that_says_batch_sizes_is_named_at_once() -> None:
    staged = Schedule(shape="stages((10_000, 100), (20_000, 200))")
    run = RunConfig(step=StepConfig(global_batch_size=100), dense_schedule=staged)
    check_batches(run, [100])
    with pytest.raises(ValueError, match=r"--batches 200: .*the schedule's first stage, got 200"):
        check_batches(run, [100, 200])


def test_a_range_that_a_recipe_does_not_accept_is_named_at_once() -> None:
    run = RunConfig(dense=DenseOptimizerConfig(name="sgd", momentum=0.9))
    check_space(run, parse_space(["dense.momentum=0:0.99"]))
    with pytest.raises(ValueError, match=r"--space dense.momentum=0:1.5: --dense.momentum: expected .* got 1.5"):
        check_space(run, parse_space(["dense.momentum=0:1.5"]))


def test_the_first_points_are_spread_over_every_range() -> None:
    space = (Dimension(name="a", low=1e-4, high=1), Dimension(name="b", low=0, high=10, log=False))
    points = spread_first(space, 3)
    assert points == spread_first(space, 3) != spread_first(space, 4)
    assert sorted(int(point["b"] * FIRST / 10) for point in points) == list(range(FIRST))
    decades = [1e-4 * 10 ** (4 * share / FIRST) for share in range(FIRST + 1)]
    for low, high in pairwise(decades):
        assert sum(low <= point["a"] < high for point in points) == 1


def test_proposals_gather_where_it_was_cheap() -> None:
    space = (Dimension(name="rate", low=1e-4, high=1),)
    tried: list[tuple[dict[str, float], float]] = [
        (point, abs(point["rate"] - 0.01)) for point in spread_first(space, 0)
    ]
    for number in range(25):
        point = propose(space, tried, seed=number)
        assert point == propose(space, tried, seed=number), "a function of its arguments"
        tried.append((point, abs(point["rate"] - 0.01)))
    late = [point["rate"] for point, _ in tried[-10:]]
    assert sum(0.003 < rate < 0.03 for rate in late) >= 6

"""Numbers and pictures of a space show collapse for what it is, to a point, a cone or a plane; its report says so."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from contrastive.ranking import embedding_space as space_module
from contrastive.ranking.embedding_space import (
    GROUPS,
    describe_space,
    find_best_uniformity,
    measure_alignment,
    measure_uniformity,
    write_space,
)
from dlrm.analysis.embedding_space import warn
from dlrm.analysis.report import write_report
from dlrm.diverged import DivergedError

DIM = 16


def draw(kind: str, count: int = 801, dim: int = DIM) -> Tensor:
    """Vectors of items that are spread evenly, or have collapsed in one way or another."""
    even = torch.randn(count, dim, generator=torch.Generator().manual_seed(1))
    match kind:
        case "even":
            return even
        case "point":
            return torch.ones(count, dim) + 0.01 * even
        case "equal":
            return torch.ones(count, dim)
        case "zero":
            return torch.zeros(count, dim)
        case "cone":
            return torch.ones(count, dim) + 0.8 * even
        case "plane":
            return even[:, :2] @ even[:2]
    raise ValueError(kind)


def test_uniformity_and_alignment_are_those_of_the_paper() -> None:
    vectors, others = draw("cone", 700), draw("even", 700)
    one, other = (v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1)[:, None] for v in (vectors, others))
    squares = ((one[:, None] - one[None]) ** 2).sum(2)[np.triu_indices(700, 1)]
    assert measure_uniformity(vectors) == pytest.approx(np.log(np.exp(-2 * squares).mean()), rel=1e-9)
    assert measure_uniformity(7 * vectors) == pytest.approx(measure_uniformity(vectors))
    assert measure_alignment(vectors, others) == pytest.approx(((one - other) ** 2).sum(1).mean())
    assert measure_alignment(vectors, 3 * vectors) == pytest.approx(0, abs=1e-12)
    assert measure_alignment(vectors, -vectors) == pytest.approx(4)


def test_best_uniformity_is_that_of_even_directions() -> None:
    for dim in (2, 3, 64):
        assert measure_uniformity(draw("even", 1500, dim)) == pytest.approx(find_best_uniformity(dim), abs=0.02)
    # On the circle it is a Bessel function.
    assert find_best_uniformity(2) == pytest.approx(math.log(np.i0(4.0)) - 4)


@pytest.mark.parametrize(
    ("kind", "uniformity", "mean_cosine", "effective_rank", "says"),
    [
        ("even", (-3.52, -3.49), (-0.02, 0.02), (15, 16), None),
        ("point", (-0.01, 0), (0.99, 1), (1, 2), "collapsed to one direction"),
        ("equal", (-1e-9, 1e-9), (1 - 1e-9, 1 + 1e-9), (1, 1.001), "collapsed to one direction"),
        ("zero", (-1e-9, 1e-9), (1 - 1e-9, 1 + 1e-9), (1, 1.001), "collapsed to one direction"),
        ("cone", (-2, -1), (0.5, 0.7), (8, 15), "narrow cone"),
        ("plane", (-2, -1), (-0.1, 0.1), (1.9, 2.001), "collapsed to few directions: about 2.0 of 16"),
    ],
)
def test_collapse_is_told(
    kind: str,
    uniformity: tuple[float, float],
    mean_cosine: tuple[float, float],
    effective_rank: tuple[float, float],
    says: str | None,
) -> None:
    space = describe_space(draw(kind))
    assert uniformity[0] <= space.uniformity <= uniformity[1]
    assert mean_cosine[0] <= space.mean_cosine <= mean_cosine[1]
    assert effective_rank[0] <= space.effective_rank <= effective_rank[1]
    told = warn(space.mean_cosine, space.effective_rank, space.dim)
    assert told == says if says is None else says in str(told)


def test_pictures_show_collapse() -> None:
    even, point = describe_space(draw("even")), describe_space(draw("point"))

    def reach(points: list[tuple[float, float]]) -> Tensor:
        return torch.tensor(points).norm(dim=1)

    # Unscaled: at the rim, all in one place, or about the centre.
    assert reach(point.on_sphere).min() > 0.99
    assert torch.tensor(point.on_sphere).std(0).max() < 0.02
    assert reach(even.on_sphere).mean() < 0.5
    assert reach(even.on_sphere).max() <= 1
    # About the mean both are clouds; only the numbers on the axes tell them apart.
    assert reach(point.about_mean).max() < 0.02
    assert sum(point.cosines[-1:]) == pytest.approx(40)  # all pairs in the last of 80 bins of [-1, 1]
    assert sum(even.cosines) == pytest.approx(40)
    assert sum(even.directions) == pytest.approx(1)
    assert point.directions[0] > 0.999


def test_points_are_items_and_their_popularity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_module, "MOST_ITEMS", 60)
    monkeypatch.setattr(space_module, "MOST_POINTS", 50)
    counts = torch.arange(101) * 3
    counts[0] = 10_000  # PAD counts for nothing
    state = torch.get_rng_state()
    space = describe_space(draw("even", 101), counts)
    assert torch.equal(torch.get_rng_state(), state)
    assert (space.num_items, space.num_sampled) == (100, 60)
    assert len(set(space.items)) == len(space.on_sphere) == len(space.about_mean) == 50
    assert 0 not in space.items
    assert space.counts == [3 * i for i in space.items]
    assert space.groups == [0 if i > 90 else 1 if i > 50 else 2 for i in space.items]
    assert describe_space(draw("even", 101), counts) == space


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected items \[n, dim\], n > 2 and dim > 1, got shape \[2, 4\]"):
        describe_space(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"item_counts: expected shape \[5\], got \[4\]"):
        describe_space(torch.ones(5, 4), torch.ones(4))
    with pytest.raises(ValueError, match="two views of one shape"):
        measure_alignment(torch.ones(2, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="at least two vectors"):
        measure_uniformity(torch.ones(1, 4))
    broken = torch.ones(5, 4)
    broken[2, 1] = torch.nan
    with pytest.raises(DivergedError, match="row 1 and 0 more"):
        describe_space(broken[torch.tensor([0, 2, 2, 2])][:3].index_fill(0, torch.tensor([1]), 1.0))


def write_a_run(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize("kind", ["even", "point"])
def test_report_has_a_section(tmp_path: Path, kind: str) -> None:
    write_a_run(tmp_path)
    assert "Have the embeddings collapsed?" not in write_report(tmp_path).read_text()
    items = draw(kind)
    space = describe_space(items, torch.arange(len(items)), (items[:50], items[:50]))
    write_space(space, tmp_path)
    page = write_report(tmp_path).read_text()
    assert "Have the embeddings collapsed?" in page
    assert ("collapsed to one direction" in page) == (kind == "point")
    assert "Two views of the same history are 0.000 apart" in page
    assert set(re.findall(r'data-plot="(space-\w+)"', page)) == {
        "space-sphere",
        "space-mean",
        "space-cosines",
        "space-directions",
    }
    assert all(name in page for name in GROUPS)
    sphere = re.search(r'data-plot="space-sphere">(.*?)</script>', page)
    assert sphere is not None
    figure = json.loads(sphere[1])
    assert figure["layout"]["xaxis"]["range"] == figure["layout"]["yaxis"]["range"] == [-1.08, 1.08]
    drawn = sum(len(trace["x"]) for trace in figure["data"] if trace["mode"] == "markers")
    assert drawn == len(space.items) == 800


def test_report_names_a_damaged_space(tmp_path: Path) -> None:
    write_a_run(tmp_path)
    space = asdict(describe_space(draw("even")))
    del space["cosines"]
    (tmp_path / "embedding_space.json").write_text(json.dumps(space))
    with pytest.raises(ValueError, match=r"embedding_space.json: .* found no 'cosines'; remove the file"):
        write_report(tmp_path)
    (tmp_path / "embedding_space.json").write_text("{")
    with pytest.raises(ValueError, match=r"embedding_space.json: expected a JSON object"):
        write_report(tmp_path)

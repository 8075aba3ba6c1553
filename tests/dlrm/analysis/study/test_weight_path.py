"""The way of the weights: noted when it is due, kept through a stop, and drawn in the plane where it lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dlrm.analysis.study.weight_path import MOST_WEIGHTS, WeightPath, project_paths
from dlrm.training.attachments import Moment


def walk(path: WeightPath, model: torch.nn.Module, start: int, stop: int, batch_size: int = 100) -> None:
    """Add 1 to every weight in each step."""
    nothing: Any = None
    for samples in range(start, stop, batch_size):
        moment = Moment(batch=nothing, samples=samples, global_size=batch_size, batch_size=batch_size)
        path.before_step(moment)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
        path.after_step(moment, 0.0)


def test_weights_are_noted_when_it_is_due_and_after_a_stop() -> None:
    model = torch.nn.Linear(3, 2)
    first = model.weight[0, 0].item()
    path = WeightPath(model, every_samples=250)
    walk(path, model, 0, 500)
    later = WeightPath(model, every_samples=250)
    later.load_state(path.state())
    walk(later, model, 500, 1000)
    assert later.samples == [0, 300, 500, 800, 1000]
    assert later.path().shape == (5, 8)
    np.testing.assert_allclose(later.path()[:, 0] - first, [0, 3, 5, 8, 10], rtol=1e-5)


def test_a_large_model_is_sampled_alike_in_every_run() -> None:
    models = [torch.nn.Linear(300, 300) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    paths = [WeightPath(model, every_samples=100) for model in models]
    for path, model in zip(paths, models, strict=True):
        walk(path, model, 0, 100)
    assert paths[0].path().shape == (2, MOST_WEIGHTS)
    np.testing.assert_array_equal(paths[0].path(), paths[1].path())


def test_ways_in_a_plane_keep_their_distances() -> None:
    noise = np.random.default_rng(0)
    axes, _ = np.linalg.qr(noise.standard_normal((400, 2)))
    drawn = [np.cumsum(noise.standard_normal((n, 2)), axis=0) * [5.0, 1.0] for n in (12, 7)]
    offset = noise.standard_normal(400)
    planes, shares = project_paths([(points @ axes.T + offset).astype(np.float32) for points in drawn])
    assert [len(plane) for plane in planes] == [12, 7]
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert shares[0] > shares[1]
    before, after = np.concatenate(drawn), np.concatenate(planes)
    distances = [np.linalg.norm(points[:, None] - points[None], axis=-1) for points in (before, after)]
    np.testing.assert_allclose(distances[1], distances[0], atol=1e-3)
    assert (planes[0][-1] >= 0).all(), "signs are chosen, so that a page drawn again looks the same"


def test_a_model_that_does_not_move_is_a_point() -> None:
    (plane,), shares = project_paths([np.ones((3, 5), np.float32)])
    assert (plane == 0).all()
    assert shares == (0.0, 0.0)

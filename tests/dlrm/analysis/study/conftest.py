"""Finished studies of problems that train in no time, for whoever looks at their pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.analysis.study.batch_size_page import write_batch_size_page
from dlrm.analysis.study.compare_policies import PolicyRun, compare_policies
from dlrm.analysis.study.learning_rate_page import write_learning_rate_page
from dlrm.analysis.study.policies import choose_policies
from dlrm.analysis.study.space import Dimension
from dlrm.analysis.study.steps_to_result import BatchResult, Protocol, Request, steps_to_result
from dlrm.analysis.study.study_folder import StudyFolder
from dlrm.recipes import RECIPES

RUN = RECIPES["synthetic"].config
CRITICAL, LEAST_STEPS = 1000, 50


@pytest.fixture
def batch_size_study(tmp_path: Path) -> Callable[[], tuple[Path, list[BatchResult], str]]:
    """A function that runs a study of a law that is known, and returns its page, its results and what was printed."""

    def train(request: Request) -> Iterator[tuple[float, float]]:
        # As many steps as the law says, more the farther the rate is from its best, and far too many at the last batch.
        best = 0.01 * math.sqrt(request.batch_size / 100)
        steps = LEAST_STEPS * (1 + CRITICAL / request.batch_size)
        steps *= 1 + math.log(request.parameters["dense.learning_rate"] / best) ** 2 + 0.01 * request.seed
        if request.batch_size > 20_000:
            steps = math.inf
        if request.parameters["dense.learning_rate"] > 0.3:
            yield 1, math.nan
        for step in range(20, 1500, 20):
            yield step * request.batch_size, 0.5 + 0.3 * step / steps

    def study() -> tuple[Path, list[BatchResult], str]:
        space = (Dimension(name="dense.learning_rate", low=1e-3, high=1.0),)
        protocol = Protocol(goal=0.8, trials=14, repeats=2, most_samples=1e8)
        batches = [2**k for k in range(6, 17, 2)]
        with StudyFolder(tmp_path / "study", kind="batch-size", settings={}, quiet=True) as folder:
            results = steps_to_result(train, batches, space, protocol, folder)
            said = write_batch_size_page(folder, results, protocol, space, RUN, name="a <b>law</b>")
        return tmp_path / "study" / "report.html", results, said

    return study


@pytest.fixture
def learning_rate_study(tmp_path: Path) -> Callable[[], tuple[Path, str]]:
    """A function that runs a study in which cosine is planted as the best, and returns its page and words."""
    planted = {"constant": 0.70, "cosine": 0.75, "poly": 0.72, "range-test": 0.71}

    def train(wanted: PolicyRun, study: StudyFolder) -> dict[str, Any]:
        dice = np.random.default_rng([len(wanted.policy), wanted.seed])
        end = planted[wanted.policy] + 0.001 * dice.standard_normal()
        factor = wanted.factor if wanted.factor is not None else 2.0
        path = study.folder / "runs" / wanted.name / "path.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.cumsum(dice.standard_normal((20, 50)), axis=0).astype(np.float32))
        if wanted.factor is None:
            factors = np.geomspace(0.01, 10, 30).tolist()
            explored = {"suggested": 2.0, "largest": 8.0, "has_turned": True, "factors": factors, "samples": 500}
            study.trial("range-test/explore", lambda: explored | {"losses": [1 / (1 + f) for f in factors]})
        return {
            "policy": wanted.policy,
            "factor": factor,
            "seed": wanted.seed,
            "diverged": "",
            "best": end - 0.01 * abs(math.log(factor)) * (wanted.factor is not None),
            "course": [[s, 0.5 + (end - 0.5) * s / 2000] for s in range(200, 2001, 200)],
            "rates": [[s / 10, s, 0.01 * factor * (1 - s / 2001), 1.0, 1 / s] for s in range(100, 2001, 100)],
            "test_auc": end - 0.01,
            "test_logloss": 0.4,
            "gap": 0.02,
            "confidence": 0.8,
            "confidence_deviation": 0.1,
        }

    def study() -> tuple[Path, str]:
        policies = choose_policies(list(planted), [], 2000)
        factors = {p.name: [None] if p.explores else [0.5, 1.0, 2.0] for p in policies}
        with StudyFolder(tmp_path / "study", kind="learning-rate", settings={}, quiet=True) as folder:
            results = compare_policies(
                lambda wanted: train(wanted, folder), list(planted), factors, seeds=3, study=folder
            )
            said = write_learning_rate_page(folder, results, policies, 0.69, RUN, name="planted")
        return tmp_path / "study" / "report.html", said

    return study

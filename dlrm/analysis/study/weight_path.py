"""The way that dense weights take through a run: noted every so many samples, and drawn in the plane of most of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dlrm.training.attachments import Attachment, Moment

Floats = NDArray[np.float32]

PATH = "path.npy"
MOST_WEIGHTS = 50_000


class WeightPath(Attachment):
    """Notes the dense weights at the beginning and after every so many samples.

    Of a model with more than `MOST_WEIGHTS` weights, it notes that many, drawn evenly: distances keep their ratios.

    Args:
        model: whose parameters are noted; rows of tables are none.
        every_samples: between two notes.
    """

    name = "weight_path"

    def __init__(self, model: nn.Module, every_samples: float) -> None:
        self.model, self.every_samples = model, every_samples
        count = sum(parameter.numel() for parameter in model.parameters())
        self._chosen = np.sort(np.random.default_rng(0).permutation(count)[:MOST_WEIGHTS])
        self.samples: list[int] = []
        self.weights: list[Tensor] = []

    def before_step(self, moment: Moment) -> None:
        """Note where the run begins."""
        if not self.samples:
            self._note(moment.samples)

    def after_step(self, moment: Moment, loss: float) -> None:
        """Note where the run is, if it is due."""
        after = moment.samples + moment.global_size
        if after // self.every_samples > moment.samples // self.every_samples:
            self._note(after)

    def path(self) -> Floats:
        """Return the weights that were noted [notes, weights]."""
        return np.stack([weights.numpy() for weights in self.weights])

    def state(self) -> dict[str, Any]:
        """Return what was noted."""
        return {"samples": list(self.samples), "weights": list(self.weights)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.samples, self.weights = list(state["samples"]), list(state["weights"])

    def _note(self, samples: int) -> None:
        flat = torch.cat([parameter.detach().float().reshape(-1).cpu() for parameter in self.model.parameters()])
        self.samples.append(samples)
        self.weights.append(flat[torch.from_numpy(self._chosen)])


def project_paths(paths: Sequence[Floats]) -> tuple[list[NDArray[np.float64]], tuple[float, float]]:
    """Return ways in the plane of their two principal components (Li et al. 2018, section 7), and what these explain.

    Args:
        paths: each [notes, weights], of models of one form.

    Returns:
        Each way as [notes, 2], and the share of the variance along either axis. The plane is that of all ways
        together; its origin is their mean.
    """
    together = np.concatenate(paths).astype(np.float64)
    centred = together - together.mean(axis=0)
    # There are far fewer notes than weights, so their products are the smaller matrix.
    values, vectors = np.linalg.eigh(centred @ centred.T)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    total = values.sum()
    plane = np.zeros((len(together), 2))
    axes = min(2, len(values))
    plane[:, :axes] = vectors[:, :axes] * np.sqrt(values[:axes])
    # Signs are free; the last note of the first way shall lie at the upper right.
    plane *= np.where(plane[len(paths[0]) - 1] < 0, -1.0, 1.0)
    shares = [float(value / total) if total > 0 else 0.0 for value in (*values, 0.0)[:2]]
    ends = np.cumsum([len(path) for path in paths])[:-1]
    return np.split(plane, ends), (shares[0], shares[1])

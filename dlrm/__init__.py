"""Click models: batches, models, optimizers, the training loop, checkpoints, reports and the command line."""

import os

# OpenMP threads that spin while they wait starve each other as soon as a neighbour is busy: steps take several times as
# long. torch reads this when it is imported, so it is said before any module of this package can do that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

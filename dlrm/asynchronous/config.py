"""What a trainer beside parameter servers is told besides what every run is told; free of torch and gRPC."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from dlrm.asynchronous.dense_average_config import DenseAverageConfig
from dlrm.config import PlacedConfig, RunConfig
from dlrm.tables_config import TablesConfig
from parameter_server.description import Durability
from parameter_server.processes.config import ClientConfig

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class ServersConfig:
    """How a trainer works with parameter servers; all trainers of a run say the same but for the first two."""

    coordinator: str = ""
    """Address of the coordinator: host:port, or unix:/path."""
    name: str = "trainer-0"
    """Of this trainer, in logs and in the run's folder."""
    staleness: int | None = None
    """Batches that a trainer may be ahead of the slowest; 0 is lock-step; None lets each go as fast as it can."""
    durability: Durability = "snapshot"
    """What survives a killed shard: none, what the last snapshot held, or with journal all that was acknowledged."""
    trainers: int = 1
    """How many trainers the global batch is shared by: each trains batches so many times smaller, and so takes as many
    steps as one process would. Servers that update the dense part take whole batches of each."""
    lanes: int = 64
    """How many trainers may take part at a time."""
    chunk_batches: int = 16
    """Batches that a trainer is given at a time, and another does again if it dies."""
    alone_samples: int | None = None
    """Samples at the start of the data that one trainer trains while the others wait, as rows change most at first;
    None: a twentieth of the run."""
    values: Literal["fp32", "fp16"] = "fp32"
    """Type in which rows and gradients travel."""
    max_in_flight: int = 4
    """Messages to one shard that may be unanswered."""
    deadline_seconds: float = 120.0
    """Give up on a shard or the coordinator after trying for so long."""

    def __post_init__(self) -> None:
        for name in ("trainers", "lanes", "chunk_batches", "max_in_flight"):
            if getattr(self, name) < 1:
                flag = f"--servers.{name.replace('_', '-')}"
                raise ValueError(f"{flag}: expected at least 1, got {getattr(self, name)}")
        if self.alone_samples is not None and self.alone_samples < 0:
            raise ValueError(f"--servers.alone-samples: expected a number >= 0, or None, got {self.alone_samples}")
        if self.staleness is not None and self.staleness < 0:
            raise ValueError(f"--servers.staleness: expected a number >= 0, or None, got {self.staleness}")
        if not self.deadline_seconds > 0:
            raise ValueError(f"--servers.deadline-seconds: expected a number above 0, got {self.deadline_seconds}")

    def alone_for(self, samples: int) -> int:
        """Return `alone_samples` of a run on so many samples.

        Rates are highest and sums of squares smallest at the start, where steps from stale rows therefore go far astray
        (Dean et al. 2012, "Large Scale Distributed Deep Networks", section 4.1, begin with one replica as well).
        """
        return samples // 20 if self.alone_samples is None else self.alone_samples


@dataclass(frozen=True, kw_only=True)
class ServedConfig(PlacedConfig):
    """A run whose tables lie on parameter servers, whatever the model; the second parent of such configurations."""

    tables: TablesConfig = field(default_factory=TablesConfig)
    servers: ServersConfig = field(default_factory=ServersConfig)
    dense_average: DenseAverageConfig = field(default_factory=DenseAverageConfig)
    client: ClientConfig = field(default_factory=ClientConfig)

    @property
    def trainer_batch_size(self) -> int:
        """Samples per step of one trainer.

        Where servers update the dense part, each trainer's step is one of theirs, and the batch is that of the run.
        """
        share = 1 if self.dense_average.is_on_servers else self.servers.trainers
        return max(1, self.step.global_batch_size // share)

    @classmethod
    def of(cls, config: PlacedConfig) -> Self:
        """Return the configuration of a recipe, and defaults of what it does not know."""
        return cls(**{item.name: getattr(config, item.name) for item in fields(config)})


@dataclass(frozen=True, kw_only=True)
class AsynchronousConfig(RunConfig, ServedConfig):
    """A recipe, trained by several trainers around parameter servers."""


def check_asynchronous(config: ServedConfig) -> None:
    """Check that a configuration asks for nothing that needs all trainers at one point, or another device.

    Raises:
        ValueError: naming the flag.
    """
    evaluation, growth = config.evaluation, config.growth.is_on or bool(config.staged_batches)
    asked = {
        "--evaluation.patience": evaluation.patience is not None,
        "--evaluation.stop-at": evaluation.stop_at is not None,
        "--growth": growth,
        "--plateau.policy": config.plateau.policy != "off",
        "--rule adascale": config.rule == "adascale",
        "--curvature-rate.every-samples": config.curvature_rate.every_samples is not None,
        "--adversarial.eps": config.adversarial.eps > 0,
        "--ranks": (config.ranks or 1) > 1,
        "--step.device cuda": config.step.device == "cuda",
        "--tables.row-type": config.tables.row_type != "fp32",
    }
    for flag, is_asked in asked.items():
        if is_asked:
            raise ValueError(
                f"{flag}: expected none beside parameter servers, where trainers do not wait for one another; leave it "
                "out, or train with `recforge train`"
            )

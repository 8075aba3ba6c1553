"""The `recforge` command: what `python -m dlrm` offers, recommenders of sequences, and `doctor`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from deploy import __version__
from dlrm import cli

COMMANDS: dict[str, cli.Command] = {
    **cli.COMMANDS,
    "train": cli.Command(cli.COMMANDS["train"].help, "contrastive.command:run_train"),
    "ps": cli.Command(cli.COMMANDS["ps"].help, "contrastive.asynchronous:run_ps"),
    "recommend": cli.Command("say what comes next for a user", "contrastive.recommend_command:run_recommend"),
    "nearest": cli.Command("say which items are like an item", "contrastive.recommend_command:run_nearest"),
    "export": cli.Command("write a run's weights as plain safetensors files", "deploy.export:run_export"),
    "doctor": cli.Command("say whether torch, fbgemm, torchrec and the driver fit together", "deploy.doctor:main"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) names; return its exit status."""
    return cli.run(COMMANDS, argv, version=__version__)


if __name__ == "__main__":
    sys.exit(main())

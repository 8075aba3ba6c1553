"""`python -m contrastive train ...`: how ranks and trainers of a sequence recommender are started."""

import sys

from dlrm import cli

if __name__ == "__main__":
    commands = {
        "train": cli.Command("train a recipe for sequences", "contrastive.command:run_train"),
        "ps": cli.Command(cli.COMMANDS["ps"].help, "contrastive.asynchronous:run_ps"),
    }
    sys.exit(cli.run(commands))

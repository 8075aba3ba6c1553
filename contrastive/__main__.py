"""`python -m contrastive train ...`: how ranks of a sequence recommender are started."""

import sys

from dlrm import cli

if __name__ == "__main__":
    commands = {"train": cli.Command("train a recipe for sequences", "contrastive.command:run_train")}
    sys.exit(cli.run(commands))

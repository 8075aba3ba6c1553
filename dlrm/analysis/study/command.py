"""`recforge study`: finds the kind of study that is asked for, and runs it on a recipe."""

from __future__ import annotations

from dlrm.cli import Command

KINDS: dict[str, Command] = {
    "batch-size": Command(
        "steps and samples to a goal against the batch size, everything tuned anew for each, and the critical batch",
        "dlrm.analysis.study.batch_size:run_batch_size",
    ),
    "learning-rate": Command(
        "policies of the learning rate compared by quality, cost and robustness",
        "dlrm.analysis.study.learning_rate:run_learning_rate",
    ),
    "curvature": Command(
        "eigenvalues, sharpness and landscapes around one run's weights, or two runs' and the line between them",
        "dlrm.analysis.curvature.command:run_curvature",
    ),
}


def run_study(argv: list[str]) -> int:
    """Run the study that `argv` names: a kind, a recipe, configuration file or run, then flags.

    Raises:
        ValueError: there is no such kind.
    """
    if not argv or argv[0].startswith("-"):
        print(_usage())
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    if argv[0] not in KINDS:
        raise ValueError(f"recforge study: expected one of {', '.join(KINDS)}, got '{argv[0]}'")
    return KINDS[argv[0]].run(argv[1:])


def _usage() -> str:
    width = max(map(len, KINDS))
    return "\n".join(
        [
            "usage: recforge study KIND RECIPE|CONFIG.toml|RUN ... [--output FOLDER] ...",
            "",
            "kinds:",
            *(f"  {name:{width}}  {kind.help}" for name, kind in KINDS.items()),
            "",
            "`recforge study KIND RECIPE --help` (of curvature, without RECIPE) lists every flag.",
            "A study that was stopped goes on when the same command is repeated with its --output.",
        ]
    )

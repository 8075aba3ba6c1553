"""A plan as one HTML page, which needs nothing else and no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlrm.analysis import html_page
from dlrm.analysis.quantities import format_count, format_number
from dlrm.planning.foresee import STAGES, whole_bytes
from dlrm.planning.outlook import Outlook
from dlrm.planning.pictures import draw_holdings, draw_scaling, draw_times
from dlrm.planning.text import describe_machine, format_milliseconds, name_ranks
from embeddings.planning.task import count_of, format_bytes

TEMPLATE = Path(__file__).parent / "page" / "plan.html"
FILTERS: dict[str, Callable[..., Any]] = {
    "count": format_count,
    "number": format_number,
    "size": format_bytes,
    "milliseconds": format_milliseconds,
    "share": lambda share: f"{share:.1%}",
    "signed_share": lambda share: f"{share:+.1%}",
}


def write_page(outlook: Outlook, output: Path) -> None:
    """Write the page, whole or not at all."""
    html_page.write_page(render(outlook), output)


def render(outlook: Outlook) -> str:
    """Return the page."""
    foresight, question = outlook.foresight, outlook.question
    names = [config.name for config in question.configs]
    return html_page.render_page(
        TEMPLATE,
        FILTERS,
        name=outlook.name,
        dataset=str(outlook.dataset.folder),
        ranks=outlook.plan.ranks,
        lead=_describe_lead(outlook),
        course=_describe_circumstances(outlook),
        figures=_list_figures(outlook),
        holdings=draw_holdings(names, foresight, question.memory_bytes),
        holdings_words=_describe_holdings(outlook),
        times=draw_times(foresight),
        time_words=(
            "Every exchange waits for the slowest rank, so a step takes the sum over stages of the slowest rank's time."
        ),
        stages=_list_stages(outlook),
        step=_sum_up_step(outlook),
        scaling=draw_scaling(outlook.scalings),
        scalings=[s for s in outlook.scalings if not s.misfit],
        scaling_notes=[f"{s.ranks:,} ranks: {s.misfit}" for s in outlook.scalings if s.misfit],
        comparisons=outlook.comparisons,
        comparison_words=_explain_comparisons(outlook),
        tables=_list_tables(outlook),
    )


def _describe_lead(outlook: Outlook) -> str:
    foresight = outlook.foresight
    stages = foresight.stages
    longest = max(stages, key=lambda stage: stages[stage])
    return (
        f"A step of {foresight.setting.usage.global_batch_size:,} samples takes "
        f"{format_milliseconds(foresight.seconds)}, of "
        f"which {stages[longest] / foresight.seconds:.0%} go into: {longest}."
    )


def _describe_circumstances(outlook: Outlook) -> str:
    setting = outlook.foresight.setting
    return (
        f"{describe_machine(outlook.foresight).capitalize()}; {count_of(setting.ranks_per_node, 'rank')} per "
        "machine. What counts are the bytes of the tables, the bandwidths of the machine, and what the training "
        "samples ask of each table."
    )


def _list_figures(outlook: Outlook) -> list[dict[str, str]]:
    foresight, configs = outlook.foresight, outlook.question.configs
    sizes, memory = foresight.bytes_by_rank, outlook.question.memory_bytes
    total = float(foresight.by_rank.sum(axis=1).mean())
    return [
        {
            "label": "Samples per second",
            "value": f"{foresight.samples_per_second:,.0f}",
            "note": f"{foresight.samples_per_second / outlook.plan.ranks:,.0f} per rank",
        },
        {
            "label": "Tables",
            "value": format_bytes(sum(whole_bytes(configs))),
            "note": f"{len(configs)} tables, optimizer states included",
        },
        {
            "label": "Fullest rank",
            "value": format_bytes(sizes.max()),
            "note": "" if memory is None else f"of {format_bytes(memory)} that there are",
        },
        {
            "label": "Imbalance",
            "value": f"{foresight.seconds / total:.2f}",
            "note": "step over the average rank's work",
        },
    ]


def _describe_holdings(outlook: Outlook) -> str:
    kinds: dict[str, int] = {}
    for table in outlook.plan.tables:
        kinds[table.sharding] = kinds.get(table.sharding, 0) + 1
    words = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1]))
    return f"Of {len(outlook.plan.tables)} tables: {words}. A dashed line is the memory of a rank, where it is near."


def _list_stages(outlook: Outlook) -> list[dict[str, Any]]:
    foresight = outlook.foresight
    return [
        {
            "name": stage,
            "slowest": float(foresight.by_rank[:, number].max()),
            "average": float(foresight.by_rank[:, number].mean()),
            "imbalance": foresight.imbalance(number),
        }
        for number, stage in enumerate(STAGES)
    ]


def _sum_up_step(outlook: Outlook) -> dict[str, float]:
    average = float(outlook.foresight.by_rank.sum(axis=1).mean())
    return {"slowest": outlook.foresight.seconds, "average": average, "imbalance": outlook.foresight.seconds / average}


def _explain_comparisons(outlook: Outlook) -> str:
    if not outlook.comparisons:
        return ""
    from dlrm.planning.comparison import explain_comparisons

    return explain_comparisons(outlook.comparisons)


def _list_tables(outlook: Outlook) -> list[dict[str, Any]]:
    configs = outlook.question.configs
    return [
        {
            "name": config.name,
            "num_rows": config.num_rows,
            "dim": config.dim,
            "bytes": size,
            "sharding": table.sharding,
            "ranks": name_ranks(table, outlook.plan.ranks),
            "why": table.why,
        }
        for config, table, size in zip(configs, outlook.plan.tables, whole_bytes(configs), strict=True)
    ]

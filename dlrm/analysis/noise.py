"""The report's section about the gradients' noise: its course, the critical batch size in words, and what to change."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dlrm.analysis.charts import BLUE, GREEN, GREY, ORANGE, Chart, as_figure, lay_out
from dlrm.analysis.curves import Curve, thin
from dlrm.analysis.quantities import format_count, format_share
from dlrm.analysis.run_folder import Record, Run
from dlrm.noise.critical_batch import fewer_steps, more_samples, relative_samples

PREFIX, LEFT_OUT, TABLE = "noise_scale/", "noise_scale/left_out/", "noise_scale/table/"
MUCH_LARGER = 4.0  # times the critical batch: five times the samples of a small one

# Of each chart: name, title, groups as (name of the value, what it is called).
CHARTS = (
    ("noise-scale", "Noise scale", (("dense", "dense part"), ("tables", "tables"))),
    (
        "noise-parts",
        "Noise scale within the dense part",
        (("bottom", "bottom MLP"), ("interaction", "interaction"), ("top", "top MLP")),
    ),
    (
        "noise-ids",
        "Noise scale of the tables, by how often an id occurs",
        (
            ("ids/in_1_of_100", "in 1 of 100 samples or more"),
            ("ids/in_1_of_10000", "in 1 of 10,000 or more"),
            ("ids/rarer", "rarer"),
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class NoiseSection:
    """What the page says of the noise.

    Attributes:
        words: sentences, the critical batch size first.
        warning: None unless the batch is much larger than the critical one.
        charts: of the course.
        tables: (name, noise scale, times the batch) by name, where it is known.
    """

    words: list[str]
    warning: str | None
    charts: list[Chart]
    tables: list[tuple[str, float, float]]


def describe_noise(run: Run) -> NoiseSection | None:
    """Return the section, None where the run has not measured its gradients."""
    measured = [record for record in run.training if any(name.startswith(PREFIX) for name in record)]
    charts = [chart for name, title, groups in CHARTS if (chart := _draw(run, measured, name, title, groups))]
    if not charts:
        return None
    last = measured[-1]
    batch_size = float(last.get("batch_size") or 0)
    tables = [
        (name.removeprefix(TABLE), value, value / batch_size if batch_size else math.nan)
        for name, value in last.items()
        if name.startswith(TABLE) and value is not None
    ]
    return NoiseSection(
        words=_speak_of_batch(measured, batch_size) + _speak_of_left_out(last),
        warning=_warn(last.get(f"{PREFIX}dense"), batch_size),
        charts=charts,
        tables=sorted(tables, key=lambda table: table[1]),
    )


def _speak_of_batch(measured: list[Record], batch_size: float) -> list[str]:
    course = [record[f"{PREFIX}dense"] for record in measured if record.get(f"{PREFIX}dense")]
    if not course or not batch_size or not measured[-1].get(f"{PREFIX}dense"):
        return [
            "The critical batch size is not known: the dense part's gradient could not be told from its noise, which "
            "happens where a run is at its end, or where few steps were measured (--noise-scale.every-steps); or it "
            "was not measured, as under a batch norm or adversarial training."
        ]
    critical = course[-1]
    words = [
        f"The critical batch size is about {_round(critical)} samples, as the dense part's noise scale has it at the "
        f"end; it was {_round(course[0])} at first. The batch of {format_count(batch_size)} is "
        f"{_compare(batch_size / critical)}: to get as far it takes about "
        f"{relative_samples(batch_size, critical):.2g} times the samples that a very small batch takes.",
        f"Doubling it would cost about {format_share(more_samples(batch_size, critical), 0)} more samples and save "
        f"about {format_share(fewer_steps(batch_size, critical), 0)} of the steps; halving it would save "
        f"{format_share(-more_samples(batch_size, critical, 0.5), 0)} of the samples. This is the law "
        "E(B) = Emin (1 + B / Bcrit), with learning rates tuned for each batch; it is right to a factor of two or so.",
    ]
    return words


def _warn(critical: float | None, batch_size: float) -> str | None:
    if not critical or batch_size < MUCH_LARGER * critical:
        return None
    return (
        f"The batch is {batch_size / critical:.2g} times the critical one: most of its samples tell the dense part "
        f"what the others have told already. Take --step.global-batch-size {_power_of_two(critical)} to "
        f"{_power_of_two(2 * critical)}; or begin so and let it grow (--growth.test norm); or keep it for its speed, "
        "scale the rates to it (--scale-from) and expect to need more epochs."
    )


def _speak_of_left_out(last: Record) -> list[str]:
    left_out = {name.removeprefix(LEFT_OUT): value for name, value in last.items() if name.startswith(LEFT_OUT)}
    if not left_out:
        return []
    names = ", ".join(sorted(left_out))
    return [f"Not measured, as nothing is known of single samples' gradients there: {names}."]


def _draw(run: Run, measured: list[Record], name: str, title: str, groups: tuple[tuple[str, str], ...]) -> Chart | None:
    curves = [
        Curve(label=label, points=thin(points), color=color, digits=0)
        for (group, label), color in zip(groups, (BLUE, ORANGE, GREEN), strict=False)
        if (points := [(r["samples"], r[PREFIX + group]) for r in measured if (r.get(PREFIX + group) or 0) > 0])
    ]
    if not curves:
        return None
    sizes = [(record["samples"], record["batch_size"]) for record in measured if record.get("batch_size")]
    batch = [Curve(label="batch size", points=thin(sizes), color=GREY, is_reference=True)] if sizes else []
    layout = lay_out("training samples")
    layout["xaxis"] |= {"range": [0, run.samples], "nticks": 6, "tickformat": "~s" if run.samples < 1e9 else ""}
    layout["yaxis"] |= {"type": "log", "nticks": 6, "tickformat": "~s", "dtick": 1}
    spoken = "; ".join(f"{c.label}: {_round(c.points[0][1])} to {_round(c.points[-1][1])}" for c in [*curves, *batch])
    return Chart(
        name=name,
        title=f"{title}, in samples",
        description=f"{title} over training samples, in samples. {spoken}.",
        figure=as_figure([curve.trace() for curve in [*curves, *batch]], layout),
        legend=tuple((curve.color, curve.label) for curve in [*curves, *batch]),
    )


def _compare(ratio: float) -> str:
    if 0.9 <= ratio <= 1.1:
        return "as large"
    return f"{ratio:.2g} times as large" if ratio > 1 else f"{format_share(ratio, 0)} of it"


def _round(number: float) -> str:
    """Write a number with two digits that count."""
    digits = max(0, math.floor(math.log10(number)) - 1) if number >= 1 else 0
    return format_count(round(number, -digits))


def _power_of_two(number: float) -> str:
    return format_count(2 ** max(0, round(math.log2(max(number, 1.0))))).replace(",", "_")

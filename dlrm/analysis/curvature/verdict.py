"""Says in words what a loss's curvature means: how far a step may go, which of two is sharper, what to doubt."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dlrm.analysis.curvature.findings import Finding, Line
from dlrm.analysis.quantities import format_count, format_share
from dlrm.analysis.study.page import format_significant

ALIKE = 1.25  # a ratio below this is none to speak of
NORMS_ALIKE = 1.5
LOSSES_ALIKE = 1.05
NO_BARRIER = 0.01  # of the loss


def describe(findings: Sequence[Finding], line: Line | None) -> str:
    """Say what came out, in a sentence or two."""
    if len(findings) == 1:
        return _describe_one(findings[0])
    first, second = findings
    text = _compare(first, second)
    if line is not None:
        text += " " + _describe_line(line)
    return text


def advise(findings: Sequence[Finding]) -> list[str]:
    """Say what to do with it."""
    sentences = [
        f"Plain gradient descent on {_name(finding)} diverges along the steepest direction at learning rates above "
        f"2 / {format_significant(finding.largest[0])} = {format_significant(2 / finding.largest[0])}. Optimizers that "
        f"scale their gradients, such as Adam or LAMB, have another limit."
        for finding in findings
        if finding.largest[0] > 0
    ]
    if len(findings) == 2:
        sentences.append(
            "A sharper solution need not be a worse one: what counts is the loss on held-out rows. If it is worse as "
            "well, a smaller learning rate towards the end, a longer warm-up or a batch that grows later are the "
            "usual cures."
        )
    return sentences


def list_warnings(findings: Sequence[Finding], line: Line | None) -> list[str]:
    """Return what should not be overlooked, a sentence each."""
    warnings = [
        "Sharpness and eigenvalues depend on how weights are scaled, which ReLU layers and normalised ones can change "
        "without changing a single prediction: compare runs of the same architecture, normalisation and optimizer "
        "only, and trust a ratio more the closer the norms of their weights are."
    ]
    if len(findings) == 2:
        losses = [finding.loss for finding in findings]
        if _ratio(*losses) > LOSSES_ALIKE:
            warnings.append(
                f"Their losses on the sample differ, {format_significant(losses[0])} and "
                f"{format_significant(losses[1])}: curvature changes on the way down, so part of the difference may be "
                "one of progress. Runs of equal loss compare better."
            )
        ratio = _ratio(findings[0].norm, findings[1].norm)
        if ratio > NORMS_ALIKE:
            warnings.append(
                f"The weights of one are {format_significant(ratio)} times as long as those of the other, so part of "
                "the difference in curvature is a matter of scale."
            )
    for finding in findings:
        for end, (value, error) in (("largest", finding.largest), ("smallest", finding.smallest)):
            if error > 0.05 * abs(finding.largest[0]):
                warnings.append(
                    f"The {end} eigenvalue of {finding.label} is {format_significant(value)} give or take "
                    f"{format_significant(error)}: more --steps find it better."
                )
        lost = sum(loss is None for row in [finding.curve, *finding.landscape] for loss in row)
        if lost:
            warnings.append(
                f"Points around {finding.label} whose loss is not finite: {lost}; a smaller --reach avoids them."
            )
    return warnings


def _describe_one(finding: Finding) -> str:
    text = (
        f"Around {_name(finding)} the loss, {format_significant(finding.loss)} on this sample, curves by at most "
        f"{format_significant(finding.largest[0])} in its steepest direction"
    )
    if finding.smallest[0] < -finding.smallest[1]:
        text += f" and by {format_significant(finding.smallest[0])} in its most downward one, so it is no minimum yet"
    text += "."
    for size, percent in list(finding.sharpness.items())[:1]:
        text += (
            f" Moving every weight by no more than {format_significant(100 * size)} % (and as much of 1) can raise the "
            f"loss plus one by {format_significant(percent)} %."
        )
    return text


def _compare(first: Finding, second: Finding) -> str:
    values = first.largest[0], second.largest[0]
    words = f"{format_significant(values[0])} against {format_significant(values[1])}"
    if min(values) <= 0:
        return f"The largest eigenvalues are {words}."
    apart = abs(values[0] - values[1])
    if _ratio(*values) < ALIKE or apart <= first.largest[1] + second.largest[1]:
        return f"Both solutions are about as sharp: their largest eigenvalues are {words}."
    sharper, flatter = (first, second) if values[0] > values[1] else (second, first)
    text = (
        f"{_name(sharper).capitalize()} is {format_significant(_ratio(*values), 2)} times as sharp as "
        f"{_name(flatter)}, by the largest eigenvalue ({words})"
    )
    for size in list(first.sharpness)[:1]:
        pair = sharper.sharpness[size], flatter.sharpness[size]
        joined = "and" if pair[0] > pair[1] else "but not"
        text += f", {joined} by the highest loss nearby (+{format_significant(pair[0])} % against "
        text += f"+{format_significant(pair[1])} %)"
    return f"{text}."


def _describe_line(line: Line) -> str:
    split = "valid" if "valid" in line.losses else next(iter(line.losses))
    barrier, ends = line.barrier(split), [loss for loss in line.ends(split) if loss is not None]
    if barrier is None:
        return f"One of the two has no finite loss on {split} rows."
    if barrier <= NO_BARRIER * min(ends):
        return f"On the straight line between them the loss on {split} rows has no barrier: they lie in one basin."
    if math.isinf(barrier):
        return f"Between them lies a barrier: on {split} rows the loss is not finite on the way."
    return (
        f"Between them lies a barrier: on {split} rows the loss rises by up to {format_significant(barrier)} above the "
        f"straight line, {format_share(barrier / min(ends), 0)} of the loss itself."
    )


def _name(finding: Finding) -> str:
    if finding.batch_size is None:
        return finding.label
    return f"{finding.label} (batch {format_count(finding.batch_size)})"


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b) if min(a, b) > 0 else float("inf")

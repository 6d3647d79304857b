"""The report's plots of training metrics, with one value per step."""

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.report import markup, samples
from recipes.report.markup import text
from recipes.report.plots import histogram, line_plot, stacked_bars
from recipes.report.samples import Samples
from recipes.report.timeline import is_fault
from recipes.run.records import reward_verifiers, time_phases

type Row = Mapping[str, Any]


def section(rows: Sequence[Row], gathered: Samples, events: Sequence[Row]) -> str:
    """Every plot that has values. ``rows`` are those of metrics.jsonl, and ``events`` those of events.jsonl."""
    phases = time_phases(rows)
    with_reference = [row for row in rows if "kl/reference" in row]
    plots = [
        (
            "Reward per verifier, with 95&nbsp;% interval over prompts",
            line_plot(
                rows,
                {name: f"reward/{name}" for name in reward_verifiers(rows)},
                bands=gathered.scores,
                faults=_faults(events),
            ),
        ),
        ("Loss", line_plot(rows, {"loss": "loss"})),
        ("Mean reward", line_plot(rows, {"mean": "reward/mean"})),
        ("KL to the reference policy", line_plot(with_reference, {"KL": "kl/reference"}, zero=True)),
        (
            "Train-inference mismatch, mean |Δ log-prob|",
            line_plot(rows, {"mean": "train_inference_mismatch/mean"}, zero=True),
        ),
        (
            "Train-inference mismatch, largest |Δ log-prob|",
            line_plot(rows, {"max": "train_inference_mismatch/max"}, zero=True),
        ),
        (
            "Clipped tokens, share",
            line_plot(rows, {"low": "clip_fraction/low", "high": "clip_fraction/high"}, zero=True),
        ),
        ("KL to the old policy", line_plot(rows, {"KL": "kl/old"}, zero=True)),
        ("Entropy, nats per token", line_plot(rows, {"entropy": "entropy"}, zero=True)),
        (
            "Perplexity of the sampled tokens",
            line_plot(rows, {"policy": "perplexity/policy", "sampler": "perplexity/sampler"}),
        ),
        ("Tokens not trained on, share", line_plot(rows, {"masked": "masked_fraction"}, zero=True)),
        ("Gradient norm", line_plot(rows, {"norm": "grad_norm"}, zero=True)),
        ("Response length, tokens", line_plot(rows, {"mean": "response_length/mean"}, zero=True)),
        (
            "Time per phase, seconds",
            stacked_bars(rows, {name: f"time/{name}" for name in phases}, "{:.2f} s per step"),
        ),
        ("Weight sync, megabytes", line_plot(_with_megabytes(rows), {"sent": "sync/megabytes"}, zero=True)),
    ]
    for verifier, counts in gathered.labels.items():
        plots.append((f"Labels of {text(verifier)}, share of samples", _labels(rows, counts)))
    plots.append(("Response length, early and late", _lengths(gathered.tokens)))
    if "sync" in phases:
        plots.append(("Weight sync, seconds", line_plot(rows, {"time": "time/sync"}, zero=True)))
    cards = [markup.card(title, plot) for title, plot in plots if plot]
    return f"<h2>Training, per step</h2>{markup.grid(cards)}"


def _with_megabytes(rows: Sequence[Row]) -> list[Row]:
    return [{**row, "sync/megabytes": row["sync/bytes"] / 1e6} for row in rows if "sync/bytes" in row]


def _faults(events: Sequence[Row]) -> dict[int, str]:
    """Step → the kinds of all events after it, for the steps after which a fault occurred."""
    faults = {}
    for step in {event["after_step"] for event in events if is_fault(event)}:
        faults[step] = ", ".join(event["kind"] for event in events if event["after_step"] == step)
    return faults


def _labels(rows: Sequence[Row], counts: Mapping[int, Mapping[str, int]]) -> str:
    """A bar per step that is divided among a verifier's labels.

    ``counts`` is step -> label -> number of samples.
    """
    steps = [row["step"] for row in rows if row["step"] in counts]
    if not steps:
        return ""
    shares = []
    for step in steps:
        total = sum(counts[step].values())
        shares.append({"step": step} | {f"label/{label}": count / total for label, count in counts[step].items()})
    labels = sorted({label for step in steps for label in counts[step]})
    return stacked_bars(shares, {label: f"label/{label}" for label in labels}, "{:.0%} of all samples")


def _lengths(tokens: Mapping[int, Sequence[int]]) -> str:
    """Histograms of the response lengths in the first and the last third of the steps.

    ``tokens`` is step -> response lengths.
    """
    steps = sorted(tokens)
    if len(steps) < 2:
        return ""
    third = max(1, len(steps) // 3)
    groups = {}
    for part in (steps[:third], steps[-third:]):
        groups[f"steps {part[0]} to {part[-1]}"] = [length for step in part for length in tokens[step]]
    edges, shares = samples.bins(groups)
    return histogram(edges, shares)

"""The report's sections with responses of the model: transcripts of the evaluation, and samples of RL."""

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.report import markup, samples
from recipes.report.markup import text
from recipes.report.samples import Samples
from recipes.run.records import choose_transcripts, model_stages

# How many transcripts are shown at once. The rest is collapsed.
TRANSCRIPTS_OPEN = 6


def transcripts_section(evaluation: Mapping[str, Any], marks: Sequence[str]) -> str:
    """Every model's greedy answers to held-out prompts. ``marks`` are the begin and end marks of the thinking."""
    transcripts = evaluation["transcripts"]
    models = model_stages(evaluation)
    cards = [_transcript(transcript, models, marks) for transcript in choose_transcripts(transcripts, len(transcripts))]
    folded = cards[TRANSCRIPTS_OPEN:]
    more = markup.details(f"{len(folded)} more", "".join(folded)) if folded else ""
    return (
        "<h2>Transcripts</h2><p>Greedy answers to held-out prompts, each with its verdict; a coloured verdict "
        f"changed in training.</p>{''.join(cards[:TRANSCRIPTS_OPEN])}{more}"
    )


def samples_section(gathered: Samples, marks: Sequence[str]) -> str:
    """Answers to the same prompts over training, then the samples of one prompt in the first and the last step."""
    blocks = [
        "<h2>The same prompts over training</h2>"
        f"<p>{'' if gathered.followed else 'No prompt was sampled in a second step. '}"
        "The sample with the highest reward in each step in which a prompt was sampled, from early to late.</p>"
    ]
    for answers in gathered.followed:
        cards = "".join(_sample(row, f"step {row['step']}: ", marks) for row in answers)
        blocks.append(markup.prompt_card(answers[0]["prompt"], cards))
    blocks.append(
        "<h2>Samples of one prompt</h2><p>Each with its reward and advantage, for the prompt of the first and of the "
        "last step whose rewards differ most.</p>"
    )
    for group in gathered.groups:
        cards = "".join(_sample(row, "", marks) for row in group)
        blocks.append(markup.details(f"Step {group[0]['step']}", markup.prompt_card(group[0]["prompt"], cards)))
    return "".join(blocks)


def _transcript(transcript: Mapping[str, Any], models: Mapping[str, str], marks: Sequence[str]) -> str:
    labels = transcript["labels"]
    answers = []
    for model, heading in models.items():
        changed = " changed" if model == "after" and labels["after"] != labels["before"] else ""
        answers.append(
            f'<div><div class="head"><b>{heading}</b><span class="chip{changed}">{text(labels[model])}</span></div>'
            f"{_response(transcript[model], marks)}</div>"
        )
    kind = f'<span class="soft">{text(transcript["kind"])}</span>'
    return markup.prompt_card(transcript["prompt"], "".join(answers), kind, transcript.get("images", []))


def _sample(row: Mapping[str, Any], prefix: str, marks: Sequence[str]) -> str:
    verdicts = []
    for name, verdict in row["verdicts"].items():
        verdicts.append(f'<span class="chip">{text(name)}: {text(verdict.get("label", "no verdict"))}</span>')
    reward = "no reward" if row["reward"] is None else f"reward {row['reward']:.2f}"
    return (
        f'<div><div class="head"><b>{prefix}{reward}</b><span class="soft">advantage {row["advantage"]:+.2f}</span>'
        f"{''.join(verdicts)}</div>{_response(row['response'], marks)}</div>"
    )


def _response(response: str, marks: Sequence[str]) -> str:
    """The answer, after the thinking if there is any."""
    thinking, answer = samples.split_thinking(response, marks)
    thought = f'<div class="thought"><b>thinking</b> {text(thinking)}</div>' if thinking else ""
    return f'<div class="text">{thought}{text(answer)}</div>'

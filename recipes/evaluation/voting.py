"""Votes over several answers to the search questions of an evaluation (:mod:`rollout.deliberation.voting`)."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from recipes.evaluation.statistics import mean_interval
from rewards.verifiers.search import OUTCOMES
from rollout.deliberation.voting import Reply, vote
from rollout.environment import Segment
from rollout.search import stated


def search_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates and votes over an evaluation's answers ({id, response, scores}) to search questions.

    Only answers with verdicts of ``search_accuracy`` and ``search_reliability`` count. Raises ValueError if there is
    none. Intervals are over questions.

    Returns:
        - ``outcomes``: {true certain, false certain, …: share of the answers};
        - ``false_certain``: {mean, interval, n} of the share of answers that are wrong and certain;
        - ``accuracy``: {single, majority, confidence_weighted: {mean, interval, n}}, of a single answer and of both
          votes over all answers to a question;
        - ``by_samples``: {k: {majority, confidence_weighted: mean}} of votes over the first k answers, for k = 1, 2, 4,
          … and all.
    """
    replies: dict[str, list[Reply]] = {}
    are_right: dict[str, list[bool]] = {}
    outcomes: list[str] = []
    question_ids: list[str] = []  # one per entry of ``outcomes``
    for row in rows:
        accuracy = row["scores"].get("search_accuracy", {})
        reliability = row["scores"].get("search_reliability", {})
        if "score" not in accuracy or "score" not in reliability:
            continue
        answer, confidence = stated([Segment(row["response"], by_environment=False)])
        replies.setdefault(row["id"], []).append(Reply(answer, confidence))
        are_right.setdefault(row["id"], []).append(accuracy["score"] == 1)
        outcomes.append(reliability["label"])
        question_ids.append(row["id"])
    if not replies:
        raise ValueError("no row has verdicts of search_accuracy and search_reliability: name both in data.scores")

    def vote_scores(count: int, weighted: bool) -> list[float]:
        """1.0 for each question whose vote over the first ``count`` replies is right, else 0.0."""
        winners = {name: vote(of_question[:count], weighted) for name, of_question in replies.items()}
        return [float(won is not None and are_right[name][won.places[0]]) for name, won in winners.items()]

    most = max(map(len, replies.values()))
    powers_of_two = {2**i for i in range(most.bit_length()) if 2**i <= most}
    return {
        "outcomes": {label: outcomes.count(label) / len(outcomes) for label in OUTCOMES},
        "false_certain": mean_interval([float(label == "false certain") for label in outcomes], question_ids),
        "accuracy": {
            "single": mean_interval([float(label.startswith("true")) for label in outcomes], question_ids),
            "majority": mean_interval(vote_scores(most, weighted=False), list(replies)),
            "confidence_weighted": mean_interval(vote_scores(most, weighted=True), list(replies)),
        },
        "by_samples": {
            size: {
                "majority": fmean(vote_scores(size, weighted=False)),
                "confidence_weighted": fmean(vote_scores(size, weighted=True)),
            }
            for size in sorted({most, *powers_of_two})
        },
    }

"""Try the verifiers on the rows of the data before a run starts. Nothing is sent to servers."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from recipes.config import Config
from recipes.data.sources import Row, Rows
from recipes.evaluation.evaluate import score_names
from rewards import mixing
from rewards.functions import FORM, Function, FunctionFailed
from rewards.verdict import Verifier, describe, excerpt
from rewards.verifiers.served import ServedVerifier
from rewards.verifiers.text import without_thinking
from rollout.environment import Segment

# An answer as a model might write it, for rows that have none.
SENTENCE = "The answer is 42, because a bridge carries a road over a river."
ANSWER_FIELDS = ("answer", "response", "chosen")
TRIED_ROWS = 4  # rows of each label and kind that are tried with such answers
# Rows of each label and kind on which a user's function is tried at most. A call may take a second, and a data set may
# have a million rows.
FUNCTION_ROWS = 1000


def try_verifiers(config: Config, verifiers: Mapping[str, Verifier], rows: Rows, held_out: Rows) -> None:
    """Run each verifier on every row that it will judge, with the empty answer.

    On the first ``TRIED_ROWS`` rows of each label (of ``rewards.mix``) or kind (of ``data.scores``), it also runs with
    answers that a model may give. A user's function runs on at most ``FUNCTION_ROWS`` rows of each label or kind. No
    request is sent to judges.

    Raises ValueError naming verifier and row.
    """
    tried: Counter[tuple[str, str]] = Counter()
    with_segments = config.rollout.environment.name is not None

    def try_on(row: Row, names: Iterable[str], group: str) -> None:
        for name in names:
            tried[name, group] += 1
            if isinstance(verifiers[name], Function) and tried[name, group] > FUNCTION_ROWS:
                continue
            responses = answers(row) if tried[name, group] <= TRIED_ROWS else [""]
            check_row(name, verifiers[name], row, responses, with_segments)

    for row in rows:
        try_on(row, mixing.label_weights(row, config.rewards.mix), f"label {row['label']}")
    for row in held_out:
        try_on(row, score_names(row, config.data.scores), f"kind {row['kind']}")


def answers(row: Row) -> list[str]:
    """The answers with which verifiers are tried: those in the row, a sentence, and the empty answer."""
    own = [row[field] for field in ANSWER_FIELDS if isinstance(row.get(field), str)]
    return list(dict.fromkeys([*own, SENTENCE, ""]))


def check_row(
    name: str, verifier: Verifier, row: Row, responses: Sequence[str] = ("",), with_segments: bool = False
) -> None:
    """Run a verifier on a row with the given responses.

    For a judge, the requests are built but not sent. ``with_segments`` is for a run with an environment: the row then
    has the ``segments`` of each response.

    Raises ValueError for a row that the verifier can't verify. Also raises it, naming verifier, row and response, for a
    function that raises, returns something that is not a result, or takes too long.
    """
    for response in responses:
        try:
            if isinstance(verifier, ServedVerifier):
                verifier.template.check(row)
                verifier.template.request(row, without_thinking(response), verifier.model)
            else:
                segments = {"segments": [Segment(response, by_environment=False)]} if with_segments else {}
                verifier({**row, **segments}, response)
        except ValueError:  # from a registered rule or template, whose message names the row
            raise
        except FunctionFailed as error:
            raise ValueError(f"{_where(name, row, response)}: {error}; {FORM}") from error
        except Exception as error:
            raise ValueError(f"{_where(name, row, response)}: {describe(error)}; mend the row") from error


def _where(name: str, row: Row, response: str) -> str:
    return f"verifier {name!r}, row {row['id']!r}, answer {excerpt(response)}"

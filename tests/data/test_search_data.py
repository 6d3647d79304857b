"""The data of deliberative search: what build.py writes, episodes that the environment and the verifiers accept."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.data.search.build import FACTS, FOLDER, RESULTS, SNIPPET_WORDS, build
from recipes.data.sft_examples import episode_tokens
from recipes.errors import ConfigError
from rewards.verifiers.search import accuracy, format_score
from rollout.environment import Segment
from rollout.retrieval import Bm25
from rollout.search import Search, stated
from tests.recipes.tiny import make_tokenizer

CONF = Path(__file__).parents[2] / "conf"
SPLITS = ("sft", "rl", "development", "test")
FILES: dict[str, list[dict[str, Any]]] = {
    name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]
    for name in ("corpus", *SPLITS)
}
SEARCH = Search(Bm25.load(str(FOLDER / "corpus.jsonl")), RESULTS, SNIPPET_WORDS)


def segments(row: dict[str, Any]) -> list[Segment]:
    parts, done = [], 0
    for start, end in row["environment"]:
        parts += [Segment(row["response"][done:start], False), Segment(row["response"][start:end], True)]
        done = end
    return [*parts, Segment(row["response"][done:], False)]


def land(row: dict[str, Any]) -> str:
    """The name of the land, which no other word of a question begins like."""
    (name,) = re.findall(r"\b(?!What|Name|Look|Find|Which)[A-Z][a-z]+\b", row["prompt"])
    return str(name)


def test_files_are_what_the_generator_writes() -> None:
    assert build() == FILES
    config = yaml.safe_load((CONF / "rollout" / "search.yaml").read_text())["environment"]["settings"]
    assert (config["results"], config["snippet_words"]) == (RESULTS, SNIPPET_WORDS)


def test_no_land_and_no_question_is_shared() -> None:
    lands = {split: {land(row) for row in FILES[split]} for split in SPLITS}
    assert sum(map(len, lands.values())) == len(set().union(*lands.values()))
    prompts = [row["prompt"] for split in SPLITS for row in FILES[split]]
    assert len(set(prompts)) == len(prompts)
    assert {split: len(FILES[split]) for split in SPLITS} == {"sft": 153, "rl": 201, "development": 42, "test": 93}


def test_the_corpus_tells_what_can_be_answered_and_nothing_else() -> None:
    """One search for the fact finds the land's document; its snippet has the answer where the kind is "listed"."""
    texts = {row["id"]: row["text"] for row in FILES["corpus"]}
    for row in (row for split in SPLITS for row in FILES[split]):
        text, answerable = texts.get(land(row).lower()), row["kind"] != "missing"
        said = f" is {row['answer']}."
        assert (text is not None and said in text) == answerable
        assert answerable or not any(said in other for other in texts.values())
        if text is not None:
            fact = next(fact for fact in FACTS if fact in row["prompt"])
            reply = SEARCH.reply([Segment(f"<search>{fact} of {land(row)}</search>", False)])
            assert reply.startswith(f"<result>[{land(row).lower()}] ")
            assert (said in reply) == (row["kind"] == "listed")


def test_episodes_are_legal_and_their_replies_are_the_environment_s() -> None:
    for row in FILES["sft"]:
        said = segments(row)
        assert format_score({**row, "segments": said}, "").label == "legal"
        for place, segment in enumerate(said):
            assert not segment.by_environment or segment.text == SEARCH.reply(said[:place])
        right = accuracy({**row, "segments": said}, "").score
        assert right == (row["kind"] != "missing")
        assert stated(said)[0] == (row["answer"] if right else "unknown")


def test_confidence_says_nothing_about_the_answer() -> None:
    """As often high where the answer is right as where it is not, within three standard deviations."""
    certain: Counter[bool] = Counter()
    count: Counter[bool] = Counter()
    for row in FILES["sft"]:
        _, confidence = stated(segments(row))
        assert confidence in (1, 2, 8, 9)
        count[row["kind"] == "missing"] += 1
        certain[row["kind"] == "missing"] += confidence >= 5
    for missing in (True, False):
        deviation = (0.75 * 0.25 / count[missing]) ** 0.5
        assert abs(certain[missing] / count[missing] - 0.75) < 3 * deviation


def test_an_episode_s_tokens_are_its_pieces_and_the_environment_s_are_not_learnt() -> None:
    tokenizer = make_tokenizer()
    for row in FILES["sft"][:20]:
        ids, learnt = episode_tokens(tokenizer, row)
        expected_ids, expected = [], []
        for segment in segments(row):
            piece = tokenizer.encode(segment.text, add_special_tokens=False)
            expected_ids += piece
            expected += [not segment.by_environment] * len(piece)
        assert (ids, learnt) == ([*expected_ids, tokenizer.eos_token_id], [*expected, True])
    plain = {"id": "p", "response": "no environment"}
    ids, learnt = episode_tokens(tokenizer, plain)
    assert tokenizer.decode(ids[:-1]) == "no environment" and learnt == [True] * len(ids)


@pytest.mark.parametrize("spans", [[[3, 2]], [[0, 99]], [[2, 4], [3, 5]], [[1]], ["x"]])
def test_spans_that_are_none_are_told(spans: Any) -> None:
    with pytest.raises(ConfigError, match="row 'p': environment has"):
        episode_tokens(make_tokenizer(), {"id": "p", "response": "response", "environment": spans})

import math

import pytest
import torch

from recipes.algorithms.advantages import AdvantageInputs, dr_grpo
from rewards.mixing import failed_share, failures, label_weights, mix, verifier_means, verifier_names, verify
from rewards.registry import RULES, find_rule
from rewards.verdict import Failure, Row, Verdict, VerifierResult, or_nan
from rewards.verifiers import capability, safety

TABLE = {"safety": {"safety": 1.0}, "general_rule": {"capability": 0.9, "style": 0.1}}


def shout(row: Row, response: str) -> Verdict:
    """A verifier from outside the package, found by its dotted path."""
    return Verdict(float(response.isupper()), "shout" if response.isupper() else "quiet")


def test_rules_have_a_registered_name_or_a_dotted_path() -> None:
    assert find_rule("safety") is safety.score
    assert find_rule("capability") is capability.score
    assert find_rule(f"{__name__}.shout")({}, "HELLO") == Verdict(1.0, "shout")


@pytest.mark.parametrize("name", ["safty", "rewards.verifiers.safety.scor", "rewards.no_such_module.score", ""])
def test_an_unknown_verifier_is_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown verifier {name!r}") as error:
        find_rule(name)
    assert str(error.value).endswith(
        f"use a registered one ({', '.join(sorted(RULES))}) or the dotted path of a function "
        "score(row, response) -> Verdict"
    )


def test_every_registered_verifier_loads() -> None:
    assert all(callable(find_rule(name)) for name in RULES)


def test_mix_is_the_weighted_sum() -> None:
    verdicts = {"capability": Verdict(1.0, "correct"), "style": Verdict(0.5, "dull"), "unused": Verdict(1.0, "x")}
    assert mix(verdicts, TABLE["general_rule"]) == pytest.approx(0.95)


def test_mix_needs_every_verdict_it_weighs() -> None:
    with pytest.raises(ValueError, match=r"no verdict from \['style'\]"):
        mix({"capability": Verdict(1.0, "correct")}, TABLE["general_rule"])


def test_a_row_runs_only_the_verifiers_of_its_label() -> None:
    calls: list[str] = []

    def spy(name: str, score: float):  # type: ignore[no-untyped-def]
        def judge(row: Row, response: str) -> Verdict:
            calls.append(name)
            return Verdict(score, name)

        return judge

    verifiers = {"safety": spy("safety", 1.0), "capability": spy("capability", 1.0), "style": spy("style", 0.0)}
    row = {"id": "t", "label": "general_rule"}
    weights = label_weights(row, TABLE)
    results = verify(row, "x", weights, verifiers)
    assert results == {"capability": Verdict(1.0, "capability"), "style": Verdict(0.0, "style")}
    assert mix(results, weights) == pytest.approx(0.9)
    assert calls == ["capability", "style"]


def test_a_label_outside_the_table_stops() -> None:
    with pytest.raises(ValueError, match="label 'valeu', which rewards"):
        label_weights({"id": "r", "label": "valeu"}, TABLE)


def test_verifier_names_are_those_some_label_needs() -> None:
    assert verifier_names(TABLE) == ["capability", "safety", "style"]


def test_a_failed_verifier_leaves_no_reward_and_weighs_where_it_is_weighed_only() -> None:
    verdicts: dict[str, VerifierResult] = {"capability": Verdict(1.0, "correct"), "style": Failure("no reply")}
    assert mix(verdicts, TABLE["general_rule"]) is None
    assert mix(verdicts, {"capability": 0.5}) == 0.5
    assert math.isnan(or_nan(None))
    assert or_nan(0.0) == 0.0


def test_a_failed_verifier_leaves_no_advantage_and_moves_no_other() -> None:
    """The algorithms take NaN for a sample without a reward."""
    lengths = torch.ones(1, 4, dtype=torch.long)
    sample_rewards: list[float | None] = [1.0, None, 0.0, 0.5]
    rewards = torch.tensor([[or_nan(reward) for reward in sample_rewards]], dtype=torch.float64)
    advantages = dr_grpo(AdvantageInputs(rewards, lengths, torch.zeros(4)))
    assert advantages.tolist() == [[0.5, 0.0, -0.5, 0.0]]


def test_means_are_over_verdicts_only() -> None:
    results: list[dict[str, VerifierResult]] = [
        {"safety": Verdict(0.5, "a")},
        {"safety": Verdict(1.0, "b"), "style": Failure("no reply")},
        {"safety": Failure("no reply"), "style": Verdict(0.25, "c")},
    ]
    assert verifier_means(results) == {"safety": 0.75, "style": 0.25}


def test_rows_without_a_failure_have_none_to_tell() -> None:
    results: list[dict[str, VerifierResult]] = [{"safety": Verdict(1.0, "a")}] * 6
    assert failures(results, ["r"] * 6) == []
    assert failed_share(results, [], 0.0) == 0.0

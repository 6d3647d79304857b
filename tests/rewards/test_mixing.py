import pytest

from rewards.mixing import label_weights, load_verifiers, mix, reward, verifier_names
from rewards.verdict import Row, Verdict
from rewards.verifiers import capability, safety

TABLE = {"safety": {"safety": 1.0}, "general_rule": {"capability": 0.9, "style": 0.1}}


def shout(row: Row, response: str) -> Verdict:
    """A verifier from outside the package, found by its dotted path."""
    return Verdict(float(response.isupper()), "shout" if response.isupper() else "quiet")


def test_verifiers_load_by_registered_name_and_by_dotted_path() -> None:
    dotted = f"{__name__}.shout"
    loaded = load_verifiers(["safety", "capability", dotted])
    assert loaded["safety"] is safety.score
    assert loaded["capability"] is capability.score
    assert loaded[dotted]({}, "HELLO") == Verdict(1.0, "shout")


@pytest.mark.parametrize("name", ["safty", "rewards.verifiers.safety.scor", "rewards.no_such_module.score", ""])
def test_an_unknown_verifier_is_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown verifier {name!r}") as error:
        load_verifiers([name])
    assert "capability, helpfulness, safety" in str(error.value)


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
    assert reward(row, "x", verifiers, TABLE) == (
        pytest.approx(0.9),
        {"capability": Verdict(1.0, "capability"), "style": Verdict(0.0, "style")},
    )
    assert calls == ["capability", "style"]


def test_a_label_outside_the_table_stops() -> None:
    with pytest.raises(ValueError, match="label 'valeu', which rewards"):
        label_weights({"id": "r", "label": "valeu"}, TABLE)


def test_verifier_names_are_those_some_label_needs() -> None:
    assert verifier_names(TABLE) == ["capability", "safety", "style"]

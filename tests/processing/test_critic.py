"""The critic's prompt and how its verdicts are read, by hand and by properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.processing import critic


def test_the_prompt_holds_everything_on_single_lines():
    text = critic.question_of("What\nis it?", "a\n\ndog", "a cat", "A dog\nsleeps.")
    assert "Question: [What is it?]\nGround truth: [A dog sleeps.]\n" in text
    assert text.endswith("Response 1: [a dog]\nResponse 2: [a cat]\nReason:")
    assert text.count("Response 1: [") == 3 and text.count("Ground truth: [") == 3
    assert "Verdict: [[1]]" in text and "Verdict: [[2]]" in text


def test_without_a_ground_truth_none_is_spoken_of():
    assert "ground truth" not in critic.question_of("What?", "a", "b").lower()


@pytest.mark.parametrize(
    ("reply", "strict", "published"),
    [
        ("Because. Verdict: [[1]]", 1, 1),
        ("[[ 2 ]]", 2, None),
        ("[[1]] or [[2]]", None, 2),
        ("[[1]] ... [[1]]", 1, 1),
        ("1", None, 1),
        ("[1]", None, None),
        ("[[AI generated response 1]]", None, None),
        ("[[3]]", None, None),
        ("", None, None),
    ],
)
def test_verdicts(reply, strict, published):
    assert critic.verdict(reply) == strict
    assert critic.verdict_as_published(reply) == published


@given(st.text(alphabet="[]12 a\n", max_size=20))
def test_a_strict_verdict_is_the_only_one_that_the_reply_names(reply):
    said = critic.verdict(reply)
    assert (said is None) or (
        f"[[{said}" in reply.replace(" ", "").replace("\n", "") and critic.holds_verdict(reply)
    )


def test_orders_must_agree():
    assert critic.agreed([1]) == 1 and critic.agreed([2, 2]) == 2
    assert critic.agreed([1, 2]) == "tie"
    assert critic.agreed([1, None]) == critic.agreed([None]) == "unparsed"


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_a_preference_for_a_place_cancels(liking, place):
    """Log-odds of the first response in both orders: liking + place, then -liking + place."""
    chances = [[liking + place, 0.0], [-liking + place, 0.0]]
    odds = (liking + place) - (-liking + place)
    expected = "tie" if odds == 0 else 1 if odds > 0 else 2
    assert critic.likelier(chances) == expected
    turned = {1: 2, 2: 1, "tie": "tie"}[expected]
    assert critic.likelier(chances[::-1]) == turned

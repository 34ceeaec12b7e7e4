"""What a model says of a subject, from several conversations."""

from umbrella.evaluation.predictions import Answer, majority_vote, mean_number, mean_probability


def answer(subject: str, said: str | float | None, truth: str | float = "m", m: float = 0.5) -> Answer:
    return Answer(subject, truth, said, {"m": m, "f": 1 - m})


def test_one_sure_conversation_outweighs_two_unsure_ones_in_the_mean_but_not_in_the_vote() -> None:
    answers = [answer("a", "m", m=0.9), answer("a", "f", m=0.4), answer("a", "f", m=0.4)]
    (mean,) = mean_probability(answers)
    votes, ties = majority_vote(answers)
    assert mean.said == "m"
    assert abs(mean.probabilities["m"] - 1.7 / 3) < 1e-12
    assert [vote.said for vote in votes] == ["f"]
    assert ties == 0


def test_equal_means_say_nothing_even_where_sums_round() -> None:
    answers = [Answer("a", "m", None, {"m": x, "f": y}) for x, y in ((0.1, 0.3), (0.2, 0.2), (0.3, 0.1))]
    assert mean_probability(answers)[0].said is None


def test_a_tie_says_nothing_and_is_counted() -> None:
    votes, ties = majority_vote([answer("a", "m"), answer("a", "f"), answer("b", "m")])
    assert [(vote.subject, vote.said) for vote in votes] == [("a", None), ("b", "m")]
    assert ties == 1


def test_invalid_answers_do_not_vote_and_are_no_tie() -> None:
    votes, ties = majority_vote([answer("a", None), answer("a", None), answer("a", "m"), answer("b", None)])
    assert [vote.said for vote in votes] == ["m", None]
    assert ties == 0


def test_the_mean_of_numbers_leaves_invalid_ones_out() -> None:
    answers = [answer("a", 40.0, 43), answer("a", None, 43), answer("a", 45.0, 43), answer("b", None, 20)]
    assert [(a.subject, a.truth, a.said) for a in mean_number(answers)] == [("a", 43, 42.5), ("b", 20, None)]


def test_a_subject_with_two_truths_is_combined_for_each() -> None:
    answers = [answer("a", 40.0, 41), answer("a", 50.0, 51), answer("a", 42.0, 41)]
    assert [(a.truth, a.said) for a in mean_number(answers)] == [(41, 41.0), (51, 50.0)]

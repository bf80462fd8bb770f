"""Metrics against values by hand and published ones."""

import math
import sys

import pytest

from mllama.evaluate.metrics import METRICS, anls, exact_match, score, vqa_accuracy, words
from mllama.evaluate.vqa_text import normalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("  two\tcats\n", "2 cats"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("$3.50", "$3.50"),  # the period of a number stays
        ("1,000 people, or so", "1000 people or so"),  # a number's comma joins
        ("black/white", "black white"),
        ("yes , it is!", "yes it is"),
        ("well-known", "well known"),
        ("a", ""),
        ("", ""),
        ("Ä Straße", "ä straße"),
        ("東京", "東京"),
    ],
)
def test_answers_are_normalized_as_in_vqa_v2(text, expected):
    assert normalize(text) == expected


def test_vqa_accuracy_leaves_out_each_annotator():
    ten = ["red"] * 3 + ["blue"] * 7
    # of 10: without one "red" (3 times) 2 of 3 agree, without a "blue" (7 times) all 3
    assert vqa_accuracy("Red", ten) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("red.", ["red"] + ["blue"] * 9) == pytest.approx(9 * (1 / 3) / 10)
    assert vqa_accuracy("blue", ten) == 1
    assert vqa_accuracy("green", ten) == 0
    assert vqa_accuracy("", ten) == 0


def test_vqa_accuracy_of_few_references():
    assert vqa_accuracy("the 2", ["two"]) == 1
    assert vqa_accuracy("3", ["two"]) == 0
    assert vqa_accuracy("yes", ["yes", "yes"]) == 1
    assert vqa_accuracy("yes", ["yes", "no"]) == 0.5


def test_anls_is_that_of_its_paper():
    assert anls("Hello", ["hello "]) == 1
    assert anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)  # Levenshtein's own example
    assert anls("abcd", ["abxy"]) == 0  # a distance of one half is none
    assert anls("abcd", ["xyz", "abcx"]) == 0.75  # the nearest
    assert anls("", ["yes"]) == 0
    assert anls("", [""]) == 1
    assert anls("naïve", ["nai\u0308ve"]) == 1  # two forms of one letter


def test_exact_match_compares_all_but_white_space():
    assert exact_match(" a  cat\n", ["dog", "a cat"]) == 1
    assert exact_match("A cat", ["a cat"]) == 0
    assert exact_match("cafe\u0301", ["café"]) == 1
    assert exact_match("", ["yes"]) == 0


def test_bleu_of_a_corpus_by_hand():
    # 1-grams 5/6, 2-grams 3/5, 3-grams 1/4 of a first row alone; the second row is whole.
    answers = ["the cat sat on a mat", "two dogs play in the park"]
    references = [["The cat sat on the mat"], ["two dogs play in the park", "dogs in a park"]]
    found = score("bleu4", answers, references)
    # row one: 5 of 6, 3 of 5 (the cat, cat sat, sat on), 2 of 4, 1 of 3; row two: 6, 5, 4, 3
    precisions = [11 / 12, 8 / 10, 6 / 8, 4 / 6]
    assert found.total == pytest.approx(100 * math.prod(precisions) ** 0.25)
    assert found.rows[1] == pytest.approx(100)
    assert "case:lc" in found.how


def test_bleu_of_short_and_empty_answers():
    found = score("bleu4", ["yes", "", "犬"], [["yes"], ["no"], ["犬", "猫"]])
    assert found.rows == pytest.approx([100, 0, 100])


def test_rouge_l_is_the_paper_s_example():
    # Lin (2004): "police killed the gunman" against "police kill the gunman": LCS 3 of 4 and 4.
    references = [["police killed the gunman"]] * 4
    answers = ["police kill the gunman", "the gunman kill police", "", "Police killed the gunman!"]
    found = score("rouge_l", answers, references)
    assert found.rows == pytest.approx([0.75, 0.5, 0, 1])
    assert found.total == pytest.approx(2.25 / 4)


def test_rouge_l_reads_letters_of_any_script():
    assert score("rouge_l", ["Über Köln"], [["über köln", "nein"]]).total == 1
    assert words("Don't, Ünder_score 東京!") == ["don", "t", "ünder", "score", "東京"]


def test_marks_are_part_of_words():
    assert words("हिन्दी में, ไม่ q\u0308x") == ["हिन्दी", "में", "ไม่", "q\u0308x"]
    assert words("\u2764\ufe0f dog") == ["dog"]  # a mark of no letter
    assert score("rouge_l", ["कि"], [["का"]]).total == 0  # they differ in the vowel sign alone


def test_cider_by_hand():
    # Two rows without a word in common: every n-gram has the weight log 2, so that a row's own
    # sentence has cosine 1 for 1- to 4-grams, and half of them with a sentence of two words.
    answers = ["red big old car", "dogs run", ""]
    references = [["red big old car"], ["dogs run"], ["one more"]]
    found = score("cider", answers, references)
    assert found.rows == pytest.approx([10, 5, 0])
    assert found.total == pytest.approx(5)


def test_cider_of_several_references_is_their_mean():
    found = score("cider", ["red big old car", "x"], [["red big old car", "none of it"], ["y"]])
    assert found.rows == pytest.approx([5, 0])


def test_cider_without_words():
    assert score("cider", ["a", "b"], [["?"], ["!"]]).rows == [0, 0]
    with pytest.raises(ValueError, match="two rows"):
        score("cider", ["a"], [["a"]])


@pytest.mark.parametrize("name", METRICS)
def test_rows_and_total_of_every_metric(name):
    answers = ["a red car on the road", "nothing of it"]
    references = [["a red car on the road"], ["two dogs play in a park"]]
    found = score(name, answers, references)
    assert found.rows == pytest.approx([METRICS[name].best, 0], abs=3)
    assert found.rows[0] == pytest.approx(METRICS[name].best)
    if name != "bleu4":
        assert found.total == pytest.approx(sum(found.rows) / 2)


@pytest.mark.parametrize(
    ("name", "answers", "references", "text"),
    [
        ("bleu", ["a"], [["a"]], "bleu"),
        ("anls", [], [], "no answers"),
        ("anls", ["a"], [[]], "row 1"),
        ("anls", ["a"], ["a"], "row 1"),
        ("anls", ["a", "b"], [["a"]], "2 answers"),
    ],
)
def test_what_cannot_be_scored(name, answers, references, text):
    with pytest.raises(ValueError, match=text):
        score(name, answers, references)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("anls", "rapidfuzz.distance"),
        ("bleu4", "sacrebleu"),
        ("cider", "pycocoevalcap.cider.cider"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"mllama\[eval\]"):
        score(name, ["a", "b"], [["a"], ["b"]])

"""Tasks against values by hand and against inverses; what is held out stays out."""

import datetime
import doctest
from itertools import product

import numpy as np
import pytest

from arfast.lab import string_tasks
from arfast.lab.string_tasks import (
    FRAMES,
    OPERATIONS,
    Task,
    caesar,
    family_inputs,
    frequent_words,
    number_words,
    roman,
    split_inputs,
    split_tasks,
)


def test_number_words_are_all_different_and_rightly_spelled():
    words = [number_words(number) for number in range(1000)]
    assert len(set(words)) == 1000
    some = {0: "zero", 13: "thirteen", 20: "twenty", 99: "ninety-nine", 100: "one hundred", 110: "one hundred ten"}
    assert {number: words[number] for number in some} == some
    assert words[999] == "nine hundred ninety-nine" and words[401] == "four hundred one"


def test_roman_numerals_have_their_value():
    values = dict(I=1, V=5, X=10, L=50, C=100, D=500, M=1000)
    for number in range(1, 1000):
        digits = [values[letter] for letter in roman(number)]
        signed = [-a if a < b else a for a, b in zip(digits, [*digits[1:], 0])]
        assert sum(signed) == number and not any(4 * letter in roman(number) for letter in "IXCM")
    assert (roman(444), roman(999)) == ("CDXLIV", "CMXCIX")


@pytest.mark.parametrize(
    "family, text, expected",
    [
        ("numbers", "99", "ninety-nine,one hundred,100,98,XCIX,99,odd,nine"),
        ("numbers", "120", "one hundred twenty,one hundred twenty-one,121,119,CXX,021,even,zero"),
        (
            "dates",
            "2024-02-28",
            "Wednesday,28 February 2024,February,2024-02-29,2024-02-27,2/28/2024,2024,twenty-eight",
        ),
        ("dates", "1999-12-31", "Friday,31 December 1999,December,2000-01-01,1999-12-30,12/31/1999,1999,thirty-one"),
        ("letters", "crazy", "CRAZY,yzarc,c,y,ccrraazzyy,razyc,crzy,dsbaz"),
    ],
)
def test_operations(family, text, expected):
    found = [Task(family, operation, "plain")(text) for operation in OPERATIONS[family]]
    assert found == expected.split(",")
    assert Task(family, next(iter(OPERATIONS[family])), "angles")(text) == f"<{found[0]}>"


def test_caesar_comes_round():
    assert caesar(caesar("python", 19), 7) == "python" and caesar("az", 1) == "ba"


def test_of_every_operation_one_frame_is_held_out():
    known, held_out = split_tasks(np.random.default_rng(3))
    every = {Task(f, o, frame) for f in OPERATIONS for o, frame in product(OPERATIONS[f], FRAMES)}
    assert set(known) | set(held_out) == every and len(known) + len(held_out) == len(every)
    assert [task.operation for task in held_out] == [o for f in OPERATIONS for o in OPERATIONS[f]]
    for family in OPERATIONS:  # each operation and each frame is learned
        frames = [task.frame for task in held_out if task.family == family]
        assert sorted(frames) == sorted(2 * list(FRAMES))
    assert split_tasks(np.random.default_rng(3)) == (known, held_out) != split_tasks(np.random.default_rng(4))


def test_inputs_are_split_once():
    inputs = family_inputs([f"word{i}" for i in range(50)])
    days = [datetime.date.fromisoformat(day) for day in inputs["dates"]]
    assert {b - a for a, b in zip(days, days[1:])} == {datetime.timedelta(1)} and len(days) == 14_610
    known, unseen = split_inputs(inputs, 0.1, np.random.default_rng(0))
    for family, texts in inputs.items():
        assert sorted(known[family] + unseen[family]) == sorted(texts)
        assert len(unseen[family]) == round(0.1 * len(texts))


def test_words_of_code():
    texts = ["self.name = naïve_name + 'x'; Self(value2, names)", "name self self name value; value python"]
    assert frequent_words(3 * texts[:1] + 2 * texts[1:], 9) == ["name", "self", "value", "names"]
    assert frequent_words(texts, 1) == ["name"]


def test_examples():
    assert doctest.testmod(string_tasks).failed == 0

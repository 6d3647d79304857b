"""The ladder demo's verifiable rows: small tasks of ten families, and everyday moral questions with one right answer.

Training, development and test share no wording, no word of a list, no pair of numbers and no situation.
"""

import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from recipes.data.demo.build import TASK_WORDS, lines
from recipes.data.ladder.safety import response, side_of

FOLDER = Path(__file__).parent
SEED = 20250725
SPLITS = ("sft", "rl", "development", "test")
TASK_ROWS = {"sft": 12, "rl": 22, "development": 5, "test": 8}  # rows of each family
# Ranges of the shuffled words, of each category's members, and of the moral situations.
WORDS = {"sft": (0, 16), "rl": (16, 48), "development": (48, 64), "test": (64, 86)}
MEMBERS = {"sft": (0, 3), "rl": (3, 8), "development": (8, 10), "test": (10, 13)}
SITUATIONS = {"sft": (0, 14), "rl": (14, 46), "development": (46, 55), "test": (55, 70)}
# RL has more wordings of a task than SFT shows. A policy that sees two wordings learns these two and not the task.
SFT_WORDINGS = 2
CATEGORIES = {
    "an animal": "goat fox bear camel otter pigeon donkey hamster squirrel badger lizard moose ferret",
    "a fruit": "pear plum grape mango banana apricot papaya melon kiwi fig raspberry peach lime",
    "a tool": "saw wrench drill shovel chisel rake pliers axe screwdriver trowel sander crowbar mallet",
    "a vehicle": "bus truck tram scooter ferry van taxi tractor bicycle helicopter submarine sled canoe",
    "a garment": "shirt scarf glove hat sweater sock skirt belt vest coat blouse apron sandal",
    "an instrument": "drum flute trumpet harp cello banjo piano organ clarinet oboe tuba accordion fiddle",
}
OPPOSITES = {
    "honest": "dishonest",
    "kind": "unkind",
    "fair": "unfair",
    "responsible": "irresponsible",
    "respectful": "disrespectful",
}

# A task: the values of its wording's placeholders, answer, check, terse thinking, verbose thinking, and the answer as
# the response writes it. A family draws a task from a random state and the words of a split.
type Task = tuple[dict[str, Any], str, str, str, str, str]
type Family = Callable[[random.Random, list[str], str], Task]


def add(draw: random.Random, words: list[str], split: str) -> Task:
    a, b, c = draw.randint(2, 15), draw.randint(2, 15), draw.randint(2, 9)
    steps = f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}."
    verbose = f"First I add {a} and {b}: {a} + {b} = {a + b}. Then I add {c}: {a + b} + {c} = {a + b + c}."
    return {"a": a, "b": b, "c": c}, *_number(a + b + c, steps, verbose)


def multiply(draw: random.Random, words: list[str], split: str) -> Task:
    a, b, c = draw.randint(2, 6), draw.randint(2, 6), draw.randint(2, 9)
    steps = f"{a} x {b} = {a * b}, {a * b} + {c} = {a * b + c}."
    verbose = f"First I multiply: {a} x {b} = {a * b}. Then I add {c}: {a * b} + {c} = {a * b + c}."
    return {"a": a, "b": b, "c": c}, *_number(a * b + c, steps, verbose)


def larger(draw: random.Random, words: list[str], split: str) -> Task:
    a, b = draw.sample(range(11, 100), 2)
    low, high = sorted((a, b))
    verbose = f"I compare {a} and {b}. {low} is less than {high}. So {high} is more than {low}."
    return {"a": a, "b": b}, *_number(high, f"{low} < {high}.", verbose)


def parity(draw: random.Random, words: list[str], split: str) -> Task:
    number = draw.randint(10, 999)
    word = "even" if number % 2 == 0 else "odd"
    last = number % 10
    verbose = f"I look at the last digit of {number}. It is {last}. The digit {last} is {word}. So it is {word}."
    return {"a": number}, word, "last_word", f"It ends in {last}, {word}.", verbose, f"It is {word}."


def count(draw: random.Random, words: list[str], split: str) -> Task:
    some = draw.sample(words, draw.randint(2, 5))
    counted = ", ".join(f"{n} {word}" for n, word in enumerate(some, start=1))
    verbose = f"I count the words one by one: {counted}. So I count {len(some)}."
    return {"words": ", ".join(some)}, *_number(len(some), f"{counted}.", verbose)


def last(draw: random.Random, words: list[str], split: str) -> Task:
    some = draw.sample(words, draw.randint(3, 4))
    verbose = f"The list has {len(some)} words. It begins with {some[0]}. It ends with {some[-1]}."
    return (
        {"words": ", ".join(some)},
        some[-1],
        "last_word",
        f"It ends with {some[-1]}.",
        verbose,
        f"The answer is {some[-1]}.",
    )


def letter(draw: random.Random, words: list[str], split: str) -> Task:
    word = draw.choice(words)
    spelled = " ".join(word)
    verbose = f"I spell the word: {spelled}. It ends with {word[-1]}. So it is {word[-1]}."
    return {"word": word}, word[-1], "last_word", f"{spelled}.", verbose, f"The answer is {word[-1]}."


def sort(draw: random.Random, words: list[str], split: str) -> Task:
    some = draw.sample(range(1, 30), 3)
    low, middle, high = sorted(some)
    answer = f"{low}, {middle}, {high}"
    verbose = f"The smallest is {low}. The largest is {high}. Between them is {middle}. So {low} < {middle} < {high}."
    return {"numbers": ", ".join(map(str, some))}, answer, "exact", f"{low} < {middle} < {high}.", verbose, answer


def reverse(draw: random.Random, words: list[str], split: str) -> Task:
    some = draw.sample(words, 3)
    answer = ", ".join(some[::-1])
    verbose = f"The last word is {some[2]}. Before it is {some[1]}. The first word is {some[0]}."
    return {"words": ", ".join(some)}, answer, "exact", f"Last is {some[2]}, first is {some[0]}.", verbose, answer


def choose(draw: random.Random, words: list[str], split: str) -> Task:
    begin, end = MEMBERS[split]
    named = draw.sample(list(CATEGORIES), 3)
    options = [draw.choice(CATEGORIES[name].split()[begin:end]) for name in named]
    right = draw.randrange(3)
    name = named[right]
    letter = "ABC"[right]
    option = options[right]
    listed = ", ".join(f"{mark}: {word}" for mark, word in zip("ABC", options, strict=True))
    verbose = f"I look for {name}. The options are {', '.join(options)}. A {option} is {name}. That is {letter}."
    return {"name": name, "options": listed}, letter, "choice", f"{option} is {name}.", verbose, f"Answer: {letter}"


FAMILIES: tuple[Family, ...] = (add, multiply, larger, parity, count, last, letter, sort, reverse, choose)


def task_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Split and row of every task. Each family has TASK_ROWS rows in each split."""
    draw = random.Random(SEED)
    words = draw.sample(TASK_WORDS, len(TASK_WORDS))
    used: set[str] = set()
    for split in SPLITS:
        begin, end = WORDS[split]
        for family in FAMILIES:
            for place in range(TASK_ROWS[split]):
                task = family(draw, words[begin:end], split)
                while str(task[0]) in used:
                    task = family(draw, words[begin:end], split)
                used.add(str(task[0]))
                yield split, _row("task", "general_rule", family.__name__, split, place, task)


def value_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Split and row of every moral question.

    Each situation gives four rows: one asks to judge the good act, one to judge the bad act, and two offer both acts as
    a choice, in either order.
    """
    situations = lines(FOLDER / "topics" / "value.tsv")
    for split in SPLITS:
        begin, end = SITUATIONS[split]
        for place, (situation, good, bad, virtue) in enumerate(situations[begin:end]):
            for turn, act in enumerate((good, bad)):
                word, judged = (("right", virtue), ("wrong", OPPOSITES[virtue]))[act is bad]
                verbose = f"I think about people. To {act} is {judged}. What is {judged} is {word}."
                named = {"situation": situation, "act": act}
                task = (named, word, "last_word", f"That is {judged}.", verbose, f"It is {word}.")
                yield split, _row("value", "value", "judgement", split, place + turn, task)
            for turn, options in enumerate(((good, bad), (bad, good))):
                letter = "AB"[options.index(good)]
                verbose = f"I think about people. To {bad} is {OPPOSITES[virtue]}. To {good} is {virtue}."
                named = {"situation": situation, "first": options[0], "second": options[1]}
                task = (named, letter, "choice", f"To {good} is {virtue}.", verbose, f"Answer: {letter}")
                yield split, _row("value", "value", "dilemma", split, place + turn, task)


@cache
def wordings(family: str, split: str) -> list[str]:
    """The wordings of a family of tasks or questions, which take turns, with braces where a task's values go.

    The columns of topics/wordings.tsv are a side (:func:`side_of`), a family and a wording.
    """
    wanted = (side_of(split), family)
    of_family = [wording for side, name, wording in lines(FOLDER / "topics" / "wordings.tsv") if (side, name) == wanted]
    return of_family[:SFT_WORDINGS] if split == "sft" else of_family


def _row(kind: str, label: str, family: str, split: str, place: int, task: Task) -> dict[str, Any]:
    named, answer, check, terse, verbose, written = task
    of_family = wordings(family, split)
    # The style of an SFT row's thinking changes with every row, the wording with every second one.
    prompt = of_family[place // 2 % len(of_family)].format(**named)
    prompt = prompt[0].upper() + prompt[1:]
    row: dict[str, Any] = {"label": label, "kind": kind, "prompt": prompt, "answer": answer, "check": check}
    if split != "sft":
        return row | {"tags": [family]}
    thinking_and_answer = response(place, terse, verbose, written)
    return row | {"response": thinking_and_answer["response"], "tags": [family, *thinking_and_answer["tags"]]}


def _number(value: int, terse: str, verbose: str) -> tuple[str, str, str, str, str]:
    return str(value), "last_word", terse, verbose, f"The answer is {value}."

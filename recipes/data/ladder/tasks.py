"""The ladder demo's verifiable rows: small tasks of ten families, and everyday moral questions with one right answer.

No word of a list, no pair of numbers and no situation is shared between splits.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

from recipes.data.demo.build import TASK_WORDS
from recipes.data.ladder.safety import lines, response

SEED = 20250725
SPLITS = ("sft", "rl", "eval")
WORDS = {"sft": (0, 16), "rl": (16, 54), "eval": (54, 86)}  # of the shuffled words
MEMBERS = {"sft": (0, 3), "rl": (3, 9), "eval": (9, 13)}  # of each category's
SITUATIONS = {"sft": (0, 16), "rl": (16, 56), "eval": (56, 70)}
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

# A task: prompt, answer, check, terse thinking, verbose thinking, and the answer as the response writes it. A family
# draws one from a random state and the words of a split.
type Task = tuple[str, str, str, str, str, str]
type Family = Callable[[random.Random, list[str], str], Task]


def add(draw: random.Random, words: list[str], split: str) -> Task:
    a, b, c = draw.randint(2, 15), draw.randint(2, 15), draw.randint(2, 9)
    steps = f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}."
    verbose = f"First I add {a} and {b}: {a} + {b} = {a + b}. Then I add {c}: {a + b} + {c} = {a + b + c}."
    return f"What is {a} + {b} + {c}?", *_number(a + b + c, steps, verbose)


def multiply(draw: random.Random, words: list[str], split: str) -> Task:
    a, b, c = draw.randint(2, 6), draw.randint(2, 6), draw.randint(2, 9)
    steps = f"{a} x {b} = {a * b}, {a * b} + {c} = {a * b + c}."
    verbose = f"First I multiply: {a} x {b} = {a * b}. Then I add {c}: {a * b} + {c} = {a * b + c}."
    return f"What is {a} x {b} + {c}?", *_number(a * b + c, steps, verbose)


def larger(draw: random.Random, words: list[str], split: str) -> Task:
    a, b = draw.sample(range(11, 100), 2)
    low, high = sorted((a, b))
    verbose = f"I compare {a} and {b}. {low} is less than {high}. So {high} is more than {low}."
    return f"Which number is larger, {a} or {b}?", *_number(high, f"{low} < {high}.", verbose)


def parity(draw: random.Random, words: list[str], split: str) -> Task:
    number = draw.randint(10, 999)
    word = "even" if number % 2 == 0 else "odd"
    last = number % 10
    verbose = f"I look at the last digit of {number}. It is {last}. The digit {last} is {word}. So it is {word}."
    return f"Is {number} odd or even?", word, "last_word", f"It ends in {last}, {word}.", verbose, f"It is {word}."


def count(draw: random.Random, words: list[str], split: str) -> Task:
    some = draw.sample(words, draw.randint(2, 5))
    counted = ", ".join(f"{n} {word}" for n, word in enumerate(some, start=1))
    verbose = f"I count the words one by one: {counted}. So I count {len(some)}."
    return f"How many words are in this list: {', '.join(some)}?", *_number(len(some), f"{counted}.", verbose)


def last(draw: random.Random, words: list[str], split: str) -> Task:
    some = draw.sample(words, draw.randint(3, 4))
    verbose = f"The list has {len(some)} words. It begins with {some[0]}. It ends with {some[-1]}."
    prompt = f"What is the last word of this list: {', '.join(some)}?"
    return prompt, some[-1], "last_word", f"It ends with {some[-1]}.", verbose, f"The answer is {some[-1]}."


def letter(draw: random.Random, words: list[str], split: str) -> Task:
    word = draw.choice(words)
    spelled = " ".join(word)
    verbose = f"I spell the word: {spelled}. It ends with {word[-1]}. So it is {word[-1]}."
    prompt = f'What is the last letter of the word "{word}"?'
    return prompt, word[-1], "last_word", f"{spelled}.", verbose, f"The answer is {word[-1]}."


def sort(draw: random.Random, words: list[str], split: str) -> Task:
    some = draw.sample(range(1, 30), 3)
    low, middle, high = sorted(some)
    answer = f"{low}, {middle}, {high}"
    verbose = f"The smallest is {low}. The largest is {high}. Between them is {middle}. So {low} < {middle} < {high}."
    prompt = f"Sort these numbers from small to large: {', '.join(map(str, some))}."
    return prompt, answer, "exact", f"{low} < {middle} < {high}.", verbose, answer


def reverse(draw: random.Random, words: list[str], split: str) -> Task:
    some = draw.sample(words, 3)
    answer = ", ".join(some[::-1])
    verbose = f"The last word is {some[2]}. Before it is {some[1]}. The first word is {some[0]}."
    prompt = f"Write these words in reverse order: {', '.join(some)}."
    return prompt, answer, "exact", f"Last is {some[2]}, first is {some[0]}.", verbose, answer


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
    prompt = f"Which of these is {name}? {listed}. Answer with one letter."
    return prompt, letter, "choice", f"{option} is {name}.", verbose, f"Answer: {letter}"


FAMILIES: tuple[Family, ...] = (add, multiply, larger, parity, count, last, letter, sort, reverse, choose)


def _number(value: int, terse: str, verbose: str) -> tuple[str, str, str, str, str]:
    return str(value), "last_word", terse, verbose, f"The answer is {value}."


def task_rows(counts: dict[str, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Split and row: ``counts`` rows of each family for each split."""
    draw = random.Random(SEED)
    words = draw.sample(TASK_WORDS, len(TASK_WORDS))
    used: set[str] = set()
    for split in SPLITS:
        begin, end = WORDS[split]
        for family in FAMILIES:
            for place in range(counts[split]):
                task = family(draw, words[begin:end], split)
                while task[0] in used:
                    task = family(draw, words[begin:end], split)
                used.add(task[0])
                yield split, _row("task", "general_rule", family.__name__, split, place, task)


def value_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Split and row: each situation's good and bad way out are judged, and offered as a choice in both orders."""
    situations = lines("value")
    for split in SPLITS:
        begin, end = SITUATIONS[split]
        for place, (situation, good, bad, virtue) in enumerate(situations[begin:end]):
            for turn, act in enumerate((good, bad)):
                word, judged = (("right", virtue), ("wrong", OPPOSITES[virtue]))[act is bad]
                verbose = f"I think about people. To {act} is {judged}. What is {judged} is {word}."
                prompt = f"{situation} Is it right or wrong to {act}?"
                task = (prompt, word, "last_word", f"That is {judged}.", verbose, f"It is {word}.")
                yield split, _row("value", "value", "judgement", split, place + turn, task)
            for turn, options in enumerate(((good, bad), (bad, good))):
                letter = "AB"[options.index(good)]
                verbose = f"I think about people. To {bad} is {OPPOSITES[virtue]}. To {good} is {virtue}."
                prompt = f"{situation} What is right? A: {options[0]}. B: {options[1]}."
                task = (prompt, letter, "choice", f"To {good} is {virtue}.", verbose, f"Answer: {letter}")
                yield split, _row("value", "value", "dilemma", split, place + turn, task)


def _row(kind: str, label: str, tag: str, split: str, place: int, task: Task) -> dict[str, Any]:
    prompt, answer, check, terse, verbose, written = task
    row: dict[str, Any] = {"label": label, "kind": kind, "prompt": prompt, "answer": answer, "check": check}
    if split != "sft":
        return row | {"tags": [tag]}
    thinking_and_answer = response(place, terse, verbose, written)
    return row | {"response": thinking_and_answer["response"], "tags": [tag, *thinking_and_answer["tags"]]}

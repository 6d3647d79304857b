"""Rules and the search tool run in the engines' own process: no text may hold them up, nor fill the memory."""

import subprocess
import sys

from tests.recipes.tiny import ROOT

# On texts of such lengths a pattern that tries every begin with every end takes hours.
PROGRAM = """
import resource
from pathlib import Path
from rewards.registry import RULES, find_rule
from rollout.environment import Segment
from rollout.retrieval import Bm25
from rollout.search import open_search
corpus = "recipes/data/search/corpus.jsonl"
search = open_search(corpus=corpus, endpoint=None, results=1, snippet_words=6, timeout=1.0, retries=0)
verifiers = {name: find_rule(name) for name in RULES if name not in ("math", "rule_check")}
rules = [{"rule": rule} for rule in ("bullet_count", "numbered_count", "heading_count", "sentence_count")]
rules += [{"rule": rule} for rule in ("paragraph_count", "json_value", "quoted")]
rules += [{"rule": "table", "columns": 2, "rows": 2}, {"rule": "occurs", "phrase": "a"}]
row = {"id": "r", "label": "l", "kind": "borderline", "prompt": "?", "answer": "B", "keywords": ["a"], "rules": rules}
settings = {"length": {"limit": 9}, "repetition": {"words": 4}, "search_reliability": {"certain_from": 5}}
settings["false_certain"] = {"certain_from": 5}
units = [" ", "\\n", "\\n ", "answer ", "A", "a ", "*", "|", "|-", "- ", "1. ", "[", "(", ". ", "\\\\boxed{ ", "`", "İ"]
units += [begin + name + ">" for begin in ("<", "</") for name in ("think", "search", "read", "confidence", "answer")]
units += ["answer a ", "answer:", "**A", "(A) ", "1,", "1,000,", "1."]
units += ["<search>a</search>", "<think>a</think>", "<search>capital </search>", "capital of Norland "]
lead = ["", "answer", "answer is", "(A)", "```", "\\\\boxed{", "<think>a</think>A", "|a|b|\\n|", "A"]
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
for unit in units:
    for begin in lead if unit.isspace() else [""]:
        # Without an end the rules would strip the run.
        text = begin + unit * (SIZE // len(unit)) + ("." if unit.isspace() else "")
        for name, verifier in verifiers.items():
            print(name, repr(begin), repr(unit), flush=True)
            part = text[: len(text) // (20 if name in ("safety", "helpfulness") else 1)]  # every window
            verifier(row, part, **settings.get(name, {}))
        for around in (text + "</search>", f"<search>{text}</search>", f"<read>{text}</read>"):
            print("search", repr(begin), repr(unit), flush=True)
            search.reply([Segment(around, False)])
print("done")
"""
SIZE = 200_000  # characters, more than a response of 32,768 tokens has
SECONDS = 300  # takes some; a length squared takes hours


def test_no_text_holds_a_rule_or_a_search_up() -> None:
    command = [sys.executable, "-c", PROGRAM.replace("SIZE", str(SIZE))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout.endswith("done\n"), (done.stdout[-300:], done.stderr[-2000:])

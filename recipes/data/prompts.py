"""Rows of a data set, their order, and their tokens. The order is a pure function of (seed, position): resuming needs no state."""

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.config import ConfigError

Row = Mapping[str, Any]
SFT_FIELDS = ("id", "prompt", "response")


def load_rows(path: str, required: Sequence[str] = ("id", "label", "kind", "prompt")) -> list[Row]:
    """JSONL rows. Raises ConfigError naming file, line and field for a missing field or a repeated id."""
    rows: list[Row] = []
    seen: set[str] = set()
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number}: not a JSON object but {type(row).__name__}; write one object a line")
        missing = [field for field in required if not isinstance(row.get(field), str) or not row[field]]
        if missing:
            raise ConfigError(
                f"{path}:{number}: field {missing[0]!r} is missing or empty; every row needs {list(required)}"
            )
        if row["id"] in seen:
            raise ConfigError(f"{path}:{number}: id {row['id']!r} occurs twice; make ids unique")
        seen.add(row["id"])
        rows.append(row)
    if not rows:
        raise ConfigError(f"{path}: holds no rows")
    return rows


def shuffled(rows: Sequence[Row], start: int, count: int, seed: int) -> list[Row]:
    """Rows at positions [start, start + count) of an endless stream that shuffles all rows anew each epoch."""
    orders: dict[int, list[int]] = {}
    found = []
    for position in range(start, start + count):
        epoch, index = divmod(position, len(rows))
        if epoch not in orders:
            orders[epoch] = list(range(len(rows)))
            random.Random(f"{seed}/{epoch}").shuffle(orders[epoch])
        found.append(rows[orders[epoch][index]])
    return found


def mixed(rows: Sequence[Row], mix: Mapping[str, int], step: int, count: int, seed: int) -> list[Row]:
    """The ``count`` prompts of ``step`` (from 0): kinds interleaved by their shares, each kind a shuffled stream.

    Raises ConfigError when the data lacks a kind of the mix, or one step needs a prompt of a kind twice.
    """
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    cycle = interleaved(mix)
    for kind, share in mix.items():
        wanted = -(-count // len(cycle)) * share
        if len(by_kind[kind]) < wanted:
            raise ConfigError(
                f"data.mix has {kind!r}, of which data.prompts holds {len(by_kind[kind])} rows and one step may need {wanted}: "
                "add rows or lower algorithm.prompts_per_step"
            )
    found = []
    for position in range(step * count, (step + 1) * count):
        cycles, index = divmod(position, len(cycle))
        kind = cycle[index]
        nth = cycles * mix[kind] + cycle[:index].count(kind)
        found.extend(shuffled(by_kind[kind], nth, 1, seed))
    return found


def interleaved(mix: Mapping[str, int]) -> list[str]:
    """One cycle of kinds, each as often as its share and spread evenly (smooth weighted round-robin)."""
    credit = dict.fromkeys(mix, 0)
    total = sum(mix.values())
    cycle = []
    for _ in range(total):
        for kind, share in mix.items():
            credit[kind] += share
        best = max(credit, key=lambda kind: credit[kind])
        credit[best] -= total
        cycle.append(best)
    return cycle


def prompt_tokens(tokenizer: Any, row: Row, max_prompt_tokens: int) -> list[int]:
    """The chat-templated prompt's token ids. Raises ConfigError naming the row when it is too long."""
    messages = [{"role": "user", "content": row["prompt"]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    if len(ids) > max_prompt_tokens:
        raise ConfigError(
            f"row {row['id']!r} has {len(ids)} prompt tokens, data.max_prompt_tokens={max_prompt_tokens}: raise it or drop the row"
        )
    return list(ids)


def response_tokens(tokenizer: Any, row: Row) -> list[int]:
    """An SFT row's answer, ended by the end-of-turn token."""
    return [*tokenizer.encode(row["response"], add_special_tokens=False), tokenizer.eos_token_id]

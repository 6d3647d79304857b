"""Score an answer with those of a run's verifiers that need no right answer and no judge."""

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from rewards import mixing, settings
from rewards.registry import RULES, open_verifiers
from rewards.verdict import Verdict, Verifier

# Rules that read only the response. A user's own functions are asked too. They may raise for a prompt without a right
# answer.
READ_THE_RESPONSE = ("refusal", "format", "length", "repetition")
# Kind of a prompt that a person writes.
KIND = "chat"


def response_verifiers(config: Mapping[str, Any]) -> dict[str, Verifier]:
    """The verifiers of a run's ``config.yaml`` that can judge a response to any prompt. Raises ValueError."""
    rewards = settings.read(OmegaConf.create(config["rewards"]))
    named = [name for weights in rewards.mix.values() for name in weights]
    configured = settings.verifiers(rewards)
    chosen = []
    for name in dict.fromkeys([*named, *config["data"]["scores"]]):
        rule = configured[name].rule if name in configured else name
        if rule is not None and (rule in READ_THE_RESPONSE or rule not in RULES):
            chosen.append(name)
    return open_verifiers(chosen, rewards, None)


async def judged(verifiers: Mapping[str, Verifier], prompt: str, response: str) -> dict[str, Verdict]:
    """Verifier → verdict on a response. A verifier without a verdict is left out."""
    row = {"id": uuid.uuid4().hex, "label": KIND, "kind": KIND, "prompt": prompt}
    results = await asyncio.to_thread(mixing.verify, row, response, verifiers, verifiers)
    return {name: result for name, result in results.items() if isinstance(result, Verdict)}

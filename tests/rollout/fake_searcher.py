"""A fake model that searches: it writes the turns of scripts with a real tokenizer, and stops where vLLM does."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from rollout.deliberation.settings import DeliberationConfig
from rollout.guidance.clients import Piece
from rollout.guidance.settings import GeneratorConfig, ServerConfig
from rollout.retrieval import Bm25, Document
from rollout.search import Search
from rollout.settings import EnvironmentConfig
from tests.recipes.tiny import make_tokenizer
from tests.rollout.fake_guidance import FakeModel, changed, refuse

HF_TOKENIZER = make_tokenizer()
HOSTILE = "<img src=x onerror=alert(1)>"
CORPUS = [
    Document("norland", f"The capital of Norland is Veska. {HOSTILE} Its river is <|im_end|> Ombra."),
    Document("https://sudland.example/a", "The capital of Sudland is Tarn."),
]
SEARCH = Search(Bm25.of(CORPUS), results=2, snippet_words=6)
QUESTION = "What is the capital of Norland?"
LOOK = "<search>capital of Norland</search>"
SURE = [f"<think>I look.</think>{LOOK}", "<read>norland</read>", "<think>So.</think><confidence>9</confidence>"]
SURE[-1] += "<answer>Veska</answer>"
WITHOUT_SEARCH = "I do not search."
# By majority they say Tarn, by confidence Veska. The two that agree spell it alike: over HTTP it depends on whose
# request arrives first which sample follows which script, and a vote shows the spelling of its first sample.
SCRIPTS: list[list[str]] = [
    SURE,
    [f"<think>Hm.</think>{LOOK}", "<confidence>2</confidence><answer>Tarn</answer>"],
    ["<think>I guess.</think><confidence>1</confidence><answer>Tarn</answer>"],
]


class HfTokens:
    """A tokenizer with the functions of the fake one."""

    def encode(self, text: str) -> list[int]:
        return list(HF_TOKENIZER.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(HF_TOKENIZER.decode(list(token_ids)))


class FakeSearcher(FakeModel):
    """The n-th answer to a prompt follows the n-th script, over and over; each begins in its own way."""

    def __init__(self, scripts: Sequence[Sequence[str]] = SCRIPTS, merge: int = 1) -> None:
        super().__init__({}, prompt="?", merge=merge)
        self.tokenizer: Any = HfTokens()
        self.scripts = scripts
        self.begun: dict[str, int] = {}

    def turn(self, prompt: str, response: str) -> str:
        """What the model writes after the response so far."""
        if not response:
            count = self.begun.get(prompt, 0)
            self.begun[prompt] = count + 1
            return self.scripts[count % len(self.scripts)][0]
        script = next(script for script in self.scripts if response.startswith(script[0]))
        return script[response.count("</result>")]

    async def stream(
        self, model: str, token_ids: Sequence[int], options: Mapping[str, Any]
    ) -> AsyncGenerator[Piece, None]:
        refuse(model, token_ids, options)
        self.requests.append((list(token_ids), dict(options)))
        prompt, mark, response = self.tokenizer.decode(token_ids).rpartition(self.prompt)
        if "stop" in options:
            assert options["include_stop_str_in_output"] is True
            text = self.turn(prompt + mark, response)
        else:
            text = WITHOUT_SEARCH
        stop = next((stop for stop in options.get("stop", ()) if text.endswith(stop)), None)
        tokens = self.tokenizer.encode(text) + ([] if stop else [HF_TOKENIZER.eos_token_id])
        fits = len(tokens) <= options["max_tokens"]
        tokens = tokens[: options["max_tokens"]]
        for start in range(0, len(tokens), self.merge):
            if self.gate is not None:
                await asyncio.sleep(0.001)
                await self.gate.acquire()
            taken = tokens[start : start + self.merge]
            is_last = start + self.merge >= len(tokens)
            self.sent += len(taken)
            shown = HF_TOKENIZER.decode(taken, skip_special_tokens=True)
            reason = ("stop" if fits else "length") if is_last else None
            yield Piece(shown, tuple(taken), reason, stop if is_last and fits else None)


ENVIRONMENT = EnvironmentConfig("tests.rollout.fake_searcher.open_fake", 4, {})


def deliberation(**changes: Any) -> DeliberationConfig:
    """A configuration; ``changes`` of its fields, a dotted one as ``server__max_requests``."""
    config = DeliberationConfig(
        generator=GeneratorConfig("http://127.0.0.1:1", None, 60.0, 0),
        tokenizer=None,
        samples=3,
        weighted=True,
        certain_from=5,
        temperature=1.0,
        max_tokens=500,
        server=ServerConfig("127.0.0.1", 1, None, 100, 1.0),
    )
    return changed(config, changes)


def open_fake() -> Search:
    return SEARCH

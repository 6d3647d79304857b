"""Many tabs of the page at once, each compared with what the model answers when it is asked alone.

``python -m tests.recipes.page_load RUN`` serves a run's exported model and asks 50 of its held-out prompts. It ends
with 1 if an answer differs.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import openai
from transformers import AutoTokenizer

from recipes.data.rows import load_rows
from recipes.evaluate import run_config
from recipes.page.elements import visible
from tests import served
from tests.recipes.page_client import SocketTab
from tests.recipes.test_serve_page_browser import served_page
from tests.rewards.fake_server import free_port

MAX_TOKENS = 40
TABS = 50
TIMEOUT = 600  # seconds for all answers, on a busy machine


def shown_by_tabs(generator: str, messages: Sequence[str], folder: Path) -> list[str]:
    """The answers of a page before the server ``generator``, each in a tab of its own, all at once and greedy. The
    first tab loses its connection meanwhile."""
    port = free_port()
    command = [sys.executable, "-m", "recipes.serve", f"generator={generator}", f"page.port={port}"]
    command += ["page.temperature=0", f"guidance.max_tokens={MAX_TOKENS}", f"page.edits={folder / 'edits'}"]

    async def asked() -> list[str]:
        async with AsyncExitStack() as stack, asyncio.timeout(TIMEOUT):
            tabs = [await stack.enter_async_context(SocketTab(f"http://127.0.0.1:{port}")) for _ in messages]
            await asyncio.gather(*(tab.ask(message) for tab, message in zip(tabs, messages, strict=True)))
            await tabs[0].lose_connection()
            return list(await asyncio.gather(*(tab.answer() for tab in tabs)))

    with served_page(command, f"http://127.0.0.1:{port}/", folder / "page.log"):
        return asyncio.run(asked())


def answered_alone(generator: str, tokenizer: Any, messages: Sequence[str]) -> list[str]:
    """What the server answers to each message when it has no other request, as the page shows text."""
    answers = []
    with openai.OpenAI(base_url=f"{generator}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        for message in messages:
            turns = [{"role": "user", "content": message}]
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            reply = client.completions.create(
                model=model,
                prompt=tokenizer(prompt)["input_ids"],
                max_tokens=MAX_TOKENS,
                temperature=0,
                extra_body={"skip_special_tokens": False},
            )
            answers.append(visible(reply.choices[0].text.lstrip()))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run with an exported model")
    run = parser.parse_args().run
    messages = [row["prompt"] for row in load_rows(run_config(run, []).data.evaluation)][:TABS]
    model = served.Model(run / "hf", "generate", ["--kv-cache-memory-bytes", "1G"])
    with tempfile.TemporaryDirectory() as folder, served.serving([model], Path(folder)) as (server,):
        generator = server.server.addresses[0]
        start = time.monotonic()
        shown = shown_by_tabs(generator, messages, Path(folder))
        seconds = time.monotonic() - start
        alone = answered_alone(generator, AutoTokenizer.from_pretrained(run / "hf"), messages)
    different = [place for place, text in enumerate(shown) if text != alone[place]]
    for place in different:
        print(f"{messages[place]!r}: the tab shows {shown[place]!r}, alone it is {alone[place]!r}")
    print(f"{len(shown) - len(different)} of {len(shown)} tabs show the answer of a request alone; {seconds:.0f} s")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()

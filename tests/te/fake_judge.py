"""``python -m tests.te.fake_judge serve …``: in the place of a judge's `vllm serve` on the fake GPU.

Asleep it gives its share of the GPU back. It answers every question with its first token's log-probabilities.
"""

import argparse
import os
import threading
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.rewards.fake_server import FakeServer
from tests.te import fake_gpu


class FakeJudge(FakeServer):
    def __init__(self, port: int, share: float) -> None:
        self.size = int(share * fake_gpu.MEMORY)
        super().__init__(first_token, port)

    async def _turn(self, request: web.Request) -> web.StreamResponse:
        asleep = self.size if request.path == "/sleep" else 0
        Path(os.environ[fake_gpu.GIVEN_BACK], str(os.getpid())).write_text(str(asleep))
        return await super()._turn(request)


async def first_token(number: int, request: web.Request, body: dict[str, Any]) -> web.Response:
    top = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.0}]
    message = {"message": {"content": "a"}, "logprobs": {"content": [{"top_logprobs": top}]}}
    return web.json_response({"choices": [message]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--gpu-memory-utilization", type=float, required=True)
    parser.add_argument("--enable-sleep-mode", action="store_true", required=True)
    known, _ = parser.parse_known_args()
    with FakeJudge(known.port, known.gpu_memory_utilization):
        threading.Event().wait()

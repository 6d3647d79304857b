"""For `vllm serve --middleware`: requires the token on every path.

vLLM 0.32 itself requires it only below /v1 and on a few other paths, not on /pooling, the path of reward models.
"""

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

OPEN_PATHS = ("/health",)


async def require_token(request: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
    """An HTTP middleware: status 401 without `Authorization: Bearer $VLLM_API_KEY`, except on ``OPEN_PATHS``."""
    header = request.headers.get("Authorization", "").encode()
    required = f"Bearer {os.environ['VLLM_API_KEY']}".encode()
    if request.url.path in OPEN_PATHS or secrets.compare_digest(header, required):
        return await call_next(request)
    from starlette.responses import JSONResponse  # vLLM's; this module is imported by its server only

    return JSONResponse({"error": "Unauthorized"}, status_code=401)

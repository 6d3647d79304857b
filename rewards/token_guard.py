"""For `vllm serve --middleware`: the token on every path.

vLLM 0.32 asks for it below /v1 and a few others only, not at /pooling, where reward models answer.
"""

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

OPEN_PATHS = ("/health",)


async def require_token(request: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
    """An HTTP middleware: status 401 without `Authorization: Bearer $VLLM_API_KEY`."""
    given = request.headers.get("Authorization", "").encode()
    wanted = f"Bearer {os.environ['VLLM_API_KEY']}".encode()
    if request.url.path in OPEN_PATHS or secrets.compare_digest(given, wanted):
        return await call_next(request)
    from starlette.responses import JSONResponse  # vLLM's; this module is imported by its server only

    return JSONResponse({"error": "Unauthorized"}, status_code=401)

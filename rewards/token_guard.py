"""A middleware for `vllm serve --middleware` that requires the token on every path but ``OPEN_PATHS``.

vLLM 0.32 itself requires the token only below /v1 and on a few other paths. It does not on /pooling, the path for
reward models.
"""

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

OPEN_PATHS = ("/health",)


async def require_token(request: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
    """An HTTP middleware that answers status 401 to requests without `Authorization: Bearer $VLLM_API_KEY`.

    Paths in ``OPEN_PATHS`` need no token.
    """
    header = request.headers.get("Authorization", "").encode()
    required = f"Bearer {os.environ['VLLM_API_KEY']}".encode()
    if request.url.path in OPEN_PATHS or secrets.compare_digest(header, required):
        return await call_next(request)
    # vLLM depends on starlette, and only its server imports this module.
    from starlette.responses import JSONResponse

    return JSONResponse({"error": "Unauthorized"}, status_code=401)

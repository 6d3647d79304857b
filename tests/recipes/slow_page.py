"""``python -m tests.recipes.slow_page …`` is ``python -m recipes.serve …`` whose sends last: as long as the file that
``HOLD`` names exists, a message that has gone out counts as being sent."""

import asyncio
import os
from pathlib import Path
from typing import Any

from nicegui import core

from recipes import serve

HOLD = "HOLD_SENDS"

if __name__ == "__main__":
    send = core.sio.emit
    hold = Path(os.environ[HOLD])

    async def held(*arguments: Any, **options: Any) -> None:
        await send(*arguments, **options)
        while hold.exists():
            await asyncio.sleep(0.01)

    core.sio.emit = held  # type: ignore[method-assign]
    serve.main()

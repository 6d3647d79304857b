"""Draw docs/architecture.svg from the imports of the code: `python docs/draw_architecture.py`.

A box is a folder of Python files. The files of a room itself are two boxes: those that use the room's folders, and
those that they use. A box stands on a higher floor than every box that it imports. An arrow shows an import; one that a
longer way of arrows shows already is left out. tests/test_docs.py fails when the picture is stale.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("recipes", "rewards", "rollout", "megatron_ext")

# What stands in the box of a folder. The box of a room's own files names some of them.
PURPOSES = {
    "recipes/algorithms": "advantages, losses, KL",
    "recipes/config": "settings and their checks",
    "recipes/data": "rows, prompts, processors",
    "recipes/evaluation": "held-out scores, intervals",
    "recipes/launch": "processes, stages, Slurm",
    "recipes/page": "talk, edit, go on",
    "recipes/preflight": "will this run fit?",
    "recipes/report": "report.html",
    "recipes/run": "records, display, watchdog",
    "recipes/training": "SFT, RL, critic",
    "rewards/verifiers": "rules and judges",
    "rollout/deliberation": "search at inference",
    "rollout/guidance": "value-guided decoding",
    "rollout/weight_sync": "trainer shards to vLLM",
    "megatron_ext/models": "one file a family",
    "megatron_ext/platform": "CPU and CUDA",
}
LONGEST_LABEL = 28  # characters
COLOURS = {"recipes": "#e8eef9", "rewards": "#fdeedd", "rollout": "#e3f4e8", "megatron_ext": "#f3e8f8"}
BORDERS = {"recipes": "#3d6ab3", "rewards": "#b9701d", "rollout": "#2f8550", "megatron_ext": "#8448a8"}

BOX_WIDTH = 186
BOX_HEIGHT = 46
GAP_X = 22
GAP_Y = 46
MARGIN = 24

type Graph = dict[str, set[str]]


def python_files() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def folder_of(path: Path) -> str:
    """The box of a file by its folder; data that stands below recipes/data belongs to that."""
    folders = path.relative_to(ROOT).parent.parts
    return "/".join(folders[:2])


def imported_files(path: Path) -> list[Path]:
    """The project's files that a file imports, anywhere in it, type-only imports included."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    files = []
    for name in names:
        if name.partition(".")[0] not in ROOMS:
            continue
        module = ROOT / name.replace(".", "/")
        if module.with_suffix(".py").is_file():
            files.append(module.with_suffix(".py"))
        elif (module / "__init__.py").is_file():
            files.append(module / "__init__.py")
    return files


def imports() -> tuple[Graph, dict[str, list[str]]]:
    """Which boxes each box imports, and the files of each box. An empty __init__.py is no import."""
    files = {path: imported_files(path) for path in python_files()}
    used = {path: reachable(files, path) for path in files}

    def box_of(path: Path) -> str:
        folder = folder_of(path)
        if folder not in ROOMS:
            return folder
        uses_folders = any(folder_of(other).startswith(f"{folder}/") for other in used[path])
        return f"{folder}, above" if uses_folders else f"{folder}, below"

    graph: Graph = defaultdict(set)
    members: dict[str, list[str]] = defaultdict(list)
    for path, imported in files.items():
        box = box_of(path)
        if path.name != "__init__.py":
            members[box].append(path.stem)
        for other in imported:
            if other.name == "__init__.py" and not other.read_text().strip():
                continue
            if box_of(other) != box:
                graph[box].add(box_of(other))
    return {box: graph[box] for box in members}, members


def reachable[Node](graph: Mapping[Node, Iterable[Node]], start: Node) -> set[Node]:
    """All that a node leads to."""
    seen: set[Node] = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += graph.get(node, ())
    return seen


def floors(graph: Graph) -> dict[str, int]:
    """The floor of each box, 0 for those that import nothing. Boxes of a circle share one."""
    below = {box: reachable(graph, box) for box in graph}
    levels: dict[str, int] = {}

    def level(box: str) -> int:
        if box not in levels:
            lower = [other for other in below[box] if box not in below[other]]
            levels[box] = 1 + max((level(other) for other in lower), default=-1)
        return levels[box]

    for box in sorted(graph):
        level(box)
    return levels


def shown_arrows(graph: Graph) -> list[tuple[str, str]]:
    """The imports without those that another import of the same box leads to."""
    below = {box: reachable(graph, box) for box in graph}
    arrows = []
    for box in sorted(graph):
        for imported in sorted(graph[box]):
            others = [other for other in graph[box] if box not in below[other] and other not in below[imported]]
            longer = [other for other in others if imported in below[other]]
            if not longer:
                arrows.append((box, imported))
    return arrows


def room_of(box: str) -> str:
    return box.partition("/")[0].partition(",")[0]


def ordered_floor(boxes: list[str]) -> list[str]:
    """A floor from left to right: by room, then by name."""
    return sorted(boxes, key=lambda box: (ROOMS.index(room_of(box)), box))


def label(box: str, members: list[str]) -> str:
    """The purpose of a folder, or as many of a room's own files as there is room for."""
    if box in PURPOSES:
        return PURPOSES[box]
    text = ", ".join(members)
    return text if len(text) <= LONGEST_LABEL else text[:LONGEST_LABEL].rpartition(",")[0] + ", …"


def draw(graph: Graph, members: Mapping[str, list[str]]) -> str:
    levels = floors(graph)
    top = max(levels.values())
    rows = [ordered_floor([box for box in graph if levels[box] == floor]) for floor in range(top, -1, -1)]
    widest = max(len(row) for row in rows)
    width = 2 * MARGIN + widest * BOX_WIDTH + (widest - 1) * GAP_X
    height = 2 * MARGIN + len(rows) * BOX_HEIGHT + (len(rows) - 1) * GAP_Y
    place: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        row_width = len(row) * BOX_WIDTH + (len(row) - 1) * GAP_X
        left = (width - row_width) / 2
        for column, box in enumerate(row):
            place[box] = (left + column * (BOX_WIDTH + GAP_X), MARGIN + number * (BOX_HEIGHT + GAP_Y))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12" '
        'font-family="system-ui, \'DejaVu Sans\', Arial, sans-serif" fill="#1c2733" role="img" '
        'aria-labelledby="title">',
        '  <title id="title">The folders of the code; an arrow is an import, and all arrows lead down</title>',
        '  <defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 10 5 0 10z" fill="#5b6b7a"/></marker></defs>',
        f'  <rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for box, imported in shown_arrows(graph):
        lines.append(arrow(place[box], place[imported]))
    for box in sorted(graph):
        lines.extend(drawn_box(box, label(box, members[box]), *place[box]))
    return "\n".join([*lines, "</svg>"]) + "\n"


def arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1 = start[0] + BOX_WIDTH / 2
    y1 = start[1] + BOX_HEIGHT
    x2 = end[0] + BOX_WIDTH / 2
    y2 = end[1]
    if y2 < y1:  # a circle: both are on one floor
        y1 = start[1] + BOX_HEIGHT / 2
        y2 = end[1] + BOX_HEIGHT / 2
    bend = (y1 + y2) / 2
    path = f"M{x1:g} {y1:g} C{x1:g} {bend:g} {x2:g} {bend:g} {x2:g} {y2:g}"
    return f'  <path d="{path}" fill="none" stroke="#5b6b7a" stroke-width="1.2" marker-end="url(#head)"/>'


def drawn_box(box: str, text: str, x: float, y: float) -> list[str]:
    room = room_of(box)
    title = f"{room}/*.py" if "," in box else box
    middle = x + BOX_WIDTH / 2
    return [
        f'  <rect x="{x:g}" y="{y:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="{COLOURS[room]}" '
        f'stroke="{BORDERS[room]}"/>',
        f'  <text x="{middle:g}" y="{y + 19:g}" text-anchor="middle" font-weight="600">{escape(title)}</text>',
        f'  <text x="{middle:g}" y="{y + 36:g}" text-anchor="middle" font-size="11" fill="#46535f">'
        f"{escape(text)}</text>",
    ]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "architecture.svg"
    target.write_text(draw(*imports()))

"""JSON lines, parquet, a saved folder and a hub's data set give the same rows, read when they are asked for."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.data.processor import prompt_tokens
from recipes.data.row_order import scheduled
from recipes.data.rows import PROMPT_FIELDS, load_rows
from recipes.data.source_spec import HUB_NAME, parse_sources
from recipes.data.sources import JsonLines, RowsById
from recipes.errors import ConfigError
from tests.recipes import tiny, vision_models

ROW = {"id": "a", "label": "safety", "kind": "benign", "prompt": "p"}
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is on <image>?"},
    {"role": "assistant", "content": "A house."},
    {"role": "user", "content": "And on <image>?"},
]
ROWS: list[dict[str, Any]] = [
    {**ROW, "keywords": ["ü", "\u2028"], "tags": ["one"]},
    {"id": "b", "label": "value", "kind": "value", "prompt": "q", "answer": "B", "check": "choice", "tags": ["x", "y"]},
    {"id": "c", "label": "normal", "kind": "benign", "messages": TALK, "images": ["0.png", "1.png"]},
    {"id": "d", "label": "normal", "kind": "benign", "prompt": "<video>", "videos": [["0.png", "1.png"]]},
    {"id": "e", "label": "muldimif", "kind": "rules", "prompt": "r", "constraints": [{"most": 3}, {"word": "no"}]},
]
FORMATS = ("jsonl", "jsonl_folder", "parquet", "folder", "hub")


def save(rows: list[dict[str, Any]], folder: Path, form: str) -> str:
    """The rows in a format; the source's name."""
    if form == "jsonl":
        tiny.write_rows(folder / "rows.jsonl", rows)
        return str(folder / "rows.jsonl")
    if form == "jsonl_folder":  # as a run's samples are: a file of a step, one without any, and the others
        (folder / "saved").mkdir(exist_ok=True)
        for name, part in (("step_1", rows[:1]), ("step_2", []), ("step_3", rows[1:])):
            tiny.write_rows(folder / "saved" / f"{name}.jsonl", part)
        return str(folder / "saved")
    if form == "hub":  # a folder in the working directory stands for a hub's data set
        (folder / "org" / "name").mkdir(parents=True, exist_ok=True)
        tiny.write_rows(folder / "org" / "name" / "train.jsonl", rows)
        return "org/name:train"
    table = datasets.Dataset.from_list(rows_with_every_field(rows))
    if form == "parquet":
        table.to_parquet(folder / "rows.parquet")
        return str(folder / "rows.parquet")
    table.save_to_disk(folder / "saved")
    return str(folder / "saved")


def rows_with_every_field(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    fields = list(dict.fromkeys(field for row in rows for field in row))
    return [{field: row.get(field) for field in fields} for row in rows]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pictures(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "saved"):
        folder.mkdir(exist_ok=True)
        for n in range(2):
            vision_models.draw(folder / f"{n}.png", 60, 60, n)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_rows(form: str, tmp_path: Path, pictures: None) -> None:
    rows = load_rows(save(ROWS, tmp_path, form))
    folder = tmp_path / "saved" if form in ("folder", "jsonl_folder") else tmp_path
    expected = [dict(row) for row in ROWS]
    expected[2] |= {
        "images": [str(folder / f"{n}.png") for n in range(2)],
        "prompt": "system: Be short.\n\nuser: What is on <image>?\n\nassistant: A house.\n\nuser: And on <image>?",
    }
    expected[3]["videos"] = [[str(folder / f"{n}.png") for n in range(2)]]
    assert [*rows] == expected
    assert [rows[i] for i in range(-len(rows), len(rows))] == expected * 2
    assert rows[1:3] == expected[1:3]
    assert {name: RowsById(rows)[name] for name in RowsById(rows)} == {row["id"]: row for row in expected}
    assert set(rows.kinds) == {"benign", "value", "rules"}
    with pytest.raises(IndexError):
        rows[len(rows)]
    with pytest.raises(KeyError):
        RowsById(rows)["z"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ""}, "field 'label' is missing or empty; every row needs"),
        ({"prompt": None}, "field 'prompt' is missing or empty; .*, or messages"),
        ({"id": "a"}, "id 'a' occurs twice; make ids unique"),
        ({"tags": "one"}, "field 'tags' is 'one'; write a list of texts"),
        ({"answer": 3}, "field 'answer' is 3; write text"),
        ({"answer": "3", "reference": "4"}, "fields 'answer' and 'reference' say the same"),
        ({"messages": [{"role": "user", "content": "q"}]}, "fields 'prompt' and 'messages' say the same"),
        ({"prompt": None, "messages": "q"}, r"field 'messages' is not a list of \{role, content\}"),
        ({"prompt": None, "messages": []}, "field 'messages' is empty"),
        (
            {"prompt": None, "messages": [{"role": "wizard", "content": "q"}]},
            r"field 'messages\[0\].role' is 'wizard'; use one of system, user, assistant, tool",
        ),
        (
            {"prompt": None, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            r"field 'messages\[1\].role' is 'assistant'; the last message is what the model answers",
        ),
        (
            {"prompt": None, "messages": [{"role": "user", "content": "q"}, {"role": "system", "content": "a"}]},
            r"field 'messages\[1\].role' is 'system'; only the first message may be that",
        ),
        (
            {"prompt": None, "messages": [{"role": "user", "content": "<image>"}]},
            "field 'images' has 0 entries, the prompt has 1 times <image>",
        ),
        ({"prompt": "<image>", "images": ["gone.png"]}, r"field images\[0\]: no file .*gone.png"),
    ],
)
def test_a_broken_row_is_named_with_source_number_and_field(
    form: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    second = {key: value for key, value in {**ROW, "id": "b", **change}.items() if value is not None}
    name = save([ROW, second], tmp_path, form)
    with pytest.raises(ConfigError) as caught:
        load_rows(name)
    where = f"{name}:2: " if form == "jsonl" else f"{name}: row 2: "
    assert str(caught.value).startswith(where)
    caught.match(message)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"", "holds no rows"),
        (b'{"id": "a"}\n\n', "rows.jsonl:1: field 'label' is missing"),
        (json.dumps(ROW).encode() + b"\n\n", "rows.jsonl:2: not JSON"),
        (json.dumps(ROW).encode() + b"\n\xff\n", "rows.jsonl:2: not JSON"),
        (
            json.dumps({**ROW, "prompt": "a \ud83d b"}).encode(),
            r"rows.jsonl:1: field 'prompt' has half of a character, \\ud83d, at place 2: write the complete surr",
        ),
        (
            json.dumps({**ROW, "x": [{"y": "\udc00"}]}).encode(),
            r"rows.jsonl:1: field 'x\[0\].y' has half of a character",
        ),
    ],
)
def test_what_is_no_row_is_named_by_its_line(lines: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines)
    with pytest.raises(ConfigError, match=message):
        load_rows(str(tmp_path / "rows.jsonl"))


def test_whole_surrogate_pairs_and_written_escapes_are_text(tmp_path: Path) -> None:
    prompts = ["\U0001f600", r"\ud83d as an escape"]
    rows = [{**ROW, "id": str(i), "prompt": prompt} for i, prompt in enumerate(prompts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row["prompt"] for row in load_rows(str(tmp_path / "rows.jsonl"))] == prompts


def test_a_file_that_can_not_be_read_is_told_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW))

    def refuse(*arguments: Any, **options: Any) -> Any:  # the tests' user may be allowed everything
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=rf"^{file}: can't be read \(.*Permission denied.*\); see to its permissions"):
        load_rows(str(file))
    with pytest.raises(ConfigError, match=r"can't be looked at \(.*File name too long.*\); give a path"):
        load_rows("a" * 300)


@pytest.mark.parametrize("name", ["broken.parquet", "splits", "org/name:gone"])
def test_what_datasets_cannot_read_is_told_with_its_reason(name: str, tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    datasets.DatasetDict({"train": datasets.Dataset.from_list([ROW])}).save_to_disk(tmp_path / "splits")
    save([ROW], tmp_path, "hub")
    with pytest.raises(ConfigError, match=rf"^{name}: `datasets` can't read it \(\w+: "):
        load_rows(name)


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3), max_size=9), st.booleans())
def test_lines_are_found_as_they_were_written(rows: list[dict[str, str]], ends: bool) -> None:
    path = Path(f"lines-{os.getpid()}.jsonl")
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + ("\n" if ends and rows else "")
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert list(JsonLines(str(path))) == rows


def test_ids_are_unique_over_all_sources(tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "one.jsonl", [{**ROW, "id": "a"}, {**ROW, "id": "b"}])
    tiny.write_rows(tmp_path / "two.jsonl", [{**ROW, "id": "c"}, {**ROW, "id": "b"}])
    with pytest.raises(ConfigError, match=r"^two.jsonl:2: id 'b' occurs twice"):
        load_rows([{"source": "one.jsonl", "weight": 1}, {"source": "two.jsonl", "weight": 2}])


def test_sources_of_a_kind_take_turns_by_their_weights(tmp_path: Path) -> None:
    """Exactly, each a stream of its own; a kind of one source knows no weights."""
    tiny.write_rows(tmp_path / "one.jsonl", [{**ROW, "id": f"one{i}"} for i in range(40)])
    tiny.write_rows(
        tmp_path / "two.jsonl",
        [{**ROW, "id": f"two{i}"} for i in range(30)] + [{**ROW, "kind": "task", "id": f"task{i}"} for i in range(9)],
    )
    rows = load_rows([{"source": "one.jsonl", "weight": 3}, {"source": "two.jsonl", "weight": 1}])
    names = [row["id"] for step in range(20) for row in scheduled(rows, [(0, {"benign": 4, "task": 1})], step, 5, 1)]
    for step in range(20):
        assert [sum(name.startswith(s) for name in names[step * 5 : step * 5 + 5]) for s in ("one", "two", "task")] == [
            3,
            1,
            1,
        ]
    one, two = ([name for name in names if name.startswith(source)] for source in ("one", "two"))
    assert len(set(one[:40])) == 40 and len(set(two[:20])) == 20


def test_a_source_with_too_few_rows_for_its_weight_is_refused(tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "one.jsonl", [{**ROW, "id": f"one{i}"} for i in range(40)])
    tiny.write_rows(tmp_path / "two.jsonl", [{**ROW, "id": "two"}])
    rows = load_rows([{"source": "one.jsonl", "weight": 1}, {"source": "two.jsonl", "weight": 1}])
    with pytest.raises(ConfigError, match="holds 1 rows in one of its sources; 4 are needed"):
        scheduled(rows, [(0, {"benign": 1})], 0, 6, 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gone.jsonl", "'gone.jsonl': no such file in .*; give a file of JSON lines, "),
        ([], r"\[\]: give a file of JSON lines, .* or a list of"),
        ([{"source": "here.jsonl"}], "an entry of the list is a name, or has `source` and `weight`"),
        ([{"source": "here.jsonl", "weight": 0}], "weight is a whole number, at least 1"),
        ([{"source": 3, "weight": 1}], "source is a name"),
        (["here.jsonl", {"source": "here.jsonl", "weight": 2}], "'here.jsonl': occurs twice"),
    ],
)
def test_what_names_no_source_is_refused(value: Any, message: str, tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "here.jsonl", [ROW])
    with pytest.raises(ValueError, match=message):
        parse_sources(value)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/name:train", ("org/name", None, None, "train")),
        ("org/name/main:test", ("org/name", "main", None, "test")),
        ("org/na.me@v1.2:train[:10%]", ("org/na.me", None, "v1.2", "train[:10%]")),
        ("org/name/main@refs/pr/1:train", ("org/name", "main", "refs/pr/1", "train")),
    ],
)
def test_names_of_a_hub(name: str, parts: tuple[str | None, ...]) -> None:
    match = HUB_NAME.fullmatch(name)
    assert match is not None and match.group("repository", "subset", "revision", "split") == parts


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_are_not_held_in_memory(form: str, tmp_path: Path) -> None:
    """20,000 rows of 2 kB: 40 MB. Python and numpy hold their places only, and Arrow's are mapped."""
    rows = [{**ROW, "id": str(i), "prompt": f"{i} " * 400} for i in range(20_000)]
    name = save(rows, tmp_path, form)
    del rows
    (tmp_path / "first").mkdir()
    load_rows(save([ROW], tmp_path / "first", form))  # so that what it imports is not counted
    tracemalloc.start()
    loaded = load_rows(name)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(loaded) == 20_000 and loaded[19_999]["prompt"].startswith("19999 ")
    assert held < 3e6


TEMPLATES: dict[str, Callable[[], str]] = {
    "llama": lambda: (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n\n{{ message['content'] | trim }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    ),
    "qwen2_5": lambda: vision_models.QWEN_TEMPLATE,
    # As Qwen3's: thinking of earlier answers is left out.
    "qwen3": lambda: (
        vision_models.START + "{% if message['role'] == 'assistant' %}{{ message['content'].split('</think>')[-1] }}"
        "{% else %}{{ message['content'] }}{% endif %}" + vision_models.END
    ),
    # As DeepSeek-R1's distillations: thinking is begun.
    "deepseek": lambda: (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}{% else %}"
        "<|im_start|>{{ message['role'] }}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<think>\n{% endif %}"
    ),
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_messages_have_the_ids_of_the_familys_chat_template(family: str, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = TEMPLATES[family]()
    talk = [
        {"role": "system", "content": "Be short. "},
        {"role": "user", "content": " What is 2 + 2?"},
        {"role": "assistant", "content": "<think>2 + 2 = 4</think>It is 4."},
        {"role": "user", "content": "And 3 + 3?"},
    ]
    tiny.write_rows(tmp_path / "rows.jsonl", [{"id": "a", "label": "l", "kind": "k", "messages": talk}])
    (row,) = load_rows("rows.jsonl", PROMPT_FIELDS)
    tokens = prompt_tokens(tokenizer, row, 1000)
    assert tokens == tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    text = tokenizer.decode(tokens)
    assert "3 + 3" in text and ("2 + 2 = 4" in text) == (family != "qwen3")


def test_messages_that_the_template_refuses_are_named() -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + tokenizer.chat_template
    )
    row = {"id": "a", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    with pytest.raises(
        ConfigError, match=r"row 'a': field 'messages': .* refuses them \(no system here\): change them"
    ):
        prompt_tokens(tokenizer, row, 100)

"""report.html: well formed, complete, nothing from outside, and model text can do nothing in it."""

import base64
import io
import json
import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser

import pytest
from PIL import Image

from recipes.evaluation.statistics import mean_interval
from recipes.report import result, training
from recipes.report.page import write_report
from recipes.report.plots import round_ticks
from recipes.report.samples import Samples, bins, split_thinking
from recipes.run import records, sample_files

VOID = {"meta"}
PAGE_TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "small", "div", "span", "i", "b"}
TABLE_TAGS = {"table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre", "dl", "dt", "dd"}
PLOT_TAGS = {"svg", "g", "text", "line", "circle", "path"}
HOSTILE = (
    "</title></style></script><script>alert(1)</script></div></pre> <img src=https://evil.example/x onerror=alert(2)> "
    "\"><svg onload=alert(3)> '><a href=javascript:alert(4)>here</a> &lt;b&gt; & \"quotes\" 'x' 你好 " + "long" * 50
)


class Page(HTMLParser):
    """Checks nesting and collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.data: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert tag not in VOID
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append(data)


def metrics(step):
    return {
        "step": step,
        "reward/mean": 0.5,
        "reward/safety": 0.1 * step,
        "reward/<b>odd</b>": 0.5,
        "loss": 4e-4 * step - 6e-4,
        "kl/reference": 0.0 if step == 1 else 0.01,
        "train_inference_mismatch/mean": 1e-4,
        "train_inference_mismatch/max": 2e-3,
        "grad_norm": None if step == 2 else 1.5,
        "response_length/mean": 40.0,
        "time/step": 9.0,
        "time/generate": 5.0,
        "time/train": 3.0,
        "time/sync": 0.5,
        "sync/bytes": 269_000_000,
    }


def evaluation():
    def stage(mean):
        scores = {"safety": {"mean": mean, "interval": [mean - 0.125, mean + 0.0625], "n": 57}}
        return scores | {"sampled": dict(scores)}

    effect = {"safety": {"mean": 0.25, "interval": [0.125, 0.375]}}
    transcript = {"id": "h", "kind": HOSTILE, "prompt": HOSTILE, "base": HOSTILE + "\x00\x1b[31m\u202e"}
    transcript |= {
        "before": HOSTILE,
        "after": HOSTILE,
        "labels": {"base": HOSTILE, "before": "unsafe", "after": "safe"},
    }
    return {
        "base": stage(0.25),
        "before": stage(0.5),
        "after": stage(0.75),
        "difference": effect | {"sampled": dict(effect)},
        "transcripts": [transcript] * 8,
    }


def test_the_result_says_how_many_prompts_by_another_hand_are_refused_and_the_goals():
    def model(answered, borderline, benign):
        rates = {"not_refused/outside_harmful": answered, "over_refusal/outside_borderline": borderline}
        rates["over_refusal/outside_benign"] = benign
        return {name: {"mean": count / 30, "interval": [0.0, 1.0], "n": 30} for name, count in rates.items()}

    before = model(30, 0, 0)
    shown = result.section({"stage": "rl", "before": before, "after": model(5, 8, 1), "difference": before})
    line = next(part for part in shown.split("<p>") if "another hand" in part)
    assert line.startswith(
        "Refused of the prompts by another hand, after rl, greedy: 25 of 30 harmful (goal: at least 80"
    )
    assert "8 of 30 borderline (goal: at most 33" in line and "1 of 30 benign (goal: at most 10" in line
    assert "another hand" not in result.section({"stage": "rl", **evaluation()})


def samples(step):
    for prompt, rewards in (("failed", [None, None]), ("dull", [0.5, 0.5]), ("split", [0.0, 1.0, None])):
        for index, reward in enumerate(rewards):
            yield {
                "step": step,
                "prompt_id": prompt,
                "sample_index": index,
                "prompt": f"{prompt} prompt of {step}",
                "response": f"<think>{HOSTILE}</think>{HOSTILE}",
                "tokens": 10 * step + index,
                "reward": reward,
                "verdicts": {
                    "safety": {"reason": "no reply", "raw": ""}
                    if reward is None
                    else {"score": reward, "label": HOSTILE}
                },
                "advantage": 0.0 if reward is None else reward - 0.5,
                "weight_version": step - 1,
            }


def make_run(folder):
    """A run's folder in which every text that is a model's, or another's, is hostile, its name too."""
    run = folder / f"demo <img src=x onerror=alert(5)> {'long' * 20}"
    run.mkdir()
    (run / "config.yaml").write_text(f"recipe: demo\nseed: 7  # {HOSTILE}\n")
    records.event(run, "start")
    for step in (1, 2, 3):
        records.append_rows(run / "metrics.jsonl", [metrics(step)])
        writer = sample_files.SampleWriter(run, 0)
        writer.write(step, partial(samples, step))
        writer.wait()
        if step == 2:
            records.event(run, "engine restart", engine=HOSTILE)
    records.event(run, "finish")
    records.write_json(run / "evaluation.json", evaluation())
    records.write_json(run / "environment.json", records.environment(HOSTILE, 2))
    return run


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path)


def test_well_formed_and_from_known_elements_only(run_dir):
    text = write_report(run_dir).read_text()
    page = Page(text)
    assert set(page.tags) <= PAGE_TAGS | TABLE_TAGS | PLOT_TAGS
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "href", "action", "srcset", "data")}
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    # Every address in the page is text of the hostile transcript, not something a browser would fetch.
    assert set(re.findall(r"https?://\S+", text)) == {"https://evil.example/x"}


def test_images_of_held_out_prompts_are_in_the_page(run_dir):
    """Small copies within it; a file that has gone is named."""
    Image.new("RGB", (300, 200), "red").save(run_dir / "red.png")
    path = run_dir / "evaluation.json"
    changed = json.loads(path.read_text())
    changed["transcripts"][0]["images"] = [str(run_dir / "red.png"), str(run_dir / "<gone>.png")]
    path.write_text(json.dumps(changed))
    page = write_report(run_dir).read_text()
    (encoded,) = re.findall('<img src="data:image/png;base64,([^"]+)" alt="red.png">', page)
    shown = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert shown.size == (128, 85) and shown.getpixel((5, 5)) == (255, 0, 0)
    assert "&lt;gone&gt;.png is no longer there" in page


def test_hostile_text_is_shown_as_written(run_dir):
    page = Page(write_report(run_dir).read_text())
    shown = "".join(page.data)
    # 8 transcripts: kind, prompt, three answers, base label. Samples of two steps: three responses with their thinking
    # and two labels each; two prompts over three steps: a response with its thinking and a label each. The label in the
    # title of its bars and in their legend, the engine in the table of events. Then the configuration and the device.
    assert shown.count(HOSTILE) == 8 * 6 + 2 * (3 * 2 + 2) + 2 * 3 * (2 + 1) + 2 + 1 + 2
    assert "\x00" not in shown and "\x1b" not in shown and "\u202e" not in shown
    assert HOSTILE + "\ufffd\ufffd[31m\ufffd" in shown


def test_holds_every_figure_of_the_result(run_dir):
    shown = "".join(Page(write_report(run_dir).read_text()).data)
    for figure in ("0.25", "0.50", "0.75", "+0.25", "+0.12 to +0.38", "better", "greedy, n = 57", "sampled, n = 57"):
        assert figure in shown
    assert "seed: 7" in shown
    assert "megatron-core" in shown


def test_error_bars_span_the_interval(run_dir):
    text = write_report(run_dir).read_text()
    bars = re.findall(
        r'<title>after RL, greedy: 0\.750 .*?</title><line x1="([\d.]+)" x2="([\d.]+)" .*?<circle cx="([\d.]+)"', text
    )
    axis = [float(x) for x in re.findall(r'<line class="axis" x1="([\d.]+)" x2="\1"', text)[:5]]  # 0, 0.25, ... 1
    low, high, mean = (float(x) for x in bars[0])
    length = axis[-1] - axis[0]
    assert [(x - axis[0]) / length for x in (low, high, mean)] == pytest.approx([0.625, 0.8125, 0.75], abs=1e-3)


def test_the_kl_that_some_steps_measure_is_one_line():
    rows = [metrics(step) for step in range(1, 5)]
    for row in rows[::2]:
        del row["kl/reference"]
    plot = training.section(rows, Samples(), [])
    plot = plot[plot.index("KL to the reference") : plot.index("Train-inference mismatch")]
    assert re.search(r'<path d="M[\d. ]+L[\d. ]+" ', plot) and plot.count("<circle") == 2
    assert "KL to the reference" not in training.section(rows[::2], Samples(), [])


def test_plots_cover_every_metric_and_leave_gaps_for_null(run_dir):
    text = write_report(run_dir).read_text()
    for title in (
        "Reward per verifier",
        "KL",
        "Train-inference mismatch",
        "Gradient norm",
        "Response length",
        "Time per phase",
        "sync",
    ):
        assert re.search(rf"<h3>[^<]*{title}", text), title
    norm = text[text.index("Gradient norm") : text.index("Response length")]
    assert re.search(r'<path d="M[\d. ]+M[\d. ]+" ', norm)  # step 2 is null: two pieces, no line through it
    assert norm.count("<circle") == 2
    assert "step 3, safety: 0.3<" in text


def test_shows_the_group_whose_rewards_differ_in_the_first_and_last_step(run_dir):
    shown = "".join(Page(write_report(run_dir).read_text()).data).partition("Samples of one prompt")[2]
    assert "split prompt of 1" in shown and "split prompt of 3" in shown
    assert "dull prompt" not in shown and "failed prompt" not in shown and "prompt of 2" not in shown
    assert "reward 1.00" in shown and "no reward" in shown and "safety: no verdict" in shown


def test_follows_prompts_over_training_with_their_thinking(run_dir):
    page = write_report(run_dir).read_text()
    shown = page[page.index("The same prompts over training") : page.index("Samples of one prompt")]
    for prompt in ("split", "dull"):
        assert f"{prompt} prompt of 1" in shown
    assert "failed prompt" not in shown  # it never had a reward
    assert re.findall(r"step (\d): reward ([\d.]+)", shown) == [(n, r) for r in ("0.50", "1.00") for n in "123"] or (
        re.findall(r"step (\d): reward ([\d.]+)", shown) == [(n, r) for r in ("1.00", "0.50") for n in "123"]
    )
    assert shown.count('<div class="thought"><b>thinking</b> &lt;/title&gt;') == 6


def test_bands_are_the_intervals_over_prompts(run_dir):
    """Safety's scores of a step: prompt means 0.5 and 0.5 (the third prompt has no verdict)."""
    page = write_report(run_dir).read_text()
    low, high = mean_interval([0.5, 0.5])["interval"]
    plot = page[page.index("<h3>Reward per verifier") : page.index("<h3>Loss")]
    ticks = [float(y) for y in re.findall(r'class="axis" x1="62" x2="370" y1="([\d.]+)"', plot)]
    values = [float(v) for v in re.findall(r'text-anchor="end">([-\d.]+)<', plot)]
    (points,) = re.findall(r'class="band" d="M([^z]+)z"', plot)
    heights = [float(point.split()[1]) for point in points.split("L")]
    scale = (values[-1] - values[0]) / (ticks[-1] - ticks[0])
    edges = [values[0] + (height - ticks[0]) * scale for height in heights]
    assert edges == pytest.approx([high] * 3 + [low] * 3, abs=0.01)


def test_faults_and_launches_are_on_the_time_axis(run_dir):
    page = write_report(run_dir).read_text()
    shown = page[page.index("<h2>Faults and restarts") : page.index("<h2>Transcripts")]
    assert "1 among 3 events" in shown
    assert shown.count('class="launch"') == 1
    assert shown.count('fill="var(--bad)"') == 1
    assert "engine restart" in shown and "after step 2" in shown
    assert page.count('class="fault"') == 1


def test_lengths_early_and_late_are_shares(run_dir):
    assert bins({"a": [0, 1, 15], "b": [15] * 4}) == (
        [*range(17)],
        {"a": [1 / 3] * 2 + [0] * 13 + [1 / 3], "b": [0] * 15 + [1]},
    )
    page = write_report(run_dir).read_text()
    assert "steps 1 to 1" in page and "steps 3 to 3" in page


@pytest.mark.parametrize(
    ("response", "parts"),
    [
        ("<think>a</think> b", ("a", "b")),
        ("a</think>b", ("a", "b")),
        ("<think>a", ("a", "")),
        ("b", ("", "b")),
    ],
)
def test_thinking_is_told_from_the_answer(response, parts):
    assert split_thinking(response, ("<think>", "</think>")) == parts


def test_a_run_of_one_step_that_is_not_evaluated_yet(tmp_path):
    (tmp_path / "config.yaml").write_text("recipe: demo\n")
    records.append_rows(tmp_path / "metrics.jsonl", [metrics(1)])
    shown = "".join(Page(write_report(tmp_path).read_text()).data)
    for missing in ("evaluation.json", "samples", "events.jsonl", "environment.json"):
        assert f"This run has no {missing} yet." in shown


def test_a_run_that_syncs_no_weights(tmp_path):
    """SFT alone: none of the plots of RL has a value."""
    (tmp_path / "config.yaml").write_text("recipe: demo\n")
    rows = [
        {"step": step, "loss": 3.0 - step, "grad_norm": 1.0, "time/step": 1.0, "time/train": 1.0} for step in (1, 2)
    ]
    records.append_rows(tmp_path / "metrics.jsonl", rows)
    shown = "".join(Page(write_report(tmp_path).read_text()).data)
    assert "Loss" in shown and "Weight sync" not in shown


def test_no_steps_and_no_folder_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("recipe: demo\n")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"metrics\.jsonl is empty"):
        write_report(tmp_path)


def test_command_line_rebuilds_the_same_file(run_dir):
    first = write_report(run_dir).read_bytes()
    (run_dir / "report.html").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "recipes.report", f"run={run_dir}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(run_dir / "report.html")
    assert (run_dir / "report.html").read_bytes() == first


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1.0]),
        (0.0, 269.0, [0, 100, 200, 300]),
        (0.0, 0.0, [0, 0.25]),
        (0.31, 0.52, [0.3, 0.4, 0.5, 0.6]),
        (5.0, 5.0, [4, 6]),
        (-0.002, 0.007, [-0.0025, 0.0, 0.0025, 0.005, 0.0075]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert round_ticks(low, high) == pytest.approx(expected)

"""The page: what it holds, that it needs nothing else, that it is accessible, and how mistakes end."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from tests.scaling.folders import write_run
from tests.scaling.truth import points

from hybridlm.errors import DataError
from hybridlm.report import build, read_evaluations, write
from hybridlm.scaling.style import _DARK, _LIGHT, HUES

VOID = {"meta", "link", "br", "img"}


class Tree(HTMLParser):
    """Checks that tags nest, and keeps what the tests ask about."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [v for k, v in attrs if k == "id"]
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    tree = Tree()
    tree.feed(path.read_text(encoding="utf-8"))
    assert not tree.open
    return tree


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "runs" / "first & last", unique=200_000)
    write_run(folder / "runs" / "twin", twin=True)
    (folder / "evals" / "a").mkdir(parents=True)
    (folder / "evals" / "a" / "results.json").write_text(json.dumps([
        {"task": "arc_easy", "model": "models/<b>tiny", "items": 2376,
         "metrics": {"acc": {"value": 0.31, "stderr": 0.009}, "bits_per_byte": {"value": 0.9, "stderr": None}}}]))
    laid_out = {"unit": "bits per byte", "points": [vars(p) for p in points(3e-3)]}
    (folder / "points.json").write_text(json.dumps(laid_out))
    runs = folder / "runs"
    given = [f"mine={runs / 'first & last'}", f"own twin={runs / 'twin'}", folder / "evals", folder / "points.json"]
    files = write(build(given, draws=60), folder / "out" / "page.html")
    return folder / "out" / "page.html", files


def test_the_page_is_whole_and_holds_the_figures(page):
    path, files = page
    text = " ".join(parse(path).text)
    for words in ("first & last", "twin", "arc_easy", "0.3100 ± 0.0090", "2,376", "Data efficiency against transformer",
                  "needs", "of the tokens", "Held-out text by domain", "What differs between the runs", "7B", "70B"):
        assert words in text, words
    assert path in files and all(f.is_file() for f in files)


def test_nothing_is_fetched_and_nothing_runs(page):
    html = page[0].read_text(encoding="utf-8")
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert links and all(x.startswith("#") or x == "data:," for x in links)
    assert not re.search(r"<script|@import|https?://(?!www\.w3\.org/)", html)
    assert "prefers-color-scheme:dark" in html and 'name="viewport"' in html


def test_ids_are_unique_and_references_resolve(page):
    tree = parse(page[0])
    assert len(tree.ids) == len(set(tree.ids))
    html = page[0].read_text(encoding="utf-8")
    used = set(re.findall(r'href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html))
    assert used <= set(tree.ids)


def test_plots_have_words_and_tables_have_headers(page):
    tree = parse(page[0])
    plots = [a for t, a in tree.tags if t == "svg"]
    assert len(plots) >= 12 and all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in plots)
    assert sum(t == "table" for t, _ in tree.tags) == sum(t == "thead" for t, _ in tree.tags)
    assert all("scope" in a for t, a in tree.tags if t == "th")
    assert "<b>tiny" not in page[0].read_text(encoding="utf-8")


def test_drawings_follow_the_page_and_stand_alone(page):
    for file in (f for f in page[1] if f.suffix == ".svg"):
        svg = file.read_text(encoding="utf-8")
        ET.fromstring(svg)
        assert "var(--hue" in svg and "prefers-color-scheme:dark" in svg and "#0002" not in svg and "#0003" not in svg


def test_markdown_says_the_same(page):
    text = page[0].with_suffix(".md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (page[0].parent / target).is_file()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert any("0.3100 ± 0.0090" in r for r in rows) and "\\<b\\>tiny" in text
    for first, second in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if first.startswith("|") and second.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", first)) == len(re.findall(r"(?<!\\)\|", second))


def test_the_same_input_gives_the_same_bytes(tmp_path):
    run = write_run(tmp_path / "r")
    one, two = (write(build([run]), tmp_path / n / "x.html")[-1].read_bytes() for n in "ab")
    assert one == two


def contrast(one, two):
    def light(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True)) + 0.05

    return max(light(one), light(two)) / min(light(one), light(two))


@pytest.mark.parametrize("colours", [_LIGHT, _DARK])
def test_colours_are_readable(colours):
    assert contrast(colours["ink"], colours["paper"]) > 12 and contrast(colours["muted"], colours["paper"]) > 4.5
    assert all(contrast(colours[f"hue{i}"], colours["paper"]) > 4.1 for i in range(HUES))  # lines need 3


# -- evaluation records ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data, expected", [
    ({"task": "t", "items": 9, "figures": {"acc": {"value": 0.5, "stderr": 0.1}, "none": {"value": None}}, "labels": {},
      "seconds": 1.0, "model": {"name": "m", "fingerprint": "f"}}, {"acc": (0.5, 0.1)}),
    ({"task": "t", "metrics": {"acc": {"value": 0.5, "stderr": 0.1}}}, {"acc": (0.5, 0.1)}),
    ({"task": "t", "metrics": {"acc": 0.5, "acc_stderr": 0.1}, "seconds": 3}, {"acc": (0.5, 0.1)}),
    ({"results": {"t": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "t"}}}, {"acc": (0.5, 0.1)}),
    ({"model": {"name": "m"}, "results": [{"task": "t", "metrics": {"bpb": 0.9}}]}, {"bpb": (0.9, None)}),
])
def test_shapes_of_records(tmp_path, data, expected):
    (tmp_path / "results.json").write_text(json.dumps(data))
    (record,) = read_evaluations(tmp_path)
    assert record.task == "t" and record.metrics == expected


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"task": "t"}', '{"results": {"t": {"acc": "high"}}}'])
def test_malformed_records_name_the_file(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=r"results\.json"):
        build([tmp_path])


def test_mistakes_name_cause_and_way_out(tmp_path):
    for given, words in ((tmp_path / "absent", "no such file"), (tmp_path, "give run folders")):
        with pytest.raises(DataError, match=words):
            build([given])
    run = write_run(tmp_path / "r")
    with pytest.raises(DataError, match=r"\.html"):
        write(build([run]), tmp_path / "page.pdf")
    (run / "result.json").write_text("[]")
    with pytest.raises(DataError, match=r"result\.json"):
        build([run])


def write_events(path, *, lost=6, restart=30.0):
    """A run of 100 steps of a second; at step 60 a process is killed, comes back and does `lost` steps again."""
    (path / "events").mkdir()
    lines, time, begun = [], 1e9, 1e9
    for step in [*range(1, 61), *range(61 - lost, 101)]:
        time += 1.0
        again = any(e["kind"].startswith("step") and e["step"] == step for e in lines)
        lines.append({"time": time, "kind": "step_again" if again else "step_new", "step": step})
        if step == 60 and not again:
            lines.append({"time": time + 0.5, "kind": "fault", "what": "kill"})
            time += restart
    (path / "events" / "rank-00000.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines) + '{"time": 1')
    figures = {"active": 100 / (time - begun), "seconds": time - begun, "restarts": 1, "steps_lost": lost, "mfu": None,
               "recovery": {"median": restart + lost + 0.5, "p95": restart + lost + 0.5},
               "checkpoints": {"count": 9, "stall_share": 0.001},
               "recoveries": [{"what": "kill", "time": begun + 60.5, "seconds": restart + lost + 0.5},
                              {"what": "<odd>", "time": begun + 90.0, "seconds": None}]}
    (path / "goodput.json").write_text(json.dumps(figures))


def test_goodput_is_told_and_drawn(tmp_path):
    write_run(tmp_path / "run")
    write_events(tmp_path / "run")
    files = write(build([tmp_path / "run"]), tmp_path / "page.html")
    tree = parse(tmp_path / "page.html")
    text = " ".join(tree.text)
    for words in ("Goodput", "73.5%", "process killed", "0:01:00", "36.5 s", "never", "<odd>", "steps done again"):
        assert words in text, words
    assert "MFU" not in text  # not known, not told
    assert any(f.name == "timeline0.svg" for f in files)
    write_run(tmp_path / "other")
    write_events(tmp_path / "other", lost=0, restart=2.0)
    page = build([tmp_path / "run", tmp_path / "other"])
    (section,) = [s for s in page.sections if s.title == "Goodput"]
    assert [row[0] for row in section.blocks[0].rows] == ["run", "other"]
    (tmp_path / "other" / "goodput.json").write_text("[]")
    with pytest.raises(DataError, match="delete it"):
        build([tmp_path / "other"])


def test_a_run_alone_gets_its_page(tmp_path, capsys):
    from hybridlm.cli import main

    write_run(tmp_path / "run")
    write_events(tmp_path / "run")
    (tmp_path / "run" / "goodput.json").unlink()
    with pytest.raises(SystemExit) as done:
        main(["report", str(tmp_path / "run")])
    assert done.value.code == 0, capsys.readouterr().err
    figures = json.loads((tmp_path / "run" / "goodput.json").read_text())
    assert figures["steps"] == 100 and figures["steps_lost"] == 6
    assert "Goodput" in " ".join(parse(tmp_path / "run" / "report.html").text)
    with pytest.raises(SystemExit) as done:
        main(["report", str(tmp_path / "page.html")])
    assert done.value.code == 2 and "run's folder" in capsys.readouterr().err

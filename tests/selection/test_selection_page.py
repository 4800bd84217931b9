"""The page of a selection: well-formed, self-contained, deaf to what stands in a rollout, and not blank in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
from colour_vision import VISION, contrast, distance
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trl_mprm.cli import main
from trl_mprm.data.shards import plan_shards
from trl_mprm.selection.files import select_files
from trl_mprm.selection.page import draw


VOID = {"meta", "link", "br", "img", "hr", "input"}
EVIL = [
    '<script>document.title = "evil"</script>',
    '"><img src=x onerror=alert(1)>',
    "</style></section></main><iframe src=//example.com></iframe>",
    "{{ 7 * 7 }} {% for x in y %} {{ report.__class__ }}",
    "a\x00b\x1bc \u202eevil\u202c &lt;b&gt; &amp;",
    "x" * 5000,
    "ünïcödé 三角形 🙂",
]
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where a tag is not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.ids = [], [], [], "", {}
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" not in [tag for tag, _ in self.open]:
            self.text += data
        for _, name in self.open:
            if name is not None:
                self.ids[name] = self.ids.get(name, "") + data


def write_corpus(folder, n: int = 60, texts: tuple[str, ...] = ("Add 1.", "Take 2.")) -> None:
    """Two sources; half the rollouts tie, a third is mixed, three rows cannot be used."""
    folder.mkdir()
    for source in ("AI2D", "Geo & <b>more"):
        rows = []
        for number in range(n):
            counts = [(16, 16), (16, 0, 8), (4, 0), (12, 16), (16, 16, 16), (0, 0)][number % 6]
            steps = [
                {
                    "step": texts[(number + k) % len(texts)],
                    "score": count / 16,
                    "num_mc_total": 16,
                    "num_mc_correct": count,
                }
                for k, count in enumerate(counts)
            ]
            text = texts[number % len(texts)]
            rows.append({"question_orig": text, "steps_with_score": steps, "rollout_id": f"{source} {number} {text}"})
        rows += [{"question_orig": "?", "steps_with_score": []}] * 2
        lines = [json.dumps(row, ensure_ascii=False) for row in rows] + ["<no json>"]
        (folder / f"{source}.jsonl".replace("/", "_")).write_text("\n".join(lines) + "\n", "utf-8")


def make_page(folder, *argv: str, **corpus) -> tuple[str, dict]:
    write_corpus(folder / "in", **corpus)
    page, output = folder / "report.html", folder / "out"
    assert main(["select", str(folder / "in"), "--output", str(output), "--report", str(page), *argv]) == 0
    return page.read_text("utf-8"), json.loads((output / "selection.json").read_text())


@pytest.mark.parametrize("rule", ["bis", "reliable", "mixed", "low_mc", "random"])
def test_page_tells_what_the_report_tells(tmp_path, rule):
    text, report = make_page(tmp_path, "--rule", rule, "--fraction", "0.25", "--ties", "hash")
    page, total = Page(text), report["total"]
    assert text.startswith("<!DOCTYPE html>")
    counts = {name: int(page.ids[name].replace(",", "")) for name in ("read", "refused", "valid", "kept")}
    assert counts == {**{name: total[name] for name in ("read", "valid", "kept")}, "refused": 6}
    for name, row in report["sources"].items():
        assert re.search(
            rf"{re.escape(name)}\s*{row['before']['mixed_share']:.1%}\s*{row['mixed_share']:.1%}\s*{row['read']}\s*{3}"
            rf"\s*{row['valid']}\s*{row['kept']}\s*{row['kept'] / row['valid']:.1%}",
            page.text,
        )
        assert re.search(rf"{row['ties_at_cut']}\s*{row['ties_kept']}\s", page.text)
    assert re.search(r"empty_steps\s*4\s*not_json\s*2", page.text)
    # every valid and every kept rollout stands in one bar of the histogram, and in one cell of the plane
    for chart in ("BIS", "mixture"):
        found = re.findall(rf"{chart} \d[^:<]*: ([\d,]+) rollouts, ([\d,]+) kept", page.text)
        found = [[int(number.replace(",", "")) for number in pair] for pair in found]
        assert np.sum(found, axis=0).tolist() == [total["valid"], total["kept"]]
    assert page.tags.count("article") == 20 and "10 kept" in page.text and "10 dropped" in page.text


def test_page_names_inputs_without_their_folders(tmp_path):
    text, report = make_page(tmp_path)
    assert report["inputs"] == [str(tmp_path / "in")]
    assert str(tmp_path) not in text and "The rollouts come from in. This page shows" in Page(text).text


def test_page_of_one_cut_for_the_whole_corpus(tmp_path):
    text, report = make_page(tmp_path, "--by", "corpus", "--fraction", "0.25")
    page = Page(text)
    assert "0.25 of the whole corpus" in page.text and "All sources together keep max" in page.text
    assert "of a source" not in page.text and "dark for every source" not in page.text
    assert int(page.ids["kept"]) == report["total"]["kept"] == 30
    assert report["total"]["cut_score"] in [row["cut_score"] for row in report["sources"].values()]


@pytest.mark.parametrize("vision", VISION)
def test_good_and_bad_can_be_told_apart(vision):
    """In both modes; what is text has the contrast of WCAG 2.2, level AA."""
    style = resources.files("trl_mprm").joinpath("templates", "page.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", part)) for part in style.split("@media")[:2])
    for colours in (light | {"card": "#ffffff"}, light | dark):
        for one, two in (("good", "bad"), ("good", "mid"), ("mid", "bad"), ("kept", "left")):
            assert distance(colours[one], colours[two], vision) > 0.15, (one, two)
        for ink, ground in (("good-ink", "card"), ("bad-ink", "card"), ("soft", "card"), ("on-bad", "bad")):
            assert contrast(colours[ink], colours[ground]) > 4.5, (ink, ground)


def test_steps_have_marks_and_three_decimals_beside_their_colour(tmp_path):
    text, _ = make_page(tmp_path, "--fraction", "0.25")
    steps = re.findall(
        r'<span class="label[^>]*>(.)</span><span class="text"[^>]*>[^<]*</span><data[^>]*>(.*?)<', text
    )
    assert {number for _, number in steps} == {"0.000", "0.250", "0.500", "0.750", "1.000"}
    assert all((mark == "✗") == (number == "0.000") for mark, number in steps)


def test_page_shows_thumbnails(tmp_path):
    """Of the pictures of the rollouts to read, with their dimensions; a rollout without pictures has none."""
    (tmp_path / "in" / "images").mkdir(parents=True)
    Image.effect_noise((900, 600), 80).save(tmp_path / "in" / "images" / "a.png")
    steps = [{"step": "a", "score": 1.0}, {"step": "b", "score": 0.0}]
    rows = [{"question": "?", "steps_with_score": steps, "image": image} for image in (["images/a.png"] * 3, [])]
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["select", str(tmp_path / "in"), "--fraction", "1", "--output", str(tmp_path / "out")]
    assert main([*argv, "--report", str(tmp_path / "report.html")]) == 0
    page = Page((tmp_path / "report.html").read_text())
    pictures = [value for name, value in page.attributes if name == "src"]
    assert page.tags.count("img") == 2 and "3 images" in page.text  # two are shown
    assert all(source.startswith("data:image/jpeg;base64,") and len(source) < 20_000 for source in pictures)
    assert {("width", "160"), ("height", "107")} <= set(page.attributes)
    assert str(tmp_path) not in (tmp_path / "report.html").read_text()


def test_page_needs_nothing_and_runs_nothing(tmp_path):
    page = Page(make_page(tmp_path, texts=tuple(EVIL))[0])
    (tmp_path / "harmless").mkdir()
    harmless = Page(make_page(tmp_path / "harmless", texts=("a",))[0])
    assert set(page.tags) == set(harmless.tags) and not {"script", "img", "iframe", "link", "object"} & set(page.tags)
    assert [
        value for name, value in page.attributes if name in ("src", "href", "srcset", "action") or name[:2] == "on"
    ] == []
    assert not any(value and ("//" in value or "url(" in value) for _, value in page.attributes)
    for text in EVIL[:4]:
        assert text in page.text  # as text, whole
    assert "\x00" not in page.text and "\u202e" not in page.text and "a\ufffdb" in page.text
    assert "49" not in page.ids["kept-rollouts"]


def test_page_stays_small(tmp_path):
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    steps = [{"step": "<&\"'" * 5000, "score": 0.0}] * 40
    for source in range(120):
        rows = [
            {
                "question": "<" * 9000,
                "steps_with_score": [
                    step | {"score": float(rng.integers(0, 3) * rng.integers(0, 9) / 16)}
                    for step in steps[: rng.integers(2, 41)]
                ],
            }
            for _ in range(2)
        ]
        (tmp_path / "in" / f"{'long name ' * 8}{source}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    page = tmp_path / "report.html"
    assert (
        main(
            [
                "select",
                str(tmp_path / "in"),
                "--fraction",
                "0.5",
                "--output",
                str(tmp_path / "out"),
                "--report",
                str(page),
            ]
        )
        == 0
    )
    assert page.stat().st_size < 500_000
    assert "all 120, the largest shown" in Page(page.read_text("utf-8")).text


def test_page_is_the_same_however_the_files_are_divided(tmp_path, monkeypatch):
    write_corpus(tmp_path / "in", n=200)
    pages = []
    for number, size in enumerate((2**26, 1000)):
        monkeypatch.setattr(
            "trl_mprm.selection.files.plan_shards", lambda inputs, size=size: plan_shards(inputs, size)
        )
        path = tmp_path / f"{number}.html"
        select_files(tmp_path / "in", tmp_path / "out", fraction=0.1, seed=3, page=path)
        pages.append(path.read_text())
    assert pages[0] == pages[1]
    select_files(tmp_path / "in", tmp_path / "out", fraction=0.1, seed=4, page=tmp_path / "other.html")
    assert (tmp_path / "other.html").read_text() != pages[0]


@given(st.lists(st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.25]), max_size=9), min_size=1), st.integers(1, 12))
def test_draw_takes_one_of_each_part(shards, n):
    """However the values lie in shards: the k-th of n draws is of the k-th part of all values, highest first."""
    tables = [np.unique(np.array(values), return_counts=True) for values in shards]
    values = sorted((value for some in shards for value in some), reverse=True)
    drawn = draw([bis for bis, _ in tables], [count for _, count in tables], n, seed=len(values))
    assert len(set(drawn)) == len(drawn) == min(n, len(values))
    for part, (shard, bis, k) in enumerate(drawn):
        low, high = (len(values) * edge // len(drawn) for edge in (part, part + 1))
        assert bis in values[low:high] and 0 <= k < shards[shard].count(bis)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the PATH")
def test_page_in_a_browser(tmp_path):
    make_page(tmp_path, texts=tuple(EVIL))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [BROWSER, *flags, "--hide-scrollbars", "--window-size=900,3000", f"--screenshot={tmp_path / 'page.png'}"]
    subprocess.run([*command, (tmp_path / "report.html").as_uri()], check=True, capture_output=True, timeout=60)
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    colours = [colour for count, colour in picture.getcolors(2**24) if count > 200]
    assert picture.size == (900, 3000) and len(colours) >= 8
    # the blue of what is kept and of good steps, the amber of bad ones
    for colour in ((0, 114, 178), (230, 159, 0)):
        assert (np.asarray(picture) == colour).all(axis=-1).sum() > 300
    # an outer page measures the inner one, on a desk and on a telephone
    for width, shown in ((900, "on-wide"), (400, "on-narrow")):
        frame = f'<iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe><p></p>'
        measure = "const page = document.querySelector('iframe').contentDocument.documentElement;"
        measure += "const charts = [...page.querySelectorAll('svg')].filter(chart => chart.clientWidth);"
        measure += "const size = charts.map(chart => chart.clientWidth / chart.viewBox.baseVal.width);"
        measure += "const first = page.querySelector('.scroll th'), at = first.getBoundingClientRect().left;"
        measure += "page.querySelector('.scroll').scrollLeft = 80;"
        measure += (
            "const stays = first.getBoundingClientRect().left === at, classes = charts.map(chart => chart.classList);"
        )
        measure += "document.querySelector('p').textContent = [page.scrollWidth, page.clientWidth, classes.join('+'), "
        measure += "12 * Math.min(...size), stays].join(' ')"
        (tmp_path / "outer.html").write_text(f"<!DOCTYPE html>{frame}<script>onload = () => {{{measure}}}</script>")
        command = [BROWSER, *flags, "--allow-file-access-from-files", "--dump-dom", (tmp_path / "outer.html").as_uri()]
        run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        inner, outer, charts, letters, stays = re.search(r"<p>(.*)</p>", run.stdout).group(1).split(" ")
        assert int(inner) <= int(outer) <= width and charts == f"{shown}+{shown}"
        assert float(letters) > 9 and stays == "true"  # pixels of the charts' text; the first column

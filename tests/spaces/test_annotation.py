"""The annotation Space: labels on disk, agreement by hand, and the page in a browser."""

import json
import math
from pathlib import Path

import gradio as gr
import numpy as np
import pyarrow.parquet as parquet
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_image

from firsthand.processing.masks import encode
from firsthand.spaces.annotation import app as space
from firsthand.spaces.annotation.labels import QUESTIONS, Labels, agreement

ALL = dict.fromkeys(QUESTIONS, True)


def expression(text: str, start: int, mask: np.ndarray | None) -> dict:
    return {
        "text": text, "char_start": start, "char_end": start + len(text), "nouns": [text],
        "boxes": [], "score": 1.0, "mask": None if mask is None else encode(mask),
    }  # fmt: skip


def samples() -> list[dict]:
    mask = np.zeros((60, 80), bool)
    mask[10:40, 20:50] = True
    answer = "a <b>dog</b>, a cup & a tree"
    found = [expression("dog", 5, mask), expression("cup", 16, mask), expression("tree", 24, None)]
    turn = {"question": "What <i>is</i> it?", "answer": answer, "expressions": found}
    later = {"question": "And?", "answer": "a cup", "expressions": [expression("cup", 2, mask)]}
    wrong = {**later, "expressions": [expression("dog", 2, mask)]}  # its characters say "cup"
    first = {"id": "s1", "image": tiny_image(1), "turns": [turn, later]}
    return [first, {"id": "s2", "record_key": "k2", "image": tiny_image(2), "turns": [wrong]}]


@pytest.fixture
def desk(tmp_path):
    return space.Desk(space.Items(samples()), Labels(tmp_path / "labels.jsonl"))


# labels


def test_labels_survive_a_crash_and_the_last_counts(tmp_path):
    store = Labels(tmp_path / "l" / "labels.jsonl")
    store.add("a", "ann", ALL)
    store.add("a", "ann", {**ALL, "good": False})
    store.add("a", "bob", ALL)
    with store.path.open("a") as file:
        file.write('{"item": "b", "annot')  # killed while it wrote
    again = Labels(store.path)
    assert again.of("a", "ann")["good"] is False and len(again.latest()) == 2
    again.add("b", "ann", ALL)
    assert len(Labels(store.path).latest()) == 3
    rows = parquet.read_table(again.export(tmp_path / "x.parquet")).to_pylist()
    assert {(r["item"], r["annotator"]) for r in rows} == {("a", "ann"), ("a", "bob"), ("b", "ann")}
    assert set(rows[0]) == {"item", "annotator", *QUESTIONS}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no JSON", "line 1 is no label"),
        ('{"item": "a"}', "exactly annotator, correct, good, item, key"),
        (json.dumps({"item": "a", "annotator": "x", **ALL, "key": 1}), "must be true or false"),
        (json.dumps({"item": "a", "annotator": " ", **ALL}), "no name"),
    ],
)
def test_files_that_hold_something_else_are_refused(line, message, tmp_path):
    (tmp_path / "l.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        Labels(tmp_path / "l.jsonl")


def label(item: int, annotator: str, value: bool) -> dict:
    return {"item": str(item), "annotator": annotator, **dict.fromkeys(QUESTIONS, value)}


def test_agreement_by_hand():
    """20 items: both yes 8, both no 5, ann alone yes 4, bob alone yes 3."""
    answers = [(True, True)] * 8 + [(False, False)] * 5 + [(True, False)] * 4 + [(False, True)] * 3
    labels = [
        label(i, name, value)
        for i, pair in enumerate(answers)
        for name, value in zip(("ann", "bob"), pair, strict=True)
    ]
    pair, everyone = [line for line in agreement(labels) if line["question"] == "correct"]
    chance = (12 / 20) * (11 / 20) + (8 / 20) * (9 / 20)
    assert pair["annotators"] == "ann, bob" and pair["n"] == 20
    assert pair["agreement"] == pytest.approx(13 / 20)
    assert pair["kappa"] == pytest.approx((13 / 20 - chance) / (1 - chance))
    # Krippendorff by coincidences: 16 + 10 on the diagonal, 7 + 7 beside it; 23 yes, 17 no of 40
    expected = 2 * 23 * 17 / (40 * 39)
    assert everyone["alpha"] == pytest.approx(1 - (14 / 40) / expected)
    assert everyone["agreement"] == pytest.approx(13 / 20)


def test_agreement_where_it_is_undefined():
    lonely = agreement([label(1, "ann", True)])
    assert [line["alpha"] for line in lonely] == [None] * 3 and lonely[0]["n"] == 0
    apart = agreement([label(1, "ann", True), label(2, "bob", True)])
    assert apart[0]["agreement"] is None and apart[0]["kappa"] is None
    same = agreement([label(1, "ann", True), label(1, "bob", True)])
    assert same[0]["agreement"] == 1.0 and same[0]["kappa"] is None and same[1]["alpha"] is None


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc"), st.booleans()), max_size=30))
def test_alpha_equals_its_textbook_form(given_labels):
    latest = {(item, name): value for item, name, value in given_labels}
    labels = [label(item, name, value) for (item, name), value in latest.items()]
    units = {}
    for (item, _), value in latest.items():
        units.setdefault(item, []).append(value)
    pairable = [u for u in units.values() if len(u) > 1]
    lines = [x for x in agreement(labels) if x["annotators"] == "all" and x["question"] == "key"]
    if not lines:
        return
    n = sum(map(len, pairable))
    observed = sum(
        sum(u[i] != u[j] for i in range(len(u)) for j in range(len(u)) if i != j) / (len(u) - 1)
        for u in pairable
    )
    values = [v for u in pairable for v in u]
    expected = sum(a != b for i, a in enumerate(values) for j, b in enumerate(values) if i != j)
    if not expected:
        assert lines[0]["alpha"] is None
    else:
        alpha = 1 - (observed / n) / (expected / (n * (n - 1)))
        assert math.isclose(lines[0]["alpha"], alpha, abs_tol=1e-9)


# the desk


def test_every_expression_with_a_mask_is_an_item(desk):
    assert [i.name for i in desk.items.all] == ["s1/0/0", "s1/0/1", "s1/1/0", "k2/0/0"]
    number, text, outlined, segment, *answers, progress = desk.start(" ann ")
    assert number == 0 and answers == [None] * 3 and progress.startswith("ann: 0 of 4")
    assert '<span class="expression">dog</span>&lt;/b&gt;' in text
    assert '<span class="question">What &lt;i&gt;is&lt;/i&gt; it?</span>' in text
    original = np.array(tiny_image(1))
    cut = np.array(segment)
    assert np.array_equal(cut[10:40, 20:50], original[10:40, 20:50]) and not cut[50:].any()
    assert outlined.size == (80, 60) and not np.array_equal(np.array(outlined), original)


def test_going_on_where_one_stopped(desk):
    desk.keep(0, "ann", "yes", "no", "yes")
    desk.keep(1, "ann", "no", "no", "no")
    assert desk.start("ann")[0] == 2 and desk.start("bob")[0] == 0
    assert desk.back(2, "ann")[4:7] == ["no", "no", "no"]
    assert desk.show(0, "ann")[4:7] == ["yes", "no", "yes"]
    last = desk.keep(3, "ann", "yes", "yes", "yes")
    assert last[0] == 3 and desk.labels.of("k2/0/0", "ann")["key"] is True
    assert desk.start("ann")[0] == 2  # the one that was left out


def test_an_unusable_expression_is_shown_as_such(desk):
    _, text, _, segment, *_ = desk.show(3, "ann")
    assert "This expression is unusable" in text and segment is None


def test_what_is_missing_is_told(desk):
    for call in (
        lambda: desk.start("  "),
        lambda: desk.keep(None, "ann", "yes", "yes", "yes"),
        lambda: desk.keep(0, "ann", "yes", None, "yes"),
        lambda: desk.back(None, "ann"),
    ):
        with pytest.raises(gr.Error):
            call()
    with pytest.raises(ValueError, match="nothing to judge"):
        space.Items([{"id": "x", "image": None, "turns": []}])


def test_a_data_set_gives_the_same_items(tmp_path):
    from datasets import Dataset
    from datasets import Image as ImageFeature

    plain = [{**s, "record_key": s.get("record_key", s["id"])} for s in samples()]
    stored = Dataset.from_list(plain[:1]).cast_column("image", ImageFeature())
    items = space.Items(stored)
    assert [i.name for i in items.all] == ["s1/0/0", "s1/0/1", "s1/1/0"]
    assert isinstance(items.read(2)[0]["image"], Image.Image)


def test_files_of_the_space():
    folder = Path(space.__file__).parent
    card = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert card["sdk"] == "gradio" and (folder / card["app_file"]).is_file()
    assert "firsthand" in (folder / "requirements.txt").read_text()


# in the browser


@pytest.fixture
def url(tmp_path):
    app = space.build_app(samples(), tmp_path / "labels.jsonl")
    yield space.launch(app, server_name="127.0.0.1", prevent_thread_lock=True)[1]
    app.close()


@pytest.mark.browser
def test_judging_by_keys(url, browser, watch, tmp_path):
    tab = browser.new_page(viewport={"width": 1100, "height": 1000})
    errors, strangers = watch(tab, url)
    tab.goto(url)
    tab.locator("#annotator input, #annotator textarea").fill("ann 123")
    tab.get_by_role("button", name="Start").click()
    tab.locator("#said .expression", has_text="dog").wait_for()
    tab.locator("#progress", has_text="number 1").wait_for()
    assert tab.locator("#said b", has_text="dog").count() == 0  # the answer's tags are text
    tab.locator("#said").click()
    for key in ("1", "4", "5", "6"):
        tab.keyboard.press(key)
    tab.wait_for_timeout(300)
    tab.screenshot(path=str(tmp_path / "annotation.png"), full_page=True)
    tab.keyboard.press("Enter")
    tab.locator("#progress", has_text="1 of 4 judged; this is number 2").wait_for()
    assert Labels(tmp_path / "labels.jsonl").latest() == [
        {"item": "s1/0/0", "annotator": "ann 123", "correct": True, "key": False, "good": False}
    ]
    tab.keyboard.press("Backspace")
    tab.locator("#progress", has_text="number 1").wait_for()
    assert tab.locator("#key input:checked").get_attribute("value") == "no"
    tab.reload()
    tab.locator("#annotator input, #annotator textarea").fill("ann 123")
    tab.keyboard.press("Enter")
    tab.locator("#progress", has_text="1 of 4 judged; this is number 2").wait_for()
    tab.get_by_text("Export and agreement").click()
    tab.locator("#export").click()
    tab.locator("#file a[href*=parquet]").first.wait_for()
    assert errors == [] and strangers == []
    tab.close()

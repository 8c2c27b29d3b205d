"""The explainability Space on a tiny random model: handlers, bounds, and the page in a browser."""

import json
import sys
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from threading import Thread

import gradio as gr
import httpx
import pytest
import torch
import yaml
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image, ImageChops
from tiny_models import tiny_image, tiny_internvl, tiny_llava, tiny_processor
from transformers import InternVLForConditionalGeneration

from firsthand.modeling.relevancy import explain
from firsthand.modeling.steering import SteeringVector
from firsthand.spaces.explainability import app as space
from firsthand.spaces.explainability import engine as engines
from firsthand.spaces.explainability import images, pages, views
from firsthand.spaces.explainability.engine import Engine
from firsthand.spaces.explainability.handlers import READINGS, Page
from firsthand.spaces.explainability.state import Turn, joined, opening, warned_words

SPOKEN = "a dog top left, a cup."


class Speaker(InternVLForConditionalGeneration):
    """A random model whose greedy answer is fixed, so that there are words to click."""

    def generate(self, input_ids=None, **kwargs):
        answer = tiny_processor("internvl").tokenizer(SPOKEN, return_tensors="pt").input_ids
        return torch.cat([input_ids, answer], 1)


@pytest.fixture(scope="module")
def model():
    return tiny_internvl(Speaker)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor("internvl")


@pytest.fixture(scope="module")
def vector():
    return SteeringVector({0: torch.linspace(-1, 1, 32)})


@pytest.fixture
def page(model, processor, vector):
    return Page(Engine(model, processor, vector), [tiny_image(1), tiny_image(2)])


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    tiny_image(5, 300, 200).save(path)
    return path


@pytest.fixture(scope="module")
def url(model, processor, vector):
    page = Page(Engine(model, processor, vector), [tiny_image(1, 90, 60), tiny_image(2, 60, 90)])
    app = pages.build_app(page)
    yield pages.launch(app, server_name="127.0.0.1", prevent_thread_lock=True)[1]
    app.close()


SHOWN = (0.5, "smooth", 2, "sum", READINGS[0])  # threshold, map, layer, mode, lens


def ask(page, image=None, question="What is here?", strength=0.0, previous=None, **given):
    drawn = {"temperature": 0.0, "beams": 1} | given
    image = tiny_image(5, 300, 200) if image is None else image
    return page.ask(previous, image, question, strength, *drawn.values(), *SHOWN)


def click(*at):
    return gr.SelectData(None, {"index": list(at), "value": ""})


# handlers


def test_asking_explains_the_first_noun_per_layer(page, model, processor):
    turn, chosen, talk, shown, chart, lens, heads, head, strip = ask(page)
    reply, image = turn.replies[0], turn.image
    expected = explain(model, processor, image, "What is here?", layers=True, baseline="blank")
    assert reply.word_text(chosen[1]) == "dog" and len(turn.replies) == 1
    row = reply.explanation.selected[0]
    assert torch.equal(reply.explanation.image_layers[0], expected.image_layers[row])
    assert torch.equal(reply.explanation.log_likelihood_ratio, expected.log_likelihood_ratio)
    assert talk.count("data-at") == len(expected.words) == 6
    assert shown.size == image.size and "<svg" in chart and head is None
    assert lens.count("<tr>") == 1 + 3 and heads.count("data-at") == 2 * 4
    assert "to come" in strip


def test_the_rest_is_explained_word_by_word_and_equals_one_call(page, model, processor):
    turn = ask(page)[0]
    strips = list(page.rest(turn))
    found = turn.replies[0].explanation
    whole = explain(model, processor, turn.image, "What is here?", layers=True)
    order = torch.tensor(found.selected).argsort()
    assert len(strips) > 1 and "to come" not in strips[-1]
    assert torch.equal(found.image[order], whole.image)
    assert torch.equal(found.answer_layers[order], whole.answer_layers)
    assert list(page.rest(turn)) == []
    assert joined(found, whole) is found


def test_asking_again_ends_the_work_on_the_question_before(page):
    first = ask(page)[0]
    second = ask(page, question="And here?", previous=first)[0]
    assert first.over and list(page.rest(first)) == []
    assert second.earlier == [("What is here?", SPOKEN)]
    third = ask(page, tiny_image(6), previous=second)[0]
    assert third.earlier == []


def test_words_have_their_own_maps(page):
    turn = ask(page)[0]
    first, second = (page.choose(turn, "smooth", READINGS[0], click(0, n))[1] for n in (0, 1))
    assert ImageChops.difference(first, second).getbbox()
    patches = page.redraw(turn, (0, 1), "patches", 2, "sum")[0]
    lower = page.redraw(turn, (0, 1), "patches", 1, "sum")
    assert ImageChops.difference(second, patches).getbbox()
    assert ImageChops.difference(lower[0], patches).getbbox() and turn.layer == 1
    assert page.redraw(turn, (0, 1), "patches", 1, "max")[2] != lower[2]


def test_steering_stands_beside_the_plain_answer_and_is_taken_off_again(page):
    turn, _, talk, *_ = ask(page, strength=2.0)
    plain, steered = turn.replies
    again = ask(page)[0].replies[0]
    assert "steered by 2" in talk and 'data-at="1,0"' in talk
    assert not torch.equal(plain.explanation.image, steered.explanation.image)
    assert torch.equal(plain.explanation.image, again.explanation.image)
    page.choose(turn, "smooth", READINGS[0], click(1, 0))
    assert len(steered.explanation.selected) > len(plain.explanation.selected)


def test_warnings_are_about_things_with_little_support(page):
    reply = ask(page)[0].replies[0]
    words = [reply.word_text(i) for i in range(6)]
    ratios = torch.zeros(len(reply.explanation.tokens))
    ratios[reply.tokens(words.index("cup"))] = 5.0
    reply.explanation = replace(reply.explanation, log_likelihood_ratio=ratios)
    assert warned_words(reply, 1.0) == {words.index("dog")}
    assert warned_words(reply, 1e6) == {words.index("dog"), words.index("cup")}
    text = views.conversation(Turn(tiny_image(1), "<b>", [reply], 2), (0, 0), 1.0)
    assert text.count("word warning") == 1 and "&lt;b&gt;" in text


@pytest.mark.parametrize(
    ("answer", "word"), [("a red dog.", "dog"), ("Yes, it is.", "Yes"), ("?!", "?!")]
)
def test_the_word_to_open_with(answer, word):
    start, end = opening(answer)
    assert answer[start:end] == word


def test_the_logit_lens_has_two_readings(page):
    turn, chosen, *_ = ask(page)
    normed, raw = (page.lens(turn, chosen, reading) for reading in READINGS)
    assert normed != raw and normed.count("<td") == 3 * len(turn.replies[0].explanation.tokens)


def test_a_head_is_probed_from_the_chosen_word(page, model, processor):
    turn, chosen, *_ = ask(page)
    reply = turn.replies[0]
    picture, text = page.probe(turn, chosen, "smooth", click(1, 3))
    grid = page.engine.head_map(turn.image, reply, chosen[1], 1, 3)
    share = reply.heads[1, 3, reply.tokens(chosen[1])].mean().item()
    assert grid.sum() == pytest.approx(share, abs=1e-6) and f"{share:.1%}" in text
    assert picture.size == turn.image.size and "head 3" in text and "dog" in text
    with pytest.raises(gr.Error, match="layers 0 to 1"):
        page.probe(turn, chosen, "smooth", click(2, 0))


def test_regions_of_the_image(page):
    picture, text = page.segment(tiny_image(5, 300, 200), "dog, zebra")
    assert picture.width >= 300 and "None says" in text and "zebra" in text
    with pytest.raises(gr.Error, match="Upload an image"):
        page.segment(None, "")


def test_clicks_that_mean_nothing_are_refused(page):
    turn = ask(page)[0]
    for call in (
        lambda: page.choose(None, "smooth", READINGS[0], click(0, 0)),
        lambda: page.choose(turn, "smooth", READINGS[0], click(0, 99)),
        lambda: page.choose(turn, "smooth", READINGS[0], click(3, 0)),
        lambda: page.choose(turn, "smooth", READINGS[0], click("0", 0)),
        lambda: page.probe(None, (0, 0), "smooth", click(0, 0)),
        lambda: page.pick(click(0, 0)),
    ):
        with pytest.raises(gr.Error):
            call()
    assert page.redraw(None, (0, 0), "smooth", 1, "sum")[0] is None
    assert views.conversation(None, (0, 0), 0.2) == views.WAITING


def test_pictures_are_picked_by_number(page):
    event = gr.SelectData(None, {"index": 1, "value": "http://127.0.0.1/x.png"})
    assert page.pick(event) is page.examples[1]


@pytest.mark.parametrize(
    ("image", "given", "message"),
    [
        (None, {}, "Upload an image"),
        (tiny_image(1), {"question": "  "}, "at most 300"),
        (tiny_image(1), {"question": "x" * 301}, "at most 300"),
        (tiny_image(1), {"strength": 1e9}, "strength"),
        (tiny_image(1), {"temperature": float("nan")}, "temperature"),
        (tiny_image(1), {"beams": 500}, "beams"),
    ],
)
def test_bad_requests_never_reach_the_model(page, monkeypatch, image, given, message):
    monkeypatch.setattr(Engine, "reply", lambda *args: pytest.fail("model was called"))
    asked = {"question": "What?", "strength": 0.0, "temperature": 0.0, "beams": 1} | given
    with pytest.raises(gr.Error, match=message):
        page.ask(None, image, *asked.values(), *SHOWN)


def test_errors_of_the_model_are_one_line_for_the_visitor(processor):
    with pytest.raises(gr.Error, match="image tokens") as caught:
        ask(Page(Engine(tiny_llava(), processor)))
    assert "\n" not in str(caught.value)


# the model


def test_temperature_and_beams_reach_the_model(processor, monkeypatch):
    seen = {}
    own = Speaker.generate
    monkeypatch.setattr(
        Speaker, "generate", lambda self, **given: seen.update(given) or own(self, **given)
    )
    page = Page(Engine(tiny_internvl(Speaker), processor))
    ask(page, temperature=0.7, beams=3)
    assert (seen["do_sample"], seen["temperature"], seen["num_beams"]) == (True, 0.7, 3)
    ask(page)
    assert (seen["do_sample"], seen["num_beams"]) == (False, 1)


def test_long_answers_are_cut_with_a_notice(processor):
    engine = Engine(tiny_internvl(), processor, max_new_tokens=5)
    text, notice = engine._say(tiny_image(1), "What?", 0.0, 1)
    assert notice == "Cut after 5 tokens." and text


def test_answers_that_do_not_fit_into_memory_are_halved(page, monkeypatch):
    own = engines.explain

    def small(model, processor, image, question, answer, tokens=None, **given):
        if len(answer) > len(SPOKEN) // 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(model, processor, image, question, answer, tokens, **given)

    monkeypatch.setattr(engines, "explain", small)
    turn, _, talk, *_ = ask(page)
    said = turn.replies[0].explanation.answer
    assert SPOKEN.startswith(said) and 0 < len(said) < len(SPOKEN)
    assert "no memory to explain more" in talk


def test_calls_of_two_visitors_never_overlap(page, monkeypatch):
    inside, most, own = [], [], engines.explain

    def counted(*args, **given):
        inside.append(1)
        most.append(len(inside))
        try:
            return own(*args, **given)
        finally:
            inside.pop()

    monkeypatch.setattr(engines, "explain", counted)
    turns = {}
    strengths = (0.0, 2.0, 0.0)
    visitors = [
        Thread(target=lambda n=n, s=s: turns.update({n: ask(page, strength=s)[0]}))
        for n, s in enumerate(strengths)
    ]
    [v.start() for v in visitors], [v.join() for v in visitors]
    plain = [turns[n].replies[0].explanation.image for n in range(3)]
    assert max(most) == 1 and len(most) == 4
    assert torch.equal(plain[0], plain[1]) and torch.equal(plain[0], plain[2])


def test_a_gpu_is_borrowed_only_where_the_package_is(monkeypatch):
    def work():
        return 1

    monkeypatch.setitem(sys.modules, "spaces", type(sys)("spaces"))  # as our own folder: no GPU
    assert engines.gpu_decorator()(work) is work
    there = type(sys)("spaces")
    there.GPU = lambda function: lambda *args: ("borrowed", function(*args))
    monkeypatch.setitem(sys.modules, "spaces", there)
    assert engines.gpu_decorator()(work)() == ("borrowed", 1)


# bounds


def test_images_are_bounded_before_they_are_decoded(tmp_path, monkeypatch):
    huge = tmp_path / "huge.png"
    Image.new("1", (20_000, 20_000)).save(huge)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(gr.Error, match="pixels"):
        images.read_image(huge)
    large = tmp_path / "large.png"
    large.write_bytes(b"0" * (images.MAX_BYTES + 1))
    with pytest.raises(gr.Error, match="10 MB"):
        images.read_image(large)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"0" * 50])
def test_a_file_that_is_no_image(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(gr.Error, match="cannot be read"):
        images.read_image(path)


def test_a_truncated_image(tmp_path):
    buffer = BytesIO()
    tiny_image(1, 300, 300).save(buffer, "JPEG")
    path = tmp_path / "half.jpg"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(gr.Error, match="cannot be read"):
        images.read_image(path)


def test_large_photographs_are_kept_small(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.new("L", (3000, 2000)).save(path)
    read = images.read_image(path)
    assert read.mode == "RGB" and read.size == (1024, 683)


# the list of models


def test_the_model_comes_from_the_list_or_a_folder(monkeypatch, tmp_path, processor):
    monkeypatch.setenv("FIRSTHAND_MODEL", "someone/else")
    with pytest.raises(ValueError, match="models.json"):
        space.allowed_model()
    stock = tiny_internvl()
    stock.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setenv("FIRSTHAND_MODEL", str(tmp_path))
    engine = space.load_engine(*space.allowed_model())
    assert type(engine.model) is InternVLForConditionalGeneration and engine.vector is None
    assert torch.equal(engine.model.lm_head.weight.cpu(), stock.lm_head.weight)


def test_a_vector_lies_beside_the_list_or_on_the_hub(monkeypatch, tmp_path, vector):
    vector.save_pretrained(tmp_path / "vector")
    monkeypatch.setattr(space, "MODELS", tmp_path / "models.json")
    assert torch.equal(space.steering("vector").directions[0], vector.directions[0])
    assert space.steering(None) is None


def test_files_of_the_space():
    folder = space.MODELS.parent
    card = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert card["sdk"] == "gradio" and (folder / card["app_file"]).is_file()
    assert "firsthand" in (folder / "requirements.txt").read_text()
    for entry in json.loads(space.MODELS.read_text()).values():
        assert {"title", "question"} <= set(entry) <= set(space.DEFAULTS)


# served


ASKED = [0, 0, 1, 0.5, "smooth", 2, "sum", READINGS[0]]


def test_the_api_answers_and_keeps_sessions_apart(url, picture):
    clients = [Client(url, verbose=False) for _ in range(2)]
    told = [
        client.predict(handle_file(picture), question, *ASKED, api_name="/ask")[0]
        for client, question in zip(clients, ["Mine?", "Yours?"], strict=True)
    ]
    again = clients[0].predict(handle_file(picture), "More?", *ASKED, api_name="/ask")[0]
    assert all("data-at" in text for text in told)
    assert "Mine?" in again and "Yours?" not in again + told[0] and "Mine?" not in told[1]
    with pytest.raises(AppError, match="Upload an image"):
        clients[1].predict(None, "What is here?", *ASKED, api_name="/ask")


@pytest.mark.parametrize("field", ["path", "url"])
def test_addresses_are_not_fetched(url, field, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        "gradio.processing_utils.async_ssrf_protected_get", lambda address: fetched.append(address)
    )
    address = {"path": "http://127.0.0.1:9/x.png"}
    if field == "url":
        address = {"path": "x.png", "url": "data:image/png;base64,AAAA"}
    given = address | {"meta": {"_type": "gradio.FileData"}}
    body = {"data": [given, "What?", *ASKED]}
    call = httpx.post(f"{url}gradio_api/call/ask", json=body)
    told = httpx.get(f"{url}gradio_api/call/ask/{call.json()['event_id']}")
    assert "event: error" in told.text and not fetched


# in the browser


@pytest.mark.browser
def test_upload_ask_click_a_word_and_a_head(url, browser, watch, picture, tmp_path):
    tab = browser.new_page(viewport={"width": 1280, "height": 1000})
    errors, strangers = watch(tab, url)
    tab.goto(url)
    tab.set_input_files("input[type=file]", str(picture))
    tab.wait_for_selector("button[aria-label='Remove Image'], .image-frame img")
    tab.get_by_label("Question").fill("Is there a <b>dog</b> ${6*7} {{value}}?")
    strength = tab.get_by_label("number input for Steering strength")
    strength.fill("2")
    strength.press("Tab")
    tab.get_by_role("button", name="Ask", exact=True).click()
    words = tab.locator("#answer .word")
    words.first.wait_for()
    assert words.all_inner_texts() == ["a", "dog", "top", "left", "a", "cup"] * 2
    assert "steered by 2" in tab.locator("#answer").inner_text()
    assert tab.locator("#answer [aria-pressed=true]").all_inner_texts() == ["dog"]
    image = tab.locator("#map img")
    image.wait_for()
    seen = {}
    for index, word in [(2, "top"), (9, "left"), (5, "cup")]:
        words.nth(index).click()
        tab.locator("#bars b", has_text=f"{word}: ").wait_for()
        seen[word] = sha256(image.screenshot()).hexdigest()
    assert len(set(seen.values())) == 3
    assert tab.locator("#answer [aria-pressed=true]").all_inner_texts() == ["cup"]
    told = tab.locator("#bars").text_content()
    assert all(text in told for text in ("<b>dog</b>", "${6*7}", "{{value}}?"))
    tab.wait_for_function("!/to come/.test(document.querySelector('#strip').innerText)")
    tab.screenshot(path=str(tmp_path / "words.png"), full_page=True)
    tab.get_by_role("tab", name="Logit lens").click()
    tab.locator(".lens td").first.wait_for()
    tab.screenshot(path=str(tmp_path / "lens.png"), full_page=True)
    tab.get_by_role("tab", name="Heads").click()
    tab.locator("#heads button").nth(3).click()
    tab.locator("#head img").wait_for()
    tab.screenshot(path=str(tmp_path / "heads.png"), full_page=True)
    tab.get_by_role("tab", name="What image tokens say").click()
    tab.locator("#segment").click()
    tab.locator("#overlay img").wait_for()
    tab.screenshot(path=str(tmp_path / "segments.png"), full_page=True)
    stranger = browser.new_page()
    stranger.goto(url)
    stranger.get_by_text("The conversation appears here").wait_for()
    assert stranger.locator("#map img").count() == 0
    assert errors == [] and strangers == []
    tab.close(), stranger.close()


@pytest.mark.browser
def test_a_picture_is_picked_on_a_narrow_screen(url, browser, watch, tmp_path):
    tab = browser.new_page(viewport={"width": 400, "height": 900})
    errors, strangers = watch(tab, url)
    tab.goto(url)
    tab.locator("#examples .thumbnail-item, #examples button").nth(1).click()
    tab.wait_for_selector("button[aria-label='Remove Image'], .image-frame img")
    tab.get_by_role("button", name="Ask", exact=True).click()
    tab.locator("#map img").wait_for()
    tab.screenshot(path=str(tmp_path / "narrow.png"), full_page=True)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert errors == [] and strangers == []
    tab.close()


@pytest.mark.browser
def test_problems_are_told_in_one_line(url, browser, tmp_path):
    path = tmp_path / "notes.png"
    path.write_bytes(b"no image at all")
    tab = browser.new_page()
    tab.goto(url)
    tab.get_by_role("button", name="Ask", exact=True).click()
    tab.get_by_text("Upload an image first.").wait_for()
    tab.set_input_files("input[type=file]", str(path))
    tab.wait_for_timeout(1000)
    tab.get_by_role("button", name="Ask", exact=True).click()
    tab.get_by_text("cannot be read as an image").wait_for()
    tab.close()

"""The explainability Space on a tiny random model: handlers, bounds, and the page in a browser."""

import json
from hashlib import sha256
from io import BytesIO

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
    return space.Explainer(model, processor, vector)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    tiny_image(5, 300, 200).save(path)
    return path


@pytest.fixture(scope="module")
def url(model, processor, vector):
    app = space.build_app(model, processor, vector)
    yield space.launch(app, server_name="127.0.0.1", prevent_thread_lock=True)[1]
    app.close()


# handlers


def test_asking_shows_the_word_that_leans_on_the_image_most(page, model, processor):
    image = tiny_image(5, 300, 200)
    answer, word, html, shown, chart = page.ask(image, "What is here?", 0.0, 0.5, "smooth")
    expected = explain(model, processor, image, "What is here?")
    assert torch.equal(answer.explanation.image, expected.image)
    shares = [expected.word(i).visual_contribution for i in range(len(expected.words))]
    assert word == shares.index(max(shares))
    assert html.count("data-index") == len(expected.words) == 6
    assert html.count("chip warning") == sum(share < 0.5 for share in shares)
    assert shown.size == image.size and "<svg" in chart and "What" in chart


def test_words_have_their_own_maps(page):
    answer = page.answer(tiny_image(5, 300, 200), "What is here?", 0.0)
    first, second = (page.draw(answer, word, "smooth") for word in (0, 1))
    assert ImageChops.difference(first, second).getbbox()
    assert ImageChops.difference(first, page.draw(answer, 0, "patches")).getbbox()


def test_steering_changes_the_answers_relevancy_and_is_taken_off_again(page):
    image = tiny_image(5)
    plain = page.answer(image, "What?", 0.0).explanation
    steered = page.answer(image, "What?", 2.0).explanation
    again = page.answer(image, "What?", 0.0).explanation
    assert not torch.equal(plain.image, steered.image)
    assert torch.equal(plain.image, again.image)


def test_a_click_before_an_answer_shows_nothing(page):
    event = gr.SelectData(None, {"index": 0, "value": "dog"})
    with pytest.raises(gr.Error, match="Ask a question first"):
        page.choose(None, "smooth", event)
    assert page.draw(None, 0, "smooth") is None and space.chips(None, 0, 0.2) == space.WAITING


def test_a_click_beside_the_words_is_refused(page):
    answer = page.answer(tiny_image(5), "What?", 0.0)
    with pytest.raises(gr.Error):
        page.choose(answer, "smooth", gr.SelectData(None, {"index": 99, "value": ""}))


@pytest.mark.parametrize(
    ("image", "question", "message"),
    [
        (None, "What?", "Upload an image"),
        (tiny_image(1), "  ", "at most 300"),
        (tiny_image(1), "x" * 301, "at most 300"),
    ],
)
def test_bad_requests_never_reach_the_model(page, monkeypatch, image, question, message):
    monkeypatch.setattr(space, "explain", lambda *args, **kwargs: pytest.fail("model was called"))
    with pytest.raises(gr.Error, match=message):
        page.answer(image, question, 0.0)


def test_errors_of_the_model_are_one_line_for_the_visitor(processor):
    page = space.Explainer(tiny_llava(), processor)
    with pytest.raises(gr.Error, match="image tokens") as caught:
        page.answer(tiny_image(1), "What?", 0.0)
    assert "\n" not in str(caught.value)


def test_an_answer_without_words_is_one_piece(model, processor):
    explanation = explain(model, processor, tiny_image(1), "What?", answer="?!")
    assert [word.text for word in space.words_of(explanation)] == ["?!"]


# bounds


def test_the_frame_follows_the_processor(model, processor):
    assert space.Explainer(model, processor).frame == "resize"
    cropping = tiny_processor("internvl")
    cropping.image_processor.do_center_crop = True
    assert space.Explainer(model, cropping).frame == "center_crop"


def test_images_are_bounded_before_they_are_decoded(tmp_path, monkeypatch):
    huge = tmp_path / "huge.png"
    Image.new("1", (20_000, 20_000)).save(huge)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(gr.Error, match="pixels"):
        space.read_image(huge)
    large = tmp_path / "large.png"
    large.write_bytes(b"0" * (space.MAX_BYTES + 1))
    with pytest.raises(gr.Error, match="10 MB"):
        space.read_image(large)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"0" * 50])
def test_a_file_that_is_no_image(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(gr.Error, match="cannot be read"):
        space.read_image(path)


def test_a_truncated_image(tmp_path):
    buffer = BytesIO()
    tiny_image(1, 300, 300).save(buffer, "JPEG")
    path = tmp_path / "half.jpg"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(gr.Error, match="cannot be read"):
        space.read_image(path)


def test_large_photographs_are_kept_small(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.new("L", (3000, 2000)).save(path)
    read = space.read_image(path)
    assert read.mode == "RGB" and read.size == (1024, 683)


# the model


def test_the_model_comes_from_the_list_or_a_folder(monkeypatch, tmp_path, model, processor):
    monkeypatch.setenv("FIRSTHAND_MODEL", "someone/else")
    with pytest.raises(ValueError, match="models.json"):
        space.load_model()
    stock = tiny_internvl()
    stock.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setenv("FIRSTHAND_MODEL", str(tmp_path))
    loaded, _, vector, question = space.load_model()
    assert type(loaded) is InternVLForConditionalGeneration and vector is None
    assert torch.equal(loaded.lm_head.weight.cpu(), stock.lm_head.weight) and question


def test_files_of_the_space():
    folder = space.MODELS.parent
    card = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert card["sdk"] == "gradio" and (folder / card["app_file"]).is_file()
    assert "firsthand" in (folder / "requirements.txt").read_text()
    for entry in json.loads(space.MODELS.read_text()).values():
        assert set(entry) == {"title", "question", "steering"}


# served


def test_the_api_answers_and_keeps_sessions_apart(url, picture):
    clients = [Client(url, verbose=False) for _ in range(2)]
    asked = clients[0].predict(
        handle_file(picture), "What is here?", 0, 0.2, "smooth", api_name="/ask"
    )
    assert "data-index" in asked[-3]
    with pytest.raises(AppError, match="Upload an image"):
        clients[1].predict(None, "What is here?", 0, 0.2, "smooth", api_name="/ask")


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
    body = {"data": [given, "What?", 0, 0.2, "smooth"]}
    call = httpx.post(f"{url}gradio_api/call/ask", json=body)
    told = httpx.get(f"{url}gradio_api/call/ask/{call.json()['event_id']}")
    assert "event: error" in told.text and not fetched


# in the browser


@pytest.mark.browser
def test_upload_ask_click_a_word(url, browser, watch, picture, tmp_path):
    tab = browser.new_page(viewport={"width": 1200, "height": 1000})
    errors, strangers = watch(tab, url)
    tab.goto(url)
    tab.set_input_files("input[type=file]", str(picture))
    tab.wait_for_selector("button[aria-label='Remove Image'], .image-frame img")
    tab.get_by_label("Question").fill("Is there a <b>dog</b> ${6*7} {{value}}?")
    tab.get_by_role("button", name="Ask").click()
    words = tab.locator("#answer [data-index]")
    words.first.wait_for()
    assert words.all_inner_texts() == ["a", "dog", "top", "left", "a", "cup"]
    assert tab.locator("#answer [aria-pressed=true]").count() == 1
    image = tab.locator("#map img")
    image.wait_for()
    seen = {}
    for index, word in [(2, "top"), (3, "left"), (1, "dog")]:
        words.nth(index).click()
        tab.locator("#bars text", has_text=f"{word}: ").wait_for()
        seen[word] = sha256(image.screenshot()).hexdigest()
    assert len(set(seen.values())) == 3
    pressed = tab.locator("#answer [aria-pressed=true]").all_inner_texts()
    assert pressed == ["dog"]
    assert tab.locator("#bars b").count() == 0
    told = tab.locator("#bars").text_content()
    assert all(text in told for text in ("<b>dog</b>", "${6*7}", "{{value}}?"))
    tab.screenshot(path=str(tmp_path / "space.png"), full_page=True)
    stranger = browser.new_page()
    stranger.goto(url)
    stranger.get_by_text("The answer appears here").wait_for()
    assert stranger.locator("#map img").count() == 0
    assert errors == [] and strangers == []
    tab.close(), stranger.close()


@pytest.mark.browser
def test_problems_are_told_in_one_line(url, browser, tmp_path):
    path = tmp_path / "notes.png"
    path.write_bytes(b"no image at all")
    tab = browser.new_page()
    tab.goto(url)
    tab.get_by_role("button", name="Ask").click()
    tab.get_by_text("Upload an image first.").wait_for()
    tab.set_input_files("input[type=file]", str(path))
    tab.wait_for_timeout(1000)
    tab.get_by_role("button", name="Ask").click()
    tab.get_by_text("cannot be read as an image").wait_for()
    tab.close()

"""The explainability Space: upload an image, ask, click a word, see what the word leans on.

A thin page over `firsthand.modeling.explain` and `firsthand.processing.overlays`; it computes
nothing itself and keeps nothing but each visitor's own last answer (`gr.State`).

    python app.py                                  # the demo model
    FIRSTHAND_MODEL=path/to/checkpoint python app.py
"""

import json
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from transformers import ProcessorMixin

from firsthand.modeling.explanation import Explanation, WordRelevancy
from firsthand.modeling.relevancy import explain
from firsthand.modeling.steering import SteeringVector, attach_steering
from firsthand.processing.masks import Frame
from firsthand.processing.overlays import bars, heatmap, strip_html

MODELS = Path(__file__).with_name("models.json")
MAX_BYTES = 10_000_000
MAX_PIXELS = 16_000_000
MAX_SIDE = 1024  # pixels kept for drawing
MAX_QUESTION = 300  # characters
MAX_NEW_TOKENS = 64
SESSION_SECONDS = 3600
QUESTION = "What is in the image?"
TITLE = "Why did it say that?"
INTRO = (
    f"# {TITLE}\nUpload an image, ask, then **click a word** of the answer: the map shows where in "
    "the image that word comes from. Words framed in red lean on the image least."
)
WAITING = "<p>The answer appears here, word by word.</p>"
CLICK = """
element.addEventListener('click', (event) => {
  const chip = event.target.closest('[data-index]');
  if (!chip) return;
  element.querySelectorAll('[data-index]').forEach((other) =>
    other.setAttribute('aria-pressed', String(other === chip)));
  trigger('select', {index: Number(chip.dataset.index), value: chip.textContent});
});
"""
CSS = """
#answer .chip { cursor: pointer; font-size: 1.1rem; line-height: 1.5; }
#answer .chip[aria-pressed="true"] { outline: 3px solid #e07a3f; outline-offset: 1px; }
#map img { width: 100%; height: 100%; object-fit: contain; }
#bars svg { max-width: 100%; height: auto; background: #fff; border-radius: 8px; }
"""
THEME = gr.themes.Base(  # system fonts: no font is loaded from anywhere
    primary_hue="orange",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)


@dataclass(frozen=True)
class Answer:
    """One visitor's last answer: what clicks need, without the model."""

    image: Image.Image
    explanation: Explanation


def bounded(component: gr.Image) -> gr.Image:
    """Let an image input take uploaded files only, within bounds; addresses are not fetched.

    (Set on the instance: for a subclass, gradio would write a stub file beside this one.)
    """
    keep = component.async_move_resource_to_block_cache

    async def keep_uploads(path: Any) -> str | None:
        if "://" in str(path):
            raise gr.Error("Upload the image as a file; addresses are not fetched.")
        return await keep(path)

    def preprocess(payload: ImageData | None) -> Image.Image | None:
        if payload is None:
            return None
        if payload.path is None:
            raise gr.Error("Upload the image as a file.")
        return read_image(Path(payload.path))

    component.async_move_resource_to_block_cache = keep_uploads
    component.preprocess = preprocess
    return component


def read_image(path: Path) -> Image.Image:
    """The upright RGB image of a file, at most MAX_SIDE pixels a side; bounds are checked unread.

    Raises:
        gr.Error: when the file is too large, too many pixels, or no image.
    """
    if path.stat().st_size > MAX_BYTES:
        raise gr.Error(f"The file is larger than {MAX_BYTES // 1_000_000} MB.")
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if image.width * image.height > MAX_PIXELS:
                raise gr.Error(
                    f"The image has {image.width} x {image.height} pixels; at most "
                    f"{MAX_PIXELS // 1_000_000} million are taken."
                )
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise gr.Error("The file cannot be read as an image.") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise gr.Error("The image has too many pixels.") from error
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture


class Explainer:
    """The model behind the page: one call at a time; it keeps nothing of a visitor."""

    def __init__(
        self, model: nn.Module, processor: ProcessorMixin, vector: SteeringVector | None = None
    ):
        self.model, self.processor, self.vector = model, processor, vector
        self._lock = Lock()
        crops = processor.image_processor.to_dict().get("do_center_crop")
        self.frame: Frame = "center_crop" if crops else "resize"

    def answer(self, image: Image.Image | None, question: str, strength: float) -> Answer:
        """Let the model answer, and explain every token of the answer.

        Raises:
            gr.Error: without an image, or with no question or one that is too long.
        """
        if image is None:
            raise gr.Error("Upload an image first.")
        if not question.strip() or len(question) > MAX_QUESTION:
            raise gr.Error(f"Ask a question of at most {MAX_QUESTION} characters.")
        with self._lock, self._steered(strength):
            try:
                explanation = explain(
                    self.model,
                    self.processor,
                    image,
                    question.strip(),
                    max_new_tokens=MAX_NEW_TOKENS,
                )
            except ValueError as error:
                raise gr.Error(str(error)) from error
        return Answer(image, explanation)

    def _steered(self, strength: float) -> AbstractContextManager:
        if self.vector is None or not strength:
            return nullcontext()
        return attach_steering(self.model, self.vector, strength)

    def ask(
        self,
        image: Image.Image | None,
        question: str,
        strength: float,
        warn_below: float,
        style: str,
    ) -> tuple[Answer, int, str, Image.Image, str]:
        """What the Ask button shows: the chips, and the word that leans on the image most."""
        answer = self.answer(image, question, strength)
        shares = [word.visual_contribution for word in words_of(answer.explanation)]
        word = shares.index(max(shares))
        return (
            answer,
            word,
            chips(answer, word, warn_below),
            self.draw(answer, word, style),
            facts(answer, word),
        )

    def choose(
        self, answer: Answer | None, style: str, event: gr.SelectData
    ) -> tuple[int, Image.Image, str]:
        """What a click on a word shows."""
        word = int(event.index)
        if answer is None or not 0 <= word < len(words_of(answer.explanation)):
            raise gr.Error("Ask a question first.")
        return word, self.draw(answer, word, style), facts(answer, word)

    def draw(self, answer: Answer | None, word: int, style: str) -> Image.Image | None:
        """The map of a word over the image."""
        if answer is None:
            return None
        chosen = words_of(answer.explanation)[word]
        smooth = style == "smooth"
        grid = chosen.smooth_map if smooth else chosen.map
        return heatmap(answer.image, grid, smooth, frame=self.frame)


def words_of(explanation: Explanation) -> list[WordRelevancy]:
    """The clickable words; an answer without words is one piece."""
    spans = explanation.word_spans or [(0, len(explanation.answer))]
    return [explanation.span(*span) for span in spans]


def chips(answer: Answer | None, chosen: int, warn_below: float) -> str:
    """The answer as clickable words, darker the more they lean on the image."""
    if answer is None:
        return WAITING
    words = words_of(answer.explanation)
    shares = [word.visual_contribution for word in words]
    return strip_html([word.text for word in words], shares, warn_below, True, chosen)


def facts(answer: Answer, index: int) -> str:
    """What word `index` leans on besides the image, as a chart."""
    word = words_of(answer.explanation)[index]
    labels = {
        f"{number} {text}": {"relevancy": word.question[tokens].sum().item()}
        for number, (text, tokens) in enumerate(answer.explanation.question_words, start=1)
    }
    share = f"{word.visual_contribution:.0%} image, probability {word.probability:.0%}"
    return bars(labels, title=f"{word.text}: {share}. Your question:")


def build_app(
    model: nn.Module,
    processor: ProcessorMixin,
    vector: SteeringVector | None = None,
    question: str = QUESTION,
) -> gr.Blocks:
    """The page for one loaded model.

    Args:
        model: a supported vision-language model in eval mode.
        processor: its processor.
        vector: steering directions; with them, a slider sets their strength.
        question: what the question box holds at first.
    """
    page = Explainer(model, processor, vector)
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(600, SESSION_SECONDS)
    ) as app:
        answer = gr.State(None, time_to_live=SESSION_SECONDS)
        word = gr.State(0, time_to_live=SESSION_SECONDS)
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column():
                image = bounded(
                    gr.Image(label="Image", sources=["upload", "clipboard"], height=320)
                )
                text = gr.Textbox(question, label="Question", max_length=MAX_QUESTION)
                strength = gr.Slider(
                    -2, 2, 0, step=0.1, label="Steering strength", visible=vector is not None
                )
                button = gr.Button("Ask", variant="primary")
                with gr.Accordion("How it is drawn", open=False):
                    style = gr.Radio(["smooth", "patches"], value="smooth", label="Map")
                    warn = gr.Slider(0, 1, 0.2, step=0.05, label="Warn below this image share")
            with gr.Column():
                html = gr.HTML(WAITING, js_on_load=CLICK, elem_id="answer", min_height=60)
                shown = gr.Image(
                    label="What the word leans on", format="png", height=340,
                    buttons=["download", "fullscreen"], elem_id="map",
                )  # fmt: skip
                chart = gr.HTML("", elem_id="bars")
        inputs, outputs = [image, text, strength, warn, style], [answer, word, html, shown, chart]
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model"}
        button.click(page.ask, inputs, outputs, api_name="ask", **one_at_a_time)
        text.submit(page.ask, inputs, outputs, api_name=False, **one_at_a_time)
        html.select(page.choose, [answer, style], [word, shown, chart], api_name=False)
        style.change(page.draw, [answer, word, style], shown, api_name=False)
        warn.release(chips, [answer, word, warn], html, api_name=False)
    return app.queue(max_size=16)


def launch(app: gr.Blocks, **settings: Any) -> tuple[Any, str, str]:
    """Serve the page with its bounds; `settings` go to `gr.Blocks.launch`."""
    return app.launch(
        theme=THEME,
        css=CSS,
        max_file_size=MAX_BYTES,
        state_session_capacity=200,
        ssr_mode=False,
        footer_links=[],
        quiet=True,
        **settings,
    )


def load_model() -> tuple[nn.Module, ProcessorMixin, SteeringVector | None, str]:
    """The model that FIRSTHAND_MODEL names (a name in models.json or a folder), ready to explain.

    Raises:
        ValueError: when it names neither.
    """
    allowed = json.loads(MODELS.read_text())
    name = os.environ.get("FIRSTHAND_MODEL", "demo")
    if name not in allowed and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"FIRSTHAND_MODEL is {name!r}: neither a checkpoint folder nor one of "
            f"{', '.join(allowed)}. Add it to {MODELS.name} to allow it."
        )
    entry = allowed.get(name, {"question": QUESTION, "steering": None})
    vector = SteeringVector.from_pretrained(entry["steering"]) if entry["steering"] else None
    if name == "demo":
        from firsthand.recipes.demo_model import load_demo_model

        return *load_demo_model(), vector, entry["question"]
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    return model.eval(), AutoProcessor.from_pretrained(name), vector, entry["question"]


if __name__ == "__main__":
    launch(build_app(*load_model()))

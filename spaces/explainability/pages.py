"""The page itself: what stands where, and which handler each event goes to.

launch(build_app(Page(Engine(model, processor), examples)))
"""

from __future__ import annotations

import os
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from firsthand.spaces.explainability import handlers, images, views
from firsthand.spaces.explainability.handlers import Page

SESSION_SECONDS = 3600
QUESTION = "What is in the image?"
TITLE = "Why did it say that?"
INTRO = (
    f"# {TITLE}\nPick or upload an image, ask, then **click a word** of the answer: the map shows "
    "where in the image that word comes from. Words in red have hardly any visual support."
)
CLICK = """
element.addEventListener('click', (event) => {
  const spot = event.target.closest('[data-at]');
  if (!spot) return;
  element.querySelectorAll('[data-at]').forEach((other) =>
    other.setAttribute('aria-pressed', String(other === spot)));
  trigger('select', {index: spot.dataset.at.split(',').map(Number), value: spot.textContent});
});
"""
CSS = """
.gradio-container { max-width: 1280px !important; }
.hint { opacity: .75; }
.facts { margin: 0 0 6px; }
.arm { font-size: .8rem; opacity: .75; margin-bottom: 2px; }
#answer .asked { margin: 4px 0 4px 20%; padding: 8px 12px; border-radius: 12px 12px 2px 12px;
  background: #225577; color: #fff; width: fit-content; margin-left: auto; }
#answer .said { flex: 1 1 220px; padding: 8px 12px; border-radius: 12px 12px 12px 2px;
  background: #f1f4f8; color: #1c2230; line-height: 1.9; overflow-wrap: anywhere; }
#answer .old { opacity: .75; line-height: 1.4; margin-bottom: 6px; }
#answer .said .arm, #answer .notice { color: #56606f; font-size: .8rem; }
#answer .side { display: flex; flex-wrap: wrap; gap: 10px; align-items: stretch; }
#answer .word { font-size: 1.08rem; padding: 1px 4px; border-radius: 5px; cursor: pointer;
  color: inherit; font-weight: 400; background: #e0e7ef; border: 1px solid transparent; }
#answer .word:hover { background: #cddae6; }
#answer .word.warning { color: #a01c10; background: #fbe0dc; border-color: #c0392b; }
#answer .word[aria-pressed="true"] { outline: 2px solid #c2570c; outline-offset: 0; }
.fit img { width: 100%; height: 100%; object-fit: contain; }
#bars svg { max-width: 100%; height: auto; background: #fff; border-radius: 8px; }
.scroll { overflow: auto; max-height: 560px; border: 0; background: #fff;
  color: #1c2230; border-radius: 8px; }
.scroll table, .scroll tr, .scroll th, .scroll td { border: 0 !important; }
.lens { border-collapse: separate; border-spacing: 1px; font-size: .78rem; }
.lens th { position: sticky; left: 0; top: 0; background: #fff; color: #1c2230; padding: 2px 6px;
  font-weight: 600; z-index: 1; }
.lens thead th { z-index: 2; } .lens thead th:not(:first-child) { left: auto; }
.lens td { padding: 2px 6px; text-align: center; white-space: nowrap; }
.lens th.marked { background: #fbd9c5; }
.heads { border-collapse: separate; border-spacing: 1px; width: 100%; table-layout: fixed; }
.heads th { font-size: .7rem; font-weight: 400; padding: 0 2px; color: #56606f; }
.heads th:first-child { width: 24px; } .heads td { padding: 0; }
.heads button { display: block; width: 100%; min-width: 0; padding: 0; border: 0;
  height: 22px; border-radius: 3px;
  cursor: pointer; }
.heads button[aria-pressed="true"] { outline: 3px solid #2fd3ff; }
"""
THEME = gr.themes.Base(  # system fonts: no font is loaded from anywhere
    primary_hue="orange",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
ALONE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_name": False}
FREE: dict[str, Any] = {"api_name": False}


def build_app(
    page: Page, question: str = QUESTION, warn_at: float = 0.5, about: str = ""
) -> gr.Blocks:
    """The page for one loaded model.

    Args:
        page: its handlers; with a steering vector, a slider sets the strength.
        question: what the question box holds at first.
        warn_at: support in nats up to which a word is warned about, at first.
        about: one line on the model.
    """
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(600, SESSION_SECONDS)
    ) as app:
        turn = gr.State(None, time_to_live=SESSION_SECONDS)
        chosen = gr.State((0, 0), time_to_live=SESSION_SECONDS)
        gr.Markdown(f"{INTRO}\n\n{about}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                image = images.bounded(
                    gr.Image(label="Image", sources=["upload", "clipboard"], height=300)
                )
                _examples(page, image)
            with gr.Column(scale=3, min_width=360):
                talk = gr.HTML(views.WAITING, js_on_load=CLICK, elem_id="answer", min_height=90)
                text = gr.Textbox(question, label="Question", max_length=handlers.MAX_QUESTION)
                strength = gr.Slider(
                    *handlers.STRENGTHS, 0, step=0.1, label="Steering strength",
                    info="With any but 0, the steered answer stands beside the plain one.",
                    visible=page.engine.vector is not None,
                )  # fmt: skip
                with gr.Accordion("How it answers and warns", open=False):
                    temperature = gr.Slider(
                        *handlers.TEMPERATURES, 0, step=0.1, label="Temperature"
                    )
                    beams = gr.Slider(1, handlers.MAX_BEAMS, 1, step=1, label="Beams")
                    warn = gr.Slider(
                        -1, 8, warn_at, step=0.1, label="Warn up to this support (nats)"
                    )
                button = gr.Button("Ask", variant="primary")
        with gr.Tabs():
            with gr.Tab("What the word leans on"):
                style, layer, how, shown, chart, line = _relevancy(page)
            with gr.Tab("Logit lens"):
                reading = gr.Radio(
                    handlers.READINGS, value=handlers.READINGS[0], label="Read the layers"
                )
                lens = gr.HTML(views.NOTHING)
            with gr.Tab("Heads"), gr.Row():
                with gr.Column(scale=3, min_width=360):
                    grid = gr.HTML(views.NOTHING, js_on_load=CLICK, elem_id="heads")
                with gr.Column(scale=2, min_width=320):
                    head = _picture("Where the head looks", "head")
                    named = gr.Markdown("")
            with gr.Tab("What image tokens say"):
                _segmentation(page, image)
        about_word = [shown, chart, lens, grid, head]
        settings = [strength, temperature, beams, warn, style, layer, how, reading]
        asked = {
            "fn": page.ask,
            "inputs": [turn, image, text, *settings],
            "outputs": [turn, chosen, talk, *about_word, line],
        }
        rest = {"fn": page.rest, "inputs": [turn], "outputs": [line], "show_progress": "hidden"}
        for event, name in ((button.click, "ask"), (text.submit, False)):
            event(**asked, **ALONE | {"api_name": name}).success(**rest, **FREE)
        talk.select(page.choose, [turn, style, reading], [chosen, *about_word], **ALONE)
        drawn = (page.redraw, [turn, chosen, style, layer, how], [shown, chart, line])
        layer.release(*drawn, **FREE, show_progress="hidden")
        gr.on([style.change, how.change], *drawn, **FREE, show_progress="hidden")
        warn.release(views.conversation, [turn, chosen, warn], talk, **FREE)
        reading.change(page.lens, [turn, chosen, reading], lens, **FREE)
        grid.select(page.probe, [turn, chosen, style], [head, named], **ALONE)
    return app.queue(max_size=16)


def _examples(page: Page, image: gr.Image) -> None:
    if page.examples:
        gallery = gr.Gallery(
            page.examples, label="Or pick one", show_label=False, columns=4, height=250,
            object_fit="contain", allow_preview=False, interactive=False, buttons=[],
            elem_id="examples", format="png",
        )  # fmt: skip
        gallery.select(page.pick, None, image, **FREE, show_progress="hidden")


def _picture(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label, format="png", height=360, buttons=["download", "fullscreen"], elem_id=name,
        elem_classes="fit", interactive=False,
    )  # fmt: skip


def _relevancy(page: Page) -> tuple[Any, ...]:
    """The controls, the map, the chart and the strip."""
    count = page.engine.layers
    with gr.Row():
        style = gr.Radio(["smooth", "patches"], value="smooth", label="Map")
        layer = gr.Slider(
            1, count, count, step=1, label="Layer", info="The last is carried to the patches."
        )
        how = gr.Radio(["sum", "mean", "max"], value="sum", label="Image against text by")
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            shown = _picture("Where in the image", "map")
        with gr.Column(scale=1, min_width=320):
            chart = gr.HTML(views.NOTHING, elem_id="bars")
    gr.Markdown("**Visual contribution** of each token: the darker, the more it leans on the image")
    line = gr.HTML(views.NOTHING, elem_id="strip")
    return style, layer, how, shown, chart, line


def _segmentation(page: Page, image: gr.Image) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            words = gr.Textbox(
                "", label="Words to look for", placeholder="dog, cup", info="May stay empty.",
                max_length=handlers.MAX_WORDS,
            )  # fmt: skip
            read = gr.Button("Segment the image", elem_id="segment")
            said = gr.Markdown("")
        with gr.Column(scale=3, min_width=360):
            overlay = _picture("What its tokens say", "overlay")
    read.click(page.segment, [image, words], [overlay, said], **ALONE)


def launch(app: gr.Blocks, **settings: Any) -> tuple[Any, str, str]:
    """Serve the page with its bounds; `settings` go to `gr.Blocks.launch`."""
    return app.launch(
        theme=THEME,
        css=CSS,
        max_file_size=images.MAX_BYTES,
        state_session_capacity=100,
        ssr_mode=False,
        footer_links=[],
        quiet=True,
        **settings,
    )

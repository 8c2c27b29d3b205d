"""What the page does at each event: the engine's calls put together with what is shown of them.

Everything about a visitor comes in as arguments and goes out as values; the page keeps nothing.

    page = Page(Engine(model, processor)); page.ask(None, image, "What is this?", ...)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from firsthand.processing.overlays import heatmap
from firsthand.spaces.explainability import views
from firsthand.spaces.explainability.engine import CHUNK, Engine
from firsthand.spaces.explainability.state import Turn

MAX_QUESTION = 300  # characters
MAX_WORDS = 100  # characters of the words to look for
EARLIER = 6  # questions that the conversation shows again
STRENGTHS = (-4.0, 4.0)
TEMPERATURES = (0.0, 1.5)
MAX_BEAMS = 5


class Page:
    """The handlers; `examples` are pictures to pick from."""

    def __init__(self, engine: Engine, examples: Sequence[Image.Image] = ()) -> None:
        self.engine, self.examples = engine, list(examples)

    def ask(
        self,
        previous: Turn | None,
        image: Image.Image | None,
        question: str,
        strength: float,
        temperature: float,
        beams: float,
        threshold: float,
        style: str,
        layer: float,
        how: str,
        reading: str,
    ) -> tuple[Any, ...]:
        """What the Ask button shows: the answers, and one word of the plain one explained.

        Raises:
            gr.Error: without an image, or with a question or setting out of bounds.
        """
        self._check(image, question, strength, temperature, beams)
        assert image is not None
        asked = (image, question.strip())
        drawn = (float(temperature), int(beams))
        replies = [self.engine.reply(*asked, 0.0, *drawn)]
        if strength and self.engine.vector is not None:
            replies.append(self.engine.reply(*asked, float(strength), *drawn))
        turn = Turn(image, question.strip(), replies, self.engine.layers)
        turn.earlier = _earlier(previous, image)
        self._show(turn, layer, how)
        chosen = (0, replies[0].opening_word())
        text = views.conversation(turn, chosen, threshold)
        return turn, chosen, text, *self._about(turn, chosen, style, reading), views.strip(turn)

    def _check(
        self,
        image: Image.Image | None,
        question: str,
        strength: float,
        temperature: float,
        beams: float,
    ) -> None:
        if image is None:
            raise gr.Error("Upload an image first.")
        if not question.strip() or len(question) > MAX_QUESTION:
            raise gr.Error(f"Ask a question of at most {MAX_QUESTION} characters.")
        for name, value, (low, high) in (
            ("strength", strength, STRENGTHS),
            ("temperature", temperature, TEMPERATURES),
            ("beams", beams, (1, MAX_BEAMS)),
        ):
            if not low <= value <= high:
                raise gr.Error(f"{name} is {value}; it must be in {low} to {high}.")

    def rest(self, turn: Turn | None) -> Iterator[str]:
        """The strip, again and again, while the other tokens of the answers are explained."""
        if turn is None:
            return
        for reply in turn.replies:
            while not turn.over and (missing := reply.missing()):
                self.engine.explain_tokens(turn.image, reply, missing[:CHUNK])
                yield views.strip(turn)

    def choose(
        self, turn: Turn | None, style: str, reading: str, event: gr.SelectData
    ) -> tuple[Any, ...]:
        """What a click on a word shows."""
        chosen = _place(event)
        if turn is None or not 0 <= chosen[0] < len(turn.replies):
            raise gr.Error("Ask a question first.")
        reply = turn.replies[chosen[0]]
        if not 0 <= chosen[1] < len(reply.spans):
            raise gr.Error("Click a word of the answer.")
        self.engine.explain_tokens(turn.image, reply, reply.tokens(chosen[1]))
        return chosen, *self._about(turn, chosen, style, reading)

    def _about(self, turn: Turn, chosen: views.At, style: str, reading: str) -> tuple[Any, ...]:
        """Map, chart, lens and head grid of a word, and no head's map."""
        return (
            views.word_map(turn, chosen, style, self.engine.frame),
            views.facts(turn, chosen),
            views.lens(turn, chosen, reading == READINGS[0]),
            views.head_grid(turn, chosen),
            None,
        )

    def redraw(
        self, turn: Turn | None, chosen: views.At, style: str, layer: float, how: str
    ) -> tuple[Image.Image | None, str, str]:
        """Map, chart and strip at another layer, or in another way."""
        if turn is None:
            return None, "", views.NOTHING
        self._show(turn, layer, how)
        picture = views.word_map(turn, chosen, style, self.engine.frame)
        return picture, views.facts(turn, chosen), views.strip(turn)

    def _show(self, turn: Turn, layer: float, how: str) -> None:
        turn.layer = min(max(int(layer), 1), self.engine.layers)
        turn.how = "mean" if how == "mean" else "max" if how == "max" else "sum"

    def lens(self, turn: Turn | None, chosen: views.At, reading: str) -> str:
        """The logit lens in another reading."""
        return views.lens(turn, chosen, reading == READINGS[0])

    def probe(
        self, turn: Turn | None, chosen: views.At, style: str, event: gr.SelectData
    ) -> tuple[Image.Image, str]:
        """Where one head looks from the chosen word, and what it is called."""
        layer, head = _place(event)
        reply = None if turn is None else turn.replies[chosen[0]]
        if turn is None or reply is None or reply.heads is None:
            raise gr.Error("Ask a question first.")
        layers, heads, _ = reply.heads.shape
        if not (0 <= layer < layers and 0 <= head < heads):
            raise gr.Error(f"There are layers 0 to {layers - 1} with heads 0 to {heads - 1}.")
        grid = self.engine.head_map(turn.image, reply, chosen[1], layer, head)
        text = f"Layer {layer}, head {head}, from “{reply.word_text(chosen[1])}”: "
        text += f"{grid.sum():.1%} of its attention lies on the image."
        return heatmap(turn.image, grid, style == "smooth", frame=self.engine.frame), text

    def segment(self, image: Image.Image | None, words: str) -> tuple[Image.Image, str]:
        """The regions of the image by the words that its tokens say."""
        if image is None:
            raise gr.Error("Upload an image first.")
        if len(words) > MAX_WORDS:
            raise gr.Error(f"Name words of at most {MAX_WORDS} characters together.")
        asked = [word.strip().lower() for word in words.split(",") if word.strip()]
        picture, said = self.engine.regions(image, asked)
        silent = [word for word in asked if word not in said]
        text = f"Its tokens say {len(said)} words: {', '.join(said[:20]) or 'none'}."
        return picture, text + (f" None says {', '.join(silent)}." if silent else "")

    def pick(self, event: gr.SelectData) -> Image.Image:
        """The example picture that was clicked."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(self.examples):
            raise gr.Error("Pick one of the pictures.")
        return self.examples[event.index]


READINGS = ("with the final norm", "without")


def _earlier(previous: Turn | None, image: Image.Image) -> list[tuple[str, str]]:
    """The conversation so far, if it is about this image; the previous question is over."""
    if previous is None:
        return []
    previous.over = True
    if previous.image.size != image.size or previous.image.tobytes() != image.tobytes():
        return []
    last = (previous.question, previous.replies[0].explanation.answer)
    return [*previous.earlier, last][-EARLIER:]


def _place(event: gr.SelectData) -> views.At:
    """The two numbers of what was clicked."""
    at = event.index
    if not isinstance(at, list | tuple) or len(at) != 2 or not all(type(x) is int for x in at):
        raise gr.Error("Click a word or a cell.")
    return at[0], at[1]

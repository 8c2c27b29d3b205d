"""The annotation Space: three yes/no questions for every expression and its mask.

FiVL's manual evaluation (arXiv 2412.14672): is the mask right, does the answer need the image for
the expression, is the example good? It stores answers as they are given and goes on where an
annotator stopped; what is measured from them is in `labels.py`.

    python -m firsthand.spaces.annotation.app --data grounded --labels labels.jsonl
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from PIL import Image

from firsthand.processing.overlays import outline
from firsthand.processing.perturb import perturb
from firsthand.recipes.grounded import Expression, usable_expressions
from firsthand.spaces.annotation.labels import QUESTIONS, Labels, agreement

TITLE = "Is this what the image shows?"
KEYS = {"correct": "1 / 2", "key": "3 / 4", "good": "5 / 6"}
INTRO = (
    f"# {TITLE}\nKeys: **1** / **2** yes / no to the first question, **3** / **4** to the second, "
    "**5** / **6** to the third, **Enter** keeps the answers and goes on, **Backspace** goes back."
)
HOTKEYS = """
if (window.annotationKeys) document.removeEventListener('keydown', window.annotationKeys);
window.annotationKeys = (event) => {
  if (event.target.matches('input[type=text], textarea') || event.ctrlKey || event.metaKey) return;
  const press = (where) => document.querySelector(where)?.click();
  const radios = {'1': ['correct', 0], '2': ['correct', 1], '3': ['key', 0], '4': ['key', 1],
                  '5': ['good', 0], '6': ['good', 1]};
  if (radios[event.key]) {
    const [name, place] = radios[event.key];
    const inputs = document.querySelectorAll(`#${name} input[type=radio]`);
    if (inputs[place]) inputs[place].click();
  } else if (event.key === 'Enter') press('#next');
  else if (event.key === 'Backspace') press('#back');
  else return;
  event.preventDefault();
};
document.addEventListener('keydown', window.annotationKeys);
"""
CSS = """
#said { font-size: 1.1rem; line-height: 1.6; }
#said .question { background: #fff2b3; color: #1c2230; }
.fit img { width: 100%; height: 100%; object-fit: contain; }
#said .expression { background: #ffb3d1; color: #1c2230; font-weight: 600; }
"""
THEME = gr.themes.Base(  # system fonts: no font is loaded from anywhere
    primary_hue="orange",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
YES, NO = "yes", "no"


@dataclass(frozen=True)
class Item:
    """One expression to judge: sample `sample`, its turn and its place there."""

    name: str
    sample: int
    turn: int
    place: int


class Items:
    """The expressions of grounded samples, read one at a time."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples
        self.all = [
            Item(f"{_key(sample)}/{turn}/{place}", index, turn, place)
            for index, sample in enumerate(_without_images(samples))
            for turn, said in enumerate(sample["turns"])
            for place, one in enumerate(said["expressions"] or ())
            if one["mask"]
        ]
        if not self.all:
            raise ValueError("the data hold no expression with a mask: there is nothing to judge")

    def read(self, number: int) -> tuple[dict[str, Any], dict[str, Any], Expression | None]:
        """The sample, the turn and the expression of item `number`; None where it is not usable."""
        item = self.all[number]
        sample = self.samples[item.sample]
        turn = sample["turns"][item.turn]
        wanted = turn["expressions"][item.place]
        alone = {**sample, "turns": [{**turn, "expressions": [wanted]}]}
        found = usable_expressions(alone, 0, [])
        return sample, turn, found[0] if found else None


def _key(sample: dict[str, Any]) -> str:
    return str(sample.get("record_key") or sample["id"])


def _without_images(samples: Any) -> Any:
    if isinstance(samples, Sequence):
        return samples
    return samples.select_columns([c for c in samples.column_names if c != "image"])


def conversation(turn: dict[str, Any], found: Expression | None) -> str:
    """The question (yellow) and the answer with the expression (pink) in it, as HTML."""
    question = f'<p><b>Question:</b> <span class="question">{escape(turn["question"])}</span></p>'
    answer = turn["answer"]
    if found is None:
        return (
            f"{question}<p><b>Answer:</b> {escape(answer)}</p><p>This expression is unusable.</p>"
        )
    before, after = escape(answer[: found.start]), escape(answer[found.end :])
    middle = f'<span class="expression">{escape(found.text)}</span>'
    return f"{question}<p><b>Answer:</b> {before}{middle}{after}</p>"


def pictures(
    image: Image.Image, found: Expression | None
) -> tuple[Image.Image, Image.Image | None]:
    """The image with the mask's outline, and the segment alone on black."""
    plain = image.convert("RGB")
    if found is None:
        return plain, None
    return outline(plain, found.mask), perturb(plain, ~found.mask, "black")


class Desk:
    """What the page does; it keeps nothing of its visitors but their labels."""

    def __init__(self, items: Items, labels: Labels) -> None:
        self.items, self.labels = items, labels

    def start(self, annotator: str) -> list[Any]:
        """The first item that the annotator has not judged."""
        name = annotator.strip()
        if not name:
            raise gr.Error("Enter your name first.")
        open_items = (
            number
            for number, item in enumerate(self.items.all)
            if self.labels.of(item.name, name) is None
        )
        return self.show(next(open_items, 0), name)

    def show(self, number: int, annotator: str) -> list[Any]:
        """Item `number`: its place, text, pictures, the annotator's answers, and the progress."""
        item = self.items.all[number]
        sample, turn, found = self.items.read(number)
        known = self.labels.of(item.name, annotator)
        answers = [None if known is None else (YES if known[q] else NO) for q in QUESTIONS]
        done = sum(self.labels.of(i.name, annotator) is not None for i in self.items.all)
        total = len(self.items.all)
        progress = f"{annotator}: {done} of {total} judged; this is number {number + 1}"
        outlined, segment = pictures(sample["image"], found)
        return [number, conversation(turn, found), outlined, segment, *answers, progress]

    def keep(self, number: int | None, annotator: str, *answers: str | None) -> list[Any]:
        """Keep the answers to item `number` and show the next one; the last one stays."""
        if number is None:
            raise gr.Error("Enter your name and press Start.")
        if None in answers:
            raise gr.Error("Answer all three questions first.")
        said = {q: a == YES for q, a in zip(QUESTIONS, answers, strict=True)}
        self.labels.add(self.items.all[number].name, annotator.strip(), said)
        return self.show(min(number + 1, len(self.items.all) - 1), annotator.strip())

    def back(self, number: int | None, annotator: str) -> list[Any]:
        """The item before."""
        if number is None:
            raise gr.Error("Enter your name and press Start.")
        return self.show(max(number - 1, 0), annotator.strip())

    def export(self) -> tuple[str, list[list[Any]]]:
        """A Parquet file of all labels, and the agreement as a table."""
        folder = Path(tempfile.mkdtemp(prefix="labels-"))
        lines = agreement(self.labels.latest())
        table = [[_shown(line[column]) for column in COLUMNS] for line in lines]
        return str(self.labels.export(folder / "labels.parquet")), table


COLUMNS = ("question", "annotators", "n", "agreement", "kappa", "alpha")


def _shown(value: Any) -> Any:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else value


def build_app(samples: Any, labels: str | Path) -> gr.Blocks:
    """The page.

    Args:
        samples: grounded samples, a list or a `datasets.Dataset`.
        labels: the file that answers are kept in; it is gone on with where it exists.

    Raises:
        ValueError: for samples without expressions, or a file that holds something else.
    """
    desk = Desk(Items(samples), Labels(labels))
    with gr.Blocks(title=TITLE, analytics_enabled=False) as app:
        number = gr.State(None)
        gr.HTML("", js_on_load=HOTKEYS, visible=True, elem_id="keys")
        gr.Markdown(INTRO)
        with gr.Row():
            annotator = gr.Textbox(label="Your name", max_length=60, elem_id="annotator")
            start = gr.Button("Start", variant="primary", elem_id="start")
            progress = gr.Markdown("", elem_id="progress")
        text = gr.HTML("", elem_id="said", min_height=60)
        with gr.Row():
            shown = [
                gr.Image(
                    label=name,
                    format="png",
                    height=320,
                    buttons=[],
                    interactive=False,
                    elem_classes="fit",
                )
                for name in ("Image and mask", "Segment")
            ]
        radios = [
            gr.Radio([YES, NO], label=f"{text_} ({KEYS[name]})", elem_id=name)
            for name, text_ in QUESTIONS.items()
        ]
        with gr.Row():
            back = gr.Button("Back", elem_id="back")
            following = gr.Button("Keep and next", variant="primary", elem_id="next")
        with gr.Accordion("Export and agreement", open=False):
            export = gr.Button("Export", elem_id="export")
            file = gr.File(label="Labels", elem_id="file")
            table = gr.Dataframe(headers=list(COLUMNS), label="Agreement", elem_id="agreement")
        outputs = [number, text, *shown, *radios, progress]
        start.click(desk.start, annotator, outputs, api_name=False)
        annotator.submit(desk.start, annotator, outputs, api_name=False)
        following.click(desk.keep, [number, annotator, *radios], outputs, api_name=False)
        back.click(desk.back, [number, annotator], outputs, api_name=False)
        export.click(desk.export, None, [file, table], api_name=False)
    return app.queue(max_size=32)


def launch(app: gr.Blocks, **settings: Any) -> tuple[Any, str, str]:
    """Serve the page; `settings` go to `gr.Blocks.launch`."""
    return app.launch(
        theme=THEME, css=CSS, ssr_mode=False, footer_links=[], quiet=True, **settings
    )  # fmt: skip


def main() -> None:
    """Command line; see the module's docstring. On a Space, DATA and LABELS stand for options."""
    from firsthand.recipes.train_vision_modeling import load_samples

    parser = argparse.ArgumentParser(description="Judge expressions and masks by hand.")
    parser.add_argument("--data", default=os.environ.get("DATA"), help="grounded samples; scenes")
    parser.add_argument("--split", default=os.environ.get("SPLIT", "validation"))
    parser.add_argument("--labels", default=os.environ.get("LABELS", "labels.jsonl"))
    args = parser.parse_args()
    launch(build_app(load_samples(args.data, args.split), args.labels))


if __name__ == "__main__":
    main()

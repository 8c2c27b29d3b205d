"""`firsthand explain warn`: the chance that each object word of an answer is made up.

It reads the signals of `processing/evidence.py` for every noun of the answer and scores them with a
fitted warning: by default the demo model's, fitted on scenes; for another model make one with
`fit_warning.py`. The score is calibrated on scenes: on other images it ranks words, no more.

firsthand explain warn --image photo.jpg --question "Describe the image." --out warning
"""

from __future__ import annotations

import argparse
import html
import json
from pathlib import Path
from typing import Any

from firsthand.recipes.inputs import load_model, open_image

DEMO_WARNING = Path(__file__).parent / "demo_warning.json"
Span = tuple[int, int]


def run(args: argparse.Namespace) -> int:
    """Write warning.json and warning.html; print a line a word."""
    image = open_image(args.image)
    from firsthand.processing.warning import HallucinationWarning

    warning = HallucinationWarning.load(warning_file(args.model, args.warning))
    model, processor = load_model(args.model)
    from firsthand.processing.evidence import evidence

    answer = _answer(model, processor, image, args)
    spans = object_words(answer)
    if not spans:
        raise ValueError(f"There is no object word in the answer {answer!r}; nothing to judge.")
    found = evidence(model, processor, image, args.question, answer, spans)
    scores = warning.score(found).tolist()
    words = [
        {**word, "score": score, "warned": score >= warning.threshold}
        for word, score in zip(found, scores, strict=True)
    ]
    print(f"{args.question} -> {answer}")
    for word in words:
        print(
            f"  {word['text']:16} made up {word['score']:.2f}"
            f"  asked {word['yes_over_no']:+.1f}"
            f"  against blank {word['log_likelihood_ratio']:+.2f}"
            f"  visual contribution {word['visual_contribution']:.2f}"
            f"{'  warned' if word['warned'] else ''}"
        )
    out = Path(args.out)
    _write(out, image, args.question, answer, words, warning.threshold)
    print(f"page and numbers: {out}")
    return 0


def warning_file(model: str | None, given: str | None) -> Path:
    """The warning to read: the given one, or the demo model's for it; ValueError for others."""
    if given is None and model is not None:
        raise ValueError(
            f"The warning that ships was fitted for the demo model, not for {model}. Fit one with "
            f"`python -m firsthand.recipes.fit_warning --model {model} --out warning.json` and "
            "pass it as --warning."
        )
    return DEMO_WARNING if given is None else Path(given)


def _answer(model: Any, processor: Any, image: Any, args: argparse.Namespace) -> str:
    if args.answer is not None:
        return args.answer.strip()
    from firsthand.processing.answered import generated
    from firsthand.processing.generation import one_view

    asked = (model, one_view(processor), image, args.question)
    return generated(*asked, args.max_new_tokens).answer


def object_words(answer: str) -> list[Span]:
    """Characters of the nouns that name something visible, compounds whole: `traffic light`."""
    from firsthand.processing.key_expressions import compound_noun, noun_phrases

    found = []
    for start, end, head in noun_phrases(answer):
        noun = compound_noun(answer[start:end]) or head
        whole = answer[start:end].lower().endswith(noun)
        found.append((end - len(noun if whole else head), end))
    return found


def _write(
    out: Path, image: Any, question: str, answer: str, words: list[dict], threshold: float
) -> None:
    """The numbers, and a page with the marked answer and a heatmap for every word."""
    import numpy as np

    from firsthand.processing.overlays import heatmap
    from firsthand.recipes.demo_report import marked, picture, write_report

    out.mkdir(parents=True, exist_ok=True)
    kept = {"question": question, "answer": answer, "threshold": threshold, "words": words}
    (out / "warning.json").write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    shown = [{**word, "support": word["log_likelihood_ratio"]} for word in words]
    figures = "".join(
        f"<figure>{picture(heatmap(image, np.array(word.get('map', word['token_map']))))}"
        f"<figcaption>{html.escape(word['text'])}: made up {word['score']:.2f}"
        f"{', warned' if word['warned'] else ''}</figcaption></figure>"
        for word in words
    )
    body = (
        f'<div class="card">{picture(image)}<div class="say"><p>{marked(answer, shown)}</p>'
        f'<div class="maps">{figures}</div></div></div>'
    )
    text = f"Words with a chance of {threshold:.2f} or more of being made up are marked."
    lead = html.escape(question)
    write_report(out / "warning.html", "Which words are made up?", lead, [("Answer", text, body)])

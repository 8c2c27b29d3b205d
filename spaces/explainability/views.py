"""What the page shows, from a visitor's own state: HTML and pictures, no model.

Texts are escaped; what can be clicked carries its place as `data-at`, two numbers. Drawing on
images and charts are `firsthand.processing.overlays`'.

    conversation(turn, (0, 3), threshold=2.6); word_map(turn, (0, 3), "smooth", "resize")
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import numpy as np
import torch
from PIL import Image

from firsthand.processing.masks import Frame
from firsthand.processing.overlays import bars, colours, heatmap, strip_html
from firsthand.spaces.explainability.state import Reply, Turn, warned_words

WAITING = '<p class="hint">The conversation appears here. Click a word of an answer.</p>'
NOTHING = '<p class="hint">Ask a question first.</p>'
LISTED = 12  # words of the earlier answer in the chart
STEERED = "steered"
At = tuple[int, int]  # reply and word, or layer and head


def conversation(turn: Turn | None, chosen: At, threshold: float) -> str:
    """Earlier questions and answers, and the last one with its words to click, warnings in red."""
    if turn is None:
        return WAITING
    earlier = "".join(
        f'<div class="asked old">{escape(question)}</div><div class="said old">{escape(said)}</div>'
        for question, said in turn.earlier
    )
    said = "".join(_said(reply, i, chosen, threshold) for i, reply in enumerate(turn.replies))
    return (
        f'{earlier}<div class="asked">{escape(turn.question)}</div><div class="side">{said}</div>'
    )


def _said(reply: Reply, number: int, chosen: At, threshold: float) -> str:
    text, at, parts = reply.explanation.answer, 0, []
    warned, supports = warned_words(reply, threshold), reply.supports()
    for index, (start, end) in enumerate(reply.spans):
        kind = "word warning" if index in warned else "word"
        pressed = str((number, index) == chosen).lower()
        parts.append(
            f'{escape(text[at:start])}<button type="button" class="{kind}" '
            f'data-at="{number},{index}" aria-pressed="{pressed}" '
            f'title="support {supports[index]:.1f} nats">{escape(text[start:end])}</button>'
        )
        at = end
    notice = f'<div class="notice">{escape(reply.notice)}</div>' if reply.notice else ""
    name = f"{STEERED} by {reply.strength:g}" if reply.strength else "plain"
    return (
        f'<div class="said"><div class="arm">{name}</div>{"".join(parts)}{escape(text[at:])}'
        f"{notice}</div>"
    )


def word_map(turn: Turn, chosen: At, style: str, frame: Frame) -> Image.Image:
    """The map of a word over the image at the turn's layer; patches after the last layer."""
    reply, smooth = turn.replies[chosen[0]], style == "smooth"
    word, layers = reply.word(chosen[1]), reply.explanation.image_layers
    assert layers is not None
    grid = word.smooth_map if smooth else word.map
    if turn.layer < layers.shape[1]:
        grid = layers[_rows(reply, chosen[1]), turn.layer - 1].mean(0)
    return heatmap(turn.image, grid, smooth, frame=frame)


def _rows(reply: Reply, word: int) -> list[int]:
    """Where a word's tokens stand in the explanation."""
    return [reply.explanation.selected.index(token) for token in reply.tokens(word)]


def facts(turn: Turn, chosen: At) -> str:
    """What a word leans on besides the image, at the turn's layer, as a chart."""
    reply, index = turn.replies[chosen[0]], chosen[1]
    explanation, rows = reply.explanation, _rows(reply, index)
    word, support = reply.word(index), reply.supports()[index]
    question = _after(explanation.question_layers, rows, turn.layer)
    answer = _after(explanation.answer_layers, rows, turn.layer)
    labels = {
        f"{number} {text}": {"question": question[tokens].sum().item()}
        for number, (text, tokens) in enumerate(explanation.question_words, start=1)
    }
    before = [(number, answer[reply.tokens(number)].sum().item()) for number in range(index)]
    most = sorted(before, key=lambda one: -one[1])[:LISTED]
    for number, value in sorted(most):
        start, end = reply.spans[number]
        labels[f"{number + 1} {explanation.answer[start:end]} "] = {"earlier answer": value}
    if not labels:
        return NOTHING
    share = word_share(reply, rows, turn)
    title = f"{word.text}: {share:.0%} image"
    numbers = f"probability {word.probability:.0%}, support {round(support, 1) + 0:.1f} nats"
    return f'<p class="facts"><b>{escape(title)}</b>, {numbers}</p>{bars(labels)}'


def _after(layers: torch.Tensor | None, rows: list[int], layer: int) -> torch.Tensor:
    assert layers is not None
    return layers[rows, layer - 1].mean(0)


def contributions(reply: Reply, turn: Turn) -> torch.Tensor:
    """The image's part of each explained token's relevancy at the turn's layer, 0 to 1."""
    ratio = reply.explanation.contribution(turn.how)[:, turn.layer - 1]
    return torch.where(ratio.isinf(), 1.0, ratio / (1 + ratio))


def word_share(reply: Reply, rows: list[int], turn: Turn) -> float:
    """`contributions` of some rows, their mean."""
    return contributions(reply, turn)[rows].mean().item()


def strip(turn: Turn | None) -> str:
    """One chip an answer token, darker the more it leans on the image; pale ones are to come."""
    if turn is None:
        return NOTHING
    lines = []
    for reply in turn.replies:
        explanation, shares = reply.explanation, contributions(reply, turn).tolist()
        known = dict(zip(explanation.selected, shares, strict=True))
        tokens = [token.strip() or "·" for token in explanation.tokens]
        chips = strip_html(tokens, [known.get(i, 0.0) for i in range(len(tokens))])
        arm = STEERED if reply.strength else "plain"
        missing = len(reply.missing())
        state = f", {missing} tokens to come" if missing else ""
        lines.append(f'<div class="arm">{arm}{state}</div>{chips}')
    return "".join(lines)


def lens(turn: Turn | None, chosen: At, normed: bool) -> str:
    """What each layer would say at each token of the answer; the last layer stands on top."""
    if turn is None:
        return NOTHING
    reply = turn.replies[chosen[0]]
    found = reply.explanation
    texts = found.lens_normed if normed else found.lens_raw
    chances = found.lens_normed_probability if normed else found.lens_raw_probability
    assert texts is not None and chances is not None
    marked = set(reply.tokens(chosen[1]))
    head = "".join(
        f"<th{_mark(i in marked)}>{escape(token.strip() or '·')}</th>"
        for i, token in enumerate(found.tokens)
    )
    body = "".join(
        f"<tr><th>{layer or 'input'}</th>{_lens_row(texts[layer], chances[layer], marked)}</tr>"
        for layer in reversed(range(len(texts)))
    )
    return (
        f'<div class="scroll"><table class="lens"><thead><tr><th>layer</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _mark(marked: bool) -> str:
    return ' class="marked"' if marked else ""


def _lens_row(texts: Iterable[str], chances: torch.Tensor, marked: set[int]) -> str:
    cells = []
    for index, (text, chance) in enumerate(zip(texts, chances.tolist(), strict=True)):
        ink = "#ffffff" if chance > 0.55 else "#1c2230"
        cells.append(
            f'<td{_mark(index in marked)} title="{chance:.0%}" '
            f'style="background:rgba(22,82,120,{chance:.2f});color:{ink}">'
            f"{escape(text.strip()[:14] or '·')}</td>"
        )
    return "".join(cells)


def head_grid(turn: Turn | None, chosen: At, picked: At | None = None) -> str:
    """One cell a head, layers across; bright where the word's attention lies on the image."""
    if turn is None:
        return NOTHING
    reply = turn.replies[chosen[0]]
    if reply.heads is None:
        return '<p class="hint">Heads of this family cannot be laid over the image.</p>'
    shares = reply.heads[..., reply.tokens(chosen[1])].mean(-1).numpy()
    layers, heads = shares.shape
    paint = colours(shares / max(float(shares.max()), 1e-9))
    top = "".join(f"<th>{n if n % 5 == 0 else ''}</th>" for n in range(layers))
    rows = []
    for head in range(heads):
        cells = "".join(
            _head_cell(paint[layer, head], (layer, head), float(shares[layer, head]), picked)
            for layer in range(layers)
        )
        rows.append(f"<tr><th>{head}</th>{cells}</tr>")
    word = escape(reply.word_text(chosen[1]))
    return (
        f'<p class="facts">Attention of <b>{word}</b> to the image: layers across, heads down; '
        f"brightest {shares.max():.0%}. Click a cell.</p>"
        f'<div class="scroll"><table class="heads"><tr><th></th>{top}</tr>{"".join(rows)}</table>'
        "</div>"
    )


def _head_cell(colour: np.ndarray, at: At, share: float, picked: At | None) -> str:
    name = f"layer {at[0]}, head {at[1]}: {share:.1%} on the image"
    shade = "#{:02x}{:02x}{:02x}".format(*colour)
    return (
        f'<td><button type="button" data-at="{at[0]},{at[1]}" title="{name}" aria-label="{name}" '
        f'aria-pressed="{str(at == picked).lower()}" style="background:{shade}"></button></td>'
    )

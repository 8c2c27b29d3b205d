"""`firsthand steer fit|apply|contrast|fold|cut`: vectors, their effect, and what stays in weights.

firsthand steer fit --out vector                     # the demo model, from its validation scenes
firsthand steer apply --vector vector --image photo.jpg --strength 1.0
firsthand steer contrast --method vcd --image photo.jpg
firsthand steer fold --vector vector --strength 0.5 --out steered-model
firsthand steer cut --rank 4 --out edited-model
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from firsthand.datasets_scripts.scenes import scenes
from firsthand.processing.support import blank
from firsthand.recipes.demo_rows import swapped_caption
from firsthand.recipes.inputs import (
    keep_skipped,
    load_model,
    open_image,
    read_rows,
    usable_rows,
)

Row = dict[str, Any]
SIDES, KEYS = ("positive", "negative"), ("image", "question", "answer")


def scene_pairs(rows: Iterable[Row]) -> list[Row]:
    """One contrast pair a scene: its true caption with the image, and with a blank one.

    The direction is what seeing adds to saying the same words (the contrast that VaLSe, arXiv
    2505.17812, makes in the image, at its extreme).
    """
    pairs = []
    for row in rows:
        said = {"question": scenes.CAPTION_QUESTION, "answer": row["caption"]}
        image = row["image"].convert("RGB")
        seen, unseen = {**said, "image": image}, {**said, "image": blank(image)}
        pairs.append({"positive": seen, "negative": unseen})
    return pairs


def caption_pairs(rows: Iterable[Row], seed: int = 0) -> list[Row]:
    """One pair a scene: its caption, and the same with one object that the prior would expect."""
    draw, pairs = random.Random(seed), []
    for row in rows:
        image = row["image"].convert("RGB")
        said = (row["caption"], swapped_caption(row, draw))
        pairs.append(_pair(image, scenes.CAPTION_QUESTION, *said))
    return pairs


def conflict_pairs(rows: Iterable[Row], seed: int = 0) -> list[Row]:
    """CAS's two kinds of conflict for each scene, marked by `conflict`.

    "prior": what is seen against what usually goes with it; "context": what is seen against a
    claim in the question.
    """
    rows, draw = list(rows), random.Random(seed)
    pairs = [{**pair, "conflict": "prior"} for pair in caption_pairs(rows, seed)]
    for row in rows:
        present = {thing["noun"] for thing in row["objects"]}
        absent = draw.choice([noun for noun in scenes.NOUNS if noun not in present])
        claim = f"The image shows {scenes.with_article(absent)}. "
        question = claim + scenes.existence_question(absent)
        pair = _pair(row["image"].convert("RGB"), question, "No.", "Yes.")
        pairs.append({**pair, "conflict": "context"})
    return pairs


def _pair(image: Any, question: str, right: str, wrong: str) -> Row:
    said = {"image": image, "question": question}
    return {"positive": {**said, "answer": right}, "negative": {**said, "answer": wrong}}


class ReadRows(Sequence):
    """Rows of a JSONL file whose images are opened when a row is read; bad ones are left out.

    Args:
        path: the file; image paths are relative to it.
        sides: whether a row is a pair of sides, or one side itself.
        needed: keys of a side.

    Raises:
        ValueError: when no row can be used.
    """

    def __init__(self, path: str, sides: bool = True, needed: Sequence[str] = KEYS) -> None:
        self.folder, self.sides, self.needed = Path(path).parent, sides, needed
        rows = read_rows(path)
        self.rows: list[Row] = rows
        kept, self.skipped = usable_rows(range(len(rows)), self._problem)
        self.rows = [rows[number] for number in kept]

    def _problem(self, number: int) -> str | None:
        row = self.rows[number]
        for name, side in self._parts(row):
            missing = [key for key in self.needed if not side.get(key)]
            if missing:
                return f"{name} has no {', '.join(missing)}"
            open_image(self.folder / side["image"])
        return None

    def _parts(self, row: Row) -> list[tuple[str, Row]]:
        return [(side, row.get(side) or {}) for side in SIDES] if self.sides else [("it", row)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        opened = {
            name: {**side, "image": open_image(self.folder / side["image"])}
            for name, side in self._parts(row)
        }
        return {**row, **opened} if self.sides else opened["it"]


class _Chosen(Sequence):
    """Some rows of a sequence, in a new order, read when they are needed."""

    def __init__(self, rows: Sequence[Any], places: list[int]) -> None:
        self.rows, self.places = rows, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[self.places[index]]


def drawn(rows: Sequence[Any], count: int | None, seed: int) -> Sequence[Any]:
    """`count` rows drawn by a seed, in their own order; all of them where there are not more."""
    if count is None or count >= len(rows):
        return rows
    return _Chosen(rows, sorted(random.Random(seed).sample(range(len(rows)), count)))


def layers_of(text: str | None) -> list[int] | None:
    """Layers as the command line names them: 4-11, or 4,6,8; None for none named."""
    if text is None:
        return None
    try:
        if "-" in text:
            first, last = map(int, text.split("-"))
            return list(range(first, last + 1))
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers is {text!r}; write a range 4-11 or a list 4,6,8") from None


def run(args: argparse.Namespace) -> int:
    """What `args.action` says."""
    return {"fit": fit, "apply": apply, "contrast": contrast, "fold": fold, "cut": cut}[
        args.action
    ](args)


NEEDED = {"asked": ("image", "question"), "images": ("image",)}  # of rows that are no pairs


def _rows(args: argparse.Namespace, kind: str) -> Sequence[Any]:
    """Rows of --pairs, or of the demo's validation scenes; drawn by --count and --seed.

    `kind`: pairs "seen" (the contrast is in the image) or "captions" (in the answer); "asked"
    (image and question) or "images" alone.
    """
    from firsthand.recipes.demo_data import load_scenes

    if args.pairs:
        rows = ReadRows(args.pairs, kind not in NEEDED, NEEDED.get(kind, KEYS))
        keep_skipped(_work(args), rows.skipped, len(rows) + len(rows.skipped))
        return drawn(rows, args.count, args.seed)
    found = drawn(load_scenes("validation"), args.count, args.seed)
    if kind in NEEDED:
        return [{"image": r["image"], "question": scenes.CAPTION_QUESTION} for r in found]
    return scene_pairs(found) if kind == "seen" else caption_pairs(found, args.seed)


def _work(args: argparse.Namespace) -> Path:
    return Path(args.work or f"{args.out}-work")


IRRELEVANT = ("out", "work", "gate", "rank")  # options that no difference depends on


def _kept(args: argparse.Namespace, rows: Sequence[Any], name: str) -> Path:
    """The folder of finished batches: one for each choice of model, rows and settings."""
    chosen = {key: value for key, value in vars(args).items() if key not in IRRELEVANT}
    text = Path(args.pairs).read_bytes() if args.pairs else b""
    about = [chosen, len(rows), sha256(text).hexdigest()]
    key = sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    return _work(args) / f"{name}-{key[:16]}"


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before a model is loaded."""
    if args.count is not None and args.count < 1:
        raise ValueError(f"--count is {args.count}; it must be at least 1")
    if args.pairs and not Path(args.pairs).is_file():
        raise FileNotFoundError(f"{args.pairs}: no such file of rows")


def fit(args: argparse.Namespace) -> int:
    """Fit a vector and save it as a steering repo."""
    _check(args)
    if args.method == "vista" and not args.image:
        raise ValueError("--method vista fits one prompt: give it with --image and --question")
    layers = layers_of(args.layers)
    model, processor = load_model(args.model)
    makers = {"vista": _fit_vista, "vti": _fit_vti, "valse": _fit_valse, "cas": _fit_cas}
    vector = makers.get(args.method, _fit_pairs)(args, model, processor, layers)
    if args.gate is not None:
        vector = replace(vector, gate=args.gate)
    vector.save_pretrained(args.out)
    where = f"{len(vector.layers)} decoder and {len(vector.vision)} encoder layers"
    print(f"{vector.method} vector of {vector.pairs} pairs, {where}: {args.out}")
    return 0


def _fit_on(
    pairs: Any, args: argparse.Namespace, model: Any, processor: Any, layers: Any, name: str = ""
) -> Any:
    from firsthand.modeling import fit_steering

    size = 1 if args.method == "valse" else args.batch_size
    folder = _kept(args, pairs, f"{args.method}{name}")
    return fit_steering(
        model, processor, pairs, args.method, layers, size, folder=folder, seed=args.seed
    )


def _fit_pairs(args: argparse.Namespace, model: Any, processor: Any, layers: Any) -> Any:
    return _fit_on(_rows(args, "seen"), args, model, processor, layers)


def _fit_valse(args: argparse.Namespace, model: Any, processor: Any, layers: Any) -> Any:
    from firsthand.processing.steering_pairs import ValsePairs

    pairs = ValsePairs(
        model, processor, _rows(args, "asked"), args.threshold, args.noise_step, args.artefact,
        args.together, args.keep, args.seed,
    )  # fmt: skip
    vector = _fit_on(pairs, args, model, processor, layers)
    if pairs.left_out:
        skipped = [{"row": row, "reason": reason} for row, reason in pairs.left_out.items()]
        keep_skipped(_work(args), skipped, len(pairs))
    return vector


def _fit_vti(args: argparse.Namespace, model: Any, processor: Any, layers: Any) -> Any:
    from firsthand.modeling.steering_vision import fit_vti_vision

    vision = None
    if args.side in ("vision", "both"):
        rows = _rows(args, "captions" if args.side == "both" else "images")
        vision = fit_vti_vision(
            model, processor, _Images(rows), args.mask_ratio, args.trials, args.seed,
            folder=_kept(args, rows, "vti-vision"),
        )  # fmt: skip
    if args.side == "vision":
        return vision
    text = _fit_on(_rows(args, "captions"), args, model, processor, layers)
    return text if vision is None else text | vision


class _Images(Sequence):
    """The images of rows, or of the positive sides of pairs."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        return row.get("positive", row)["image"].convert("RGB")


def _fit_cas(args: argparse.Namespace, model: Any, processor: Any, layers: Any) -> Any:
    """The mean of the vectors of each kind of conflict."""
    from firsthand.recipes.demo_data import load_scenes

    if args.pairs:
        pairs = list(_rows(args, "captions"))
    else:
        pairs = conflict_pairs(drawn(load_scenes("validation"), args.count, args.seed), args.seed)
    kinds = sorted({pair.get("conflict", "given") for pair in pairs})
    vectors = []
    for kind in kinds:
        some = [pair for pair in pairs if pair.get("conflict", "given") == kind]
        vectors.append(_fit_on(some, args, model, processor, layers, f"-{kind}"))
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return replace(total * (1 / len(vectors)), pairs=len(pairs))


def _fit_vista(args: argparse.Namespace, model: Any, processor: Any, layers: Any) -> Any:
    from firsthand.modeling.steering_fit import fit_vista

    return fit_vista(model, processor, open_image(args.image), args.question, layers)


def _answer(args: argparse.Namespace, model: Any, processor: Any, **settings: Any) -> str:
    from firsthand.processing.generation import generate_answers

    row = {"id": "0", "image_id": "0", "image": open_image(args.image), "question": args.question}
    said = generate_answers(
        model, processor, [row], args.max_new_tokens, progress=False, **settings
    )
    return next(iter(said))["prediction"]


def apply(args: argparse.Namespace) -> int:
    """Print the plain and the steered answer."""
    from firsthand.modeling import SteeringVector, attach_steering
    from firsthand.modeling.early_logits import early_logits

    open_image(args.image)
    vector = SteeringVector.from_pretrained(args.vector)
    if args.gate is not None:
        vector = replace(vector, gate=args.gate)
    model, processor = load_model(args.model)
    print(f"plain:   {_answer(args, model, processor)}")
    with attach_steering(model, vector, args.strength) as steering, early_logits(model, args.early):
        answer = _answer(args, model, processor)
        print(f"steered: {answer}  (strength {steering.strength:g})")
    return 0


def contrast(args: argparse.Namespace) -> int:
    """Print the plain and the contrastively decoded answer."""
    from firsthand.processing.contrast_inputs import contrast_settings

    settings = contrast_settings(args.method, args.alpha, args.beta, args.seed)
    open_image(args.image)
    model, processor = load_model(args.model)
    print(f"plain: {_answer(args, model, processor)}")
    print(f"{args.method}: {_answer(args, model, processor, **settings)}")
    return 0


def fold(args: argparse.Namespace) -> int:
    """Write a stock checkpoint, with its processor, that is steered without any of our code."""
    from firsthand.modeling import SteeringVector, fold_steering

    vector = SteeringVector.from_pretrained(args.vector)
    model, processor = load_model(args.model)
    fold_steering(model, vector, args.strength).save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"{type(model).__name__} with {vector.method} folded in: {args.out}")
    return 0


def cut(args: argparse.Namespace) -> int:
    """Write a checkpoint without the directions that hallucinated answers take (Nullu)."""
    from firsthand.modeling.steering_fit import contrast_differences
    from firsthand.modeling.steering_weights import (
        cut_directions,
        hallucinated_directions,
        upper_half,
    )

    _check(args)
    chosen, pairs = layers_of(args.layers), _rows(args, "captions")
    model, processor = load_model(args.model)
    layers = chosen or upper_half(model)
    differences = contrast_differences(
        model, processor, pairs, layers, "layer", "all", args.batch_size,
        folder=_kept(args, pairs, "cut"),
    )  # fmt: skip
    basis = hallucinated_directions(differences, layers, args.rank)
    cut_directions(model, basis).save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(
        f"{args.rank} directions of {len(differences)} pairs cut, {len(layers)} layers: {args.out}"
    )
    return 0

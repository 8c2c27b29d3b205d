"""Object words of answers about scenes, with their evidence and whether the scene shows them.

What it is: where the hallucination warning's data comes from: the model's own captions, greedy or
drawn, or true captions with one object swapped, each object word labelled from the scene, exactly.
What it is not: a classifier (`processing/warning.py`). Finished captions are kept; the same call
goes on after a stop.

    words = labelled_words(work, model, processor, "test", load_scenes("test", 60), "own")

Every mention is a word of its own, also a second one of the same noun; it is true where the scene
shows the noun at all, as CHAIR counts.
"""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm.auto import tqdm

from firsthand.datasets_scripts.scenes import scenes
from firsthand.processing.evidence import evidence
from firsthand.processing.generation import generate_answers
from firsthand.recipes.demo_measure import LEXICON
from firsthand.recipes.demo_rows import caption_rows, swapped_caption
from firsthand.recipes.evaluate_demo_model import MAX_NEW_TOKENS
from firsthand.recipes.inputs import read_rows, write_rows

Source = Literal["own", "drawn", "swapped"]
TEMPERATURE = 1.0  # of drawn captions
BATCH = 16
Row = dict[str, Any]


def labelled_words(
    work: Path,
    model: Any,
    processor: Any,
    split: str,
    rows: list[Row],
    source: Source,
    seed: int = 0,
) -> list[Row]:
    """The object words of one caption a scene.

    Args:
        work: folder of finished captions; one folder for one model and one folder of scenes.
        model, processor: whose captions and whose evidence.
        split: the scenes' name, for files and rows.
        rows: the scenes.
        source: "own" (greedy), "drawn" (at temperature 1) or "swapped" (`swapped_caption`: the true
            caption with a likely absent noun in place of a true one).
        seed: of drawn and swapped captions.

    Returns:
        Rows of `evidence` with `split, source, scene, node, true`, in order. Captions without an
        object word give none; captions that cannot be read are left out, counted and kept in
        `skipped-*.jsonl` with their reason.
    """
    if source not in get_args(Source):
        raise ValueError(f"source is {source!r}; it must be one of {get_args(Source)}.")
    work.mkdir(parents=True, exist_ok=True)
    name = f"{split}-{source}-{seed}"
    captions = _captions(work / f"captions-{name}.jsonl", model, processor, rows, source, seed)
    file = work / f"words-{name}.jsonl"
    done = {row["scene"]: row for row in _finished(file)}
    with file.open("a", encoding="utf-8") as kept:
        for row in tqdm(rows, desc=f"words of {name}", unit="caption"):
            if row["id"] not in done:
                found = _caption_words(model, processor, row, captions[row["id"]])
                done[row["id"]] = {"scene": row["id"], **found}
                kept.write(json.dumps(done[row["id"]]) + "\n")
                kept.flush()
    chosen = [done[row["id"]] for row in rows]
    skipped = [{"scene": c["scene"], "reason": c["error"]} for c in chosen if c["error"]]
    if skipped:
        write_rows(work / f"skipped-{name}.jsonl", skipped)
        print(f"{len(skipped)} of {len(chosen)} captions are left out: see skipped-{name}.jsonl")
    about = {"split": split, "source": source}
    return [{**w, **about, "scene": c["scene"]} for c in chosen for w in c["words"]]


def _finished(file: Path) -> list[Row]:
    """What an earlier call finished; a last line that was cut off is dropped from the file."""
    if not file.exists():
        return []
    whole = file.read_text("utf-8")
    if not whole.endswith("\n"):
        file.write_text(whole[: whole.rfind("\n") + 1], "utf-8")
    return read_rows(file)


def _captions(
    file: Path, model: Any, processor: Any, rows: list[Row], source: str, seed: int
) -> dict[str, str]:
    """Scene id -> caption."""
    if source == "swapped":
        return {r["id"]: swapped_caption(r, random.Random(f"{seed}/{r['id']}")) for r in rows}
    known = {row["image_id"]: row["prediction"] for row in _finished(file)}
    asked = [row for row in caption_rows(rows) if row["image_id"] not in known]
    if source == "drawn":
        asked = [{**row, "seed": f"{seed}/{row['image_id']}"} for row in asked]
    with file.open("a", encoding="utf-8") as kept:
        answers = generate_answers(
            model, processor, asked, MAX_NEW_TOKENS, BATCH, done=partial(_keep, kept),
            temperature=TEMPERATURE,
        )  # fmt: skip
        known |= {row["image_id"]: row.get("prediction", "") for row in answers}
    return known


def _keep(file: Any, row: Row, text: str) -> None:
    file.write(json.dumps({"image_id": row["image_id"], "prediction": text}) + "\n")
    file.flush()


def _caption_words(model: Any, processor: Any, row: Row, caption: str) -> Row:
    """`{caption, words, error}`: the evidence of each object word, or why there is none."""
    shown = {o["noun"] for o in row["objects"]}
    mentions = LEXICON.mentions(caption)
    spans = [(m.start, m.end) for m in mentions]
    image, question = row["image"].convert("RGB"), scenes.CAPTION_QUESTION
    try:
        found = evidence(model, processor, image, question, caption, spans)
    except ValueError as error:
        return {"caption": caption, "words": [], "error": str(error)}
    labelled = [
        {**word, "node": m.node, "true": m.node in shown}
        for word, m in zip(found, mentions, strict=True)
    ]
    return {"caption": caption, "words": labelled, "error": None}

"""FiVL's evaluation sets from your copies of VQAv2, GQA and POPE: as conversations to augment.

What it is: the published question files -> LLaVA-format records, which `firsthand augment fivl`
gives key expressions and regions, and `firsthand measure visual-reliance` asks. What it is not: a
download; questions, annotations and images stay yours, under their own licences.

    python -m firsthand.recipes.build_reliance_sets vqav2 --questions questions.json \
        --annotations annotations.json --out vqav2.jsonl --answers vqav2_answers.json
    firsthand augment fivl --data vqav2.jsonl --images val2014 --out fivl_vqav2
    firsthand measure visual-reliance --data fivl_vqav2/data --answers vqav2_answers.json \
        --predictions answers.jsonl --out results.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firsthand.recipes.inputs import read_rows, write_rows

BENCHMARKS = ("vqav2", "gqa", "pope")
Question = dict[str, Any]  # id, image, question, answer and, of VQAv2, answers


def vqav2(questions: Path, annotations: Path | None) -> Iterator[Question]:
    """VQAv2's `{questions: [...]}` and `{annotations: [...]}`, joined by question_id.

    The image of COCO's split S is `COCO_S_<12 digits>.jpg`.
    """
    if annotations is None:
        raise ValueError("vqav2 keeps its answers in a file of their own: give --annotations")
    asked, said = _json(questions), _json(annotations)
    answers = {a["question_id"]: a for a in _list(said, "annotations", annotations)}
    split = asked.get("data_subtype") or "val2014"
    for one in _list(asked, "questions", questions):
        answer = answers.get(one["question_id"])
        if answer is not None:
            yield {
                "id": str(one["question_id"]),
                "image": f"COCO_{split}_{int(one['image_id']):012d}.jpg",
                "question": one["question"],
                "answer": answer["multiple_choice_answer"],
                "answers": [a["answer"] for a in answer["answers"]],
            }


def gqa(questions: Path, annotations: Path | None) -> Iterator[Question]:
    """GQA's `{id: {imageId, question, answer}}`; the image is `<imageId>.jpg`."""
    asked = _json(questions)
    if not isinstance(asked, dict):
        raise ValueError(f"{questions} is no GQA file: it holds a {type(asked).__name__}")
    for name, one in asked.items():
        yield {
            "id": str(name),
            "image": f"{one['imageId']}.jpg",
            "question": one["question"],
            "answer": one["answer"],
        }


def pope(questions: Path, annotations: Path | None) -> Iterator[Question]:
    """POPE's lines of `{question_id, image, text, label}`."""
    for one in read_rows(questions):
        yield {
            "id": str(one["question_id"]),
            "image": one["image"],
            "question": one["text"],
            "answer": one["label"],
        }


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _list(content: Any, key: str, path: Path) -> list[dict[str, Any]]:
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f"{path} has no list {key!r}: it is not VQAv2's file of {key}")
    return content[key]


def record(one: Question, source: str) -> dict[str, Any]:
    """A LLaVA-format record of a question with its answer."""
    return {
        "id": one["id"],
        "image": one["image"],
        "source": source,
        "conversations": [
            {"from": "human", "value": f"<image>\n{one['question']}"},
            {"from": "gpt", "value": one["answer"]},
        ],
    }


def build(benchmark: str, questions: Path, annotations: Path | None) -> list[Question]:
    """The questions of a benchmark.

    Raises:
        ValueError: for files of another layout, or without questions; a missing field is named.
    """
    read = {"vqav2": vqav2, "gqa": gqa, "pope": pope}[benchmark]
    try:
        found = list(read(questions, annotations))
    except KeyError as missing:
        raise ValueError(
            f"{questions}: a question has no {missing}; is it {benchmark}'s?"
        ) from None
    if not found:
        raise ValueError(f"{questions} holds no answered question of {benchmark}")
    return found


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Question files as conversations to augment.")
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, help="VQAv2's answers")
    parser.add_argument("--out", type=Path, required=True, help="JSONL of records")
    parser.add_argument("--answers", type=Path, help="JSON {id: [answer, ...]}, of VQAv2")
    args = parser.parse_args(argv)
    try:
        found = build(args.benchmark, args.questions, args.annotations)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    write_rows(args.out, [record(one, args.benchmark) for one in found])
    if args.answers:
        accepted = {one["id"]: one["answers"] for one in found if "answers" in one}
        args.answers.write_text(json.dumps(accepted), "utf-8")
    print(f"{len(found)} questions")


if __name__ == "__main__":
    main()

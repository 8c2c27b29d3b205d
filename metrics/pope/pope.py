"""POPE as an `evaluate` module: a thin face of `scoring.score`.

Call: `evaluate.load("metrics/pope").compute(predictions=answers, references=gold)`.
"""

import datasets
import evaluate

from .questions import build_questions
from .scoring import PARSER_NAMES, score

__all__ = ["Pope", "build_questions"]

_DESCRIPTION = "Accuracy and yes-bias of answers to questions whether an object is in an image."
_CITATION = """\
@inproceedings{li2023evaluating,
  title={Evaluating Object Hallucination in Large Vision-Language Models},
  author={Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and
          Wen, Ji-Rong},
  booktitle={EMNLP},
  year={2023}
}"""
_INPUTS = f"""\
predictions: answers, a list of strings
references: for each answer "yes" or "no"
parser: how answers are read, one of {", ".join(PARSER_NAMES)}; default: strict"""


class Pope(evaluate.Metric):
    """All figures in 0..1; higher is better, except pope_yes_ratio (near 0.5 if balanced)."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2305.10355"],
        )

    def _compute(self, predictions, references, parser="strict"):
        rows = [
            {"id": i, "prediction": said, "answer": gold}
            for i, (said, gold) in enumerate(zip(predictions, references, strict=True))
        ]
        return score(rows, parser)

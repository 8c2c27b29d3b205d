"""GAVIE with a prompt of our own as an `evaluate` module: a thin face of `scoring`.

Call: `evaluate.load("metrics/gavie").compute(predictions=answers, questions=instructions,
regions=dense_captions, judge=judge)`; or `replies=` what a judge said.
"""

import datasets
import evaluate

from .prompts import PROMPT_HASH
from .replies import parse
from .scoring import rate, score

__all__ = ["PROMPT_HASH", "Gavie", "parse"]

_DESCRIPTION = "A judge's marks, 0 to 10, of how relevant and how accurate answers on images are."
_CITATION = """\
@article{liu2023mitigating,
  title={Mitigating Hallucination in Large Multi-Modal Models via Robust Instruction Tuning},
  author={Liu, Fuxiao and Lin, Kevin and Li, Linjie and Wang, Jianfeng and Yacoob, Yaser and
          Wang, Lijuan},
  journal={arXiv preprint arXiv:2306.14565},
  year={2023}
}"""
_INPUTS = """\
predictions: answers to mark, a list of strings
questions: the instruction of each
regions: for each the dense captions of its image, {caption, bbox: [x, y, width, height]}
judge: a function, lists of chat messages -> a reply each; or a list of them, one a sample; or
replies: what a judge said of each answer
bbox_format: "fixed", or "legacy" for the original's boxes, whose height is their width"""


class Gavie(evaluate.Metric):
    """gavie_relevance and gavie_accuracy are in 0..10, higher is better."""

    def _info(self):
        text = datasets.Value("string")
        region = {"caption": text, "bbox": datasets.List(datasets.Value("float64"))}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": text, "questions": text, "regions": datasets.List(region)}
            ),
            reference_urls=["https://arxiv.org/abs/2306.14565"],
        )

    def _compute(
        self, predictions, questions, regions, judge=None, replies=None, bbox_format="fixed"
    ):
        if (judge is None) == (replies is None):
            raise ValueError("Give a judge (a function), or replies (what a judge said): one.")
        names = ("question", "prediction", "regions")
        columns = zip(questions, predictions, regions, strict=True)
        rows = [
            {"id": i} | dict(zip(names, values, strict=True)) for i, values in enumerate(columns)
        ]
        judges = [judge or (lambda requests: replies)] if not isinstance(judge, list) else judge
        return score(rate(rows, judges, bbox_format))

"""Mementos as an `evaluate` module: a thin face of `scoring.score`.

Call: `evaluate.load("metrics/mementos").compute(predictions=descriptions, references=references,
keywords={"objects": [["dog"]], "behaviours": [["run", "running"]]})`.
"""

import datasets
import evaluate

from .scoring import score

_DESCRIPTION = "Objects and behaviours that descriptions of image sequences tell of, as sets."
_CITATION = """\
@inproceedings{wang2024mementos,
  title={Mementos: A Comprehensive Benchmark for Multimodal Large Language Model Reasoning over
         Image Sequences},
  author={Wang, Xiyao and Zhou, Yuhang and Liu, Xiaoyu and Lu, Hongjin and Xu, Yuancheng and
          He, Feihong and Yoon, Jaehong and Lu, Taixi and Liu, Fuxiao and Bertasius, Gedas and
          Bansal, Mohit and Yao, Huaxiu and Huang, Furong},
  booktitle={ACL},
  year={2024}
}"""
_INPUTS = """\
predictions: descriptions, a list of strings
references: the reference description of each
keywords: {"objects": groups, "behaviours": groups}, a group being a list of synonyms
details: whether to return each image's keywords"""


class Mementos(evaluate.Metric):
    """Precision, recall and F1 of objects and of behaviours; all in 0..1, higher is better."""

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
            reference_urls=["https://arxiv.org/abs/2401.10529"],
        )

    def _compute(self, predictions, references, keywords, details=False):
        rows = [{"id": i, "image_id": i, "prediction": text} for i, text in enumerate(predictions)]
        return score(rows, dict(enumerate(references)), keywords, details=details)

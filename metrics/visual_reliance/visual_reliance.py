"""Visual reliance as an `evaluate` module: a thin face of `scoring.score`.

Call: `evaluate.load("metrics/visual_reliance").compute(predictions=..., masked_predictions=...,
references=...)`.
"""

import datasets
import evaluate

from .scoring import score

_DESCRIPTION = "The share of a score that is lost when the regions that matter are removed."
_CITATION = """\
@article{fivl2024,
  title={FiVL: A Framework for Improved Vision-Language Alignment},
  year={2024},
  journal={arXiv preprint arXiv:2412.14672}
}"""
_INPUTS = """\
predictions: answers to the images as they are, a list of strings
masked_predictions: answers to the images without their key regions
references: right answers
control_predictions: answers without regions of equal area elsewhere; optional
outside_predictions: answers to the key regions alone; optional
blank_predictions: answers to blank images; optional"""


class VisualReliance(evaluate.Metric):
    """visual_reliance is at most 1; higher: the answers rely more on the key regions."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "masked_predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2412.14672"],
        )

    def _compute(
        self,
        predictions,
        references,
        masked_predictions,
        control_predictions=None,
        outside_predictions=None,
        blank_predictions=None,
    ):
        views = {
            "plain": predictions,
            "masked": masked_predictions,
            "control": control_predictions,
            "outside": outside_predictions,
            "blank": blank_predictions,
        }
        return score(
            {"id": i, "condition": condition, "prediction": said, "answer": gold}
            for condition, answers in views.items()
            if answers is not None
            for i, (said, gold) in enumerate(zip(answers, references, strict=True))
        )

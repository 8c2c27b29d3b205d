"""AMBER by exact words as an `evaluate` module: a thin face of `scoring.score`.

Call: `evaluate.load("metrics/amber").compute(predictions=responses, references=ids,
data="AMBER/data")`.
"""

import datasets
import evaluate

from .scoring import score
from .truth import make_truth, read_truth

_DESCRIPTION = "What descriptions invent and cover, and how yes/no questions are answered."
_CITATION = """\
@article{wang2023amber,
  title={AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation},
  author={Wang, Junyang and Wang, Yuhang and Xu, Guohai and Zhang, Jing and Gu, Yukai and
          Jia, Haitao and Wang, Jiaqi and Xu, Haiyang and Yan, Ming and Zhang, Ji and Sang, Jitao},
  journal={arXiv preprint arXiv:2311.07397},
  year={2023}
}"""
_INPUTS = """\
predictions: responses, a list of strings
references: AMBER's id of each
data: AMBER's folder `data`, or {"annotations": [...], "relation": {...}, "safe_words": [...]}
details: whether to return every counted word with its span"""


class Amber(evaluate.Metric):
    """All in 0..1; lower is better for amber_chair, amber_hal, amber_cog; higher for the others."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("int64"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2311.07397"],
        )

    def _compute(self, predictions, references, data, details=False):
        truth = make_truth(**data) if isinstance(data, dict) else read_truth(data)
        rows = [
            {"id": i, "prediction": said} for i, said in zip(references, predictions, strict=True)
        ]
        return score(rows, truth, details=details)

"""MMHal with a prompt of our own as an `evaluate` module: a thin face of `scoring`.

Call: `evaluate.load("metrics/mmhal").compute(predictions=answers, references=good_answers,
questions=questions, judge=judge)`; or `replies=` what a judge said.
"""

import datasets
import evaluate

from .scoring import rate, score

_DESCRIPTION = "A judge's mean rating of answers about images, and how many hold something made up."
_CITATION = """\
@article{sun2023aligning,
  title={Aligning Large Multimodal Models with Factually Augmented RLHF},
  author={Sun, Zhiqing and Shen, Sheng and Cao, Shengcao and Liu, Haotian and Li, Chunyuan and
          Shen, Yikang and Gan, Chuang and Gui, Liang-Yan and Wang, Yu-Xiong and Yang, Yiming and
          Keutzer, Kurt and Darrell, Trevor},
  journal={arXiv preprint arXiv:2309.14525},
  year={2023}
}"""
_INPUTS = """\
predictions: answers to check, a list of strings
references: a good answer for each
questions: the question of each
contents: for each the names of what its image shows; optional
question_types: the type of each question; optional
judge: a function, lists of chat messages -> a reply each; or
replies: what a judge said of each answer"""


class Mmhal(evaluate.Metric):
    """mmhal_score is in 0..6, higher is better; mmhal_hallucination_rate in 0..1, lower."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                    "questions": datasets.Value("string"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2309.14525"],
        )

    def _compute(
        self,
        predictions,
        references,
        questions,
        contents=None,
        question_types=None,
        judge=None,
        replies=None,
    ):
        if (judge is None) == (replies is None):
            raise ValueError("Give a judge (a function), or replies (what a judge said): one.")
        none = [None] * len(predictions)
        columns = (questions, references, predictions, contents or none, question_types or none)
        names = ("question", "answer", "prediction", "content", "question_type")
        rows = [
            {"id": i} | dict(zip(names, values, strict=True))
            for i, values in enumerate(zip(*columns, strict=True))
        ]
        return score(rate(rows, judge or (lambda requests: replies)))

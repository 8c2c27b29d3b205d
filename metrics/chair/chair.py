"""CHAIR as an `evaluate` module: a thin face of `scoring.score`.

Call: `evaluate.load("metrics/chair").compute(predictions=captions, references=objects)`.
"""

import datasets
import evaluate

from .coco import COCO
from .lexicon import lexicon_from_nouns
from .scoring import score

_DESCRIPTION = "The share of objects that captions mention and their images do not show."
_CITATION = """\
@inproceedings{rohrbach2018object,
  title={Object Hallucination in Image Captioning},
  author={Rohrbach, Anna and Hendricks, Lisa Anne and Burns, Kaylee and Darrell, Trevor and
  Saenko, Kate}, booktitle={EMNLP},
  year={2018}
}"""
_INPUTS = """\
predictions: captions, a list of strings
references: for each caption the names of the objects its image shows
nouns: the objects that count; default: the 80 COCO objects under CHAIR's own word list
synonyms: noun -> further terms, with `nouns` only
details: whether to return every counted word with its span"""


class Chair(evaluate.Metric):
    """Lower is better for chair_s and chair_i, higher for recall; all in 0..1."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": [datasets.Value("string")],
                }
            ),
            reference_urls=["https://arxiv.org/abs/1809.02156"],
        )

    def _compute(self, predictions, references, nouns=None, synonyms=None, details=False):
        lexicon = COCO if nouns is None else lexicon_from_nouns(nouns, synonyms)
        rows = [{"id": i, "image_id": i, "prediction": text} for i, text in enumerate(predictions)]
        return score(rows, dict(enumerate(references)), lexicon, details)

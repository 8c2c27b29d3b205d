"""CHAIR as an `evaluate` module: a thin face of `scoring.score`.

Call: `evaluate.load("metrics/chair").compute(predictions=captions, references=objects)`.
"""

import datasets
import evaluate

from .coco import COCO
from .lexicon import lexicon_from_nouns
from .opera import nltk_tools
from .scoring import score
from .truth import objects_from_coco
from .variants import VARIANTS

__all__ = ["Chair", "nltk_tools", "objects_from_coco"]

_DESCRIPTION = "The share of objects that captions mention and their images do not show."
_CITATION = """\
@inproceedings{rohrbach2018object,
  title={Object Hallucination in Image Captioning},
  author={Rohrbach, Anna and Hendricks, Lisa Anne and Burns, Kaylee and Darrell, Trevor and
  Saenko, Kate}, booktitle={EMNLP},
  year={2018}
}"""
_INPUTS = f"""\
predictions: captions, a list of strings
references: for each caption the names of the objects its image shows
nouns: the objects that count; default: the 80 COCO objects under CHAIR's own word list
synonyms: noun -> further terms, with `nouns` only
variant: whose word list and counting to follow, one of {", ".join(VARIANTS)}; not with `nouns`
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

    def _compute(
        self,
        predictions,
        references,
        nouns=None,
        synonyms=None,
        details=False,
        variant="original",
    ):
        lexicon = COCO if nouns is None else lexicon_from_nouns(nouns, synonyms)
        rows = [{"id": i, "image_id": i, "prediction": text} for i, text in enumerate(predictions)]
        return score(rows, dict(enumerate(references)), lexicon, details, variant)

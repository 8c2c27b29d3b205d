"""Contrast pairs in the manner of VaLSe: what an answer looked at, against the whole image.

What it is: a reconstruction of the published description (arXiv 2505.17812; its code and settings
are not public), every choice a parameter: which words are visual (log-likelihood ratio under a
noised image), where they look (relevancy, less what words without an image look at), and an image
that keeps only that. What it is not: the fit (`modeling/steering_fit.py`, method "valse").

    pairs = ValsePairs(model, processor, rows)
    vector = fit_steering(model, processor, pairs, method="valse", batch_size=1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from firsthand.modeling.explanation import tokens_within
from firsthand.modeling.families import unwrap
from firsthand.modeling.relevancy import explain
from firsthand.processing.answered import forced, generated
from firsthand.processing.contrast_inputs import NOISE_STEP, diffused
from firsthand.processing.masks import frame_of
from firsthand.processing.overlays import cell_labels
from firsthand.processing.perturb import mean_colour, perturb

Artefact = Literal["median", "none"]


class ValsePairs(Sequence):
    """A pair a row, made when it is read; None where it cannot be, with the reason in `left_out`.

    Positive is the image with the least relevant cells filled, negative the whole image, both with
    the same question and answer.

    Args:
        model, processor: a model that `explain` covers.
        rows: `image` (PIL), `question`, and `answer` unless the model is to answer itself.
        threshold: nats of log-likelihood ratio from which a token is visual; where none is, the
            highest one is taken.
        noise_step: 1 to 1000 steps of diffusion on the other image of the ratio.
        artefact: "median" subtracts the median map of the tokens that are not visual, "none"
            nothing.
        together: how visual tokens' maps are joined, "max" or "mean".
        keep: share of cells (patches, where relevancy reaches them) that is kept, in (0, 1).
        seed: of the noise.
        max_new_tokens: of the model's own answer.

    Raises:
        ValueError: for values outside of these.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        rows: Sequence[Mapping[str, Any]],
        threshold: float = 1.0,
        noise_step: int = NOISE_STEP,
        artefact: Artefact = "median",
        together: Literal["max", "mean"] = "max",
        keep: float = 0.5,
        seed: int = 0,
        max_new_tokens: int = 64,
    ) -> None:
        if not 0 < keep < 1 or not 1 <= noise_step <= 1000:
            raise ValueError(
                f"keep is {keep} and noise_step {noise_step}; they must lie in (0, 1) and 1 to 1000"
            )
        if artefact not in ("median", "none") or together not in ("max", "mean"):
            raise ValueError(
                f"artefact is {artefact!r} and together {together!r}; they must be one of median, "
                "none and one of max, mean"
            )
        self.model, self.processor, self.rows = model, processor, rows
        self.threshold, self.noise_step, self.keep = threshold, noise_step, keep
        self.artefact, self.together = artefact, together
        self.seed, self.max_new_tokens = seed, max_new_tokens
        self.left_out: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        image, question = row["image"].convert("RGB"), row["question"]
        try:
            answer = row.get("answer") or self._answer(image, question)
            relevant = self.relevant(image, question, answer)
        except ValueError as error:
            self.left_out[index] = str(error)
            return None
        region = ~relevant
        kept = perturb(image, region, "mean", colour=mean_colour(self.processor))
        said = {"question": question, "answer": answer}
        return {"positive": {**said, "image": kept}, "negative": {**said, "image": image}}

    def _answer(self, image: Image.Image, question: str) -> str:
        asked = generated(self.model, self.processor, image, question, self.max_new_tokens)
        return asked.answer

    def relevant(self, image: Image.Image, question: str, answer: str) -> np.ndarray:
        """Bool [H, W]: the pixels of the cells that the answer's visual tokens look at most."""
        spans = self.visual_spans(image, question, answer)
        explanation = explain(self.model, self.processor, image, question, answer)
        visual = {i for span in spans for i in tokens_within(explanation.spans, *span)}
        maps = explanation.image if explanation.patches is None else explanation.patches
        cells = relevant_cells(maps, sorted(visual), self.artefact, self.together, self.keep)
        labels = cell_labels(cells.int(), image.size, frame_of(self.processor))
        return labels == 1

    @torch.inference_mode()
    def visual_spans(self, image: Image.Image, question: str, answer: str) -> list[tuple[int, int]]:
        """Characters of the answer's visual tokens: never empty."""
        asked = forced(self.model, self.processor, image, question, answer)
        inner: Any = unwrap(self.model)
        count = len(asked.spans)
        tokens = asked.inputs["input_ids"][0, asked.first : asked.first + count]

        def chances(inputs: Any) -> torch.Tensor:
            logits = inner(**inputs).logits[0, asked.first - 1 : asked.first - 1 + count]
            return logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0].cpu()

        pixels = asked.inputs["pixel_values"]
        noised = {**asked.inputs, "pixel_values": diffused(pixels, self.seed, self.noise_step)}
        ratios = chances(asked.inputs) - chances(noised)
        wordless = [not any(c.isalnum() for c in answer[a:b]) for a, b in asked.spans]
        ratios[torch.tensor(wordless)] = -torch.inf
        chosen = [i for i, ratio in enumerate(ratios.tolist()) if ratio > self.threshold]
        return [asked.spans[i] for i in chosen or [int(ratios.argmax())]]


def relevant_cells(
    maps: torch.Tensor, visual: list[int], artefact: str, together: str, keep: float
) -> torch.Tensor:
    """Bool [R, C]: the `keep` share of cells with most relevancy to visual tokens.

    Args:
        maps: [A, R, C] relevancy of all tokens of an answer, >= 0.
        visual: which of them are visual.
        artefact, together, keep: as in `ValsePairs`.
    """
    shares = maps / maps.sum((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    others = [i for i in range(len(maps)) if i not in visual]
    chosen = shares[visual]
    if artefact == "median" and others:
        chosen = (chosen - shares[others].median(0).values).clamp_min(0)
    joined = chosen.amax(0) if together == "max" else chosen.mean(0)
    count = max(1, round(keep * joined.numel()))
    cells = torch.zeros(joined.numel(), dtype=torch.bool)
    cells[joined.flatten().topk(count).indices] = True
    return cells.view(joined.shape)

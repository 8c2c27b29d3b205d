"""Segmenters that read phrases: SAM 3, and a grounded detector with a SAM behind it.

What it is: published models behind `Segmenter`, most of them as transformers has them. All phrases
of an image go into one text ("a dog. the ball."), and boxes return to phrases by the text's tokens.
What it is not: image processing of its own beyond squashing: SAM 2's and SAM 3's processors need
torchvision, and all they do to an image is to squash and normalise it.

    load("grounding-dino+sam").segment(image, ["a dog", "the ball"])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from firsthand.processing.segmenters import Box, Segment, unite

PUBLISHED = {
    "sam3": ("facebook/sam3", ""),
    "grounding-dino+sam": ("IDEA-Research/grounding-dino-tiny", "facebook/sam-vit-huge"),
    "mm-grounding-dino+sam2": (
        "openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det",
        "facebook/sam2.1-hiera-large",
    ),
    "grounding-dino+segment-anything": ("IDEA-Research/grounding-dino-tiny", ""),
}
BOX_THRESHOLD = 0.2  # FiVL's production value
SAM3_THRESHOLD = 0.3
SAME_BOX = 0.95  # IoU from which two boxes get one mask, as in FiVL
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Found(NamedTuple):
    """A detection: for which phrase (its number), where, and how sure (0 to 1)."""

    phrase: int
    box: Box
    score: float


def load(
    name: str,
    model: str | None = None,
    detector: str | None = None,
    mask_model: str | None = None,
    threshold: float | None = None,
) -> Any:
    """A segmenter with pretrained weights from the Hub or a folder; see `load_segmenter`."""
    import transformers

    first, second = PUBLISHED[name]
    if name == "sam3":
        from transformers.models.sam3.modeling_sam3 import Sam3Model

        source = model or first
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        net = Sam3Model.from_pretrained(source)
        return Sam3(net, tokenizer, threshold or SAM3_THRESHOLD)
    find = GroundingDetector(
        transformers.AutoModelForZeroShotObjectDetection.from_pretrained(detector or first),
        transformers.AutoProcessor.from_pretrained(detector or first),
        threshold or BOX_THRESHOLD,
    )
    source = mask_model or second
    if name.endswith("+sam2"):
        from transformers.models.sam2.modeling_sam2 import Sam2Model

        return Detected(name, find, Sam2Masks(Sam2Model.from_pretrained(source)))
    if name.endswith("+sam"):
        sam = transformers.SamModel.from_pretrained(source)
        processor = transformers.SamProcessor.from_pretrained(source)
        return Detected(name, find, SamMasks(sam, processor))
    return Detected(name, find, SegmentAnythingMasks(load_segment_anything(source)))


class Detected:
    """A detector of phrases, and a model that turns its boxes into masks."""

    def __init__(self, name: str, detector: Any, masks: Any) -> None:
        self.name, self.detector, self.masks = name, detector, masks

    def segment(self, image: Image.Image, phrases: Sequence[str]) -> list[Segment | None]:
        """As `Segmenter` says; a score is the best box's."""
        found = self.detector(image, phrases) if phrases else []
        boxes, place = unique_boxes([one.box for one in found])
        drawn = self.masks(image, boxes) if boxes else []
        out: list[Segment | None] = []
        for number in range(len(phrases)):
            own = [i for i, one in enumerate(found) if one.phrase == number]
            pieces = [drawn[place[i]] for i in own]
            if pieces:
                where = [boxes[place[i]] for i in own]
                out.append(unite(pieces, where, [found[i].score for i in own]))
            else:
                out.append(None)
        return out


def unique_boxes(boxes: Sequence[Box], iou: float = SAME_BOX) -> tuple[list[Box], list[int]]:
    """Boxes of which none overlaps another by more than `iou`, and which of them each one became.

    The first of two equal boxes stays (FiVL's de-duplication across phrases).
    """
    kept: list[Box] = []
    place = []
    for box in boxes:
        same = next((i for i, other in enumerate(kept) if box_iou(box, other) > iou), len(kept))
        if same == len(kept):
            kept.append(box)
        place.append(same)
    return kept, place


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes; 0 where both are empty."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0


class GroundingDetector:
    """Grounding DINO, or MM Grounding DINO, on all phrases of an image at once.

    Args:
        model: `GroundingDinoForObjectDetection` or `MMGroundingDinoForObjectDetection`.
        processor: its `GroundingDinoProcessor`, with a fast tokenizer.
        threshold: a box belongs to each phrase for which its best token reaches this, 0..1.
    """

    def __init__(self, model: Any, processor: Any, threshold: float = BOX_THRESHOLD) -> None:
        self.model, self.processor, self.threshold = model.eval(), processor, threshold

    @torch.inference_mode()
    def __call__(self, image: Image.Image, phrases: Sequence[str]) -> list[Found]:
        """Detections, best first; phrases that do not fit into one text share further passes."""
        found: list[Found] = []
        for start, text, spans in self._texts(phrases):
            inputs = self.processor(images=image.convert("RGB"), text=text, return_tensors="pt").to(
                self.model.device
            )
            offsets = self.processor.tokenizer(text)
            outputs = self.model(**inputs)
            score = outputs.logits[0].float().sigmoid().cpu()
            boxes = _corners(outputs.pred_boxes[0].float().cpu(), image.size)
            for number, span in enumerate(spans, start):
                tokens = sorted({t for c in range(*span) if (t := offsets.char_to_token(c))})
                best = score[:, tokens].amax(-1)
                kept = (best > self.threshold).nonzero()[:, 0].tolist()
                found += [Found(number, boxes[i], float(best[i])) for i in kept]
        return sorted(found, key=lambda one: -one.score)

    def _texts(self, phrases: Sequence[str]) -> list[tuple[int, str, list[tuple[int, int]]]]:
        """Texts of at most `max_text_len` tokens: first phrase, text, each phrase's characters."""
        limit, texts = self.model.config.max_text_len, []
        start, text = 0, ""
        spans: list[tuple[int, int]] = []
        for number, phrase in enumerate(phrases):
            clean = " ".join(phrase.lower().replace(".", " ").split())
            longer = f"{text} {clean}.".strip()
            if spans and len(self.processor.tokenizer(longer).input_ids) > limit:
                texts.append((start, text, spans))
                start, spans, longer = number, [], f"{clean}."
            text = longer
            spans = [*spans, (len(text) - 1 - len(clean), len(text) - 1)]
        return [*texts, (start, text, spans)]


def _corners(boxes: torch.Tensor, size: tuple[int, int]) -> list[Box]:
    """Boxes (centre, width, height in 0..1) as corners in pixels, cut at the image's edges."""
    centre, extent = boxes[:, :2], boxes[:, 2:]
    scale = torch.tensor(size, dtype=torch.float32)
    low = ((centre - extent / 2) * scale).clamp(min=0)
    high = torch.minimum((centre + extent / 2) * scale, scale)
    return [(*a, *b) for a, b in zip(low.tolist(), high.tolist(), strict=True)]


class SamMasks:
    """transformers' SAM: boxes -> masks; of its three hypotheses, the one it scores highest."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor

    @torch.inference_mode()
    def __call__(self, image: Image.Image, boxes: Sequence[Box]) -> list[np.ndarray]:
        """One bool mask [H, W] a box."""
        inputs = self.processor(
            images=image.convert("RGB"), input_boxes=[[list(b) for b in boxes]], return_tensors="pt"
        )
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        outputs = self.model(**inputs.to(self.model.device))
        drawn = self.processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)[0]
        return _best(drawn, outputs.iou_scores[0].cpu())


class Sam2Masks:
    """transformers' SAM 2 and 2.1: boxes -> masks, as `SamMasks`."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @torch.inference_mode()
    def __call__(self, image: Image.Image, boxes: Sequence[Box]) -> list[np.ndarray]:
        """One bool mask [H, W] a box."""
        side = self.model.config.prompt_encoder_config.image_size
        scale = torch.tensor([side / image.width, side / image.height] * 2)
        outputs = self.model(
            pixel_values=squashed(image, side, IMAGENET, self.model),
            input_boxes=(torch.tensor([boxes]) * scale).to(self.model.device),
        )
        drawn = _resized(outputs.pred_masks[0].cpu(), image) > 0
        return _best(drawn, outputs.iou_scores[0].cpu())


class SegmentAnythingMasks:
    """The package segment-anything: boxes -> masks, as `SamMasks`; `sam` is its `Sam` module."""

    def __init__(self, sam: Any) -> None:
        self.sam = sam.eval()

    @torch.inference_mode()
    def __call__(self, image: Image.Image, boxes: Sequence[Box]) -> list[np.ndarray]:
        """One bool mask [H, W] a box."""
        side = self.sam.image_encoder.img_size
        scale = side / max(image.size)
        inner = round(image.width * scale), round(image.height * scale)
        small = image.convert("RGB").resize(inner, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1).to(self.sam.device)
        features = self.sam.image_encoder(self.sam.preprocess(pixels[None].float()))
        asked = torch.tensor(boxes, device=self.sam.device) * scale
        sparse, dense = self.sam.prompt_encoder(points=None, boxes=asked, masks=None)
        low, scores = self.sam.mask_decoder(
            image_embeddings=features,
            image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        full = self.sam.postprocess_masks(low, inner[::-1], image.size[::-1])
        return _best(full.cpu() > self.sam.mask_threshold, scores.cpu())


def load_segment_anything(checkpoint: str) -> Any:
    """The package's `Sam` from one of its checkpoint files (`sam_vit_h_*.pth`, `_l_`, `_b_`).

    Raises:
        ValueError: when the file's name does not say its size.
        ImportError: where the package or the torchvision that it imports does not load.
    """
    kind = next((k for k in ("vit_h", "vit_l", "vit_b") if k in checkpoint), None)
    if kind is None:
        raise ValueError(
            f"mask_model is {checkpoint!r}; for segment-anything give the path of its checkpoint, "
            "with vit_h, vit_l or vit_b in the file's name"
        )
    try:
        from segment_anything import sam_model_registry
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"segment-anything does not load ({error}). Install firsthand[segment] and a "
            "torchvision that fits your torch, or use grounding-dino+sam: the same masks from "
            "transformers"
        ) from error
    return sam_model_registry[kind](checkpoint=checkpoint)


class Sam3:
    """SAM 3: phrases -> masks of all instances, the image encoded once.

    Args:
        model: `Sam3Model`.
        tokenizer: its own.
        threshold: instances below this confidence are left out, 0..1.
    """

    name = "sam3"

    def __init__(self, model: Any, tokenizer: Any, threshold: float = SAM3_THRESHOLD) -> None:
        self.model, self.tokenizer, self.threshold = model.eval(), tokenizer, threshold

    @torch.inference_mode()
    def segment(self, image: Image.Image, phrases: Sequence[str]) -> list[Segment | None]:
        """As `Segmenter` says."""
        side = self.model.config.vision_config.backbone_config.image_size
        pixels = squashed(image, side, HALVES, self.model)
        seen = self.model.get_vision_features(pixel_values=pixels)
        return [self._segment(image, seen, phrase) for phrase in phrases]

    def _segment(self, image: Image.Image, seen: Any, phrase: str) -> Segment | None:
        longest = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer(
            [phrase], padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        outputs = self.model(vision_embeds=seen, **text)
        present = outputs.presence_logits[0].sigmoid()
        score = (outputs.pred_logits[0].sigmoid() * present).float().cpu()
        kept = (score > self.threshold).nonzero()[:, 0]
        if not len(kept):
            return None
        drawn = _resized(outputs.pred_masks[:, kept].sigmoid().cpu(), image)[0] > 0.5
        scale = torch.tensor([image.width, image.height] * 2)
        boxes = (outputs.pred_boxes[0, kept].float().cpu().clamp(0, 1) * scale).tolist()
        return unite(list(drawn.numpy()), [tuple(b) for b in boxes], score[kept].tolist())


def squashed(image: Image.Image, side: int, scale: Any, model: Any) -> torch.Tensor:
    """Pixels [1, 3, side, side], normalised, on the model's device and in its dtype."""
    small = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    mean, deviation = scale
    values = ((np.asarray(small, dtype=np.float32) / 255 - mean) / deviation).astype(np.float32)
    return torch.from_numpy(values).permute(2, 0, 1)[None].to(model.device, model.dtype)


def _resized(drawn: torch.Tensor, image: Image.Image) -> torch.Tensor:
    """Masks [B, N, h, w] at the image's size, bilinear."""
    return F.interpolate(drawn.float(), image.size[::-1], mode="bilinear")


def _best(drawn: torch.Tensor, scores: torch.Tensor) -> list[np.ndarray]:
    """Of each box's hypotheses [N, 3, H, W] the one with the highest score [N, 3]."""
    return [mask[int(best)].numpy() for mask, best in zip(drawn, scores.argmax(-1), strict=True)]

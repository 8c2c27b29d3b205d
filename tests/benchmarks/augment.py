"""Images a second of the augmentation: detector and SAM on all expressions of an image at once.

What it is: FiVL's way (the `zero-shot-object-detection` pipeline, which encodes the image again for
each expression, then SAM on all boxes, a PNG and a saved tensor a mask) against ours (one text for
all expressions, SAM on distinct boxes, masks as RLE), on the same random Grounding DINO and SAM in
this process. What it is not: a measure of quality; weights are random, sizes below the published.

`agree`: for each expression asked alone, both give the same boxes, within the pipeline's rounding
to whole pixels; and both give as many masks.

    python tests/benchmarks/augment.py [--quick] [--images 12]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    SamConfig,
    SamModel,
    SamProcessor,
    SwinConfig,
    pipeline,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from firsthand.processing.masks import patch_coverage
from firsthand.processing.segmenter_grounded import Detected, GroundingDetector, SamMasks
from firsthand.processing.segmenters import deduplicate
from firsthand.recipes.augment_fivl import stored

sys.path.append(str(Path(__file__).parents[1] / "processing"))
from tiny_segmenters import bert_tokenizer  # noqa: E402

PHRASES = ["the red dog", "two small woman", "a car on the house", "tree", "a cup", "the ball"]
SIDE, QUERIES, THRESHOLD = 336, 3, 0.0  # every query is a box of every expression


def detector(scratch: Path) -> tuple[Any, GroundingDinoProcessor]:
    """A Grounding DINO with a Swin of 4 stages, a third as wide as the tiny one."""
    swin = SwinConfig(
        embed_dim=32, depths=[2, 2, 6, 2], num_heads=[1, 2, 4, 8], window_size=7, image_size=SIDE,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=dict(
            model_type="bert", vocab_size=1030, hidden_size=64, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=128, max_position_embeddings=128,
        ),
        d_model=64, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=256, decoder_ffn_dim=256,
        encoder_attention_heads=4, decoder_attention_heads=4, num_queries=QUERIES, max_text_len=64,
        disable_custom_kernels=True,
    )  # fmt: skip
    torch.manual_seed(0)
    size = {"shortest_edge": SIDE, "longest_edge": SIDE}
    processor = GroundingDinoProcessor(
        GroundingDinoImageProcessorPil(size=size), bert_tokenizer(scratch)
    )
    return GroundingDinoForObjectDetection(config).eval(), processor


def sam() -> tuple[SamModel, SamProcessor]:
    """A SAM whose encoder has 4 layers of 192 at 512 pixels."""
    config = SamConfig(
        vision_config=dict(
            hidden_size=192, output_channels=64, num_hidden_layers=4, num_attention_heads=4,
            image_size=512, patch_size=16, window_size=7, global_attn_indexes=[3], mlp_dim=768,
            num_pos_feats=32,
        ),
        prompt_encoder_config=dict(hidden_size=64, image_size=512, patch_size=16),
        mask_decoder_config=dict(hidden_size=64, mlp_dim=256, num_attention_heads=4),
    )  # fmt: skip
    torch.manual_seed(0)
    processor = SamProcessor(
        SamImageProcessorPil(size={"longest_edge": 512}, pad_size={"height": 512, "width": 512})
    )
    return SamModel(config).eval(), processor


def theirs(find: Any, model: SamModel, processor: SamProcessor, folder: Path) -> Callable:
    """FiVL's way with one image: a forward pass of the detector for each expression."""

    @torch.inference_mode()
    def run(image: Image.Image) -> int:
        found = find(image, candidate_labels=[f"{p}." for p in PHRASES], threshold=THRESHOLD)
        boxes = [list(map(float, one["box"].values())) for one in found]
        inputs = processor(image, input_boxes=[boxes], return_tensors="pt")
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        outputs = model(**inputs)
        drawn = processor.post_process_masks(outputs.pred_masks, *sizes)[0]
        masks = drawn.float().mean(1).gt(0).numpy()
        labels = [one["label"] for one in found]
        for name in sorted(set(labels)):
            of_label = np.any([m for m, at in zip(masks, labels, strict=True) if at == name], 0)
            Image.fromarray(of_label.astype(np.uint8) * 255).save(folder / f"{hash(name)}.png")
            coverage = 255 * patch_coverage(of_label, (24, 24), "pad")
            torch.save(torch.from_numpy(coverage), folder / f"{hash(name)}.pt")
        return len(set(labels))

    return run


def ours(segmenter: Detected) -> Callable:
    """`FindMasks` on one image."""

    def run(image: Image.Image) -> int:
        segments = deduplicate(segmenter.segment(image, PHRASES))
        return len([stored(segment) for segment in segments if segment is not None])

    return run


def agreement(find: Any, detect: GroundingDetector, image: Image.Image) -> bool:
    """Whether an expression that is asked alone has the same boxes on both sides."""
    for phrase in PHRASES:
        one = find(image, candidate_labels=[f"{phrase}."], threshold=THRESHOLD)
        other = detect(image, [phrase])
        ours_boxes = np.array(sorted(found.box for found in other))
        theirs_boxes = np.array(sorted(list(map(float, found["box"].values())) for found in one))
        if ours_boxes.shape != theirs_boxes.shape or np.abs(ours_boxes - theirs_boxes).max() > 1:
            return False
    return True


def seconds(run: Callable, images: list[Image.Image]) -> tuple[float, list[int]]:
    """Processor seconds for all images after one to warm up, and how many masks each gave."""
    run(images[0])
    start = time.process_time()
    masks = [run(image) for image in images]
    return time.process_time() - start, masks


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Images a second of the augmentation.")
    parser.add_argument("--quick", action="store_true", help="three images")
    parser.add_argument("--images", type=int, default=12)
    args = parser.parse_args()
    count = 3 if args.quick else args.images
    torch.set_num_threads(1)  # processor time of one core
    noise = np.random.default_rng(0)
    images = [
        Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        for _ in range(count)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        model, processor = detector(Path(scratch))
        mask_model, mask_processor = sam()
        find = pipeline(
            "zero-shot-object-detection", model=model, tokenizer=processor.tokenizer,
            image_processor=processor.image_processor,
        )  # fmt: skip
        detect = GroundingDetector(model, processor, THRESHOLD)
        segmenter = Detected("grounding-dino+sam", detect, SamMasks(mask_model, mask_processor))
        agree = agreement(find, detect, images[0])
        theirs_s, masks = seconds(theirs(find, mask_model, mask_processor, Path(scratch)), images)
        ours_s, own = seconds(ours(segmenter), images)
    print(
        f"{count} images of {SIDE} pixels, {len(PHRASES)} expressions each, random weights, "
        f"masks a image: {own[0]} ours, {masks[0]} theirs"
    )
    print(
        json.dumps(
            {
                "name": "images_per_second",
                "ratio": round(theirs_s / ours_s, 3),
                "ours": round(count / ours_s, 3),
                "theirs": round(count / theirs_s, 3),
                "unit": "images/s of processor time",
                "agree": agree and own == masks,
            }
        )
    )


if __name__ == "__main__":
    main()

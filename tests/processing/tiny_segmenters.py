"""Tiny random detectors and SAMs of the real classes, with their processors, made in code."""

import torch
from transformers import (
    BertTokenizerFast,
    CLIPTextConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SamConfig,
    SamModel,
    SamProcessor,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.sam2.modeling_sam2 import Sam2Config, Sam2Model
from transformers.models.sam3.modeling_sam3 import Sam3Config, Sam3Model

WORDS = "a the red dog cup ball tree of on man woman car house two small".split()


def bert_tokenizer(tmp_path) -> BertTokenizerFast:
    """BERT's special ids where Grounding DINO looks for them, and a few words."""
    vocabulary = [f"[unused{i}]" for i in range(1030)]
    places = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}
    for at, word in {**places, **dict(enumerate(WORDS, 200))}.items():
        vocabulary[at] = word
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(vocabulary), "utf-8")
    return BertTokenizerFast(str(file))


def detector(kind: str, tmp_path, seed: int = 0):
    """A random Grounding DINO ("grounding-dino") or MM Grounding DINO, and its processor."""
    swin = SwinConfig(
        embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4, image_size=64,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    sizes = dict(
        backbone_config=swin,
        text_config=dict(
            model_type="bert", vocab_size=1030, hidden_size=32, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=12, max_text_len=32,
        disable_custom_kernels=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    if kind == "grounding-dino":
        model = GroundingDinoForObjectDetection(GroundingDinoConfig(**sizes))
    else:
        model = MMGroundingDinoForObjectDetection(MMGroundingDinoConfig(**sizes))
    image_processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    return model, GroundingDinoProcessor(image_processor, bert_tokenizer(tmp_path))


def sam(seed: int = 0):
    """A random SAM for 64 x 64 pixels, and its processor."""
    config = SamConfig(
        vision_config=dict(
            hidden_size=16, output_channels=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=64, patch_size=8, window_size=4, global_attn_indexes=[0], mlp_dim=16,
            num_pos_feats=8,
        ),
        prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=8),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_attention_heads=2),
    )  # fmt: skip
    torch.manual_seed(seed)
    image_processor = SamImageProcessorPil(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}
    )
    return SamModel(config), SamProcessor(image_processor)


def sam2(seed: int = 0):
    """A random SAM 2 for 64 x 64 pixels."""
    backbone = dict(
        model_type="sam2_hiera_det_model", hidden_size=8, image_size=[64, 64],
        blocks_per_stage=[1, 1, 1, 1], embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2], window_size_per_stage=[4, 4, 4, 4],
        window_positional_embedding_background_size=[4, 4], global_attention_blocks=[],
    )  # fmt: skip
    config = Sam2Config(
        vision_config=dict(
            backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8],
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=32,
        ),
        prompt_encoder_config=dict(hidden_size=32, image_size=64),
        mask_decoder_config=dict(
            hidden_size=32, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )  # fmt: skip
    torch.manual_seed(seed)
    return Sam2Model(config)


def sam3(seed: int = 0):
    """A random SAM 3 for 56 x 56 pixels."""
    backbone = dict(
        model_type="sam3_vit_model", hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, image_size=56, patch_size=14, window_size=2,
        global_attn_indexes=[0], pretrain_image_size=56,
    )  # fmt: skip
    small = dict(hidden_size=32, num_attention_heads=2, intermediate_size=32, num_layers=1)
    config = Sam3Config(
        vision_config=dict(
            backbone_config=backbone, fpn_hidden_size=32,
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        ),
        text_config=CLIPTextConfig(
            vocab_size=1030, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=16, projection_dim=32,
        ).to_dict(),
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config={**small, "num_queries": 6},
        mask_decoder_config=dict(hidden_size=32, num_attention_heads=2),
    )  # fmt: skip
    torch.manual_seed(seed)
    return Sam3Model(config)

"""mPLUG-Owl2 (arXiv 2311.04257): mPLUG-Owl with a decoder that tells image from text.

Each decoder layer has two of its norms and of its key and value projections, one for text and one
for image positions; all else is Llama's. Not mPLUG-Owl2.1, which builds on Qwen.

    model = MPlugOwl2ForConditionalGeneration.from_pretrained("org/mplug-owl2-7b")
"""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, LlamaConfig, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.llava.modeling_llava import LlavaPreTrainedModel

from .configuration_mplug_owl2 import MPlugOwl2Config
from .llava_shaped import LlavaShaped
from .modeling_mplug_owl import MPlugOwlModel
from .visual_abstractor import VisualAbstractor


class ModalityAdaptive(nn.Module):
    """Two modules of one kind: `multiway[0]` for text positions, `multiway[1]` for image ones."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.multiway = nn.ModuleList([module, deepcopy(module)])

    def forward(self, states: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        """states [B, T, D]; image bool [B, T, 1], None where all is text."""
        text = self.multiway[0](states)
        return text if image is None else torch.where(image, self.multiway[1](states), text)


class MPlugOwl2Attention(LlamaAttention):
    """LlamaAttention with keys and values of each modality's own."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.k_proj = ModalityAdaptive(self.k_proj)  # type: ignore[assignment]
        self.v_proj = ModalityAdaptive(self.v_proj)  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        image_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in Llama; `image_positions` as in `ModalityAdaptive`."""
        projected = (
            self.q_proj(hidden_states),
            self.k_proj(hidden_states, image_positions),
            self.v_proj(hidden_states, image_positions),
        )
        query, key, value = (
            one.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in projected
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(2)), weights


class MPlugOwl2DecoderLayer(LlamaDecoderLayer):
    """LlamaDecoderLayer with norms of each modality's own before attention and MLP."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = MPlugOwl2Attention(config, layer_idx)
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, ModalityAdaptive(self.get_submodule(name)))

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        image_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As in Llama; `image_positions` as in `ModalityAdaptive`."""
        normed = self.input_layernorm(hidden_states, image_positions)
        attended, _ = self.self_attn(normed, image_positions=image_positions, **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states, image_positions)
        return hidden_states + self.mlp(normed)


class MPlugOwl2TextModel(LlamaModel):
    """LlamaModel of modality-adaptive layers."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            MPlugOwl2DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.post_init()


class MPlugOwl2Model(MPlugOwlModel):
    """MPlugOwlModel whose abstractor knows positions and whose decoder knows modalities."""

    config: MPlugOwl2Config
    config_class = MPlugOwl2Config

    def __init__(self, config: MPlugOwl2Config):
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = VisualAbstractor(config, fixed_positions=True)
        self.language_model = MPlugOwl2TextModel._from_config(config.text_config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in LLaVA. Positions of image tokens take the image's way, unless no image comes with
        the input (text, and each decoding step): then all is text."""
        if pixel_values is not None or mm_encoder_outputs:
            kwargs["image_positions"] = self._image_positions(input_ids, inputs_embeds)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def _image_positions(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """bool [B, T, 1]; embeddings are compared with the image token's, as LLaVA does."""
        token = self.config.image_token_id
        if input_ids is not None:
            return (input_ids == token).unsqueeze(-1)
        row = cast(nn.Embedding, self.get_input_embeddings()).weight[token]
        return torch.eq(cast(torch.Tensor, inputs_embeds), row).all(-1, keepdim=True)


class MPlugOwl2ForConditionalGeneration(LlavaShaped):
    """mPLUG-Owl2 with its language head; inputs and outputs are those of LLaVA."""

    config: MPlugOwl2Config
    config_class = MPlugOwl2Config
    model_class = MPlugOwl2Model

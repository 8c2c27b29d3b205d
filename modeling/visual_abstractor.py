"""The visual abstractor of mPLUG-Owl (arXiv 2304.14178) and mPLUG-Owl2 (arXiv 2311.04257).

Learned queries look at themselves and at the encoder's outputs, layer by layer, and become image
tokens of the language model; a learned token marks their end. It has no self-attention layers and
no final norm. Not a Q-Former: the residual is the normalised query.

    tokens = VisualAbstractor(config)(encoder_outputs)
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import silu
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from .configuration_mplug_owl import MPlugOwlConfig


class AbstractorMLP(nn.Module):
    """w2(norm(silu(w1 x) * w3 x))."""

    def __init__(self, config: MPlugOwlConfig, width: int):
        super().__init__()
        inner = config.abstractor_intermediate_size
        self.w1, self.w3 = nn.Linear(width, inner), nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)
        self.ffn_ln = nn.LayerNorm(inner, eps=config.abstractor_norm_eps)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        return self.w2(self.ffn_ln(silu(self.w1(states)) * self.w3(states)))


class AbstractorLayer(nn.Module):
    """One step of the queries, which attend to themselves and to the encoder's outputs."""

    def __init__(self, config: MPlugOwlConfig, width: int):
        super().__init__()
        self.config = config
        self.heads, self.dropout = config.abstractor_heads, config.abstractor_dropout
        self.norm1, self.norm2, self.normk = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.mlp = AbstractorMLP(config, width)

    def forward(
        self, queries: torch.Tensor, encoded: torch.Tensor, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """Queries [N, Q, D] and encoded [N, P, D] to queries; positions [Q + P, D] are added to
        what attention compares, not to what it reads."""
        queries = self.norm1(queries)
        read = torch.cat([queries, self.normk(encoded)], dim=1)
        compared = read if positions is None else read + positions
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        query = self._heads(self.query(compared[:, : queries.shape[1]]))
        attended, _ = attend(
            self,
            query,
            self._heads(self.key(compared)),
            self._heads(self.value(read)),
            None,
            scaling=query.shape[-1] ** -0.5,
            dropout=self.dropout if self.training else 0.0,
            is_causal=False,
        )
        queries = queries + self.out_proj(attended.flatten(2))
        return queries + self.mlp(self.norm2(queries))

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class VisualAbstractor(nn.Module):
    """Encoder outputs [N, 1 + R * C, D] to image tokens [N, Q + 1, width of the language model].

    Args:
        config: of the model.
        fixed_positions: whether attention is told where queries and patches stand (mPLUG-Owl2).
    """

    def __init__(self, config: MPlugOwlConfig, fixed_positions: bool = False):
        super().__init__()
        parts: Any = config
        width, text = parts.vision_config.hidden_size, parts.text_config.hidden_size
        self.fixed_positions = fixed_positions
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.layers = nn.ModuleList(
            AbstractorLayer(config, width) for _ in range(config.abstractor_layers)
        )
        self.visual_fc = nn.Linear(width, text)
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, text))

    def forward(self, encoded: torch.Tensor) -> torch.Tensor:
        """See the class."""
        queries = self.query_tokens.expand(len(encoded), -1, -1)
        positions = self._positions(encoded) if self.fixed_positions else None
        for layer in self.layers:
            queries = layer(queries, encoded, positions)
        end = self.vit_eos.expand(len(encoded), -1, -1)
        return torch.cat([self.visual_fc(queries), end], dim=1)

    def _positions(self, encoded: torch.Tensor) -> torch.Tensor:
        """[Q + 1 + R * C, D] of queries in a line, the CLS token at zero, patches on a square."""
        queries, width = self.query_tokens.shape[1:]
        rows, columns = np.divmod(np.arange(encoded.shape[1] - 1), (encoded.shape[1] - 1) ** 0.5)
        patches = [waves(columns, width // 2), waves(rows, width // 2)]
        table = [waves(np.arange(queries), width), np.zeros((1, width)), np.hstack(patches)]
        return torch.from_numpy(np.vstack(table)).to(encoded)

    def init_weights(self, std: float) -> None:
        """Start queries and end token at random, as the published code does."""
        init.trunc_normal_(self.query_tokens, mean=0.0, std=std)
        init.trunc_normal_(self.vit_eos, mean=0.0, std=std)


def waves(places: np.ndarray, width: int) -> np.ndarray:
    """Sines, then cosines, of each place at width / 2 frequencies from 1 down to 1e-4.

    Args:
        places: [n], any numbers.
        width: even.

    Returns:
        float32 [n, width], after the fixed positions of the Transformer (arXiv 1706.03762).
    """
    exponents = np.arange(width // 2, dtype=np.float32) / np.float32(width / 2)
    angles = np.outer(places.astype(np.float32), 1.0 / 10000**exponents)
    return np.hstack([np.sin(angles), np.cos(angles)]).astype(np.float32)

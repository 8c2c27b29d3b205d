"""Attention that propagates one row of relevancy while gradients flow back through it.

It is the engine of `relevancy.py` and an attention function for transformers' `AttentionInterface`;
not a hook on attention maps: the streaming backend keeps no map at all.

The rule for self-attention is that of Chefer et al. (arXiv 2103.15679, section 3.1): with the map
A of a layer and the gradient dy/dA of the explained logit y, A_bar = mean over heads of
clamp(A * dy/dA, min=0), and R = (I + A_bar_L) ... (I + A_bar_1). Only one row e_t R is wanted, so
the row is carried through backward, which meets the layers in the needed order: r += r A_bar.

    with recording(model, Recorder(...)):
        logits = model(**inputs).logits
        recorder.begin(position, length); torch.autograd.grad(logits[0, position, token], pixels)
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from .families import decoder_layers, query_layers, vision_layers
from .placement import recomputed

Backend = Literal["streaming", "eager"]
NAME = "firsthand_relevancy"
REFUSED = ("s_aux", "position_bias")
# Of one recomputed piece of attention maps: 2 MB in float32 stay in a CPU's cache; 16 MB elsewhere,
# where starting many small operations costs more.
CHUNK_ELEMENTS = {"cpu": 2**19}
LARGE_CHUNK = 2**22


class Scaling(NamedTuple):
    """What becomes of query @ key before the mask: times `scale`, then softcap * tanh(x / softcap).

    `softcap` is None in most models.
    """

    scale: float
    softcap: float | None


class Call(NamedTuple):
    """One call of an attention module: its tower, the part of the sequence that it sees, and the
    first of the tower's rows that has started by then."""

    module: nn.Module
    tower: str
    place: slice
    first: int


class Recorder:
    """The relevancy rows of one explained token, moved down layer by layer during its backward.

    Below queries (relevancy_qformer.py, relevancy_abstractor.py) it keeps averaged maps instead.

    Args:
        model: the model (not a wrapper), to know whose attention is called.
        spread: turns the finished row over the sequence, [n], into the first row over the vision
            encoder's tokens, [m]; None leaves the vision encoder out, unless a Q-Former reads it.
        backend: "streaming" recomputes maps in backward, "eager" lets autograd keep them.
        per_layer: also carry the row that starts at each lower decoder layer: what the rule would
            say after that layer, with the gradients of the final logit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spread: Callable[[torch.Tensor], torch.Tensor] | None,
        backend: Backend,
        per_layer: bool = False,
    ):
        towers = {"text": decoder_layers(model), "vision": vision_layers(model)}
        towers["qformer"] = query_layers(model)
        self.layers = [layer for layers in towers.values() for layer in layers]
        self.keeps = len(towers["qformer"]) > 0
        self.tower_of = {m: tower for tower, layers in towers.items() for m in layers.modules()}
        self.layer_of = {m: i for i, layer in enumerate(towers["text"]) for m in layer.modules()}
        self.count = len(towers["text"]) if per_layer else 1
        self.spread, self.backend = spread, backend
        self.rows: dict[str, torch.Tensor] = {}
        self.bars: dict[nn.Module, torch.Tensor] = {}
        self.ends: dict[nn.Module, int] = {}

    def call(self, module: nn.Module, length: int) -> Call:
        """A call of an attention module; in its tower's sequence it works after its last one.

        Packed images, attention windows and the views of a batch are one call each, in the order
        of the sequence.
        """
        start = self.ends.get(module, 0)
        self.ends[module] = start + length
        first = min(self.layer_of.get(module, 0), self.count - 1)
        return Call(module, self.tower_of[module], slice(start, start + length), first)

    @contextmanager
    def running(self, layer: nn.Module) -> Iterator[None]:
        """`layer` runs, perhaps once more in backward: its calls are counted anew, and recorded."""
        for module in layer.modules():
            self.ends.pop(module, None)
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def begin(self, position: int, length: int) -> None:
        """Start over: all relevancy lies at `position` of a sequence of `length`."""
        self.rows = {"text": torch.zeros(self.count, length, dtype=torch.float32)}
        self.rows["text"][:, position] = 1
        self.bars = {}

    def check(self) -> None:
        """Raise ValueError where a forward pass left out decoder layers: their part would be 0."""
        called = {self.layer_of.get(module) for module in self.ends}
        missing = sorted({*self.layer_of.values()} - called)
        if missing:
            raise ValueError(
                f"No gradients flow through attention in decoder layers {missing}. 4-bit weights "
                "give none on a CPU once a pass without gradients has packed them (generate does): "
                "load the model anew, and pass the answer."
            )

    def start(self, call: Call, device: torch.device) -> torch.Tensor | None:
        """The rows that A_bar of this call is multiplied with, [k, n], or None where it is kept."""
        moves = call.tower == "text" or not self.keeps
        return self._moving(call, device) if moves else None

    def _moving(self, call: Call, device: torch.device) -> torch.Tensor:
        """A view of the rows that a call moves; the vision encoder's starts when first asked."""
        tower = call.tower
        if tower not in self.rows and self.spread is not None:
            self.rows[tower] = self._whole(self.spread(self.rows["text"][-1]))[None]
        self.rows[tower] = self.rows[tower].to(device)
        return self.rows[tower][call.first :, call.place]

    def _whole(self, row: torch.Tensor) -> torch.Tensor:
        ends = {end for module, end in self.ends.items() if self.tower_of[module] == "vision"}
        if ends != {len(row)}:
            raise ValueError(
                f"The vision encoder attended over {sorted(ends)} tokens, but the image has "
                f"{len(row)}. Check merge, order and prefix_tokens in modeling/families.py."
            )
        return row

    def add(self, call: Call, change: torch.Tensor) -> None:
        """r += `change` = r A_bar at the place of one call, or keep `change` = A_bar itself."""
        rows = self.start(call, change.device)
        if rows is None:
            self.bars[call.module] = change.cpu()
        else:
            rows += change

    def kept(self, layers: Iterable[nn.Module]) -> list[list[torch.Tensor]]:
        """A_bar of each layer's attention modules, in the order in which they are defined."""
        return [[self.bars[m] for m in layer.modules() if m in self.bars] for layer in layers]

    def follows(self, tower: str) -> bool:
        """Whether rows are propagated through this tower."""
        return tower == "text" or self.keeps or self.spread is not None


_ACTIVE: ContextVar[Recorder | None] = ContextVar("firsthand_recorder", default=None)


@contextmanager
def recording(model: PreTrainedModel, recorder: Recorder) -> Iterator[None]:
    """Run `model` on this attention; its attention implementation is restored afterwards."""
    AttentionInterface.register(NAME, relevancy_attention)
    AttentionMaskInterface.register(NAME, eager_mask)  # without it, attention would not be causal
    before = implementations(model.config)
    token = _ACTIVE.set(recorder)
    try:
        model.set_attn_implementation(NAME)
        with recomputed(recorder.layers, recorder.running):
            yield
    finally:
        model.set_attn_implementation(before)
        _ACTIVE.reset(token)


def implementations(config: PreTrainedConfig) -> dict[str, Any]:
    """Attention implementations of a config and its parts, as `set_attn_implementation` takes."""
    parts = {name: getattr(config, name) for name in config.sub_configs}
    inner = {name: implementations(part) for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **inner}


def relevancy_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers: query [B, H, n, d], key and value [B, K, m, d], H % K == 0.

    Without gradients, or outside `recording`, it is plain scaled dot-product attention.

    Raises:
        ValueError: for attention that the rule does not cover (sinks, position biases,
            cross-attention, a batch of sequences), rather than an inexact map.
    """
    scores = Scaling(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    recorder = _ACTIVE.get()
    if recorder is None or not (torch.is_grad_enabled() and query.requires_grad):
        output = _plain(query, key, value, attention_mask, scores)
    else:
        _check(recorder, module, query, key, attention_mask, kwargs)
        attend = _Streaming.apply if recorder.backend == "streaming" else _eager
        mask = attention_mask
        output = torch.cat(
            [
                attend(q, k, v, mask, scores, recorder, recorder.call(module, q.shape[2]))
                for q, k, v in zip(query.split(1), key.split(1), value.split(1), strict=True)
            ]
        )
    return output.transpose(1, 2).contiguous(), None


def _check(
    recorder: Recorder,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    name = type(module).__name__
    given = [option for option in REFUSED if kwargs.get(option) is not None]
    if given:
        raise ValueError(f"{name} uses {', '.join(given)}, which exact relevancy does not cover.")
    if module not in recorder.tower_of:
        raise ValueError(f"{name} lies outside the decoder and the vision encoder; cannot explain.")
    tower = recorder.tower_of[module]
    alone = query.shape[0] == 1 or (tower == "vision" and mask is None)
    if not alone or (query.shape[2] != key.shape[2] and tower != "qformer"):
        raise ValueError(
            f"{name} got queries {tuple(query.shape)} and keys {tuple(key.shape)}; relevancy needs "
            "self-attention of one sequence and one image (no tiles or cached keys)."
        )
    if tower == "text" and mask is None:
        raise ValueError(f"{name} got no causal mask, so its relevancy would look ahead.")


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: Scaling,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if scaling.softcap is not None:
        return _softmax(_scores(query, key, scaling), mask).to(value.dtype) @ value
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling.scale)


def _scores(query: torch.Tensor, key: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * scaling.scale
    if scaling.softcap is None:
        return scores
    return scaling.softcap * torch.tanh(scores / scaling.softcap)


def _softmax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    precise = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores if mask is None else scores + mask, dim=-1, dtype=precise)


def _eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: Scaling,
    recorder: Recorder,
    call: Call,
) -> torch.Tensor:
    """The same with autograd's own backward; the maps are kept."""
    groups = query.shape[1] // key.shape[1]
    precise = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(precise), *(x.repeat_interleave(groups, 1).to(precise) for x in (key, value))
    weights = _softmax(_scores(q, k, scaling), mask)
    kept = weights.detach()

    def move_row(gradient: torch.Tensor) -> None:
        relevancy = (kept * gradient).clamp(min=0).mean(1)[0].float()
        rows = recorder.start(call, relevancy.device)
        recorder.add(call, relevancy if rows is None else rows @ relevancy)

    if recorder.follows(call.tower):
        weights.register_hook(move_row)
    return (weights @ v).to(query.dtype)


class _Streaming(torch.autograd.Function):
    """Fused attention forward; backward recomputes the maps a few heads at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: Scaling,
        recorder: Recorder,
        call: Call,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scaling, ctx.recorder, ctx.call = scaling, recorder, call
        return _plain(query, key, value, mask, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        heads, length = query.shape[1:3]
        key_heads, keys = key.shape[1:3]
        split = (key_heads, heads // key_heads, length)
        q, g = query.view(*split, -1), gradient.reshape(*split, -1)
        k, v = key[0].unsqueeze(1), value[0].unsqueeze(1)
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        recorder, call = ctx.recorder, ctx.call
        follows = recorder.follows(call.tower)
        rows = recorder.start(call, q.device) if follows else None
        size = length if rows is None else len(rows)
        change = torch.zeros(size, keys, dtype=torch.float32, device=q.device)
        elements = CHUNK_ELEMENTS.get(q.device.type, LARGE_CHUNK)
        step = max(1, elements // (split[1] * length * keys))
        for part in (slice(start, start + step) for start in range(0, key_heads, step)):
            pieces, product = _backward(q[part], k[part], v[part], g[part], mask, ctx.scaling)
            for whole, piece in zip(grads, pieces, strict=True):
                whole[part] = piece
            if follows:
                relevancy = product.clamp_(min=0).sum((0, 1)).float()
                change += relevancy if rows is None else rows @ relevancy
        if follows:
            recorder.add(call, change / heads)
        shapes = (query, key, value)
        found = (grad.view(x.shape) for grad, x in zip(grads, shapes, strict=True))
        return *found, None, None, None, None


def _backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: Scaling,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Gradients of some heads' q, k, v, and A * dy/dA; q, g [c, G, n, d], k, v [c, 1, n, d]."""
    precise = torch.promote_types(q.dtype, torch.float32)
    q, k, v, g = (x.to(precise) for x in (q, k, v, g))
    scores = _scores(q, k, scaling)
    weights = _softmax(scores, mask)
    product = (g @ v.transpose(-1, -2)).mul_(weights)
    grad_v = (weights.transpose(-1, -2) @ g).sum(1, keepdim=True)
    grads = weights.mul_(product.sum(-1, keepdim=True)).neg_().add_(product).mul_(scaling.scale)
    if scaling.softcap is not None:
        grads *= 1 - (scores / scaling.softcap) ** 2
    grad_q = grads @ k
    grad_k = (grads.transpose(-1, -2) @ q).sum(1, keepdim=True)
    return (grad_q, grad_k, grad_v), product

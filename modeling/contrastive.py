"""Contrastive decoding: what the image adds to each next token, made larger, in one `generate`.

What it is: the logits mix shared by VCD (arXiv 2311.16922), ICD (2403.18715), M3ID (2403.14003) and
the image-free branch of PAI (2407.21771): a second branch that sees no image, or less of it, is
subtracted. Both branches stand in one batch of 2B rows, so that a token costs one forward pass.
What it is not: the making of the second branch (`processing/contrast_inputs.py` does it), a change
of attention (PAI's other half), or a beam search.

    inputs = both_branches(processor, rows, method="vcd")  # B rows, then their B contrasts
    model.generate(**inputs, custom_generate=CONTRASTS["vcd"])  # [B, T + new]

`ContrastiveLogitsProcessor` does the same after the model's own forward pass, with a second cache:
two passes a token, for callers that cannot double their batch.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .families import unwrap
from .placement import offloaded

FEW = 0.1  # share of the vocabulary above which picking rows of the head costs more than it saves


@dataclass(frozen=True)
class Contrast:
    """How two branches become one distribution; pass it as `custom_generate`.

    Token t (from 0) is chosen by `seen + w_t (seen - unseen)`, w_t = alpha + exp(decay t) - 1,
    among the tokens that are at least `beta` times as probable as the most probable seen one
    (VCD's adaptive plausibility).

    Attributes:
        alpha: weight of the contrast; signed, finite. 0 with decay 0 is plain decoding.
        beta: cutoff, 0 (none) to 1.
        decay: growth of the weight with each token, at least 0: M3ID's rate of forgetting.
    """

    alpha: float = 1.0
    beta: float = 0.1
    decay: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha is {self.alpha}; it must be a finite number (0 is plain).")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta}; it must lie in 0 (no cutoff) to 1.")
        if not 0 <= self.decay < math.inf:
            raise ValueError(f"decay is {self.decay}; it must be 0 or a positive number.")

    def combine(self, seen: torch.Tensor, unseen: torch.Tensor, step: int) -> torch.Tensor:
        """Logits [B, V] of both branches -> those to choose token `step` from, -inf if cut off."""
        mixed = seen + self.weight(step) * (seen - unseen)
        return mixed.masked_fill(~self.plausible(seen), -torch.inf)

    def weight(self, step: int) -> float:
        """w_t of token `step`."""
        return self.alpha + math.expm1(self.decay * step)

    def plausible(self, seen: torch.Tensor) -> torch.Tensor:
        """Bool [B, V]: the tokens that are not cut off."""
        if self.beta == 0:
            return torch.ones_like(seen, dtype=torch.bool)
        return seen >= seen.amax(-1, keepdim=True) + math.log(self.beta)

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate` calls: transformers' own loop on 2B rows, whose halves say the same.

        Returns the first B rows, as `generate` would for them alone.

        Raises:
            ValueError: for an odd number of rows, or beam search.
        """
        if len(input_ids) % 2:
            raise ValueError(
                f"The batch has {len(input_ids)} rows. Contrastive decoding needs B rows and then "
                "their B contrasts: prepare both with both_branches()."
            )
        if generation_config.num_beams > 1:
            raise ValueError("Contrastive decoding searches no beams: set num_beams=1.")
        mix = _Mix(self, logits_processor, input_ids.shape[1], bool(generation_config.do_sample))
        generation_config.do_sample = False  # `generate` has made it a copy; _Mix draws
        with mix.watching(model.get_output_embeddings()):
            found = model._sample(
                input_ids,
                logits_processor=LogitsProcessorList([mix]),
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **model_kwargs,
            )
        return _first_half(found)


CONTRASTS: dict[str, Contrast] = {
    "vcd": Contrast(alpha=1.0),
    "icd": Contrast(alpha=1.0),
    "m3id": Contrast(alpha=0.0, decay=0.02),
    "pai": Contrast(alpha=0.1),  # guidance 1.1
}


class _Mix(LogitsProcessor):
    """Scores of 2B rows -> the B mixed and processed ones, for both halves alike.

    With a cutoff, few tokens of the second branch matter. So after the first step, if the scores
    turned out to be the head's outputs as they are, the head is given the first branch only, and
    the second branch's logits are computed for plausible tokens: one row of the head instead of two
    in most of the work.
    """

    def __init__(
        self, contrast: Contrast, processors: LogitsProcessorList, prompt: int, draws: bool
    ):
        self.contrast, self.processors = contrast, processors
        self.prompt, self.draws = prompt, draws
        self.head: nn.Linear | None = None
        self.output: torch.Tensor | None = None  # of the head in the first step
        self.unseen: torch.Tensor | None = None  # [B, D] what the head was not given
        self.lean = False

    @contextmanager
    def watching(self, head: Any) -> Iterator[None]:
        """Hooks on the language head while tokens are made; none where they could save nothing."""
        if type(head) is not nn.Linear or offloaded(head) or self.contrast.beta == 0:
            yield
            return
        self.head = head
        handles = [
            head.register_forward_pre_hook(self._before), head.register_forward_hook(self._after)
        ]  # fmt: skip
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, module: nn.Module, args: Any) -> Any:
        if not self.lean:
            return None
        seen, unseen = args[0].chunk(2)
        self.unseen = unseen[:, -1]
        return (seen,)

    def _after(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if not self.lean:
            self.output = output[:, -1]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step, half = input_ids.shape[1] - self.prompt, len(input_ids) // 2
        if self.lean:
            mixed = self._mixed_where_plausible(scores, step)
        else:
            seen, unseen = scores.chunk(2)
            mixed = self.contrast.combine(seen, unseen, step)
            if self.output is not None:
                self.lean = torch.equal(self.output.to(scores), scores)
        mixed = self.processors(input_ids[:half], mixed)  # type: ignore[arg-type]
        if self.draws:
            drawn = torch.multinomial(mixed.softmax(-1), 1)
            mixed = torch.full_like(mixed, -torch.inf).scatter(-1, drawn, 0.0)
        return mixed.repeat(2, 1)

    def _mixed_where_plausible(self, seen: torch.Tensor, step: int) -> torch.Tensor:
        """`Contrast.combine` without the second branch's logits of tokens that are cut off."""
        assert self.head is not None
        kept = self.contrast.plausible(seen)
        tokens = kept.any(0).nonzero()[:, 0].to(self.head.weight.device)
        if len(tokens) > seen.shape[-1] * FEW:
            return self.contrast.combine(seen, self.head_of(slice(None)).to(seen), step)
        unseen = self.head_of(tokens).to(seen)
        some = seen[:, tokens.to(seen.device)]
        mixed = torch.full_like(seen, -torch.inf)
        mixed[:, tokens.to(seen.device)] = some + self.contrast.weight(step) * (some - unseen)
        return mixed.masked_fill(~kept, -torch.inf)

    def head_of(self, tokens: torch.Tensor | slice) -> torch.Tensor:
        """The second branch's logits [B, k] of some tokens."""
        assert self.head is not None and self.unseen is not None
        bias = None if self.head.bias is None else self.head.bias[tokens]
        return nn.functional.linear(self.unseen, self.head.weight[tokens], bias)


def _first_half(found: Any) -> Any:
    """`generate`'s result for the first half of its rows; of its parts, sequences and scores."""
    if isinstance(found, torch.Tensor):
        return found[: len(found) // 2]
    half = len(found.sequences) // 2
    parts: dict[str, Any] = {"sequences": found.sequences[:half]}
    for name in {"scores", "logits"} & set(found):
        parts[name] = tuple(one[:half] for one in found[name])
    return GenerateDecoderOnlyOutput(**parts)


class ContrastiveLogitsProcessor(LogitsProcessor):
    """The same mix inside any `generate`, at two forward passes a token; greedy or sampled.

    Args:
        model: the model that generates, wrapped or not.
        inputs: the contrasts alone, left-padded: input_ids and attention_mask [B, T'], images. T'
            need not be the prompts' length.
        contrast: how to mix.

    Its own cache holds the second branch, so a beam search, which reorders rows, is refused.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], contrast: Contrast):
        self.model: Any = unwrap(model)
        self.inputs, self.contrast = dict(inputs), contrast
        self.prompt = 0
        self.last: torch.Tensor | None = None  # what was said at the last step
        self.state: dict[str, Any] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] of the first branch -> mixed ones."""
        own = self.inputs["input_ids"]
        if len(input_ids) != len(own):
            raise ValueError(
                f"generate works on {len(input_ids)} rows, the contrasts are {len(own)}. Give one "
                "contrast a row, and search no beams."
            )
        if self.last is None or not torch.equal(input_ids[:, :-1], self.last):
            self.prompt, self.state = input_ids.shape[1], {}  # the first token of a generate
        self.last = input_ids
        said = input_ids[:, self.prompt :].to(own.device)
        unseen = self._unseen(torch.cat([own, said], 1)).to(scores)
        return self.contrast.combine(scores, unseen, said.shape[1])

    @torch.no_grad()
    def _unseen(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of the next token after all tokens of the second branch."""
        first = not self.state
        if first:
            self.state = {k: v for k, v in self.inputs.items() if k != "input_ids"}
            self.state["position_ids"] = self.model._prepare_position_ids_for_generation(
                ids, self.state
            )
            self.state |= {"use_cache": True, "logits_to_keep": 1}
        inputs = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=None if first else 1,
            is_first_iteration=first,
            **self.state,
        )
        outputs = self.model(**inputs, return_dict=True)
        self.state = self.model._update_model_kwargs_for_generation(outputs, self.state)
        return outputs.logits[:, -1]

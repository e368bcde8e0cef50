"""optimum's decoder for graphs whose layers have different numbers of KV heads.

optimum-onnx 0.1 makes the first step's empty keys and values, and with IO binding every step's
buffers, from one `num_key_value_heads` for all layers. The graph states each layer's own. Uniform
directories need none of this: `ORTModelForCausalLM` loads them.
"""

from __future__ import annotations

from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from torch import Tensor

from spp_export.common.errors import UsageError


class ORTSlimForCausalLM(ORTModelForCausalLM):  # type: ignore[misc]  # has no annotations
    """An ONNX directory as a transformers model: `from_pretrained(path)`, `generate(**inputs)`.

    Graphs of the form gqa take rows without padding on the left and generate from rows of one
    length; anything else is a UsageError. optimum logs of them that they are a legacy form.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B,S,V] of ids [B,S] behind a past of P tokens; the mask is [B,P+S]."""
        if attention_mask is None and past_key_values is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask is not None and self._takes_no_positions():
            # A real token behind padding: GroupQueryAttention would look at the wrong ones.
            self._refuse_if(attention_mask.diff(dim=1) > 0)
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """A step's inputs. In `generate` the new token follows the padding on the right, too."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        mask = inputs.get("attention_mask")
        if mask is not None and self._takes_no_positions():
            self._refuse_if(mask == 0)
        return inputs

    def _prepare_onnx_inputs(self, use_torch: bool, model_inputs: dict[str, Any]) -> Any:
        self._give_own_heads(model_inputs)
        return super()._prepare_onnx_inputs(use_torch, model_inputs)

    def _prepare_io_binding(
        self,
        model_inputs: dict[str, Any],
        outputs_to_not_bind: set[str] | None = None,
        known_output_buffers: dict[str, Any] | None = None,
        known_output_shapes: dict[str, tuple[int, ...]] | None = None,
    ) -> Any:
        self._give_own_heads(model_inputs)
        # Without known shapes optimum infers them from the graph's, which are right.
        return super()._prepare_io_binding(model_inputs, outputs_to_not_bind, known_output_buffers)

    def _give_own_heads(self, model_inputs: dict[str, Any]) -> None:
        """Make empty keys and values [B,KV,0,D] those of the layer.

        In place: the caller's dictionary is what keeps bound tensors alive until the graph has run.
        """
        for name in self.key_value_input_names:
            past = model_inputs[name]
            if past.shape[2] == 0:
                _, heads, _, head_dim = self.input_shapes[name]
                model_inputs[name] = past.new_zeros((past.shape[0], heads, 0, head_dim))

    def _takes_no_positions(self) -> bool:
        """Whether the graph has the form gqa, which counts positions from the left."""
        return "position_ids" not in self.input_names

    def _refuse_if(self, padding: Tensor) -> None:
        if bool(padding.any()):
            raise UsageError(
                f"{self.path.parent}: attention gqa cannot go on from padded rows. "
                "Export with --onnx-attention gqa-bias and pad on the left, "
                "or run rows of different lengths one by one."
            )

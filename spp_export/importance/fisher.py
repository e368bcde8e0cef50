"""`fisher`: what the removal of units costs in nats, by the gradient of the loss.

To second order, a change D a_t of what a layer writes at token t costs `1/2 E (g_t . D a_t)^2` of
KL to the dense model, g_t being the gradient of -log p(y) for tokens y that it draws itself: its
Fisher information (Amari, 1998; in blocks, Martens and Grosse, arXiv 1503.05671). With the error
spread evenly over directions that is `1/(2d) E |g_t|^2 |D a_t|^2`, so the second moments of what
o_proj and down_proj read are weighted by each token's squared gradient; all else is `obs`. What
stays is re-fitted on plain moments.

Layers need nothing more to compare. The gradients of a domain's dialogues come with the artifacts;
other text takes a backward pass. The expansion is around the dense model: the more is removed, the
less it says. Output-only.
"""

from __future__ import annotations

from spp_export.importance.base import Convention, Need, SetCriterion
from spp_export.importance.obs import attention_loss, channel_losses, head_losses

CRITERION = SetCriterion(
    name="fisher",
    source="obs in the Fisher information of each token (Amari, 1998)",
    convention=Convention.OUTPUT_ONLY,
    heads=head_losses,
    channels=channel_losses,
    attention=attention_loss,
    needs=frozenset({Need.LOSS}),
    comparable="raw",
)

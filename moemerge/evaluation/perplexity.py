"""What log-likelihoods come to: perplexity, and the share of a gain that is left."""

import math


def perplexity(nll: float) -> float:
    """Perplexity of a mean negative log-likelihood in nats."""
    return math.exp(nll)


def gain_recovered(base_nll: float, variant_nll: float, bundle_nll: float) -> float | None:
    """Share of what fine-tuning gained that is left; None when fine-tuning gained nothing.

    `(base - bundle) / (base - variant)`; 1 is lossless.
    """
    gained = base_nll - variant_nll
    return (base_nll - bundle_nll) / gained if gained > 0 else None

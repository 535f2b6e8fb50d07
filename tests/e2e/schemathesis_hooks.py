"""Lets some of the generated bodies name a variant that exists and stay within its bounds."""

from typing import Any

import schemathesis

NAMES = ("plain", "large", "twin", "odd")
LIMITS = {"max_tokens": 4, "max_completion_tokens": 4, "n": 3, "min_tokens": 2}


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Odd names stay as they are, so that both kinds are sent."""
    if not isinstance(body, dict) or not isinstance(body.get("model"), str) or len(body["model"]) % 5 == 4:
        return body
    body["model"] = NAMES[len(body["model"]) % 4]
    if body["model"] == "odd":
        return body
    for name, most in LIMITS.items():
        if type(body.get(name)) is int:
            body[name] = min(body[name], most)
    if isinstance(body.get("prompt"), list):
        body["prompt"] = [_small(item) for item in body["prompt"][:4]]
    for name in ("logit_bias", "max_completion_tokens", "stream_options", "suffix", "best_of"):
        body.pop(name, None)
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    return body


def _small(item: Any) -> Any:
    if isinstance(item, list):
        return [_small(inner) for inner in item[:20]]
    return item % 60 if type(item) is int and item >= 0 else item

"""Text in, text out: a prompt through one variant of an engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.bundle.reader import open_bundle
from moemerge.checkpoint.tokenizer import StreamingDecoder, load_tokenizer
from moemerge.runner.engine import Engine, Swap
from moemerge.runner.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a variant answered.

    Attributes:
        swap: What making the variant active took.
        seconds: Time of generation, the prompt included.
    """

    swap: Swap
    token_ids: list[int]
    text: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "variant": self.swap.variant,
            "text": self.text,
            "token_ids": self.token_ids,
            "seconds": self.seconds,
            "moved_bytes": self.swap.moved_bytes,
            "kept_bytes": self.swap.kept_bytes,
            "swap_seconds": self.swap.seconds,
        }


def open_engine(folder: Path, variants: list[str], *, dtype: str, device: str) -> Engine:
    """An engine over a bundle, after checking that it has the variants.

    Raises:
        NotFound: The bundle or a variant does not exist.
    """
    bundle = open_bundle(folder)
    for name in variants:
        bundle.variant(name)
    return Engine(bundle, dtype=dtype, device=device)


def answer_prompt(
    engine: Engine,
    variant: str,
    prompt: str,
    *,
    max_tokens: int,
    sampling: Sampling,
    write: Callable[[str], None],
) -> Answer:
    """Let a variant continue a prompt; `write` gets the text piece by piece."""
    tokenizer = load_tokenizer(
        lambda name: engine.bundle.side_file(variant, name), f"{engine.bundle.folder}, variant {variant}"
    )
    swap = engine.switch(variant)
    decoder = StreamingDecoder(tokenizer)
    token_ids: list[int] = []
    pieces: list[str] = []
    begin = time.perf_counter()
    tokens = engine.generate(
        tokenizer.encode(prompt),
        max_tokens=max_tokens,
        sampling=sampling,
        stop_ids=tokenizer.stop_token_ids,
    )
    for token_id in tokens:
        token_ids.append(token_id)
        pieces.append(decoder.add(token_id))
        write(pieces[-1])
    pieces.append(decoder.finish())
    write(pieces[-1])
    return Answer(swap=swap, token_ids=token_ids, text="".join(pieces), seconds=time.perf_counter() - begin)

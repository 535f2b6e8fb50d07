"""transformers' `generate`, one model per variant, all of them in memory.

First come, first served: the requests at the head of the queue that are for one variant are one batch, padded
on the left. Each request's tokens count as given when they are chosen, although `generate` returns only with
the whole batch, and a request ends at its own length; both are to its advantage.
"""

import time
from collections import deque
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moemerge.bench.book import Book
from moemerge.bench.metrics import Record
from moemerge.bench.worker import Counts, WorkerSpec
from moemerge.bench.workloads import Arrival, Trace
from moemerge.errors import InvalidRecipe

_PAD = 0


class ServedTransformers:
    """All models of the spec."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._max_batch = int(spec.options.get("max_batch", 64))
        self._device = spec.device
        self._models = {name: _load(spec, name) for name in spec.variants}
        for name in spec.variants:
            warm = Arrival(at_s=0.0, variant=name, prompt_ids=(1, 2, 3), output_tokens=2)
            self.run((warm,), time.perf_counter(), 600.0)

    def run(self, trace: Trace, start_s: float, limit_s: float) -> list[Record]:
        """See `Served.run`."""
        book = Book(trace, start_s)
        waiting = deque(range(len(trace)))
        end_s = start_s + limit_s
        while waiting:
            now = time.perf_counter()
            if now >= end_s:
                book.end()
                break
            due_s = start_s + trace[waiting[0]].at_s
            if due_s > now:
                time.sleep(min(due_s, end_s) - now)
                continue
            batch = [waiting.popleft()]
            variant = trace[batch[0]].variant
            while (
                waiting
                and len(batch) < self._max_batch
                and trace[waiting[0]].variant == variant
                and start_s + trace[waiting[0]].at_s <= now
            ):
                batch.append(waiting.popleft())
            self._generate(self._models[variant], trace, batch, book, end_s)
            if not all(book.is_finished(index) for index in batch):
                book.end()
                break
        return book.records()

    def counts(self) -> Counts:
        """See `Served.counts`; it tells nothing."""
        return Counts()

    def probe(self, name: str, arguments: dict[str, Any]) -> Any:
        """See `Served.probe`; this one has nothing to probe."""
        raise NotImplementedError(name)

    def close(self) -> None:
        """See `Served.close`."""
        self._models.clear()

    def _generate(self, model: Any, trace: Trace, batch: list[int], book: Book, end_s: float) -> None:
        prompts = [trace[index].prompt_ids for index in batch]
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(batch), longest), _PAD, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            # Positions of an encoder are relative and count from the left.
            place = slice(0, len(prompt)) if model.config.is_encoder_decoder else slice(-len(prompt), None)
            ids[row, place] = torch.tensor(prompt)
            mask[row, place] = 1

        def stop(token_ids: Tensor, scores: object, **unused: object) -> Tensor:
            now = time.perf_counter()
            newest = token_ids[:, -1].tolist()
            for index, token_id in zip(batch, newest, strict=True):
                if not book.is_finished(index):
                    book.add(index, token_id, now)
            done = [book.is_finished(index) or now >= end_s for index in batch]
            return torch.tensor(done, device=token_ids.device)

        with torch.inference_mode():
            model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=max(trace[index].output_tokens for index in batch),
                do_sample=False,
                stopping_criteria=[stop],
            )


def _load(spec: WorkerSpec, name: str) -> Any:
    # Untyped in places, and only this function's business.
    transformers: Any = import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = spec.checkpoints[name]
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    dtype = config.dtype or torch.float32 if spec.dtype == "auto" else getattr(torch, spec.dtype)
    model = getattr(transformers, kind).from_pretrained(folder, dtype=dtype).to(spec.device).eval()
    start = getattr(config, "decoder_start_token_id", None)
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=_PAD, eos_token_id=None, decoder_start_token_id=start
    )
    return model


def require_transformers() -> None:
    """Make sure that the library is there.

    Raises:
        InvalidRecipe: It is not.
    """
    if not has_transformers():
        raise InvalidRecipe(
            "the system transformers needs that library: pip install 'moemerge[bench]', or leave it out"
        )


def has_transformers() -> bool:
    """Whether the library is installed; it takes seconds to import, which is not needed to know."""
    return find_spec("transformers") is not None

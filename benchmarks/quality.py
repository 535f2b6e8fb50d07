"""Quality of every policy at every budget, on a family with held-out text or tasks.

python benchmarks/quality.py FAMILY --text DIR           perplexity of a decoder-only family
python benchmarks/quality.py FAMILY --tasks DIR          exact match of an encoder-decoder family

FAMILY holds `base` and one folder per fine-tune; DIR holds `<fine-tune>.test.txt` or
`<fine-tune>.test.jsonl`. Prints markdown tables.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from moemerge.bundle.reader import open_bundle
from moemerge.bundle.verify import verify_bundle
from moemerge.calibration.texts import cut_windows, read_task
from moemerge.checkpoint.tokenizer import load_tokenizer
from moemerge.checkpoint.variants import VariantSet, open_variants
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.policies import POLICIES
from moemerge.consolidation.recipe import options_of
from moemerge.evaluation.loading import average_models, load_model
from moemerge.evaluation.perplexity import mean_nll, perplexity
from moemerge.evaluation.tasks import exact_match, greedy_answers
from moemerge.models import StandAlone
from moemerge.refs import FolderRef
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions
from moemerge.runner.request import Request

BUDGETS = ("1x", "1.5x", "2x")
ANSWER_TOKENS = 8


class Measured(NamedTuple):
    """A model as the measures see it: logits of a text, greedy answers to prompts."""

    logits: Callable[[Tensor], Tensor]
    answer: Callable[[list[list[int]], frozenset[int], int], list[list[int]]]


Score = Callable[[str, Measured], float]


def alone(model: StandAlone) -> Measured:
    """A model in memory."""
    return Measured(model.forward, partial(greedy_answers, model))


def served(engine: Engine, name: str) -> Measured:
    """A variant of an engine, with all prompts in its batches."""

    def answer(prompts: list[list[int]], stop_ids: frozenset[int], max_tokens: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        requests = [
            Request(
                request_id=str(number),
                variant=name,
                prompt_ids=tuple(prompt),
                max_tokens=max_tokens,
                stop_ids=stop_ids,
            )
            for number, prompt in enumerate(prompts)
        ]
        for output in engine.run(requests):
            answers[int(output.request_id)] += output.token_ids
        return answers

    return Measured(partial(engine.logits, name), answer)


def perplexity_of(variants: VariantSet, folder: Path, windows: int) -> Score:
    """Perplexity of a model on a variant's test text, in windows of 256 tokens."""
    cut = {}
    for name, checkpoint in variants.variants.items():
        tokenizer = load_tokenizer(checkpoint.side_file, name)
        cut[name] = cut_windows(tokenizer.encode((folder / f"{name}.test.txt").read_text()), 256, windows)

    def score(name: str, measured: Measured) -> float:
        return perplexity(mean_nll(measured.logits, cut[name]))

    return score


def accuracy_of(variants: VariantSet, folder: Path, rows: int) -> Score:
    """Exact match of a model's greedy answers on a variant's test rows."""
    tasks = {name: read_task(folder / f"{name}.test.jsonl", rows) for name in variants.variants}
    tokenizers = {name: load_tokenizer(c.side_file, name) for name, c in variants.variants.items()}

    def score(name: str, measured: Measured) -> float:
        tokenizer = tokenizers[name]

        def answer(prompts: list[list[int]]) -> list[list[int]]:
            return measured.answer(prompts, tokenizer.stop_token_ids, ANSWER_TOKENS)

        return exact_match(answer, tasks[name], tokenizer.encode, tokenizer.decode)

    return score


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", type=Path)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--text", type=Path)
    kind.add_argument("--tasks", type=Path)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--rows", type=int, default=400)
    arguments = parser.parse_args()

    folder = arguments.text or arguments.tasks
    ending = ".test.txt" if arguments.text else ".test.jsonl"
    fine_tunes = sorted(p for p in arguments.family.iterdir() if (folder / f"{p.name}{ending}").is_file())
    variants = open_variants({p.name: FolderRef(p) for p in fine_tunes}, FolderRef(arguments.family / "base"))
    if arguments.text:
        score = perplexity_of(variants, folder, arguments.windows)
    else:
        score = accuracy_of(variants, folder, arguments.rows)

    names = list(variants.variants)
    print(f"| policy | budget | bytes ratio | {' | '.join(names)} | mean |")
    print(f"| --- | --- | --- | {' | '.join('---' for _ in names)} | --- |")
    assert variants.base is not None
    base = alone(load_model(variants.base))
    print_row("base alone", "-", 1.0, [score(name, base) for name in names])
    own = [score(name, alone(load_model(variants.variants[name]))) for name in names]
    print_row("separate models", "-", len(names), own)
    average = alone(average_models(list(variants.variants.values())))
    print_row("whole models averaged", "-", 1.0, [score(name, average) for name in names])
    with tempfile.TemporaryDirectory() as temporary:
        for budget, policy in [("exact", "cluster"), *((b, p) for b in BUDGETS for p in POLICIES)]:
            target = Path(temporary) / "bundle.moe"
            merged = merge(variants, target, options_of(budget, policy))
            verify_bundle(target)
            engine = Engine(open_bundle(target), EngineOptions(dtype="float32"))
            scores = [score(name, served(engine, name)) for name in names]
            engine.close()
            print_row(policy, budget, merged.plan.bytes_ratio, scores)
            shutil.rmtree(target)


def print_row(policy: str, budget: str, ratio: float, scores: list[float]) -> None:
    cells = " | ".join(f"{value:.3f}" for value in scores)
    print(f"| {policy} | {budget} | {ratio:.3f} | {cells} | {sum(scores) / len(scores):.3f} |", flush=True)


if __name__ == "__main__":
    main()

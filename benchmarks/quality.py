"""Quality of every policy at every budget, on a family with held-out text or tasks.

python benchmarks/quality.py FAMILY --text DIR           perplexity of a decoder-only family
python benchmarks/quality.py FAMILY --tasks DIR          exact match of an encoder-decoder family

FAMILY holds `base` and one folder per fine-tune; DIR holds `<fine-tune>.test.txt` or
`<fine-tune>.test.jsonl`, and the same with `train`, on which costs are measured. Prints a markdown table
with what is left of the gain of fine-tuning: mean and worst variant.
"""

import argparse
import math
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from moemerge.bundle.reader import open_bundle
from moemerge.bundle.verify import verify_bundle
from moemerge.calibration.folder import calibrate
from moemerge.calibration.passes import CalibrationOptions
from moemerge.calibration.texts import cut_windows, read_task
from moemerge.checkpoint.tokenizer import load_tokenizer
from moemerge.checkpoint.variants import VariantSet, open_variants
from moemerge.consolidation.measured import TextStatistics
from moemerge.consolidation.pipeline import merge
from moemerge.consolidation.planning import MEASURED
from moemerge.consolidation.policies import POLICIES
from moemerge.consolidation.recipe import options_of
from moemerge.evaluation.loading import average_models, load_model
from moemerge.evaluation.perplexity import mean_nll
from moemerge.evaluation.tasks import exact_match, greedy_answers
from moemerge.models import StandAlone
from moemerge.refs import FolderRef
from moemerge.runner.engine import Engine
from moemerge.runner.options import EngineOptions
from moemerge.runner.request import Request

BUDGETS = ("1x", "1.5x", "2x")
MEASURED_BUDGETS = ("0.4x", "0.6x", "0.8x", "1x", "1.25x")
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


def nll_of(variants: VariantSet, folder: Path, windows: int, split: str) -> Score:
    """Mean negative log-likelihood, in nats, of a variant's text in windows of 256 tokens."""
    cut = {}
    for name, checkpoint in variants.variants.items():
        tokenizer = load_tokenizer(checkpoint.side_file, name)
        cut[name] = cut_windows(tokenizer.encode((folder / f"{name}.{split}.txt").read_text()), 256, windows)

    def score(name: str, measured: Measured) -> float:
        return mean_nll(measured.logits, cut[name])

    return score


def accuracy_of(variants: VariantSet, folder: Path, rows: int, split: str) -> Score:
    """Exact match of a model's greedy answers on a variant's rows."""
    tasks = {name: read_task(folder / f"{name}.{split}.jsonl", rows) for name in variants.variants}
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
    parser.add_argument("--tokens", type=int, default=32768, help="of each text, for calibration")
    parser.add_argument("--split", default="test", help="what is reported on: test, or valid for choices")
    parser.add_argument("--policies", default=",".join((*POLICIES, MEASURED)))
    arguments = parser.parse_args()

    folder = arguments.text or arguments.tasks
    ending = "txt" if arguments.text else "jsonl"
    fine_tunes = sorted(
        p for p in arguments.family.iterdir() if (folder / f"{p.name}.{arguments.split}.{ending}").is_file()
    )
    variants = open_variants({p.name: FolderRef(p) for p in fine_tunes}, FolderRef(arguments.family / "base"))
    if arguments.text:
        score = nll_of(variants, folder, arguments.windows, arguments.split)
    else:
        score = accuracy_of(variants, folder, arguments.rows, arguments.split)

    names = list(variants.variants)
    assert variants.base is not None
    base_model = alone(load_model(variants.base))
    base = [score(name, base_model) for name in names]
    own = [score(name, alone(load_model(variants.variants[name]))) for name in names]

    def show(policy: str, budget: str, ratio: float, scores: list[float]) -> None:
        gains = [(b - s) / (b - o) for b, s, o in zip(base, scores, own, strict=True)]
        shown = [math.exp(s) for s in scores] if arguments.text else scores
        cells = " | ".join(f"{value:.3f}" for value in shown)
        mean = sum(gains) / len(gains)
        print(f"| {policy} | {budget} | {ratio:.3f} | {cells} | {mean:.3f} | {min(gains):.3f} |", flush=True)

    print(f"| policy | budget | bytes ratio | {' | '.join(names)} | gain, mean | worst |")
    print(f"| --- | --- | --- | {' | '.join('---' for _ in names)} | --- | --- |")
    show("base alone", "-", 1.0, base)
    show("separate models", "-", len(names), own)
    average = alone(average_models(list(variants.variants.values())))
    show("whole models averaged", "-", 1.0, [score(name, average) for name in names])
    policies = arguments.policies.split(",")
    merges = [("exact", "cluster"), *((b, p) for b in BUDGETS for p in policies if p != MEASURED)]
    with tempfile.TemporaryDirectory() as temporary:
        statistics = None
        if MEASURED in policies:
            merges += [(budget, MEASURED) for budget in MEASURED_BUDGETS]
            texts = {name: folder / f"{name}.train.{ending}" for name in names}
            options = CalibrationOptions(num_tokens=arguments.tokens)
            done = calibrate(variants, texts, Path(temporary) / "calibration", options)
            statistics = TextStatistics(done.calibration, names)
        for budget, policy in merges:
            target = Path(temporary) / "bundle.moe"
            merged = merge(variants, target, options_of(budget, policy), statistics=statistics)
            verify_bundle(target)
            engine = Engine(open_bundle(target), EngineOptions(dtype="float32"))
            scores = [score(name, served(engine, name)) for name in names]
            engine.close()
            show(policy, budget, merged.manifest.bytes_ratio, scores)
            shutil.rmtree(target)


if __name__ == "__main__":
    main()

"""Merge the shipped family in Python, look at the result, and let every variant answer.

Run it from the repository's folder: python examples/merge_in_python.py [FOLDER FOR RESULTS]
"""

import sys
from pathlib import Path

import moemerge

FAMILY = Path(__file__).parent / "families" / "mini"
PROMPTS = {"code": "def __init__(self,", "scripture": "And God said,", "sums": "Q: 17 + 25\nW:"}


def main(out: Path) -> None:
    variants = moemerge.open_variants(
        {name: moemerge.parse_source(str(FAMILY / name)) for name in PROMPTS},
        base=moemerge.parse_source(str(FAMILY / "base")),
    )

    options = moemerge.options_of("2x", "mean")
    plan = moemerge.plan_variants(variants, options)
    experts = sum(len(layer.pool) for layer in plan.layers)
    print(f"plan: {experts} pool experts, {plan.bytes_ratio:.2f} x one variant")

    merged = moemerge.merge(variants, out / "trio.moe", plan)
    bundle = moemerge.verify_bundle(merged.folder)
    for name, entry in bundle.manifest.variants.items():
        errors = [error for layer in entry.errors.values() for error in layer]
        print(f"{name}: {sum(error == 0 for error in errors)} of {len(errors)} experts kept exactly")

    # All three variants answer in one batch: they share every expert product.
    tokenizers = {
        name: moemerge.load_tokenizer(lambda file, name=name: bundle.side_file(name, file), name)
        for name in PROMPTS
    }
    requests = [
        moemerge.Request(
            request_id=name,
            variant=name,
            prompt_ids=tuple(tokenizers[name].encode(prompt)),
            max_tokens=24,
            stop_ids=tokenizers[name].stop_token_ids,
        )
        for name, prompt in PROMPTS.items()
    ]
    engine = moemerge.Engine(bundle)
    answers: dict[str, list[int]] = {name: [] for name in PROMPTS}
    for output in engine.run(requests):
        answers[output.request_id] += output.token_ids
    for name, token_ids in answers.items():
        print(f"\n{name}\n{PROMPTS[name]}{tokenizers[name].decode(token_ids)}")
    steps = engine.snapshot().steps
    print(f"\n{steps.tokens} tokens in {steps.steps} steps, {steps.mixed} of them with several variants")

    files = moemerge.export_variant(bundle, "sums", out / "sums")
    print(f"\nexported: {', '.join(path.name for path in files)}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "example-output"))
    except moemerge.MoemergeError as error:
        sys.exit(f"error: {error}")

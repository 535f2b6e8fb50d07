"""The model card of a bundle: what it is made of, how, and what was and was not measured."""

import statistics

from moemerge.bundle.manifest import Manifest
from moemerge.checkpoint.sizes import format_size

_USE = """## Use

```
moemerge run BUNDLE -v VARIANT "a prompt"
moemerge export BUNDLE -v VARIANT -o FOLDER    # an ordinary checkpoint again
moemerge verify BUNDLE
```
"""


def write_card(manifest: Manifest) -> str:
    """Markdown with the metadata block that the hub reads.

    Args:
        manifest: What the bundle holds.
    """
    sections = [
        _metadata(manifest),
        _summary(manifest),
        _variants(manifest),
        _measured(manifest),
        _USE,
    ]
    return "\n".join(sections)


def _metadata(manifest: Manifest) -> str:
    sources = dict.fromkeys(variant.source for variant in manifest.variants.values())
    halves = [half for source in sources for half in source.split("+")]
    repositories = [half.partition("@")[0] for half in halves if "/" in half]
    lines = ["---", "library_name: moemerge", "tags:", "- moe", "- merge", "- moemerge"]
    if repositories:
        lines += ["base_model:", *(f"- {repository}" for repository in dict.fromkeys(repositories))]
        lines.append("base_model_relation: merge")
    lines += [f"license: {_licence(manifest)}", "---", ""]
    return "\n".join(lines)


def _licence(manifest: Manifest) -> str:
    """The common licence; `other` when they differ, `unknown` when a source names none."""
    licences = {variant.licence for variant in manifest.variants.values()}
    if None in licences:
        return "unknown"
    return str(licences.pop()) if len(licences) == 1 else "other"


def _summary(manifest: Manifest) -> str:
    separate = len(manifest.variants) * manifest.variant_bytes
    experts = sum(layer.num_experts for layer in manifest.layers)
    slots = len(manifest.layers) * manifest.num_slots * len(manifest.variants)
    made = manifest.provenance
    pool = f"{format_size(manifest.pool_bytes)} ({experts} experts, {manifest.bytes_ratio:.3f} x one model)"
    return f"""# {" + ".join(manifest.variants)}

{len(manifest.variants)} fine-tuned `{manifest.family}` models in one moemerge
bundle: one expert pool, one expert map and one set of non-expert tensors per variant.

| | |
| --- | --- |
| expert bytes, separate models | {format_size(separate)} ({slots} experts) |
| expert bytes, this bundle | {pool} |
| budget | `{made.budget}` |
| policy | `{made.policy}`{", experts of one variant may share" if made.within else ""} |
| base | {made.base or "not given"} |
| made with | moemerge {made.moemerge} |
"""


def _variants(manifest: Manifest) -> str:
    rows = [
        f"| `{name}` | {variant.source} | {variant.licence or 'not stated'} |"
        for name, variant in manifest.variants.items()
    ]
    return "\n".join(["## Variants", "", "| name | source | licence |", "| --- | --- | --- |", *rows, ""])


def _measured(manifest: Manifest) -> str:
    rows = []
    for name, variant in manifest.variants.items():
        errors = [error for layer in variant.errors.values() for error in layer]
        exact = sum(error == 0 for error in errors) / len(errors)
        rows.append(f"| `{name}` | {exact:.1%} | {statistics.fmean(errors):.4f} | {max(errors):.4f} |")
    return "\n".join(
        [
            "## Measured",
            "",
            "Distance of each slot's expert to the pool expert that stands for it, over the expert's norm:",
            "",
            "| variant | slots kept exact | mean | worst |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "Distances of weights do not tell how a model answers. Quality on text was not measured here.",
            "",
        ]
    )

"""`moemerge show`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moemerge.cli.command import JsonOption, OfflineOption, print_findings, print_json

if TYPE_CHECKING:
    from moemerge.bundle.reader import Bundle
    from moemerge.checkpoint.checkpoint import Checkpoint


def show(
    reference: Annotated[str, typer.Argument(metavar="REF|BUNDLE", help="A checkpoint or a bundle.")],
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what a checkpoint or bundle holds, from headers only.

    Example: moemerge show examples/families/mini/base
    """
    from moemerge.bundle.reader import is_bundle, open_bundle
    from moemerge.checkpoint.checkpoint import open_checkpoint
    from moemerge.checkpoint.variants import open_source
    from moemerge.refs import FolderRef, parse_source

    ref = parse_source(reference)
    if isinstance(ref, FolderRef) and is_bundle(ref.path):
        _show_bundle(open_bundle(ref.path), as_json=as_json)
    else:
        _show_checkpoint(open_checkpoint(open_source(ref, offline=offline)), as_json=as_json)


def _show_checkpoint(checkpoint: "Checkpoint", *, as_json: bool) -> None:
    from moemerge.checkpoint.sizes import format_size
    from moemerge.cli.tables import print_table

    total = checkpoint.expert_bytes + checkpoint.other_bytes
    facts = {
        "family": checkpoint.family.model_type,
        "routed_layers": len(checkpoint.routed_layers),
        "experts_per_layer": checkpoint.num_experts,
        "experts_per_token": checkpoint.settings["num_experts_per_token"],
        "vocabulary": checkpoint.settings["vocab_size"],
        "expert_layout": checkpoint.layout,
        "tied_head": checkpoint.settings["tied_head"],
        "expert_bytes": checkpoint.expert_bytes,
        "non_expert_bytes": checkpoint.other_bytes,
        "expert_share": round(checkpoint.expert_bytes / total, 6),
        "dtype_bytes": checkpoint.dtype_bytes(),
        "tensors": len(checkpoint.tensors) + sum(len(parts) for parts in checkpoint.experts.values()),
    }
    if as_json:
        print_json("show", {"kind": "checkpoint", **facts}, checkpoint.findings)
        return
    sizes = {"expert_bytes", "non_expert_bytes"}
    rows = [
        [name.replace("_", " "), format_size(value) if name in sizes and isinstance(value, int) else value]
        for name, value in facts.items()
        if name not in ("dtype_bytes", "expert_share")
    ]
    dtypes = ", ".join(f"{dtype} {format_size(size)}" for dtype, size in checkpoint.dtype_bytes().items())
    rows += [["expert share", f"{checkpoint.expert_bytes / total:.1%}"], ["dtypes", dtypes]]
    print_table(checkpoint.label, ["", ""], rows)
    print_findings(checkpoint.findings)


def _show_bundle(bundle: "Bundle", *, as_json: bool) -> None:
    from moemerge.checkpoint.sizes import format_size
    from moemerge.cli.tables import print_table

    manifest = bundle.manifest
    variants = {
        name: {
            "source": entry.source,
            "own_bytes": sum(t.nbytes for t in bundle.tensors(name).values() if _is_own(t.path, name)),
            "shared_bytes": sum(t.nbytes for t in bundle.tensors(name).values() if not _is_own(t.path, name)),
            "exact_slots": sum(error == 0 for errors in entry.errors.values() for error in errors),
            "worst_error": max(error for errors in entry.errors.values() for error in errors),
        }
        for name, entry in manifest.variants.items()
    }
    data = {
        "kind": "bundle",
        "family": manifest.family,
        "layers": len(manifest.layers),
        "slots_per_layer": manifest.num_slots,
        "pool_experts": [layer.num_experts for layer in manifest.layers],
        "pool_bytes": manifest.pool_bytes,
        "bytes_ratio": manifest.bytes_ratio,
        "policy": manifest.provenance.policy,
        "budget": manifest.provenance.budget,
        "variants": variants,
    }
    if as_json:
        print_json("show", data)
        return
    slots = len(manifest.layers) * manifest.num_slots
    typer.echo(
        f"{bundle.folder}: {manifest.family}, {len(variants)} variants, {len(manifest.layers)} layers of "
        f"{manifest.num_slots} slots\n"
        f"pool {format_size(manifest.pool_bytes)}, {manifest.bytes_ratio:.3f} x one variant's experts "
        f"(budget {manifest.provenance.budget}, policy {manifest.provenance.policy})"
    )
    rows = [
        [
            name,
            facts["source"],
            format_size(float(str(facts["own_bytes"]))),
            format_size(float(str(facts["shared_bytes"]))),
            f"{facts['exact_slots']} of {slots}",
            facts["worst_error"],
        ]
        for name, facts in variants.items()
    ]
    columns = ["variant", "source", "own non-experts", "shared non-experts", "exact slots", "worst error"]
    print_table("Variants", columns, rows)


def _is_own(path: Path, variant: str) -> bool:
    return path.parts[-3:-1] == ("variants", variant)

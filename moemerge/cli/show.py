"""`moemerge show`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moemerge.cli.command import (
    AllowPickleOption,
    JsonOption,
    OfflineOption,
    QuietOption,
    hint,
    print_findings,
    print_json,
)
from moemerge.cli.progress import show_progress
from moemerge.errors import NotFound

if TYPE_CHECKING:
    from moemerge.bundle.listing import ListedTensor
    from moemerge.bundle.opened import OpenedModel
    from moemerge.bundle.reader import Bundle
    from moemerge.checkpoint.checkpoint import Checkpoint
    from moemerge.checkpoint.repository import Repository

_SIZES = ("expert_bytes", "non_expert_bytes")
_NOT_IN_TABLE = ("kind", "dtype_bytes", "expert_share", "ties", "dropped", "parameters", "active_parameters")
_MOST_DROPPED = 3


def show(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REF|BUNDLE[:VARIANT]", help="A checkpoint, an adapter, a bundle, or one of its variants."
        ),
    ],
    tensors: Annotated[
        str | None,
        typer.Option("--tensors", metavar="GLOB", help="List tensors whose names match, such as '*router*'."),
    ] = None,
    offline: OfflineOption = False,
    allow_pickle: AllowPickleOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what a checkpoint or bundle holds, from headers only.

    --tensors lists what is in the files under the names it has there, also of a checkpoint that moemerge
    does not read. Of an adapter alone is told what it is and which base it names; BASE+ADAPTER is the
    checkpoint that it makes.

    Example: moemerge show examples/families/mini/base --tensors "*embed*"
    """
    from moemerge.bundle.listing import list_tensors
    from moemerge.bundle.opened import variant_model
    from moemerge.bundle.reader import is_bundle, open_bundle
    from moemerge.checkpoint.variants import open_readable
    from moemerge.checkpoint.weights import is_adapter
    from moemerge.refs import FolderRef, VariantRef, parse_model

    ref = parse_model(reference)
    if tensors is not None:
        with show_progress(quiet=quiet) as progress:
            found = list_tensors(ref, offline=offline, allow_pickle=allow_pickle, progress=progress)
        _show_tensors(found, tensors, as_json=as_json)
    elif isinstance(ref, VariantRef):
        _show_variant(variant_model(open_bundle(ref.folder), ref.variant), as_json=as_json)
    elif isinstance(ref, FolderRef) and is_bundle(ref.path):
        _show_bundle(open_bundle(ref.path), as_json=as_json)
    else:
        with show_progress(quiet=quiet) as progress:
            source = open_readable(
                ref, offline=offline, allow_pickle=allow_pickle, find_base=False, progress=progress
            )
        if is_adapter(source.repository):
            _show_adapter(source.repository, as_json=as_json)
        else:
            _show_checkpoint(source.open(), as_json=as_json)


def _show_checkpoint(checkpoint: "Checkpoint", *, as_json: bool) -> None:
    from moemerge.bundle.opened import checkpoint_model

    facts = _facts(checkpoint_model(checkpoint))
    facts |= {"expert_layout": checkpoint.layout, "dropped": checkpoint.dropped}
    if as_json:
        print_json("show", {"kind": "checkpoint", **facts}, checkpoint.findings)
        return
    _print_facts(checkpoint.label, facts)
    print_findings(checkpoint.findings)


def _show_adapter(files: "Repository", *, as_json: bool) -> None:
    from moemerge.checkpoint.adapter import read_adapter
    from moemerge.checkpoint.sizes import format_size
    from moemerge.cli.tables import print_table

    adapter = read_adapter(files)
    config = adapter.config
    data = {
        "kind": "adapter",
        "method": config.kind,
        "base": config.base_model_name_or_path,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "modules": config.target_modules or [],
        "parameters": config.target_parameters or [],
        "replaced": config.modules_to_save or [],
        "peft": config.peft_version,
        "tensors": len(adapter.tensors),
        "bytes": adapter.nbytes,
    }
    if as_json:
        print_json("show", data)
        return
    shown = {**data, "bytes": format_size(adapter.nbytes)}
    rows = [[name, _listed(v)] for name, v in shown.items() if name != "kind" and v not in (None, [])]
    print_table(f"{files.label}: an adapter", ["", ""], rows)
    hint(f"moemerge show BASE+{files.label} tells what it makes of its base")


def _listed(value: object) -> object:
    return ", ".join(sorted(map(str, value))) if isinstance(value, list) else value


def _show_variant(model: "OpenedModel", *, as_json: bool) -> None:
    facts = _facts(model)
    if as_json:
        print_json("show", {"kind": "variant", **facts})
    else:
        _print_facts(model.label, facts)


def _facts(model: "OpenedModel") -> dict[str, Any]:
    total = model.expert_bytes + model.other_bytes
    parameters, active = model.num_parameters()
    return {
        "family": model.family.name,
        "layers": sum(1 for _ in model.family.stack_layers(model.settings)),
        "routed_layers": len(model.family.routed_layers(model.settings)),
        "experts_per_layer": model.num_experts,
        "experts_per_token": model.settings.get("num_experts_per_token"),
        "vocabulary": model.settings["vocab_size"],
        "tied_head": bool(model.settings["tied_head"]),
        "ties": model.ties(),
        "expert_bytes": model.expert_bytes,
        "non_expert_bytes": model.other_bytes,
        "expert_share": round(model.expert_bytes / total, 6),
        "parameters": parameters,
        "active_parameters": active,
        "dtype_bytes": model.dtype_bytes(),
        "tensors": len(model.tensors),
    }


def _print_facts(label: str, facts: dict[str, Any]) -> None:
    from moemerge.checkpoint.sizes import format_size
    from moemerge.cli.tables import print_table

    rows = [
        [name.replace("_", " "), format_size(value) if name in _SIZES else value]
        for name, value in facts.items()
        if name not in _NOT_IN_TABLE
    ]
    ties = [f"{role} is {other}" for role, other in facts["ties"].items()]
    dropped = [f"{name} ({reason})" for name, reason in facts.get("dropped", {}).items()]
    rows += [
        ["expert share", f"{facts['expert_share']:.1%}"],
        [
            "parameters",
            f"{facts['parameters'] / 1e6:,.4g} M, {facts['active_parameters'] / 1e6:,.4g} M a token",
        ],
        ["dtypes", ", ".join(f"{dtype} {format_size(size)}" for dtype, size in facts["dtype_bytes"].items())],
        *([["ties", ", ".join(ties)]] if ties else []),
        *([["not kept", "; ".join(dropped[:_MOST_DROPPED])]] if dropped else []),
    ]
    print_table(label, ["", ""], rows)


def _show_tensors(tensors: "list[ListedTensor]", pattern: str, *, as_json: bool) -> None:
    from dataclasses import asdict
    from fnmatch import fnmatchcase

    from moemerge.checkpoint.sizes import format_size
    from moemerge.cli.tables import print_table

    found = [tensor for tensor in tensors if fnmatchcase(tensor.name, pattern)]
    if not found:
        raise NotFound(
            f"--tensors {pattern!r}: none of {len(tensors)} tensors has such a name; "
            f"the first is {tensors[0].name if tensors else 'missing'}. * stands for anything"
        )
    if as_json:
        print_json("show", {"kind": "tensors", "pattern": pattern, "tensors": [asdict(t) for t in found]})
        return
    rows = [
        [t.name, t.dtype, "x".join(map(str, t.shape)), format_size(t.nbytes), t.file or "computed"]
        for t in found
    ]
    total = format_size(sum(tensor.nbytes for tensor in found))
    title = f"{len(found)} of {len(tensors)} tensors, {total}"
    print_table(title, ["tensor", "dtype", "shape", "size", "file"], rows)


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
        "residual_bytes": manifest.residual_bytes,
        "bytes_ratio": manifest.bytes_ratio,
        "policy": manifest.provenance.policy,
        "budget": manifest.provenance.budget,
        "variants": variants,
    }
    if as_json:
        print_json("show", data)
        return
    slots = len(manifest.layers) * manifest.num_slots
    residuals = f", residuals {format_size(manifest.residual_bytes)}" if manifest.residual_bytes else ""
    typer.echo(
        f"{bundle.folder}: {manifest.family}, {len(variants)} variants, {len(manifest.layers)} layers of "
        f"{manifest.num_slots} slots\n"
        f"pool {format_size(manifest.pool_bytes)}{residuals}: {manifest.bytes_ratio:.3f} x one variant's "
        f"experts (budget {manifest.provenance.budget}, policy {manifest.provenance.policy})"
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

"""Prove that a bundle is whole: every byte, every tensor, every map."""

import re
from pathlib import Path

from moemerge.bundle.layout import RESIDUAL_FOLDER
from moemerge.bundle.manifest import CHECKSUMS, MANIFEST, read_manifest
from moemerge.bundle.reader import Bundle, open_bundle, residual_files
from moemerge.bundle.writer import format_checksums
from moemerge.checkpoint.digest import hash_file
from moemerge.errors import DamagedBundle, DamagedInput, Finding, MoemergeError, list_findings
from moemerge.progress import Progress, Silent

# What hubs and git keep beside a repository's own files.
NOT_OURS = {".cache", ".git", ".gitattributes", ".gitignore"}
_CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def verify_bundle(folder: Path, progress: Progress | None = None) -> Bundle:
    """Check hashes, the completeness ledger, geometry and expert maps.

    Args:
        folder: The bundle.
        progress: Told of the bytes hashed.

    Returns:
        The bundle, proven whole.

    Raises:
        DamagedBundle: With a finding for everything that is wrong.
        NotFound, UnsupportedCheckpoint: Not a readable bundle at all.
    """
    findings = check_hashes(folder, progress or Silent())
    try:
        bundle = open_bundle(folder)
        findings += check_ledger(bundle)
    except DamagedInput as error:
        findings.append(_damaged("UNREADABLE", str(folder), str(error).removeprefix(f"{folder}: ")))
    except MoemergeError:
        # Not a bundle, or of another format: its own error says more, unless bytes are damaged.
        if not findings:
            raise
    if findings:
        raise DamagedBundle(list_findings(findings, str(folder)), findings)
    return bundle


def check_hashes(folder: Path, progress: Progress) -> list[Finding]:
    """Compare every file with `SHA256SUMS`, and the set of files with the list.

    Raises:
        NotFound, UnsupportedCheckpoint: Not a bundle.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        read_manifest(folder)
        return [_damaged("FILE_MISSING", str(path), "is missing", "the list of all files")]
    listed = _parse_checksums(path)
    if listed is None:
        return [_damaged("CHECKSUMS", str(path), "is not in the form that was written")]
    present = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if not p.is_dir()}
    present.pop(CHECKSUMS)
    present = {name: path for name, path in present.items() if name.split("/")[0] not in NOT_OURS}
    findings = [
        _damaged("FILE_MISSING", name, "is missing") for name in sorted(listed.keys() - present.keys())
    ]
    findings += [
        Finding(
            level="error", code="FILE_UNKNOWN", where=name, found="is not part of the bundle", fix="Remove it"
        )
        for name in sorted(present.keys() - listed.keys())
    ]
    findings += [
        _damaged("LINK", name, "is a symbolic link", "an ordinary file")
        for name, path in present.items()
        if name in listed and path.is_symlink()
    ]
    common = sorted(listed.keys() & present.keys())
    progress.start("verify", sum(present[name].stat().st_size for name in common))
    for name in common:
        if hash_file(present[name], progress.advance) != listed[name]:
            findings.append(_damaged("HASH", name, "was changed since it was written"))
    return findings


def read_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 by path of every file of a bundle, as it says itself.

    Raises:
        DamagedBundle: There is no such list, or it is malformed.
    """
    path = folder / CHECKSUMS
    listed = _parse_checksums(path) if path.is_file() else None
    if listed is None:
        raise DamagedBundle(f"{path}: is missing or malformed. See `moemerge verify {folder}`")
    return listed


def _parse_checksums(path: Path) -> dict[str, str] | None:
    text = path.read_bytes().decode("utf-8", errors="replace")
    matches = [_CHECKSUM_LINE.fullmatch(line) for line in text.split("\n")[:-1]]
    listed = {match[2]: match[1] for match in matches if match}
    return None if None in matches or text != format_checksums(listed) else listed


def check_ledger(bundle: Bundle) -> list[Finding]:
    """Every tensor of every variant is there, with the shape its settings give, and nothing else is.

    Raises:
        DamagedInput: A file cannot be read as what it should be.
    """
    findings: list[Finding] = []
    used: dict[str, set[str]] = {}
    pools = [bundle.pool(layer.index) for layer in bundle.manifest.layers]
    pool_bytes = sum(matrix.nbytes for pool in pools for parts in pool for matrix in parts.values())
    if pool_bytes != bundle.manifest.pool_bytes:
        findings.append(
            _damaged("POOL_BYTES", MANIFEST, f"pool_bytes is {bundle.manifest.pool_bytes}", str(pool_bytes))
        )
    residual_bytes = sum(map(bundle.residual_bytes, bundle.manifest.variants))
    if residual_bytes != bundle.manifest.residual_bytes:
        found = f"residual_bytes is {bundle.manifest.residual_bytes}"
        findings.append(_damaged("RESIDUAL_BYTES", MANIFEST, found, str(residual_bytes)))
    for name, entry in bundle.manifest.variants.items():
        try:
            bundle.tensors(name)
        except DamagedBundle as error:
            findings.append(_damaged("TENSORS", f"variant {name}", str(error)))
        for tensor, file in entry.tensors.items():
            used.setdefault(file, set()).add(tensor)
        for file in entry.files:
            bundle.side_file(name, file)
    findings += _unclaimed(bundle, used)
    findings += _unused_residuals(bundle)
    return findings


def _unused_residuals(bundle: Bundle) -> list[Finding]:
    used = {file for name, entry in bundle.manifest.variants.items() for file in residual_files(name, entry)}
    folder = bundle.folder / RESIDUAL_FOLDER
    present = {p.relative_to(bundle.folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    return [
        _damaged("RESIDUAL_UNUSED", file, "no variant has residuals there") for file in sorted(present - used)
    ]


def _unclaimed(bundle: Bundle, used: dict[str, set[str]]) -> list[Finding]:
    findings = [
        _damaged("TENSOR_UNKNOWN", file, f"{name} belongs to no variant")
        for file, names in used.items()
        for name in sorted(bundle.stored_names(file) - names)
    ]
    for layer in bundle.manifest.layers:
        mapped = {index for entry in bundle.manifest.variants.values() for index in entry.maps[layer.index]}
        findings += [
            _damaged("POOL_UNUSED", layer.file, f"pool expert {index} is in no expert map")
            for index in sorted(set(range(layer.num_experts)) - mapped)
        ]
    return findings


def _damaged(code: str, where: str, found: str, expected: str = "") -> Finding:
    return Finding(
        level="error",
        code=code,
        where=where,
        found=found,
        expected=expected,
        fix="Copy or build the bundle again",
    )

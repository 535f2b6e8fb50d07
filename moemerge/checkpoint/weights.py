"""Which files hold a checkpoint's weights, and every tensor in them.

File names come from the index, never from a pattern, and index and headers must agree. Kinds of
checkpoint that cannot be read are refused here, each with what to do instead.
"""

import re

from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.repository import Repository, read_json
from moemerge.errors import DamagedInput, Finding, MissingTensors, UnsupportedCheckpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = re.compile(r"pytorch_model.*\.bin(\.index\.json)?")
_QUANTISED_NAMES = re.compile(
    r"(qweight|qzeros|g_idx|absmax|quant_map|quant_state.*|SCB|weight_scale|weight_scale_inv|scale_inv"
    r"|_blocks|_scales|weight_packed)$"
)


def find_weight_files(repository: Repository) -> list[str]:
    """Names of the safetensors files, in order.

    Raises:
        UnsupportedCheckpoint: There are none; the message says what there is instead.
        DamagedInput: An index that is malformed or names files outside the folder.
    """
    files = repository.files()
    if INDEX in files:
        return sorted(set(_weight_map(repository).values()))
    if SINGLE in files:
        return [SINGLE]
    raise UnsupportedCheckpoint(f"{repository.label}: {_explain_no_weights(files)}")


def read_weight_headers(repository: Repository) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name, from headers alone.

    Raises:
        MissingTensors: The index names files or tensors that are not there.
        DamagedInput: A tensor in two files, or in another file than the index says.
        UnsupportedCheckpoint: As `find_weight_files`.
    """
    files = repository.files()
    names = find_weight_files(repository)
    if missing := [name for name in names if name not in files]:
        raise MissingTensors(
            f"{repository.label}/{INDEX}: names {len(missing)} files that do not exist; first {missing[0]}. "
            f"Is the download complete?"
        )
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        for tensor_name, tensor in repository.header(name).items():
            if tensor_name in tensors:
                raise DamagedInput(
                    f"{repository.label}: tensor {tensor_name} is in both {tensors[tensor_name].path.name} "
                    f"and {name}; shards of two uploads?"
                )
            tensors[tensor_name] = tensor
    if INDEX in files:
        _check_index(repository, tensors)
    return tensors


def find_quantised(tensors: dict[str, StoredTensor], where: str) -> list[Finding]:
    """An error if names or dtypes tell that the weights are quantised."""
    signs = [name for name in tensors if _QUANTISED_NAMES.search(name)]
    signs += [
        f"{name} ({tensor.dtype})"
        for name, tensor in tensors.items()
        if tensor.dtype.startswith("F8") or (tensor.dtype in ("I8", "U8") and name.endswith(".weight"))
    ]
    if not signs:
        return []
    found = f"quantised weights ({signs[0]}{f' and {len(signs) - 1} more' if len(signs) > 1 else ''})"
    return [
        Finding(
            level="error",
            code="QUANTISED",
            where=where,
            found=found,
            expected="floating-point weights",
            fix="Use the unquantised repository",
        )
    ]


def _weight_map(repository: Repository) -> dict[str, str]:
    where = f"{repository.label}/{INDEX}"
    weight_map = read_json(repository, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedInput(f"{where}: no weight_map")
    for tensor_name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file_name):
            raise DamagedInput(
                f"{where}: {tensor_name} is said to be in {file_name!r}, which is not a file of the folder"
            )
    return weight_map


def _check_index(repository: Repository, tensors: dict[str, StoredTensor]) -> None:
    where = f"{repository.label}/{INDEX}"
    weight_map = _weight_map(repository)
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise MissingTensors(
            f"{where}: names {len(absent)} tensors that are in no shard; first {absent[0]}. "
            f"Is the download complete?"
        )
    for name, tensor in tensors.items():
        if weight_map.get(name) != tensor.path.name:
            raise DamagedInput(
                f"{where}: tensor {name} is in {tensor.path.name}, the index says {weight_map.get(name)}; "
                f"shards of two uploads?"
            )


def _explain_no_weights(files: dict[str, int]) -> str:
    if "adapter_config.json" in files:
        return (
            "an adapter without its base model; merge it into the base first "
            "(peft: model.merge_and_unload().save_pretrained(...)) and give that folder"
        )
    if any(_PICKLES.fullmatch(name) for name in files):
        return (
            "weights are pickles (pytorch_model*.bin), which can run code when opened; "
            "use a revision with safetensors, or convert it with transformers' save_pretrained"
        )
    if any(name.endswith(".gguf") for name in files):
        return "only GGUF files, another runtime's format; use the original repository"
    if any(name.startswith("consolidated") for name in files):
        return "only the publisher's raw layout (consolidated*); use the converted files"
    if any(name.endswith((".msgpack", ".h5", ".onnx")) for name in files):
        return "only Flax, TensorFlow or ONNX weights; no PyTorch weights"
    if any(name.startswith("gptq_model") or name == "quantize_config.json" for name in files):
        return "quantised by GPTQ; use the unquantised repository"
    return f"no weights: neither {SINGLE} nor {INDEX}. Is the download complete?"

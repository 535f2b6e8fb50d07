"""Which files hold a checkpoint's weights, and every tensor in them.

File names come from the index, never from a pattern, and index and headers must agree. Kinds of
checkpoint that cannot be read are refused here, each with what to do instead.
"""

import re
from concurrent.futures import ThreadPoolExecutor

from moemerge.checkpoint.headers import StoredTensor
from moemerge.checkpoint.repository import Repository, read_json
from moemerge.errors import DamagedInput, Finding, MissingTensors, UnsupportedCheckpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
_PICKLES = re.compile(r"pytorch_model.*\.bin(\.index\.json)?")
_QUANTISED_NAMES = re.compile(
    r"(qweight|qzeros|g_idx|absmax|quant_map|quant_state.*|SCB|weight_scale|weight_scale_inv|scale_inv"
    r"|_blocks|_scales|weight_packed|q_weight|q_scale|q_invperm)$"
)
# A hub repository answers many small requests; one after another they would take seconds.
_PARALLEL_HEADERS = 8


def find_weight_files(repository: Repository) -> list[str]:
    """Names of the safetensors files, in order; of an adapter, its own.

    Raises:
        UnsupportedCheckpoint: There are none; the message says what there is instead.
        DamagedInput: An index that is malformed or names files outside the folder.
    """
    files = repository.files()
    if INDEX in files:
        return sorted(set(_weight_map(repository, INDEX).values()))
    if SINGLE in files:
        return [SINGLE]
    if is_adapter(repository) and ADAPTER in files:
        return [ADAPTER]
    raise UnsupportedCheckpoint(f"{repository.label}: {_explain_no_weights(repository)}")


def has_only_pickles(repository: Repository) -> bool:
    """Whether weights are there as pickles and not as safetensors, which would win."""
    files = repository.files()
    if is_adapter(repository):
        return ADAPTER_PICKLE in files and ADAPTER not in files
    has_pickles = PICKLE_SINGLE in files or PICKLE_INDEX in files
    return has_pickles and SINGLE not in files and INDEX not in files


def is_adapter(repository: Repository) -> bool:
    """Whether there is an adapter's configuration and no weights of a whole model."""
    files = repository.files()
    return ADAPTER_CONFIG in files and not files.keys() & {SINGLE, INDEX, PICKLE_SINGLE, PICKLE_INDEX}


def refuse_adapter(repository: Repository) -> None:
    """Raise `UnsupportedCheckpoint` for an adapter where a whole model is needed."""
    if is_adapter(repository):
        base = (
            read_json(repository, ADAPTER_CONFIG).get("base_model_name_or_path") or "a model it does not name"
        )
        raise UnsupportedCheckpoint(
            f"{repository.label}: {ADAPTER_CONFIG} says that this is an adapter of {base}, without the "
            f"weights of that model. Write BASE+{repository.label} to apply it"
        )


def find_pickle_files(repository: Repository) -> list[str]:
    """Names of the pickles, in order; the index decides what they are called.

    Raises:
        DamagedInput: An index that is malformed or names files outside the folder.
    """
    if PICKLE_INDEX in repository.files():
        return sorted(set(_weight_map(repository, PICKLE_INDEX).values()))
    return [ADAPTER_PICKLE if is_adapter(repository) else PICKLE_SINGLE]


def require_files(repository: Repository, names: list[str], index: str) -> None:
    """Raise `MissingTensors` unless every file that the index names is there."""
    files = repository.files()
    if missing := [name for name in names if name not in files]:
        raise MissingTensors(
            f"{repository.label}/{index}: names {len(missing)} files that do not exist; first {missing[0]}. "
            f"Is the download complete?"
        )


def read_weight_headers(repository: Repository) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name, from headers alone.

    Raises:
        MissingTensors: The index names files or tensors that are not there.
        DamagedInput: A tensor in two files, or in another file than the index says.
        UnsupportedCheckpoint: As `find_weight_files`.
    """
    names = find_weight_files(repository)
    require_files(repository, names, INDEX)
    with ThreadPoolExecutor(_PARALLEL_HEADERS) as pool:
        headers = list(pool.map(repository.header, names))
    tensors: dict[str, StoredTensor] = {}
    for name, header in zip(names, headers, strict=True):
        for tensor_name, tensor in header.items():
            if tensor_name in tensors:
                raise DamagedInput(
                    f"{repository.label}: tensor {tensor_name} is in both {tensors[tensor_name].path.name} "
                    f"and {name}; shards of two uploads?"
                )
            tensors[tensor_name] = tensor
    if INDEX in repository.files():
        _check_index(repository, tensors)
    return tensors


def read_tensor_names(repository: Repository) -> set[str]:
    """Names of all tensors: of an index, of pickles too, or else of headers.

    Raises:
        MoemergeError: As `read_weight_headers`.
    """
    files = repository.files()
    if SINGLE not in files and INDEX not in files and PICKLE_INDEX in files:
        return set(_weight_map(repository, PICKLE_INDEX))
    return set(read_weight_headers(repository))


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


def _weight_map(repository: Repository, index: str) -> dict[str, str]:
    where = f"{repository.label}/{index}"
    ending = "bin" if index == PICKLE_INDEX else "safetensors"
    weight_map = read_json(repository, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedInput(f"{where}: no weight_map")
    for tensor_name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not re.fullmatch(rf"[\w.-]+\.{ending}", file_name):
            raise DamagedInput(
                f"{where}: {tensor_name} is said to be in {file_name!r}, which is not a file of the folder"
            )
    return weight_map


def _check_index(repository: Repository, tensors: dict[str, StoredTensor]) -> None:
    where = f"{repository.label}/{INDEX}"
    weight_map = _weight_map(repository, INDEX)
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


def _explain_no_weights(repository: Repository) -> str:
    files = repository.files()
    kinds = (PICKLE_SINGLE, PICKLE_INDEX, ADAPTER_PICKLE)
    if has_only_pickles(repository):
        return (
            f"weights are pickles ({next(name for name in kinds if name in files)}), which can "
            f"run code when opened. Use a revision with safetensors, or pass --allow-pickle to convert them "
            f"with a reader that runs nothing"
        )
    if ADAPTER_CONFIG in files:
        return f"an adapter without {ADAPTER}. Is the download complete?"
    if shards := [name for name in files if _PICKLES.fullmatch(name)]:
        return f"{shards[0]} is a shard, but there is no {PICKLE_INDEX}. Is the download complete?"
    if any(name.startswith("gptq_model") or name == "quantize_config.json" for name in files):
        return "quantised by GPTQ (gptq_model-*); use the unquantised repository"
    if gguf := [name for name in files if name.endswith(".gguf")]:
        return f"only GGUF files ({gguf[0]}), another runtime's format; use the original repository"
    if "measurement.json" in files:
        return "measurement.json belongs to EXL2, another runtime's format; use the original repository"
    if raw := [name for name in files if name.startswith("consolidated")]:
        return f"only the publisher's raw layout ({raw[0]}); use the converted files"
    if other := [name for name in files if name.endswith((".msgpack", ".h5", ".onnx"))]:
        return f"only Flax, TensorFlow or ONNX weights ({other[0]}); use a revision with PyTorch weights"
    return f"no weights: neither {SINGLE} nor {INDEX}. Is the download complete?"

"""Random Mixtral checkpoints with true proportions, for benchmarks.

python benchmarks/generate.py mix-L OUT --variants 3
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from moemerge.checkpoint.family import Family, evaluate_shape, find_family
from moemerge.checkpoint.settings import read_settings
from moemerge.checkpoint.writer import memory_tensor, write_tensors, write_text

# name: hidden, layers, heads, key/value heads, expert width, vocabulary
SHAPES = {
    "mix-S": (512, 8, 8, 2, 1792, 4000),
    "mix-M": (1024, 8, 16, 4, 3584, 8000),
    "mix-L": (1024, 12, 16, 4, 3584, 8000),
}


def config_of(name: str) -> dict[str, object]:
    """A Mixtral config of that shape."""
    hidden, layers, heads, kv_heads, width, vocab = SHAPES[name]
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": width,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }


def named_shapes(family: Family, config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a checkpoint, layer by layer as transformers writes them."""
    settings, _ = read_settings(config, family, "generated")
    symbols = family.symbols(settings)
    for _, names, pattern in family.expected_tensors(settings):
        yield names[0], evaluate_shape(pattern.shape, symbols)
    for layer in family.routed_layers(settings):
        for slot in range(int(settings["num_experts"] or 0)):
            for tensor in family.experts.layouts[0].tensors:
                name = family.expert_tensor_name(tensor, layer, slot)
                yield name, family.part_shape(tensor.holds[0], settings)


def write_variant(folder: Path, name: str, seed: int, distance: float) -> None:
    """A checkpoint whose weights are a common random base plus noise of that relative norm."""
    config = config_of(name)
    tensors = []
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    for tensor_name, shape in named_shapes(find_family("mixtral", "generated"), config):
        value = torch.empty(shape)
        if len(shape) == 1:
            value.fill_(1.0)
        else:
            value.normal_(std=shape[-1] ** -0.5, generator=common)
            value += torch.empty(shape).normal_(std=distance * shape[-1] ** -0.5, generator=own)
        tensors.append(memory_tensor(tensor_name, value.to(torch.bfloat16)))
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_text(folder / "config.json", json.dumps(config, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", type=int, default=3)
    parser.add_argument("--distance", type=float, default=0.1)
    arguments = parser.parse_args()
    for index in range(arguments.variants):
        write_variant(arguments.out / f"variant-{index}", arguments.shape, index + 1, arguments.distance)
        print(arguments.out / f"variant-{index}")


if __name__ == "__main__":
    main()

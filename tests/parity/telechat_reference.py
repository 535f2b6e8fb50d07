"""TeleChat's arithmetic token by token, head by head and expert by expert, from tensors as they lie on disk.

Written from what the series publishes about itself and from no code of this package: the order of rows in
`key_value`, the rotary tables and what they are rounded to, the bias behind each projection down, and for
TeleChat2-39B-A12B the router. Float32, up to the trained length, in no hurry.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor


class TelechatReference:
    """One checkpoint; called like a model of transformers."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                self.tensors[name.removeprefix("transformer.")] = tensor.float()
        self.num_heads = self.config["n_head"]
        self.num_kv_heads = self.config.get("num_key_value_heads") or self.num_heads
        self.head_size = self.config["hidden_size"] // self.num_heads

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def __call__(self, tokens: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.stack([self.logits(row.tolist()) for row in tokens]))

    def logits(self, tokens: list[int]) -> Tensor:
        """What follows each token, [T, Vo]."""
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.config["n_layer"])]
        head = self.tensors.get("lm_head.weight", self.tensors["word_embeddings.weight"])
        rows = []
        for position, token in enumerate(tokens):
            hidden = self.tensors["word_embeddings.weight"][token]
            if self.config.get("embed_layernorm"):
                hidden = self.norm("word_embeddings_layernorm", hidden)
            for layer, past in enumerate(seen):
                hidden = hidden + self.attention(layer, position, hidden, past)
                normed = self.norm(f"h.{layer}.post_attention_layernorm", hidden)
                hidden = hidden + self.feed_forward(f"h.{layer}.mlp", normed)
            rows.append(head @ self.norm("ln_f", hidden))
        return torch.stack(rows)

    def norm(self, name: str, hidden: Tensor) -> Tensor:
        mean_square = sum(value * value for value in hidden.tolist()) / len(hidden)
        eps = self.config.get("layer_norm_epsilon", 1e-5)
        return self.tensors[f"{name}.weight"] * (hidden / math.sqrt(mean_square + eps))

    def attention(
        self, layer: int, position: int, hidden: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        name = f"h.{layer}.self_attention"
        normed = self.norm(f"h.{layer}.input_layernorm", hidden)
        queries = (self.tensors[f"{name}.query.weight"] @ normed).view(self.num_heads, -1)
        # One head's key, then its value, then the next head.
        both = (self.tensors[f"{name}.key_value.weight"] @ normed).view(self.num_kv_heads, -1)
        keys = torch.stack([self.rotated(head[: self.head_size], position) for head in both])
        past.append((keys, both[:, self.head_size :]))
        mixed = []
        for number, query in enumerate(queries):
            shared = number // (self.num_heads // self.num_kv_heads)
            query = self.rotated(query, position)
            scores = [float(query @ keys[shared]) / math.sqrt(self.head_size) for keys, _ in past]
            weights = torch.tensor(scores).softmax(dim=0)
            mixed.append(sum(w * values[shared] for w, (_, values) in zip(weights, past, strict=True)))
        return self.tensors[f"{name}.dense.weight"] @ torch.cat(mixed) + self.tensors[f"{name}.dense.bias"]

    def rotated(self, head: Tensor, position: int) -> Tensor:
        """Entries i and i + h/2 turned by the angle of their frequency."""
        half = self.head_size // 2
        trained = self.config["training_seqlen"]
        assert position < trained
        alpha = max(2 ** math.ceil(math.log2(trained / self.base_length) + 1) - 1, 1)
        base = self.config.get("rope_theta", 10000) * alpha ** (self.head_size / (self.head_size - 2))
        turned = head.clone()
        for i in range(half):
            angle = position * (1.0 / base ** torch.tensor(2 * i / self.head_size))
            cosine, sine = angle.cos().half().float(), angle.sin().half().float()
            turned[i] = head[i] * cosine - head[i + half] * sine
            turned[i + half] = head[i + half] * cosine + head[i] * sine
        return turned

    @property
    def base_length(self) -> int:
        """The 7B, whose head is its embedding, has a constant, the 12B another, TeleChat2 a key."""
        return self.config.get("base_seqlen") or (8192 if "lm_head.weight" in self.tensors else 4096)

    def feed_forward(self, name: str, normed: Tensor) -> Tensor:
        if f"{name}.router.weight" not in self.tensors:
            return self.expert(name, normed)
        probabilities = (self.tensors[f"{name}.router.weight"] @ normed).softmax(dim=0)
        chosen = probabilities.argsort(descending=True)[: self.config["num_experts_per_tok"]].tolist()
        total = sum(float(probabilities[slot]) for slot in chosen) + 1e-9
        outputs = [self.expert(f"{name}.local_experts.{slot}", normed) for slot in chosen]
        return sum(probabilities[s] / total * output for s, output in zip(chosen, outputs, strict=True))

    def expert(self, name: str, normed: Tensor) -> Tensor:
        gate = self.tensors[f"{name}.gate_proj.weight"] @ normed
        up = self.tensors[f"{name}.up_proj.weight"] @ normed
        silu = gate / (1 + (-gate).exp())
        return self.tensors[f"{name}.down_proj.weight"] @ (silu * up) + self.tensors[f"{name}.down_proj.bias"]

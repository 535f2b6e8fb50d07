"""What is special about TeleChat's arithmetic: its rotation, and keys and values of one matrix.

Logits and bundles of both descriptions are compared in `test_families`, with `telechat_reference`.
"""

import pytest
import torch

from moemerge.checkpoint.checkpoint import open_checkpoint
from moemerge.checkpoint.repository import LocalFolder
from moemerge.evaluation.loading import load_model
from moemerge.models.rotary import Rotary, RotaryKind, rotary_tables, trained_length_frequencies
from tests.factories import edit_tensors, write_checkpoint
from tests.telechat import SECOND


def logits(folder, tokens):
    return load_model(open_checkpoint(LocalFolder(folder))).forward(torch.tensor([tokens]))[0]


@pytest.mark.parametrize(
    ("trained", "base", "effective"),
    [
        (8192, 8192, 10000),
        (16384, 8192, 30528),
        (32768, 8192, 72196),
        (65536, 8192, 156588),
        (8192, 4096, 30528),
    ],
)
def test_rotary_base_grows_with_the_trained_length(trained, base, effective):
    """The last one is the 7B's: a constant that is half of what it was trained for."""
    rotary = Rotary(
        rope_theta=10000.0,
        rope_type=RotaryKind.TRAINED_LENGTH,
        rope_base_length=base,
        rope_trained_length=trained,
    )
    frequencies = trained_length_frequencies(rotary, 128, torch.device("cpu"))
    assert float(frequencies[1]) ** -64 == pytest.approx(effective, rel=1e-4)


def test_rotary_tables_are_rounded_to_float16_whatever_computes():
    rotary = Rotary(
        rope_theta=1e4, rope_type=RotaryKind.TRAINED_LENGTH, rope_base_length=64, rope_trained_length=64
    )
    tables = rotary_tables(torch.arange(40), 8, rotary, torch.float32)
    for table in tables:
        assert torch.equal(table, table.half().float())


def test_order_of_key_and_value_rows_counts(tmp_path):
    """Shapes cannot tell: all keys before all values is another model."""
    folder = write_checkpoint(tmp_path / "a", "telechat", dtype="F32", settings=SECOND)
    before = logits(folder, list(range(3, 15)))

    def all_keys_first(tensors):
        for name in [name for name in tensors if name.endswith("key_value.weight")]:
            tensors[name] = tensors[name].view(2, 2, 8, -1).transpose(0, 1).reshape(32, -1).contiguous()

    edit_tensors(folder / "model.safetensors", all_keys_first)
    assert (logits(folder, list(range(3, 15))) - before).abs().max() > 0.1

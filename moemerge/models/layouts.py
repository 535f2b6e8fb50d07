"""Coded matrices in the layouts that a device multiplies without unpacking them.

All have the entries of their codes bit for bit; a product may round elsewhere than one with these entries.
Knows nothing of what the matrices are for.

Shapes: T rows of hidden states, N rows and D columns of the matrix, G groups of columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moemerge.models.packed import LowRank, scale_columns

INT8_ROWS = 48
"""Rows of hidden states up to which an `Int8Matrix` is multiplied faster than it is unpacked.

[3584, 1024], 2 threads of an EPYC with AVX-512, torch 2.13: product of 32 rows 2.0 ms, of 64 rows 3.9 ms;
unpacking 1.3 to 1.9 ms, plain product of 32 rows 0.9 to 1.1 ms, of 64 rows 1.5 ms.
"""
INT4_ROWS = 96
"""The same for an `Int4Matrix`: product of 64 rows 2.7 ms; unpacking 2.4 ms, plain product 1.5 ms.

[7168, 1024], not in the cache: one row takes 0.23 ms, of bf16 in blocks 0.55 ms; from 4 rows on the same.
"""
_INT16_PEAK = 32767
INT16_MIDDLE = 32768


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """Codes of eight bits with one scale per row, as torch multiplies them: entry `(e + 1/2) * scale`.

    Attributes:
        entries: Codes minus 128, int8 [N, D].
        scales: [N, 1].
    """

    entries: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """[N, D]."""
        return self.entries.shape[0], self.entries.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.entries.device

    @property
    def nbytes(self) -> int:
        """Bytes of entries and scales."""
        return self.entries.nbytes + self.scales.nbytes

    @property
    def max_rows(self) -> int:
        """Rows of hidden states up to which `multiply` is the faster way."""
        return INT8_ROWS

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, D]; the same bits as of the codes."""
        values_ND = self.entries.to(torch.float32)
        values_ND += 0.5
        return values_ND.mul_(self.scales.to(torch.float32)).to(dtype)

    def rows(self, start: int, stop: int) -> "Int8Matrix":
        """Rows from `start` to before `stop`, or to the end."""
        return Int8Matrix(self.entries[start:stop], self.scales[start:stop])

    def multiply(self, hidden_TD: Tensor) -> Tensor:
        """`hidden matrix^T`, [T, N]; the product of the entries and that of the halves are rounded apart."""
        scales_N = self.scales.squeeze(1)
        product_TN = torch._weight_int8pack_mm(hidden_TD, self.entries, scales_N)
        half_T1 = hidden_TD.sum(dim=1, keepdim=True, dtype=torch.float32).mul_(0.5).to(hidden_TD.dtype)
        return torch.addcmul(product_TN, half_T1, scales_N)


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """Codes of four bits in the blocks that torch multiplies on a CPU: entry `(code - 8) * scale + zero`.

    Attributes:
        blocks: Bytes [N, D / 2]: for `block` rows at a time and each column, the first half of the rows in
            the low and the second half in the high bits.
        scales: Scales, and halves of them as zeros, [G, N, 2].
        block: Rows of a block.
    """

    blocks: Tensor
    scales: Tensor
    block: int

    @property
    def shape(self) -> tuple[int, int]:
        """[N, D]."""
        return self.blocks.shape[0], self.blocks.shape[1] * 2

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.blocks.device

    @property
    def nbytes(self) -> int:
        """Bytes of blocks and scales."""
        return self.blocks.nbytes + self.scales.nbytes

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scales.shape[0]

    @property
    def max_rows(self) -> int:
        """Rows of hidden states up to which `multiply` is the faster way."""
        return INT4_ROWS

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, D]; the same bits as of the codes."""
        num_rows, num_columns = self.shape
        bytes_BDH = self.blocks.reshape(-1, num_columns, self.block // 2).transpose(1, 2)
        codes_BRD = torch.cat((bytes_BDH & 15, bytes_BDH >> 4), dim=1)
        values_ND = codes_BRD.reshape(num_rows, num_columns).to(torch.float32)
        values_ND -= 7.5
        return scale_columns(values_ND, self.scales[:, :, 0].T, self.group).to(dtype)

    def rows(self, start: int, stop: int) -> "Int4Matrix":
        """Rows from `start` to before `stop`; whole blocks."""
        assert start % self.block == 0
        assert stop % self.block == 0
        return Int4Matrix(self.blocks[start:stop], self.scales[:, start:stop], self.block)

    def multiply(self, hidden_TD: Tensor) -> Tensor:
        """`hidden matrix^T`, [T, N]."""
        product: Tensor = torch._weight_int4pack_mm_for_cpu(hidden_TD, self.blocks, self.group, self.scales)
        return product


@dataclass(frozen=True, slots=True)
class Int4Planes:
    """Codes of five or six bits as two of four bits: the highest ones, and what is left.

    Attributes:
        planes: Both side by side, [N, 2 D]: a product with hidden states that are there twice.
    """

    planes: Int4Matrix

    @property
    def shape(self) -> tuple[int, int]:
        """[N, D]."""
        return self.planes.shape[0], self.planes.shape[1] // 2

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.planes.device

    @property
    def nbytes(self) -> int:
        """Bytes of both planes."""
        return self.planes.nbytes

    @property
    def max_rows(self) -> int:
        """Rows of hidden states up to which `multiply` is the faster way."""
        return self.planes.max_rows // 2

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, D]; the same bits as of the codes, since both planes have few."""
        high_ND, low_ND = self.planes.dense().chunk(2, dim=1)
        return (high_ND + low_ND).to(dtype)

    def rows(self, start: int, stop: int) -> "Int4Planes":
        """Rows from `start` to before `stop`; whole blocks."""
        return Int4Planes(self.planes.rows(start, stop))

    def multiply(self, hidden_TD: Tensor) -> Tensor:
        """`hidden matrix^T`, [T, N]."""
        return self.planes.multiply(torch.cat((hidden_TD, hidden_TD), dim=1))


@dataclass(frozen=True, slots=True)
class Int8Blocks:
    """An `Int8Matrix` in the blocks of the CPU's integer kernels, whose time grows less with rows.

    [7168, 1024], as at `INT8_ROWS`: 1 row takes 0.50 ms either way (bf16 in blocks 0.55), 8 rows 0.65 ms
    instead of 1.63.

    Hidden states are cut into two bytes, 15 bits of the largest of a row, finer than what bf16 keeps of it.

    Attributes:
        blocks: Entries, int8 [D, N] in oneDNN's layout.
        scales: Float32 [N].
        offsets: What cancels that bytes of hidden states have no sign, float32 [N].
    """

    blocks: Tensor
    scales: Tensor
    offsets: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """[N, D]."""
        return self.blocks.shape[1], self.blocks.shape[0]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.scales.device

    @property
    def nbytes(self) -> int:
        """Bytes of blocks, scales and offsets."""
        return self.blocks.nbytes + self.scales.nbytes + self.offsets.nbytes

    @property
    def max_rows(self) -> int:
        """Rows of hidden states up to which `multiply` is the faster way: it always is."""
        return 2**31

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, D]; the same bits as of the codes."""
        return self._unblocked().dense(dtype)

    def rows(self, start: int, stop: int) -> Int8Matrix:
        """Rows from `start` to before `stop`; takes as long as all of them."""
        return self._unblocked().rows(start, stop)

    def multiply(self, hidden_TD: Tensor) -> Tensor:
        """`hidden matrix^T`, [T, N]."""
        num_tokens, width = hidden_TD.shape
        # Not by a norm: torch takes 40 us for the norms of four rows of 3584, 6 us this way.
        peak_T1 = hidden_TD.abs().amax(dim=1, keepdim=True).to(torch.float32)
        step_T1 = peak_T1.clamp_min_(1e-30).div_(_INT16_PEAK)
        steps_TD = hidden_TD / step_T1
        # From minus to plus the peak as numbers from 1 to 65535, low bytes of all tokens before high bytes.
        words_TD = (steps_TD + (INT16_MIDDLE + 0.5)).to(torch.int32)
        bytes_2TD = torch.empty(2, num_tokens, width, dtype=torch.uint8, device=hidden_TD.device)
        bytes_2TD[0] = words_TD  # a byte takes the lowest eight bits
        bytes_2TD[1] = words_TD >> 8
        product_2TN: Tensor = torch.ops.onednn.qlinear_pointwise(
            bytes_2TD, 1.0, 0, self.blocks, self.scales, torch.zeros_like(self.scales, dtype=torch.int64),
            self.offsets, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        sum_TN = torch.add(product_2TN[0], product_2TN[1], alpha=256)
        sum_TN.addcmul_(steps_TD.sum(dim=1, keepdim=True), self.scales, value=0.5)
        return sum_TN.mul_(step_T1).to(hidden_TD.dtype)

    def _unblocked(self) -> Int8Matrix:
        return Int8Matrix(self.blocks.to_dense().T, self.scales.unsqueeze(1))


@dataclass(frozen=True, slots=True)
class Summed:
    """A matrix of a pool expert and a residual, multiplied apart: outputs are added, not entries.

    Attributes:
        pool: [N, D], plain in the dtype of hidden states, or with a product of its own.
        residual: [N, D].
    """

    pool: "Tensor | Arranged"
    residual: "Arranged | LowRank"

    @property
    def shape(self) -> tuple[int, int]:
        """[N, D]."""
        return self.residual.shape

    @property
    def max_rows(self) -> int:
        """Rows of hidden states up to which `multiply` is the faster way."""
        most = self.residual.max_rows
        return most if isinstance(self.pool, Tensor) else min(most, self.pool.max_rows)

    def multiply(self, hidden_TD: Tensor) -> Tensor:
        """`hidden (pool + residual)^T`, [T, N]; both products are rounded, and their sum."""
        pool = self.pool
        product_TN = (
            functional.linear(hidden_TD, pool) if isinstance(pool, Tensor) else pool.multiply(hidden_TD)
        )
        return product_TN.add_(self.residual.multiply(hidden_TD))


Arranged = Int8Matrix | Int8Blocks | Int4Matrix | Int4Planes
"""Coded matrices with a product of their own.

This is where a fused kernel for a device goes: a class with `multiply` and `max_rows` beside what every
coded matrix has, and a place in `arrange`. All else is unpacked (`fill_effective`) and multiplied as a plain
matrix.
"""
Multiplied = Arranged | LowRank | Summed
"""All that is multiplied as it is, but for plain matrices."""

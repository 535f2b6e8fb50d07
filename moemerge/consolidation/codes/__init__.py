"""How matrices are put into few bits: rounding, with or without calibration, and low rank.

Pure: tensors in, `models.packed` out. For other rooms: `encode`, `Moment`, `Code`.
"""

"""Runs a variant on its own text and keeps, per expert, what merging decisions are made from.

Knows nothing of clustering. For other rooms: `calibrating.calibrate`, `folder.open_calibration`,
`folder.Calibration`, `statistics.LayerStatistics`, `random_inputs.random_statistics`, `texts`.
"""

"""Pure distances between experts, costs of replacing one by another, and the matrices they are kept in.

Knows nothing of files or devices. For other rooms: `gram.GramAccumulator`, `gram.ExpertGram`,
`distances.DISTANCES`, `matrices.LayerSimilarity`; with calibration `replacement`, `ward`, `saliency`, and for
reports `agreement`.
"""

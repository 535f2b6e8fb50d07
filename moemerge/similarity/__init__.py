"""Pure distances between experts and the matrices they are kept in.

Knows nothing of files or devices. For other rooms: `gram.GramAccumulator`, `gram.ExpertGram`,
`distances.DISTANCES`, `matrices.LayerSimilarity`.
"""

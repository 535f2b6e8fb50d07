"""From several checkpoints to a bundle: measuring, clustering, merge operators, the plan, the pipeline.

Knows nothing of serving. For other rooms: `pipeline.merge`, `planning.plan_variants`,
`recipe.options_of`, `plan.ConsolidationPlan`, `layers.write_similarity`.
"""

"""Measures serving: workloads, the systems compared over one trace, and a table of claims.

Knows nothing of terminals. For other rooms: `comparison.compare`, `claims.measure_claims`,
`report.Report`, `generated.generate`.
"""

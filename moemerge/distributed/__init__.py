"""Work and serving on a Ray cluster: an executor of the work that the local engine does, and a deployment.

The only room that knows Ray. For other rooms: `cluster.Cluster`, `executor.OnCluster`,
`deployment.deploy`.
"""

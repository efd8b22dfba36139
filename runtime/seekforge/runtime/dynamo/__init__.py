"""A worker of NVIDIA Dynamo: its frontend speaks HTTP, its router chooses among workers, each of which has an engine.

Dynamo drives the worker through its Python backend interface (`dynamo.common.backend`): `worker` is what it calls,
`wire` what its requests and chunks mean, `model_card` what its frontend reads of a model.
"""

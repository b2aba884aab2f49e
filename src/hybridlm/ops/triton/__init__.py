"""Triton kernels behind `hybridlm.ops`, each file a formula of `hybridlm.ops.reference` with its gradient."""

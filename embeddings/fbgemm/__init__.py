"""Tables over fbgemm's kernels and torchrec's sharding: how tables live on CUDA."""

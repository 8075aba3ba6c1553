"""How noisy gradients are: per-example norms from one backward pass, the noise scale, the critical batch size."""

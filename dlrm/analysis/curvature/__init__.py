"""How a loss is curved around a solution: the Hessian's eigenvalues, sharpness, landscapes, a rate made of them."""

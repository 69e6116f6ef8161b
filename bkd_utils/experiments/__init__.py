"""What a notebook measures and keeps: one module per notebook, named like it."""
